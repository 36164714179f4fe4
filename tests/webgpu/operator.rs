//! The operator and the pieces around it, each kernel against its formula.

use gatedelta::kernel::gdn::*;
use gatedelta::plan::scratch_per_chunk_head;
use gatedelta::shape::{HeadMap, Heads};
use gatedelta::tune;

use super::*;
use crate::formula;
use crate::util::{Device, Random, bound};

/// Rows of `width` numbers at `off + t * stride`, the rest NaN, as stored.
struct Strided {
    view: View,
    off: u32,
    stride: u32,
}

fn strided(gpu: &dyn Backend, x: &[f32], width: usize, dtype: Dtype, off: u32, gap: u32) -> Strided {
    let stride = width as u32 + gap;
    let rows = x.len() / width;
    let mut all = vec![f32::NAN; off as usize + rows * stride as usize];
    for (t, row) in x.chunks(width).enumerate() {
        all[off as usize + t * stride as usize..][..width].copy_from_slice(row);
    }
    Strided { view: stored(gpu, &all, dtype), off, stride }
}

/// Head shapes that reach every path: the released models', grouped heads in both maps, K != V, the smallest, the largest.
fn head_shapes() -> Vec<Heads> {
    [
        (1, 1, 128, 128, HeadMap::Div),
        (2, 4, 64, 32, HeadMap::Div),
        (2, 6, 48, 80, HeadMap::Mod),
        (1, 1, 16, 16, HeadMap::Div),
        (1, 1, 256, 256, HeadMap::Div),
        (1, 1, 240, 48, HeadMap::Mod),
    ]
    .map(|(hk, hv, k, v, map)| Heads::new(hk, hv, k, v, map).unwrap())
    .to_vec()
}

#[test]
fn conv_and_conv_tail() {
    let mut r = Random::new(1);
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        for taps in [2usize, 4, 8] {
            // Sequences: longer than a block, shorter than the taps, none, one block exactly; slots out of order.
            let (channels, lens, slots, block) = (70usize, [37usize, 2, 0, 16], [2u32, 0, 3, 1], 16u32);
            let total: usize = lens.iter().sum();
            let x = r.normals(total * channels);
            let w = r.normals(channels * taps);
            let tail = r.normals(4 * (taps - 1) * channels);
            let mut seqs = Vec::new();
            let (mut answer_y, mut answer_tail, mut t0) = (Vec::new(), wide(&tail), 0);
            for (&len, &slot) in lens.iter().zip(&slots) {
                seqs.extend([t0 as u32, len as u32, slot, 0]);
                let own = &mut answer_tail[slot as usize * (taps - 1) * channels..][..(taps - 1) * channels];
                let rows = &x[t0 * channels..][..len * channels];
                let (y, new) = formula::conv(&wide(rows), &wide(&w), own, channels, taps, true);
                answer_y.extend(y);
                own.copy_from_slice(&new);
                t0 += len;
            }
            for whole in [false, true] {
                let xs = strided(gpu, &x, channels, Dtype::F32, 3, 5);
                let tail_view = floats(gpu, &tail);
                let y = poisoned(gpu, total * channels);
                let (w, seqs) = (floats(gpu, &w), words(gpu, &seqs));
                let block = if whole { 37 } else { block };
                let params = ConvParams {
                    channels: channels as u32,
                    x_stride: xs.stride,
                    x_off: xs.off,
                    y_stride: channels as u32,
                    y_off: 0,
                    block,
                };
                let mut pass = Pass::new();
                let consts = ConvConsts { taps: taps as u32, silu: 1, store_tail: whole as u32 };
                let grid = [(channels as u32).div_ceil(64), 4, 37u32.div_ceil(block)];
                pass.launch(&CONV, consts, params, &[&xs.view, &w, &seqs, &tail_view, &y], grid, 1000);
                if !whole {
                    let consts = ConvTailConsts { taps: taps as u32 };
                    pass.launch(&CONV_TAIL, consts, params, &[&xs.view, &seqs, &tail_view], [grid[0], 4, 1], 1000);
                }
                gpu.run(&pass).unwrap();
                close(&format!("{name} conv {taps} y"), &get(gpu, &y, Dtype::F32), &answer_y, 2e-6);
                let found = get(gpu, &tail_view, Dtype::F32);
                assert_eq!(wide(&found), answer_tail, "{name} conv {taps} tail, whole {whole}");
            }
        }
    }
}

