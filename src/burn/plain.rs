//! Recurrences in burn's own operations, differentiated by burn, in the tensors' own type: the gated delta rule token by token,
//! which says what the kernels must compute, and gated linear attention, which says what the delta rule is worth.
//!
//! Arguments and shapes are those of [`gated_delta_rule`](super::gated_delta_rule); g must be finite.

use burn::tensor::{DType, Device, Tensor};

use super::parts::{l2_norm, later, repeat_heads};
use crate::gdn::Options;

/// Tokens of a chunk of [`gated_linear`].
const CHUNK: usize = 64;

/// The gated delta rule, one token after the other. Memory and time of a training step grow with `T Hv K V`: for short
/// sequences and for checks.
///
/// ```text
/// S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
/// ```
pub fn recurrence(
    qkv: [Tensor<4>; 3],
    [g, beta]: [Tensor<3>; 2],
    h0: Option<Tensor<4>>,
    options: &Options,
) -> (Tensor<4>, Tensor<4>) {
    let Ready { q, k, v, mut s } = Ready::new(qkv, h0, options);
    let ([b, t, hv, dk], dv) = (q.dims(), v.dims()[3]);
    let mut o = Vec::with_capacity(t);
    for i in 0..t {
        // [B, Hv, K, 1] and [B, Hv, 1, V], so that products with S [B, Hv, K, V] broadcast.
        let column = |x: &Tensor<4>| x.clone().narrow(1, i, 1).reshape([b, hv, dk, 1]);
        let scalar = |x: &Tensor<3>| x.clone().narrow(1, i, 1).reshape([b, hv, 1, 1]);
        let (qi, ki, vi) = (column(&q), column(&k), v.clone().narrow(1, i, 1).reshape([b, hv, 1, dv]));
        s = s * scalar(&g).exp();
        let d = (vi - (s.clone() * ki.clone()).sum_dim(2)) * scalar(&beta);
        s = s + ki * d;
        o.push((s.clone() * qi).sum_dim(2).reshape([b, 1, hv, dv]));
    }
    (Tensor::cat(o, 1), s)
}

/// Gated linear attention: the same without the delta, in chunks of 64 tokens.
///
/// ```text
/// S <- exp(g) S + k (beta v)^T     o = s S^T q
/// ```
///
/// Per chunk, with `c` the inclusive sum of g, `D[i, j] = exp(c[i] - c[j])` for `j <= i`, else 0, and `U = beta V`:
///
/// ```text
/// O = ((Q K^T) o D) U + exp(c) Q S     S <- exp(c[last]) S + (exp(c[last] - c) K)^T U
/// ```
///
/// (Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, with one gate per head.)
pub fn gated_linear(
    qkv: [Tensor<4>; 3],
    [g, beta]: [Tensor<3>; 2],
    h0: Option<Tensor<4>>,
    options: &Options,
) -> (Tensor<4>, Tensor<4>) {
    let Ready { q, k, v, mut s } = Ready::new(qkv, h0, options);
    let [b, t, hv, _] = q.dims();
    let u = v * beta.reshape([b, t, hv, 1]);
    let mut o = Vec::new();
    for begin in (0..t).step_by(CHUNK) {
        let n = CHUNK.min(t - begin);
        // [B, Hv, n, ..]
        let rows = |x: &Tensor<4>| x.clone().narrow(1, begin, n).swap_dims(1, 2);
        let (qc, kc, uc) = (rows(&q), rows(&k), rows(&u));
        let c = g.clone().narrow(1, begin, n).swap_dims(1, 2).cumsum(2).reshape([b, hv, n, 1]);
        let last = c.clone().narrow(2, n - 1, 1);
        let mask = later(n, 0, &c.device()).reshape([1, 1, n, n]).expand([b, hv, n, n]);
        // Masked before exp: above the diagonal the exponent is positive.
        let decay = (c.clone() - c.clone().swap_dims(2, 3)).mask_fill(mask, f64::NEG_INFINITY).exp();
        let within = (qc.clone().matmul(kc.clone().swap_dims(2, 3)) * decay).matmul(uc.clone());
        o.push((within + (qc * c.clone().exp()).matmul(s.clone())).swap_dims(1, 2));
        s = s * last.clone().exp() + (kc * (last - c).exp()).swap_dims(2, 3).matmul(uc);
    }
    (Tensor::cat(o, 1), s)
}

/// Inputs brought to value heads, normed and scaled.
struct Ready {
    /// `[B, T, Hv, K]`
    q: Tensor<4>,
    /// `[B, T, Hv, K]`
    k: Tensor<4>,
    /// `[B, T, Hv, V]`
    v: Tensor<4>,
    /// `[B, Hv, K, V]`
    s: Tensor<4>,
}

impl Ready {
    fn new([q, k, v]: [Tensor<4>; 3], h0: Option<Tensor<4>>, options: &Options) -> Self {
        let ([b, _, hk, dk], [_, _, hv, dv]) = (q.dims(), v.dims());
        let scale = options.scale.map_or((dk as f64).powf(-0.5), f64::from);
        let norm = |x| if options.qk_l2norm { l2_norm(x) } else { x };
        let wide = |x| repeat_heads(norm(x), hv / hk);
        let (device, dtype): (Device, DType) = (v.device().without_autodiff(), v.dtype());
        let s = h0.unwrap_or_else(|| Tensor::zeros([b, hv, dk, dv], (&device, dtype)));
        Ready { q: wide(q) * scale, k: wide(k), v, s }
    }
}
