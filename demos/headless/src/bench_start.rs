//! How long a new process takes to its first token: opening the device with its self-test, loading the weights from files that the
//! system has in memory, waiting for kernels that are still being compiled then, reading a short prompt.
//!
//! Each start is a process of its own. The first ones find no compiled kernels, the others those that one start kept; what
//! drivers keep for themselves is off for both, as far as they let it be.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use gatedelta::device::{self, Account};
use gatedelta::qwen::{Event, Finish, GenerateOptions, LoadOptions, Model, Sampling};
use serde_json::{Value, json};

use crate::bench::print_json;
use crate::bench_model::Which;
use crate::files;
use crate::say;
use crate::table::{Table, bytes, significant};
use crate::timing::Sample;

/// Ids of the prompt.
const PROMPT: u32 = 24;

/// Caches of drivers and how they are turned off: Mesa's, NVIDIA's.
const OFF: [(&str, &str); 2] = [("MESA_SHADER_CACHE_DISABLE", "true"), ("__GL_SHADER_DISK_CACHE", "0")];

/// What a start tells, with the words for it.
const STAGES: [(&str, &str); 6] = [
    ("process_s", "process, and all else"),
    ("open_s", "device, with its self-test"),
    ("load_s", "weights"),
    ("wait_s", "kernels still missing then"),
    ("first_s", "prompt and first token"),
    ("total_s", "all of it"),
];

/// What was asked for.
pub struct Args<'a> {
    /// The device's name.
    pub device: Option<&'a str>,
    /// Starts of each kind.
    pub runs: u64,
    /// JSON instead of tables.
    pub json: bool,
}

/// Starts in this process: one JSON object with the stages' times.
///
/// # Errors
/// Whatever is wrong with the device or the checkpoint.
pub fn once(name: Option<&str>, dir: &Path) -> Result<bool> {
    let mut stage = Instant::now();
    let mut lap = || std::mem::replace(&mut stage, Instant::now()).elapsed().as_secs_f64();
    let (backend, _) = device::open(name)?;
    let open = lap();
    let options = LoadOptions { context: Some(512), ..LoadOptions::default() };
    let model = Model::load(dir, backend.clone(), &options)?;
    let load = lap();
    let mut kernels = 0;
    let compiling = model.ready(&mut |_, total| kernels = total);
    let wait = lap();
    let mut session = model.session()?;
    let ids: Vec<u32> = (0..PROMPT).map(|i| i % model.config().vocab).collect();
    let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(1), ..GenerateOptions::default() };
    for event in session.generate(&ids, &options)? {
        match event {
            Event::Token { .. } => break,
            Event::Done { finish: Finish::Failed(error), .. } => return Err(error.into()),
            Event::Done { .. } => bail!("the answer has no tokens"),
            Event::Prompt { .. } => {}
        }
    }
    print_json(json!({
        "open_s": open, "load_s": load, "wait_s": wait, "first_s": lap(), "kernels": kernels,
        "compiling_s": compiling.as_secs_f64(), "weight_bytes": model.memory().weights,
    }));
    Ok(true)
}

/// Starts processes and reports the medians of their stages.
///
/// # Errors
/// A size that does not exist, a checkpoint that cannot be written, a start that fails.
pub fn run(account: &Account, which: &Which, args: &Args<'_>) -> Result<bool> {
    let temporary = tempfile::tempdir().context("there is no place for temporary files")?;
    let (dir, name) = match which {
        Which::Files(dir) => (dir.clone(), dir.display().to_string()),
        Which::Random { size, dtype, .. } => {
            files::write(temporary.path(), &which.config()?, *dtype)?;
            (temporary.path().to_path_buf(), format!("{size}, random {dtype} weights"))
        }
    };
    let kept = temporary.path().join("kernels");
    let mut kinds: Vec<(&str, Vec<Value>)> = Vec::new();
    for kind in ["first start", "kernels kept"] {
        let mut starts = Vec::new();
        for i in 0..args.runs {
            if kind == "first start" && i > 0 && kept.exists() {
                std::fs::remove_dir_all(&kept).with_context(|| format!("cannot empty {}", kept.display()))?;
            }
            starts.push(start(args.device, &dir, &kept)?);
        }
        kinds.push((kind, starts));
    }
    let sample = |starts: &[Value], of: &str| {
        Sample::new(starts.iter().filter_map(|start| start[of].as_f64()).collect(), false, 0.0)
    };
    if args.json {
        for (kind, starts) in &kinds {
            let mut row = json!({ "bench": "start", "model": name, "kind": kind, "runs": args.runs });
            for of in STAGES.iter().map(|s| s.0).chain(["compiling_s", "kernels", "weight_bytes"]) {
                row[of] = json!(sample(starts, of).median());
            }
            print_json(row);
        }
        return Ok(true);
    }
    let mut table = Table::new(1, &["", "first start, ms", "min..max", "kernels kept, ms", "min..max"]);
    for (of, words) in STAGES {
        let ms = |s: f64| significant(s * 1e3);
        let cells = kinds.iter().flat_map(|(_, starts)| {
            let sample = sample(starts, of);
            [ms(sample.median()), format!("{}..{}", ms(sample.min()), ms(sample.max()))]
        });
        table.row(std::iter::once(words.to_string()).chain(cells).collect());
    }
    let mut text = format!(
        "{}\n\nmodel {name}, weights {}; medians of {} processes; prompt of {PROMPT} ids\n{table}",
        account.summary(),
        bytes(sample(&kinds[0].1, "weight_bytes").median() as u64),
        args.runs,
    );
    for (kind, starts) in &kinds {
        let median = |of: &str| sample(starts, of).median();
        let (compiling, wait) = (median("compiling_s"), median("wait_s"));
        if compiling > 0.0 {
            text += &format!(
                "{kind}: {} kernels in {} ms, all but {} of it while weights were loaded\n",
                median("kernels"),
                significant(compiling * 1e3),
                significant(wait * 1e3),
            );
        }
    }
    say(&format!("{text}\n"));
    Ok(true)
}

/// One process, and what it told.
fn start(device: Option<&str>, dir: &Path, kept: &Path) -> Result<Value> {
    let program = std::env::current_exe().context("this program's own file is not known")?;
    let mut command = Command::new(program);
    command.args(["bench", "--start", "--once", "--model"]).arg(dir).env("GATEDELTA_CACHE", kept).envs(OFF);
    if let Some(device) = device {
        command.args(["--device", device]);
    }
    let begin = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().context("a process cannot be started")?;
    let mut line = String::new();
    // What it does after its first token does not count.
    let heard = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
    let total = begin.elapsed().as_secs_f64();
    let status = child.wait().context("a process cannot be waited for")?;
    ensure!(status.success(), "a start failed, with {status}");
    heard.transpose().context("a start cannot be heard")?;
    let mut told: Value = serde_json::from_str(&line).context("a start told nothing")?;
    let stages: f64 = ["open_s", "load_s", "wait_s", "first_s"].iter().filter_map(|of| told[*of].as_f64()).sum();
    told["total_s"] = json!(total);
    told["process_s"] = json!(total - stages);
    Ok(told)
}
