//! `bench`: checks the answer, then times, and says how near the machine's own peak the time is.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use gatedelta::backend::Backend;
use gatedelta::device::{self, class_name};
use gatedelta::gdn::Options;
use gatedelta::shape::{Dtype, Heads};
use gatedelta::tune::Kind;
use serde_json::{Value, json};

use crate::bench_agent;
use crate::bench_model::{self, Which};
use crate::bench_op::{self, Row, What};
use crate::bench_restore;
use crate::bench_rows::{self, Ask};
use crate::bench_start;
use crate::doors::dtype;
use crate::peak::{self, Peak};
use crate::say;
use crate::table::{Table, error, metric, significant};

/// Lengths of a prefill.
const TOKENS: [u64; 6] = [64, 512, 2048, 4096, 8192, 32768];

/// Lengths of a prefill that is also gone back over.
const BACKWARD: [u64; 3] = [512, 2048, 8192];

/// Batches of a decode, and layers: alone, in the 18 layers of a 0.8B model, together.
const BATCHES: [(u64, u64); 4] = [(1, 1), (1, 18), (8, 1), (64, 1)];

/// What to time.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// cpu, cuda, lavapipe, swiftshader, or a part of an adapter's name
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Only the operator
    #[arg(long, conflicts_with = "shape")]
    op: bool,
    /// A long conversation held by one session: what the first token of each turn waits for, and what memory grows by
    #[arg(long, conflicts_with = "op")]
    agent: bool,
    /// Turns of the conversation, each a question, a call, a tool's result and an answer
    #[arg(long, value_name = "N", default_value_t = 200, requires = "agent")]
    turns: u64,
    /// Tokens of the conversation
    #[arg(long, value_name = "N", default_value_t = 100_000, requires = "agent")]
    length: u64,
    /// Where the conversation is plotted
    #[arg(long, value_name = "FILE", default_value = "agent.svg", requires = "agent")]
    plot: PathBuf,
    /// How long a new process takes to its first token, stage by stage: at the first start, and where compiled kernels were kept
    #[arg(long, conflicts_with_all = ["op", "agent"])]
    start: bool,
    /// Processes that are started, of which the medians count
    #[arg(long, value_name = "N", default_value_t = 5, requires = "start", value_parser = clap::value_parser!(u64).range(1..=100))]
    runs: u64,
    /// Starts in this process and tells of it in one JSON object
    #[arg(long, hide = true, requires = "start", requires = "model")]
    once: bool,
    /// Only a whole model with random weights: 0.8b, 2b, 4b, 9b, or agent for the shape of the one inside the agent, which is the
    /// default for a conversation
    #[arg(long, value_name = "SIZE")]
    shape: Option<String>,
    /// Only the way back from disk of a session of 4,000 tokens, with the layers and heads of this size
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["op", "shape", "model"])]
    restore: Option<String>,
    /// Only a whole model: this checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = ["op", "shape"])]
    model: Option<PathBuf>,
    /// Only the operator over the rows of this file, which other programs run too; with --json a JSON object a line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["op", "shape", "model"])]
    rows: Option<PathBuf>,
    /// Directory of float64 answers to compare with, as compare/peers_cuda.py makes them; without it small rows only can be checked
    #[arg(long, value_name = "DIR", requires = "rows")]
    answers: Option<PathBuf>,
    /// Begin no row after so many seconds
    #[arg(long, value_name = "SECONDS", requires = "rows", default_value_t = f64::INFINITY)]
    within: f64,
    /// Kinds of rows: forward, backward, decode
    #[arg(
        long,
        value_name = "LIST",
        requires = "rows",
        value_delimiter = ',',
        default_value = "forward,backward,decode"
    )]
    kinds: Vec<String>,
    /// Cut the vocabulary of a model with random weights to so many ids
    #[arg(long, value_name = "IDS")]
    vocab: Option<u32>,
    /// Heads of the operator, q/k and value heads: 16/16
    #[arg(long, value_name = "HK/HV", value_delimiter = ',', default_value = "16/16,16/32")]
    heads: Vec<String>,
    /// Lengths of the prefill, separated by commas, 0 for none; 512, 2048 and 8192 are also timed backward
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    tokens: Option<Vec<u64>>,
    /// How the operator's q, k, v and o are stored: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = dtype)]
    store: Dtype,
    /// Cut sequences of the operator into segments of at most so many chunks, 0 for never; without it, as the device is best used
    #[arg(long, value_name = "CHUNKS")]
    cut: Option<u32>,
    /// Carry the whole state over every cut
    #[arg(long)]
    exact: bool,
    /// MiB of scratch that a call of the operator may take; without it, what the device has for that
    #[arg(long, value_name = "MIB")]
    scratch: Option<u64>,
    /// Ids of the prompt that a model reads
    #[arg(long, value_name = "IDS", default_value_t = 512)]
    prompt: usize,
    /// Type of random weights: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = dtype)]
    weights: Dtype,
    /// Seconds to measure each row
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    seconds: f64,
    /// Leave out rows of which a single run would take longer than so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    longest: f64,
    /// One JSON object a line instead of tables
    #[arg(long)]
    json: bool,
}