#[test]
fn gate() {
    let mut r = Random::new(2);
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        let (tokens, hv) = (150usize, 7usize);
        let ab: Vec<f32> = (0..tokens * 2 * hv).map(|i| r.normal() * if i % 5 == 0 { 12.0 } else { 1.0 }).collect();
        let (a_log, dt_bias) = (r.normals(hv), r.normals(hv));
        let rows = strided(gpu, &ab, 2 * hv, Dtype::F32, 2, 3);
        let (g, beta) = (poisoned(gpu, tokens * hv), poisoned(gpu, tokens * hv));
        let mut pass = Pass::new();
        let block = tune::block(gpu.caps());
        let params = GateParams {
            tokens: tokens as u32,
            hv: hv as u32,
            stride: rows.stride,
            a_off: rows.off + hv as u32,
            b_off: rows.off,
        };
        let (a_log_view, dt_view) = (floats(gpu, &a_log), floats(gpu, &dt_bias));
        let grid = [((tokens * hv) as u32).div_ceil(block), 1, 1];
        pass.launch(&GATE, GateConsts { block }, params, &[&rows.view, &a_log_view, &dt_view, &g, &beta], grid, 9);
        gpu.run(&pass).unwrap();
        let answer: Vec<(f64, f64)> = (0..tokens * hv)
            .map(|i| {
                let (t, h) = (i / hv, i % hv);
                let row = &ab[t * 2 * hv..];
                formula::gate(row[hv + h] as f64, row[h] as f64, a_log[h] as f64, dt_bias[h] as f64)
            })
            .collect();
        let answers: (Vec<f64>, Vec<f64>) = answer.into_iter().unzip();
        close(&format!("{name} g"), &get(gpu, &g, Dtype::F32), &answers.0, 1e-6);
        close(&format!("{name} beta"), &get(gpu, &beta, Dtype::F32), &answers.1, 1e-6);
    }
}

/// Inputs of the operator's kernels for chunks of one sequence.
struct Case {
    heads: Heads,
    dtype: Dtype,
    l2norm: bool,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    state: Vec<f32>,
    tokens: usize,
}

impl Case {
    fn new(heads: Heads, dtype: Dtype, l2norm: bool, tokens: usize, r: &mut Random) -> Self {
        let (hk, hv, k, v) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
        // Keys of unit length where the kernel does not norm them; bf16 numbers, so that storing them is exact.
        let scale = if l2norm { 1.0 } else { (k as f32).powf(-0.5) };
        let exact = |x: f32| half::bf16::from_f32(half::f16::from_f32(x).to_f32()).to_f32();
        let mut numbers = |n: usize, s: f32| r.normals(n).into_iter().map(|x| exact(x * s)).collect::<Vec<f32>>();
        let (q, key, value) =
            (numbers(tokens * hk * k, 1.0), numbers(tokens * hk * k, scale), numbers(tokens * hv * v, 1.0));
        let state = numbers(heads.state_len() as usize, 1.0);
        // No decay, slow, and cliffs.
        let g = (0..tokens * hv)
            .map(|i| match i % 7 {
                0 => 0.0,
                6 if i % 5 == 0 => -80.0 * r.unit() as f32,
                _ => -0.3 * r.unit() as f32,
            })
            .collect();
        let beta = (0..tokens * hv).map(|_| r.unit() as f32).collect();
        Case { heads, dtype, l2norm, q, k: key, v: value, g, beta, state, tokens }
    }

