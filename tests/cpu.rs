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

#[test]
fn conv_and_its_tail() {
    for (channels, taps, lens, silu) in
        [(64, 4, vec![5usize, 0, 1, 70], 1), (67, 4, vec![3, 2], 1), (130, 2, vec![33], 0), (7, 8, vec![2, 40], 1)]
    {
        for store_tail in [0, 1] {
            let mut b = Bench::new(2);
            let (t, n) = (lens.iter().sum::<usize>(), lens.len());
            let (x, w) = (b.random(t * channels), b.random(channels * taps));
            let tails = b.random(n * (taps - 1) * channels);
            let (stride, off) = (channels + 3, 5);
            let vx = b.f32s(&spread(&x, channels, stride, off));
            let (vw, tail, y) = (b.f32s(&w), b.f32s(&tails), b.poisoned(t * channels, Dtype::F32));
            let mut first = 0;
            // Slots in another order than sequences.
            let seqs: Vec<u32> = lens
                .iter()
                .enumerate()
                .flat_map(|(i, &len)| {
                    first += len;
                    [(first - len) as u32, len as u32, (n - 1 - i) as u32, 0]
                })
                .collect();
            let seqs_view = b.words(&seqs);
            let block = if store_tail == 1 { 1000 } else { 16 };
            let params = ConvParams {
                channels: channels as u32,
                x_stride: stride as u32,
                x_off: off as u32,
                y_stride: channels as u32,
                y_off: 0,
                block,
            };
            let (groups, longest) = (channels.div_ceil(64) as u32, *lens.iter().max().unwrap() as u32);
            run(&b, |p| {
                let consts = ConvConsts { taps: taps as u32, silu, store_tail };
                let grid = [groups, n as u32, longest.div_ceil(block)];
                p.launch(&CONV, consts, params, &[&vx, &vw, &seqs_view, &tail, &y], grid, 1);
                if store_tail == 0 {
                    let consts = ConvTailConsts { taps: taps as u32 };
                    p.launch(&CONV_TAIL, consts, params, &[&vx, &seqs_view, &tail], [groups, n as u32, 1], 1);
                }
            })
            .unwrap();
            let (mut answer, mut answer_tails) = (Vec::new(), vec![0.0; tails.len()]);
            for s in seqs.chunks(4) {
                let (first, len, slot) = (s[0] as usize, s[1] as usize, s[2] as usize * (taps - 1) * channels);
                let tail = &tails[slot..][..(taps - 1) * channels];
                let (y, tail) =
                    formula::conv(&x[first * channels..][..len * channels], &w, tail, channels, taps, silu == 1);
                answer.extend(y);
                answer_tails[slot..][..tail.len()].copy_from_slice(&tail);
            }
            close(&b.load(&y, Dtype::F32), &answer, 1e-6, "conv y");
            close(&b.load(&tail, Dtype::F32), &answer_tails, 0.0, "conv tail");
        }
    }
}

#[test]
fn gate_at_ordinary_and_extreme_arguments() {
    let mut b = Bench::new(2);
    let (tokens, hv, stride) = (37usize, 3usize, 11usize);
    let mut ab = b.random(tokens * stride);
    ab.iter_mut().enumerate().for_each(|(i, x)| *x *= [1.0, 30.0, 8.0][i % 3]);
    let (a_log, dt_bias) = (b.random(hv), b.random(hv));
    let views = [b.f32s(&ab), b.f32s(&a_log), b.f32s(&dt_bias)];
    let (g, beta) = (b.poisoned(tokens * hv, Dtype::F32), b.poisoned(tokens * hv, Dtype::F32));
    let params = GateParams { tokens: tokens as u32, hv: hv as u32, stride: stride as u32, a_off: 1, b_off: 5 };
    let args = [&views[0], &views[1], &views[2], &g, &beta];
    run(&b, |p| p.launch(&GATE, GateConsts { block: 16 }, params, &args, [(tokens * hv).div_ceil(16) as u32, 1, 1], 1))
        .unwrap();
    let answers: Vec<(f64, f64)> = (0..tokens * hv)
        .map(|i| (i / hv * stride + i % hv, i % hv))
        .map(|(at, h)| formula::gate(ab[at + 1], ab[at + 5], a_log[h], dt_bias[h]))
        .collect();
    close(&b.load(&g, Dtype::F32), &answers.iter().map(|a| a.0).collect::<Vec<_>>(), 1e-6, "g");
    close(&b.load(&beta, Dtype::F32), &answers.iter().map(|a| a.1).collect::<Vec<_>>(), 1e-6, "beta");
}

/// One ragged batch of the operator with strided, offset tensors.
struct Batch {
    heads: Heads,
    lens: Vec<usize>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    g: Vec<f64>,
    beta: Vec<f64>,
    state: Vec<f64>,
}

