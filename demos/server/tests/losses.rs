//! The device fails while answers are under way: all of them go on, and the server says what happened.

use std::io::BufRead;
use std::sync::Arc;

use clap::Parser;
use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::backend::faulty::{Fault, Plan};
use gatedelta::device::Account;
use gatedelta::qwen::Place;
use gatedelta_server::options::Args;
use serde_json::{Value, json};

use crate::util::{Running, first_event, start_own};

/// Longer than any of the answers takes to be read.
const TOKENS: u64 = 40;

fn body(prompt: &str, temperature: f64) -> Value {
    let ends: serde_json::Map<String, Value> =
        crate::util::loaded().recovery.model().stop_ids().iter().map(|id| (id.to_string(), json!(-100))).collect();
    json!({
        "model": "gatedelta-agent", "prompt": prompt, "max_tokens": TOKENS, "temperature": temperature, "seed": 5, "stream": true,
        "logit_bias": ends,
    })
}

/// The text of several streams, which begin together.
fn texts(server: &Running, bodies: &[Value]) -> Vec<String> {
    let mut streams: Vec<_> = bodies.iter().map(|body| server.open("/v1/completions", body)).collect();
    let text = |line: &str| -> Option<String> {
        let data = line.strip_prefix("data: ")?.trim();
        let chunk: Value = serde_json::from_str(data).ok()?;
        assert!(chunk.get("error").is_none(), "{chunk}");
        Some(chunk["choices"][0]["text"].as_str().unwrap_or_default().to_string())
    };
    let mut out: Vec<String> =
        streams.iter_mut().map(|stream| text(&first_event(stream)).unwrap_or_default()).collect();
    for (out, stream) in out.iter_mut().zip(&mut streams) {
        let mut line = String::new();
        while !line.starts_with("data: [DONE]") {
            line.clear();
            assert!(stream.read_line(&mut line).unwrap() > 0, "the stream was cut after {out:?}");
            *out += &text(&line).unwrap_or_default();
        }
    }
    out
}

#[test]
fn answers_under_way_go_on_after_losses() {
    let plan = Plan::default();
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::new(None).unwrap());
    let of_plan = plan.clone();
    let open = move |place| {
        let backend: Arc<dyn Backend> = match place {
            Place::Chosen => Arc::new(of_plan.around(cpu.clone())),
            Place::Cpu => cpu.clone(),
        };
        Ok((backend, Account::default()))
    };
    let loaded = gatedelta_server::load_on(&Args::parse_from(["server"]), open).unwrap();
    let server = start_own(&loaded, "--slots 3");
    let bodies = [body("hello", 0.0), body("What is 12 * 3?", 0.9), body("one two three four", 0.0)];
    let expected = texts(&server, &bodies);
    assert!(expected.iter().all(|text| text.len() > 20), "{expected:?}");
    assert_eq!(server.get("/health").ok(), json!({"status": "ok"}));
    assert_eq!(server.metric("gatedelta_device_losses_total"), 0.0);

    for (fault, losses, recoveries) in [(Fault::OutOfMemory, 0, 0), (Fault::Driver, 1, 1), (Fault::Lost, 2, 2)] {
        // A token takes three calls or more, however many answers it is written for.
        plan.fail_after(2 * TOKENS, fault);
        let found = texts(&server, &bodies);
        assert_eq!(found, expected, "{fault:?}");
        server.quiet();
        // A pass that needs no memory may not have met the one that refuses some.
        assert!(plan.met().iter().any(|met| met.1 == fault) || fault == Fault::OutOfMemory);
        let health = server.get("/health").ok();
        assert_eq!(health["status"], "ok");
        if losses > 0 {
            let device = &health["device"];
            assert_eq!((&device["losses"], &device["recoveries"]), (&json!(losses), &json!(recoveries)), "{health}");
            assert_eq!(device["on_cpu"], losses == 2, "{health}");
            assert!(device["last"].as_str().unwrap().contains("a test"), "{health}");
        }
        assert_eq!(server.metric("gatedelta_device_losses_total"), losses as f64);
        assert_eq!(server.metric("gatedelta_device_recoveries_total"), recoveries as f64);
        assert_eq!(server.metric("gatedelta_device_on_cpu"), f64::from(u8::from(losses == 2)));
    }
    // On the CPU it goes on as ever.
    assert_eq!(texts(&server, &bodies), expected);
    assert_eq!(server.metric("gatedelta_answers_total{end=\"max_tokens\"}"), 15.0);
}
