//! Every kernel row as a plain formula in float64: the oracle that all backends are held to.
//!
//! Tensors are dense slices in the order of their shape. A test rounds its inputs to the stored type first, so that the
//! formula sees the very numbers that the kernel sees.

use gatedelta::shape::Heads;

/// SiLU.
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Logistic function.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `conv`: x `[t, channels]`, w `[channels, taps]`, tail `[taps - 1, channels]`; y `[t, channels]` and the new tail.
pub fn conv(x: &[f64], w: &[f64], tail: &[f64], channels: usize, taps: usize, with_silu: bool) -> (Vec<f64>, Vec<f64>) {
    let all = [tail, x].concat();
    let t = x.len() / channels;
    let mut y = vec![0.0; x.len()];
    for i in 0..t {
        for c in 0..channels {
            let sum: f64 = (0..taps).map(|j| w[c * taps + j] * all[(i + j) * channels + c]).sum();
            y[i * channels + c] = if with_silu { silu(sum) } else { sum };
        }
    }
    (y, all[t * channels..].to_vec())
}

/// `gate` of one number each: g and beta.
pub fn gate(a: f64, b: f64, a_log: f64, dt_bias: f64) -> (f64, f64) {
    let x = a + dt_bias;
    let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
    (-a_log.exp() * softplus, sigmoid(b))
}

/// Inverse norm of a q or k head, or 1.
pub fn inverse_norm(x: &[f64], l2norm: bool) -> f64 {
    if l2norm { 1.0 / (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt() } else { 1.0 }
}

/// `gdn_prepare` for one chunk of one value head: q, k `[len, K]`, g, beta `[len]`; A `[C, C]`, P `[C, C]`, u, o, n `[C]`
/// and `[C]` with gamma_C, as one vector.
#[allow(clippy::too_many_arguments)]
pub fn gdn_prepare(
    q: &[f64],
    k: &[f64],
    g: &[f64],
    beta: &[f64],
    dk: usize,
    c: usize,
    l2norm: bool,
    scale: f64,
) -> Vec<f64> {
    let len = g.len();
    let row = |x: &[f64], i: usize| x[i * dk..(i + 1) * dk].to_vec();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let rq: Vec<f64> = (0..len).map(|i| inverse_norm(&row(q, i), l2norm)).collect();
    let rk: Vec<f64> = (0..len).map(|i| inverse_norm(&row(k, i), l2norm)).collect();
    let mut sums = Vec::new();
    for (i, g) in g.iter().enumerate() {
        sums.push(g.max(-1e4) + if i == 0 { 0.0 } else { sums[i - 1] });
    }
    let mut ws = vec![0.0; 2 * c * c + 4 * c];
    // L X = beta, one column after the other, by forward substitution with L = I + strictlower(..)
    for j in 0..len {
        for i in j..len {
            let mut x = if i == j { 1.0 } else { 0.0 };
            for l in j..i {
                let kk = rk[i] * rk[l] * dot(&row(k, i), &row(k, l));
                x -= beta[i] * (sums[i] - sums[l]).exp() * kk * ws[l * c + j] / beta_or_one(beta[j]);
            }
            ws[i * c + j] = x * beta_or_one(beta[j]);
        }
    }
    for j in 0..len {
        if beta[j] == 0.0 {
            (0..len).for_each(|i| ws[i * c + j] = 0.0);
        }
    }
    for i in 0..len {
        for j in 0..=i {
            let qk = rq[i] * rk[j] * dot(&row(q, i), &row(k, j));
            ws[c * c + i * c + j] = scale * qk * (sums[i] - sums[j]).exp();
        }
        let vectors = &mut ws[2 * c * c..];
        vectors[i] = sums[i].exp() * rk[i];
        vectors[c + i] = scale * sums[i].exp() * rq[i];
        vectors[2 * c + i] = (sums[len - 1] - sums[i]).exp() * rk[i];
    }
    ws[2 * c * c + 3 * c] = sums[len - 1].exp();
    let contracts = |i: usize| (0.0..=2.0).contains(&(beta[i] * rk[i] * rk[i] * dot(&row(k, i), &row(k, i))));
    ws[2 * c * c + 3 * c + 1] = if (0..len).all(contracts) { 1.0 } else { 0.0 };
    ws
}

fn beta_or_one(beta: f64) -> f64 {
    if beta == 0.0 { 1.0 } else { beta }
}

/// `gdn_scan` over one chunk of one value head: q, k `[len, K]`, v `[len, V]`, ws as [`gdn_prepare`] gives it; updates the
/// state `[K, V]` and gives o `[len, V]`.
#[allow(clippy::too_many_arguments)]
pub fn gdn_scan(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    ws: &[f64],
    state: &mut [f64],
    dk: usize,
    dv: usize,
    c: usize,
) -> Vec<f64> {
    let len = v.len() / dv;
    let (a, p, vectors) = (&ws[..c * c], &ws[c * c..2 * c * c], &ws[2 * c * c..]);
    let (u, o, n_factor, gamma) = (&vectors[..c], &vectors[c..2 * c], &vectors[2 * c..3 * c], vectors[3 * c]);
    let by_state =
        |x: &[f64], i: usize, j: usize, s: &[f64]| (0..dk).map(|d| x[i * dk + d] * s[d * dv + j]).sum::<f64>();
    let mut out = vec![0.0; len * dv];
    let mut n = vec![0.0; len * dv];
    for j in 0..dv {
        let w: Vec<f64> = (0..len).map(|i| v[i * dv + j] - u[i] * by_state(k, i, j, state)).collect();
        for i in 0..len {
            n[i * dv + j] = (0..=i).map(|l| a[i * c + l] * w[l]).sum();
        }
        for i in 0..len {
            let pn: f64 = (0..=i).map(|l| p[i * c + l] * n[l * dv + j]).sum();
            out[i * dv + j] = o[i] * by_state(q, i, j, state) + pn;
        }
    }
    for d in 0..dk {
        for j in 0..dv {
            let kn: f64 = (0..len).map(|i| k[i * dk + d] * n_factor[i] * n[i * dv + j]).sum();
            state[d * dv + j] = gamma * state[d * dv + j] + kn;
        }
    }
    out
}

/// `gdn_step`, the recurrence itself, for one token of one value head: q, k `[K]`, v `[V]`, state `[K, V]`; o `[V]`.
#[allow(clippy::too_many_arguments)]
pub fn gdn_step(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    g: f64,
    beta: f64,
    l2norm: bool,
    scale: f64,
    state: &mut [f64],
) -> Vec<f64> {
    let dv = v.len();
    let (rq, rk) = (inverse_norm(q, l2norm), inverse_norm(k, l2norm));
    state.iter_mut().for_each(|s| *s *= g.exp());
    let mut o = vec![0.0; dv];
    for j in 0..dv {
        let read: f64 = k.iter().enumerate().map(|(i, k)| rk * k * state[i * dv + j]).sum();
        let d = beta * (v[j] - read);
        k.iter().enumerate().for_each(|(i, k)| state[i * dv + j] += rk * k * d);
        o[j] = scale * q.iter().enumerate().map(|(i, q)| rq * q * state[i * dv + j]).sum::<f64>();
    }
    o
}

/// `rms_norm` of one row.
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter().zip(w).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
}

