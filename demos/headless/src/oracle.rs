//! What the operator is defined to give: the recurrence, token by token, in float64; and generated cases judged by it.

use gatedelta::shape::{HeadMap, Heads, Shape};

use crate::case::{Answers, Case};

/// The recurrence for every sequence and head.
pub fn answers(case: &Case) -> Answers {
    let heads = case.shape.heads;
    let (mut o, mut ht) = (vec![0.0; case.v.len()], vec![0.0; case.state_dims().iter().product()]);
    for n in 0..case.shape.sequences() {
        for h in 0..heads.hv {
            head(case, n, h, &mut o, &mut ht);
        }
    }
    Answers { o, ht }
}

/// The recurrence for value head `h` of sequence `n`: fills that head's part of `o` and `ht` and leaves the rest alone.
///
/// ```text
/// S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
/// ```
pub fn head(case: &Case, n: usize, h: u32, o: &mut [f32], ht: &mut [f32]) {
    let heads = case.shape.heads;
    let (hk, hv, dk, dv) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
    let (h, kh) = (h as usize, heads.key_head(h) as usize);
    let scale = case.scale.map_or_else(|| (dk as f64).powf(-0.5), f64::from);
    let own = (n * hv + h) * dk * dv..(n * hv + h + 1) * dk * dv;
    let mut state: Vec<f64> =
        case.h0.as_ref().map_or_else(|| vec![0.0; dk * dv], |h0| h0[own.clone()].iter().map(|&x| x as f64).collect());
    let (mut d, mut y) = (vec![0.0; dv], vec![0.0; dv]);
    for t in case.shape.cu_seqlens()[n] as usize..case.shape.cu_seqlens()[n + 1] as usize {
        let qk = (t * hk + kh) * dk..(t * hk + kh + 1) * dk;
        let (q, k) = (unit(&case.q[qk.clone()], case.qk_l2norm), unit(&case.k[qk], case.qk_l2norm));
        let v = (t * hv + h) * dv..(t * hv + h + 1) * dv;
        let (decay, beta) = ((case.g[t * hv + h] as f64).exp(), case.beta[t * hv + h] as f64);
        d.iter_mut().zip(&case.v[v.clone()]).for_each(|(d, &v)| *d = v as f64);
        for (row, &k) in state.chunks_exact_mut(dv).zip(&k) {
            for (s, d) in row.iter_mut().zip(&mut d) {
                *s *= decay;
                *d -= *s * k;
            }
        }
        y.fill(0.0);
        for (row, (&k, &q)) in state.chunks_exact_mut(dv).zip(k.iter().zip(&q)) {
            for ((s, &d), y) in row.iter_mut().zip(&d).zip(&mut y) {
                *s += k * beta * d;
                *y += q * *s;
            }
        }
        o[v].iter_mut().zip(&y).for_each(|(o, &y)| *o = (scale * y) as f32);
    }
    ht[own].iter_mut().zip(&state).for_each(|(ht, &s)| *ht = s as f32);
}

fn unit(x: &[f32], norm: bool) -> Vec<f64> {
    let sum: f64 = x.iter().map(|&x| (x as f64).powi(2)).sum();
    let factor = if norm { (sum + 1e-6).powf(-0.5) } else { 1.0 };
    x.iter().map(|&x| x as f64 * factor).collect()
}

/// Random numbers that are the same on every machine (SplitMix64).
pub struct Random(u64);

impl Random {
    /// A stream of its own for every seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Nearly normal with variance 1: bounded, and enough for test data.
    pub fn normal(&mut self) -> f32 {
        ((0..4).map(|_| self.uniform()).sum::<f32>() - 2.0) * 3f32.sqrt()
    }
}

