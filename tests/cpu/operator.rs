//! The operator and the pieces around it, each row against its formula.

use super::*;

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
pub struct Batch {
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
    pub fn new(b: &mut Bench, heads: Heads, lens: &[usize]) -> Self {
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
    pub fn prefill(&self, b: &Bench, chunk: usize, dv_tile: u32, dtype: Dtype, l2norm: bool) -> [Vec<f32>; 3] {
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
                grad: 0,
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
                save: 0,
                walk: 0,
                grad: 0,
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
