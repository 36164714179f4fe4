//! Drawing tokens: each filter by its definition, frequencies against probabilities.

use gatedelta::Error;
use gatedelta::qwen::{Sampler, Sampling};

const ALL: Sampling = Sampling { presence_penalty: 0.0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// How often each id comes in many draws.
fn frequencies(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
    const DRAWS: usize = 40_000;
    let mut sampler = Sampler::new(sampling, 9).unwrap();
    let mut counts = vec![0.0; logits.len()];
    for _ in 0..DRAWS {
        counts[sampler.sample(logits).unwrap() as usize] += 1.0 / DRAWS as f64;
    }
    counts
}

/// Frequencies are these up to chance: 5 standard deviations of 40000 draws.
#[track_caller]
fn close(found: &[f64], expected: &[f64]) {
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= 5.0 * (e * (1.0 - e) / 40_000.0).sqrt() + 1e-9, "{found:?} {expected:?}");
    }
}

fn logs(p: &[f64]) -> Vec<f32> {
    p.iter().map(|p| p.ln() as f32).collect()
}

const P: [f64; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];

#[test]
fn draws_follow_the_probabilities() {
    close(&frequencies(ALL, &logs(&P)), &P);
    let hot: Vec<f64> = P.map(|p| p.powf(0.5)).to_vec();
    let sum: f64 = hot.iter().sum();
    let hot: Vec<f64> = hot.iter().map(|p| p / sum).collect();
    close(&frequencies(Sampling { temperature: 2.0, ..ALL }, &logs(&P)), &hot);
}

#[test]
fn filters_keep_what_they_should() {
    let logits = logs(&P);
    close(&frequencies(Sampling { top_k: 2, ..ALL }, &logits), &[0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0]);
    // 0.4 + 0.25 is below 0.7, so the next one, 0.2, stays.
    close(&frequencies(Sampling { top_p: 0.7, ..ALL }, &logits), &[0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85]);
    close(&frequencies(Sampling { min_p: 0.45, ..ALL }, &logits), &[0.0, 0.4 / 0.85, 0.0, 0.25 / 0.85, 0.2 / 0.85]);
    for certain in
        [Sampling { top_k: 1, ..ALL }, Sampling { top_p: 0.0, ..ALL }, Sampling { min_p: 1.0, ..ALL }, Sampling::GREEDY]
    {
        close(&frequencies(certain, &logits), &[0.0, 1.0, 0.0, 0.0, 0.0]);
    }
    // top-k first, then top-p of what is left: 0.4 of 0.65 is enough for 0.6.
    close(&frequencies(Sampling { top_k: 2, top_p: 0.6, ..ALL }, &logits), &[0.0, 1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn the_presence_penalty_counts_each_id_once() {
    let mut sampler = Sampler::new(Sampling { presence_penalty: 1.5, temperature: 0.0, ..ALL }, 0).unwrap();
    let logits = [1.0, 2.0, 0.0];
    assert_eq!(sampler.sample(&logits).unwrap(), 1);
    for _ in 0..3 {
        sampler.accept(1);
    }
    assert_eq!(sampler.sample(&logits).unwrap(), 0);
    sampler.accept(0);
    // 1 - 1.5, 2 - 1.5, 0.
    assert_eq!(sampler.sample(&logits).unwrap(), 1);
    assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 2.0, 1.0]).unwrap(), 2);
}

#[test]
fn ties_go_to_the_smaller_id_and_forbidden_ids_never_come() {
    let mut sampler = Sampler::new(Sampling::GREEDY, 0).unwrap();
    assert_eq!(sampler.sample(&[0.0, 3.0, 3.0, 1.0]).unwrap(), 1);
    let f = frequencies(ALL, &[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0]);
    close(&f, &[0.0, 0.5, 0.0, 0.5]);
    // Large logits do not overflow.
    close(&frequencies(ALL, &[3e38, 3e38, -3e38]), &[0.5, 0.5, 0.0]);
}

#[test]
fn what_is_no_distribution_is_an_error() {
    let mut sampler = Sampler::new(ALL, 0).unwrap();
    for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[], &[f32::NEG_INFINITY; 3]] {
        assert!(matches!(sampler.sample(logits), Err(Error::Argument { .. })), "{logits:?}");
    }
    for (what, wrong) in [
        ("temperature", Sampling { temperature: -1.0, ..ALL }),
        ("temperature", Sampling { temperature: f32::NAN, ..ALL }),
        ("top_p", Sampling { top_p: 1.1, ..ALL }),
        ("min_p", Sampling { min_p: -0.1, ..ALL }),
        ("presence_penalty", Sampling { presence_penalty: 3.0, ..ALL }),
    ] {
        let e = Sampler::new(wrong, 0).unwrap_err();
        assert!(matches!(&e, Error::Argument { what: w, .. } if w == what), "{e}");
    }
}