const SCALE: f32 = 0.25;

impl Batch {
    fn new(b: &mut Bench, heads: Heads, lens: &[usize]) -> Self {
        let t: usize = lens.iter().sum();
        let (hk, hv, k, v) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
        let unit = |b: &mut Bench, n| b.random(n).into_iter().map(|x: f64| (x + 1.0) / 2.0).collect::<Vec<_>>();
        let g = unit(b, t * hv).into_iter().enumerate();
        Batch {
            heads,
            lens: lens.to_vec(),
            q: b.random(t * hk * k),
            k: b.random(t * hk * k),
            v: b.random(t * hv * v),
            // From no decay at all to a cliff in one token.
            g: g.map(|(i, x)| if i % 29 == 7 { -80.0 } else { -x * [0.0, 0.05, 2.0][i % 3] }).collect(),
            beta: unit(b, t * hv),
            state: b.random(lens.len() * heads.state_len() as usize),
        }
    }

    fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    /// (first token, tokens) of each sequence.
    fn sequences(&self) -> Vec<(usize, usize)> {
        let mut first = 0;
        self.lens
            .iter()
            .map(|&len| {
                first += len;
                (first - len, len)
            })
            .collect()
    }

    /// o `[T, Hv, V]` and the states after, by the recurrence.
    fn answer(&self, l2norm: bool) -> (Vec<f64>, Vec<f64>) {
        let (hk, hv) = (self.heads.hk as usize, self.heads.hv as usize);
        let (dk, dv) = (self.heads.k as usize, self.heads.v as usize);
        let (mut o, mut states) = (Vec::new(), self.state.clone());
        for (n, (first, len)) in self.sequences().into_iter().enumerate() {
            for t in first..first + len {
                for h in 0..hv {
                    let kh = self.heads.key_head(h as u32) as usize;
                    let state = &mut states[(n * hv + h) * dk * dv..][..dk * dv];
                    let (q, k) = (&self.q[(t * hk + kh) * dk..][..dk], &self.k[(t * hk + kh) * dk..][..dk]);
                    let (v, i) = (&self.v[(t * hv + h) * dv..][..dv], t * hv + h);
                    o.extend(formula::gdn_step(q, k, v, self.g[i], self.beta[i], l2norm, SCALE as f64, state));
                }
            }
        }
        (o, states)
    }

    /// Runs prepare and scan; o, the states and the scratch.
    fn prefill(&self, b: &Bench, chunk: usize, dv_tile: u32, dtype: Dtype, l2norm: bool) -> [Vec<f32>; 3] {
        let (heads, t) = (self.heads, self.tokens());
        let (wide_k, wide_v) = ((heads.hk * heads.k) as usize, (heads.hv * heads.v) as usize);
        let q = b.store(&spread(&self.q, wide_k, wide_k + 2, 3), dtype);
        let k = b.store(&spread(&self.k, wide_k, wide_k + 1, 0), dtype);
        let v = b.store(&spread(&self.v, wide_v, wide_v + 5, 1), dtype);
        let o = b.poisoned(t * wide_v + 2, dtype);
        let g = b.f32s(&[&[f64::NAN; 4][..], &self.g].concat());
        let beta = b.f32s(&[&[f64::NAN; 4][..], &self.beta].concat());
        let state = b.f32s(&self.state);
        let (mut chunks, mut segments) = (Vec::new(), Vec::new());
        for (n, (first, len)) in self.sequences().into_iter().enumerate() {
            if len > 0 {
                segments.extend([(chunks.len() / 4) as u32, len.div_ceil(chunk) as u32, n as u32, 0]);
            }
            for at in (0..len).step_by(chunk) {
                chunks.extend([(first + at) as u32, (len - at).min(chunk) as u32, n as u32, 0]);
            }
        }
        let (n_chunks, n_segments) = (chunks.len() as u32 / 4, segments.len() as u32 / 4);
        let ws = b.poisoned(n_chunks as usize * heads.hv as usize * (2 * chunk * chunk + 4 * chunk), Dtype::F32);
        let (chunks, segments) = (b.words(&chunks), b.words(&segments));
        run(b, |p| {
            let consts = PrepareConsts {
                chunk: chunk as u32,
                dk: heads.k,
                group: heads.group(),
                qk_type: dtype.code(),
                l2norm: l2norm as u32,
                lanes: 1,
            };
            let params = PrepareParams {
                hk: heads.hk,
                hv: heads.hv,
                head_map: heads.map as u32,
                q_stride: wide_k as u32 + 2,
                q_off: 3,
                k_stride: wide_k as u32 + 1,
                k_off: 0,
                g_off: 4,
                scale: SCALE,
            };
            p.launch(&PREPARE, consts, params, &[&q, &k, &g, &beta, &chunks, &ws], [n_chunks, heads.hk, 1], 1 << 20);
            let consts = ScanConsts {
                chunk: chunk as u32,
                dk: heads.k,
                dv_tile,
                qk_type: dtype.code(),
                v_type: dtype.code(),
                lanes: 1,
            };
            let params = ScanParams {
                hk: heads.hk,
                hv: heads.hv,
                head_map: heads.map as u32,
                dv: heads.v,
                q_stride: wide_k as u32 + 2,
                q_off: 3,
                k_stride: wide_k as u32 + 1,
                k_off: 0,
                v_stride: wide_v as u32 + 5,
                v_off: 1,
                o_stride: wide_v as u32,
                o_off: 2,
            };
            let args = [&q, &k, &v, &ws, &chunks, &segments, &state, &o];
            p.launch(&SCAN, consts, params, &args, [n_segments, heads.hv, heads.v / dv_tile], 1 << 20);
        })
        .unwrap();
        [b.load(&o, dtype)[2..].to_vec(), b.load(&state, Dtype::F32), b.load(&ws, Dtype::F32)]
    }
}

