//! A small test with known answers that a device must pass before it is trusted.
//!
//! All keys of a sequence are one unit vector `e`, so its state is `e x^T` and the operator becomes one scalar recurrence
//! per column of v, whatever the chunking: `x <- exp(g) (1 - beta) x + beta v`, `o = s (e . q) x`. Every part of the chunked
//! form still takes part: the products of keys are all 1, so the triangular inverse is full.

use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::gdn::{self, Inputs, Options};
use crate::ops;
use crate::pass::{Pass, Rows};
use crate::shape::{Dtype, HeadMap, Heads, Shape};

/// The largest relative error that passes. Right kernels show about 1e-7, broken ones about 1.
const BOUND: f64 = 1e-4;

/// Runs the self-test; how long it took, with the compilation of its kernels.
///
/// # Errors
/// [`Error::Device`] with the figure if an answer is wrong, and whatever the device reports.
pub fn run(backend: &dyn Backend) -> Result<Duration> {
    let begin = Instant::now();
    prefill_and_decode(backend)?;
    linear(backend)?;
    Ok(begin.elapsed())
}

/// Numbers in [-1, 1) that follow from their index.
fn number(i: usize) -> f32 {
    ((i as u32).wrapping_mul(2_654_435_761) >> 16) as f32 / 32768.0 - 1.0
}

fn judge(backend: &dyn Backend, what: &str, found: &[f32], expected: &[f64]) -> Result<()> {
    let norm: f64 = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let diff: f64 = found.iter().zip(expected).map(|(&f, &e)| (f64::from(f) - e).powi(2)).sum::<f64>().sqrt();
    let error = diff / norm;
    // NaN must fail, so the test asks for "within", not for "beyond".
    if found.len() == expected.len() && error <= BOUND {
        return Ok(());
    }
    Err(Error::Device {
        device: backend.caps().name.clone(),
        why: format!("self-test of {what} failed: relative error {error:.1e}, at most {BOUND:.0e} expected"),
    })
}

fn prefill_and_decode(backend: &dyn Backend) -> Result<()> {
    let heads = Heads::new(1, 2, 32, 32, HeadMap::Div)?;
    let (dk, dv, hv) = (32, 32, 2);
    for (lens, decode) in [(&[70u64, 0, 5][..], false), (&[1, 3, 2], true)] {
        let cu: Vec<u64> = std::iter::once(0)
            .chain(lens.iter().scan(0, |t, n| {
                *t += n;
                Some(*t)
            }))
            .collect();
        let t = cu[cu.len() - 1] as usize;
        let unit = (dk as f32).powf(-0.5);
        let q: Vec<f32> = (0..t * dk).map(number).collect();
        let k = vec![unit; t * dk];
        let v: Vec<f32> = (0..t * hv * dv).map(|i| number(i + 7)).collect();
        let g: Vec<f32> = (0..t * hv).map(|i| -0.3 * number(i + 3).abs()).collect();
        let beta: Vec<f32> = (0..t * hv).map(|i| number(i + 5).abs()).collect();
        let inputs = Inputs {
            shape: Shape::new(heads, cu.clone())?,
            q: &q,
            k: &k,
            v: &v,
            g: &g,
            beta: &beta,
            h0: None,
            options: Options { scale: Some(1.0), ..Options::default() },
        };
        let out = if decode { gdn::decode(backend, &inputs)? } else { gdn::prefill(backend, &inputs)? };

        let mut o = vec![0.0; v.len()];
        let mut ht = vec![0.0; (cu.len() - 1) * hv * dk * dv];
        for n in 0..cu.len() - 1 {
            for h in 0..hv {
                let mut x = vec![0.0f64; dv];
                for t in cu[n] as usize..cu[n + 1] as usize {
                    let eq: f64 = q[t * dk..][..dk].iter().map(|&q| f64::from(q) * f64::from(unit)).sum();
                    let (decay, beta) = (f64::from(g[t * hv + h]).exp(), f64::from(beta[t * hv + h]));
                    for (j, x) in x.iter_mut().enumerate() {
                        *x = decay * (1.0 - beta) * *x + beta * f64::from(v[(t * hv + h) * dv + j]);
                        o[(t * hv + h) * dv + j] = eq * *x;
                    }
                }
                for (i, s) in ht[(n * hv + h) * dk * dv..][..dk * dv].iter_mut().enumerate() {
                    *s = f64::from(unit) * x[i % dv];
                }
            }
        }
        let what = if decode { "decode" } else { "prefill" };
        judge(backend, what, &out.o, &o)?;
        judge(backend, &format!("the state after {what}"), &out.ht, &ht)?;
    }
    Ok(())
}

/// One product of many rows and one of a single row, bf16 weights.
fn linear(backend: &dyn Backend) -> Result<()> {
    let (n, k) = (40, 64);
    let w: Vec<half::bf16> = (0..n * k).map(|i| half::bf16::from_f32(number(i))).collect();
    for m in [1usize, 33] {
        let x: Vec<f32> = (0..m * k).map(|i| number(i + 11)).collect();
        let put = |what: &str, bytes: &[u8]| -> Result<crate::backend::View> {
            let buffer = backend.alloc(what, bytes.len() as u64)?;
            backend.write(&buffer.view(), bytes)?;
            Ok(buffer.view())
        };
        let caps = backend.caps();
        let weight = put("w", bytemuck::cast_slice(&w))?;
        let weight = ops::Weight::new(caps, Dtype::Bf16, n as u64, k as u64, &weight)?;
        let rows = Rows::packed(put("x", bytemuck::cast_slice(&x))?, k as u64);
        let y = put("y", &vec![0xff; m * n * 4])?;
        let mut pass = Pass::new();
        ops::linear(caps, &mut pass, &rows, &weight, &Rows::packed(y.clone(), n as u64), m as u64, false)?;
        backend.run(&pass)?;
        let found: Vec<f32> = backend.read(&y)?.wait_as()?;
        let dot = |i: usize, j: usize| -> f64 {
            (0..k).map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l].to_f32())).sum()
        };
        let expected: Vec<f64> = (0..m * n).map(|i| dot(i / n, i % n)).collect();
        judge(backend, &format!("a product of {m} rows"), &found, &expected)?;
    }
    Ok(())
}
