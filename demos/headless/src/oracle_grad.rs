//! What the operator's gradients are defined to be: the recurrence differentiated by hand, token by token in reverse, in
//! float64.

use crate::case::{Case, Cotangents, Gradients};
use crate::oracle::{self, Random, Token};

/// Tokens whose states are held at once.
const BLOCK: usize = 128;

/// Random cotangents of a case. Those of o are bf16 numbers, as the inputs are.
pub fn cotangents(case: &Case, seed: u64) -> Cotangents {
    let mut random = Random::new(seed);
    let d_o = case.v.iter().map(|_| half::bf16::from_f32(random.normal()).to_f32()).collect();
    let states = case.state_dims().iter().product();
    Cotangents { d_o, dht: Some((0..states).map(|_| random.normal()).collect()) }
}

/// The gradients of `sum(do o) + sum(dht ht)`, for every sequence and head.
pub fn gradients(case: &Case, cotangents: &Cotangents) -> Gradients {
    let mut sums = Sums::new(case);
    for n in 0..case.shape.sequences() {
        for h in 0..case.shape.heads.hv {
            sums.head(case, cotangents, n, h);
        }
    }
    sums.rounded()
}

/// Gradients so far: those of q and k are summed over the value heads that share them.
pub struct Sums {
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    dg: Vec<f64>,
    dbeta: Vec<f64>,
    dh0: Vec<f64>,
}

impl Sums {
    /// Of no head yet.
    pub fn new(case: &Case) -> Sums {
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let dh0 = vec![0.0; case.state_dims().iter().product()];
        let (dq, dk, dv) = (zeros(&case.q), zeros(&case.k), zeros(&case.v));
        Sums { dq, dk, dv, dg: zeros(&case.g), dbeta: zeros(&case.beta), dh0 }
    }

    /// Rounded once.
    pub fn rounded(&self) -> Gradients {
        let round = |x: &[f64]| x.iter().map(|&x| x as f32).collect();
        let (dq, dk, dv) = (round(&self.dq), round(&self.dk), round(&self.dv));
        Gradients { dq, dk, dv, dg: round(&self.dg), dbeta: round(&self.dbeta), dh0: Some(round(&self.dh0)) }
    }

    /// Value head `h` of sequence `n`: adds to the dq and dk of its key head, fills its own part of the others. Last token
    /// first, with F = exp(g) S the faded state that the token finds, r = v - F^T k, S' = F + k (beta r)^T, and dS the
    /// gradient of S', then of S:
    ///
    /// ```text
    /// dq = s S' do      dS <- dS + s q do^T      e = dS^T k      dbeta = e . r      dv = beta e
    /// dk = dS (beta r) - F dv      dS <- dS - k dv^T      dg = <dS, F>      dS <- exp(g) dS
    /// ```
    pub fn head(&mut self, case: &Case, cotangents: &Cotangents, n: usize, h: u32) {
        let (dk, dv, scale) = (case.shape.heads.k as usize, case.shape.heads.v as usize, oracle::scale(case));
        let (tokens, own) = (oracle::tokens(case, n), oracle::state_of(case, n, h));
        // The state before each block of tokens: all states of a long sequence would be gigabytes.
        let mut starts = Vec::with_capacity(tokens.len() / BLOCK + 1);
        let (mut r, mut e) = (vec![0.0; dv], vec![0.0; dv]);
        let mut state = oracle::initial(case, n, h);
        for t in tokens.clone() {
            if (t - tokens.start).is_multiple_of(BLOCK) {
                starts.push(state.clone());
            }
            Token::new(case, t, h).advance(&mut state, &mut r);
        }
        let mut ds: Vec<f64> = match &cotangents.dht {
            Some(dht) => dht[own.clone()].iter().map(|&x| x as f64).collect(),
            None => vec![0.0; own.len()],
        };
        let (mut q_grad, mut k_grad) = (vec![0.0; dk], vec![0.0; dk]);
        let mut states: Vec<Vec<f64>> = Vec::new();
        for t in tokens.clone().rev() {
            // The states before the tokens of t's block up to it, then after it.
            let at = (t - tokens.start) % BLOCK;
            if states.len() != at + 2 {
                states = starts.pop().into_iter().collect();
                for t in t - at..=t {
                    let mut state = states[states.len() - 1].clone();
                    Token::new(case, t, h).advance(&mut state, &mut r);
                    states.push(state);
                }
            }
            let around = &states[at..at + 2];
            let token = Token::new(case, t, h);
            let (before, after) = (around[0].chunks_exact(dv), around[1].chunks_exact(dv));
            let d_o = &cotangents.d_o[token.at_v(dv)];
            r.iter_mut().zip(token.v).for_each(|(r, &v)| *r = v as f64);
            e.fill(0.0);
            for (i, ((before, after), ds)) in before.clone().zip(after).zip(ds.chunks_exact_mut(dv)).enumerate() {
                let (k, q) = (token.k[i], scale * token.q[i]);
                let mut sum = 0.0;
                for j in 0..dv {
                    sum += after[j] * d_o[j] as f64;
                    ds[j] += q * d_o[j] as f64;
                    e[j] += ds[j] * k;
                    r[j] -= token.decay * before[j] * k;
                }
                q_grad[i] = scale * sum;
            }
            self.dbeta[token.at] = e.iter().zip(&r).map(|(e, r)| e * r).sum();
            // From here on e is dv, and r is beta r.
            e.iter_mut().chain(&mut r).for_each(|x| *x *= token.beta);
            self.dv[token.at_v(dv)].copy_from_slice(&e);
            let mut dg = 0.0;
            for (i, (before, ds)) in before.zip(ds.chunks_exact_mut(dv)).enumerate() {
                let k = token.k[i];
                let mut sum = 0.0;
                for j in 0..dv {
                    let faded = token.decay * before[j];
                    sum += ds[j] * r[j] - faded * e[j];
                    let d_faded = ds[j] - k * e[j];
                    dg += d_faded * faded;
                    ds[j] = token.decay * d_faded;
                }
                k_grad[i] = sum;
            }
            self.dg[token.at] = dg;
            add_raw(&mut self.dq[token.at_qk(dk)], &q_grad, &token.q, token.q_factor, case.qk_l2norm);
            add_raw(&mut self.dk[token.at_qk(dk)], &k_grad, &token.k, token.k_factor, case.qk_l2norm);
            states.pop();
        }
        self.dh0[own].copy_from_slice(&ds);
    }
}