impl Args {
    /// How the operator is called.
    fn options(&self) -> Options {
        Options {
            store: self.store,
            cut: self.cut,
            exact: self.exact,
            scratch: self.scratch.map(|mib| mib.saturating_mul(1 << 20)),
            ..Options::default()
        }
    }
}

/// Times what was asked for; true if every answer was right.
///
/// # Errors
/// A device or a size that does not exist, whatever the device reports.
pub fn run(args: &Args) -> Result<bool> {
    let wrong = || format!("--seconds {}: expected a time of 0 or more", args.seconds);
    let seconds = Duration::try_from_secs_f64(args.seconds).with_context(wrong)?;
    let heads = args.heads.iter().map(|text| parse_heads(text)).collect::<Result<Vec<_>>>()?;
    if args.once
        && let Some(dir) = &args.model
    {
        return bench_start::once(args.device.as_deref(), dir);
    }
    let (backend, account) = device::open(args.device.as_deref())?;
    if args.start {
        let asked = bench_start::Args { device: args.device.as_deref(), runs: args.runs, json: args.json };
        // The processes that are started have all of the device.
        drop(backend);
        return bench_start::run(&account, &which(args, "0.8b"), &asked);
    }
    if args.agent {
        let asked = bench_agent::Args { turns: args.turns, length: args.length, plot: &args.plot, json: args.json };
        return bench_agent::run(&backend, &account, &which(args, "agent"), &asked);
    }
    if let Some(file) = &args.rows {
        let options = args.options();
        let ask = Ask { answers: args.answers.as_deref(), kinds: &args.kinds, options, seconds, within: args.within };
        return bench_rows::run(&*backend, file, &ask, args.json);
    }
    let caps = backend.caps();
    let peak = peak::of(&*backend);
    if args.json {
        let peak = peak.map(|p| json!({ "flop_per_s": p.flops, "read_byte_per_s": p.read }));
        print_json(json!({
            "bench": "device", "device": caps.name, "driver": caps.driver, "class": class_name(caps.class), "peak": peak,
        }));
    } else {
        say(&format!("{}\n", account.summary()));
        match peak {
            Some(p) => {
                let (flops, read) = (metric(p.flops), metric(p.read));
                say(&format!("measured peak of the processor: {flops}FLOP/s f32, {read}B/s read\n\n"));
            }
            None => say("no peak is known for this device\n\n"),
        }
    }
    if let Some(size) = &args.restore {
        bench_restore::run(&backend, size, args.json)?;
        return Ok(true);
    }
    let mut right = true;
    if args.shape.is_none() && args.model.is_none() {
        for heads in heads {
            right &= operator(args, &backend, heads, seconds, peak)?;
        }
    }
    if !args.op {
        bench_model::run(&backend, &which(args, "0.8b"), args.prompt, seconds, args.json, peak)?;
    }
    Ok(right)
}

/// The model that was asked for, by default one of this size.
fn which(args: &Args, size: &str) -> Which {
    let size = args.shape.clone().unwrap_or_else(|| size.into());
    match args.model.clone() {
        Some(dir) => Which::Files(dir),
        None => Which::Random { size, vocab: args.vocab, dtype: args.weights },
    }
}

fn parse_heads(text: &str) -> Result<Heads> {
    let wrong = || format!("--heads {text}: expected q/k heads and value heads, as in 16/32");
    let (hk, hv) = text.split_once('/').with_context(wrong)?;
    Ok(bench_op::heads(hk.parse().with_context(wrong)?, hv.parse().with_context(wrong)?)?)
}

