//! Measures a server: several clients at once, each of whom wants the same number of tokens.
//!
//! `clients URL MODEL TOKENS CLIENTS...`, for example `clients http://127.0.0.1:8080 gatedelta-agent 256 1 4 8`

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [url, model, tokens, clients @ ..] = args.as_slice() else {
        anyhow::bail!("usage: clients URL MODEL TOKENS CLIENTS...");
    };
    let tokens: u64 = tokens.parse().context("TOKENS")?;
    println!("clients  tokens/s  of each  s");
    for clients in clients {
        let clients: u64 = clients.parse().context("CLIENTS")?;
        ask(url, model, 8, 0)?;
        let begin = Instant::now();
        let wrote = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..clients).map(|i| scope.spawn(move || ask(url, model, tokens, i))).collect();
            let answers = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a client broke down")));
            answers.sum::<Result<u64>>()
        })?;
        let time = begin.elapsed().as_secs_f64();
        let rate = wrote as f64 / time;
        println!("{clients:>7}  {rate:>8.1}  {:>7.1}  {time:.2}", rate / clients as f64);
    }
    Ok(())
}

/// One answer of so many tokens; how many came.
fn ask(url: &str, model: &str, tokens: u64, client: u64) -> Result<u64> {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(600)));
    let agent: ureq::Agent = config.build().into();
    let prompt = format!("client {client}: 1 2 3 4 5 6 7 8 9");
    let body = json!({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": client,
        "ignore_eos": true});
    let mut request = agent.post(format!("{url}/v1/completions"));
    if let Ok(key) = std::env::var("GATEDELTA_API_KEY") {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let mut response = request.send_json(&body)?;
    let status = response.status();
    let answer: Value = response.body_mut().read_json()?;
    ensure!(status.is_success(), "{answer}");
    answer["usage"]["completion_tokens"].as_u64().context("no usage")
}
