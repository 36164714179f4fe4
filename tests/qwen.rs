//! Whole models on every device: the golden checkpoints, random ones against plain formulas, splits, answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::qwen::{Config, Event, Finish, GenerateOptions, LoadOptions, Model, Sampling};
use gatedelta::shape::Dtype;
use proptest::prelude::*;

use crate::qwen_naive::Tiny;
use crate::util::{Random, devices, error, golden};

const MODELS: [&str; 2] = ["models/tiny-text", "models/tiny-vision"];

fn cpu() -> Arc<dyn Backend> {
    devices()[0].backend.clone()
}

fn options(context: u64, kv: Dtype) -> LoadOptions {
    LoadOptions { context: Some(context), kv, ..LoadOptions::default() }
}

/// What transformers computed for one prompt.
struct Prompt {
    ids: Vec<u32>,
    logits: Option<Vec<f64>>,
    last: Vec<f64>,
    greedy: Vec<u32>,
}

fn prompts(model: &str) -> Vec<Prompt> {
    let bytes = std::fs::read(golden(model).join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: String| file.tensor(&name).ok().map(|t| t.data().to_vec());
    let ids = |b: Vec<u8>| -> Vec<u32> { bytemuck::allocation::pod_collect_to_vec(&b) };
    let wide = |b: Vec<u8>| -> Vec<f64> {
        bytemuck::allocation::pod_collect_to_vec::<u8, f32>(&b).into_iter().map(f64::from).collect()
    };
    (0..3)
        .map(|i| Prompt {
            ids: ids(data(format!("prompt{i}.ids")).unwrap()),
            logits: data(format!("prompt{i}.logits")).map(wide),
            last: wide(data(format!("prompt{i}.last_logits")).unwrap()),
            greedy: ids(data(format!("prompt{i}.greedy")).unwrap()),
        })
        .collect()
}

/// The ids of an answer and its end.
fn answer(model: &Model, prompt: &[u32], options: &GenerateOptions) -> (Vec<u32>, String, Finish) {
    let mut session = model.session().unwrap();
    let (mut ids, mut all) = (Vec::new(), String::new());
    let mut end = None;
    for event in session.generate(prompt, options).unwrap() {
        assert!(end.is_none(), "an event after the end");
        match event {
            Event::Prompt { done, total } => assert!(done <= total && ids.is_empty()),
            Event::Token { id, text } => {
                ids.push(id);
                all.push_str(&text);
            }
            Event::Done { text, finish, timings } => {
                all.push_str(&text);
                let read = if matches!(finish, Finish::Failed(_)) { 0 } else { prompt.len() as u64 };
                assert_eq!(timings.prompt_tokens, read);
                end = Some(finish);
            }
        }
    }
    (ids, all, end.expect("an end"))
}

fn greedy(max_tokens: u64) -> GenerateOptions {
    GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(max_tokens), ..GenerateOptions::default() }
}

fn as_in_transformers(kv: Dtype) {
    for device in devices() {
        for name in MODELS {
            let model = Model::load(golden(name), device.backend.clone(), &options(1024, kv)).unwrap();
            let mut worst = 0f64;
            for (i, p) in prompts(name).iter().enumerate() {
                let mut session = model.session().unwrap();
                worst = worst.max(error(&session.prefill(&p.ids, &mut |_, _| {}).unwrap(), &p.last));
                session.reset().unwrap();
                if let Some(expected) = &p.logits {
                    worst = worst.max(error(&session.logits(&p.ids).unwrap(), expected));
                }
                let (ids, _, finish) = answer(&model, &p.ids, &greedy(24));
                assert_eq!(ids, p.greedy, "{} {name} prompt {i}", device.name);
                assert!(matches!(finish, Finish::Length));
            }
            println!("{} {name}, {kv} cache: {worst:.1e}", device.name);
            assert!(worst <= 1e-4, "{} {name}: {worst:e}", device.name);
        }
    }
}

#[test]
fn logits_and_greedy_ids_are_those_of_transformers() {
    as_in_transformers(Dtype::F32);
}

