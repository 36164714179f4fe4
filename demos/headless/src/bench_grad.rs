//! Times the backward pass of a prefill.
//!
//! Checked like the other rows, before it is timed and with the recording that is timed: the gradient of o is zero after the
//! first tokens and that of the state is zero, so that the gradients at those tokens are the ones of these tokens alone. They
//! are compared with the float64 adjoint on two key heads and the value heads that share them; all others there must be
//! numbers, and all gradients of later tokens must be zero. The times are then taken with a gradient at every token.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use gatedelta::backend::{Backend, View};
use gatedelta::gdn::{Backward, GradIo, Options};
use gatedelta::kernel::Kernel;
use gatedelta::kernel::gdn::PREPARE;
use gatedelta::kernel::gdn_grad::GRAD_CHUNK;
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, Heads, Shape};
use gatedelta::tune;

use crate::bench_op::{Row, What, fill, loaded, of_head, repeat, stored};
use crate::case::Case;
use crate::{grads, oracle, oracle_grad, timing};

/// Tokens that are compared with the float64 adjoint.
const CHECKED_TOKENS: u64 = 512;

/// Checks and times the backward pass over one sequence of so many tokens.
///
/// # Errors
/// Whatever the device reports, and a gradient that is not right.
pub fn row(backend: &dyn Backend, tokens: u64, heads: Heads, options: Options, budget: Duration) -> Result<Row> {
    let store = options.store;
    let shape = Shape::one(heads, tokens);
    let mut block = oracle::inputs("bench", Shape::one(heads, tokens.min(CHECKED_TOKENS)), false, true, 7);
    block.cotangents = Some(oracle_grad::cotangents(&block, 8));
    let memory = Memory::new(backend, &shape, store, &mut block)?;
    let stride = (heads.hk as u64 * heads.k as u64).max(heads.hv as u64 * heads.v as u64);
    let mut pass = Pass::new();
    Backward::new(backend, &shape, &options, stride)?.record(&mut pass, &memory.io)?;
    backend.load(&pass)?;
    backend.run(&pass)?;
    let (error, bound) = (memory.check(backend, &block, store)?, grads::bound(store));
    ensure!(error <= bound, "a gradient is wrong: relative error {error:.1e}, bound {bound:.0e}");

    let d_o = &block.cotangents.as_ref().context("benchmark inputs have cotangents")?.d_o;
    repeat(backend, &memory.io.d_o.view, &stored(d_o, store))?;
    let sample = timing::pass(backend, &pass, budget)?;
    let (flops, bytes) = cost(backend, &pass, &heads, tokens, store);
    Ok(Row { what: What::Backward(tokens), heads, error, sample, flops, bytes })
}

/// Operations of what is run, counting whole tiles, and bytes of inputs, gradients and states.
///
/// Products of a chunk (see [`gatedelta::kernel::gdn_grad`]):
/// ```text
/// gdn_prepare     per key head: C K C: Q K^T, K K^T      per value head: the inverse, C C C / 3
/// gdn_scan        C K V: K S, K^T N                      C C V: B W
/// gdn_grad_scan   C K V: K dS', K^T dV, Q^T Z            C C V: P^T dO, B^T dN
/// gdn_grad_chunk                                         C C V: dO N^T, X N^T
/// gdn_grad_qk     C K V: Z S^T, N dS'^T, dV S^T          C C K: P K, P^T Q, R K
/// ```
/// The first two rows run once to save the states, and once more before that where the pass does not keep all states: the
/// recording says over how many chunks each runs.
fn cost(backend: &dyn Backend, pass: &Pass, heads: &Heads, tokens: u64, store: Dtype) -> (f64, f64) {
    let (hk, hv, k, v) = (heads.hk as f64, heads.hv as f64, heads.k as f64, heads.v as f64);
    let c = tune::tile(backend.caps(), heads).chunk as f64;
    let chunks = |row: &Kernel| -> f64 {
        let launches = pass.launches.iter().filter(|launch| launch.kernel.name == row.name);
        launches.map(|launch| launch.grid[0] as f64).sum()
    };
    let (ckv, ccv, cck) = (2.0 * c * k * v, 2.0 * c * c * v, 2.0 * c * c * k);
    let forward = hk * 2.0 * cck + hv * (2.0 * c * c * c / 3.0 + 2.0 * ckv + ccv);
    let back = hv * (6.0 * ckv + 4.0 * ccv + 3.0 * cck);
    // q, k, v, do and dq, dk, dv; g, beta and dg, dbeta; h0, dht and dh0.
    let token_bytes = (4.0 * hk * k + 3.0 * hv * v) * store.size() as f64 + 16.0 * hv;
    let bytes = tokens as f64 * token_bytes + 12.0 * heads.state_len() as f64;
    (chunks(&PREPARE) * forward + chunks(&GRAD_CHUNK) * back, bytes)
}