    fn head(&self, x: &[f32], t: std::ops::Range<usize>, h: usize, heads: u32, size: u32) -> Vec<f64> {
        let (heads, size) = (heads as usize, size as usize);
        t.flat_map(|t| wide(&x[(t * heads + h) * size..][..size])).collect()
    }

    fn scale(&self) -> f32 {
        (self.heads.k as f32).powf(-0.5)
    }
}

/// Prepares and scans a case on a device; ws, o and the state.
fn prepare_and_scan(gpu: &dyn Backend, case: &Case) -> (Vec<f32>, Vec<f32>, Vec<f32>, u32) {
    let h = &case.heads;
    let tile = tune::tile(gpu.caps(), h);
    let (c, ty) = (tile.chunk, case.dtype);
    let (qk, vo) = ((h.hk * h.k) as usize, (h.hv * h.v) as usize);
    let q = strided(gpu, &case.q, qk, ty, 2, 6);
    let k = strided(gpu, &case.k, qk, ty, 6, 0);
    let v = strided(gpu, &case.v, vo, ty, 0, 2);
    let g = floats(gpu, &[&[f32::NAN; 3][..], &case.g].concat());
    let beta = floats(gpu, &[&[f32::NAN; 3][..], &case.beta].concat());
    let table: Vec<u32> =
        (0..case.tokens as u32).step_by(c as usize).flat_map(|t| [t, c.min(case.tokens as u32 - t), 0, 0]).collect();
    let n = table.len() as u32 / 4;
    let chunks = words(gpu, &table);
    // One segment: chunk 0 .. n, slot 1; slot 0 must stay as it is.
    let segments = words(gpu, &[0, n, 1, 0]);
    let state = floats(gpu, &[vec![7.0; case.state.len()], case.state.clone()].concat());
    let ws = poisoned(gpu, (n as u64 * h.hv as u64 * scratch_per_chunk_head(c) / 4) as usize);
    let o_stride = vo as u32 + 4;
    let o = put(gpu, &[], (case.tokens as u64 * o_stride as u64 * ty.size()).next_multiple_of(4));
    let mut pass = Pass::new();
    pass.launch(
        &PREPARE,
        PrepareConsts {
            chunk: c,
            dk: h.k,
            group: h.group(),
            qk_type: ty.code(),
            l2norm: case.l2norm as u32,
            grad: 0,
            lanes: tile.prepare_lanes,
        },
        PrepareParams {
            hk: h.hk,
            hv: h.hv,
            head_map: h.map as u32,
            q_stride: q.stride,
            q_off: q.off,
            k_stride: k.stride,
            k_off: k.off,
            g_off: 3,
            scale: case.scale(),
        },
        &[&q.view, &k.view, &g, &beta, &chunks, &ws],
        [n, h.hk, 1],
        1 << 20,
    );
    pass.launch(
        &SCAN,
        ScanConsts {
            chunk: c,
            dk: h.k,
            dv_tile: tile.dv_tile,
            qk_type: ty.code(),
            v_type: ty.code(),
            save: 0,
            walk: 0,
            grad: 0,
            lanes: tile.scan_lanes,
        },
        ScanParams {
            hk: h.hk,
            hv: h.hv,
            head_map: h.map as u32,
            dv: h.v,
            q_stride: q.stride,
            q_off: q.off,
            k_stride: k.stride,
            k_off: k.off,
            v_stride: v.stride,
            v_off: v.off,
            o_stride,
            o_off: 2,
        },
        &[&q.view, &k.view, &v.view, &ws, &chunks, &segments, &state, &o],
        [1, h.hv, h.v / tile.dv_tile],
        1 << 20,
    );
    gpu.run(&pass).unwrap();
    let o: Vec<f32> = get(gpu, &o, ty)
        .chunks(o_stride as usize)
        .enumerate()
        .flat_map(|(t, row)| {
            // Columns outside the tensor stay what they were.
            let (head, rest) = if row.len() == o_stride as usize { row.split_at(2) } else { (&row[..0], row) };
            assert!(head.iter().all(|x| x.is_nan()) && rest[vo..].iter().all(|x| x.is_nan()), "row {t} of o");
            rest[..vo].to_vec()
        })
        .collect();
    let state = get(gpu, &state, Dtype::F32);
    assert!(state[..case.state.len()].iter().all(|&x| x == 7.0), "the other slot");
    (get(gpu, &ws, Dtype::F32), o, state[case.state.len()..].to_vec(), c)
}

