//! Times the way back from disk: a session of 4,000 tokens is saved, and restored from files that the system has in memory.
//!
//! What comes back must go on with the bits of what was saved. Layers and heads are those of the size; the matrices around them,
//! which a restore does not touch, are narrow, so that the text is read in no time.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use gatedelta::backend::Backend;
use gatedelta::qwen::{Config, LoadOptions, Model, Session, Snapshot, Store};
use gatedelta::shape::Dtype;
use serde_json::json;

use crate::bench::print_json;
use crate::oracle::Random;
use crate::say;
use crate::table::{Table, bytes, metric, significant};
use crate::timing::Sample;

/// Tokens of the session.
const TOKENS: usize = 4000;

/// How often it is restored.
const RUNS: usize = 20;

/// Restores sessions with keys and values of both types.
///
/// # Errors
/// A size that does not exist, a disk or a device that fails, a session that does not come back bit by bit.
pub fn run(backend: &Arc<dyn Backend>, size: &str, json: bool) -> Result<()> {
    let columns = ["keys and values", "of it states", "median ms", "min..max ms", "runs", "B/s", "save ms", "copy ms"];
    let mut table = Table::new(1, &columns);
    for kv in [Dtype::F32, Dtype::F16] {
        let row = restore(backend, size, kv).with_context(|| format!("with keys and values in {kv}"))?;
        let (s, ms) = (&row.sample, |seconds: f64| significant(seconds * 1e3));
        if json {
            print_json(json!({
                "bench": "restore", "shape": size, "tokens": TOKENS, "kv": kv.to_string(), "bytes": row.bytes,
                "state_bytes": row.states, "median_s": s.median(), "min_s": s.min(), "max_s": s.max(), "runs": s.runs(),
                "save_s": row.save, "copy_s": row.copy,
            }));
        }
        table.row(vec![
            format!("{} in {kv}", bytes(row.bytes)),
            bytes(row.states),
            ms(s.median()),
            format!("{}..{}", ms(s.min()), ms(s.max())),
            s.runs().to_string(),
            metric(row.bytes as f64 / s.median()).trim_end().into(),
            ms(row.save),
            ms(row.copy),
        ]);
    }
    if !json {
        say(&format!("a session of {TOKENS} tokens from a warm disk, layers and heads of {size}\n{table}\n"));
    }
    Ok(())
}

struct Row {
    bytes: u64,
    states: u64,
    sample: Sample,
    save: f64,
    /// Seconds for one thread to copy so many bytes into fresh memory: what no restore of one thread is below.
    copy: f64,
}

fn restore(backend: &Arc<dyn Backend>, size: &str, kv: Dtype) -> Result<Row> {
    let config = Config { vocab: 512, hidden: 64, ffn: 64, ..Config::preset(size)? };
    let options = LoadOptions { context: Some(TOKENS as u64 + 64), kv, ..LoadOptions::default() };
    let model = Model::random(config, backend.clone(), 1, Dtype::F32, &options)?;
    let mut random = Random::new(5);
    let ids: Vec<u32> = (0..TOKENS).map(|_| ((random.uniform() * 512.0) as u32).min(511)).collect();
    let mut session = model.session()?;
    session.prefill(&ids, &mut |_, _| {})?;
    let snapshot = session.snapshot()?;
    drop(session);
    let expected = goes_on(&mut model.session()?, &snapshot)?;
    let states = snapshot.own_bytes();

    let dir = std::env::temp_dir().join(format!("gatedelta-bench-{}", std::process::id()));
    let _removed = Removed(&dir);
    let store = Store::open(&dir, 8 << 30)?;
    let saved = store.save(&snapshot)?;
    drop((snapshot, store));

    let mut times = Vec::new();
    let store = Store::open(&dir, 8 << 30)?;
    let mut session = model.session()?;
    for run in 0..=RUNS {
        session.reset()?;
        backend.wait()?;
        let begin = Instant::now();
        let snapshot = store.load(&model, &ids)?.context("the store does not have it")?;
        session.restore(&snapshot)?;
        backend.wait()?;
        // The first one brings the files into memory.
        if run > 0 {
            times.push(begin.elapsed().as_secs_f64());
        }
        ensure!(goes_on(&mut session, &snapshot)? == expected, "what came back goes on with other bits");
    }
    let sample = Sample::new(times, false, 0.0);
    let from = vec![1u8; saved.bytes as usize];
    let begin = Instant::now();
    let to = std::hint::black_box(&from).clone();
    let copy = begin.elapsed().as_secs_f64();
    drop(std::hint::black_box(to));
    Ok(Row { bytes: saved.bytes, states, sample, save: saved.took.as_secs_f64(), copy })
}

/// The bits of the logits after another token.
fn goes_on(session: &mut Session, snapshot: &Snapshot) -> Result<Vec<u32>> {
    session.restore(snapshot)?;
    Ok(session.prefill(&[7], &mut |_, _| {})?.iter().map(|logit| logit.to_bits()).collect())
}

/// Removes a directory when it goes.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        if let Err(why) = fs::remove_dir_all(self.0) {
            log::warn!("{} stays: {why}", self.0.display());
        }
    }
}