/// Device memory of the row.
struct Memory {
    io: GradIo,
}

impl Memory {
    /// Inputs repeat after those of the block; the gradient of o is zero there.
    fn new(backend: &dyn Backend, shape: &Shape, store: Dtype, block: &mut Case) -> Result<Memory> {
        let (tokens, heads) = (shape.tokens(), &shape.heads);
        let (qk, vo, gates) = (heads.hk as u64 * heads.k as u64, heads.hv as u64 * heads.v as u64, heads.hv as u64);
        let rows = |name: &str, values: &[f32], width: u64| -> Result<Rows> {
            Ok(Rows::packed(fill(backend, name, values, tokens * width, store)?, width))
        };
        let floats = |name: &str, values: &[f32], numbers: u64| fill(backend, name, values, numbers, Dtype::F32);
        let cotangents = block.cotangents.as_mut().context("benchmark inputs have cotangents")?;
        cotangents.dht = None;
        let d_o = rows("do", &[0.0; 4096], vo)?;
        let head = stored(&cotangents.d_o, store);
        backend.write(&d_o.view.slice(0, head.len() as u64)?, &head)?;
        let h0 = block.h0.as_deref().context("benchmark inputs have initial states")?;
        let nan = [f32::NAN; 4096];
        let io = GradIo {
            q: rows("q", &block.q, qk)?,
            k: rows("k", &block.k, qk)?,
            v: rows("v", &block.v, vo)?,
            g: floats("g", &block.g, tokens * gates)?,
            beta: floats("beta", &block.beta, tokens * gates)?,
            h0: Some(floats("h0", h0, heads.state_len())?),
            d_o,
            dq: rows("dq", &nan, qk)?,
            dk: rows("dk", &nan, qk)?,
            dv: rows("dv", &nan, vo)?,
            dg: floats("dg", &nan, tokens * gates)?,
            dbeta: floats("dbeta", &nan, tokens * gates)?,
            dstate: floats("dstate", &[0.0; 4096], heads.state_len())?,
        };
        Ok(Memory { io })
    }

    /// The largest relative error over the block's tokens of two key heads and the value heads that share them.
    fn check(&self, backend: &dyn Backend, block: &Case, store: Dtype) -> Result<f64> {
        let heads = block.shape.heads;
        let (hk, hv, dk, dv) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
        let cotangents = block.cotangents.as_ref().context("benchmark inputs have cotangents")?;
        let own = [heads.key_head(0), heads.key_head(heads.hv - 1)];
        let values: Vec<u32> = (0..heads.hv).filter(|&h| own.contains(&heads.key_head(h))).collect();
        let mut sums = oracle_grad::Sums::new(block);
        for &h in &values {
            sums.head(block, cotangents, 0, h);
        }
        let wanted = sums.rounded();
        let mut worst = 0.0f64;
        let mut compare =
            |name: &str, view: &View, wanted: &[f32], store: Dtype, size: usize, heads: usize, of: &[u32]| {
                let found = within(backend, name, view, wanted.len() as u64, store)?;
                for &h in of {
                    let (found, wanted) = (of_head(&found, size, heads, h), of_head(wanted, size, heads, h));
                    worst = worst.max(oracle::error(&found, &wanted));
                }
                anyhow::Ok(())
            };
        compare("dq", &self.io.dq.view, &wanted.dq, store, dk, hk, &own)?;
        compare("dk", &self.io.dk.view, &wanted.dk, store, dk, hk, &own)?;
        compare("dv", &self.io.dv.view, &wanted.dv, store, dv, hv, &values)?;
        compare("dg", &self.io.dg, &wanted.dg, Dtype::F32, 1, hv, &values)?;
        compare("dbeta", &self.io.dbeta, &wanted.dbeta, Dtype::F32, 1, hv, &values)?;
        let dh0 = wanted.dh0.as_deref().context("the adjoint has dh0")?;
        compare("dh0", &self.io.dstate, dh0, Dtype::F32, dk * dv, hv, &values)?;
        Ok(worst)
    }
}