fn heads(hk: u32, hv: u32, k: u32, v: u32, map: HeadMap) -> Heads {
    Heads::new(hk, hv, k, v, map).unwrap()
}

#[test]
fn prefill_equals_the_recurrence() {
    let cases = [
        (heads(1, 1, 128, 128, HeadMap::Div), vec![70usize], 32, 128),
        (heads(2, 4, 64, 32, HeadMap::Div), vec![1, 0, 33, 64, 7], 16, 16),
        (heads(2, 6, 16, 48, HeadMap::Mod), vec![65, 31], 32, 48),
        (heads(1, 2, 256, 64, HeadMap::Mod), vec![100], 64, 32),
        (heads(3, 3, 80, 112, HeadMap::Div), vec![19], 32, 16),
    ];
    for (heads, lens, chunk, dv_tile) in cases {
        for dtype in TYPES {
            for l2norm in [true, false] {
                let mut b = Bench::new(2);
                let mut batch = Batch::new(&mut b, heads, &lens);
                if !l2norm {
                    // Without the norm keys must be short, or the recurrence grows without bound.
                    let short = |x: &mut f64| *x = half::bf16::from_f64(*x / (heads.k as f64).sqrt()).to_f64();
                    batch.k.iter_mut().for_each(short);
                }
                let (o, states) = batch.answer(l2norm);
                let [found_o, found_states, _] = batch.prefill(&b, chunk, dv_tile, dtype, l2norm);
                let what = format!("{heads:?} {lens:?} {dtype} l2norm {l2norm}");
                close(&found_o, &o, bound(dtype), &what);
                close(&found_states, &states, bound(Dtype::F32), &what);
            }
        }
    }
}

#[test]
fn prepare_and_scan_equal_their_formulas_and_pad_with_zeros() {
    for (chunk, len) in [(16usize, 16usize), (32, 21), (64, 50)] {
        let heads = heads(1, 2, 32, 16, HeadMap::Div);
        let mut b = Bench::new(1);
        let mut batch = Batch::new(&mut b, heads, &[len]);
        batch.beta[4] = 0.0;
        let [o, states, ws] = batch.prefill(&b, chunk, 16, Dtype::F32, true);
        let size = 2 * chunk * chunk + 4 * chunk;
        for h in 0..2 {
            let pick = |x: &[f64]| x.iter().skip(h).step_by(2).copied().collect::<Vec<_>>();
            let (g, beta) = (pick(&batch.g), pick(&batch.beta));
            let answer = formula::gdn_prepare(&batch.q, &batch.k, &g, &beta, 32, chunk, true, SCALE as f64);
            let found = &ws[h * size..][..size];
            close(found, &answer, 1e-6, "ws");
            for (i, (f, a)) in found.iter().zip(&answer).enumerate() {
                assert!(*a != 0.0 || *f == 0.0, "number {i} of ws is {f}, not 0");
            }
            let head = |x: &[f64]| x.chunks(16).skip(h).step_by(2).flatten().copied().collect::<Vec<_>>();
            let mut state = batch.state[h * 512..][..512].to_vec();
            let v = head(&batch.v);
            let answer = formula::gdn_scan(&batch.q, &batch.k, &v, &answer, &mut state, 32, 16, chunk);
            let found: Vec<f32> = o.chunks(16).skip(h).step_by(2).flatten().copied().collect();
            close(&found, &answer, 2e-6, "o");
            close(&states[h * 512..][..512], &state, 1e-6, "state");
        }
    }
}

