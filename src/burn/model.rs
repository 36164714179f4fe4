//! The Qwen3.5 text model: blocks of a mixer and an MLP, an embedding table below and a head above.

use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Linear};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Int, Tensor};
use serde_json::{Value, json};

use super::mixer::linear;
use super::{Engine, GatedAttention, GatedAttentionConfig, GatedDeltaNet, GatedDeltaNetConfig, Rule, parts};
use crate::error::{Error, Result};
use crate::qwen;
use crate::qwen::LayerKind;

/// Size and eps of an [`RmsNorm`].
#[derive(Config, Debug)]
pub struct RmsNormConfig {
    /// Numbers that are normed together.
    pub size: usize,
    /// Added to the mean of the squares.
    #[config(default = 1e-6)]
    pub rms_norm_eps: f64,
}

/// The zero-centred norm over the last dimension: [`parts::zero_centred_rms_norm`].
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[size]`; zero is the identity.
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

impl RmsNormConfig {
    /// The identity.
    pub fn init(&self, device: &Device) -> RmsNorm {
        RmsNorm { weight: Initializer::Zeros.init([self.size], device), eps: self.rms_norm_eps }
    }
}

impl RmsNorm {
    /// x `[.., size]` to the same shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        parts::zero_centred_rms_norm(x, self.weight.val(), self.eps)
    }
}

/// Sizes of an [`Mlp`].
#[derive(Config, Debug)]
pub struct MlpConfig {
    /// Numbers in a token's row.
    pub hidden_size: usize,
    /// Inner size.
    pub intermediate_size: usize,
    /// Width of the normal distribution that matrices are drawn from; none: `from^-1/2` each.
    #[config(default = "Some(0.02)")]
    pub initializer_range: Option<f64>,
    /// What the width of the matrices that write to the residual stream is multiplied by: `(2 layers)^-1/2` lets the
    /// embeddings through to the last layers of a model that is trained anew.
    #[config(default = 1.0)]
    pub residual_scale: f64,
}

/// SwiGLU: `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[hidden, inner]`
    pub gate_proj: Linear,
    /// `[hidden, inner]`
    pub up_proj: Linear,
    /// `[inner, hidden]`
    pub down_proj: Linear,
}

impl MlpConfig {
    /// Matrices normal with the width `initializer_range`.
    pub fn init(&self, device: &Device) -> Mlp {
        Mlp {
            gate_proj: linear(self.hidden_size, self.intermediate_size, self.initializer_range, 1.0, device),
            up_proj: linear(self.hidden_size, self.intermediate_size, self.initializer_range, 1.0, device),
            down_proj: linear(
                self.intermediate_size,
                self.hidden_size,
                self.initializer_range,
                self.residual_scale,
                device,
            ),
        }
    }
}

impl Mlp {
    /// x `[B, T, hidden]` to the same shape.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.down_proj.forward(silu(self.gate_proj.forward(x.clone())) * self.up_proj.forward(x))
    }
}

/// What mixes the tokens of a block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Mixer {
    /// Gated DeltaNet.
    Linear(GatedDeltaNet),
    /// Softmax attention over all positions.
    Full(GatedAttention),
}

/// One layer: mixer, then MLP, each behind its norm and added to what it read.
#[derive(Module, Debug)]
pub struct Block {
    /// Before the mixer.
    pub input_layernorm: RmsNorm,
    /// The mixer.
    pub mixer: Mixer,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// The MLP.
    pub mlp: Mlp,
}

impl Block {
    /// x `[B, T, hidden]` to the same shape: `x += mixer(N(x))`, then `x += mlp(N(x))`.
    ///
    /// # Panics
    /// As [`GatedDeltaNet::forward`] and [`GatedAttention::forward`].
    #[track_caller]
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + match &self.mixer {
            Mixer::Linear(mixer) => mixer.forward(normed),
            Mixer::Full(mixer) => mixer.forward(normed),
        };
        x.clone() + self.mlp.forward(self.post_attention_layernorm.forward(x))
    }
}

/// The sizes of a model, by their names in `config.json`. Defaults are those that all released models share.
#[derive(Config, Debug)]
pub struct Qwen35Config {
    /// Rows of the embedding table and of the head.
    pub vocab_size: usize,
    /// Numbers in a token's row.
    pub hidden_size: usize,
    /// Inner size of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads of full attention.
    pub num_attention_heads: usize,
    /// Heads of keys and values of full attention.
    pub num_key_value_heads: usize,
    /// Every how many blocks one is full attention.
    #[config(default = 4)]
    pub full_attention_interval: usize,
    /// Size of a head of full attention.
    #[config(default = 256)]
    pub head_dim: usize,
    /// The part of a head that is rotated.
    #[config(default = 0.25)]
    pub partial_rotary_factor: f64,
    /// Base of the rotary frequencies.
    #[config(default = 1e7)]
    pub rope_theta: f64,
    /// q and k heads of Gated DeltaNet.
    #[config(default = 16)]
    pub linear_num_key_heads: usize,
    /// v heads of Gated DeltaNet.
    #[config(default = 16)]
    pub linear_num_value_heads: usize,
    /// Size of a q or k head of Gated DeltaNet.
    #[config(default = 128)]
    pub linear_key_head_dim: usize,
    /// Size of a v head of Gated DeltaNet.
    #[config(default = 128)]
    pub linear_value_head_dim: usize,
    /// Taps of the causal convolution.
    #[config(default = 4)]
    pub linear_conv_kernel_dim: usize,
    /// eps of every norm.
    #[config(default = 1e-6)]
    pub rms_norm_eps: f64,
    /// The head reads the embedding table.
    #[config(default = true)]
    pub tie_word_embeddings: bool,
    /// Positions that the model is made for. Nothing here depends on it.
    #[config(default = 262144)]
    pub max_position_embeddings: usize,
    /// The id that ends an answer, for `config.json`.
    pub eos_token_id: Option<u32>,
    /// Width of the normal distribution that the embedding table is drawn from.
    #[config(default = 0.02)]
    pub embedding_range: f64,
    /// Width of the normal distribution that matrices are drawn from; none: `from^-1/2` each.
    #[config(default = "Some(0.02)")]
    pub initializer_range: Option<f64>,
    /// What the width of the matrices that write to the residual stream is multiplied by: `(2 layers)^-1/2` lets the
    /// embeddings through to the last layers of a model that is trained anew.
    #[config(default = 1.0)]
    pub residual_scale: f64,
    /// What happens to the state at a token of Gated DeltaNet.
    #[config(default = "Rule::Delta")]
    pub rule: Rule,
}

impl Qwen35Config {
    /// The content of a `config.json` of a text-only export, as transformers writes it.
    ///
    /// # Errors
    /// [`Error::Argument`] for an interval of 0.
    pub fn to_json(&self) -> Result<Value> {
        if self.full_attention_interval == 0 {
            return Err(Error::argument("full_attention_interval", 0, "at least 1"));
        }
        let full = |i: usize| (i + 1).is_multiple_of(self.full_attention_interval);
        let kind = |i: usize| if full(i) { "full_attention" } else { "linear_attention" };
        // Frequencies by position row: every third from 0, 1 and 2.
        let frequencies = (self.head_dim as f64 * self.partial_rotary_factor) as usize / 2;
        let sections: Vec<usize> = (0..3).map(|row| (frequencies + 2 - row) / 3).collect();
        Ok(json!({
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "layer_types": (0..self.num_hidden_layers).map(kind).collect::<Vec<_>>(),
            "full_attention_interval": self.full_attention_interval,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
                "mrope_interleaved": true,
                "mrope_section": sections,
            },
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_value_head_dim": self.linear_value_head_dim,
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": false,
            "attn_output_gate": true,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": self.eos_token_id,
            "mtp_num_hidden_layers": 0,
        }))
    }

    /// The same for the runtime, with every size checked.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the size that is out of range.
    pub fn check(&self) -> Result<qwen::Config> {
        qwen::Config::from_json(&self.to_json()?)
    }

    /// A model with random weights, drawn as those of its layers; the embedding table normal with the width `embedding_range`.
    ///
    /// # Errors
    /// As [`Qwen35Config::check`].
    pub fn init(&self, engine: &Engine, device: &Device) -> Result<Qwen35> {
        let kinds = self.check()?.layers;
        let norm = RmsNormConfig::new(self.hidden_size).with_rms_norm_eps(self.rms_norm_eps);
        let mixer = |kind: &LayerKind| -> Result<Mixer> {
            Ok(match kind {
                LayerKind::Linear => Mixer::Linear(self.linear().init(engine, device)?),
                LayerKind::Full => Mixer::Full(self.full().init(device)?),
            })
        };
        let block = |kind: &LayerKind| -> Result<Block> {
            Ok(Block {
                input_layernorm: norm.init(device),
                mixer: mixer(kind)?,
                post_attention_layernorm: norm.init(device),
                mlp: MlpConfig::new(self.hidden_size, self.intermediate_size)
                    .with_initializer_range(self.initializer_range)
                    .with_residual_scale(self.residual_scale)
                    .init(device),
            })
        };
        let initializer = Initializer::Normal { mean: 0.0, std: self.embedding_range };
        let embed = EmbeddingConfig::new(self.vocab_size, self.hidden_size).with_initializer(initializer);
        Ok(Qwen35 {
            embed_tokens: embed.init(device),
            layers: kinds.iter().map(block).collect::<Result<_>>()?,
            norm: norm.init(device),
            lm_head: (!self.tie_word_embeddings)
                .then(|| linear(self.hidden_size, self.vocab_size, self.initializer_range, 1.0, device)),
            config: self.clone(),
        })
    }

    fn linear(&self) -> GatedDeltaNetConfig {
        GatedDeltaNetConfig {
            hidden_size: self.hidden_size,
            linear_num_key_heads: self.linear_num_key_heads,
            linear_num_value_heads: self.linear_num_value_heads,
            linear_key_head_dim: self.linear_key_head_dim,
            linear_value_head_dim: self.linear_value_head_dim,
            linear_conv_kernel_dim: self.linear_conv_kernel_dim,
            rms_norm_eps: self.rms_norm_eps,
            initializer_range: self.initializer_range,
            residual_scale: self.residual_scale,
            rule: self.rule,
        }
    }

    fn full(&self) -> GatedAttentionConfig {
        GatedAttentionConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            partial_rotary_factor: self.partial_rotary_factor,
            rope_theta: self.rope_theta,
            rms_norm_eps: self.rms_norm_eps,
            initializer_range: self.initializer_range,
            residual_scale: self.residual_scale,
        }
    }
}

/// The model. Names are those of the released checkpoints, save that `mixer` stands for `linear_attn` and `self_attn`.
#[derive(Module, Debug)]
pub struct Qwen35 {
    /// `[vocab, hidden]`
    pub embed_tokens: Embedding,
    /// First to last.
    pub layers: Vec<Block>,
    /// After the last block.
    pub norm: RmsNorm,
    /// `[hidden, vocab]`; none where the head reads the embedding table.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    config: Qwen35Config,
}

impl Qwen35 {
    /// Logits `[B, T, vocab]` of ids `[B, T]`: of every token from those up to it in its sequence.
    ///
    /// # Panics
    /// As [`Qwen35::hidden`].
    #[track_caller]
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.logits(self.hidden(ids))
    }

    /// What the head reads, `[B, T, hidden]`, of ids `[B, T]`.
    ///
    /// # Panics
    /// As [`Block::forward`]. What an id outside the vocabulary does is burn's to say: its CPU device panics.
    #[track_caller]
    pub fn hidden(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let x = self.embed_tokens.forward(ids);
        self.norm.forward(self.layers.iter().fold(x, |x, block| block.forward(x)))
    }

    /// The head: x `[B, T, hidden]` to logits `[B, T, vocab]`.
    pub fn logits(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => x.matmul(self.embed_tokens.weight.val().transpose().unsqueeze()),
        }
    }

    /// The sizes.
    pub fn config(&self) -> &Qwen35Config {
        &self.config
    }

    /// The same weights under another rule.
    #[must_use]
    pub fn with_rule(mut self, rule: Rule) -> Self {
        self.config.rule = rule;
        let with_rule = |block: Block| match block.mixer {
            Mixer::Linear(mixer) => Block { mixer: Mixer::Linear(mixer.with_rule(rule)), ..block },
            Mixer::Full(_) => block,
        };
        self.layers = self.layers.into_iter().map(with_rule).collect();
        self
    }
}
