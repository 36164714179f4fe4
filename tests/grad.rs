//! The gradients of the operator on every device: golden cases, odd shapes, pieces, bad input.

use gatedelta::backend::Backend;
use gatedelta::gdn::{self, Backward, Cotangents, GradIo, Gradients, Options};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};
use gatedelta::tune::{self, Tile};

use crate::naive::{recurrence, recurrence_grad};
use crate::util::{Batch, Random, cases, devices, error, heads};

/// The largest error that this way of storing may show in a gradient.
fn bound(store: Dtype) -> f64 {
    if store == Dtype::F32 { 1e-5 } else { 5e-3 }
}

fn named(g: &Gradients) -> [(&'static str, &[f32]); 6] {
    [("dq", &g.dq), ("dk", &g.dk), ("dv", &g.dv), ("dg", &g.dg), ("dbeta", &g.dbeta), ("dh0", &g.dh0)]
}

/// Cotangents of a batch, the same for the same seed.
struct Given {
    d_o: Vec<f32>,
    dht: Vec<f32>,
}

impl Given {
    fn random(batch: &Batch, seed: u64) -> Self {
        let mut r = Random::new(seed);
        let states = batch.shape.sequences() * batch.shape.heads.state_len() as usize;
        Given { d_o: r.normals(batch.v.len()), dht: r.normals(states) }
    }

    fn cotangents(&self) -> Cotangents<'_> {
        Cotangents { d_o: &self.d_o, dht: Some(&self.dht) }
    }
}

/// Every gradient against the float64 recurrence.
fn check(what: &str, backend: &dyn Backend, batch: &Batch, seed: u64) {
    let given = Given::random(batch, seed);
    let found = gdn::backward(backend, &batch.inputs(), &given.cotangents()).unwrap();
    compare(what, &found, batch, &given);
}

fn compare(what: &str, found: &Gradients, batch: &Batch, given: &Given) {
    let expected = recurrence_grad(&batch.inputs(), &given.d_o, Some(&given.dht));
    for ((name, found), (same, expected)) in named(found).into_iter().zip(expected.named()) {
        assert_eq!(name, same);
        let (e, most) = (error(found, expected), bound(batch.options.store));
        assert!(e <= most, "{what} {name}: relative error {e:.2e}, at most {most:.0e} expected");
    }
}

#[test]
fn the_definition_agrees_with_the_golden_answers() {
    for case in cases() {
        let grads = recurrence_grad(&case.batch.inputs(), &case.d_o, Some(&case.dht));
        for (name, expected) in &case.grads {
            let (_, found) = grads.named().into_iter().find(|(n, _)| n == name).unwrap();
            let single: Vec<f32> = found.iter().map(|&x| x as f32).collect();
            let e = error(&single, expected);
            assert!(e <= 1e-6, "{} {name}: {e:.2e}", case.name);
        }
    }
}

/// The hand-written derivative against differences of the recurrence itself, one number at a time.
#[test]
fn the_definition_agrees_with_finite_differences() {
    let mut batch = Batch::random(heads(1, 2, 16, 16), &[3, 0, 2], true, 3);
    for l2norm in [false, true] {
        batch.options.qk_l2norm = l2norm;
        let given = Given::random(&batch, 4);
        let grads = recurrence_grad(&batch.inputs(), &given.d_o, Some(&given.dht));
        let loss = |b: &Batch| {
            let (o, ht) = recurrence(&b.inputs(), |_| u64::MAX);
            let sum = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum::<f64>();
            sum(&o, &given.d_o) + sum(&ht, &given.dht)
        };
        type Pick = fn(&mut Batch) -> &mut Vec<f32>;
        let picks: [Pick; 6] =
            [|b| &mut b.q, |b| &mut b.k, |b| &mut b.v, |b| &mut b.g, |b| &mut b.beta, |b| b.h0.as_mut().unwrap()];
        for ((name, grad), pick) in grads.named().into_iter().zip(picks) {
            let mut r = Random::new(9);
            for _ in 0..12 {
                let at = (r.unit() * grad.len() as f64) as usize;
                // Steps that f32 holds exactly, on either side.
                let moved = |sign: f32| {
                    let mut b = batch.clone();
                    let x = &mut pick(&mut b)[at];
                    *x += sign * 2f32.powi(-9);
                    (f64::from(*x), loss(&b))
                };
                let ((x1, up), (x0, down)) = (moved(1.0), moved(-1.0));
                let difference = (up - down) / (x1 - x0);
                assert!(
                    (difference - grad[at]).abs() <= 1e-4 * (1.0 + grad[at].abs()),
                    "{name}[{at}] (norm {l2norm}): {difference} by differences, {} by formula",
                    grad[at]
                );
            }
        }
    }
}

