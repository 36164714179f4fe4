//! The pieces around the operator, each a function of tensors. They are written in burn's operations, which differentiate
//! themselves; a kernel of ours would go underneath without a change to their callers.
//!
//! Shapes are not checked here: burn's own messages name the operation that they fail in.

use burn::tensor::activation::{sigmoid, silu, softmax, softplus};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// Causal depthwise convolution over time, then SiLU. x `[B, T, C]`, weight `[C, 1, taps]` with the newest token last; zeros
/// stand before the first token.
///
/// ```text
/// y[t, c] = silu(sum_j weight[c, j] x[t - taps + 1 + j, c])
/// ```
pub fn causal_conv_silu(x: Tensor<3>, weight: Tensor<3>) -> Tensor<3> {
    let [b, t, c] = x.dims();
    let taps = weight.dims()[2];
    let before = Tensor::zeros([b, taps - 1, c], (&x.device().without_autodiff(), x.dtype()));
    let padded = Tensor::cat(vec![before, x], 1);
    let tap =
        |j: usize| each_token(padded.clone().narrow(1, j, t), weight.clone().narrow(2, j, 1).reshape([c]), Tensor::mul);
    silu((1..taps).fold(tap(0), |sum, j| sum + tap(j)))
}

/// Log decay and write strength of every token and value head, from a and b `[B, T, Hv]`, `a_log` and `dt_bias` `[Hv]`.
///
/// ```text
/// g = -exp(a_log) softplus(a + dt_bias)     beta = sigmoid(b)
/// ```
pub fn gates(a: Tensor<3>, b: Tensor<3>, a_log: Tensor<1>, dt_bias: Tensor<1>) -> [Tensor<3>; 2] {
    let rate = softplus(each_token(a, dt_bias, Tensor::add), 1.0);
    [-each_token(rate, a_log.exp(), Tensor::mul), sigmoid(b)]
}

/// Norm of each head's output, then the gate; o and z `[B, T, Hv, V]`, weight `[V]`.
///
/// ```text
/// o rsqrt(mean(o^2) + eps) weight silu(z)
/// ```
pub fn gated_rms_norm(o: Tensor<4>, z: Tensor<4>, weight: Tensor<1>, eps: f64) -> Tensor<4> {
    each_token(rms_norm(o, eps), weight, Tensor::mul) * silu(z)
}

/// The zero-centred norm over the last dimension: `x rsqrt(mean(x^2) + eps) (1 + weight)`.
pub fn zero_centred_rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    each_token(rms_norm(x, eps), weight + 1.0, Tensor::mul)
}

/// Groups of tokens whose gradients are summed on their own before they are summed: a GPU has work for that many more threads.
const GROUPS: usize = 256;

/// `op` of every row of the last dimension with w.
fn each_token<const D: usize>(x: Tensor<D>, w: Tensor<1>, op: fn(Tensor<3>, Tensor<3>) -> Tensor<3>) -> Tensor<D> {
    let (shape, [c]) = (x.dims(), w.dims());
    let rows: usize = shape[..D - 1].iter().product();
    let groups = 1 << rows.trailing_zeros().min(GROUPS.ilog2());
    op(x.reshape([groups, rows / groups, c]), w.reshape([1, 1, c]).expand([groups, 1, c])).reshape(shape)
}

fn rms_norm<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let mean = x.clone().square().mean_dim(D - 1);
    x / (mean + eps).sqrt()
}

/// `x / sqrt(sum(x^2) + 1e-6)` over the last dimension.
pub fn l2_norm<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let sum = x.clone().square().sum_dim(D - 1);
    x / (sum + 1e-6).sqrt()
}

/// Cosines and sines of the rotary angles, `[T, rotary / 2]` each: angle `t theta^(-2 j / rotary)`.
pub fn rotary_table(tokens: usize, rotary: usize, theta: f64, device: &Device, dtype: DType) -> [Tensor<2>; 2] {
    let half = rotary / 2;
    let angles: Vec<f64> =
        (0..tokens * half).map(|i| (i / half) as f64 * theta.powf(-2.0 * (i % half) as f64 / rotary as f64)).collect();
    let table = |f: fn(f64) -> f64| {
        let numbers: Vec<f64> = angles.iter().map(|&a| f(a)).collect();
        Tensor::from_data(TensorData::new(numbers, [tokens, half]), (device, dtype))
    };
    [table(f64::cos), table(f64::sin)]
}

/// Rotates the first `2 * table width` numbers of every head of x `[B, T, H, D]`, dimension i with i + half; the others pass.
///
/// ```text
/// (a, b) -> (a cos - b sin, b cos + a sin)
/// ```
pub fn rotate(x: Tensor<4>, [cos, sin]: &[Tensor<2>; 2]) -> Tensor<4> {
    let [_, t, _, d] = x.dims();
    let half = cos.dims()[1];
    let wide = |x: &Tensor<2>| x.clone().reshape([1, t, 1, half]);
    let (cos, sin) = (wide(cos), wide(sin));
    let a = x.clone().narrow(3, 0, half);
    let b = x.clone().narrow(3, half, half);
    let mut parts = vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
    if d > 2 * half {
        parts.push(x.narrow(3, 2 * half, d - 2 * half));
    }
    Tensor::cat(parts, 3)
}

/// Every head `r` times in a row, so that head h of the result is head h div r: `[B, T, H, D]` to `[B, T, H r, D]`.
pub fn repeat_heads(x: Tensor<4>, r: usize) -> Tensor<4> {
    let [b, t, h, d] = x.dims();
    if r == 1 {
        return x;
    }
    x.reshape([b, t, h, 1, d]).expand([b, t, h, r, d]).reshape([b, t, h * r, d])
}

/// Queries that [`causal_attention`] scores at once: what a device binds is bounded, and fewer scores are made in vain.
const QUERIES: usize = 1024;

/// Attention of every token to those up to it; q, k, v and the result `[B, H, T, D]`.
///
/// ```text
/// softmax(D^-1/2 q k^T + mask) v
/// ```
pub fn causal_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let [b, h, t, d] = q.dims();
    let q = q * (d as f64).powf(-0.5);
    let rows = |from: usize| {
        let n = QUERIES.min(t - from);
        let upto = |x: &Tensor<4>| x.clone().narrow(2, 0, from + n);
        let scores = q.clone().narrow(2, from, n).matmul(upto(&k).swap_dims(2, 3));
        let mask = later(n, from, &q.device()).reshape([1, 1, n, from + n]).expand([b, h, n, from + n]);
        softmax(scores.mask_fill(mask, f64::NEG_INFINITY), 3).matmul(upto(&v))
    };
    Tensor::cat((0..t).step_by(QUERIES).map(rows).collect(), 2)
}

/// True where key j comes after query `from + i`; `[n, from + n]`.
pub(super) fn later(n: usize, from: usize, device: &Device) -> Tensor<2, burn::tensor::Bool> {
    let at = |range: std::ops::Range<usize>| {
        Tensor::<1, Int>::arange(range.start as i64..range.end as i64, &device.clone().without_autodiff())
    };
    let (queries, keys) = (at(from..from + n).reshape([n, 1]), at(0..from + n).reshape([1, from + n]));
    keys.expand([n, from + n]).greater(queries.expand([n, from + n]))
}
