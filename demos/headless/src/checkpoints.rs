//! Checkpoints with known answers: logits and greedy continuations, on one device.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use gatedelta::backend::Backend;
use gatedelta::qwen::{Event, Finish, GenerateOptions, LoadOptions, Model, Sampling};
use safetensors::SafeTensors;

use crate::case::{floats, ids};
use crate::junit::Test;
use crate::table::{self, Table, verdict};
use crate::{oracle, same, say};

/// The largest relative error of logits.
const BOUND: f64 = 1e-4;

/// A checkpoint's directory and what it should answer.
pub struct Checkpoint {
    name: String,
    dir: PathBuf,
    prompts: Vec<Prompt>,
}

/// One prompt and its answers.
struct Prompt {
    name: String,
    ids: Vec<u32>,
    /// `[T, vocab]`, for short prompts.
    logits: Option<Vec<f32>>,
    /// `[vocab]`, after the last id.
    last: Vec<f32>,
    /// What greedy decoding appends.
    greedy: Vec<u32>,
}

/// All checkpoints below a directory: its subdirectories with a `config.json` and an `expected.safetensors`.
///
/// # Errors
/// A directory without any, answers that cannot be read.
pub fn read(dir: &Path) -> Result<Vec<Checkpoint>> {
    let listing = || format!("cannot list the checkpoints in {}", dir.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(listing)? {
        let path = entry.with_context(listing)?.path();
        let answers = path.join("expected.safetensors");
        if path.join("config.json").is_file() && answers.is_file() {
            let prompts = prompts(&answers).with_context(|| format!("{} is not usable", answers.display()))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push(Checkpoint { name, dir: path, prompts });
        }
    }
    ensure!(!found.is_empty(), "no directory with config.json and expected.safetensors in {}", dir.display());
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn prompts(path: &Path) -> Result<Vec<Prompt>> {
    let bytes = std::fs::read(path)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let has = |name: &str| file.tensor(name).is_ok();
    let mut prompts = Vec::new();
    for i in 0.. {
        let name = format!("prompt{i}");
        let tensor = |what: &str| format!("{name}.{what}");
        if !has(&tensor("ids")) {
            break;
        }
        let logits = has(&tensor("logits")).then(|| floats(&file, &tensor("logits"))).transpose()?;
        let prompt = Prompt {
            ids: ids(&file, &tensor("ids"))?,
            logits: logits.map(|(_, numbers)| numbers),
            last: floats(&file, &tensor("last_logits"))?.1,
            greedy: ids(&file, &tensor("greedy"))?,
            name,
        };
        ensure!(!prompt.ids.is_empty(), "{}: no ids", prompt.name);
        prompts.push(prompt);
    }
    ensure!(!prompts.is_empty(), "tensor prompt0.ids is missing");
    Ok(prompts)
}

/// Checks every prompt of every checkpoint, `runs` times; `note` hears of each error and where it is.
pub fn check(
    label: &str,
    backend: &Arc<dyn Backend>,
    checkpoints: &[Checkpoint],
    runs: u32,
    tests: &mut Vec<Test>,
    mut note: impl FnMut(f64, Box<dyn FnOnce() -> String>),
) {
    let mut table = Table::new(2, &["checkpoint", "prompt", "ids", "logits", "last logits", "greedy ids", "verdict"]);
    let mut failures = String::new();
    for checkpoint in checkpoints {
        let begin = Instant::now();
        let mut add = |name: String, seconds: f64, output: String, failure: Option<String>| {
            if let Some(why) = &failure {
                failures.push_str(&format!("{} {name}: {why}\n", checkpoint.name));
            }
            tests.push(Test { class: format!("{label}.{}", checkpoint.name), name, seconds, output, failure });
        };
        let model = match load(backend, &checkpoint.dir) {
            Ok(model) => model,
            Err(error) => {
                add("load".into(), begin.elapsed().as_secs_f64(), String::new(), Some(format!("{error:#}")));
                table.row(vec![
                    checkpoint.name.clone(),
                    "load".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    verdict(false),
                ]);
                continue;
            }
        };
        for prompt in &checkpoint.prompts {
            let begin = Instant::now();
            let found =
                same::repeated(runs, || logits(&model, &prompt.ids), |x| vec![("logits", bytemuck::cast_slice(x))]);
            let (cells, failure) = judge(prompt, &found, |error| {
                let at = format!("{} {}", checkpoint.name, prompt.name);
                note(error, Box::new(|| at));
            });
            let pass = failure.is_none();
            let output = format!("all {}, last {}, at most {BOUND:.0e}", cells[0], cells[1]);
            add(format!("{} logits", prompt.name), begin.elapsed().as_secs_f64(), output, failure);

            let begin = Instant::now();
            let compute = || greedy(&model, &prompt.ids, prompt.greedy.len());
            let found = same::repeated(runs, compute, |ids| vec![("greedy ids", ids)]);
            let (same, failure) = judge_ids(&found, &prompt.greedy);
            let pass = pass && failure.is_none();
            add(format!("{} greedy", prompt.name), begin.elapsed().as_secs_f64(), format!("{same} the same"), failure);

            let mut row = vec![checkpoint.name.clone(), prompt.name.clone(), prompt.ids.len().to_string()];
            row.extend(cells);
            row.extend([same, verdict(pass)]);
            table.row(row);
        }
    }
    say(&format!("{table}{failures}"));
}

/// The errors of all logits and of the last row, and what is wrong with them, if anything.
fn judge(prompt: &Prompt, found: &Result<Vec<f32>>, mut note: impl FnMut(f64)) -> ([String; 2], Option<String>) {
    let found = match found {
        Ok(found) => found,
        Err(error) => return (["-".into(), "-".into()], Some(format!("{error:#}"))),
    };
    let expected = prompt.ids.len() * prompt.last.len();
    if found.len() != expected {
        return (["-".into(), "-".into()], Some(format!("found {} logits, expected {expected}", found.len())));
    }
    let mut wrong = Vec::new();
    let mut cell = |what: &str, found: &[f32], wanted: &[f32]| {
        let error = oracle::error(found, wanted);
        note(error);
        if error > BOUND {
            wrong.push(format!("{what}: relative error {}, at most {BOUND:.0e} allowed", table::error(error)));
        }
        table::error(error)
    };
    let all = prompt.logits.as_ref().map_or("-".into(), |wanted| cell("logits", found, wanted));
    let last = cell("last logits", &found[expected - prompt.last.len()..], &prompt.last);
    ([all, last], (!wrong.is_empty()).then(|| wrong.join("; ")))
}

/// How many ids agree up to the first that does not, and what is wrong, if anything.
fn judge_ids(found: &Result<Vec<u32>>, wanted: &[u32]) -> (String, Option<String>) {
    match found {
        Ok(found) => {
            let same = found.iter().zip(wanted).take_while(|(a, b)| a == b).count();
            let failure = (found != wanted).then(|| format!("greedy ids: found {found:?}, expected {wanted:?}"));
            (format!("{same}/{}", wanted.len()), failure)
        }
        Err(error) => ("-".into(), Some(format!("{error:#}"))),
    }
}

/// Loads a checkpoint.
///
/// # Errors
/// Whatever is wrong with its files, or that it does not fit the device.
pub fn load(backend: &Arc<dyn Backend>, dir: &Path) -> Result<Model> {
    Ok(Model::load(dir, backend.clone(), &LoadOptions::default())?)
}

/// The logits after every id, `[T, vocab]`.
///
/// # Errors
/// Ids outside the vocabulary, whatever the device reports.
pub fn logits(model: &Model, ids: &[u32]) -> Result<Vec<f32>> {
    Ok(model.session()?.logits(ids)?)
}

/// The ids that greedy decoding appends, stop ids or not.
///
/// # Errors
/// As [`logits`].
pub fn greedy(model: &Model, ids: &[u32], n: usize) -> Result<Vec<u32>> {
    // The last id is drawn and not read.
    let context = model.memory().context as usize;
    let room = (context + 1).saturating_sub(ids.len());
    ensure!(n <= room, "n: found {n}, expected at most {room}: the context holds {context} tokens");
    let options =
        GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(n as u64), ..GenerateOptions::default() };
    let mut found = Vec::new();
    for event in model.session()?.generate(ids, &options)? {
        match event {
            Event::Token { id, .. } => found.push(id),
            Event::Done { finish: Finish::Failed(error), .. } => return Err(error.into()),
            Event::Done { .. } | Event::Prompt { .. } => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> Prompt {
        let logits = vec![1.0, 2.0, 3.0, 4.0];
        Prompt { name: "p".into(), ids: vec![1, 2], last: vec![3.0, 4.0], logits: Some(logits), greedy: vec![5, 6] }
    }

    #[test]
    fn only_right_logits_pass() {
        let judged = |found: &[f32]| judge(&prompt(), &Ok(found.to_vec()), |_| {}).1;
        assert_eq!(judged(&[1.0, 2.0, 3.0, 4.0]), None);
        assert!(judged(&[1.0, 2.0, 3.0, 4.1]).unwrap().contains("last logits"));
        assert!(judged(&[1.5, 2.0, 3.0, 4.0]).is_some());
        assert!(judged(&[1.0, 2.0, 3.0, f32::NAN]).is_some());
        assert!(judged(&[1.0, 2.0, 3.0]).is_some());
        assert!(judge(&prompt(), &Err(anyhow::anyhow!("lost")), |_| {}).1.is_some());
    }

    #[test]
    fn only_all_ids_pass() {
        assert_eq!(judge_ids(&Ok(vec![5, 6]), &[5, 6]), ("2/2".into(), None));
        assert_eq!(judge_ids(&Ok(vec![5, 7]), &[5, 6]).0, "1/2");
        assert!(judge_ids(&Ok(vec![5, 7]), &[5, 6]).1.is_some());
        assert!(judge_ids(&Ok(vec![5]), &[5, 6]).1.is_some());
    }

    #[test]
    fn the_answers_in_the_repository_are_read() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
        let checkpoints = read(&dir).unwrap();
        assert_eq!(checkpoints.len(), 2);
        assert!(checkpoints.iter().all(|c| c.prompts.len() == 3 && c.prompts.iter().all(|p| p.greedy.len() == 24)));
    }
}
