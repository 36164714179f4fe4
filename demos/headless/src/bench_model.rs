//! Times a whole model: loading, reading a prompt, writing an answer.
//!
//! Before timing, a short prompt is read at once and again id by id, which goes through other kernels: the logits must agree.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gatedelta::backend::Backend;
use gatedelta::qwen::{
    Batch, Config, Event, Finish, GenerateOptions, LayerKind, LoadOptions, Model, Sampling, Session,
};
use gatedelta::shape::Dtype;
use gatedelta::tune::Kind;
use serde_json::json;

use crate::bench::print_json;
use crate::observe::{Look, Observed};
use crate::oracle::{self, Random};
use crate::peak::{Peak, READ_BYTES};
use crate::say;
use crate::table::{Table, bytes, error, significant};
use crate::timing::Sample;

/// Ids of the prompt whose logits are compared.
const CHECKED: usize = 24;

/// Ids of the answer that are timed one by one.
const ANSWER: u64 = 48;

/// Numbers of sequences that are written together.
const TOGETHER: [usize; 3] = [2, 4, 8];

/// The largest relative difference of logits between the two ways to read a prompt.
const BOUND: f64 = 1e-4;

/// The shape of the model inside the agent: 8 layers, 6 of them linear.
const AGENT: &str = include_str!("../../agent/model/config.json");

/// Which model.
pub enum Which {
    /// A released size with random weights, its vocabulary cut to so many ids.
    Random {
        /// 0.8b, 2b, 4b, 9b, 27b or agent.
        size: String,
        /// Ids.
        vocab: Option<u32>,
        /// Type of the weights.
        dtype: Dtype,
    },
    /// A checkpoint's directory.
    Files(PathBuf),
}

/// Loads, checks and times a model, with a prompt of so many ids.
///
/// # Errors
/// A size that does not exist, a model that cannot be loaded or does not fit, an answer that is not right, whatever the
/// device reports.
pub fn run(
    backend: &Arc<dyn Backend>,
    which: &Which,
    prompt: usize,
    seconds: Duration,
    json: bool,
    peak: Option<Peak>,
) -> Result<()> {
    ensure!(prompt >= CHECKED, "--prompt {prompt}: expected {CHECKED} or more");
    let begin = Instant::now();
    let observed = Observed::new(backend.clone(), &[]);
    let (model, name) = which.load(observed.clone(), prompt as u64 + 2 * ANSWER)?;
    let load = begin.elapsed().as_secs_f64();
    let mut random = Random::new(11);
    let vocab = model.config().vocab;
    let ids: Vec<u32> = (0..prompt).map(|_| ((random.uniform() * vocab as f32) as u32).min(vocab - 1)).collect();

    let mut session = model.session()?;
    let difference = check(&mut session, &ids[..CHECKED])?;
    let prefill = time_prefill(&mut session, &ids, seconds)?;
    let decode = time_decode(&mut session, &ids)?;
    let longest = longest_submission(&observed, &mut session, &ids)?;
    drop(session);
    let together: Vec<(usize, Sample)> =
        TOGETHER.iter().map(|n| Ok((*n, time_together(&model, &ids, *n)?))).collect::<Result<_>>()?;
    let (prefill_rate, decode_rate) = (prompt as f64 / prefill.median(), 1.0 / decode.median());
    let weights = model.memory().weights;
    let peak_memory = peak_memory();
    let (prompt_flops, answer_bytes) = cost(model.config(), weights, prompt);
    let prefill_share = peak.map(|p| prompt_flops / prefill.median() / p.flops);
    let decode_share = peak.map(|p| answer_bytes / decode.median() / p.read);
    if json {
        print_json(json!({
            "bench": "model", "model": name, "vocab": vocab,
            "weight_bytes": weights, "load_s": load,
            "prompt_tokens": prompt, "prefill_tokens_per_s": prefill_rate,
            "prefill_median_s": prefill.median(), "prefill_min_s": prefill.min(), "prefill_max_s": prefill.max(),
            "prefill_runs": prefill.runs(), "prefill_share_of_peak": prefill_share,
            "decode_tokens_per_s": decode_rate,
            "decode_median_s": decode.median(), "decode_min_s": decode.min(), "decode_max_s": decode.max(),
            "decode_runs": decode.runs(), "decode_share_of_peak": decode_share,
            "together": together.iter().map(|(n, sample)| json!({
                "sequences": n, "tokens_per_s": *n as f64 / sample.median(), "median_s": sample.median(),
            })).collect::<Vec<_>>(),
            "longest_submission_s": longest, "peak_memory_bytes": peak_memory, "relative_difference": difference,
        }));
        return Ok(());
    }
    let share = |share: Option<f64>, of: &str| share.map_or("-".into(), |s| format!("{:.0} % {of}", s * 100.0));
    let mut table = Table::new(1, &["", "tokens/s", "median ms", "min..max ms", "runs", "of peak"]);
    for (what, rate, sample, share) in [
        (format!("prefill of {prompt}"), prefill_rate, &prefill, share(prefill_share, "arithmetic")),
        ("decode".into(), decode_rate, &decode, share(decode_share, "memory")),
    ] {
        let ms = |s: f64| significant(s * 1e3);
        let spread = format!("{}..{}", ms(sample.min()), ms(sample.max()));
        table.row(vec![what, significant(rate), ms(sample.median()), spread, sample.runs().to_string(), share]);
    }
    for (n, sample) in &together {
        let ms = |s: f64| significant(s * 1e3);
        let spread = format!("{}..{}", ms(sample.min()), ms(sample.max()));
        let rate = significant(*n as f64 / sample.median());
        let what = format!("decode of {n} sequences together");
        table.row(vec![what, rate, ms(sample.median()), spread, sample.runs().to_string(), "-".into()]);
    }
    let memory = peak_memory.map_or("not known here".into(), |n| {
        // Measuring the machine took memory too: beside small weights it is the larger part.
        let share = format!(", {:.0} % of the weights", n as f64 / weights as f64 * 100.0);
        format!("{}{}", bytes(n), if weights > READ_BYTES { share.as_str() } else { "" })
    });
    say(&format!(
        "model {name}, vocabulary {vocab}, weights {}\n{table}loaded in {} s; largest process memory {memory}\n\
         logits of a prompt read at once and id by id differ by {}\n{}\n",
        bytes(weights),
        significant(load),
        error(difference),
        longest.map_or(String::new(), |s| format!("longest submission {} ms\n", significant(s * 1e3))),
    ));
    Ok(())
}