#[test]
fn step_equals_the_recurrence_and_stores_only_when_asked() {
    let cases = [
        (heads(1, 1, 128, 128, HeadMap::Div), vec![1usize], 128),
        (heads(2, 4, 64, 96, HeadMap::Mod), vec![1, 3, 0, 1], 32),
        (heads(2, 4, 16, 16, HeadMap::Div), vec![2, 2], 16),
    ];
    for (heads, lens, dv_tile) in cases {
        for dtype in TYPES {
            for store in [0, 1] {
                let mut b = Bench::new(2);
                let batch = Batch::new(&mut b, heads, &lens);
                let (o_answer, states) = batch.answer(true);
                let (wide_k, wide_v) = (heads.hk * heads.k, heads.hv * heads.v);
                let (q, k, v) = (b.store(&batch.q, dtype), b.store(&batch.k, dtype), b.store(&batch.v, dtype));
                let (g, beta, state) = (b.f32s(&batch.g), b.f32s(&batch.beta), b.f32s(&batch.state));
                let o = b.poisoned(batch.v.len(), dtype);
                let seqs: Vec<u32> = batch
                    .sequences()
                    .iter()
                    .enumerate()
                    .flat_map(|(n, &(first, len))| [first as u32, len as u32, n as u32, 0])
                    .collect();
                let seqs = b.words(&seqs);
                let consts = StepConsts {
                    dk: heads.k,
                    dv_tile,
                    qk_type: dtype.code(),
                    v_type: dtype.code(),
                    l2norm: 1,
                    store,
                    lanes: 1,
                };
                let params = StepParams {
                    hk: heads.hk,
                    hv: heads.hv,
                    head_map: heads.map as u32,
                    dv: heads.v,
                    q_stride: wide_k,
                    q_off: 0,
                    k_stride: wide_k,
                    k_off: 0,
                    v_stride: wide_v,
                    v_off: 0,
                    o_stride: wide_v,
                    o_off: 0,
                    g_off: 0,
                    scale: SCALE,
                };
                let args = [&q, &k, &v, &g, &beta, &seqs, &state, &o];
                let grid = [lens.len() as u32, heads.hv, heads.v / dv_tile];
                run(&b, |p| p.launch(&STEP, consts, params, &args, grid, 1 << 20)).unwrap();
                close(&b.load(&o, dtype), &o_answer, bound(dtype), "step o");
                let after = if store == 1 { &states } else { &batch.state };
                close(&b.load(&state, Dtype::F32), after, if store == 1 { 1e-6 } else { 0.0 }, "step state");
            }
        }
    }
}

#[test]
fn mix_step_equals_its_formula() {
    for heads in [heads(2, 4, 32, 48, HeadMap::Div), heads(2, 4, 128, 128, HeadMap::Mod)] {
        let mut b = Bench::new(2);
        let (hk, hv, dk, dv) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
        let (wide_qkv, wide_p, lens) = (2 * hk * dk + hv * dv, hv * dv + 2 * hv, [1usize, 2]);
        let t: usize = lens.iter().sum();
        let (qkv, proj) = (b.random(t * wide_qkv), b.random(t * wide_p));
        let (small, states) = (b.random(2 * hv + dv), b.random(2 * heads.state_len() as usize));
        let vq = b.f32s(&spread(&qkv, wide_qkv, wide_qkv + 1, 0));
        let vp = b.f32s(&spread(&proj, wide_p, wide_p + 7, 2));
        let (vs, state, seqs) = (b.f32s(&small), b.f32s(&states), b.words(&[0, 1, 1, 0, 1, 2, 0, 0]));
        let y = b.poisoned(t * hv * dv, Dtype::F32);
        let params = MixStepParams {
            hk: heads.hk,
            hv: heads.hv,
            head_map: heads.map as u32,
            qkv_stride: wide_qkv as u32 + 1,
            p_stride: wide_p as u32 + 7,
            z_off: 2,
            a_off: 2 + (hv * dv) as u32,
            b_off: 2 + (hv * dv + hv) as u32,
            scale: SCALE,
            eps: 1e-6,
        };
        let consts = MixStepConsts { dk: heads.k, dv: heads.v, lanes: 1 };
        let args = [&vq, &vp, &vs, &seqs, &state, &y];
        run(&b, |p| p.launch(&MIX_STEP, consts, params, &args, [2, heads.hv, 1], 1 << 20)).unwrap();
        let (mut answer, mut after) = (Vec::new(), states.clone());
        for (t, slot) in [(0, 1), (1, 0), (2, 0)] {
            let p = &proj[t * wide_p..][..wide_p];
            let (z, a, bb) = (&p[..hv * dv], &p[hv * dv..][..hv], &p[hv * dv + hv..]);
            let state = &mut after[slot * heads.state_len() as usize..][..heads.state_len() as usize];
            let qkv = &qkv[t * wide_qkv..][..wide_qkv];
            answer.extend(formula::gdn_mix_step(&heads, qkv, z, a, bb, &small, SCALE as f64, 1e-6, state));
        }
        close(&b.load(&y, Dtype::F32), &answer, 2e-6, "mix_step y");
        close(&b.load(&state, Dtype::F32), &after, 1e-6, "mix_step state");
    }
}

