//! `check`: the conformance suite on each device.
//!
//! Every case, from the files and generated, goes every way through the operator in every storage type, forward and, where
//! it has gradients, backward; and every checkpoint answers its prompts. A GPU is checked twice: with all it has, and held to
//! WebGPU's default limits.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use gatedelta::backend::Backend;
use gatedelta::backend::webgpu::{DeviceType, OpenOptions, WebGpu};
use gatedelta::device::{self, Verdict};
use gatedelta::gdn::Outputs;
use gatedelta::shape::Dtype;
use gatedelta::tune::{Class, Kind};

use crate::case::{self, Case};
use crate::junit::{self, Suite, Test};
use crate::table::{self, Table, verdict};
use crate::ways::Way;
use crate::{checkpoints, grads, large, oracle, say};

/// Storage types and the largest relative error of o and ht in each.
const STORES: [(Dtype, f64); 3] = [(Dtype::F32, 1e-5), (Dtype::F16, 1e-3), (Dtype::Bf16, 5e-3)];

/// What to check.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Check this device (may be given several times); without it, the CPU and every adapter that is found
    #[arg(long, value_name = "NAME")]
    device: Vec<String>,
    /// Directory of case files; without it, the repository's own
    #[arg(long, value_name = "DIR")]
    cases: Option<PathBuf>,
    /// Directory of checkpoints with answers; without it, the repository's own
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Cut sequences into segments of at most so many chunks, 0 for never; without it, as the device is best used
    #[arg(long, value_name = "CHUNKS")]
    cut: Option<u32>,
    /// Compute everything so many times: all must give the same bits (a prefill, and gradients in f32, are computed twice at least)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Check large shapes too: single sequences of up to 32768 tokens, ragged batches, 70,000 sequences (minutes, 10 GiB of memory)
    #[arg(long)]
    large: bool,
    /// Write a JUnit report
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

/// A device under check.
struct Subject {
    label: String,
    backend: Arc<dyn Backend>,
}

/// The largest error of one kind and where it occurred.
#[derive(Clone, Default)]
pub struct Worst {
    /// Relative.
    pub error: f64,
    /// Empty if there was none.
    pub at: String,
}

impl Worst {
    /// Keeps the larger one.
    pub fn add(&mut self, error: f64, at: impl FnOnce() -> String) {
        if error > self.error {
            *self = Worst { error, at: at() };
        }
    }
}

/// Checks; true if everything passed.
///
/// # Errors
/// Cases or checkpoints that cannot be read, a named device that is absent.
pub fn run(args: &Args) -> Result<bool> {
    let mut cases = Vec::new();
    for path in case::files(&directory(&args.cases, "cases")?)? {
        let case = Case::read(&path)?;
        case.answers
            .as_ref()
            .with_context(|| format!("{}: tensor o or ht, the answers, is missing", path.display()))?;
        cases.push(case);
    }
    cases.extend(oracle::generated()?);
    if args.large {
        progress("the answers of large shapes");
        cases.extend(large::cases()?);
        progress("");
    }
    cases.iter_mut().for_each(|case| case.cut = args.cut);
    let checkpoints = checkpoints::read(&directory(&args.models, "models")?)?;

    let mut suites = Vec::new();
    let kinds = ["f32", "f16", "bf16", "f32 grad", "f16 grad", "bf16 grad", "logits"];
    let mut summary = Table::new(1, &[&["device", "checks", "failed"], &kinds[..], &["seconds", "verdict"]].concat());
    let mut places = String::new();
    for subject in subjects(&args.device, &mut suites)? {
        let begin = Instant::now();
        let (mut tests, mut worst) = (Vec::new(), vec![Worst::default(); kinds.len()]);
        say(&format!("{}\n\n", subject.label));
        let (forward, rest) = worst.split_at_mut(STORES.len());
        let (backward, logits) = rest.split_at_mut(STORES.len());
        operator(&subject, &cases, args.runs, &mut tests, forward);
        say("\n");
        let backend = &subject.backend;
        grads::check(&subject.label, &**backend, &cases, args.runs, &mut tests, backward);
        say("\n");
        let logits = &mut logits[0];
        let note = |error, at: Box<dyn FnOnce() -> String>| logits.add(error, at);
        checkpoints::check(&subject.label, backend, &checkpoints, args.runs, &mut tests, note);
        say("\n");
        let failed = tests.iter().filter(|t| t.failure.is_some()).count();
        let mut row = vec![subject.label.clone(), tests.len().to_string(), failed.to_string()];
        row.extend(worst.iter().map(|w| if w.at.is_empty() { "-".into() } else { table::error(w.error) }));
        row.extend([format!("{:.1}", begin.elapsed().as_secs_f64()), verdict(failed == 0)]);
        summary.row(row);
        for (name, w) in kinds.iter().zip(&worst).filter(|(_, w)| !w.at.is_empty()) {
            places.push_str(&format!("worst {name} on {}: {} at {}\n", subject.label, table::error(w.error), w.at));
        }
        suites.push(Suite { name: subject.label, tests });
    }
    for suite in suites.iter().filter(|s| s.tests.iter().any(|t| t.class == "open")) {
        summary.row(vec![suite.name.clone(), "1".into(), "1".into()]);
    }
    say(&format!("{summary}\n{places}"));
    if let Some(path) = &args.junit {
        junit::write(path, &suites)?;
    }
    let failed = suites.iter().flat_map(|s| &s.tests).filter(|t| t.failure.is_some()).count();
    let all = suites.iter().map(|s| s.tests.len()).sum::<usize>();
    say(&format!("{all} checks, {failed} failed: {}\n", verdict(failed == 0)));
    Ok(failed == 0)
}