impl Which {
    /// Its hyper-parameters.
    ///
    /// # Errors
    /// A size that does not exist, a file that cannot be read.
    pub fn config(&self) -> Result<Config> {
        let (size, vocab) = match self {
            Which::Files(dir) => return Ok(Config::read(&dir.join("config.json"))?),
            Which::Random { size, vocab, .. } => (size, *vocab),
        };
        let mut config = match size.as_str() {
            "agent" => Config { max_positions: 1 << 18, ..Config::from_json(&serde_json::from_str(AGENT)?)? },
            size => Config::preset(size).context("--shape")?,
        };
        if let Some(vocab) = vocab {
            config.vocab = vocab;
            config.eos.retain(|&id| id < vocab);
        }
        Ok(config)
    }

    /// The model with room for `context` tokens, and its name.
    ///
    /// # Errors
    /// As [`Which::config`]; a model that cannot be loaded or does not fit.
    pub fn load(&self, backend: Arc<dyn Backend>, context: u64) -> Result<(Model, String)> {
        let options = LoadOptions { context: Some(context), ..LoadOptions::default() };
        Ok(match self {
            Which::Files(dir) => (Model::load(dir, backend, &options)?, dir.display().to_string()),
            Which::Random { size, dtype, .. } => {
                let model = Model::random(self.config()?, backend, 1, *dtype, &options)?;
                (model, format!("{size}, random {dtype} weights"))
            }
        })
    }
}

/// The relative difference of the last logits between reading ids at once and one by one.
fn check(session: &mut Session, ids: &[u32]) -> Result<f64> {
    let at_once = session.prefill(ids, &mut |_, _| {})?;
    session.reset()?;
    let mut one_by_one = Vec::new();
    for id in ids {
        one_by_one = session.prefill(&[*id], &mut |_, _| {})?;
    }
    session.reset()?;
    let difference = oracle::error(&at_once, &one_by_one);
    ensure!(
        difference <= BOUND,
        "the answer is wrong: logits of a prompt read at once and id by id differ by {}, at most {BOUND:.0e} allowed",
        error(difference)
    );
    Ok(difference)
}