#[test]
fn norms() {
    let mut b = Bench::new(2);
    for (hv, dv, tokens) in [(3usize, 48usize, 5usize), (1, 128, 70), (2, 20, 3)] {
        let (o, z, w) = (b.random(tokens * hv * dv), b.random(tokens * (hv * dv + 3) + 9), b.random(dv));
        let (vo, vz, vw) = (b.f32s(&o), b.f32s(&z), b.f32s(&w));
        let y = b.poisoned(o.len(), Dtype::F32);
        let params = GatedNormParams {
            hv: hv as u32,
            tokens: tokens as u32,
            z_stride: (hv * dv + 3) as u32,
            z_off: 9,
            eps: 1e-6,
        };
        let consts = GatedNormConsts { dv: dv as u32, lanes: 1 };
        run(&b, |p| {
            p.launch(&GATED_NORM, consts, params, &[&vo, &vz, &vw, &y], [hv as u32, tokens as u32, 1], 1);
        })
        .unwrap();
        let answer: Vec<f64> = (0..tokens * hv)
            .flat_map(|i| {
                let z = &z[9 + i / hv * (hv * dv + 3) + i % hv * dv..][..dv];
                formula::gated_norm(&o[i * dv..][..dv], z, &w, 1e-6)
            })
            .collect();
        close(&b.load(&y, Dtype::F32), &answer, 1e-6, "gated_norm");
    }
    for dim in [1usize, 17, 1024] {
        let (x, w) = (b.random(6 * dim), b.random(dim));
        let (vx, vw, y) = (b.f32s(&x), b.f32s(&w), b.poisoned(4 * dim, Dtype::F32));
        let params = RmsNormParams { dim: dim as u32, row0: 2, eps: 1e-5 };
        run(&b, |p| p.launch(&RMS_NORM, RmsNormConsts { lanes: 1 }, params, &[&vx, &vw, &y], [4, 1, 1], 1)).unwrap();
        let answer: Vec<f64> = x[2 * dim..].chunks(dim).flat_map(|x| formula::rms_norm(x, &w, 1e-5)).collect();
        close(&b.load(&y, Dtype::F32), &answer, 1e-6, "rms_norm");
    }
}

#[test]
fn matmul_equals_its_formula() {
    for (m, n, k) in [(1, 1, 1), (9, 70, 33), (16, 96, 256), (33, 193, 300), (5, 7, 1030), (530, 20, 40), (64, 100, 16)]
    {
        for dtype in TYPES {
            for add in [0, 1] {
                let mut b = Bench::new(2);
                let (x, w, y0) = (b.random(m * k), b.random(n * k), b.random(m * n));
                let vx = b.f32s(&spread(&x, k, k + 2, 3));
                let (vw, y) = (b.store(&w, dtype), b.f32s(&spread(&y0, n, n + 1, 2)));
                let consts = MatmulConsts {
                    w_type: dtype.code(),
                    add,
                    tile_m: 128,
                    tile_n: 256,
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
                    x_stride: k as u32 + 2,
                    x_off: 3,
                    y_stride: n as u32 + 1,
                    y_off: 2,
                };
                let grid = [n.div_ceil(256) as u32, m.div_ceil(128) as u32, 1];
                run(&b, |p| p.launch(&MATMUL, consts, params, &[&vx, &vw, &y], grid, 1 << 20)).unwrap();
                let mut answer = formula::matmul(&x, &w, k);
                if add == 1 {
                    answer.iter_mut().zip(&y0).for_each(|(a, y)| *a += y);
                }
                let found = b.load(&y, Dtype::F32);
                let rows: Vec<f32> = found[2..].chunks(n + 1).flat_map(|row| row[..n].to_vec()).collect();
                close(&rows, &answer, 1e-6, &format!("matmul {m} {n} {k} {dtype}"));
                assert!(found[2..].iter().skip(n).step_by(n + 1).all(|x| x.is_nan()), "matmul wrote past its columns");
            }
        }
    }
}

