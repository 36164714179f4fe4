//! The operator on every device: golden cases, splits, decode, verify, odd shapes, bad input.

use gatedelta::backend::{Backend, Buffer};
use gatedelta::gdn::{self, Commit, Inputs, Io, Options, Outputs, Prefill, Step};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};

use crate::naive::recurrence;
use crate::util::{Batch, bound, cases, devices, error, heads};

const STORES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

fn assert_close(what: &str, found: &[f32], expected: &[f64], bound: f64) {
    let e = error(found, expected);
    assert!(e <= bound, "{what}: relative error {e:.2e}, at most {bound:.0e} expected");
}

fn all(batch: &Batch) -> (Vec<f64>, Vec<f64>) {
    recurrence(&batch.inputs(), |_| u64::MAX)
}

#[test]
fn the_definition_agrees_with_the_golden_answers() {
    for case in cases() {
        let (o, ht) = all(&case.batch);
        let single = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        assert_close(&case.name, &single(&o), &case.o, 1e-6);
        assert_close(&case.name, &single(&ht), &case.ht, 1e-6);
    }
}

#[test]
fn golden_cases() {
    for device in devices() {
        for case in cases() {
            for store in STORES {
                let mut batch = case.batch.clone();
                batch.options.store = store;
                let out = gdn::prefill(&*device.backend, &batch.inputs()).unwrap();
                let what = format!("{} {} {store}", device.name, case.name);
                println!("{what}: o {:.1e} ht {:.1e}", error(&out.o, &case.o), error(&out.ht, &case.ht));
                assert_close(&format!("{what} o"), &out.o, &case.o, bound(store));
                assert_close(&format!("{what} ht"), &out.ht, &case.ht, bound(store));
            }
        }
    }
}

/// o and ht of one sequence, taken in pieces that end at `cuts`.
fn in_pieces(backend: &dyn Backend, batch: &Batch, cuts: &[usize], by_step: bool) -> Outputs {
    let (mut o, mut state, mut begin) = (Vec::new(), batch.h0.clone(), 0);
    for &end in cuts {
        let part = batch.part(begin..end, state.take());
        let run = if by_step { gdn::decode } else { gdn::prefill };
        let out = run(backend, &part.inputs()).unwrap();
        o.extend(out.o);
        state = Some(out.ht);
        begin = end;
    }
    Outputs { o, ht: state.unwrap() }
}

#[test]
fn any_split_and_token_by_token_give_the_same_answer() {
    let batch = Batch::random(heads(2, 4, 48, 80), &[150], true, 1);
    let (o, ht) = all(&batch);
    let tokens: Vec<usize> = (1..=150).collect();
    for device in devices() {
        for cuts in [vec![150], vec![1, 150], vec![64, 150], vec![63, 64, 129, 150], vec![16, 17, 31, 97, 149, 150]] {
            let out = in_pieces(&*device.backend, &batch, &cuts, false);
            assert_close(&format!("{} prefill in {cuts:?}", device.name), &out.o, &o, 1e-5);
            assert_close(&format!("{} state in {cuts:?}", device.name), &out.ht, &ht, 1e-5);
        }
        let out = in_pieces(&*device.backend, &batch, &tokens, true);
        assert_close(&format!("{} decode", device.name), &out.o, &o, 1e-5);
        assert_close(&format!("{} decoded state", device.name), &out.ht, &ht, 1e-5);
    }
}

