//! Gradients around the operator: every bad argument is refused by its name.

use gatedelta::backend::View;
use gatedelta::kernel::grad::*;
use gatedelta::ops::{self, ConvGrad, GateGrad, GatedNormGrad, Seqs};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{HeadMap, Heads};
use gatedelta::tune::Caps;

use crate::ops::{assert_names, benches};

#[test]
fn conv_grad_names_what_is_wrong() {
    for b in benches() {
        let (caps, pass) = (&b.caps, &mut Pass::new());
        let at = |n: usize| b.poisoned(n);
        let table = b.words(&[0, 5, 0, 0, 5, 3, 1, 0]);
        let seqs = Seqs { table: &table, count: 2, tokens: 8, longest: 5, slots: 2 };
        let scratch = ops::conv_grad_scratch(caps, &seqs, 6, 4) as usize / 4;
        let (r, w, tails, part) = (Rows::packed(at(48), 6), at(24), at(36), at(scratch));
        let (short_r, narrow) = (Rows::packed(at(47), 6), Rows::packed(at(48), 5));
        let (short_w, short_tails, short_part) = (at(23), at(35), at(scratch - 1));
        let (dx, dw, dtail) = (Rows::packed(at(48), 6), at(24), at(36));
        let good = ConvGrad {
            channels: 6,
            taps: 4,
            silu: true,
            seqs,
            x: &r,
            w: &w,
            tail: &tails,
            dy: &r,
            dtail_out: Some(&tails),
            dx: &dx,
            dw: &dw,
            dtail: Some(&dtail),
            scratch: &part,
        };
        ops::conv_grad(caps, pass, &good).unwrap();
        let huge = Rows { view: at(48), off: u64::MAX, stride: 6 };
        let bad = [
            ("x", ConvGrad { x: &short_r, ..good }),
            ("x: stride", ConvGrad { x: &narrow, ..good }),
            ("w", ConvGrad { w: &short_w, ..good }),
            ("tail", ConvGrad { tail: &short_tails, ..good }),
            ("dy", ConvGrad { dy: &short_r, ..good }),
            ("dy: offset", ConvGrad { dy: &huge, ..good }),
            ("dtail_out", ConvGrad { dtail_out: Some(&short_tails), ..good }),
            ("dx", ConvGrad { dx: &short_r, ..good }),
            ("dx: stride", ConvGrad { dx: &narrow, ..good }),
            ("dw", ConvGrad { dw: &short_w, ..good }),
            ("dtail", ConvGrad { dtail: Some(&short_tails), ..good }),
            ("scratch", ConvGrad { scratch: &short_part, ..good }),
            ("taps", ConvGrad { taps: 9, ..good }),
            ("taps", ConvGrad { taps: 1, ..good }),
            ("channels", ConvGrad { channels: 0, ..good }),
            ("slots", ConvGrad { seqs: Seqs { slots: 0, ..seqs }, ..good }),
            ("seqs", ConvGrad { seqs: Seqs { count: 3, ..seqs }, ..good }),
            ("seqs", ConvGrad { seqs: Seqs { count: u64::MAX, ..seqs }, ..good }),
        ];
        for (what, of) in &bad {
            assert_names(ops::conv_grad(caps, pass, of), what);
        }
        assert_names(ops::conv_grad(caps, pass, &ConvGrad { channels: u64::MAX, ..good }), "x");
        assert!(ops::conv_grad_scratch(caps, &seqs, u64::MAX, 8) > 0);
        let off = View { offset: 2, bytes: part.bytes - 2, ..part.clone() };
        assert_names(ops::conv_grad(caps, pass, &ConvGrad { scratch: &off, ..good }), "scratch");
        let small = Caps { max_binding: 100, ..caps.clone() };
        assert_names(ops::conv_grad(&small, pass, &good), "x of 192 bytes");
    }
}