/// `gated_norm` of one head.
pub fn gated_norm(o: &[f64], z: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    rms_norm(o, w, eps).iter().zip(z).map(|(y, z)| y * silu(*z)).collect()
}

/// `gdn_mix_step` for one token: qkv `[2 Hk K + Hv V]`, z `[Hv V]`, a, b `[Hv]`, small `[2 Hv + V]`, state `[Hv, K, V]`;
/// y `[Hv V]`.
#[allow(clippy::too_many_arguments)]
pub fn gdn_mix_step(
    heads: &Heads,
    qkv: &[f64],
    z: &[f64],
    a: &[f64],
    b: &[f64],
    small: &[f64],
    scale: f64,
    eps: f64,
    state: &mut [f64],
) -> Vec<f64> {
    let (hk, hv, dk, dv) = (heads.hk as usize, heads.hv as usize, heads.k as usize, heads.v as usize);
    let mut y = Vec::new();
    for h in 0..hv {
        let kh = heads.key_head(h as u32) as usize;
        let (q, k) = (&qkv[kh * dk..][..dk], &qkv[(hk + kh) * dk..][..dk]);
        let v = &qkv[2 * hk * dk + h * dv..][..dv];
        let (g, beta) = gate(a[h], b[h], small[h], small[hv + h]);
        let o = gdn_step(q, k, v, g, beta, true, scale, &mut state[h * dk * dv..][..dk * dv]);
        y.extend(gated_norm(&o, &z[h * dv..][..dv], &small[2 * hv..], eps));
    }
    y
}

/// `matmul`: x `[m, k]`, w `[n, k]`; y `[m, n]`.
pub fn matmul(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect()
}

