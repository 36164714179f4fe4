//! What the operator is defined to give: the recurrence, token by token, in float64; and generated cases judged by it.

use std::ops::Range;

use gatedelta::shape::{HeadMap, Heads, Shape};

use crate::case::{Answers, Case};
use crate::oracle_grad;

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
    let dv = case.shape.heads.v as usize;
    let mut state = initial(case, n, h);
    let (mut d, mut y) = (vec![0.0; dv], vec![0.0; dv]);
    for t in tokens(case, n) {
        let token = Token::new(case, t, h);
        token.advance(&mut state, &mut d);
        y.fill(0.0);
        for (row, &q) in state.chunks_exact(dv).zip(&token.q) {
            y.iter_mut().zip(row).for_each(|(y, &s)| *y += q * s);
        }
        let scale = scale(case);
        o[token.at_v(dv)].iter_mut().zip(&y).for_each(|(o, &y)| *o = (scale * y) as f32);
    }
    ht[state_of(case, n, h)].iter_mut().zip(&state).for_each(|(ht, &s)| *ht = s as f32);
}

/// What one value head sees of one token.
pub struct Token<'a> {
    /// `[K]`, normed if the case says so.
    pub q: Vec<f64>,
    /// What q was multiplied with.
    pub q_factor: f64,
    /// `[K]`, normed if the case says so.
    pub k: Vec<f64>,
    /// What k was multiplied with.
    pub k_factor: f64,
    /// `[V]`.
    pub v: &'a [f32],
    /// exp(g).
    pub decay: f64,
    /// beta.
    pub beta: f64,
    /// Where g and beta of this token and head are: `t Hv + h`.
    pub at: usize,
    /// Where the head's row of q and k is: `t Hk + h`, the key head's.
    pub at_key: usize,
}

impl Token<'_> {
    /// Token `t` of the whole batch, as value head `h` sees it.
    pub fn new(case: &Case, t: usize, h: u32) -> Token<'_> {
        let heads = case.shape.heads;
        let (dk, dv) = (heads.k as usize, heads.v as usize);
        let at = t * heads.hv as usize + h as usize;
        let at_key = t * heads.hk as usize + heads.key_head(h) as usize;
        let row = |x: &[f32]| {
            let x = &x[at_key * dk..(at_key + 1) * dk];
            let sum: f64 = x.iter().map(|&x| (x as f64).powi(2)).sum();
            let factor = if case.qk_l2norm { (sum + 1e-6).powf(-0.5) } else { 1.0 };
            (x.iter().map(|&x| x as f64 * factor).collect(), factor)
        };
        let ((q, q_factor), (k, k_factor)) = (row(&case.q), row(&case.k));
        let (decay, beta) = ((case.g[at] as f64).exp(), case.beta[at] as f64);
        Token { q, q_factor, k, k_factor, v: &case.v[at * dv..(at + 1) * dv], decay, beta, at, at_key }
    }

    /// Where its row is in v, o and their gradients.
    pub fn at_v(&self, dv: usize) -> Range<usize> {
        self.at * dv..(self.at + 1) * dv
    }

    /// Where its row is in q, k and their gradients.
    pub fn at_qk(&self, dk: usize) -> Range<usize> {
        self.at_key * dk..(self.at_key + 1) * dk
    }

    /// Takes a state `[K, V]` past the token; `d` `[V]` is left as `beta (v - S^T k)`.
    pub fn advance(&self, state: &mut [f64], d: &mut [f64]) {
        let dv = d.len();
        d.iter_mut().zip(self.v).for_each(|(d, &v)| *d = v as f64);
        for (row, &k) in state.chunks_exact_mut(dv).zip(&self.k) {
            for (s, d) in row.iter_mut().zip(d.iter_mut()) {
                *s *= self.decay;
                *d -= *s * k;
            }
        }
        d.iter_mut().for_each(|d| *d *= self.beta);
        for (row, &k) in state.chunks_exact_mut(dv).zip(&self.k) {
            row.iter_mut().zip(d.iter()).for_each(|(s, &d)| *s += k * d);
        }
    }
}

/// The tokens of sequence `n`, counted over the whole batch.
pub fn tokens(case: &Case, n: usize) -> Range<usize> {
    case.shape.cu_seqlens()[n] as usize..case.shape.cu_seqlens()[n + 1] as usize
}

/// Where the state of value head `h` of sequence `n` is in `[N, Hv, K, V]`.
pub fn state_of(case: &Case, n: usize, h: u32) -> Range<usize> {
    let heads = case.shape.heads;
    let (slot, size) = (n * heads.hv as usize + h as usize, (heads.k * heads.v) as usize);
    slot * size..(slot + 1) * size
}

/// The state before the first token of value head `h` of sequence `n`.
pub fn initial(case: &Case, n: usize, h: u32) -> Vec<f64> {
    let own = state_of(case, n, h);
    match &case.h0 {
        Some(h0) => h0[own].iter().map(|&x| x as f64).collect(),
        None => vec![0.0; own.len()],
    }
}

/// s, the factor of q.
pub fn scale(case: &Case) -> f64 {
    case.scale.map_or_else(|| (case.shape.heads.k as f64).powf(-0.5), f64::from)
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
    let name = name.into();
    let (answers, cotangents, gradients) = (None, None, None);
    let (cut, large) = (None, false);
    Case { name, shape, q, k, v, g, beta, h0, scale: None, qk_l2norm, cut, large, answers, cotangents, gradients }
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
            let cotangents = oracle_grad::cotangents(&case, i as u64 + 101);
            case.gradients = Some(oracle_grad::gradients(&case, &cotangents));
            case.cotangents = Some(cotangents);
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