#[test]
fn gate_grad_names_what_is_wrong() {
    for b in benches() {
        let (caps, pass) = (&b.caps, &mut Pass::new());
        let at = |n: usize| b.poisoned(n);
        let (ab, dab) = (Rows::packed(at(50), 10), Rows::packed(at(50), 10));
        let (bb, db, other) = (ab.at(4), dab.at(4), Rows::packed(at(50), 10));
        let (overlap, wrapped) = (dab.at(3), Rows::packed(at(80), 7));
        let (wrapped_b, beyond) = (wrapped.at(4), dab.at(7));
        let (four, three, all, short) = (at(4), at(3), at(20), at(19));
        let n = ops::gate_grad_scratch(caps, 5, 4) as usize / 4;
        let (part, short_part) = (at(n), at(n - 1));
        let good = GateGrad {
            tokens: 5,
            hv: 4,
            a: &ab,
            b: &bb,
            a_log: &four,
            dt_bias: &four,
            dg: &all,
            dbeta: &all,
            da: &dab,
            db: &db,
            da_log: &at(4),
            ddt_bias: &at(4),
            scratch: &part,
        };
        ops::gate_grad(caps, pass, &good).unwrap();
        let bad = [
            ("b", GateGrad { b: &other, ..good }),
            ("db", GateGrad { db: &other, ..good }),
            ("db", GateGrad { db: &overlap, ..good }),
            ("db", GateGrad { db: &dab, ..good }),
            ("db", GateGrad { da: &wrapped, db: &wrapped_b, ..good }),
            ("db", GateGrad { db: &beyond, ..good }),
            ("a_log", GateGrad { a_log: &three, ..good }),
            ("dt_bias", GateGrad { dt_bias: &three, ..good }),
            ("dg", GateGrad { dg: &short, ..good }),
            ("dbeta", GateGrad { dbeta: &short, ..good }),
            ("da_log", GateGrad { da_log: &three, ..good }),
            ("ddt_bias", GateGrad { ddt_bias: &three, ..good }),
            ("scratch", GateGrad { scratch: &short_part, ..good }),
            ("hv", GateGrad { hv: 0, ..good }),
        ];
        for (what, of) in &bad {
            assert_names(ops::gate_grad(caps, pass, of), what);
        }
        assert!(ops::gate_grad(caps, pass, &GateGrad { tokens: u64::MAX, ..good }).is_err());
        assert!(ops::gate_grad(caps, pass, &GateGrad { hv: u64::MAX, ..good }).is_err());
        assert!(ops::gate_grad_scratch(caps, u64::MAX, u64::MAX) > 0);
    }
}

#[test]
fn gated_norm_grad_names_what_is_wrong() {
    for b in benches() {
        let (caps, pass) = (&b.caps, &mut Pass::new());
        let at = |n: usize| b.poisoned(n);
        let heads = Heads::new(1, 2, 16, 16, HeadMap::Div).unwrap();
        let (all, short, sixteen, fifteen) = (at(96), at(95), at(16), at(15));
        let (z, short_z, narrow) = (Rows::packed(at(96), 32), Rows::packed(at(95), 32), Rows::packed(at(96), 31));
        let n = ops::gated_norm_grad_scratch(caps, &heads, 3) as usize / 4;
        let (part, short_part) = (at(n), at(n - 1));
        let good = GatedNormGrad {
            heads,
            tokens: 3,
            eps: 1e-6,
            o: &all,
            z: &z,
            w: &sixteen,
            dy: &all,
            d_o: &at(96),
            dz: &Rows::packed(at(96), 32),
            dw: &at(16),
            scratch: &part,
        };
        ops::gated_norm_grad(caps, pass, &good).unwrap();
        let bad = [
            ("o", GatedNormGrad { o: &short, ..good }),
            ("z", GatedNormGrad { z: &short_z, ..good }),
            ("z: stride", GatedNormGrad { z: &narrow, ..good }),
            ("w", GatedNormGrad { w: &fifteen, ..good }),
            ("dy", GatedNormGrad { dy: &short, ..good }),
            ("d_o", GatedNormGrad { d_o: &short, ..good }),
            ("dz", GatedNormGrad { dz: &short_z, ..good }),
            ("dz: stride", GatedNormGrad { dz: &narrow, ..good }),
            ("dw", GatedNormGrad { dw: &fifteen, ..good }),
            ("scratch", GatedNormGrad { scratch: &short_part, ..good }),
        ];
        for (what, of) in &bad {
            assert_names(ops::gated_norm_grad(caps, pass, of), what);
        }
        assert!(ops::gated_norm_grad(caps, pass, &GatedNormGrad { tokens: u64::MAX, ..good }).is_err());
        assert!(ops::gated_norm_grad_scratch(caps, &heads, u64::MAX) > 0);
    }
}