/// The directory asked for, else the one in the repository that this program was built in.
fn directory(given: &Option<PathBuf>, what: &str) -> Result<PathBuf> {
    if let Some(dir) = given {
        return Ok(dir.clone());
    }
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(what);
    own.canonicalize().with_context(|| {
        format!("{} is not there (it is part of the source tree): name a directory with --{what} DIR", own.display())
    })
}

/// Opens the devices. A device that is there and does not work is a failed check.
fn subjects(names: &[String], suites: &mut Vec<Suite>) -> Result<Vec<Subject>> {
    let mut opened: Vec<Subject> = Vec::new();
    let mut broken = |name: &str, why: String| {
        say(&format!("{name}: {why}\n\n"));
        let (class, name) = ("open".into(), name.to_string());
        let test = Test { class, name: "self-test".into(), seconds: 0.0, output: String::new(), failure: Some(why) };
        suites.push(Suite { name, tests: vec![test] });
    };
    let mut wanted = names.to_vec();
    if names.is_empty() {
        let account = device::list();
        if !account.candidates.iter().any(|c| c.kind == Kind::WebGpu && c.name.to_lowercase().contains("llvmpipe")) {
            say(
                "lavapipe is absent, so the shaders are not checked on it (Debian and Ubuntu: mesa-vulkan-drivers)\n\n",
            );
        }
        for candidate in &account.candidates {
            match &candidate.verdict {
                Verdict::Works(_) if !wanted.contains(&candidate.name) => wanted.push(candidate.name.clone()),
                Verdict::Refused(why) if candidate.driver != "absent" => broken(&candidate.name, why.clone()),
                _ => {}
            }
        }
    }
    for name in &wanted {
        let backend = match device::open(Some(name)) {
            Ok((backend, _)) => backend,
            Err(absent @ gatedelta::Error::NoDevice { .. }) => return Err(absent.into()),
            Err(error) => {
                broken(name, error.to_string());
                continue;
            }
        };
        let caps = backend.caps();
        let label = if caps.kind == Kind::Cpu { "cpu".to_string() } else { caps.name.clone() };
        if opened.iter().any(|s| s.label == label) {
            continue;
        }
        let held = (caps.kind == Kind::WebGpu).then(|| within_default_limits(&caps.name));
        let held_label = match caps.class {
            Class::Software => format!("{label} as a GPU within default limits"),
            _ => format!("{label} within default limits"),
        };
        opened.push(Subject { label, backend });
        match held {
            Some(Ok(backend)) => opened.push(Subject { label: held_label, backend }),
            Some(Err(error)) => broken(&held_label, error.to_string()),
            None => {}
        }
    }
    Ok(opened)
}

/// The adapter of this name, opened as a browser would.
fn within_default_limits(name: &str) -> Result<Arc<dyn Backend>> {
    let adapters = WebGpu::enumerate();
    let found = adapters.found.iter().find(|found| found.caps.name == name).context("the adapter has gone")?;
    // What runs as fast on a software driver as it can is not what GPUs run.
    let device_type = (found.caps.class == Class::Software).then_some(DeviceType::Other);
    let options = OpenOptions { default_limits: true, device_type, ..OpenOptions::default() };
    Ok(Arc::new(WebGpu::open(found, &options)?))
}