#[test]
fn a_cache_in_f16_changes_little() {
    for name in MODELS {
        let exact = Model::load(golden(name), cpu(), &options(1024, Dtype::F32)).unwrap();
        let half = Model::load(golden(name), cpu(), &options(1024, Dtype::F16)).unwrap();
        assert_eq!(half.memory().cache * 2, exact.memory().cache);
        for p in prompts(name) {
            let got = half.session().unwrap().prefill(&p.ids, &mut |_, _| {}).unwrap();
            let e = error(&got, &p.last);
            println!("{name}, {} tokens: {e:.1e}", p.ids.len());
            assert!(e < 2e-4, "{name}: {e:e}");
        }
    }
}

#[test]
fn stop_ids_and_sampling_come_from_the_checkpoint() {
    for name in MODELS {
        let model = Model::load(golden(name), cpu(), &options(64, Dtype::F32)).unwrap();
        assert_eq!(model.stop_ids(), [468, 470]);
        let sampling = model.generation().sampling;
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.7, 0.8, 20));
        assert!(model.chat_template().is_ok() && model.tokenizer().is_ok());
    }
}

/// Loads a random checkpoint of these sizes.
fn tiny(
    sizes: &Tiny,
    seed: u64,
    dtype: Dtype,
    backend: &Arc<dyn Backend>,
    context: u64,
) -> (Model, Vec<f64>, Vec<u32>) {
    let dir = tempfile::tempdir().unwrap();
    let tensors = sizes.tensors(seed, dtype);
    sizes.write(dir.path(), &tensors, dtype);
    let mut r = Random::new(seed + 1);
    let ids: Vec<u32> = (0..context).map(|_| (r.unit() * sizes.vocab as f64) as u32).collect();
    let expected = sizes.logits(&tensors, &ids);
    let model = Model::load(dir.path(), backend.clone(), &options(context, Dtype::F32)).unwrap();
    (model, expected, ids)
}

#[test]
fn every_head_grouping_and_weight_type_follows_the_formulas() {
    let base = Tiny::default();
    for device in devices() {
        for (sizes, dtype) in [
            (base.clone(), Dtype::F32),
            (base.clone(), Dtype::F16),
            (base.clone(), Dtype::Bf16),
            (Tiny { hv: 2, tied: true, taps: 2, layers: "LLF", ..base.clone() }, Dtype::Bf16),
            (Tiny { hk: 1, hv: 3, k: 32, v: 16, heads: 6, kv: 1, layers: "FFL", ..base.clone() }, Dtype::F32),
            (Tiny { layers: "LL", ..base.clone() }, Dtype::F32),
            (Tiny { layers: "FF", ..base.clone() }, Dtype::F32),
        ] {
            let (model, expected, ids) = tiny(&sizes, 7, dtype, &device.backend, 70);
            let e = error(&model.session().unwrap().logits(&ids).unwrap(), &expected);
            assert!(e <= 1e-5, "{} {sizes:?} {dtype}: {e:e}", device.name);
            // Token by token is the other set of kernels; a software driver takes its time for it.
            let prompt = if device.name == "cpu" { 1 } else { 60 };
            let mut session = model.session().unwrap();
            session.prefill(&ids[..prompt], &mut |_, _| {}).unwrap();
            let mut rows = Vec::new();
            for id in &ids[prompt..] {
                rows.extend(session.prefill(&[*id], &mut |_, _| {}).unwrap());
            }
            let e = error(&rows, &expected[prompt * sizes.vocab..]);
            assert!(e <= 1e-5, "{} {sizes:?} {dtype}, decoded: {e:e}", device.name);
        }
    }
}

