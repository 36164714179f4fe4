//! The program as a script sees it: the built-in checkpoint on the CPU.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn agent(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gatedelta-agent"));
    command.args(args);
    command.stdin(Stdio::null()).env_remove("GATEDELTA_DEVICE").env_remove("RUST_LOG");
    // Some drivers complain on the standard error where it is unset.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    command
}

fn run(args: &[&str]) -> Output {
    agent(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The events on the standard output; each line must be an object.
fn events(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

/// All text and counts, without the times.
fn content(events: &[Value]) -> Vec<Value> {
    let mut events = events.to_vec();
    for event in &mut events {
        let event = event.as_object_mut().unwrap();
        event.retain(|key, _| !key.ends_with("_seconds") && key != "tokens_per_second");
    }
    events
}

const GREEDY: [&str; 8] = ["--device", "cpu", "--prompt", "hi", "--greedy", "--max-tokens", "8", "--json"];

#[test]
fn one_shot_as_json() {
    let output = run(&GREEDY);
    let events = events(&output);
    let (start, done) = (&events[0], events.last().unwrap());
    assert_eq!((&start["event"], &start["sampling"]), (&"start".into(), &serde_json::json!({"greedy": true})));
    assert!(
        start["device"].as_str().unwrap().contains("cpu")
            && start["why"].as_str().unwrap().contains("asked for by name")
    );
    assert_eq!(start["tools"].as_array().unwrap().len(), 5);
    assert_eq!(kinds(&events)[1], "prefill");
    let read = events.iter().rfind(|event| event["event"] == "prefill").unwrap();
    assert_eq!((&read["done"], &read["reused"]), (&read["total"], &0.into()));
    assert_eq!(done["event"], "done");
    assert!(["length", "stop"].contains(&done["reason"].as_str().unwrap()));
    assert_eq!(done["prompt_tokens"], read["total"]);
    assert!((1..=8).contains(&done["generated_tokens"].as_u64().unwrap()));
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn the_same_again() {
    assert_eq!(content(&events(&run(&GREEDY))), content(&events(&run(&GREEDY))));
    let drawn = |seed: &str| {
        let args =
            ["--device", "cpu", "--prompt", "hi", "--seed", seed, "--temperature", "4", "--max-tokens", "24", "--json"];
        content(&events(&run(&args)))
    };
    let one = drawn("1");
    assert_eq!(one, drawn("1"));
    assert_ne!(one[1..], drawn("2")[1..]);
}

#[test]
fn plain_output_is_the_answer_alone() {
    let output = run(&["--device", "cpu", "--prompt", "hi", "--seed", "3", "--max-tokens", "8"]);
    let told = text(&output.stderr);
    assert!(output.status.success());
    assert!(
        told.contains("Things to try:") && told.contains("asked for by name") && told.contains("tokens/s"),
        "{told}"
    );
    for stream in [text(&output.stdout), told] {
        assert!(!stream.contains('\u{1b}'), "no colours where there is no terminal: {stream:?}");
    }
}

#[test]
fn lines_of_the_standard_input_are_one_conversation() {
    let mut child = agent(&["--device", "cpu", "--greedy", "--max-tokens", "4", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all("one\n\n two \nthree".as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let events = events(&output);
    let done: Vec<&Value> = events.iter().filter(|event| event["event"] == "done").collect();
    assert_eq!((kinds(&events)[0], done.len()), ("start", 3));
    let prompts: Vec<u64> = done.iter().map(|done| done["prompt_tokens"].as_u64().unwrap()).collect();
    assert!(prompts[0] < prompts[1] && prompts[1] < prompts[2], "{prompts:?}");
}

#[test]
fn the_prompt_may_come_from_the_standard_input() {
    let mut child = agent(&["--device", "cpu", "--prompt", "-", "--greedy", "--max-tokens", "2", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all("a long\nprompt\n".repeat(200).as_bytes()).unwrap();
    let events = events(&child.wait_with_output().unwrap());
    assert!(events.last().unwrap()["prompt_tokens"].as_u64().unwrap() > 1000);
}

#[test]
fn an_outgrown_context_is_an_error_with_numbers() {
    let output = run(&["--device", "cpu", "--prompt", "hi", "--context", "16", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("tokens") && stderr.contains("16") && stderr.contains("--context"), "{stderr}");
    let last = text(&output.stdout).lines().last().unwrap().to_string();
    let last: Value = serde_json::from_str(&last).unwrap();
    assert_eq!(last["event"], "error");
    assert!(stderr.contains(last["message"].as_str().unwrap()));
}

#[test]
fn bad_input_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (dir, file) = (dir.path().to_str().unwrap(), file.to_str().unwrap());
    for (args, code, expected) in [
        (vec!["--model", "/no/such/dir", "--prompt", "x"], 1, "/no/such/dir"),
        (vec!["--model", dir, "--prompt", "x"], 1, "config.json"),
        (vec!["--model", file, "--prompt", "x"], 1, "no such directory"),
        (vec!["--device", "toaster", "--prompt", "x"], 1, "toaster"),
        (vec!["--folder", "/no/such/dir", "--prompt", "x"], 1, "--folder /no/such/dir"),
        (vec!["--prompt", " "], 1, "empty"),
        (vec!["--device", "cpu", "--top-p", "7", "--prompt", "x"], 1, "top_p"),
        (vec!["--device", "cpu", "--context", "99999999", "--prompt", "x"], 1, "99999999"),
        (vec!["--session", file, "--prompt", "x"], 1, "--session"),
        (vec!["--session", dir, "--no-session"], 2, "--no-session"),
        (vec!["--max-tokens", "0"], 2, "--max-tokens"),
        (vec!["--greedy", "--temperature", "1"], 2, "--temperature"),
        (vec!["--nonsense"], 2, "--nonsense"),
    ] {
        let output = run(&args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(expected) && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}

#[test]
fn a_broken_checkpoint_is_refused_in_words() {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    for (name, content, expected) in [
        ("config.json", "{", "config.json"),
        ("config.json", "{\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"]}", "lama"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja"),
        ("model.safetensors", "short", "model.safetensors"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&built_in).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        std::fs::write(dir.path().join(name), content).unwrap();
        let output =
            run(&["--device", "cpu", "--model", dir.path().to_str().unwrap(), "--prompt", "x", "--max-tokens", "2"]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {stderr}");
        assert!(stderr.contains(expected) && !stderr.contains("panicked"), "{name}: {stderr}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_a_one_shot_with_130() {
    use std::io::{BufRead, BufReader};
    let mut child = agent(&[
        "--device",
        "cpu",
        "--prompt",
        "hi",
        "--seed",
        "1",
        "--temperature",
        "5",
        "--max-tokens",
        "1000000",
        "--json",
    ])
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut last = String::new();
    let mut sent = false;
    for line in &mut lines {
        last = line.unwrap();
        if !sent && last.contains("\"token\"") {
            let pid = child.id().to_string();
            assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
            sent = true;
        }
    }
    let status = child.wait().unwrap();
    let last: Value = serde_json::from_str(&last).unwrap();
    // What is drawn so wildly may have come to its own end before the signal did.
    match last["reason"].as_str() {
        Some("interrupted") => assert_eq!(status.code(), Some(130)),
        reason => assert_eq!((reason, status.code()), (Some("stop"), Some(0))),
    }
}

#[test]
fn a_closed_output_is_no_crash() {
    let mut child = agent(&["--device", "cpu", "--prompt", "hi", "--seed", "1", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(1), ""));
}

/// Lines to a program that keeps its session in a folder; its events.
fn session(folder: &Path, lines: &str) -> Vec<Value> {
    let folder = folder.to_str().unwrap();
    let mut child = agent(&["--device", "cpu", "--greedy", "--max-tokens", "64", "--json", "--session", folder])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    events(&child.wait_with_output().unwrap())
}

#[test]
fn a_session_goes_on_in_the_next_program() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = session(whole.path(), "hello\nwhat is 2 + 3?\n");
    let first = session(parts.path(), "hello\n");
    let second = session(parts.path(), "what is 2 + 3?\n");
    let spoken = |events: &[Value]| {
        let tokens = events.iter().filter(|event| event["event"] == "token");
        tokens.map(|event| event["text"].as_str().unwrap()).collect::<String>()
    };
    assert!(first.iter().all(|event| event["event"] != "restored"));
    assert_eq!(spoken(&first) + &spoken(&second), spoken(&expected));
    let restored = second.iter().find(|event| event["event"] == "restored").expect("what was restored");
    let (tokens, total) = (restored["tokens"].as_u64().unwrap(), restored["total"].as_u64().unwrap());
    assert!(restored["turns"] == 1 && tokens <= total && total - tokens < 16, "{restored}");
    // The same tokens are reused, stop or no stop.
    let last = |events: &[Value]| events.last().unwrap()["reused_tokens"].as_u64().unwrap();
    assert!(last(&second) >= tokens && last(&second) == last(&expected), "{second:?}");

    let file = parts.path().join("conversation.json");
    std::fs::write(&file, "{").unwrap();
    let output = run(&["--device", "cpu", "--prompt", "hi", "--session", parts.path().to_str().unwrap()]);
    let stderr = text(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("malformed"), "{stderr}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{");
}