#[test]
fn matvec_equals_its_formula_with_norm_and_glu() {
    for (m, n, k) in [(1, 1, 1), (1, 70, 33), (2, 40, 256), (3, 129, 65), (7, 5, 1030), (8, 64, 1024)] {
        for dtype in TYPES {
            for (add, norm, glu) in [(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)] {
                let mut b = Bench::new(2);
                let (x, w, up) = (b.random(m * k), b.random(n * k), b.random(n * k));
                let (y0, weight) = (b.random(m * n), b.random(k));
                let (vx, vn) = (b.f32s(&spread(&x, k, k + 2, 3)), b.f32s(&weight));
                let (vw, vu, y) = (b.store(&w, dtype), b.store(&up, dtype), b.f32s(&y0));
                let consts =
                    MatvecConsts { w_type: dtype.code(), add, norm, glu, rows: 64, batch: 8, lanes: 1, wide: 0 };
                let params = MatvecParams {
                    m: m as u32,
                    n: n as u32,
                    k: k as u32,
                    x_stride: k as u32 + 2,
                    x_off: 3,
                    y_stride: n as u32,
                    y_off: 0,
                    eps: 1e-6,
                };
                let args = [&vx, &vn, &vw, &vu, &y];
                run(&b, |p| p.launch(&MATVEC, consts, params, &args, [n.div_ceil(64) as u32, 1, 1], 1 << 20)).unwrap();
                let norm = (norm == 1).then_some((&weight[..], 1e-6));
                let mut answer = formula::matvec(&x, norm, &w, (glu == 1).then_some(&up[..]), k);
                if add == 1 {
                    answer.iter_mut().zip(&y0).for_each(|(a, y)| *a += y);
                }
                close(&b.load(&y, Dtype::F32), &answer, 2e-6, &format!("matvec {m} {n} {k} {dtype}"));
            }
        }
    }
}

#[test]
fn weights_may_start_at_any_byte() {
    let mut b = Bench::new(2);
    let (n, k) = (37, 100);
    let (x, w) = (b.random(k), b.random(n * k));
    let answer = formula::matmul(&x, &w, k);
    let vx = b.f32s(&x);
    for dtype in TYPES {
        for odd in [0, 1, 2, 3] {
            let bytes = [vec![0xff; odd], encode(&w, dtype)].concat();
            let host = HostBytes::new(Arc::new(bytes));
            let host = host.slice(odd..host.bytes().len()).unwrap();
            let start = host.bytes().as_ptr();
            let vw = b.cpu.import("w", host.clone()).unwrap().view();
            assert_eq!(start, host.bytes().as_ptr());
            let y = b.poisoned(n, Dtype::F32);
            let consts =
                MatvecConsts { w_type: dtype.code(), add: 0, norm: 0, glu: 0, rows: 8, batch: 1, lanes: 1, wide: 0 };
            let params = MatvecParams {
                m: 1,
                n: n as u32,
                k: k as u32,
                x_stride: k as u32,
                x_off: 0,
                y_stride: n as u32,
                y_off: 0,
                eps: 0.0,
            };
            run(&b, |p| p.launch(&MATVEC, consts, params, &[&vx, &vx, &vw, &vw, &y], [5, 1, 1], 1)).unwrap();
            close(&b.load(&y, Dtype::F32), &answer, 1e-6, &format!("{dtype} from byte {odd}"));
            if dtype == Dtype::F32 {
                // As a small f32 argument, it is copied to where it can be read.
                let y = b.poisoned(n, Dtype::F32);
                let params = RmsNormParams { dim: n as u32, row0: 0, eps: 1e-6 };
                run(&b, |p| p.launch(&RMS_NORM, RmsNormConsts { lanes: 1 }, params, &[&vw, &vw, &y], [1, 1, 1], 1))
                    .unwrap();
                close(&b.load(&y, Dtype::F32), &formula::rms_norm(&w[..n], &w[..n], 1e-6), 1e-6, "unaligned norm");
            }
        }
    }
}

