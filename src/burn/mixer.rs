//! The Gated DeltaNet mixer of a block.

use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};

use super::mix::{self, MixInputs, gated_delta_mix};
use super::rule::{gated_delta_rule, heads};
use super::{Engine, expect_shape, parts, plain, stop};
use crate::error::{Error, Result};
use crate::gdn::Options;

/// What happens to the state at a token.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The gated delta rule, by the kernels: [`gated_delta_rule`].
    Delta,
    /// The same token by token in burn's operations, in the tensors' own type: [`plain::recurrence`].
    Plain,
    /// No delta rule: gated linear attention, [`plain::gated_linear`]. For comparison; no checkpoint can say it.
    Linear,
}

/// Sizes of a [`GatedDeltaNet`], by their names in `config.json`.
#[derive(Config, Debug)]
pub struct GatedDeltaNetConfig {
    /// Numbers in a token's row.
    pub hidden_size: usize,
    /// Heads of q and k.
    #[config(default = 16)]
    pub linear_num_key_heads: usize,
    /// Heads of v; a multiple of the key heads.
    #[config(default = 16)]
    pub linear_num_value_heads: usize,
    /// Size of a head of q and k; a multiple of 16 from 16 to 256.
    #[config(default = 128)]
    pub linear_key_head_dim: usize,
    /// Size of a head of v; a multiple of 16 from 16 to 256.
    #[config(default = 128)]
    pub linear_value_head_dim: usize,
    /// Taps of the causal convolution, at least 2.
    #[config(default = 4)]
    pub linear_conv_kernel_dim: usize,
    /// eps of the gated norm.
    #[config(default = 1e-6)]
    pub rms_norm_eps: f64,
    /// Width of the normal distribution that matrices are drawn from; none: `from^-1/2` each.
    #[config(default = "Some(0.02)")]
    pub initializer_range: Option<f64>,
    /// What the width of the matrices that write to the residual stream is multiplied by: `(2 layers)^-1/2` lets the
    /// embeddings through to the last layers of a model that is trained anew.
    #[config(default = 1.0)]
    pub residual_scale: f64,
    /// Start as an associative memory that recalls what came after a token: see [`GatedDeltaNetConfig::init`].
    #[config(default = false)]
    pub recalling: bool,
    /// What happens to the state at a token.
    #[config(default = "Rule::Delta")]
    pub rule: Rule,
}

/// The mixer: projections, causal convolution, gates, the gated delta rule, gated norm.
///
/// Weights bear the names of the released checkpoints; burn keeps matrices as `[in, out]`.
#[derive(Module, Debug)]
pub struct GatedDeltaNet {
    /// `[hidden, 2 Hk K + Hv V]`: columns q, k, v.
    pub in_proj_qkv: Linear,
    /// `[hidden, Hv V]`: the gate of the norm.
    pub in_proj_z: Linear,
    /// `[hidden, Hv]`: what beta is the sigmoid of.
    pub in_proj_b: Linear,
    /// `[hidden, Hv]`: what the decay is made of.
    pub in_proj_a: Linear,
    /// Over the columns of `in_proj_qkv`.
    pub conv1d: CausalConv,
    /// `[Hv]`
    pub a_log: Param<Tensor<1>>,
    /// `[Hv]`
    pub dt_bias: Param<Tensor<1>>,
    /// Per head, with z as its gate.
    pub norm: GatedRmsNorm,
    /// `[Hv V, hidden]`
    pub out_proj: Linear,
    #[module(skip)]
    rule: Rule,
    #[module(skip)]
    engine: Engine,
    /// Hk, Hv, K, V
    #[module(skip)]
    heads: [usize; 4],
}

/// Causal depthwise convolution with SiLU.
#[derive(Module, Debug)]
pub struct CausalConv {
    /// `[channels, 1, taps]`, the newest token last.
    pub weight: Param<Tensor<3>>,
}