#[test]
fn gdn_prepare_and_gdn_scan() {
    let mut r = Random::new(3);
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        for (n, heads) in head_shapes().into_iter().enumerate() {
            for (dtype, l2norm) in [(Dtype::F32, true), (Dtype::F32, false), (Dtype::F16, true), (Dtype::Bf16, true)] {
                // Compiling takes most of the time: the first two shapes stand for the others.
                if n > 1 && (dtype != Dtype::F32 || !l2norm) {
                    continue;
                }
                let case = Case::new(heads, dtype, l2norm, 71, &mut r);
                let what = format!("{name} {heads:?} {dtype} l2norm {l2norm}");
                let (ws, o, state, c) = prepare_and_scan(gpu, &case);
                let again = prepare_and_scan(gpu, &case);
                assert!(bits(&o) == bits(&again.1) && bits(&state) == bits(&again.2), "{what}: other bits");
                let (c, hv) = (c as usize, heads.hv as usize);
                let (dk, dv) = (heads.k as usize, heads.v as usize);
                let per_head = 2 * c * c + 4 * c;
                let mut answer_ws = Vec::new();
                let mut answer_o = vec![0.0; case.tokens * hv * dv];
                let mut answer_state = wide(&case.state);
                for (n, first) in (0..case.tokens).step_by(c).enumerate() {
                    let t = first..case.tokens.min(first + c);
                    for h in 0..hv {
                        let kh = heads.key_head(h as u32) as usize;
                        let q = case.head(&case.q, t.clone(), kh, heads.hk, heads.k);
                        let k = case.head(&case.k, t.clone(), kh, heads.hk, heads.k);
                        let v = case.head(&case.v, t.clone(), h, heads.hv, heads.v);
                        let g = case.head(&case.g, t.clone(), h, heads.hv, 1);
                        let beta = case.head(&case.beta, t.clone(), h, heads.hv, 1);
                        let one = formula::gdn_prepare(&q, &k, &g, &beta, dk, c, l2norm, case.scale() as f64);
                        let own = &mut answer_state[h * dk * dv..][..dk * dv];
                        let out = formula::gdn_scan(&q, &k, &v, &one, own, dk, dv, c);
                        for (i, t) in t.clone().enumerate() {
                            answer_o[(t * hv + h) * dv..][..dv].copy_from_slice(&out[i * dv..][..dv]);
                        }
                        // gamma_C and one more stand in the first of C numbers; the others are free.
                        let found = &ws[(n * hv + h) * per_head..][..per_head - c + 2];
                        close(&format!("{what} ws"), found, &one[..per_head - c + 2], 2e-6);
                        answer_ws.extend(one);
                    }
                }
                close(&format!("{what} o"), &o, &answer_o, if dtype == Dtype::F32 { 2e-6 } else { bound(dtype) });
                close(&format!("{what} state"), &state, &answer_state, 2e-6);
            }
        }
    }
}

