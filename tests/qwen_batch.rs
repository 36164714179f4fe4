//! Several sequences in one pass: each gets what it gets alone.

use std::sync::Arc;

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::qwen::{Batch, LoadOptions, Model, Session};
use gatedelta::shape::Dtype;

use crate::qwen_naive::Tiny;
use crate::util::{self, Random, devices, golden};

/// A model whose pages hold 512 positions.
fn wide(backend: &Arc<dyn Backend>, kv: Dtype) -> Model {
    let sizes = Tiny { layers: "LF", heads: 4, kv: 4, dim: 256, hv: 2, ..Tiny::default() };
    let dir = tempfile::tempdir().unwrap();
    sizes.write(dir.path(), &sizes.tensors(3, Dtype::F32), Dtype::F32);
    Model::load(dir.path(), backend.clone(), &LoadOptions { context: Some(1100), kv, ..LoadOptions::default() })
        .unwrap()
}

fn tiny(backend: &Arc<dyn Backend>) -> Model {
    let options = LoadOptions { context: Some(256), ..LoadOptions::default() };
    Model::load(golden("models/tiny-text"), backend.clone(), &options).unwrap()
}

/// Sequences that have read so many ids each; the same sequence twice gives the same ids.
fn sessions(model: &Model, lengths: &[usize]) -> Vec<Session> {
    let session = |(i, length): (usize, &usize)| {
        let mut session = model.session().unwrap();
        if *length > 0 {
            session.prefill(&ids(model, *length, i as u64), &mut |_, _| {}).unwrap();
        }
        session
    };
    lengths.iter().enumerate().map(session).collect()
}

fn ids(model: &Model, n: usize, seed: u64) -> Vec<u32> {
    let mut r = Random::new(seed + 1);
    (0..n).map(|_| (r.unit() * f64::from(model.config().vocab)) as u32).collect()
}

/// The relative L2 error of f32 logits.
fn error(found: &[f32], expected: &[f32]) -> f64 {
    util::error(found, &expected.iter().map(|l| f64::from(*l)).collect::<Vec<_>>())
}

/// Steps all together and each alone; the worst error.
fn compare(model: &Model, lengths: &[usize], steps: usize) -> f64 {
    let (mut together, mut alone) = (sessions(model, lengths), sessions(model, lengths));
    let vocab = model.config().vocab as usize;
    let mut batch = Batch::new(model);
    let mut worst = 0f64;
    for step in 0..steps {
        let ids = ids(model, lengths.len(), 100 + step as u64);
        let mut all: Vec<&mut Session> = together.iter_mut().collect();
        let logits = batch.step(&mut all, &ids).unwrap();
        assert_eq!(logits.len(), vocab * lengths.len());
        for ((row, session), id) in logits.chunks_exact(vocab).zip(&mut alone).zip(&ids) {
            let expected = session.prefill(&[*id], &mut |_, _| {}).unwrap();
            let error = error(row, &expected);
            assert!(error <= 1e-5, "{} {lengths:?} step {step}: {error:e}", model.memory().device);
            worst = worst.max(error);
        }
    }
    for (together, alone) in together.iter().zip(&alone) {
        assert_eq!(together.ids(), alone.ids());
    }
    worst
}

#[test]
fn together_as_alone() {
    for device in devices() {
        let model = tiny(&device.backend);
        let steps = if device.name == "cpu" { 12 } else { 3 };
        let mut worst = 0f64;
        // An empty sequence among them, one alone, as many as a product by vectors takes and more.
        for lengths in [&[5, 0, 70][..], &[9], &[1, 2, 3, 4, 5, 6, 7, 8], &[30, 1, 2, 17, 5, 0, 9, 64, 65, 3, 8]] {
            worst = worst.max(compare(&model, lengths, steps));
        }
        println!("{}: up to {} in a pass, worst error {worst:.1e}", device.name, Batch::new(&model).most());
        // Across the border of a page, each at its own time.
        let model = wide(&device.backend, Dtype::F16);
        compare(&model, &[509, 511, 3, 512], 5);
    }
}

#[test]
fn sequences_come_and_go() {
    for device in devices() {
        let model = tiny(&device.backend);
        let vocab = model.config().vocab as usize;
        let (mut together, mut alone) = (sessions(&model, &[4, 9, 2, 31]), sessions(&model, &[4, 9, 2, 31]));
        let mut batch = Batch::new(&model);
        let kept = together[1].snapshot().unwrap();
        let kept_alone = alone[1].snapshot().unwrap();
        for (step, who) in
            [vec![0, 1], vec![0, 1], vec![1, 2, 3], vec![0, 3], vec![1, 3], vec![1, 3]].into_iter().enumerate()
        {
            if step == 4 {
                // Its memory is another's now.
                together[1].restore(&kept).unwrap();
                alone[1].restore(&kept_alone).unwrap();
            }
            let ids = ids(&model, who.len(), step as u64);
            let mut picked: Vec<&mut Session> =
                together.iter_mut().enumerate().filter(|(i, _)| who.contains(i)).map(|(_, s)| s).collect();
            let logits = batch.step(&mut picked, &ids).unwrap();
            for ((row, i), id) in logits.chunks_exact(vocab).zip(&who).zip(&ids) {
                let expected = alone[*i].prefill(&[*id], &mut |_, _| {}).unwrap();
                assert!(error(row, &expected) <= 1e-5, "{} step {step}, sequence {i}", device.name);
            }
        }
        // The same again, to the last bit.
        let run = || {
            let mut all = sessions(&model, &[4, 9, 2]);
            let mut all: Vec<&mut Session> = all.iter_mut().collect();
            Batch::new(&model).step(&mut all, &[1, 2, 3]).unwrap().iter().map(|l| l.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(), run(), "{}", device.name);
    }
}

#[test]
fn what_cannot_be_stepped_is_named_and_nothing_moves() {
    let device = &devices()[0];
    let (model, other) = (tiny(&device.backend), tiny(&device.backend));
    let mut all = sessions(&model, &[4, 256, 2]);
    let mut stranger = other.session().unwrap();
    let mut batch = Batch::new(&model);
    let named = |result: Result<Vec<f32>, Error>| match result.unwrap_err() {
        Error::Argument { what, .. } => what,
        other => panic!("{other}"),
    };
    let [a, full, b] = &mut all[..] else { panic!() };
    assert_eq!(named(batch.step(&mut [a, b], &[1])), "ids");
    assert_eq!(named(batch.step(&mut [a, b], &[1, u32::MAX])), "sessions[1]: ids[0]");
    assert_eq!(named(batch.step(&mut [a, full], &[1, 1])), "sessions[1]: ids");
    assert_eq!(named(batch.step(&mut [a, &mut stranger], &[1, 1])), "sessions[1]");
    assert!(batch.step(&mut [], &[]).unwrap().is_empty());
    assert_eq!((a.ids().len(), full.ids().len(), b.ids().len()), (4, 256, 2));
    assert_eq!(batch.step(&mut [a, b], &[1, 1]).unwrap().len(), 2 * model.config().vocab as usize);
    assert_eq!((a.ids().len(), b.ids().len()), (5, 3));
}
