//! Gradients of what surrounds the operator, on every device, against the formulas in float64.

use std::collections::BTreeMap;
use std::sync::Arc;

use gatedelta::backend::View;
use gatedelta::backend::cpu::Cpu;
use gatedelta::kernel::grad::*;
use gatedelta::ops::{self, ConvGrad, GateGrad, GatedNormGrad, Seqs};
use gatedelta::pass::Rows;
use gatedelta::shape::{HeadMap, Heads};
use gatedelta::tune;

use crate::formula::error;
use crate::formula_grad as formula;
use crate::ops::{Bench, benches, wide};
use crate::util::Random;

/// The largest relative error of a gradient.
const BOUND: f64 = 1e-6;
/// The same where each number is judged by itself: WGSL gives exp(x) 3 + 2 |x| units of the last digit.
const BOUND_ALONE: f64 = 1e-5;

/// The largest errors seen, by device and gradient, for people who run with `--nocapture`.
#[derive(Default)]
struct Worst(BTreeMap<String, f64>);

impl Worst {
    #[track_caller]
    fn close(&mut self, b: &Bench, gradient: &str, what: &str, found: &[f32], expected: &[f64]) {
        self.within(BOUND, b, gradient, what, found, expected);
    }

    #[track_caller]
    fn within(&mut self, bound: f64, b: &Bench, gradient: &str, what: &str, found: &[f32], expected: &[f64]) {
        let e = error(found, expected);
        assert!(e <= bound, "{}: {gradient} of {what}: relative error {e:.2e}", b.name);
        let worst = self.0.entry(format!("{}: {gradient}", b.name)).or_default();
        *worst = worst.max(e);
    }
}

impl Drop for Worst {
    fn drop(&mut self) {
        self.0.iter().for_each(|(what, e)| println!("{what}: {e:.1e}"));
    }
}

/// Numbers of a row before the tensor's own, and after them.
const GAP: [usize; 2] = [3, 2];

/// Rows of `width` numbers, with NaN around them.
fn spread(x: &[f32], width: usize) -> Vec<f32> {
    let gap = |n: usize| std::iter::repeat_n(f32::NAN, n);
    x.chunks(width).flat_map(|row| gap(GAP[0]).chain(row.iter().copied()).chain(gap(GAP[1]))).collect()
}

fn rows(view: View, width: usize) -> Rows {
    Rows { view, off: GAP[0] as u64, stride: (width + GAP[0] + GAP[1]) as u64 }
}