#[test]
fn gdn_step() {
    let mut r = Random::new(4);
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        for (n, heads) in head_shapes().into_iter().enumerate() {
            for (dtype, store) in [(Dtype::F32, 1), (Dtype::F32, 0), (Dtype::F16, 1), (Dtype::Bf16, 1)] {
                if n > 1 && (dtype != Dtype::F32 || store == 0) {
                    continue;
                }
                // Two sequences of one and of three tokens, their states swapped.
                let l2norm = store == 1;
                let case = Case::new(heads, dtype, l2norm, 4, &mut r);
                let h = &heads;
                let tile = tune::tile(gpu.caps(), h);
                let (qk, vo) = ((h.hk * h.k) as usize, (h.hv * h.v) as usize);
                let q = strided(gpu, &case.q, qk, dtype, 2, 6);
                let k = strided(gpu, &case.k, qk, dtype, 6, 0);
                let v = strided(gpu, &case.v, vo, dtype, 0, 2);
                let (g, beta) = (floats(gpu, &case.g), floats(gpu, &case.beta));
                let seqs = words(gpu, &[0, 1, 1, 0, 1, 3, 0, 0]);
                let before = [case.state.clone(), case.state.iter().map(|x| -x).collect()].concat();
                let state = floats(gpu, &before);
                let o = put(gpu, &[], (4 * vo as u64 * dtype.size()).max(16));
                let mut pass = Pass::new();
                pass.launch(
                    &STEP,
                    StepConsts {
                        dk: h.k,
                        dv_tile: tile.dv_step,
                        qk_type: dtype.code(),
                        v_type: dtype.code(),
                        l2norm: l2norm as u32,
                        store,
                        lanes: tile.step_lanes,
                    },
                    StepParams {
                        hk: h.hk,
                        hv: h.hv,
                        head_map: h.map as u32,
                        dv: h.v,
                        q_stride: q.stride,
                        q_off: q.off,
                        k_stride: k.stride,
                        k_off: k.off,
                        v_stride: v.stride,
                        v_off: v.off,
                        o_stride: vo as u32,
                        o_off: 0,
                        g_off: 0,
                        scale: case.scale(),
                    },
                    &[&q.view, &k.view, &v.view, &g, &beta, &seqs, &state, &o],
                    [2, h.hv, h.v / tile.dv_step],
                    1 << 20,
                );
                gpu.run(&pass).unwrap();
                let what = format!("{name} {heads:?} {dtype}, store {store}");
                let (hv, dk, dv) = (h.hv as usize, h.k as usize, h.v as usize);
                let mut answer_state = wide(&before);
                let mut answer_o = Vec::new();
                for t in 0..4 {
                    let slot = if t == 0 { 1 } else { 0 };
                    for n in 0..hv {
                        let kh = h.key_head(n as u32) as usize;
                        let own = &mut answer_state[(slot * hv + n) * dk * dv..][..dk * dv];
                        answer_o.extend(formula::gdn_step(
                            &case.head(&case.q, t..t + 1, kh, h.hk, h.k),
                            &case.head(&case.k, t..t + 1, kh, h.hk, h.k),
                            &case.head(&case.v, t..t + 1, n, h.hv, h.v),
                            case.g[t * hv + n] as f64,
                            case.beta[t * hv + n] as f64,
                            l2norm,
                            case.scale() as f64,
                            own,
                        ));
                    }
                }
                let found = get(gpu, &o, dtype)[..4 * vo].to_vec();
                close(&format!("{what} o"), &found, &answer_o, if dtype == Dtype::F32 { 2e-6 } else { bound(dtype) });
                let found = get(gpu, &state, Dtype::F32);
                if store == 1 {
                    close(&format!("{what} state"), &found, &answer_state, 2e-6);
                } else {
                    assert_eq!(bits(&found), bits(&before), "{what} state");
                }
            }
        }
    }
}