#[test]
fn golden_cases() {
    for device in devices() {
        for case in cases() {
            for store in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let mut batch = case.batch.clone();
                batch.options.store = store;
                let cotangents = Cotangents { d_o: &case.d_o, dht: Some(&case.dht) };
                let found = gdn::backward(&*device.backend, &batch.inputs(), &cotangents).unwrap();
                let mut line = format!("{} {} {store}:", device.name, case.name);
                let mut worst = 0f64;
                for (name, expected) in &case.grads {
                    let (_, found) = named(&found).into_iter().find(|(n, _)| n == name).unwrap();
                    let e = error(found, expected);
                    line += &format!(" {name} {e:.1e}");
                    worst = worst.max(e);
                }
                println!("{line}");
                assert!(worst <= bound(store), "{line}, at most {:.0e} expected", bound(store));
            }
        }
    }
}

#[test]
fn every_head_size_and_both_head_maps() {
    for device in devices() {
        for (i, (k, v)) in [(16, 16), (48, 80), (128, 128), (176, 16), (16, 256), (256, 240)].into_iter().enumerate() {
            for map in [HeadMap::Div, HeadMap::Mod] {
                let heads = Heads::new(2, 6, k, v, map).unwrap();
                let mut batch = Batch::random(heads, &[37, 0, 1], true, i as u64);
                batch.options.store = [Dtype::F32, Dtype::Bf16, Dtype::F16][i % 3];
                check(&format!("{} {k} x {v} {map:?}", device.name), &*device.backend, &batch, 5);
            }
        }
    }
}

#[test]
fn chunks_sequences_and_missing_states() {
    for device in devices() {
        for lens in [&[1][..], &[16], &[31], &[32], &[33], &[64, 1, 0, 17], &[0, 0, 5, 0], &[100]] {
            for h0 in [false, true] {
                let batch = Batch::random(heads(1, 2, 32, 48), lens, h0, 8);
                check(&format!("{} {lens:?} h0 {h0}", device.name), &*device.backend, &batch, 6);
            }
        }
        let batch = Batch::random(heads(1, 1, 32, 32), &[40], false, 8);
        let given = Given::random(&batch, 7);
        let zero = Given { d_o: given.d_o.clone(), dht: vec![0.0; given.dht.len()] };
        let none = Cotangents { dht: None, ..zero.cotangents() };
        let found = gdn::backward(&*device.backend, &batch.inputs(), &none).unwrap();
        compare("no dht", &found, &batch, &zero);
        let empty = Batch::random(heads(1, 1, 16, 16), &[0, 0], true, 1);
        let given = Given::random(&empty, 7);
        let found = gdn::backward(&*device.backend, &empty.inputs(), &given.cotangents()).unwrap();
        assert_eq!((found.dh0, found.dq.len()), (given.dht, 0));
    }
}

