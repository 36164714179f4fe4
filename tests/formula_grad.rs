//! Gradients of what surrounds the operator as plain formulas in float64, themselves held against finite differences of the
//! forward formulas.

use crate::formula::{self, sigmoid, silu};
use crate::util::Random;

/// Derivative of SiLU.
pub fn silu_slope(x: f64) -> f64 {
    sigmoid(x) * (1.0 + x * sigmoid(-x))
}

/// Gradients of `formula::conv` from dy `[t, channels]` and dtail_out `[taps - 1, channels]`: dx, dw, dtail.
#[allow(clippy::too_many_arguments)]
pub fn conv(
    x: &[f64],
    w: &[f64],
    tail: &[f64],
    dy: &[f64],
    dtail_out: &[f64],
    channels: usize,
    taps: usize,
    with_silu: bool,
) -> [Vec<f64>; 3] {
    let all = [tail, x].concat();
    let t = x.len() / channels;
    let mut dall = [vec![0.0; x.len()], dtail_out.to_vec()].concat();
    let mut dw = vec![0.0; w.len()];
    for i in 0..t {
        for c in 0..channels {
            let p: f64 = (0..taps).map(|j| w[c * taps + j] * all[(i + j) * channels + c]).sum();
            let dp = dy[i * channels + c] * if with_silu { silu_slope(p) } else { 1.0 };
            for j in 0..taps {
                dall[(i + j) * channels + c] += w[c * taps + j] * dp;
                dw[c * taps + j] += dp * all[(i + j) * channels + c];
            }
        }
    }
    let dx = dall.split_off(tail.len());
    [dx, dw, dall]
}

/// Gradients of `formula::gate` of one number each from dg and dbeta: da, db, dA_log, ddt_bias.
pub fn gate(a: f64, b: f64, a_log: f64, dt_bias: f64, dg: f64, dbeta: f64) -> [f64; 4] {
    let (g, beta) = formula::gate(a, b, a_log, dt_bias);
    let x = a + dt_bias;
    let da = -a_log.exp() * if x > 20.0 { 1.0 } else { sigmoid(x) } * dg;
    [da, beta * sigmoid(-b) * dbeta, g * dg, da]
}

/// Gradients of `formula::gated_norm` of one head from dy: do, dz, dw.
pub fn gated_norm(o: &[f64], z: &[f64], w: &[f64], dy: &[f64], eps: f64) -> [Vec<f64>; 3] {
    let n = o.len();
    let mean = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
    let r = 1.0 / (mean(&|i| o[i] * o[i]) + eps).sqrt();
    let u = |i: usize| dy[i] * w[i] * silu(z[i]);
    let pull = mean(&|i| o[i] * u(i));
    [
        (0..n).map(|i| r * u(i) - r.powi(3) * pull * o[i]).collect(),
        (0..n).map(|i| dy[i] * w[i] * o[i] * r * silu_slope(z[i])).collect(),
        (0..n).map(|i| dy[i] * o[i] * r * silu(z[i])).collect(),
    ]
}

/// The gradient of `loss` at `x`, by central differences.
fn central(x: &[f64], loss: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut at = x.to_vec();
    (0..x.len())
        .map(|i| {
            let h = 1e-5 * (1.0 + x[i].abs());
            let mut side = |to: f64| {
                at[i] = to;
                loss(&at)
            };
            let slope = (side(x[i] + h) - side(x[i] - h)) / (2.0 * h);
            at[i] = x[i];
            slope
        })
        .collect()
}

#[track_caller]
fn agree(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    let error = apart / norm(&mut expected.iter().copied()).max(1e-3);
    assert!(error < 1e-8, "{what}: {error:e}");
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn normals(r: &mut Random, n: usize) -> Vec<f64> {
    r.normals(n).into_iter().map(f64::from).collect()
}

#[test]
fn conv_equals_finite_differences() {
    let mut r = Random::new(1);
    for (channels, taps, t, with_silu) in [(3, 4, 9, true), (2, 8, 3, true), (5, 2, 6, false), (4, 3, 0, true)] {
        let (x, w) = (normals(&mut r, t * channels), normals(&mut r, channels * taps));
        let (tail, dtail_out) = (normals(&mut r, (taps - 1) * channels), normals(&mut r, (taps - 1) * channels));
        let dy = normals(&mut r, t * channels);
        let loss = |x: &[f64], w: &[f64], tail: &[f64]| {
            let (y, tail) = formula::conv(x, w, tail, channels, taps, with_silu);
            dot(&y, &dy) + dot(&tail, &dtail_out)
        };
        let [dx, dw, dtail] = conv(&x, &w, &tail, &dy, &dtail_out, channels, taps, with_silu);
        agree("dx", &dx, &central(&x, |x| loss(x, &w, &tail)));
        agree("dw", &dw, &central(&w, |w| loss(&x, w, &tail)));
        agree("dtail", &dtail, &central(&tail, |tail| loss(&x, &w, tail)));
    }
}

#[test]
fn gate_equals_finite_differences() {
    let mut r = Random::new(2);
    for a in [-30.0, -2.0, 0.0, 0.7, 15.0, 25.0, 1000.0] {
        let at = [a, 3.0 * f64::from(r.normal()), f64::from(r.normal()), f64::from(r.normal())];
        let (dg, dbeta) = (f64::from(r.normal()), f64::from(r.normal()));
        let loss = |x: &[f64]| {
            let (g, beta) = formula::gate(x[0], x[1], x[2], x[3]);
            dg * g + dbeta * beta
        };
        agree(&format!("gate at {a}"), &gate(at[0], at[1], at[2], at[3], dg, dbeta), &central(&at, loss));
    }
}

#[test]
fn gated_norm_equals_finite_differences() {
    let mut r = Random::new(3);
    for (n, size) in [(16, 1.0), (7, 1e-2), (1, 3.0), (16, 1e-4)] {
        let o: Vec<f64> = normals(&mut r, n).iter().map(|o| size * o).collect();
        let (z, w, dy) = (normals(&mut r, n), normals(&mut r, n), normals(&mut r, n));
        // A mean square as small as eps has its own slope.
        let eps = size * size * 0.1;
        let loss = |o: &[f64], z: &[f64], w: &[f64]| dot(&formula::gated_norm(o, z, w, eps), &dy);
        let [d_o, dz, dw] = gated_norm(&o, &z, &w, &dy, eps);
        let scaled: Vec<f64> = o.iter().map(|o| o / size).collect();
        let by_size = |o: &[f64]| o.iter().map(|o| o * size).collect::<Vec<_>>();
        let expected: Vec<f64> = central(&scaled, |o| loss(&by_size(o), &z, &w)).iter().map(|d| d / size).collect();
        agree("do", &d_o, &expected);
        agree("dz", &dz, &central(&z, |z| loss(&o, z, &w)));
        agree("dw", &dw, &central(&w, |w| loss(&o, &z, w)));
    }
}