/// The numbers of rows of `width`; panics if anything was written around them, where NaN was.
#[track_caller]
fn gather(x: &[f32], width: usize) -> Vec<f32> {
    x.chunks(width + GAP[0] + GAP[1])
        .flat_map(|row| {
            let (row, after) = row.split_at(GAP[0] + width);
            assert!(row[..GAP[0]].iter().chain(after).all(|x| x.is_nan()), "written beside a row");
            row[GAP[0]..].to_vec()
        })
        .collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A convolution over a ragged batch.
struct Conv {
    channels: usize,
    taps: usize,
    silu: bool,
    lens: Vec<usize>,
    x: Vec<f32>,
    w: Vec<f32>,
    /// One more than there are sequences; sequence n has slot `lens.len() - n`.
    tails: Vec<f32>,
    dy: Vec<f32>,
    dtails_out: Vec<f32>,
}

impl Conv {
    fn new(channels: usize, taps: usize, silu: bool, lens: &[usize], size: f32) -> Self {
        let mut r = Random::new((channels * 31 + taps * 7 + lens.len()) as u64);
        let t: usize = lens.iter().sum();
        let slots = (lens.len() + 1) * (taps - 1) * channels;
        let scale = |x: Vec<f32>| x.iter().map(|x| size * x).collect::<Vec<_>>();
        Conv {
            x: scale(r.normals(t * channels)),
            w: r.normals(channels * taps),
            tails: scale(r.normals(slots)),
            dy: r.normals(t * channels),
            dtails_out: r.normals(slots),
            lens: lens.to_vec(),
            channels,
            taps,
            silu,
        }
    }

    fn name(&self) -> String {
        format!("{} channels, {} taps, silu {}, {:?}", self.channels, self.taps, self.silu, self.lens)
    }

    fn tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    fn slot(&self, n: usize) -> std::ops::Range<usize> {
        let slot = (self.taps - 1) * self.channels;
        (self.lens.len() - n) * slot..(self.lens.len() - n + 1) * slot
    }

    fn table(&self) -> Vec<u32> {
        let mut first = 0;
        let entry = |(n, &len): (usize, &usize)| {
            first += len;
            [(first - len) as u32, len as u32, (self.lens.len() - n) as u32, 0]
        };
        self.lens.iter().enumerate().flat_map(entry).collect()
    }

    /// dx, dw, dtails as the formula has them; NaN for the slot that no sequence has.
    fn expected(&self, with_tail_out: bool) -> [Vec<f64>; 3] {
        let (mut dx, mut dw) = (Vec::new(), vec![0.0; self.w.len()]);
        let mut dtails = vec![f64::NAN; self.tails.len()];
        let mut first = 0;
        for (n, len) in self.lens.iter().enumerate() {
            let own = first * self.channels..(first + len) * self.channels;
            let handed = match with_tail_out {
                true => wide(&self.dtails_out[self.slot(n)]),
                false => vec![0.0; self.slot(n).len()],
            };
            let (x, tail, dy) = (wide(&self.x[own.clone()]), wide(&self.tails[self.slot(n)]), wide(&self.dy[own]));
            let [x, w, tail] =
                formula::conv(&x, &wide(&self.w), &tail, &dy, &handed, self.channels, self.taps, self.silu);
            dx.extend(x);
            dw.iter_mut().zip(w).for_each(|(sum, w)| *sum += w);
            dtails[self.slot(n)].copy_from_slice(&tail);
            first += len;
        }
        [dx, dw, dtails]
    }

    /// dx, dw and dtails as the device has them; dtails only where asked for.
    fn run(&self, b: &Bench, with_tail_out: bool, with_tail: bool) -> [Vec<f32>; 3] {
        let (t, c) = (self.tokens(), self.channels);
        let (x, dy) = (rows(b.floats(&spread(&self.x, c)), c), rows(b.floats(&spread(&self.dy, c)), c));
        let dx = rows(b.poisoned(t * (c + GAP[0] + GAP[1])), c);
        let (w, dw) = (b.floats(&self.w), b.poisoned(self.w.len()));
        let (tail, dtail_out) = (b.floats(&self.tails), b.floats(&self.dtails_out));
        let dtail = b.poisoned(self.tails.len());
        let seqs = Seqs {
            table: &b.words(&self.table()),
            count: self.lens.len() as u64,
            tokens: t as u64,
            longest: self.lens.iter().max().copied().unwrap_or(0) as u64,
            slots: self.lens.len() as u64 + 1,
        };
        let scratch = b.poisoned(ops::conv_grad_scratch(&b.caps, &seqs, c as u64, self.taps as u32) as usize / 4);
        let of = ConvGrad {
            channels: c as u64,
            taps: self.taps as u32,
            silu: self.silu,
            seqs,
            x: &x,
            w: &w,
            tail: &tail,
            dy: &dy,
            dtail_out: with_tail_out.then_some(&dtail_out),
            dx: &dx,
            dw: &dw,
            dtail: with_tail.then_some(&dtail),
            scratch: &scratch,
        };
        b.run(|pass| ops::conv_grad(&b.caps, pass, &of).unwrap());
        [gather(&b.read(&dx.view), c), b.read(&dw), if with_tail { b.read(&dtail) } else { Vec::new() }]
    }
}

/// Ragged batches with empty sequences, sequences shorter than the tail, and sequences of several blocks.
fn convs() -> Vec<Conv> {
    vec![
        Conv::new(64, 4, true, &[5, 0, 1, 70], 1.0),
        Conv::new(67, 4, true, &[3, 2, 129], 1.0),
        Conv::new(130, 2, false, &[33], 1.0),
        Conv::new(7, 8, true, &[2, 40, 0, 7, 300], 1.0),
        Conv::new(200, 4, true, &[300, 0, 1, 128, 64, 65], 1.0),
        // SiLU far out on both sides.
        Conv::new(96, 4, true, &[50, 3], 100.0),
        Conv::new(33, 8, false, &[1, 200], 1.0),
        Conv::new(20, 2, true, &[1, 0, 1], 1.0),
        Conv::new(20, 4, true, &[0, 0], 1.0),
        Conv::new(20, 4, true, &[], 1.0),
    ]
}

#[test]
fn conv_grad_equals_its_formula() {
    let mut worst = Worst::default();
    for b in benches() {
        for conv in convs() {
            for (with_tail_out, with_tail) in [(false, false), (true, false), (false, true), (true, true)] {
                let what = format!("{} {with_tail_out} {with_tail}", conv.name());
                let [dx, dw, dtails] = conv.run(&b, with_tail_out, with_tail);
                let expected = conv.expected(with_tail_out);
                worst.close(&b, "conv dx", &what, &dx, &expected[0]);
                worst.close(&b, "conv dw", &what, &dw, &expected[1]);
                if with_tail {
                    let slot = conv.slot(0).len();
                    assert!(dtails[..slot].iter().all(|x| x.is_nan()), "{what}: a slot of no sequence was written");
                    worst.close(&b, "conv dtail", &what, &dtails[slot..], &expected[2][slot..]);
                }
            }
        }
    }
}

/// Cells take several blocks each, in the order of the table, whatever the sequences' lengths.
#[test]
fn conv_cells_share_out_the_blocks() {
    let mut worst = Worst::default();
    for b in benches() {
        let conv = Conv::new(70, 4, true, &[9, 0, 40, 1, 3, 16], 1.0);
        let expected = conv.expected(false);
        let (t, c) = (conv.tokens(), conv.channels);
        let (x, dy, w, tail) = (b.floats(&conv.x), b.floats(&conv.dy), b.floats(&conv.w), b.floats(&conv.tails));
        let seqs = b.words(&conv.table());
        for (block, cells) in [(8, 1), (8, 3), (1, 5), (2, 7), (100, 2), (8, 40), (3, 2)] {
            let (dx, dw, part) = (b.poisoned(t * c), b.poisoned(c * 4), b.poisoned(cells * c * 4));
            let stride = c as u32;
            let params = ConvGradParams {
                channels: stride,
                count: conv.lens.len() as u32,
                x_stride: stride,
                x_off: 0,
                dy_stride: stride,
                dy_off: 0,
                dx_stride: stride,
                dx_off: 0,
                block,
                cells: cells as u32,
            };
            let n = 4 * stride;
            let (columns, lanes) = tune::sum_rows(&b.caps);
            b.run(|pass| {
                let args = [&x, &w, &seqs, &tail, &dy, &dx, &part];
                let consts = ConvGradConsts { taps: 4, silu: 1 };
                pass.launch(&CONV_GRAD, consts, params, &args, [2, cells as u32, 1], 1000);
                let params = SumRowsParams { rows: cells as u32, n, x_stride: n, x_off: 0 };
                let consts = SumRowsConsts { columns, lanes };
                pass.launch(&SUM_ROWS, consts, params, &[&part, &dw], [n.div_ceil(columns), 1, 1], 1000);
            });
            let what = format!("blocks of {block} for {cells} cells");
            worst.close(&b, "conv dx", &what, &b.read(&dx), &expected[0]);
            worst.close(&b, "conv dw", &what, &b.read(&dw), &expected[1]);
        }
    }
}

/// da, db, da_log, ddt_bias for ab rows `[a | 1 other | b]` and dab rows `[1 other | db | da]`.
#[allow(clippy::too_many_arguments)]
fn run_gate(
    b: &Bench,
    a: &[f32],
    bb: &[f32],
    a_log: &[f32],
    dt_bias: &[f32],
    dg: &[f32],
    dbeta: &[f32],
) -> [Vec<f32>; 4] {
    let (hv, t) = (a_log.len(), a.len() / a_log.len());
    let row = |(a, b): (&[f32], &[f32])| [a, &[f32::NAN], b].concat();
    let ab: Vec<f32> = a.chunks(hv).zip(bb.chunks(hv)).flat_map(row).collect();
    let ab = Rows::packed(b.floats(&ab), 2 * hv as u64 + 1);
    let dab = Rows::packed(b.poisoned(t * (2 * hv + 1)), 2 * hv as u64 + 1);
    let [a_log, dt_bias, dg, dbeta] = [a_log, dt_bias, dg, dbeta].map(|x| b.floats(x));
    let (da_log, ddt_bias) = (b.poisoned(hv), b.poisoned(hv));
    let of = GateGrad {
        tokens: t as u64,
        hv: hv as u64,
        a: &ab,
        b: &ab.at(hv as u64 + 1),
        a_log: &a_log,
        dt_bias: &dt_bias,
        dg: &dg,
        dbeta: &dbeta,
        da: &dab.at(hv as u64 + 1),
        db: &dab.at(1),
        da_log: &da_log,
        ddt_bias: &ddt_bias,
        scratch: &b.poisoned(ops::gate_grad_scratch(&b.caps, t as u64, hv as u64) as usize / 4),
    };
    b.run(|pass| ops::gate_grad(&b.caps, pass, &of).unwrap());
    let dab = b.read(&dab.view);
    assert!(dab.chunks(2 * hv + 1).all(|row| row[0].is_nan()), "written beside da and db");
    let part = |from: usize| dab.chunks(2 * hv + 1).flat_map(|row| row[from..from + hv].to_vec()).collect();
    [part(hv + 1), part(1), b.read(&da_log), b.read(&ddt_bias)]
}

fn expected_gate(a: &[f32], b: &[f32], a_log: &[f32], dt_bias: &[f32], dg: &[f32], dbeta: &[f32]) -> [Vec<f64>; 4] {
    let hv = a_log.len();
    let mut out = [Vec::new(), Vec::new(), vec![0.0; hv], vec![0.0; hv]];
    for (i, numbers) in a.iter().zip(b).zip(dg).zip(dbeta).enumerate() {
        let (((&a, &b), &dg), &dbeta) = numbers;
        let h = i % hv;
        let [a, b, dg, dbeta, a_log, dt_bias] = [a, b, dg, dbeta, a_log[h], dt_bias[h]].map(f64::from);
        let [da, db, da_log, ddt_bias] = formula::gate(a, b, a_log, dt_bias, dg, dbeta);
        out[0].push(da);
        out[1].push(db);
        out[2][h] += da_log;
        out[3][h] += ddt_bias;
    }
    out
}

const GATE_NAMES: [&str; 4] = ["gate da", "gate db", "gate dA_log", "gate ddt_bias"];

#[test]
fn gate_grad_equals_its_formula() {
    let mut worst = Worst::default();
    for b in benches() {
        for (tokens, hv) in [(1, 1), (37, 3), (300, 16), (129, 48), (20, 70), (1000, 4), (0, 5)] {
            let mut r = Random::new((tokens * 71 + hv) as u64);
            let all = tokens * hv;
            let scaled = |x: Vec<f32>| x.iter().map(|x| 4.0 * x).collect::<Vec<_>>();
            let (a, bb) = (scaled(r.normals(all)), scaled(r.normals(all)));
            let (a_log, dt_bias, dg, dbeta) = (r.normals(hv), r.normals(hv), r.normals(all), r.normals(all));
            let found = run_gate(&b, &a, &bb, &a_log, &dt_bias, &dg, &dbeta);
            let expected = expected_gate(&a, &bb, &a_log, &dt_bias, &dg, &dbeta);
            for i in 0..4 {
                worst.close(&b, GATE_NAMES[i], &format!("{tokens} tokens, {hv} heads"), &found[i], &expected[i]);
            }
        }
    }
}

#[test]
fn gate_grad_at_extreme_arguments() {
    let mut worst = Worst::default();
    let values = [-1e4, -200.0, -90.0, -30.0, -16.0, -3.0, 0.0, 3.0, 16.0, 19.9, 20.1, 30.0, 90.0, 200.0, 1e4];
    let ones = [1.0; 15];
    for b in benches() {
        // Each number alone, so that small ones do not hide behind large ones: one token, 15 heads.
        let found = run_gate(&b, &values, &values, &[0.5; 15], &[0.0; 15], &ones, &ones);
        let expected = expected_gate(&values, &values, &[0.5; 15], &[0.0; 15], &ones, &ones);
        for (i, name) in GATE_NAMES.iter().enumerate() {
            for (h, value) in values.iter().enumerate() {
                // Below the smallest normal f32 there are no digits to hold.
                let tiny = expected[i][h].abs() < 1e-37 && found[i][h].abs() < 1e-37;
                if !tiny {
                    let own = (&found[i][h..=h], &expected[i][h..=h]);
                    worst.within(BOUND_ALONE, &b, name, &format!("{value}"), own.0, own.1);
                }
            }
        }
    }
}

/// A gated norm: o, dy `[t, hv, v]`, z rows of `hv v`, w `[v]`.
struct Norm {
    heads: Heads,
    tokens: usize,
    eps: f32,
    o: Vec<f32>,
    z: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
}

impl Norm {
    fn new(hv: u32, v: u32, tokens: usize, z_size: f32) -> Self {
        let mut r = Random::new((hv * 7 + v) as u64 + tokens as u64);
        let all = tokens * (hv * v) as usize;
        Norm {
            heads: Heads::new(1, hv, 16, v, HeadMap::Div).unwrap(),
            tokens,
            eps: 1e-6,
            // Heads from tiny, where eps counts, to large.
            o: r.normals(all)
                .iter()
                .enumerate()
                .map(|(i, o)| o * 10f32.powi((i / v as usize % 6) as i32 - 4))
                .collect(),
            z: r.normals(all).iter().map(|z| z_size * z).collect(),
            w: r.normals(v as usize),
            dy: r.normals(all),
        }
    }

    fn expected(&self) -> [Vec<f64>; 3] {
        let v = self.w.len();
        let mut out = [Vec::new(), Vec::new(), vec![0.0; v]];
        for i in 0..self.o.len() / v {
            let own = |x: &[f32]| wide(&x[i * v..(i + 1) * v]);
            let [d_o, dz, dw] =
                formula::gated_norm(&own(&self.o), &own(&self.z), &wide(&self.w), &own(&self.dy), self.eps.into());
            out[0].extend(d_o);
            out[1].extend(dz);
            out[2].iter_mut().zip(dw).for_each(|(sum, dw)| *sum += dw);
        }
        out
    }

    fn run(&self, b: &Bench) -> [Vec<f32>; 3] {
        let width = (self.heads.hv * self.heads.v) as usize;
        let [o, w, dy] = [&self.o, &self.w, &self.dy].map(|x| b.floats(x));
        let z = rows(b.floats(&spread(&self.z, width)), width);
        let dz = rows(b.poisoned(self.tokens * (width + GAP[0] + GAP[1])), width);
        let (d_o, dw) = (b.poisoned(self.o.len()), b.poisoned(self.w.len()));
        let scratch = ops::gated_norm_grad_scratch(&b.caps, &self.heads, self.tokens as u64) as usize / 4;
        let of = GatedNormGrad {
            heads: self.heads,
            tokens: self.tokens as u64,
            eps: self.eps,
            o: &o,
            z: &z,
            w: &w,
            dy: &dy,
            d_o: &d_o,
            dz: &dz,
            dw: &dw,
            scratch: &b.poisoned(scratch),
        };
        b.run(|pass| ops::gated_norm_grad(&b.caps, pass, &of).unwrap());
        [b.read(&d_o), gather(&b.read(&dz.view), width), b.read(&dw)]
    }
}

fn norms() -> Vec<Norm> {
    vec![
        Norm::new(1, 16, 1, 1.0),
        Norm::new(3, 80, 37, 1.0),
        Norm::new(16, 128, 30, 1.0),
        Norm::new(4, 256, 9, 1.0),
        Norm::new(5, 208, 8, 100.0),
        Norm::new(48, 128, 5, 2000.0),
        Norm::new(2, 128, 0, 1.0),
    ]
}

#[test]
fn gated_norm_grad_equals_its_formula() {
    let mut worst = Worst::default();
    for b in benches() {
        for norm in norms() {
            let what = format!("{} tokens, {:?}", norm.tokens, norm.heads);
            let (found, expected) = (norm.run(&b), norm.expected());
            assert_eq!(found[0].len(), expected[0].len(), "{what}");
            let v = norm.w.len();
            // Head by head: do of a tiny head is large and would hide the others' errors.
            for ((d_o, exact), i) in found[0].chunks(v).zip(expected[0].chunks(v)).zip(0..) {
                worst.close(&b, "gated_norm do", &format!("head {i} of {what}"), d_o, exact);
            }
            worst.close(&b, "gated_norm dz", &what, &found[1], &expected[1]);
            worst.close(&b, "gated_norm dw", &what, &found[2], &expected[2]);
        }
    }
}

#[test]
fn sum_rows_sums_any_columns() {
    for b in benches() {
        let (columns, lanes) = tune::sum_rows(&b.caps);
        for (rows, n, off, more) in [(0, 5, 0, 0), (1, 1, 0, 0), (5, 17, 2, 3), (300, 300, 0, 1), (33, 16, 7, 0)] {
            let stride = off + n + more;
            let x: Vec<f32> = Random::new(n as u64).normals(rows * stride);
            let (view, y) = (b.floats(&x), b.poisoned(n));
            b.run(|pass| {
                let params =
                    SumRowsParams { rows: rows as u32, n: n as u32, x_stride: stride as u32, x_off: off as u32 };
                let grid = [(n as u32).div_ceil(columns), 1, 1];
                pass.launch(&SUM_ROWS, SumRowsConsts { columns, lanes }, params, &[&view, &y], grid, 100);
            });
            let sum = |c: usize| (0..rows).map(|r| f64::from(x[r * stride + off + c])).sum();
            let expected: Vec<f64> = (0..n).map(sum).collect();
            let e = error(&b.read(&y), &expected);
            assert!(e <= BOUND, "{} {rows} rows, {n} columns: {e:e}", b.name);
        }
    }
}

/// All gradients of one set of inputs.
fn everything(b: &Bench) -> Vec<u32> {
    let conv = Conv::new(100, 4, true, &[300, 0, 2, 77], 1.0);
    let norm = Norm::new(8, 128, 100, 1.0);
    let mut r = Random::new(9);
    let (hv, all) = (12, 12 * 400);
    let [a, bb, dg, dbeta] = [0; 4].map(|_| r.normals(all));
    let gates = run_gate(b, &a, &bb, &r.normals(hv), &r.normals(hv), &dg, &dbeta);
    let mut tensors: Vec<Vec<f32>> = gates.into();
    tensors.extend(norm.run(b));
    tensors.extend(conv.run(b, true, true));
    bits(&tensors.concat())
}

#[test]
fn same_inputs_same_bits() {
    for b in benches() {
        let first = everything(&b);
        for _ in 0..2 {
            assert!(first == everything(&b), "{} gave other bits", b.name);
        }
    }
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let bench = |threads: usize| {
        let backend = Arc::new(Cpu::new(Some(threads)).unwrap());
        Bench {
            name: format!("{threads} threads"),
            caps: gatedelta::backend::Backend::caps(&*backend).clone(),
            backend,
        }
    };
    let one = everything(&bench(1));
    for threads in [2, 3, 16] {
        assert!(one == everything(&bench(threads)), "{threads} threads gave other bits than one");
    }
}

#[test]
fn nan_stays_in_its_sequence() {
    for b in benches() {
        let mut conv = Conv::new(10, 4, true, &[8, 6, 200], 1.0);
        // Token 2 of the second sequence.
        conv.dy[10 * 10 + 3] = f32::NAN;
        let [dx, dw, dtails] = conv.run(&b, true, true);
        for (i, x) in dx.iter().enumerate() {
            // dx of tokens -1 to 2 of the sequence depends on it; token -1 is in the tail.
            assert_eq!(x.is_nan(), (8..=10).contains(&(i / 10)) && i % 10 == 3, "{}: token {}", b.name, i / 10);
        }
        for (i, x) in dtails[conv.slot(1)].iter().enumerate() {
            assert_eq!(x.is_nan(), i == 2 * 10 + 3, "{}: tail {i}", b.name);
        }
        assert!(dw.iter().enumerate().all(|(i, x)| x.is_nan() == (i / 4 == 3)), "{}", b.name);
    }
}