/// Times of reading the prompt, after a first time that does not count.
fn time_prefill(session: &mut Session, ids: &[u32], budget: Duration) -> Result<Sample> {
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < 4 || begin.elapsed() < budget {
        session.reset()?;
        let begin = Instant::now();
        session.prefill(ids, &mut |_, _| {})?;
        times.push(begin.elapsed().as_secs_f64());
    }
    Ok(Sample::new(times.split_off(1), false, 0.0))
}

/// The longest submission of reading the prompt and writing an id, where the backend submits.
fn longest_submission(observed: &Observed, session: &mut Session, ids: &[u32]) -> Result<Option<f64>> {
    if observed.caps().kind == Kind::Cpu {
        return Ok(None);
    }
    session.reset()?;
    observed.look(Look::Passes);
    session.prefill(ids, &mut |_, _| {})?;
    session.prefill(&ids[..1], &mut |_, _| {})?;
    Ok(Some(observed.look(Look::Away).longest.as_secs_f64()))
}

/// Times of the ids of an answer after the prompt; the first few do not count.
fn time_decode(session: &mut Session, ids: &[u32]) -> Result<Sample> {
    session.reset()?;
    let options =
        GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(ANSWER + 4), ..GenerateOptions::default() };
    let (mut last, mut times) = (Instant::now(), Vec::new());
    for event in session.generate(ids, &options)? {
        match event {
            Event::Token { .. } => {
                times.push(last.elapsed().as_secs_f64());
                last = Instant::now();
            }
            Event::Done { finish: Finish::Failed(error), .. } => return Err(error.into()),
            Event::Done { .. } | Event::Prompt { .. } => {}
        }
    }
    if times.len() < 5 {
        bail!("the answer ended after {} ids", times.len());
    }
    Ok(Sample::new(times.split_off(4), false, 0.0))
}

/// Times of one token of each of `n` sequences in one pass; the first few do not count.
fn time_together(model: &Model, ids: &[u32], n: usize) -> Result<Sample> {
    let mut sessions = (0..n).map(|_| model.session()).collect::<Result<Vec<_>, _>>()?;
    for (session, i) in sessions.iter_mut().zip(1..) {
        // Each has a length of its own.
        session.prefill(&ids[..CHECKED - i.min(CHECKED - 1)], &mut |_, _| {})?;
    }
    let mut batch = Batch::new(model);
    let mut times = Vec::new();
    for at in 0..ANSWER as usize / 2 + 4 {
        let next: Vec<u32> = (0..n).map(|i| ids[(at * n + i) % ids.len()]).collect();
        let begin = Instant::now();
        batch.step(&mut sessions.iter_mut().collect::<Vec<_>>(), &next)?;
        times.push(begin.elapsed().as_secs_f64());
    }
    Ok(Sample::new(times.split_off(4), false, 0.0))
}

/// Operations with weights to read the prompt, and bytes of weights and states to write one id.
fn cost(config: &Config, weights: u64, prompt: usize) -> (f64, f64) {
    let c = config;
    let heads = c.linear;
    let (hidden, ffn) = (c.hidden as f64, c.ffn as f64);
    let (qk, vo) = ((heads.hk * heads.k) as f64, (heads.hv * heads.v) as f64);
    let linear = hidden * (2.0 * qk + 3.0 * vo + 2.0 * heads.hv as f64);
    let full = hidden * ((3 * c.heads + 2 * c.kv_heads) * c.head_dim) as f64;
    let count = |kind: LayerKind| c.layers.iter().filter(|&&k| k == kind).count() as f64;
    let body =
        count(LayerKind::Linear) * linear + count(LayerKind::Full) * full + c.layers.len() as f64 * 3.0 * hidden * ffn;
    let head = hidden * c.vocab as f64;
    // An untied model has a table of embeddings beside its head, of which an id reads one row.
    let table = if c.tied { 0.0 } else { head / (body + 2.0 * head) * weights as f64 };
    let states = count(LayerKind::Linear) * 8.0 * heads.state_len() as f64;
    (2.0 * (body * prompt as f64 + head), weights as f64 - table + states)
}

/// The largest amount of memory that this process has had, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}
