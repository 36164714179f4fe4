//! The server stops: what runs may end, what waits is told, and nothing takes longer than it may.

use std::io::Read;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::util::{endless, first_event, start};

#[test]
fn running_answers_end_by_themselves() {
    let mut server = start("--slots 1 --grace 60");
    let mut first = server.open("/v1/completions", &endless(300, true));
    first_event(&mut first);
    let mut waiting = server.open("/v1/completions", &endless(2, false));
    while server.metric("gatedelta_requests_waiting") < 1.0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    server.stop();
    let mut told = String::new();
    waiting.read_to_string(&mut told).unwrap();
    assert!(told.starts_with("HTTP/1.1 503"), "{told}");
    let mut rest = String::new();
    first.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"max_tokens\"") && rest.contains("[DONE]"), "{rest}");
    drop(server);
}

#[test]
fn answers_that_take_too_long_are_ended_with_a_reason() {
    let mut server = start("--slots 1 --grace 0.3");
    let mut first = server.open("/v1/completions", &endless(100_000, true));
    first_event(&mut first);
    let begin = Instant::now();
    server.stop();
    let mut rest = String::new();
    first.read_to_string(&mut rest).unwrap();
    assert!(rest.contains(&format!("\"stop_reason\":{}", json!("shutdown"))) && rest.contains("[DONE]"), "{rest}");
    drop(server);
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[cfg(unix)]
#[test]
fn a_signal_stops_the_program() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let mut child = Command::new(env!("CARGO_BIN_EXE_gatedelta-server"))
        .args(["--device", "cpu", "--port", "0", "--slots", "1", "--context", "256"])
        .env_remove("GATEDELTA_API_KEY")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
    let listens = told.find_map(|line| line.unwrap().strip_prefix("listen  http://").map(str::to_string)).unwrap();
    assert!(std::net::TcpStream::connect(&listens).is_ok(), "{listens}");
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let begin = Instant::now();
    assert!(child.wait().unwrap().success());
    assert!(begin.elapsed() < Duration::from_secs(10));
    // A key that can be guessed, and an address that is taken.
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port().to_string();
    for (args, key, word) in [(["--port", "0"], "short", "16"), (["--port", port.as_str()], "", "cannot listen on")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gatedelta-server"));
        command.args(["--device", "cpu", "--context", "256"]).args(args).env_remove("GATEDELTA_API_KEY");
        if !key.is_empty() {
            command.env("GATEDELTA_API_KEY", key);
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && stderr.contains(word), "{stderr}");
    }
}