#[test]
fn gated_norm() {
    let mut r = Random::new(5);
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        for dv in [16usize, 80, 128, 256] {
            let (tokens, hv) = (5usize, 3usize);
            let (o, z, w) = (r.normals(tokens * hv * dv), r.normals(tokens * hv * dv), r.normals(dv));
            let rows = strided(gpu, &z, hv * dv, Dtype::F32, 7, 9);
            let y = poisoned(gpu, tokens * hv * dv);
            let consts = GatedNormConsts { dv: dv as u32, lanes: tune::head_lanes(gpu.caps(), dv as u32) };
            let params = GatedNormParams {
                hv: hv as u32,
                tokens: tokens as u32,
                z_stride: rows.stride,
                z_off: rows.off,
                eps: 1e-6,
            };
            let mut pass = Pass::new();
            let args = [&floats(gpu, &o), &rows.view, &floats(gpu, &w), &y];
            pass.launch(&GATED_NORM, consts, params, &args, [hv as u32, tokens as u32, 1], 1000);
            gpu.run(&pass).unwrap();
            let eps = 1e-6f32 as f64;
            let answer: Vec<f64> = o
                .chunks(dv)
                .zip(z.chunks(dv))
                .flat_map(|(o, z)| formula::gated_norm(&wide(o), &wide(z), &wide(&w), eps))
                .collect();
            close(&format!("{name} gated_norm {dv}"), &get(gpu, &y, Dtype::F32), &answer, 1e-6);
        }
    }
}

#[test]
fn gdn_mix_step() {
    let mut r = Random::new(6);
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        for heads in head_shapes() {
            let h = &heads;
            let (hk, hv, k, v) = (h.hk as usize, h.hv as usize, h.k as usize, h.v as usize);
            let tokens = 3;
            let (qkv_row, gap) = (2 * hk * k + hv * v, 4);
            let qkv = r.normals(tokens * qkv_row);
            let p_row = hv * v + 2 * hv;
            let proj = r.normals(tokens * p_row);
            let small = r.normals(2 * hv + v);
            let before = r.normals(2 * h.state_len() as usize);
            let qkv_view = strided(gpu, &qkv, qkv_row, Dtype::F32, 0, gap);
            let proj_view = strided(gpu, &proj, p_row, Dtype::F32, 0, 3);
            let state = floats(gpu, &before);
            let y = poisoned(gpu, tokens * hv * v);
            let seqs = words(gpu, &[0, 1, 1, 0, 1, 2, 0, 0]);
            let scale = (k as f32).powf(-0.5);
            let params = MixStepParams {
                hk: h.hk,
                hv: h.hv,
                head_map: h.map as u32,
                qkv_stride: qkv_view.stride,
                p_stride: proj_view.stride,
                z_off: 0,
                a_off: (hv * v) as u32,
                b_off: (hv * v + hv) as u32,
                scale,
                eps: 1e-6,
            };
            let consts = MixStepConsts { dk: h.k, dv: h.v, lanes: tune::mix_lanes(gpu.caps(), h) };
            let mut pass = Pass::new();
            let args = [&qkv_view.view, &proj_view.view, &floats(gpu, &small), &seqs, &state, &y];
            pass.launch(&MIX_STEP, consts, params, &args, [2, h.hv, 1], 1000);
            gpu.run(&pass).unwrap();
            let mut answer_state = wide(&before);
            let mut answer = Vec::new();
            let len = h.state_len() as usize;
            for t in 0..tokens {
                let slot = if t == 0 { 1 } else { 0 };
                let p = wide(&proj[t * p_row..][..p_row]);
                answer.extend(formula::gdn_mix_step(
                    h,
                    &wide(&qkv[t * qkv_row..][..qkv_row]),
                    &p[..hv * v],
                    &p[hv * v..hv * v + hv],
                    &p[hv * v + hv..],
                    &wide(&small),
                    scale as f64,
                    1e-6f32 as f64,
                    &mut answer_state[slot * len..][..len],
                ));
            }
            close(&format!("{name} {heads:?} y"), &get(gpu, &y, Dtype::F32), &answer, 3e-6);
            close(&format!("{name} {heads:?} state"), &get(gpu, &state, Dtype::F32), &answer_state, 2e-6);
        }
    }
}
