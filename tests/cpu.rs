//! The CPU backend: each row against its formula, sizes odd and even, every stored type; refusals; same bits for any number
//! of threads.

use gatedelta::backend::cpu::Cpu;
use gatedelta::backend::{Backend, HostBytes, View};
use gatedelta::error::Error;
use gatedelta::kernel::gdn::*;
use gatedelta::kernel::model::*;
use gatedelta::pass::Pass;
use gatedelta::shape::{Dtype, HeadMap, Heads};
use std::sync::Arc;

use crate::formula;

mod model;
mod operator;

use operator::Batch;

const TYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Largest relative error of a result stored as `dtype`.
fn bound(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2e-6,
        Dtype::F16 => 1e-3,
        Dtype::Bf16 => 5e-3,
    }
}

/// A backend, seeded numbers, and numbers in and out of its memory.
struct Bench {
    cpu: Cpu,
    seed: u64,
}

impl Bench {
    fn new(threads: usize) -> Self {
        Bench { cpu: Cpu::new(Some(threads)).unwrap(), seed: 7 }
    }

    /// Uniform in [-1, 1), every number exact in f16 and bf16.
    fn random(&mut self, n: usize) -> Vec<f64> {
        (0..n)
            .map(|_| {
                self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((self.seed >> 33) as f64 / (1u64 << 31) as f64 * 256.0).floor() / 128.0 - 1.0
            })
            .collect()
    }

    fn store(&self, x: &[f64], dtype: Dtype) -> View {
        self.bytes(&encode(x, dtype))
    }

    fn bytes(&self, bytes: &[u8]) -> View {
        let view = self.cpu.alloc("test", bytes.len() as u64).unwrap().view();
        self.cpu.write(&view, bytes).unwrap();
        view
    }

    fn f32s(&self, x: &[f64]) -> View {
        self.store(x, Dtype::F32)
    }

    fn words(&self, x: &[u32]) -> View {
        self.bytes(bytemuck::cast_slice(x))
    }

    /// Memory for `n` results, full of NaN.
    fn poisoned(&self, n: usize, dtype: Dtype) -> View {
        self.store(&vec![f64::NAN; n], dtype)
    }

    fn load(&self, view: &View, dtype: Dtype) -> Vec<f32> {
        decode(&self.cpu.read(view).unwrap().wait().unwrap(), dtype)
    }
}