#[test]
fn verify_leaves_the_state_of_the_accepted_tokens_bit_for_bit() {
    let batch = Batch::random(heads(2, 4, 64, 64), &[5, 0, 16, 1], true, 2);
    for device in devices() {
        for accepted in [[0, 0, 0, 0], [5, 0, 16, 1], [3, 0, 7, 0], [0, 0, 16, 1]] {
            let out = gdn::verify(&*device.backend, &batch.inputs(), &accepted).unwrap();
            let (o, _) = all(&batch);
            let (_, ht) = recurrence(&batch.inputs(), |n| accepted[n] as u64);
            assert_close(&format!("{} verify o", device.name), &out.o, &o, 1e-5);
            assert_close(&format!("{} verify ht", device.name), &out.ht, &ht, 1e-5);

            let slot = batch.shape.heads.state_len() as usize;
            let row = |x: &[f32], n: usize| x[n * slot..][..slot].to_vec();
            for (n, &count) in accepted.iter().enumerate() {
                let begin = batch.shape.cu_seqlens()[n] as usize;
                let mut single = Batch { shape: Shape::one(batch.shape.heads, 22), ..batch.clone() };
                single.h0 = None;
                let part = single.part(begin..begin + count as usize, Some(row(batch.h0.as_ref().unwrap(), n)));
                let alone = gdn::decode(&*device.backend, &part.inputs()).unwrap();
                assert_eq!(alone.ht, row(&out.ht, n), "{}: sequence {n} after {count} tokens", device.name);
            }
        }
    }
}

#[test]
fn head_sizes_and_groups() {
    let mut shapes = vec![];
    for (k, v) in [(16, 16), (16, 256), (256, 16), (32, 48), (80, 112), (96, 64), (144, 240), (256, 256), (208, 160)] {
        shapes.push((1, 1, k, v, HeadMap::Div));
    }
    for map in [HeadMap::Div, HeadMap::Mod] {
        shapes.extend([(2, 4, 64, 32, map), (2, 6, 32, 64, map), (3, 3, 48, 48, map), (1, 5, 16, 32, map)]);
    }
    for (i, (hk, hv, k, v, map)) in shapes.into_iter().enumerate() {
        let heads = Heads::new(hk, hv, k, v, map).unwrap();
        let batch = Batch::random(heads, &[37, 0, 1, 70], i % 2 == 0, 10 + i as u64);
        let (o, ht) = all(&batch);
        for device in devices() {
            for store in STORES {
                let mut batch = batch.clone();
                batch.options.store = store;
                let out = gdn::prefill(&*device.backend, &batch.inputs()).unwrap();
                let what = format!("{} {heads:?} {store}", device.name);
                assert_close(&format!("{what} o"), &out.o, &o, bound(store));
                assert_close(&format!("{what} ht"), &out.ht, &ht, bound(store));
            }
        }
    }
}

#[test]
fn decode_of_many_sequences_in_every_storage() {
    for (hk, hv, k, v) in [(2, 2, 128, 128), (1, 3, 32, 80), (2, 4, 256, 16)] {
        let batch = Batch::random(heads(hk, hv, k, v), &[1; 7], true, 3);
        let (o, ht) = all(&batch);
        for device in devices() {
            for store in STORES {
                let mut batch = batch.clone();
                batch.options.store = store;
                let out = gdn::decode(&*device.backend, &batch.inputs()).unwrap();
                assert_close(&format!("{} decode {store} o", device.name), &out.o, &o, bound(store));
                assert_close(&format!("{} decode {store} ht", device.name), &out.ht, &ht, bound(store));
            }
        }
    }
}

/// Device memory of one call with q, k and v in the rows of one buffer, everything else poisoned with NaN.
struct Packed {
    io: Io,
    guard: Buffer,
}