/// A case with random inputs as a model has them: unit keys, some heads that hardly forget, most that do. q, k and v are
/// bf16 numbers, so that every storage type holds them exactly.
pub fn inputs(name: &str, shape: Shape, qk_l2norm: bool, h0: bool, seed: u64) -> Case {
    let heads = shape.heads;
    let tokens = shape.tokens() as usize;
    let mut random = Random::new(seed);
    let bf16 = |x: f32| half::bf16::from_f32(x).to_f32();
    let mut rows = |heads: u32, size: u32, unit: bool| -> Vec<f32> {
        let mut all = Vec::with_capacity(tokens * (heads * size) as usize);
        for _ in 0..tokens * heads as usize {
            let row: Vec<f32> = (0..size).map(|_| random.normal()).collect();
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            all.extend(row.iter().map(|&x| bf16(if unit { x / norm } else { x })));
        }
        all
    };
    let (q, k, v) =
        (rows(heads.hk, heads.k, !qk_l2norm), rows(heads.hk, heads.k, !qk_l2norm), rows(heads.hv, heads.v, false));
    let gates = tokens * heads.hv as usize;
    let g = (0..gates)
        .map(|i| match i % heads.hv as usize % 4 {
            0 => -1e-3 * random.uniform(),
            _ => -3.0 * random.uniform().powi(2),
        })
        .collect();
    let beta = (0..gates).map(|_| random.uniform()).collect();
    let h0 = h0.then(|| (0..shape.sequences() as u64 * heads.state_len()).map(|_| 0.3 * random.normal()).collect());
    Case { name: name.into(), shape, q, k, v, g, beta, h0, scale: None, qk_l2norm, answers: None }
}

/// Cases that the files do not cover: the other head map, head sizes at the ends of the range, lengths around chunk ends.
///
/// # Errors
/// None that a caller can cause: the shapes are legal.
pub fn generated() -> gatedelta::Result<Vec<Case>> {
    let (div, modulo) = (HeadMap::Div, HeadMap::Mod);
    let table = [
        ("generated_mod_heads", [2, 6, 32, 48], modulo, &[0, 65, 65, 96][..], true, true),
        ("generated_small_heads", [1, 2, 16, 16], div, &[0, 1, 16, 33, 65, 66], false, true),
        ("generated_large_heads", [1, 1, 256, 256], div, &[0, 70], true, false),
        ("generated_k_over_v", [1, 2, 240, 16], div, &[0, 31, 64], false, true),
        ("generated_one_long", [1, 1, 64, 64], div, &[0, 321], true, false),
    ];
    table
        .into_iter()
        .enumerate()
        .map(|(i, (name, [hk, hv, k, v], map, cu, norm, h0))| {
            let shape = Shape::new(Heads::new(hk, hv, k, v, map)?, cu.to_vec())?;
            let mut case = inputs(name, shape, norm, h0, i as u64 + 1);
            case.answers = Some(answers(&case));
            Ok(case)
        })
        .collect()
}

/// Relative L2 error; NaN or a wrong length counts as infinite. Against an answer of zeros, the plain norm.
pub fn error(found: &[f32], wanted: &[f32]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let (mut off, mut norm) = (0.0, 0.0);
    for (&x, &y) in found.iter().zip(wanted) {
        off += (x as f64 - y as f64).powi(2);
        norm += (y as f64).powi(2);
    }
    let error = if norm > 0.0 { (off / norm).sqrt() } else { off.sqrt() };
    if error.is_nan() { f64::INFINITY } else { error }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_recurrence_is_the_one_in_the_case_files() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/cases");
        for path in crate::case::files(&dir).unwrap() {
            let case = Case::read(&path).unwrap();
            let (found, wanted) = (answers(&case), case.answers.as_ref().unwrap());
            let (o, ht) = (error(&found.o, &wanted.o), error(&found.ht, &wanted.ht));
            // The files hold a double-precision scale and one rounding to f32; 6e-8 is half an ulp.
            assert!(o < 1e-7 && ht < 1e-7, "{}: o {o:e}, ht {ht:e}", case.name);
        }
    }

    #[test]
    fn nan_and_wrong_lengths_never_pass() {
        assert_eq!(error(&[1.0, f32::NAN], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(error(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(error(&[f32::INFINITY], &[1.0]), f64::INFINITY);
        assert_eq!(error(&[], &[]), 0.0);
        assert_eq!(error(&[0.5], &[0.0]), 0.5);
    }

    #[test]
    fn generated_inputs_are_exact_in_bf16() {
        let heads = Heads::new(1, 2, 16, 16, HeadMap::Div).unwrap();
        let case = inputs("x", Shape::one(heads, 9), false, true, 3);
        let exact = |x: &f32| half::bf16::from_f32(*x).to_f32() == *x;
        assert!(case.q.iter().chain(&case.k).chain(&case.v).all(exact));
        assert!(case.g.iter().all(|&g| g <= 0.0) && case.beta.iter().all(|&b| (0.0..1.0).contains(&b)));
    }
}
