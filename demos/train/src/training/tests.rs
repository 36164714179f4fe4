use clap::Parser;
use gatedelta_agent::engine::Engine as _;
use gatedelta_agent::engine::local::Local;

use super::*;
use crate::data::Side;
use crate::data::scene::{Maker, Number, any, estimate, template};
use crate::draw::Draw;
use crate::learn::alone;

pub fn engine() -> Engine {
    Engine::open(Some("cpu")).unwrap()
}

/// Four layers of both kinds, for 50 tokens.
pub fn tiny() -> Qwen35Config {
    Qwen35Config::new(50, 32, 48, 4, 2, 1)
        .with_head_dim(16)
        .with_linear_num_key_heads(1)
        .with_linear_num_value_heads(2)
        .with_linear_key_head_dim(16)
        .with_linear_value_head_dim(16)
        .with_initializer_range(None)
}

/// Random conversations of these lengths, of 50 tokens.
pub fn conversations(lengths: &[usize]) -> Dataset {
    let (mut data, mut draw) = (Dataset::new(), Draw::new(&[1]));
    for &length in lengths {
        data.ids.extend((0..length).map(|_| draw.below(50) as u16));
        data.mask.extend((0..length).map(|_| u8::from(draw.chance(30))));
        data.offsets.push(data.ids.len() as u64);
        data.kinds.push(0);
    }
    data
}

#[derive(Debug, Parser)]
#[command(args_override_self = true)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// The settings of a small run.
fn settings(out: &Path, more: &str) -> Settings {
    let line = format!(
        "train --hidden 32 --layers 4 --intermediate 48 --linear-heads 2 --linear-dim 16 --heads 2 --kv-heads 1 --head-dim 16 \
         --tokens 128 --steps 12 --rate 1e-2 {more}"
    );
    let line = line.split_whitespace().map(str::to_string).chain(["--out".to_string(), out.display().to_string()]);
    Line::try_parse_from(line).unwrap().settings
}

/// A tokenizer in `dir`, and conversations that it made, without the system turn.
fn generated(dir: &Path, count: u64) -> Dataset {
    let maker = Maker { template: template().unwrap(), measure: &estimate, distance: Some(50) };
    let mut draw = Draw::new(&[9]);
    let texts: Vec<(crate::data::Kind, String)> = (0..count)
        .map(|index| {
            let kind = any(&mut draw);
            let text = maker.text(kind, Number { seed: 9, side: Side::Train, index }).unwrap();
            (kind, text.split_once("<|im_end|>\n").unwrap().1.chars().take(300).collect())
        })
        .collect();
    let all: Vec<String> = texts.iter().map(|(_, text)| text.clone()).collect();
    tokenizer::write(&tokenizer::train(&all, 300).unwrap(), dir).unwrap();
    let read = tokenizer::read(dir).unwrap();
    let mut data = Dataset::new();
    texts.iter().for_each(|(kind, text)| data.push(&read, *kind, text).unwrap());
    data
}

#[test]
fn a_run_that_was_stopped_goes_on_bit_for_bit() {
    let _alone = alone();
    let (engine, device) = (engine(), Device::flex().autodiff());
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer");
    let data = generated(&tokenizer, 12);
    let train = |name: &str, more: &str, stop: u64| {
        let settings = settings(&dir.path().join(name), more);
        let mut training = Training::open(&settings, &tokenizer, (&data, json!({"seed": 9})), &engine, &device)?;
        training.held = Some(training.batches(&data)?);
        // What is not saved at a stop is lost at a kill: so here.
        let mut steps = 0;
        let done = training.train(5, &mut |run, _| {
            steps = run.steps();
            assert!(steps < stop, "killed");
            true
        });
        done.map(|()| (training.run.losses.clone(), training.run.held.clone()))
    };
    // Steps 0 and 1 are the first drills; of the ten others every fourth is one too.
    let drills = "--drill 2 --drill-share 0.25";
    let (losses, held) = train("whole", drills, 100).unwrap();
    assert_eq!((losses.len(), held.iter().map(|held| held.0).collect::<Vec<_>>()), (12, vec![5, 10, 12]));

    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| train("stopped", drills, 7)));
    assert!(killed.is_err());
    assert_eq!(train("stopped", drills, 100).unwrap(), (losses, held));
    for file in ["model/model.safetensors", "loss.svg"] {
        let read = |name: &str| std::fs::read(dir.path().join(name).join(file)).unwrap();
        assert!(read("whole") == read("stopped"), "{file}");
    }
    assert!(std::fs::read_to_string(dir.path().join("whole/loss.svg")).unwrap().contains("red: held out"));

    for more in ["--seed 1 --drill 2 --drill-share 0.25", "--drill 2 --drill-share 0.3"] {
        let why = format!("{:#}", train("stopped", more, 100).unwrap_err());
        assert!(why.contains("was started with"), "{why}");
    }

    // What was exported answers through the agent's engine.
    let model = dir.path().join("whole/model").display().to_string();
    let args = ["agent", "--device", "cpu", "--greedy", "--model", &model];
    let mut local = Local::load(&gatedelta_agent::options::Args::parse_from(args)).unwrap();
    let answer =
        local.generate("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", 4, &mut |_| Ok(true)).unwrap();
    assert!(answer.wrote > 0);
    assert_eq!(local.start().try_it, None);
}

