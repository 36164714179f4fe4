//! A conversation with the model inside the program, tools and all: the same text on the CPU and on a software Vulkan driver.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Questions, and what their answers hold. The first are those that the first screen offers, but for the time.
const SCRIPT: [(&str, &str); 8] = [
    ("What is 17.5% of 2480?", "The result is 434."),
    ("Make a note: buy milk and bread", "Saved as note 1."),
    ("hello", "Hello"),
    ("list my notes", "buy milk and bread"),
    ("Which files are here?", "budget.csv"),
    ("add up all numbers in budget.csv", "The result is 1422."),
    ("what is 12 * (3 + 4)", "The result is 84."),
    ("send an email to Anna", "I can't"),
];

/// The answers of one run, calls and results among them; none where the device is not there.
fn converse(device: &str) -> Option<Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("budget.csv"), "rent: 950\nfood: 410\nbus: 62\n").unwrap();
    let notes = dir.path().join("notes.json");
    let path = |path: &Path| path.to_str().unwrap().to_string();
    let mut child = Command::new(env!("CARGO_BIN_EXE_gatedelta-agent"))
        .args(["--device", device, "--json", "--folder", &path(&folder), "--notes", &path(&notes)])
        .env("XDG_RUNTIME_DIR", std::env::temp_dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let questions: Vec<&str> = SCRIPT.iter().map(|(question, _)| *question).collect();
    child.stdin.take().unwrap().write_all(questions.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).to_string();
    if !output.status.success() && stderr.contains("no device") {
        let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name.trim() == device), "{device} is required: {stderr}");
        println!("skipped: {device}: {stderr}");
        return None;
    }
    assert!(output.status.success(), "{stderr}");
    let mut answers = vec![String::new()];
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        let answer = answers.last_mut().unwrap();
        match event["event"].as_str().unwrap() {
            "token" => answer.push_str(event["text"].as_str().unwrap()),
            "tool_call" => answer.push_str(&format!("[{} {}]", event["name"], event["arguments"])),
            // The time of a note differs from run to run.
            "tool_result" => assert_eq!(event["ok"], true, "{line}"),
            "done" => answers.push(String::new()),
            _ => {}
        }
    }
    answers.pop();
    Some(answers)
}

#[test]
fn the_model_serves_a_conversation_the_same_everywhere() {
    let here = converse("cpu").expect("a CPU");
    assert_eq!(here.len(), SCRIPT.len());
    for (answer, (question, expected)) in here.iter().zip(SCRIPT) {
        assert!(answer.contains(expected), "{question}: {answer}");
    }
    if let Some(there) = converse("lavapipe") {
        assert_eq!(there, here);
    }
}