#[test]
fn attention_over_pages_equals_its_formula() {
    // (tokens, heads, kv, D, rot, positions before, page, span, tile_q)
    let cases = [
        (1usize, 8usize, 2usize, 64usize, 16usize, 100usize, 64usize, 32usize, 32usize),
        (37, 4, 2, 32, 32, 0, 64, 64, 16),
        (9, 3, 3, 48, 8, 130, 70, 35, 4),
        (70, 8, 2, 256, 64, 3, 1000, 1000, 32),
    ];
    for (t, heads, kv, d, rot, before, page, span, tile_q) in cases {
        for dtype in TYPES {
            let mut b = Bench::new(2);
            let (group, width, total) = (heads / kv, (2 * heads + 2 * kv) * d, before + t);
            let (qkv, q_norm, k_norm) = (b.random(total * width), b.random(d), b.random(d));
            let angles = b.random(total * rot / 2);
            let rope: Vec<f64> = angles
                .chunks(rot / 2)
                .flat_map(|a| a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())).collect::<Vec<_>>())
                .map(|x| x as f32 as f64)
                .collect();
            let (vn, vk) = (b.f32s(&q_norm), b.f32s(&k_norm));
            let pages: Vec<[View; 2]> = (0..total.div_ceil(page))
                .map(|_| [b.poisoned(page * kv * d, dtype), b.poisoned(page * kv * d, dtype)])
                .collect();
            // Earlier positions first, then the tokens that are asked about.
            let mut q = None;
            for (from, n) in [(0, before), (before, t)] {
                let vx = b.f32s(&qkv[from * width..][..n * width]);
                let vr = b.f32s(&rope[from * rot..][..n * rot]);
                let pos = b.words(&(from as u32..(from + n) as u32).collect::<Vec<_>>());
                let vq = b.poisoned(n * heads * d, Dtype::F32);
                run(&b, |p| {
                    for (i, [k, v]) in pages.iter().enumerate() {
                        let consts =
                            AttnPrepareConsts { dim: d as u32, rot: rot as u32, kv_type: dtype.code(), lanes: 1 };
                        let params = AttnPrepareParams {
                            heads: heads as u32,
                            kv_heads: kv as u32,
                            page_start: (i * page) as u32,
                            page_len: page as u32,
                            eps: 1e-6,
                        };
                        let args = [&vx, &vn, &vk, &vr, &pos, &vq, k, v];
                        p.launch(&ATTN_PREPARE, consts, params, &args, [(heads + 2 * kv) as u32, n as u32, 1], 1 << 20);
                    }
                })
                .unwrap();
                q = Some((vq, pos, vx));
            }
            let (vq, pos, vx) = q.unwrap();
            let rows: Vec<_> = (0..total)
                .map(|i| {
                    let (x, r) = (&qkv[i * width..][..width], &rope[i * rot..][..rot]);
                    formula::attn_prepare(x, &q_norm, &k_norm, r, heads, kv, 1e-6)
                })
                .collect();
            let answer_q: Vec<f64> = rows[before..].iter().flat_map(|r| r.0.clone()).collect();
            close(&b.load(&vq, Dtype::F32), &answer_q, 1e-6, "q");
            let cache = |which: usize| -> Vec<f64> {
                pages.iter().flat_map(|p| wide(&b.load(&p[which], dtype))).take(total * kv * d).collect()
            };
            let (k, v) = (cache(0), cache(1));
            let answer_k: Vec<f64> = rows.iter().flat_map(|r| r.1.clone()).collect();
            let answer_v: Vec<f64> = rows.iter().flat_map(|r| r.2.clone()).collect();
            let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
            close(&narrow(&k), &answer_k, bound(dtype), "k cache");
            close(&narrow(&v), &answer_v, bound(dtype), "v cache");

            let splits = page.div_ceil(span);
            let slots = splits * pages.len();
            let part = b.poisoned(t * heads * slots * (d + 2), Dtype::F32);
            let y = b.poisoned(t * heads * d, Dtype::F32);
            let scale = 1.0 / (d as f32).sqrt();
            run(&b, |p| {
                for (i, [k, v]) in pages.iter().enumerate() {
                    let consts = AttendConsts {
                        dim: d as u32,
                        kv_type: dtype.code(),
                        tile_q: tile_q as u32,
                        tile_k: 16,
                        lanes: 1,
                    };
                    let params = AttendParams {
                        tokens: t as u32,
                        heads: heads as u32,
                        kv_heads: kv as u32,
                        page_start: (i * page) as u32,
                        page_len: page as u32,
                        span: span as u32,
                        slot0: (i * splits) as u32,
                        slots: slots as u32,
                        scale,
                    };
                    let grid = [(t * group).div_ceil(tile_q) as u32, kv as u32, splits as u32];
                    p.launch(&ATTEND, consts, params, &[&vq, k, v, &pos, &part], grid, 1 << 20);
                }
                let params = AttendMergeParams { heads: heads as u32, slots: slots as u32, qkv_stride: width as u32 };
                let consts = AttendMergeConsts { dim: d as u32, lanes: 1 };
                p.launch(&ATTEND_MERGE, consts, params, &[&part, &vx, &y], [heads as u32, t as u32, 1], 1 << 20);
            })
            .unwrap();

            let q = wide(&b.load(&vq, Dtype::F32));
            let mut answer = Vec::new();
            for i in 0..t {
                for h in 0..heads {
                    let of_head = |x: &[f64]| -> Vec<f64> {
                        (0..=before + i).flat_map(|n| x[(n * kv + h / group) * d..][..d].to_vec()).collect()
                    };
                    let q = &q[(i * heads + h) * d..][..d];
                    let (m, l, acc) = formula::attend(q, &of_head(&k), &of_head(&v), scale as f64);
                    let whole: Vec<f64> = [m, l].into_iter().chain(acc).collect();
                    let gate = &qkv[(before + i) * width + (2 * h + 1) * d..][..d];
                    answer.extend(formula::attend_merge(&whole, gate));
                }
            }
            close(&b.load(&y, Dtype::F32), &answer, 2e-6, &format!("attention of {t} over {total} {dtype}"));
        }
    }
}