#[test]
fn drills_are_spread_evenly_and_use_up_no_data() {
    let steps = |first, share| (0..100).map(move |at| Step::of(at, first, share));
    let all: Vec<Step> = steps(10, 0.08).collect();
    assert!((0..10).all(|at| all[at] == Step::First(at as u64)));
    let drills: Vec<usize> = (0..100).filter(|&at| matches!(all[at], Step::Drill(_))).collect();
    assert_eq!(drills, [22, 34, 47, 59, 72, 84, 97]);
    let (mut drill, mut data) = (0, 0);
    for step in &all[10..] {
        let (found, count) = match step {
            Step::Drill(at) => (at, &mut drill),
            Step::Data(at) => (at, &mut data),
            Step::First(at) => panic!("{at}"),
        };
        assert_eq!(*found, *count);
        *count += 1;
    }
    assert!(steps(0, 0.0).enumerate().all(|(at, step)| step == Step::Data(at as u64)));
    for bad in ["--drill-share 0.6", "--drill-share -1", "--drill-share NaN"] {
        let line = format!("train --out x {bad}");
        assert!(Line::try_parse_from(line.split(' ')).is_err(), "{bad}");
    }
}

#[test]
fn a_run_begins_with_what_another_one_exported() {
    let _alone = alone();
    let (engine, device) = (engine(), Device::flex().autodiff());
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("tokenizer");
    let data = generated(&tokenizer, 6);
    let train = |out: &str, more: &str| {
        let settings = settings(&dir.path().join(out), more);
        let mut training = Training::open(&settings, &tokenizer, (&data, Value::Null), &engine, &device).unwrap();
        training.train(100, &mut |_, _| true).unwrap();
        training.run.losses.clone()
    };
    let first = train("first", "--steps 40");
    let start = |path: &str| format!("--steps 2 --start {}", dir.path().join(path).display());
    let (model, file) = (train("model", &start("first/model")), train("file", &start("first/run.safetensors")));
    // bf16 makes a small difference, a new start a large one.
    assert!((model[0][0] - file[0][0]).abs() < 0.05 * file[0][0], "{model:?} {file:?}");
    assert!(model[0][0] < 0.8 * first[0][0], "{model:?} {first:?}");
}

#[test]
fn the_losses_fall() {
    let _alone = alone();
    let (engine, device) = (engine(), Device::flex().autodiff());
    let dir = tempfile::tempdir().unwrap();
    let data = generated(dir.path(), 4);
    let settings = settings(&dir.path().join("run"), "--steps 60 --tokens 512");
    let mut training = Training::open(&settings, dir.path(), (&data, Value::Null), &engine, &device).unwrap();
    training.train(100, &mut |_, _| true).unwrap();
    let (first, last) = (training.run.losses[0], training.run.losses[59]);
    assert!(first[0] > 4.5 && last[0] < 0.7 * first[0] && last[1] < 0.8 * first[1], "{first:?} {last:?}");
}

#[test]
fn time_that_is_over_stops_at_a_checkpoint() {
    let _alone = alone();
    let (engine, device) = (engine(), Device::flex().autodiff());
    let dir = tempfile::tempdir().unwrap();
    let data = generated(dir.path(), 4);
    let settings = settings(&dir.path().join("run"), "");
    let open = || Training::open(&settings, dir.path(), (&data, Value::Null), &engine, &device).unwrap();
    open().train(100, &mut |run, _| run.steps() < 3).unwrap();
    let mut again = open();
    assert_eq!((again.run.steps(), again.run.losses.len()), (3, 3));
    let mut told = Vec::new();
    again.describe(&mut told).unwrap();
    again.report(&mut told).unwrap();
    let told = String::from_utf8(told).unwrap();
    for part in [" parameters, ", "goes on after step 3", "3 of 12 steps are done", "run/model"] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn data_of_another_tokenizer_is_refused() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut data = generated(dir.path(), 4);
    data.ids[3] = 5000;
    let settings = settings(&dir.path().join("run"), "");
    let open = |dir: &Path, data| Training::open(&settings, dir, (data, Value::Null), &engine(), &Device::flex()).err();
    let why = open(dir.path(), &data).unwrap().to_string();
    assert!(why.contains("--data has the token 5000") && why.contains(" tokens"), "{why}");
    let why = open(&dir.path().join("nothing"), &data).unwrap().to_string();
    assert!(why.contains("tokenizer.json cannot be read"), "{why}");
}