fn packed(backend: &dyn Backend, batch: &Batch, store: Dtype) -> Packed {
    let h = batch.shape.heads;
    let t = batch.shape.tokens();
    let (qk, vo) = ((h.hk * h.k) as u64, (h.hv * h.v) as u64);
    let stride = 2 * qk + vo + 16;
    let mut rows = vec![f32::NAN; (t * stride) as usize];
    for i in 0..t as usize {
        let row = &mut rows[i * stride as usize..];
        row[..qk as usize].copy_from_slice(&batch.q[i * qk as usize..][..qk as usize]);
        row[qk as usize..][..qk as usize].copy_from_slice(&batch.k[i * qk as usize..][..qk as usize]);
        row[2 * qk as usize..][..vo as usize].copy_from_slice(&batch.v[i * vo as usize..][..vo as usize]);
    }
    let bytes: Vec<u8> = match store {
        Dtype::F32 => bytemuck::cast_slice(&rows).to_vec(),
        Dtype::F16 => rows.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => rows.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    };
    let put = |bytes: &[u8]| {
        let buffer = backend.alloc("test", bytes.len() as u64).unwrap();
        backend.write(&buffer.view(), bytes).unwrap();
        buffer
    };
    let qkv = Rows::packed(put(&bytes).view(), stride);
    // o lies in the middle of wider rows, so that writes beside it show.
    let guard = put(&vec![0xff; (t * (vo + 32) * store.size()) as usize]);
    let slots = batch.shape.sequences() * h.state_len() as usize;
    let h0 = batch.h0.clone().unwrap_or_else(|| vec![0.0; slots]);
    Packed {
        io: Io {
            q: qkv.at(0),
            k: qkv.at(qk),
            v: qkv.at(2 * qk),
            g: put(bytemuck::cast_slice(&batch.g)).view(),
            beta: put(bytemuck::cast_slice(&batch.beta)).view(),
            state: put(bytemuck::cast_slice(&h0)).view(),
            o: Rows { view: guard.view(), off: 16, stride: vo + 32 },
        },
        guard,
    }
}

#[test]
fn strided_rows_are_read_and_written_exactly() {
    let batch = Batch::random(heads(2, 4, 32, 48), &[45, 3, 66], true, 4);
    let (o, _) = all(&batch);
    let vo = 4 * 48;
    for device in devices() {
        for store in STORES {
            let backend = &*device.backend;
            let p = packed(backend, &batch, store);
            let options = Options { store, ..batch.options };
            let mut pass = Pass::new();
            Prefill::new(backend, &batch.shape, &options, p.io.q.stride).unwrap().record(&mut pass, &p.io).unwrap();
            backend.run(&pass).unwrap();
            let bytes = backend.read(&p.guard.view()).unwrap().wait().unwrap();
            let size = store.size() as usize;
            let mut found = Vec::new();
            for row in bytes.chunks((vo + 32) * size) {
                assert!(row[..16 * size].iter().all(|&b| b == 0xff), "{}: written left of o", device.name);
                assert!(row[(16 + vo) * size..].iter().all(|&b| b == 0xff), "{}: written right of o", device.name);
                let numbers = &row[16 * size..(16 + vo) * size];
                found.extend(numbers.chunks(size).map(|b| match store {
                    Dtype::F32 => f32::from_le_bytes(b.try_into().unwrap()),
                    Dtype::F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_f32(),
                    Dtype::Bf16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32(),
                }));
            }
            assert_close(&format!("{} strided {store}", device.name), &found, &o, bound(store));
        }
    }
}

#[test]
fn discard_leaves_the_state_alone() {
    let batch = Batch::random(heads(2, 2, 64, 64), &[4, 2], true, 5);
    for device in devices() {
        let backend = &*device.backend;
        let p = packed(backend, &batch, Dtype::F32);
        let mut pass = Pass::new();
        let step = Step::new(backend, &batch.shape, &[4, 2], &batch.options, p.io.q.stride).unwrap();
        step.record(&mut pass, &p.io, Commit::Discard).unwrap();
        backend.run(&pass).unwrap();
        let state: Vec<f32> = backend.read(&p.io.state).unwrap().wait_as().unwrap();
        assert_eq!(Some(state), batch.h0, "{}", device.name);
    }
}

#[test]
fn the_same_inputs_give_the_same_bits() {
    let batch = Batch::random(heads(2, 4, 64, 96), &[130, 33], true, 6);
    for device in devices() {
        let first = gdn::prefill(&*device.backend, &batch.inputs()).unwrap();
        for _ in 0..20 {
            assert_eq!(first, gdn::prefill(&*device.backend, &batch.inputs()).unwrap(), "{}", device.name);
        }
    }
}