fn encode(x: &[f64], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => x.iter().flat_map(|&x| (x as f32).to_ne_bytes()).collect(),
        Dtype::F16 => x.iter().flat_map(|&x| half::f16::from_f64(x).to_ne_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|&x| half::bf16::from_f64(x).to_ne_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let halves = bytes.chunks_exact(2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    match dtype {
        Dtype::F32 => bytemuck::pod_collect_to_vec(bytes),
        Dtype::F16 => halves.map(|h| half::f16::from_bits(h).to_f32()).collect(),
        Dtype::Bf16 => halves.map(|h| half::bf16::from_bits(h).to_f32()).collect(),
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

/// Rows of `width` numbers spread out to `stride`, from `off` on; the gaps hold NaN.
fn spread(x: &[f64], width: usize, stride: usize, off: usize) -> Vec<f64> {
    let mut out = vec![f64::NAN; off];
    for row in x.chunks(width) {
        out.extend(row);
        out.extend(vec![f64::NAN; stride - width]);
    }
    out
}

#[track_caller]
fn close(found: &[f32], answer: &[f64], bound: f64, what: &str) {
    let error = formula::error(found, answer);
    assert!(error <= bound, "{what}: error {error:e} > {bound:e}");
}

fn run(b: &Bench, launch: impl FnOnce(&mut Pass)) -> gatedelta::Result<()> {
    let mut pass = Pass::new();
    launch(&mut pass);
    b.cpu.run(&pass)
}

fn heads(hk: u32, hv: u32, k: u32, v: u32, map: HeadMap) -> Heads {
    Heads::new(hk, hv, k, v, map).unwrap()
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let run_with = |threads: usize| {
        let mut b = Bench::new(threads);
        let batch = Batch::new(&mut b, heads(2, 4, 64, 64, HeadMap::Div), &[100, 3, 40]);
        let mut out = batch.prefill(&b, 32, 32, Dtype::Bf16, true).concat();
        let (m, n, k) = (70, 300, 520);
        let (x, w) = (b.random(m * k), b.random(n * k));
        let (vx, vw, y) = (b.f32s(&x), b.store(&w, Dtype::Bf16), b.poisoned(m * n, Dtype::F32));
        let consts = MatmulConsts {
            w_type: 2,
            add: 0,
            tile_m: 64,
            tile_n: 64,
            tile_k: 16,
            reg_m: 1,
            reg_n: 1,
            lanes: 1,
            wide: 0,
        };
        let params = MatmulParams {
            m: m as u32,
            n: n as u32,
            k: k as u32,
            x_stride: k as u32,
            x_off: 0,
            y_stride: n as u32,
            y_off: 0,
        };
        run(&b, |p| p.launch(&MATMUL, consts, params, &[&vx, &vw, &y], [5, 2, 1], 1 << 20)).unwrap();
        out.extend(b.load(&y, Dtype::F32));
        out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    let one = run_with(1);
    for threads in [1, 2, 3] {
        assert!(one == run_with(threads), "{threads} threads gave other bits than one");
    }
}

#[track_caller]
fn refused(result: gatedelta::Result<()>, part: &str) {
    match result {
        Err(Error::Argument { what, found, expected }) => {
            let text = format!("{what}: found {found}, expected {expected}");
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
        other => panic!("{other:?} is no refusal that says {part:?}"),
    }
}

#[test]
fn undersized_overlapping_and_foreign_memory_is_refused() {
    let b = Bench::new(2);
    let other = Bench::new(1);
    let norm = |x: &View, w: &View, y: &View, rows: u32| {
        let params = RmsNormParams { dim: 8, row0: 1, eps: 0.0 };
        run(&b, |p| p.launch(&RMS_NORM, RmsNormConsts { lanes: 1 }, params, &[x, w, y], [rows, 1, 1], 1))
    };
    let (x, w, y) = (b.f32s(&[1.0; 24]), b.f32s(&[1.0; 8]), b.f32s(&[0.0; 16]));
    norm(&x, &w, &y, 2).unwrap();
    refused(norm(&x, &w, &y, 3), "rms_norm: x");
    refused(norm(&x, &w.slice(0, 28).unwrap(), &y, 2), "rms_norm: w: found 28 bytes, expected at least 32 bytes");
    refused(norm(&x, &w, &y.slice(0, 60).unwrap(), 2), "rms_norm: y");
    refused(norm(&x, &w, &y.slice(2, 62).unwrap(), 1), "a start that is a multiple of 4");
    refused(norm(&x, &w, &x, 2), "the same memory as x");
    refused(norm(&other.f32s(&[1.0; 24]), &w, &y, 2), "another backend");
    let host = b.cpu.import("host", HostBytes::new(Arc::new(vec![0u8; 64]))).unwrap().view();
    refused(norm(&x, &w, &host, 2), "imported host bytes");
    refused(b.cpu.write(&host, &[0]), "imported host bytes");
    refused(b.cpu.write(&w, &[0; 33]), "view to write");
    refused(other.cpu.write(&w, &[0]), "another backend");
    assert!(other.cpu.read(&w).is_err());
    let beyond = View { bytes: 40, ..w.clone() };
    refused(b.cpu.write(&beyond, &[0; 40]), "40 bytes from 0");
    assert!(b.cpu.read(&beyond).is_err());
    refused(norm(&x, &beyond, &y, 2), "rms_norm: w");
    assert!(matches!(b.cpu.alloc("everything", 1 << 62), Err(Error::OutOfMemory { .. })));
}

#[test]
fn bad_numbers_and_tables_are_refused() {
    let b = Bench::new(2);
    let (x, w, y) = (b.f32s(&[1.0; 80]), b.f32s(&[1.0; 32]), b.f32s(&[0.0; 80]));
    let tail = b.f32s(&[0.0; 2 * 3 * 8]);
    let conv = |seqs: &[u32], taps: u32| {
        let params = ConvParams { channels: 8, x_stride: 8, x_off: 0, y_stride: 8, y_off: 0, block: 16 };
        let seqs_view = b.words(seqs);
        let grid = [1, seqs.len() as u32 / 4, 1];
        run(&b, |p| {
            p.launch(
                &CONV,
                ConvConsts { taps, silu: 1, store_tail: 1 },
                params,
                &[&x, &w, &seqs_view, &tail, &y],
                grid,
                1,
            );
        })
    };
    conv(&[0, 4, 1, 0, 4, 6, 0, 0], 4).unwrap();
    refused(conv(&[0, 11, 0, 0], 4), "conv: seqs[0]");
    refused(conv(&[u32::MAX, 1, 0, 0], 4), "conv: seqs[0]");
    refused(conv(&[0, 4, 2, 0], 4), "slot");
    refused(conv(&[0, 4, 1, 0, 4, 4, 1, 0], 4), "1 twice");
    refused(conv(&[0, 4, 1, 0, 3, 4, 0, 0], 4), "share nothing");
    refused(conv(&[0, 4, 0, 0], 9), "taps");

    let batch_of = |chunks: &[u32], segments: &[u32]| {
        let h = heads(1, 1, 16, 16, HeadMap::Div);
        let (qkv, state, o) = (b.f32s(&[0.1; 40 * 16]), b.f32s(&[0.0; 2 * 256]), b.f32s(&[0.0; 40 * 16]));
        let g = b.f32s(&[0.0; 40]);
        let ws = b.f32s(&[0.0; 3 * (2 * 256 + 64)]);
        let (chunks_view, segments_view) = (b.words(chunks), b.words(segments));
        run(&b, |p| {
            let consts = PrepareConsts { chunk: 16, dk: h.k, group: 1, qk_type: 0, l2norm: 1, grad: 0, lanes: 1 };
            let params = PrepareParams {
                hk: 1,
                hv: 1,
                head_map: 0,
                q_stride: 16,
                q_off: 0,
                k_stride: 16,
                k_off: 0,
                g_off: 0,
                scale: 1.0,
            };
            let args = [&qkv, &qkv, &g, &g, &chunks_view, &ws];
            p.launch(&PREPARE, consts, params, &args, [chunks.len() as u32 / 4, 1, 1], 1);
            let consts = ScanConsts {
                chunk: 16,
                dk: 16,
                dv_tile: 16,
                qk_type: 0,
                v_type: 0,
                save: 0,
                walk: 0,
                grad: 0,
                lanes: 1,
            };
            let params = ScanParams {
                hk: 1,
                hv: 1,
                head_map: 0,
                dv: 16,
                q_stride: 16,
                q_off: 0,
                k_stride: 16,
                k_off: 0,
                v_stride: 16,
                v_off: 0,
                o_stride: 16,
                o_off: 0,
            };
            let args = [&qkv, &qkv, &qkv, &ws, &chunks_view, &segments_view, &state, &o];
            p.launch(&SCAN, consts, params, &args, [segments.len() as u32 / 4, 1, 1], 1);
        })
    };
    let chunks = [0, 16, 0, 0, 16, 16, 0, 0, 32, 8, 1, 0];
    batch_of(&chunks, &[0, 2, 0, 0, 2, 1, 1, 0]).unwrap();
    refused(batch_of(&chunks, &[0, 4, 0, 0]), "gdn_scan: segments[0]");
    refused(batch_of(&chunks, &[0, 2, 2, 0]), "slot");
    refused(batch_of(&chunks, &[0, 2, 0, 0, 1, 2, 1, 0]), "share nothing");
    refused(batch_of(&[0, 17, 0, 0], &[0, 1, 0, 0]), "1 to 16");
    refused(batch_of(&[0, 0, 0, 0], &[0, 1, 0, 0]), "1 to 16");
    refused(batch_of(&[33, 8, 0, 0], &[0, 1, 0, 0]), "gdn_prepare: chunks");
    refused(batch_of(&[0, 8, 0, 0, 4, 8, 1, 0], &[0, 1, 0, 0, 1, 1, 1, 0]), "gdn_scan: chunks");

    let grid = run(&b, |p| {
        let params = SwigluParams { rows: 2, dim: 20 };
        p.launch(&SWIGLU, SwigluConsts { block: 16 }, params, &[&x, &y], [1, 1, 1], 1);
    });
    refused(grid, "swiglu: grid");
    assert!(matches!(Cpu::new(Some(0)), Err(Error::Argument { .. })));
}