/// `matvec`: x `[m, k]`, w and up `[n, k]`; y `[m, n]`, with the norm before and the activation after where given.
pub fn matvec(x: &[f64], norm: Option<(&[f64], f64)>, w: &[f64], up: Option<&[f64]>, k: usize) -> Vec<f64> {
    let x = match norm {
        Some((norm, eps)) => x.chunks(k).flat_map(|x| rms_norm(x, norm, eps)).collect(),
        None => x.to_vec(),
    };
    let y = matmul(&x, w, k);
    match up {
        Some(up) => y.iter().zip(matmul(&x, up, k)).map(|(y, up)| silu(*y) * up).collect(),
        None => y,
    }
}

/// Rotary: pairs (i, i + rot / 2) of a head, with cosines, then sines in `rope` `[rot]`.
pub fn rotate(x: &mut [f64], rope: &[f64]) {
    let half = rope.len() / 2;
    for i in 0..half {
        let (a, b, cos, sin) = (x[i], x[i + half], rope[i], rope[half + i]);
        (x[i], x[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

/// `attn_prepare` for one token: qkv `[2 heads D + 2 kv D]`, rope `[rot]`; q `[heads, D]`, k and v `[kv, D]`.
#[allow(clippy::too_many_arguments)]
pub fn attn_prepare(
    qkv: &[f64],
    q_norm: &[f64],
    k_norm: &[f64],
    rope: &[f64],
    heads: usize,
    kv: usize,
    eps: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let d = q_norm.len();
    let head = |i: usize, w: &[f64]| {
        let mut x = rms_norm(&qkv[i * d..][..d], w, eps);
        rotate(&mut x, rope);
        x
    };
    let q = (0..heads).flat_map(|h| head(2 * h, q_norm)).collect();
    let k = (0..kv).flat_map(|h| head(2 * heads + h, k_norm)).collect();
    (q, k, qkv[(2 * heads + kv) * d..].to_vec())
}

/// `attend` for one query row over the keys that it sees: q `[D]`, k and v `[n, D]`; (m, l, acc).
pub fn attend(q: &[f64], k: &[f64], v: &[f64], scale: f64) -> (f64, f64, Vec<f64>) {
    let d = q.len();
    let scores: Vec<f64> = k.chunks(d).map(|k| scale * k.iter().zip(q).map(|(k, q)| k * q).sum::<f64>()).collect();
    let m = scores.iter().copied().fold(-3e38, f64::max);
    let mut acc = vec![0.0; d];
    for (score, v) in scores.iter().zip(v.chunks(d)) {
        acc.iter_mut().zip(v).for_each(|(a, v)| *a += (score - m).exp() * v);
    }
    (m, scores.iter().map(|s| (s - m).exp()).sum(), acc)
}

/// `attend_merge` of one head: part `[slots, D + 2]`, gate `[D]`; y `[D]`.
pub fn attend_merge(part: &[f64], gate: &[f64]) -> Vec<f64> {
    let d = gate.len();
    let most = part.chunks(d + 2).map(|p| p[0]).fold(-3e38, f64::max);
    let sum: f64 = part.chunks(d + 2).map(|p| (p[0] - most).exp() * p[1]).sum();
    let acc = |i: usize| part.chunks(d + 2).map(|p| (p[0] - most).exp() * p[2 + i]).sum::<f64>();
    (0..d).map(|i| acc(i) / sum * sigmoid(gate[i])).collect()
}

/// `swiglu`: gate_up `[rows, 2 dim]`; y `[rows, dim]`.
pub fn swiglu(gate_up: &[f64], dim: usize) -> Vec<f64> {
    gate_up.chunks(2 * dim).flat_map(|row| (0..dim).map(move |i| silu(row[i]) * row[dim + i])).collect()
}

/// `argmax` of one row.
pub fn argmax(x: &[f64]) -> usize {
    let most = x.iter().copied().filter(|x| !x.is_nan()).fold(f64::NEG_INFINITY, f64::max);
    x.iter().position(|&x| x == most).unwrap_or(0)
}

/// Relative L2 distance to the answer; infinite for a NaN anywhere or lengths that differ.
pub fn error(found: &[f32], answer: &[f64]) -> f64 {
    if found.len() != answer.len() || found.iter().any(|x| x.is_nan()) || answer.iter().any(|x| x.is_nan()) {
        return f64::INFINITY;
    }
    let difference: f64 = found.iter().zip(answer).map(|(f, a)| (*f as f64 - a).powi(2)).sum();
    let size: f64 = answer.iter().map(|a| a * a).sum();
    if size == 0.0 { difference.sqrt() } else { (difference / size).sqrt() }
}