/// Prefill and backward over lengths, decode over batches.
fn operator(
    args: &Args,
    backend: &Arc<dyn Backend>,
    heads: Heads,
    seconds: Duration,
    peak: Option<Peak>,
) -> Result<bool> {
    let lengths = args.tokens.clone().unwrap_or_else(|| TOKENS.to_vec());
    let prefills = lengths.iter().filter(|&&t| t > 0).map(|&t| What::Prefill(t));
    let backwards = BACKWARD.into_iter().filter(|t| lengths.contains(t)).map(What::Backward);
    let decodes = BATCHES.iter().map(|&(sequences, layers)| What::Decode { sequences, layers });
    let columns =
        ["", "size", "median ms", "min..max ms", "runs", "us/token/head", "FLOP/s", "B/s", "of peak", "error"];
    let mut table = Table::new(2, &columns);
    let (mut notes, mut right) = (String::new(), true);
    let mut done: Vec<Row> = Vec::new();
    for what in prefills.chain(backwards).chain(decodes) {
        if let Some(seconds) = predicted(what, &done).filter(|&seconds| seconds > args.longest) {
            let (name, size) = (what.name(), what.size());
            notes.push_str(&format!("{name} {size} left out: a run would take about {seconds:.0} s (--longest)\n"));
            continue;
        }
        let options = args.options();
        match bench_op::row(&**backend, what, heads, options, seconds) {
            Ok(row) => {
                if args.json {
                    print_json(row_json(&row, args.store, peak, &done));
                }
                table.row(row_cells(&row, peak));
                done.push(row);
            }
            Err(error) => {
                right = false;
                if args.json {
                    print_json(json!({ "bench": what.name(), "size": what.size(), "failed": format!("{error:#}") }));
                }
                notes.push_str(&format!("{} {} failed: {error:#}\n", what.name(), what.size()));
            }
        }
    }
    if args.json {
        return Ok(right);
    }
    notes.push_str(&linearity(&done));
    notes.push_str(&ratio(&done));
    let clock = if done.iter().all(|r| r.sample.device_clock) { "the device's clock" } else { "the host's clock" };
    let longest = done.iter().map(|r| r.sample.longest_submission).fold(0.0, f64::max);
    if backend.caps().kind != Kind::Cpu {
        notes.push_str(&format!("longest submission {} ms\n", significant(longest * 1e3)));
    }
    say(&format!(
        "operator, Hk/Hv = {}/{}, K = V = {}, {} storage, on {clock}\n{table}{notes}\n",
        heads.hk, heads.hv, heads.k, args.store
    ));
    Ok(right)
}

fn row_cells(row: &Row, peak: Option<Peak>) -> Vec<String> {
    let (s, seconds) = (&row.sample, row.sample.median());
    let share = peak.map_or("-".into(), |p| {
        let (share, bound) = p.share(row.flops, row.bytes, seconds);
        format!("{:.0} % {bound}", share * 100.0)
    });
    vec![
        row.what.name().into(),
        row.what.size(),
        significant(seconds * 1e3),
        format!("{}..{}", significant(s.min() * 1e3), significant(s.max() * 1e3)),
        s.runs().to_string(),
        format!("{:.3}", seconds * 1e6 / row.token_heads()),
        metric(row.flops / seconds).trim_end().into(),
        metric(row.bytes / seconds).trim_end().into(),
        share,
        error(row.error),
    ]
}

fn row_json(row: &Row, store: Dtype, peak: Option<Peak>, done: &[Row]) -> Value {
    let (s, seconds) = (&row.sample, row.sample.median());
    let share = peak.map(|p| p.share(row.flops, row.bytes, seconds));
    json!({
        "bench": row.what.name(),
        "size": row.what.size(),
        "hk": row.heads.hk, "hv": row.heads.hv, "k": row.heads.k, "v": row.heads.v,
        "store": store.to_string(),
        "median_s": seconds, "min_s": s.min(), "max_s": s.max(), "runs": s.runs(),
        "device_clock": s.device_clock,
        "longest_submission_s": s.longest_submission,
        "us_per_token_head": seconds * 1e6 / row.token_heads(),
        "flop_per_s": row.flops / seconds,
        "byte_per_s": row.bytes / seconds,
        "share_of_peak": share.map(|s| s.0),
        "bound": share.map(|s| s.1),
        "relative_error": row.error,
        "times_prefill": times_prefill(row, done),
    })
}