#[test]
fn embed_takes_only_the_ids_of_its_part() {
    let mut b = Bench::new(2);
    let (dim, rows) = (19, 10);
    let table = b.random(rows * dim);
    for dtype in TYPES {
        let (vt, ids) = (b.store(&table, dtype), b.words(&[103, 5, 109, 110, 100]));
        let x = b.f32s(&vec![0.5; 5 * dim]);
        let params = EmbedParams { dim: dim as u32, row0: 100, rows: rows as u32 };
        run(&b, |p| p.launch(&EMBED, EmbedConsts { w_type: dtype.code() }, params, &[&ids, &vt, &x], [5, 1, 1], 1))
            .unwrap();
        let row = |i: usize| table[i * dim..][..dim].to_vec();
        let answer = [row(3), vec![0.5; dim], row(9), vec![0.5; dim], row(0)].concat();
        close(&b.load(&x, Dtype::F32), &answer, 0.0, "embed");
    }
}

#[test]
fn swiglu_argmax_copy_and_fill() {
    let mut b = Bench::new(2);
    for (rows, dim) in [(1, 1), (3, 77), (2, 9000)] {
        let gate_up = b.random(rows * 2 * dim).iter().map(|x| x * 9.0).collect::<Vec<_>>();
        let (x, y) = (b.f32s(&gate_up), b.poisoned(rows * dim, Dtype::F32));
        let grid = [(rows * dim).div_ceil(64) as u32, 1, 1];
        let params = SwigluParams { rows: rows as u32, dim: dim as u32 };
        run(&b, |p| p.launch(&SWIGLU, SwigluConsts { block: 64 }, params, &[&x, &y], grid, 1 << 20)).unwrap();
        close(&b.load(&y, Dtype::F32), &formula::swiglu(&gate_up, dim), 1e-6, "swiglu");
    }
    let nan = f64::NAN;
    let rows = [
        vec![nan, 1.0, 3.0, -2.0, 3.0, nan, 0.0],
        vec![nan; 7],
        vec![f64::NEG_INFINITY; 7],
        vec![-5.0, -4.0, -3.0, -9.0, f64::NEG_INFINITY, -3.0, -3.5],
    ];
    let (x, ids) = (b.f32s(&rows.concat()), b.words(&[99; 4]));
    run(&b, |p| p.launch(&ARGMAX, ArgmaxConsts { lanes: 1 }, ArgmaxParams { n: 7 }, &[&x, &ids], [4, 1, 1], 1))
        .unwrap();
    assert_eq!(b.cpu.read(&ids).unwrap().wait_as::<u32>().unwrap(), [2, u32::MAX, 0, 2]);
    let long = b.random(40_001);
    let (x, ids) = (b.f32s(&long), b.words(&[0]));
    run(&b, |p| p.launch(&ARGMAX, ArgmaxConsts { lanes: 1 }, ArgmaxParams { n: 40_001 }, &[&x, &ids], [1, 1, 1], 1))
        .unwrap();
    assert_eq!(b.cpu.read(&ids).unwrap().wait_as::<u32>().unwrap()[0] as usize, formula::argmax(&long));

    let src: Vec<u32> = (0..10_000).collect();
    let (vs, vd) = (b.words(&src), b.words(&vec![7; 10_000]));
    run(&b, |p| {
        let params = WordsParams { n: 9000, src_off: 500, dst_off: 900, word: 0 };
        p.launch(&COPY, WordsConsts { block: 1000 }, params, &[&vs, &vd], [9, 1, 1], 1 << 20);
        let params = WordsParams { n: 3, src_off: 0, dst_off: 1000, word: 42 };
        p.launch(&FILL, WordsConsts { block: 1000 }, params, &[&vd], [1, 1, 1], 1 << 20);
    })
    .unwrap();
    let mut answer = vec![7; 10_000];
    answer[900..9900].copy_from_slice(&src[500..9500]);
    answer[1000..1003].fill(42);
    assert_eq!(b.cpu.read(&vd).unwrap().wait_as::<u32>().unwrap(), answer);
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
            let consts = PrepareConsts { chunk: 16, dk: h.k, group: 1, qk_type: 0, l2norm: 1, lanes: 1 };
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
            let consts = ScanConsts { chunk: 16, dk: 16, dv_tile: 16, qk_type: 0, v_type: 0, lanes: 1 };
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