/// The norm of a head's output, with a gate; not zero-centred.
#[derive(Module, Debug)]
pub struct GatedRmsNorm {
    /// `[V]`, shared by all heads.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

/// A matrix without bias, drawn from a normal distribution of this width, or of `from^-1/2` without one: the same at 2500
/// numbers, and what keeps the numbers of a row at their size in small models too. The width is times `scale`.
pub(super) fn linear(from: usize, to: usize, width: Option<f64>, scale: f64, device: &Device) -> Linear {
    let initializer = Initializer::Normal { mean: 0.0, std: scale * width.unwrap_or((from as f64).powf(-0.5)) };
    LinearConfig::new(from, to).with_bias(false).with_initializer(initializer).init(device)
}

impl GatedDeltaNetConfig {
    /// A layer with random weights: matrices normal with the width `initializer_range`, `A_log` the logarithm of a uniform number up to 16, `dt_bias`
    /// such that its softplus is log-uniform in 0.001 to 0.1, the convolution uniform within `taps^-1/2`.
    ///
    /// A layer that starts `recalling` has q and k by the same matrix, q of a token with k of the token before (by the taps of the
    /// convolution), `out_proj` as the transpose of v's matrix, and `A_log` the logarithm of a number up to 1: it writes what came
    /// after the last appearance of its token. Small models take thousands of steps to find this by themselves.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the size that is out of range.
    pub fn init(&self, engine: &Engine, device: &Device) -> Result<GatedDeltaNet> {
        let (hk, hv) = (self.linear_num_key_heads, self.linear_num_value_heads);
        let (k, v) = (self.linear_key_head_dim, self.linear_value_head_dim);
        heads(hk, hv, k, v)?;
        if self.hidden_size == 0 {
            return Err(Error::argument("hidden_size", 0, "at least 1"));
        }
        if !(2..=8).contains(&self.linear_conv_kernel_dim) {
            return Err(Error::argument("linear_conv_kernel_dim", self.linear_conv_kernel_dim, "2 to 8"));
        }
        let taps = self.linear_conv_kernel_dim;
        let uniform =
            |n: usize, low: f64, high: f64| Tensor::<1>::random([n], Distribution::Uniform(low, high), device);
        // softplus(dt_bias) = dt: the inverse is dt + log(1 - exp(-dt)).
        let dt = uniform(hv, 1e-3f64.ln(), 1e-1f64.ln()).exp();
        let dt_bias = dt.clone() + (-(-dt).exp() + 1.0).log();
        // Not from 0, whose logarithm no optimiser comes back from.
        let a_log = uniform(hv, 1e-3, if self.recalling { 1.0 } else { 16.0 }).log();
        let linear = |from: usize, to: usize, scale: f64| linear(from, to, self.initializer_range, scale, device);
        let mut in_proj_qkv = linear(self.hidden_size, 2 * hk * k + hv * v, 1.0);
        let mut out_proj = linear(hv * v, self.hidden_size, self.residual_scale);
        let within = (taps as f64).powf(-0.5);
        let around = |n: usize, tap: usize| {
            let noise = uniform(n * taps, -within, within).reshape([n, 1, taps]);
            if !self.recalling {
                return noise;
            }
            let one: Vec<f32> = (0..taps).map(|at| f32::from(u8::from(at == tap))).collect();
            noise * 0.1 + Tensor::<1>::from_data(one.as_slice(), device).reshape([1, 1, taps])
        };
        let conv = [around(hk * k, taps - 1), around(hk * k, taps - 2), around(hv * v, taps - 1)];
        if self.recalling {
            let drawn = in_proj_qkv.weight.val().detach().set_require_grad(false);
            let (q, v) = (drawn.clone().narrow(1, 0, hk * k), drawn.narrow(1, 2 * hk * k, hv * v));
            in_proj_qkv.weight = Param::from_tensor(Tensor::cat(vec![q.clone(), q, v.clone()], 1));
            out_proj.weight = Param::from_tensor(v.transpose() * self.residual_scale);
        }
        Ok(GatedDeltaNet {
            in_proj_qkv,
            in_proj_z: linear(self.hidden_size, hv * v, 1.0),
            in_proj_b: linear(self.hidden_size, hv, 1.0),
            in_proj_a: linear(self.hidden_size, hv, 1.0),
            conv1d: CausalConv { weight: Param::from_tensor(Tensor::cat(conv.to_vec(), 0)) },
            a_log: Param::from_tensor(a_log),
            dt_bias: Param::from_tensor(dt_bias),
            norm: GatedRmsNorm { weight: Initializer::Ones.init([v], device), eps: self.rms_norm_eps },
            out_proj,
            rule: self.rule,
            engine: engine.clone(),
            heads: [hk, hv, k, v],
        })
    }
}

impl GatedDeltaNet {
    /// Mixes the tokens of every sequence: x `[B, T, hidden]` to the same shape. Sequences start from a state of zeros.
    ///
    /// # Panics
    /// If x has another shape, and as [`gated_delta_rule`].
    #[track_caller]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [b, t, _] = x.dims();
        let hidden = self.in_proj_qkv.weight.dims()[0];
        if let Err(error) = expect_shape("x", &x.dims(), &[b, t, hidden]) {
            stop("GatedDeltaNet", &error);
        }
        let parts = MixInputs {
            qkv: self.in_proj_qkv.forward(x.clone()),
            ab: Tensor::cat(vec![self.in_proj_a.forward(x.clone()), self.in_proj_b.forward(x.clone())], 2),
            z: self.in_proj_z.forward(x),
            conv: self.conv1d.weight.val(),
            a_log: self.a_log.val(),
            dt_bias: self.dt_bias.val(),
            norm: self.norm.weight.val(),
        };
        let y = if self.rule == Rule::Delta && mix::fits(&self.engine, self.heads, &parts) {
            gated_delta_mix(&self.engine, self.heads, parts, self.norm.eps)
        } else {
            self.in_pieces(parts)
        };
        self.out_proj.forward(y)
    }