/// Seconds that a run should take, judged by the rows before it; none for the first of its kind.
fn predicted(what: What, done: &[Row]) -> Option<f64> {
    let per_token = |name: &str| {
        let row = done.iter().rev().find(|r| r.what.name() == name)?;
        Some(row.sample.median() / row.what.tokens() as f64)
    };
    let per_token = match what {
        What::Prefill(_) => per_token("prefill"),
        // Before the first: about the ratio of their operations.
        What::Backward(_) => per_token("backward").or_else(|| Some(3.0 * per_token("prefill")?)),
        What::Decode { .. } => None,
    };
    Some(per_token? * what.tokens() as f64)
}

/// The time of a backward row over that of the prefill of the same length.
fn times_prefill(row: &Row, done: &[Row]) -> Option<f64> {
    let What::Backward(tokens) = row.what else { return None };
    let prefill = done.iter().find(|r| r.what == What::Prefill(tokens))?;
    Some(row.sample.median() / prefill.sample.median())
}

/// What backward costs, at 2048 tokens or else at the most that were run.
fn ratio(rows: &[Row]) -> String {
    let ratios = rows.iter().filter_map(|r| Some((r, times_prefill(r, rows)?)));
    match ratios.max_by_key(|(r, _)| (r.what == What::Backward(2048), r.what.tokens())) {
        Some((row, ratio)) => format!("backward takes {ratio:.1} times the prefill at {}\n", row.what.size()),
        None => String::new(),
    }
}

/// How the cost of a token at the largest length compares with that at 2048.
fn linearity(rows: &[Row]) -> String {
    let per_token = |row: &Row| row.sample.median() / row.token_heads();
    let at = |tokens: u64| rows.iter().find(|r| r.what == What::Prefill(tokens));
    let last = rows.iter().rev().find(|r| matches!(r.what, What::Prefill(t) if t > 2048));
    match (at(2048), last) {
        (Some(base), Some(last)) => {
            let change = (per_token(last) / per_token(base) - 1.0) * 100.0;
            format!("time per token at {} against T=2048: {change:+.1} %\n", last.what.size())
        }
        _ => String::new(),
    }
}

/// One line.
pub fn print_json(value: Value) {
    say(&format!("{value}\n"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timing::Sample;

    fn took(what: What, seconds: f64) -> Row {
        let heads = bench_op::heads(1, 1).unwrap();
        Row { what, heads, error: 0.0, sample: Sample::new(vec![seconds], false, 0.0), flops: 1.0, bytes: 1.0 }
    }

    #[test]
    fn a_long_row_is_foreseen() {
        let mut done = Vec::new();
        assert_eq!(predicted(What::Prefill(512), &done), None);
        assert_eq!(predicted(What::Backward(512), &done), None);
        done.push(took(What::Prefill(512), 1.0));
        assert_eq!(predicted(What::Prefill(2048), &done), Some(4.0));
        assert_eq!(predicted(What::Backward(1024), &done), Some(6.0));
        done.push(took(What::Backward(512), 2.0));
        assert_eq!(predicted(What::Backward(1024), &done), Some(4.0));
        assert_eq!(predicted(What::Decode { sequences: 1, layers: 1 }, &done), None);
    }

    #[test]
    fn backward_is_compared_with_the_prefill_of_its_length() {
        let mut rows = vec![took(What::Prefill(512), 1.0), took(What::Backward(2048), 9.0)];
        assert_eq!(ratio(&rows), "");
        rows.push(took(What::Backward(512), 2.0));
        assert_eq!(ratio(&rows), "backward takes 2.0 times the prefill at T=512\n");
        rows.extend([
            took(What::Prefill(2048), 3.6),
            took(What::Prefill(8192), 10.0),
            took(What::Backward(8192), 99.0),
        ]);
        assert_eq!(ratio(&rows), "backward takes 2.5 times the prefill at T=2048\n");
    }

    #[test]
    fn heads_are_two_numbers() {
        let heads = parse_heads("16/32").unwrap();
        assert_eq!((heads.hk, heads.hv), (16, 32));
        for wrong in ["16", "16/", "a/b", "16/24", "0/1"] {
            assert!(parse_heads(wrong).is_err(), "{wrong}");
        }
    }
}