/// Many small pieces, tensors that share the rows of one buffer, and two runs that must give the same bits.
#[test]
fn pieces_shared_rows_and_the_same_bits_again() {
    let batch = Batch::random(heads(1, 2, 32, 48), &[70, 0, 3, 150, 20], true, 2);
    let (given, h) = (Given::random(&batch, 3), batch.shape.heads);
    let (t, states) = (batch.shape.tokens(), batch.shape.sequences() as u64 * h.state_len());
    let (qk, vo) = ((h.hk * h.k) as u64, (h.hv * h.v) as u64);
    for device in devices() {
        let b = &*device.backend;
        let put = |x: &[f32]| {
            let buffer = b.alloc("input", x.len() as u64 * 4).unwrap();
            b.write(&buffer.view(), bytemuck::cast_slice(x)).unwrap();
            buffer.view()
        };
        let poisoned = |n: u64| put(&vec![f32::NAN; n as usize]);
        // q, k and v of a token in one row, and something else at its end.
        let stride = 2 * qk + vo + 16;
        let mut rows = vec![f32::NAN; (t * stride) as usize];
        for (i, row) in rows.chunks_exact_mut(stride as usize).enumerate() {
            let parts = [(&batch.q, qk), (&batch.k, qk), (&batch.v, vo)];
            let mut at = 0;
            for (x, n) in parts {
                row[at..at + n as usize].copy_from_slice(&x[i * n as usize..][..n as usize]);
                at += n as usize;
            }
        }
        let shared = Rows::packed(put(&rows), stride);
        let base = tune::tile(b.caps(), &h);
        let run = |grad_scratch: u64, grad_states: u64| {
            let tile = Tile { grad_scratch, grad_states, ..base };
            let plan = Backward::with_tile(b, &batch.shape, &batch.options, stride, tile).unwrap();
            let io = GradIo {
                q: shared.clone(),
                k: shared.at(qk),
                v: shared.at(2 * qk),
                g: put(&batch.g),
                beta: put(&batch.beta),
                h0: batch.h0.as_deref().map(put),
                d_o: Rows::packed(put(&given.d_o), vo),
                dq: Rows::packed(poisoned(t * qk), qk),
                dk: Rows::packed(poisoned(t * qk), qk),
                dv: Rows::packed(poisoned(t * vo), vo),
                dg: poisoned(t * h.hv as u64),
                dbeta: poisoned(t * h.hv as u64),
                dstate: put(&given.dht),
            };
            let mut pass = Pass::new();
            plan.record(&mut pass, &io).unwrap();
            b.run(&pass).unwrap();
            let get = |view| b.read(view).unwrap().wait_as::<f32>().unwrap();
            assert_eq!(get(&io.dstate).len() as u64, states);
            let found = Gradients {
                dq: get(&io.dq.view),
                dk: get(&io.dk.view),
                dv: get(&io.dv.view),
                dg: get(&io.dg),
                dbeta: get(&io.dbeta),
                dh0: get(&io.dstate),
            };
            (plan.plan().pieces.len(), found)
        };
        let (large, small) = (1 << 30, 100_000);
        for (bytes, states, pieces) in [(1, 1, 9), (1, small, 9), (1, large, 9), (small, small, 2), (large, large, 1)] {
            let (found_pieces, found) = run(bytes, states);
            let what = format!("{} pieces of {bytes} bytes in blocks of {states}", device.name);
            assert!(found_pieces >= pieces, "{what}: {found_pieces} pieces");
            compare(&what, &found, &batch, &given);
            let bits = |g: &Gradients| named(g).map(|(_, x)| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            assert!(bits(&run(bytes, states).1) == bits(&found), "{}: other bits the second time", device.name);
        }
    }
}

#[test]
fn memory_stays_below_200_mb_and_grows_linearly() {
    let heads = heads(16, 16, 128, 128);
    for device in devices() {
        let bytes = |t: u64| {
            let shape = Shape::one(heads, t);
            Backward::new(&*device.backend, &shape, &Options::default(), 2048).unwrap().device_bytes()
        };
        let (one, two, four) = (bytes(4096), bytes(8192), bytes(16384));
        println!("{}: {} MB at T = 4096, {} MB at 16384", device.name, one / 1_000_000, four / 1_000_000);
        assert!(one <= 200_000_000, "{}: {one} bytes", device.name);
        assert!(four - two <= 2 * (two - one) + (64 << 20), "{}: {one}, {two}, {four} bytes", device.name);

        // More or less of it where a caller says so.
        let with = |scratch: u64| {
            let options = Options { scratch: Some(scratch), ..Options::default() };
            Backward::new(&*device.backend, &Shape::one(heads, 1024), &options, 2048).unwrap()
        };
        let (little, much) = (with(32 << 20), with(128 << 20));
        let pieces = [&little, &much].map(|plan| plan.plan().pieces.len());
        assert!(pieces[0] > pieces[1], "{}: {pieces:?} pieces", device.name);
        // The states of a sequence, and one for each block, are beside what is asked for.
        let beside = (pieces[0] as u64 + 1) * heads.state_len() * 4 + (1 << 20);
        for (plan, most) in [(&little, 32 << 20), (&much, 128 << 20)] {
            let found = plan.device_bytes();
            assert!(found <= most + beside, "{}: {found} bytes of {most}", device.name);
        }
    }
}

#[test]
fn nan_stays_in_its_sequence_and_head() {
    for device in devices() {
        let batch = Batch::random(heads(2, 4, 16, 32), &[40, 33], true, 2);
        let mut given = Given::random(&batch, 3);
        // Sequence 1, head 3, which shares its key head with head 2.
        given.d_o[(45 * 4 + 3) * 32] = f32::NAN;
        let found = gdn::backward(&*device.backend, &batch.inputs(), &given.cotangents()).unwrap();
        let clean = |x: &[f32], width: usize, heads: usize, head: usize| {
            x.iter().enumerate().all(|(i, x)| {
                let (token, own) = (i / (width * heads), i / width % heads);
                x.is_finite() || (token >= 40 && own == head)
            })
        };
        assert!(clean(&found.dq, 16, 2, 1) && clean(&found.dk, 16, 2, 1), "{}", device.name);
        assert!(clean(&found.dv, 32, 4, 3) && clean(&found.dg, 1, 4, 3) && clean(&found.dbeta, 1, 4, 3));
        assert!(found.dg[45 * 4 + 3].is_nan(), "{}: NaN was lost", device.name);
    }
}

#[test]
fn bad_cotangents_are_named() {
    let batch = Batch::random(heads(1, 2, 16, 16), &[3], true, 1);
    let given = Given::random(&batch, 1);
    let device = &devices()[0];
    let refused = |cotangents: Cotangents<'_>| {
        gdn::backward(&*device.backend, &batch.inputs(), &cotangents).unwrap_err().to_string()
    };
    let text = refused(Cotangents { d_o: &given.d_o[1..], ..given.cotangents() });
    assert!(text.contains("d_o") && text.contains("95") && text.contains("[3, 2, 16]"), "{text}");
    let text = refused(Cotangents { dht: Some(&[0.0]), ..given.cotangents() });
    assert!(text.contains("dht") && text.contains("[1, 2, 16, 16]"), "{text}");
}