/// Every case, way and storage type, `runs` times.
fn operator(subject: &Subject, cases: &[Case], runs: u32, tests: &mut Vec<Test>, worst: &mut [Worst]) {
    let mut table =
        Table::new(2, &["case", "way", "f32 o", "f32 ht", "f16 o", "f16 ht", "bf16 o", "bf16 ht", "verdict"]);
    let mut failures = String::new();
    for case in cases {
        for way in Way::ALL.into_iter().filter(|&way| !case.large || way == Way::Prefill) {
            progress(&format!("{}: {} {}", subject.label, case.name, way.name()));
            let mut row = vec![case.name.clone(), way.name().to_string()];
            let mut pass = true;
            for (i, &(store, bound)) in STORES.iter().enumerate() {
                let begin = Instant::now();
                let result = way.compute(&*subject.backend, case, store, runs);
                let seconds = begin.elapsed().as_secs_f64();
                let (cells, failure) = judge(case, result, bound, |error, tensor| {
                    worst[i].add(error, || format!("{tensor} of {} {}", case.name, way.name()));
                });
                let name = format!("{} {store}", way.name());
                if let Some(why) = &failure {
                    pass = false;
                    failures.push_str(&format!("{} {name}: {why}\n", case.name));
                }
                let output = format!("o {}, ht {}, at most {bound:.0e}", cells[0], cells[1]);
                let class = format!("{}.{}", subject.label, case.name);
                tests.push(Test { class, name, seconds, output, failure });
                row.extend(cells);
            }
            row.push(verdict(pass));
            table.row(row);
        }
    }
    progress("");
    say(&format!("{table}{failures}"));
}

/// Says on a terminal what is under way, in one line that the next one replaces: a driver in software takes minutes.
pub fn progress(text: &str) {
    let mut err = std::io::stderr();
    if err.is_terminal() {
        let _ = write!(err, "\r\x1b[K{text}").and_then(|()| err.flush());
    }
}

/// The errors of o and ht for the table, and what is wrong with them, if anything.
fn judge(
    case: &Case,
    result: Result<Outputs>,
    bound: f64,
    mut note: impl FnMut(f64, &str),
) -> ([String; 2], Option<String>) {
    let out = match result {
        Ok(out) => out,
        Err(error) => return (["-".into(), "-".into()], Some(format!("{error:#}"))),
    };
    let Some(answers) = &case.answers else { return (["-".into(), "-".into()], Some("no answers".into())) };
    let mut wrong = Vec::new();
    let errors = [("o", &out.o, &answers.o), ("ht", &out.ht, &answers.ht)].map(|(name, found, wanted)| {
        let error = oracle::error(found, wanted);
        note(error, name);
        if error > bound {
            wrong.push(format!("{name}: relative error {}, at most {bound:.0e} allowed", table::error(error)));
        }
        table::error(error)
    });
    (errors, (!wrong.is_empty()).then(|| wrong.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Case {
        let cases = oracle::generated().unwrap();
        cases.into_iter().find(|c| c.name == "generated_small_heads").unwrap()
    }

    #[test]
    fn right_answers_pass_and_wrong_ones_do_not() {
        let case = small();
        let right = case.answers.clone().unwrap();
        let judged = |o: Vec<f32>, ht: Vec<f32>| judge(&case, Ok(Outputs { o, ht }), 1e-5, |_, _| {}).1;
        assert_eq!(judged(right.o.clone(), right.ht.clone()), None);
        let mut off = right.o.clone();
        off[5] += 1.0;
        assert!(judged(off, right.ht.clone()).unwrap().starts_with("o: relative error"));
        let mut nan = right.ht.clone();
        nan[0] = f32::NAN;
        assert!(judged(right.o.clone(), nan).unwrap().starts_with("ht: relative error NaN"));
        assert!(judged(right.o[1..].to_vec(), right.ht.clone()).is_some());
        assert!(judged(Vec::new(), Vec::new()).is_some());
    }

    #[test]
    fn an_error_fails() {
        let error = gatedelta::Error::argument("x", 1, 2);
        assert!(judge(&small(), Err(error.into()), 1.0, |_, _| {}).1.is_some());
    }
}