#[test]
fn the_cache_grows_over_pages() {
    // 4 x 256 numbers of keys a position: pages of 1024.
    let sizes = Tiny { layers: "LF", heads: 4, kv: 4, dim: 256, hv: 2, ..Tiny::default() };
    let (model, expected, ids) = tiny(&sizes, 3, Dtype::F32, &cpu(), 1100);
    let row = |t: usize| &expected[t * sizes.vocab..(t + 1) * sizes.vocab];
    let mut session = model.session().unwrap();
    let whole = session.prefill(&ids, &mut |_, _| {}).unwrap();
    assert!(error(&whole, row(1099)) <= 1e-5, "{:e}", error(&whole, row(1099)));
    session.reset().unwrap();
    session.prefill(&ids[..1020], &mut |_, _| {}).unwrap();
    for t in 1020..1040 {
        let got = session.prefill(&ids[t..=t], &mut |_, _| {}).unwrap();
        assert!(error(&got, row(t)) <= 1e-5, "token {t}: {:e}", error(&got, row(t)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_split_gives_the_same_answer(cuts in prop::collection::vec(1usize..60, 1..8), seed in 0u64..4) {
        let total: usize = cuts.iter().sum();
        let (model, expected, ids) = tiny(&Tiny::default(), seed, Dtype::Bf16, &cpu(), total as u64);
        let mut session = model.session().unwrap();
        let mut at = 0;
        for n in cuts {
            let got = session.prefill(&ids[at..at + n], &mut |_, _| {}).unwrap();
            at += n;
            let row = &expected[(at - 1) * 96..at * 96];
            prop_assert!(error(&got, row) <= 1e-5, "after {}: {:e}", at, error(&got, row));
        }
        prop_assert_eq!(session.ids(), &ids[..]);
    }
}

#[test]
fn the_same_bits_every_run_and_after_a_reset() {
    for device in devices() {
        let model = Model::load(golden(MODELS[1]), device.backend.clone(), &options(512, Dtype::F32)).unwrap();
        let ids = &prompts(MODELS[1])[1].ids;
        let mut session = model.session().unwrap();
        let first = session.logits(ids).unwrap();
        session.reset().unwrap();
        assert_eq!(session.logits(ids).unwrap(), first, "{}", device.name);
        assert_eq!(model.session().unwrap().logits(ids).unwrap(), first, "{}", device.name);
    }
}

#[test]
fn bad_ids_are_refused_and_the_session_goes_on() {
    let model = Model::load(golden(MODELS[0]), cpu(), &options(20, Dtype::F32)).unwrap();
    let prompt = &prompts(MODELS[0])[0];
    let mut session = model.session().unwrap();
    for (ids, word) in [
        (vec![], "at least one"),
        (vec![1, 512], "ids[1]"),
        (vec![u32::MAX], "vocabulary"),
        (vec![1; 21], "the context's 20"),
    ] {
        let e = session.prefill(&ids, &mut |_, _| {}).unwrap_err();
        assert!(matches!(e, Error::Argument { .. }) && e.to_string().contains(word), "{e}");
        assert!(session.logits(&ids).is_err() && session.generate(&ids, &greedy(1)).is_err());
    }
    let got = session.prefill(&prompt.ids, &mut |_, _| {}).unwrap();
    assert!(error(&got, &prompt.last) <= 1e-4);
    let e = session.prefill(&[1; 10], &mut |_, _| {}).unwrap_err().to_string();
    assert!(e.contains("10 more after 11"), "{e}");
    // An answer that meets the end of the context says so: 11 + 9 tokens are read, and one more is drawn.
    let (ids, _, finish) = answer(&model, &prompt.ids, &greedy(24));
    assert!(matches!(finish, Finish::Context), "{finish:?}");
    assert_eq!(ids, prompt.greedy[..10]);
}

#[test]
fn an_answer_ends_for_every_reason() {
    let model = Model::load(golden(MODELS[0]), cpu(), &options(512, Dtype::F32)).unwrap();
    let prompt = &prompts(MODELS[0])[1];
    let stop = prompt.greedy[5];
    let at = prompt.greedy.iter().position(|id| *id == stop).unwrap();
    let (ids, text, finish) = answer(&model, &prompt.ids, &GenerateOptions { stop_ids: vec![stop], ..greedy(24) });
    assert!(matches!(finish, Finish::Stop(id) if id == stop));
    assert_eq!(ids, prompt.greedy[..at]);
    let known: Vec<u32> = ids.into_iter().filter(|id| *id < 477).collect();
    assert_eq!(text, model.tokenizer().unwrap().decode(&known, false).unwrap());

    let (ids, _, finish) = answer(&model, &prompt.ids, &greedy(0));
    assert!(ids.is_empty() && matches!(finish, Finish::Length));

    let cancel = Arc::new(AtomicBool::new(false));
    let mut session = model.session().unwrap();
    let options = GenerateOptions { cancel: Some(cancel.clone()), ..greedy(24) };
    let mut tokens = 0;
    for event in session.generate(&prompt.ids, &options).unwrap() {
        match event {
            Event::Token { .. } => {
                tokens += 1;
                cancel.store(tokens == 3, Ordering::Relaxed);
            }
            Event::Done { finish, .. } => assert!(matches!(finish, Finish::Cancelled)),
            Event::Prompt { .. } => {}
        }
    }
    assert_eq!(tokens, 3);
    // What was given out last was not read yet: the sequence goes on from it.
    assert_eq!(session.ids()[prompt.ids.len()..], prompt.greedy[..2]);
    let more: Vec<u32> = session
        .generate(&prompt.greedy[2..3], &greedy(3))
        .unwrap()
        .filter_map(|e| if let Event::Token { id, .. } = e { Some(id) } else { None })
        .collect();
    assert_eq!(more, prompt.greedy[3..6]);
}

#[test]
fn nan_logits_end_an_answer_with_an_error() {
    let sizes = Tiny { layers: "LF", hv: 2, ..Tiny::default() };
    for device in devices() {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = sizes.tensors(5, Dtype::F32);
        tensors.get_mut("model.norm.weight").unwrap().1[3] = f32::NAN;
        sizes.write(dir.path(), &tensors, Dtype::F32);
        let model = Model::load(dir.path(), device.backend.clone(), &options(32, Dtype::F32)).unwrap();
        for sampling in [Sampling::GREEDY, Sampling::default()] {
            let (ids, _, finish) = answer(&model, &[1, 2, 3], &GenerateOptions { sampling, ..greedy(4) });
            assert!(ids.is_empty() && matches!(finish, Finish::Failed(_)), "{} {finish:?}", device.name);
        }
    }
}

#[test]
fn the_same_seed_draws_the_same_answer() {
    let model = Model::load(golden(MODELS[1]), cpu(), &options(512, Dtype::F32)).unwrap();
    let prompt = &prompts(MODELS[1])[0].ids;
    let draw = |seed| answer(&model, prompt, &GenerateOptions { seed, max_tokens: Some(40), ..greedy(40) }).0;
    let sampled = |seed| {
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, presence_penalty: 1.0 };
        answer(&model, prompt, &GenerateOptions { sampling, seed, max_tokens: Some(40), ..greedy(40) }).0
    };
    assert_eq!(draw(1), draw(2));
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
}

#[test]
fn a_random_model_of_a_preset_runs() {
    let config = Config {
        vocab: 128,
        layers: Config::preset("0.8b").unwrap().layers[..4].to_vec(),
        ..Config::preset("0.8b").unwrap()
    };
    let run = |seed| {
        let model = Model::random(config.clone(), cpu(), seed, Dtype::Bf16, &options(64, Dtype::F32)).unwrap();
        assert!(model.tokenizer().is_err() && model.chat_template().is_err());
        model.session().unwrap().prefill(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &mut |_, _| {}).unwrap()
    };
    let logits = run(1);
    assert!(logits.iter().all(|l| l.is_finite()));
    assert_eq!(logits, run(1));
    assert_ne!(logits, run(2));
    for (name, parameters) in [("0.8b", 752.4e6), ("2b", 1881.8e6), ("4b", 4205.8e6), ("9b", 8953.8e6)] {
        let n = Config::preset(name).unwrap().parameters() as f64;
        assert!((n / parameters - 1.0).abs() < 1e-3, "{name}: {n}");
    }
    assert_eq!(Config::preset("27B").unwrap().linear.group(), 3);
    assert!(Config::preset("1b").is_err());
}

/// In a process of its own: memory of this one is shared with other tests.
#[test]
#[cfg(target_os = "linux")]
fn loading_copies_no_large_weight() {
    const DIR: &str = "GATEDELTA_TEST_LOAD_DIR";
    let anonymous = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssAnon")).unwrap().to_string();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    };
    if let Ok(dir) = std::env::var(DIR) {
        let backend = cpu();
        let before = anonymous();
        let model = Model::load(dir, backend, &options(64, Dtype::F32)).unwrap();
        let grown = anonymous().saturating_sub(before);
        let weights = model.memory().weights;
        println!("{grown} bytes for {weights} of weights");
        assert!(weights > 40 << 20 && grown < weights * 15 / 100, "{grown} bytes for {weights} of weights");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sizes = Tiny { hidden: 512, ffn: 2048, vocab: 8192, layers: "LFLF", ..Tiny::default() };
    sizes.write(dir.path(), &sizes.tensors(1, Dtype::Bf16), Dtype::Bf16);
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "qwen::loading_copies_no_large_weight", "--nocapture"])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("bytes for"), "{said}{}", String::from_utf8_lossy(&child.stderr));
}