#[test]
fn nan_stays_in_its_sequence_and_head() {
    let clean = Batch::random(heads(2, 2, 32, 32), &[40, 90], true, 7);
    for device in devices() {
        let expected = gdn::prefill(&*device.backend, &clean.inputs()).unwrap();
        let mut batch = clean.clone();
        // Head 1 of token 70 of sequence 1.
        batch.v[(110 * 2 + 1) * 32 + 5] = f32::NAN;
        let out = gdn::prefill(&*device.backend, &batch.inputs()).unwrap();
        for t in 0..130 {
            for h in 0..2 {
                let row = (t * 2 + h) * 32..(t * 2 + h + 1) * 32;
                // Chunks have at most 64 tokens, and the token is the 71st of its sequence.
                let untouched = h == 0 || t < 40 + 64;
                assert!(!untouched || out.o[row.clone()] == expected.o[row], "{}: token {t} head {h}", device.name);
            }
        }
        assert!(out.o[(110 * 2 + 1) * 32 + 5].is_nan(), "{}: NaN must not vanish", device.name);
        assert_eq!(out.ht[..2 * 32 * 32], expected.ht[..2 * 32 * 32], "{}: state of sequence 0", device.name);
    }
}

#[test]
fn gates_at_the_edge() {
    for device in devices() {
        let mut batch = Batch::random(heads(1, 2, 32, 32), &[100], true, 8);
        for t in (0..100).step_by(7) {
            batch.g[t * 2] = f32::NEG_INFINITY;
            batch.g[t * 2 + 1] = -3e38;
        }
        let (o, ht) = all(&batch);
        let out = gdn::prefill(&*device.backend, &batch.inputs()).unwrap();
        assert_close(&format!("{} o", device.name), &out.o, &o, 1e-5);
        assert_close(&format!("{} ht", device.name), &out.ht, &ht, 1e-5);
        let out = in_pieces(&*device.backend, &batch, &(1..=100).collect::<Vec<_>>(), true);
        assert_close(&format!("{} decode", device.name), &out.o, &o, 1e-5);
    }
}

#[test]
fn an_empty_batch_returns_its_states() {
    for device in devices() {
        for lens in [&[][..], &[0, 0, 0]] {
            let batch = Batch::random(heads(1, 2, 16, 32), lens, true, 9);
            for run in [gdn::prefill, gdn::decode] {
                let out = run(&*device.backend, &batch.inputs()).unwrap();
                assert_eq!((out.o.len(), Some(out.ht)), (0, batch.h0.clone()), "{}", device.name);
            }
        }
    }
}