/// Adds the gradient of x, given that of its normed form y: `dx = factor (dy - y (dy . y))`. Without a norm they are one.
fn add_raw(into: &mut [f64], dy: &[f64], y: &[f64], factor: f64, norm: bool) {
    let along = if norm { dy.iter().zip(y).map(|(dy, y)| dy * y).sum() } else { 0.0 };
    for ((into, dy), y) in into.iter_mut().zip(dy).zip(y) {
        *into += factor * (dy - y * along);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::oracle::error;

    #[test]
    fn the_gradients_are_those_in_the_case_files() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/cases");
        for path in crate::case::files(&dir).unwrap() {
            let case = Case::read(&path).unwrap();
            let (found, wanted) =
                (gradients(&case, case.cotangents.as_ref().unwrap()), case.gradients.as_ref().unwrap());
            let dh0 = wanted.dh0.as_ref().or(found.dh0.as_ref());
            for (name, found, wanted) in [
                ("dq", &found.dq, &wanted.dq),
                ("dk", &found.dk, &wanted.dk),
                ("dv", &found.dv, &wanted.dv),
                ("dg", &found.dg, &wanted.dg),
                ("dbeta", &found.dbeta, &wanted.dbeta),
                ("dh0", found.dh0.as_ref().unwrap(), dh0.unwrap()),
            ] {
                let e = error(found, wanted);
                // As for o and ht: a scale in double precision and one rounding.
                assert!(e < 1e-7, "{} {name}: {e:e}", case.name);
            }
        }
    }

    /// The files have no case of the other head map: there, along each gradient, the scalar must rise as steeply as the
    /// gradient is long.
    #[test]
    fn the_gradients_are_slopes_for_every_generated_case() {
        for case in oracle::generated().unwrap() {
            let (given, grads) = (case.cotangents.as_ref().unwrap(), case.gradients.as_ref().unwrap());
            let sum = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(&x, &w)| x as f64 * w as f64).sum::<f64>();
            let scalar = |case: &Case| {
                let out = oracle::answers(case);
                sum(&out.o, &given.d_o) + sum(&out.ht, given.dht.as_ref().unwrap())
            };
            type Pick = fn(&mut Case) -> Option<&mut Vec<f32>>;
            let picks: [(&str, Pick, Option<&Vec<f32>>); 6] = [
                ("q", |c| Some(&mut c.q), Some(&grads.dq)),
                ("k", |c| Some(&mut c.k), Some(&grads.dk)),
                ("v", |c| Some(&mut c.v), Some(&grads.dv)),
                ("g", |c| Some(&mut c.g), Some(&grads.dg)),
                ("beta", |c| Some(&mut c.beta), Some(&grads.dbeta)),
                ("h0", |c| c.h0.as_mut(), grads.dh0.as_ref()),
            ];
            for (name, pick, grad) in picks {
                let grad = grad.unwrap();
                let square = sum(grad, grad);
                // Far above the rounding of o to f32, far below where the scalar curves.
                let step = 5e-3 / square.sqrt();
                let moved = |sign: f64| {
                    let mut case = case.clone();
                    let x = pick(&mut case)?;
                    x.iter_mut().zip(grad).for_each(|(x, &g)| *x += (sign * step * g as f64) as f32);
                    Some(scalar(&case))
                };
                let (Some(up), Some(down)) = (moved(1.0), moved(-1.0)) else { continue };
                let slope = (up - down) / (2.0 * step * square);
                assert!((slope - 1.0).abs() < 2e-3, "{} {name}: {slope} of the gradient's length", case.name);
            }
        }
    }
}
