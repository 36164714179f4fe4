//! Many clients at once, some of whom leave at random: nobody gets a wrong answer, nothing is stuck, nothing stays behind.

use std::io::BufRead;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gatedelta::qwen::SplitMix64;
use serde_json::{Value, json};

use crate::util::{Running, calculator, start, system, user};

const CLIENTS: u64 = 30;
const TIME: Duration = Duration::from_secs(20);

const QUESTIONS: [&str; 6] = [
    "hello",
    "What is 17.5% of 2480?",
    "what is 12 * (3 + 4)",
    "send an email to Anna",
    "what is 981 - 77",
    "thank you",
];

fn body(question: &str, stream: bool) -> Value {
    json!({
        "model": "gatedelta-agent", "messages": [system(), user(question)], "tools": [calculator()], "temperature": 0,
        "max_tokens": 60, "stream": stream,
    })
}

/// What an answer says, without ids.
fn said(message: &Value) -> String {
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let calls: Vec<String> = calls.map(|call| call["function"].to_string()).collect();
    format!("{} {}", message["content"].as_str().unwrap_or_default(), calls.join(" "))
}

/// Reads a stream, or leaves it after some events; what it said, if it was read to its end.
fn streamed(server: &Running, question: &str, leave: Option<u64>) -> Option<String> {
    let mut lines = server.open("/v1/chat/completions", &body(question, true));
    let (mut content, mut calls, mut events) = (String::new(), Vec::new(), 0);
    let mut line = String::new();
    loop {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "the stream was cut");
        let Some(data) = line.strip_prefix("data: ") else {
            let status = line.strip_prefix("HTTP/1.1 ");
            assert!(status.is_none_or(|status| status.starts_with("200")), "{line}");
            continue;
        };
        events += 1;
        if leave.is_some_and(|leave| events > leave) {
            return None;
        }
        if data.trim() == "[DONE]" {
            return Some(said(&json!({"content": content, "tool_calls": calls})));
        }
        let chunk: Value = serde_json::from_str(data).unwrap();
        let delta = &chunk["choices"][0]["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        calls.extend(delta["tool_calls"].as_array().cloned().unwrap_or_default());
    }
}

/// Kilobytes of this process in memory, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

#[test]
fn thirty_clients() {
    let server = start("--slots 8 --queue 64 --connections 256 --cache 32");
    let expected: Vec<String> = QUESTIONS
        .iter()
        .map(|question| said(&server.chat(body(question, false)).ok()["choices"][0]["message"]))
        .collect();
    let (whole, left) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begin = Instant::now();
    let after_a_while = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, expected, whole, left, after_a_while) = (&server, &expected, &whole, &left, &after_a_while);
            scope.spawn(move || {
                let mut random = SplitMix64::new(client);
                while begin.elapsed() < TIME {
                    let at = (random.bits() % QUESTIONS.len() as u64) as usize;
                    let answer = match random.bits() % 4 {
                        // Leaves before the head of the answer, or in the middle of it.
                        0 => {
                            let stream =
                                server.open("/v1/chat/completions", &body(QUESTIONS[at], random.bits() % 2 == 0));
                            std::thread::sleep(Duration::from_millis(random.bits() % 300));
                            drop(stream);
                            None
                        }
                        1 => streamed(server, QUESTIONS[at], Some(random.bits() % 6)),
                        2 => streamed(server, QUESTIONS[at], None),
                        _ => Some(said(&server.chat(body(QUESTIONS[at], false)).ok()["choices"][0]["message"])),
                    };
                    match answer {
                        Some(answer) => {
                            assert_eq!(answer, expected[at], "{}", QUESTIONS[at]);
                            whole.fetch_add(1, Ordering::Relaxed);
                        }
                        None => drop(left.fetch_add(1, Ordering::Relaxed)),
                    }
                    if begin.elapsed() > TIME / 4 && after_a_while.load(Ordering::Relaxed) == 0 {
                        after_a_while.store(resident().unwrap_or(1) as usize, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let (whole, left) = (whole.into_inner(), left.into_inner());
    println!("{whole} whole answers, {left} clients left");
    assert!(whole >= 30 && left >= 30, "{whole} whole, {left} left");
    server.quiet();
    // One connection is the one that asks.
    let begin = Instant::now();
    while server.metric("gatedelta_connections") > 3.0 {
        assert!(begin.elapsed() < Duration::from_secs(5), "connections stay open");
        std::thread::sleep(Duration::from_millis(20));
    }
    if let Some(now) = resident() {
        let before = after_a_while.into_inner() as u64;
        assert!(now < before + 64 * 1024, "{before} kB after a while, {now} kB at the end");
    }
    assert_eq!(said(&server.chat(body(QUESTIONS[2], false)).ok()["choices"][0]["message"]), expected[2]);
}
