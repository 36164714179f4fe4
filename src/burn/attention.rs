//! The full-attention mixer of a block: gated, with normed queries and keys, partial rotary and grouped key-value heads.

use burn::config::Config;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};

use super::mixer::linear;
use super::model::{RmsNorm, RmsNormConfig};
use super::{expect_shape, parts, stop};
use crate::error::{Error, Result};

/// Sizes of a [`GatedAttention`], by their names in `config.json`.
#[derive(Config, Debug)]
pub struct GatedAttentionConfig {
    /// Numbers in a token's row.
    pub hidden_size: usize,
    /// Query heads; a multiple of the key-value heads.
    pub num_attention_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// Size of a head.
    #[config(default = 256)]
    pub head_dim: usize,
    /// The part of a head that is rotated; of `head_dim` an even number.
    #[config(default = 0.25)]
    pub partial_rotary_factor: f64,
    /// Base of the rotary frequencies.
    #[config(default = 1e7)]
    pub rope_theta: f64,
    /// eps of the norms of queries and keys.
    #[config(default = 1e-6)]
    pub rms_norm_eps: f64,
    /// Width of the normal distribution that matrices are drawn from; none: `from^-1/2` each.
    #[config(default = "Some(0.02)")]
    pub initializer_range: Option<f64>,
    /// What the width of the matrices that write to the residual stream is multiplied by: `(2 layers)^-1/2` lets the
    /// embeddings through to the last layers of a model that is trained anew.
    #[config(default = 1.0)]
    pub residual_scale: f64,
}

/// Causal softmax attention over all positions.
///
/// Weights bear the names of the released checkpoints; burn keeps matrices as `[in, out]`.
#[derive(Module, Debug)]
pub struct GatedAttention {
    /// `[hidden, heads 2 D]`: per head the query, then the gate.
    pub q_proj: Linear,
    /// `[hidden, kv D]`
    pub k_proj: Linear,
    /// `[hidden, kv D]`
    pub v_proj: Linear,
    /// `[heads D, hidden]`
    pub o_proj: Linear,
    /// Over a head of the query.
    pub q_norm: RmsNorm,
    /// Over a head of the keys.
    pub k_norm: RmsNorm,
    /// heads, kv, D, rotated numbers of a head
    #[module(skip)]
    sizes: [usize; 4],
    #[module(skip)]
    theta: f64,
}

impl GatedAttentionConfig {
    /// A layer with random weights: matrices normal with the width `initializer_range`, norms at their identity.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the size that is out of range.
    pub fn init(&self, device: &Device) -> Result<GatedAttention> {
        let (hidden, heads, kv, d) =
            (self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim);
        let rotary = (d as f64 * self.partial_rotary_factor) as usize;
        for (what, n) in
            [("hidden_size", hidden), ("num_attention_heads", heads), ("num_key_value_heads", kv), ("head_dim", d)]
        {
            if n == 0 {
                return Err(Error::argument(what, 0, "at least 1"));
            }
        }
        if !heads.is_multiple_of(kv) {
            let multiple = format!("a multiple of num_key_value_heads = {kv}");
            return Err(Error::argument("num_attention_heads", heads, multiple));
        }
        if rotary == 0 || rotary > d || !rotary.is_multiple_of(2) {
            return Err(Error::argument("rotated part of a head", rotary, format!("even, 2 to {d}")));
        }
        let norm = RmsNormConfig::new(d).with_rms_norm_eps(self.rms_norm_eps);
        Ok(GatedAttention {
            q_proj: linear(hidden, heads * 2 * d, self.initializer_range, 1.0, device),
            k_proj: linear(hidden, kv * d, self.initializer_range, 1.0, device),
            v_proj: linear(hidden, kv * d, self.initializer_range, 1.0, device),
            o_proj: linear(heads * d, hidden, self.initializer_range, self.residual_scale, device),
            q_norm: norm.init(device),
            k_norm: norm.init(device),
            sizes: [heads, kv, d, rotary],
            theta: self.rope_theta,
        })
    }
}

impl GatedAttention {
    /// Mixes the tokens of every sequence, whose positions start from 0: x `[B, T, hidden]` to the same shape. The scores of
    /// every query with the keys up to its block's end are kept for the backward pass.
    ///
    /// ```text
    /// o_proj( softmax( D^-1/2 rot(N(q)) rot(N(k))^T + mask ) v * sigmoid(gate) )
    /// ```
    ///
    /// # Panics
    /// If x has another shape.
    #[track_caller]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let ([b, t, _], [heads, kv, d, rotary]) = (x.dims(), self.sizes);
        let hidden = self.q_proj.weight.dims()[0];
        if let Err(error) = expect_shape("x", &x.dims(), &[b, t, hidden]) {
            stop("GatedAttention", &error);
        }
        let device = x.device().without_autodiff();
        let table = parts::rotary_table(t, rotary, self.theta, &device, x.dtype());
        let both = self.q_proj.forward(x.clone()).reshape([b, t, heads, 2 * d]);
        let gate = both.clone().narrow(3, d, d).reshape([b, t, heads * d]);
        let q = parts::rotate(self.q_norm.forward(both.narrow(3, 0, d)), &table);
        let k = self.k_proj.forward(x.clone()).reshape([b, t, kv, d]);
        let k = parts::rotate(self.k_norm.forward(k), &table);
        let v = self.v_proj.forward(x).reshape([b, t, kv, d]);
        // [B, heads, T, D]
        let by_head = |x: Tensor<4>, times: usize| parts::repeat_heads(x, times).swap_dims(1, 2);
        let (q, k, v) = (by_head(q, 1), by_head(k, heads / kv), by_head(v, heads / kv));
        let y = parts::causal_attention(q, k, v).swap_dims(1, 2).reshape([b, t, heads * d]);
        self.o_proj.forward(y * sigmoid(gate))
    }
}
