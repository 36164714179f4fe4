//! What no client of good will sends: bytes that are no request, requests that never end, bodies that are no JSON.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::util::{Running, endless, first_event, head_and_body, start};

const CHAT: &str = "/v1/chat/completions";

/// Sends a body, and gives the status and the body that come back.
fn send(server: &Running, body: &[u8]) -> (String, String) {
    let mut request = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend(body);
    let reply = server.raw(&request);
    let status = reply.split(' ').nth(1).unwrap_or_default().to_string();
    (status, reply.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default())
}

#[test]
fn bodies_that_are_no_requests() {
    let server = start("--slots 1 --body-limit 65536");
    let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n)).into_bytes();
    let deep_schema = format!(
        "{{\"model\": \"gatedelta-agent\", \"messages\": [], \"tools\": {}{}}}",
        "{\"a\":".repeat(20_000 / 5),
        "}".repeat(20_000 / 5)
    );
    let bodies: Vec<(Vec<u8>, &str, &str)> = vec![
        (b"".to_vec(), "400", "parse"),
        (b"{".to_vec(), "400", "parse"),
        (b"hello".to_vec(), "400", "parse"),
        (b"{\"model\": \"gatedelta-agent\"}}".to_vec(), "400", "parse"),
        (b"{\"model\": \"\xff\xfe\"}".to_vec(), "400", "parse"),
        (b"{\"model\": \"\\ud800\"}".to_vec(), "400", "parse"),
        (b"\0\0\0\0".to_vec(), "400", "parse"),
        (b"null".to_vec(), "400", "body"),
        (b"[]".to_vec(), "400", "body"),
        (b"1e999".to_vec(), "400", "parse"),
        (deep(200), "400", "recursion"),
        (deep(30_000), "400", "recursion"),
        (deep_schema.into_bytes(), "400", "recursion"),
        (vec![b' '; 70_000], "413", "65536"),
    ];
    for (body, status, word) in bodies {
        let (found, text) = send(&server, &body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!(found, status, "{shown}: {text}");
        let error: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains(word), "{shown}: {text}");
    }
    server.quiet();
    assert_eq!(server.complete(endless(2, false)).status, 200);
}

#[test]
fn bytes_that_are_no_requests() {
    let server = start("--slots 1 --network-limit 5");
    for bytes in [
        &b"hello\r\n\r\n"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let reply = server.raw(bytes);
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 4") || reply.starts_with("HTTP/1.1 505"), "{reply}");
    }
    let many = format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X-A: b\r\n".repeat(20_000));
    let reply = server.raw(many.as_bytes());
    assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 431"), "{reply}");
    let plain = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nConnection: close\r\n\
        Content-Length: 2\r\n\r\n{}";
    assert!(server.raw(plain.as_bytes()).starts_with("HTTP/1.1 415"));
    let broken = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
        Transfer-Encoding: chunked\r\n\r\nzz\r\n";
    assert!(server.raw(broken.as_bytes()).starts_with("HTTP/1.1 400"));
    assert_eq!(server.complete(endless(2, false)).status, 200);
}

#[test]
fn requests_that_never_end_lose_their_connection() {
    let server = start("--slots 1 --network-limit 1 --connections 4");
    let whole = head_and_body("/v1/completions", &endless(2, false).to_string());
    // Half a head, half a body, and a byte at a time: more of them than there are connections.
    let mut halves = Vec::new();
    for at in [0, 1, 30, whole.len() - 40, whole.len() - 1, 10] {
        let mut stream = server.connect();
        stream.write_all(&whole.as_bytes()[..at]).unwrap();
        halves.push(stream);
    }
    let begin = Instant::now();
    let mut slow = server.connect();
    for byte in whole.as_bytes() {
        if slow.write_all(&[*byte]).is_err() || begin.elapsed() > Duration::from_secs(12) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(begin.elapsed() < Duration::from_secs(12), "a slow request is read for ever");
    for mut stream in halves {
        let mut back = Vec::new();
        let _ = stream.read_to_end(&mut back);
        let back = String::from_utf8_lossy(&back);
        assert!(back.is_empty() || back.starts_with("HTTP/1.1 408"), "{back}");
    }
    assert_eq!(server.complete(endless(2, false)).status, 200);
}

#[test]
fn a_reader_that_takes_nothing_stops_nobody() {
    let server = start("--slots 2 --network-limit 1 --time-limit 8");
    let mut body = endless(8000, true);
    // Much to send for each token.
    body["logprobs"] = json!(5);
    let mut first = server.open("/v1/completions", &body);
    first_event(&mut first);
    let begin = Instant::now();
    assert_eq!(server.complete(endless(40, false)).ok()["usage"]["completion_tokens"], 40);
    server.quiet();
    assert!(begin.elapsed() < Duration::from_secs(15));
    drop(first);
}
