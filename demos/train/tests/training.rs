//! Training as a process that is killed, and one whose disk is full.
#![cfg(feature = "burn")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_gatedelta-train");

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn good(output: &Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// A tokenizer and a data file.
fn prepare(dir: &Path) {
    let run = |line: &str| good(&Command::new(PROGRAM).args(line.split(' ')).current_dir(dir).output().unwrap());
    run("tokenizer --vocab 300 --conversations 4 --out tokenizer");
    run("data --conversations 12 --tokenizer tokenizer --out data.safetensors");
}

/// The command line of a small run in `out`.
fn line(out: &str, steps: u64) -> Vec<String> {
    let line = format!(
        "agent --data data.safetensors --tokenizer tokenizer --device cpu --out {out} --steps {steps} --save 1 --tokens 64 --hidden 16 \
         --layers 4 --intermediate 16 --linear-heads 1 --linear-dim 16 --heads 1 --kv-heads 1 --head-dim 16 --context 65536"
    );
    line.split_whitespace().map(str::to_string).collect()
}

fn model(dir: &Path, out: &str) -> Vec<u8> {
    fs::read(dir.join(out).join("model/model.safetensors")).unwrap()
}

#[test]
fn a_run_that_is_killed_goes_on_and_a_full_disk_leaves_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let agent = |out: &str| Command::new(PROGRAM).args(line(out, 4)).current_dir(dir).output().unwrap();
    good(&agent("whole"));

    let child = Command::new(PROGRAM).args(line("killed", 4)).current_dir(dir).stdout(Stdio::null()).spawn();
    kill_after(&dir.join("killed/run.safetensors"), child.unwrap());
    let saved = fs::read(dir.join("killed/run.safetensors")).unwrap();

    // A limit on the size of files stands for the full disk: the next checkpoint does not fit.
    #[cfg(unix)]
    {
        // What the kill cut short is still there; nothing may be added to it.
        let partials = || fs::read_dir(dir.join("killed")).unwrap().filter(|f| partial(f.as_ref().unwrap())).count();
        let before = partials();
        let script = "ulimit -f 8 && trap '' XFSZ && exec \"$0\" \"$@\"";
        let full = Command::new("sh").args(["-c", script, PROGRAM]).args(line("killed", 4)).current_dir(dir).output();
        let full = full.unwrap();
        let why = text(&full.stderr);
        assert_eq!(full.status.code(), Some(1), "{why}");
        assert!(why.contains("run.safetensors cannot be written") && why.contains("too large"), "{why}");
        assert!(fs::read(dir.join("killed/run.safetensors")).unwrap() == saved, "the file is as it was");
        assert_eq!(partials(), before);
    }

    good(&agent("killed"));
    assert!(model(dir, "whole") == model(dir, "killed"), "the weights are the same, stop or no stop");
}

/// Whether a file is one that was being written.
#[cfg(unix)]
fn partial(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with(".tmp")
}

/// Kills a run once there is this file.
fn kill_after(file: &Path, mut child: Child) {
    let began = Instant::now();
    while !file.exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it saved");
        assert!(began.elapsed() < Duration::from_secs(600), "nothing was saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