/// The first `numbers` numbers of a gradient, all finite; whatever follows must be zero.
fn within(backend: &dyn Backend, name: &str, view: &View, numbers: u64, store: Dtype) -> Result<Vec<f32>> {
    let part = numbers * store.size();
    let read = |at: u64| -> Result<Vec<f32>> {
        Ok(loaded(&backend.read(&view.slice(at, part.min(view.bytes - at))?)?.wait()?, store))
    };
    let found = read(0)?;
    let bad = found.iter().filter(|x| !x.is_finite()).count();
    ensure!(bad == 0, "{name} is wrong: {bad} numbers are not finite");
    for at in (part..view.bytes).step_by(part as usize) {
        // NaN is not zero.
        let bad = read(at)?.iter().filter(|&&x| x != 0.0).count();
        ensure!(bad == 0, "{name} is wrong: {bad} numbers are not zero where nothing depends on the input");
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_op;

    #[test]
    fn operations_are_counted_by_hand_once() {
        let backend = gatedelta::device::open(Some("cpu")).unwrap().0;
        let heads = bench_op::heads(1, 2).unwrap();
        let row = row(&*backend, 96, heads, Options::default(), Duration::ZERO).unwrap();
        let c = tune::tile(backend.caps(), &heads).chunk as f64;
        // All states are kept: K = V = d, 8 C d d, 5 C C d of values, 3 C C d of keys, the inverse, and two per key head.
        let d = 128.0;
        let head = 16.0 * c * d * d + 16.0 * c * c * d + 2.0 / 3.0 * c * c * c;
        let wanted = (96.0 / c).ceil() * (2.0 * head + 4.0 * c * c * d);
        assert!((row.flops / wanted - 1.0).abs() < 1e-12, "{} {wanted}", row.flops);
        assert_eq!(row.bytes, 96.0 * 4.0 * (4.0 * d + 6.0 * d + 4.0 * 2.0) + 12.0 * 2.0 * d * d);
        assert!(row.error <= 1e-5 && row.error > 0.0);
    }

    #[test]
    fn gradients_that_are_not_there_do_not_pass() {
        let backend = gatedelta::device::open(Some("cpu")).unwrap().0;
        let (heads, tokens) = (bench_op::heads(1, 1).unwrap(), CHECKED_TOKENS + 64);
        let shape = Shape::one(heads, tokens);
        let mut block = oracle::inputs("bench", Shape::one(heads, CHECKED_TOKENS), false, true, 7);
        block.cotangents = Some(oracle_grad::cotangents(&block, 8));
        let memory = Memory::new(&*backend, &shape, Dtype::F32, &mut block).unwrap();
        let check = || memory.check(&*backend, &block, Dtype::F32);
        assert!(check().unwrap_err().to_string().contains("not finite"));
        let mut pass = Pass::new();
        Backward::new(&*backend, &shape, &Options::default(), 128).unwrap().record(&mut pass, &memory.io).unwrap();
        backend.run(&pass).unwrap();
        assert!(check().unwrap() <= 1e-5);
        // One number among those that must be zero, one among those that are compared.
        let put =
            |at: u64, x: f32| backend.write(&memory.io.dk.view.slice(at * 4, 4).unwrap(), &x.to_le_bytes()).unwrap();
        put(CHECKED_TOKENS * 128, f32::NAN);
        assert!(check().unwrap_err().to_string().contains("dk is wrong: 1 numbers are not zero"));
        put(CHECKED_TOKENS * 128, 0.0);
        put(300, 1e4);
        assert!(check().unwrap() > 1e-2);
    }
}