/// A way to spoil a call, and what the error must then say.
type Spoiled = (fn(&mut Inputs<'_>), &'static [&'static str]);

#[test]
fn bad_arguments_are_named() {
    let batch = Batch::random(heads(2, 4, 32, 48), &[10], true, 11);
    let positive: Vec<f32> = (0..40).map(|i| if i == 13 { 0.5 } else { -0.1 }).collect();
    let nan: Vec<f32> = (0..40).map(|i| if i == 6 { f32::NAN } else { -0.1 }).collect();
    let spoiled: [Spoiled; 8] = [
        (|i| i.q = &i.q[1..], &["q", "639", "640", "[10, 2, 32]"]),
        (|i| i.k = &i.k[..600], &["k", "600", "640"]),
        (|i| i.v = &[], &["v", "0 numbers", "1920"]),
        (|i| i.g = &i.g[..39], &["g", "39", "40"]),
        (|i| i.beta = &i.beta[..0], &["beta", "0", "40"]),
        (|i| i.h0 = Some(&[0.0]), &["h0", "1 numbers", "6144"]),
        (|i| i.options.scale = Some(f32::NAN), &["scale", "NaN"]),
        (|i| i.options.scale = Some(f32::INFINITY), &["scale", "inf"]),
    ];
    for device in devices() {
        for (spoil, words) in spoiled {
            let mut inputs = batch.inputs();
            spoil(&mut inputs);
            let error = gdn::prefill(&*device.backend, &inputs).unwrap_err().to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{error} lacks one of {words:?}");
        }
        for (g, words) in [(&positive, ["g[3, 1]", "0.5"]), (&nan, ["g[1, 2]", "NaN"])] {
            let error = gdn::prefill(&*device.backend, &Inputs { g, ..batch.inputs() }).unwrap_err().to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{error}");
        }
        let long = Batch::random(heads(1, 1, 16, 16), &[17], false, 12);
        let error = gdn::decode(&*device.backend, &long.inputs()).unwrap_err().to_string();
        assert!(error.contains("17") && error.contains("16"), "{error}");
        let error = gdn::verify(&*device.backend, &batch.inputs(), &[11]).unwrap_err().to_string();
        assert!(error.contains("counts[0]") && error.contains("11"), "{error}");
        let error = gdn::verify(&*device.backend, &batch.inputs(), &[1, 1]).unwrap_err().to_string();
        assert!(error.contains("counts"), "{error}");
    }
}

#[test]
fn bad_shapes_are_named() {
    let text = |r: gatedelta::Result<Heads>| r.unwrap_err().to_string();
    assert!(text(Heads::new(0, 4, 64, 64, HeadMap::Div)).contains("Hk"));
    assert!(text(Heads::new(3, 4, 64, 64, HeadMap::Div)).contains("a multiple of Hk = 3"));
    assert!(text(Heads::new(1, 0, 64, 64, HeadMap::Div)).contains("Hv"));
    for bad in [0, 8, 17, 272, u32::MAX] {
        assert!(text(Heads::new(1, 1, bad, 64, HeadMap::Div)).contains("K (q/k head size)"));
        assert!(text(Heads::new(1, 1, 64, bad, HeadMap::Div)).contains("V (value head size)"));
    }
    assert!(text(Heads::new(1 << 20, 1 << 20, 64, 64, HeadMap::Div)).contains("2^24"));
    let shape = |cu: &[u64]| Shape::new(heads(1, 1, 16, 16), cu.to_vec()).unwrap_err().to_string();
    assert!(shape(&[]).contains("cu_seqlens"));
    assert!(shape(&[1, 2]).contains("cu_seqlens[0]: found 1, expected 0"));
    assert!(shape(&[0, 5, 4]).contains("cu_seqlens[2]: found 4, expected at least cu_seqlens[1] = 5"));
}

/// A way to spoil the memory of a call, given a view that is too small.
type SpoiledIo = fn(&mut Io, &gatedelta::backend::View);

#[test]
fn views_too_small_are_named() {
    let batch = Batch::random(heads(1, 2, 32, 32), &[20], true, 13);
    for device in devices() {
        let backend = &*device.backend;
        let good = packed(backend, &batch, Dtype::F32).io;
        let prefill = Prefill::new(backend, &batch.shape, &batch.options, good.q.stride).unwrap();
        let small = backend.alloc("small", 64).unwrap().view();
        let spoiled: [(&str, SpoiledIo); 5] = [
            ("q", |io, s| io.q.view = s.clone()),
            ("o", |io, s| io.o.view = s.clone()),
            ("beta", |io, s| io.beta = s.clone()),
            ("state", |io, s| io.state = s.clone()),
            ("stride of v", |io, _| io.v.stride = 1),
        ];
        for (what, spoil) in spoiled {
            let mut io = good.clone();
            spoil(&mut io, &small);
            let error = prefill.record(&mut Pass::new(), &io).unwrap_err().to_string();
            assert!(error.starts_with(what), "{what}: {error}");
        }
        let narrow = Prefill::new(backend, &batch.shape, &batch.options, good.q.stride - 1).unwrap();
        let error = narrow.record(&mut Pass::new(), &good).unwrap_err().to_string();
        assert!(error.starts_with("stride of q") && error.contains("planned for"), "{error}");
    }
}