    /// The same as [`gated_delta_mix`], the pieces around the rule in burn's operations.
    fn in_pieces(&self, x: MixInputs) -> Tensor<3> {
        let ([b, t, _], [hk, hv, dk, dv]) = (x.qkv.dims(), self.heads);
        let qkv = parts::causal_conv_silu(x.qkv, x.conv);
        let part = |from: usize, h: usize, d: usize| qkv.clone().narrow(2, from, h * d).reshape([b, t, h, d]);
        let qkv = [part(0, hk, dk), part(hk * dk, hk, dk), part(2 * hk * dk, hv, dv)];
        let ab = |from: usize| x.ab.clone().narrow(2, from, hv);
        let gates = parts::gates(ab(0), ab(hv), x.a_log, x.dt_bias);
        let options = Options { qk_l2norm: true, ..Options::default() };
        let (o, _) = match self.rule {
            Rule::Delta => gated_delta_rule(&self.engine, qkv, gates, None, &options),
            Rule::Plain => plain::recurrence(qkv, gates, None, &options),
            Rule::Linear => plain::gated_linear(qkv, gates, None, &options),
        };
        let z = x.z.reshape([b, t, hv, dv]);
        parts::gated_rms_norm(o, z, x.norm, self.norm.eps).reshape([b, t, hv * dv])
    }

    /// What happens to the state at a token.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// The same weights under another rule.
    #[must_use]
    pub fn with_rule(self, rule: Rule) -> Self {
        GatedDeltaNet { rule, ..self }
    }
}

impl CausalConv {
    /// x `[B, T, channels]` to the same shape: [`parts::causal_conv_silu`].
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        parts::causal_conv_silu(x, self.weight.val())
    }
}

impl GatedRmsNorm {
    /// o and its gate z, `[B, T, Hv, V]`, to the same shape: [`parts::gated_rms_norm`].
    pub fn forward(&self, o: Tensor<4>, z: Tensor<4>) -> Tensor<4> {
        parts::gated_rms_norm(o, z, self.weight.val(), self.eps)
    }
}