/// Tables and numbers that no recorder makes: the CPU refuses them before a cell runs.
#[test]
fn the_cpu_refuses_bad_tables_and_numbers() {
    let b = &benches()[0];
    let run = |seqs: &[u32], taps: u32, change: &dyn Fn(&mut ConvGradParams), grid: [u32; 3]| {
        let count = seqs.len() as u32 / 4;
        let mut params = ConvGradParams {
            channels: 8,
            count,
            x_stride: 8,
            x_off: 0,
            dy_stride: 8,
            dy_off: 0,
            dx_stride: 8,
            dx_off: 0,
            block: 4,
            cells: 2,
        };
        change(&mut params);
        let seqs = b.words(seqs);
        let (x, w, tail, dx, part) =
            (b.floats(&[1.0; 80]), b.floats(&[1.0; 32]), b.floats(&[0.0; 48]), b.poisoned(80), b.poisoned(64));
        let (both, dtail) = (ConvTailGradConsts { taps, silu: 1, add: 1, store: 1 }, b.poisoned(48));
        let one = |launch: &dyn Fn(&mut Pass)| {
            let mut pass = Pass::new();
            launch(&mut pass);
            b.backend.run(&pass)
        };
        let args = [&x, &w, &seqs, &tail, &x, &dx, &part];
        let first = one(&|p| p.launch(&CONV_GRAD, ConvGradConsts { taps, silu: 1 }, params, &args, grid, 1));
        let args = [&x, &w, &seqs, &tail, &x, &tail, &dx, &dtail];
        let second = one(&|p| p.launch(&CONV_TAIL_GRAD, both, params, &args, [1, count, 1], 1));
        (first, second)
    };
    let same = |_: &mut ConvGradParams| {};
    let grid = [1, 2, 1];
    let good = run(&[0, 4, 1, 0, 4, 6, 0, 0], 4, &same, grid);
    good.0.unwrap();
    good.1.unwrap();
    for (seqs, says) in [
        (&[0, 11, 0, 0][..], "seqs[0]"),
        (&[u32::MAX, 1, 0, 0], "seqs[0]"),
        (&[0, 4, 2, 0], "slot"),
        (&[0, 4, 1, 0, 4, 4, 1, 0], "1 twice"),
        (&[0, 4, 1, 0, 3, 4, 0, 0], "share nothing"),
    ] {
        let (first, second) = run(seqs, 4, &same, grid);
        assert_names(first, says);
        assert_names(second, says);
    }
    assert_names(run(&[0, 4, 0, 0], 9, &same, grid).0, "taps");
    assert_names(run(&[0, 4, 0, 0], 4, &same, [1, 3, 1]).0, "grid");
    assert_names(run(&[0, 4, 0, 0], 4, &|p| p.block = 0, grid).0, "block");
    assert_names(run(&[0, 4, 0, 0], 4, &|p| p.cells = 0, grid).0, "cells");
    assert_names(run(&[0, 4, 0, 0], 4, &|p| p.cells = 3, [1, 3, 1]).0, "part");
    assert_names(run(&[0, 4, 0, 0], 4, &|p| p.dx_stride = 7, grid).0, "dx stride");
    assert_names(run(&[0, 4, 0, 0], 4, &|p| p.x_off = 80, grid).0, "seqs[0]");
    assert_names(run(&[0, 4, 0, 0], 4, &|p| p.channels = 0, grid).0, "channels");

    let (x, part, dab) = (b.floats(&[1.0; 40]), b.poisoned(40), b.poisoned(40));
    let gate = |hv: u32, block: u32, d_stride: u32, db_off: u32, grid: [u32; 3]| {
        let mut pass = Pass::new();
        let params =
            GateGradParams { tokens: 5, hv, stride: 4, a_off: 0, b_off: 2, d_stride, da_off: 0, db_off, block };
        let args = [&x, &x, &x, &x, &x, &dab, &part];
        pass.launch(&GATE_GRAD, GateGradConsts { lanes: 1 }, params, &args, grid, 1);
        b.backend.run(&pass)
    };
    gate(2, 3, 4, 2, [2, 2, 1]).unwrap();
    assert_names(gate(0, 3, 4, 2, [2, 2, 1]), "hv");
    assert_names(gate(2, 0, 4, 2, [2, 2, 1]), "block");
    assert_names(gate(2, 3, 4, 1, [2, 2, 1]), "d_stride");
    assert_names(gate(2, 3, 3, 2, [2, 2, 1]), "d_stride");
    assert_names(gate(2, 3, 4, 2, [2, 3, 1]), "grid");
    assert_names(gate(2, 3, 12, 2, [2, 2, 1]), "dab");

    let norm = |block: u32, dz_stride: u32, grid: [u32; 3]| {
        let mut pass = Pass::new();
        let params =
            GatedNormGradParams { hv: 2, tokens: 3, z_stride: 6, z_off: 0, dz_stride, dz_off: 0, block, eps: 0.1 };
        let (d_o, consts) = (b.poisoned(18), GatedNormGradConsts { dv: 3, lanes: 1 });
        let args = [&x, &x, &x, &x, &d_o, &dab, &part];
        pass.launch(&GATED_NORM_GRAD, consts, params, &args, grid, 1);
        b.backend.run(&pass)
    };
    norm(4, 6, [2, 1, 1]).unwrap();
    assert_names(norm(0, 6, [2, 1, 1]), "block");
    assert_names(norm(4, 5, [2, 1, 1]), "dz_stride");
    assert_names(norm(4, 6, [3, 1, 1]), "grid");
    assert_names(norm(4, 20, [2, 1, 1]), "dz");
}
