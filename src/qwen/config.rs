//! `config.json` and `generation_config.json`: what the model is, checked before anything else looks at it.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::qwen::sample::Sampling;
use crate::shape::{HeadMap, Heads};

/// What mixes the tokens of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Gated DeltaNet.
    Linear,
    /// Softmax attention over all positions, with rotary.
    Full,
}

/// The hyper-parameters of a Qwen3.5 text model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Rows of the embedding table and of the head.
    pub vocab: u32,
    /// Numbers in a token's row of activations.
    pub hidden: u32,
    /// Inner size of the MLP.
    pub ffn: u32,
    /// The mixer of every layer, first to last.
    pub layers: Vec<LayerKind>,
    /// Query heads of full attention.
    pub heads: u32,
    /// Key and value heads of full attention; divides `heads`.
    pub kv_heads: u32,
    /// Size of a head of full attention.
    pub head_dim: u32,
    /// Rotated numbers of a head: even, at most `head_dim`.
    pub rotary: u32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Heads of the Gated DeltaNet layers.
    pub linear: Heads,
    /// Taps of the causal convolution, 2 to 8.
    pub conv_taps: u32,
    /// eps of every RMS norm.
    pub eps: f32,
    /// The head reads the embedding table.
    pub tied: bool,
    /// Positions that the model was made for.
    pub max_positions: u64,
    /// Ids that end an answer, as far as `config.json` knows.
    pub eos: Vec<u32>,
}

/// Architectures that share this text model; the second is a text-only export.
const ARCHITECTURES: [&str; 2] = ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"];
const MODEL_TYPES: [&str; 2] = ["qwen3_5", "qwen3_5_text"];

impl Config {
    /// The released sizes: `"0.8b"`, `"2b"`, `"4b"`, `"9b"`, `"27b"`.
    ///
    /// # Errors
    /// [`Error::Argument`] for any other name.
    pub fn preset(name: &str) -> Result<Config> {
        let (hidden, ffn, layers, heads, kv_heads, hv, tied) = match name.to_ascii_lowercase().as_str() {
            "0.8b" => (1024, 3584, 24, 8, 2, 16, true),
            "2b" => (2048, 6144, 24, 8, 2, 16, true),
            "4b" => (2560, 9216, 32, 16, 4, 32, true),
            "9b" => (4096, 12288, 32, 16, 4, 32, false),
            "27b" => (5120, 17408, 64, 24, 4, 48, false),
            _ => return Err(Error::argument("preset", name, "0.8b, 2b, 4b, 9b or 27b")),
        };
        let config = Config {
            vocab: 248_320,
            hidden,
            ffn,
            layers: interval_layers(layers, 4),
            heads,
            kv_heads,
            head_dim: 256,
            rotary: 64,
            rope_theta: 1e7,
            linear: Heads { hk: 16, hv, k: 128, v: 128, map: HeadMap::Div },
            conv_taps: 4,
            eps: 1e-6,
            tied,
            max_positions: 262_144,
            eos: vec![248_044],
        };
        config.check()?;
        Ok(config)
    }

    /// Reads `config.json` in either released layout: the text part under `text_config`, or at the top.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file and the key.
    pub fn read(path: &Path) -> Result<Config> {
        let value = read_json(path)?;
        Config::from_json(&value).map_err(|e| Error::load(path, e))
    }

    /// Reads the content of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the key, [`Error::Unsupported`] naming what only another runtime can do.
    pub fn from_json(value: &Value) -> Result<Config> {
        architecture(value)?;
        let outer = Object { value, at: "" };
        let c = match value.get("text_config") {
            Some(text) if text.is_object() => Object { value: text, at: "text_config." },
            Some(other) => return Err(Error::argument("text_config", short(other), "an object")),
            None => outer,
        };
        unsupported(&c, &outer)?;
        let layers = c.u32("num_hidden_layers")?;
        let head_dim = match c.opt_u32("head_dim")? {
            Some(n) => n,
            None => c.u32("hidden_size")? / c.u32("num_attention_heads")?.max(1),
        };
        let rope = match c.get("rope_parameters") {
            Some(v) if v.is_object() => Object { value: v, at: "rope_parameters." },
            _ => Object { value: c.value, at: c.at },
        };
        if let Some(kind) = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str)
            && kind != "default"
        {
            return Err(Error::argument("rope_parameters.rope_type", kind, "default"));
        }
        let partial = rope.opt_f64("partial_rotary_factor")?.unwrap_or(0.25);
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(Error::argument("partial_rotary_factor", partial, "above 0, at most 1"));
        }
        let config = Config {
            vocab: c.u32("vocab_size")?,
            hidden: c.u32("hidden_size")?,
            ffn: c.u32("intermediate_size")?,
            layers: layer_kinds(&c, layers)?,
            heads: c.u32("num_attention_heads")?,
            kv_heads: c.u32("num_key_value_heads")?,
            head_dim,
            rotary: (head_dim as f64 * partial) as u32,
            rope_theta: rope.opt_f64("rope_theta")?.unwrap_or(1e7),
            linear: Heads::new(
                c.u32("linear_num_key_heads")?,
                c.u32("linear_num_value_heads")?,
                c.u32("linear_key_head_dim")?,
                c.u32("linear_value_head_dim")?,
                HeadMap::Div,
            )?,
            conv_taps: c.u32("linear_conv_kernel_dim")?,
            eps: c.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied: match outer.opt_bool("tie_word_embeddings")? {
                Some(tied) => tied,
                None => c.opt_bool("tie_word_embeddings")?.unwrap_or(false),
            },
            max_positions: c.u32("max_position_embeddings")? as u64,
            eos: match c.ids("eos_token_id")? {
                ids if ids.is_empty() => outer.ids("eos_token_id")?,
                ids => ids,
            },
        };
        config.check()?;
        Ok(config)
    }

    /// Checks everything that the runtime relies on. Configs made by hand pass through here too.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the field.
    pub fn check(&self) -> Result<()> {
        Heads::new(self.linear.hk, self.linear.hv, self.linear.k, self.linear.v, self.linear.map)?;
        for (what, n, multiple) in [
            ("vocab_size", self.vocab, 1),
            ("hidden_size", self.hidden, 4),
            ("intermediate_size", self.ffn, 4),
            ("num_attention_heads", self.heads, 1),
            ("num_key_value_heads", self.kv_heads, 1),
            ("head_dim", self.head_dim, 4),
        ] {
            // Offsets inside a token's row are u32 in the kernels, with room for a batch of rows.
            if n == 0 || n > 1 << 24 || !n.is_multiple_of(multiple) {
                return Err(Error::argument(what, n, format!("a multiple of {multiple} from {multiple} to 2^24")));
            }
        }
        if self.layers.is_empty() || self.layers.len() > 1024 {
            return Err(Error::argument("num_hidden_layers", self.layers.len(), "1 to 1024"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let multiple = format!("a multiple of num_key_value_heads = {}", self.kv_heads);
            return Err(Error::argument("num_attention_heads", self.heads, multiple));
        }
        if self.head_dim > 256 {
            return Err(Error::argument("head_dim", self.head_dim, "at most 256"));
        }
        // Row lengths are u32, and are computed from these.
        let row = 2 * (self.heads as u64 + self.kv_heads as u64) * self.head_dim as u64;
        if row > 1 << 24 {
            let found = format!("{} and {} heads of {}", self.heads, self.kv_heads, self.head_dim);
            return Err(Error::argument(
                "num_attention_heads, num_key_value_heads and head_dim",
                found,
                "a row of at most 2^24",
            ));
        }
        if self.rotary == 0 || self.rotary > self.head_dim || !self.rotary.is_multiple_of(2) {
            return Err(Error::argument(
                "rotated part of a head",
                self.rotary,
                format!("even, 2 to {}", self.head_dim),
            ));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(Error::argument("rope_theta", self.rope_theta, "a positive number"));
        }
        if !(2..=8).contains(&self.conv_taps) {
            return Err(Error::argument("linear_conv_kernel_dim", self.conv_taps, "2 to 8"));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(Error::argument("rms_norm_eps", self.eps, "a positive number"));
        }
        if self.max_positions == 0 {
            return Err(Error::argument("max_position_embeddings", 0, "at least 1"));
        }
        Ok(())
    }

    /// Channels of the convolution: `[q: Hk K][k: Hk K][v: Hv V]`.
    pub fn conv_channels(&self) -> u32 {
        2 * self.linear.hk * self.linear.k + self.linear.hv * self.linear.v
    }

    /// Numbers of a Gated DeltaNet layer's projected row: `[qkv | z | a | b]`.
    pub fn linear_row(&self) -> u32 {
        self.conv_channels() + self.linear.hv * self.linear.v + 2 * self.linear.hv
    }

    /// Numbers of a full-attention layer's projected row: query and gate per head, keys, values.
    pub fn full_row(&self) -> u32 {
        2 * (self.heads + self.kv_heads) * self.head_dim
    }

    /// Number of layers of a kind.
    pub fn count(&self, kind: LayerKind) -> u32 {
        self.layers.iter().filter(|&&k| k == kind).count() as u32
    }

    /// Numbers in all weights together.
    pub fn parameters(&self) -> u64 {
        let (h, f) = (self.hidden as u64, self.ffn as u64);
        let (hv, v) = (self.linear.hv as u64, self.linear.v as u64);
        let channels = self.conv_channels() as u64;
        let linear = h * self.linear_row() as u64 + channels * self.conv_taps as u64 + 2 * hv + v + hv * v * h;
        let wide = (self.heads * self.head_dim) as u64;
        let full = h * self.full_row() as u64 + wide * h + 2 * self.head_dim as u64;
        let each = 3 * h * f + 2 * h;
        let tables = if self.tied { 1 } else { 2 } * self.vocab as u64 * h;
        self.count(LayerKind::Linear) as u64 * linear
            + self.count(LayerKind::Full) as u64 * full
            + self.layers.len() as u64 * each
            + tables
            + h
    }
}

/// Every `interval`-th layer is full attention.
fn interval_layers(layers: u32, interval: u32) -> Vec<LayerKind> {
    (1..=layers).map(|i| if i.is_multiple_of(interval) { LayerKind::Full } else { LayerKind::Linear }).collect()
}

/// Refuses other models by name.
fn architecture(value: &Value) -> Result<()> {
    if !value.is_object() {
        return Err(Error::argument("config", short(value), "a JSON object"));
    }
    let named = value.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    let kind = value.get("model_type").and_then(Value::as_str);
    let (found, known) = match (named, kind) {
        (Some(name), _) => (name, ARCHITECTURES.contains(&name)),
        (None, Some(kind)) => (kind, MODEL_TYPES.contains(&kind)),
        (None, None) => ("none", false),
    };
    if known {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("architecture {found}"),
        by: "the Qwen3.5 runtime".into(),
        why: format!("it runs {}", ARCHITECTURES.join(" and ")),
    })
}

/// Refuses options that change the arithmetic and that no released checkpoint uses.
fn unsupported(c: &Object<'_>, outer: &Object<'_>) -> Result<()> {
    if c.get("quantization_config").or_else(|| outer.get("quantization_config")).is_some_and(|q| !q.is_null()) {
        return Err(Error::Unsupported {
            what: "quantization_config".into(),
            by: "the Qwen3.5 runtime".into(),
            why: "it reads f32, f16 and bf16 weights".into(),
        });
    }
    if let Some(act) = c.get("hidden_act").and_then(Value::as_str)
        && act != "silu"
    {
        return Err(Error::argument("hidden_act", act, "silu"));
    }
    if c.opt_bool("attention_bias")? == Some(true) {
        return Err(Error::argument("attention_bias", true, false));
    }
    if c.opt_bool("attn_output_gate")? == Some(false) {
        return Err(Error::argument("attn_output_gate", false, true));
    }
    Ok(())
}

/// `layer_types`, or the interval where it is absent.
fn layer_kinds(c: &Object<'_>, layers: u32) -> Result<Vec<LayerKind>> {
    let Some(types) = c.get("layer_types").filter(|v| !v.is_null()) else {
        let interval = c.opt_u32("full_attention_interval")?.unwrap_or(4);
        if layers > 1024 || interval == 0 {
            return Err(Error::argument("num_hidden_layers", layers, "1 to 1024, and an interval of at least 1"));
        }
        return Ok(interval_layers(layers, interval));
    };
    let Some(types) = types.as_array() else {
        return Err(Error::argument("layer_types", short(types), "a list of names"));
    };
    if types.len() != layers as usize {
        return Err(Error::argument(
            "layer_types",
            format!("{} entries", types.len()),
            format!("{layers}, one a layer"),
        ));
    }
    let kind = |(i, v): (usize, &Value)| match v.as_str() {
        Some("linear_attention") => Ok(LayerKind::Linear),
        Some("full_attention") => Ok(LayerKind::Full),
        _ => Err(Error::argument(format!("layer_types[{i}]"), short(v), "linear_attention or full_attention")),
    };
    types.iter().enumerate().map(kind).collect()
}

const POSITIVE: &str = "a positive integer below 2^32";

/// A JSON object and how its keys are named in errors.
#[derive(Clone, Copy)]
struct Object<'a> {
    value: &'a Value,
    at: &'static str,
}

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_string(), short);
        Error::argument(format!("{}{key}", self.at), found, expected)
    }

    fn u32(&self, key: &str) -> Result<u32> {
        self.opt_u32(key)?.ok_or_else(|| self.wrong(key, POSITIVE))
    }

    fn opt_u32(&self, key: &str) -> Result<Option<u32>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(n) if n > 0 => Ok(Some(n)),
                _ => Err(self.wrong(key, POSITIVE)),
            },
        }
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => v.as_f64().map(Some).ok_or_else(|| self.wrong(key, "a number")),
        }
    }

    fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => v.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// One id, a list of them, or none.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match self.get(key) {
            None | Some(Value::Null) => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(v) => id(v).map(|n| vec![n]),
        };
        ids.ok_or_else(|| self.wrong(key, "an id or a list of ids"))
    }
}

/// What `generation_config.json` asks for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// How the checkpoint wants its answers drawn.
    pub sampling: Sampling,
    /// Ids that end an answer.
    pub eos: Vec<u32>,
}

impl GenerationConfig {
    /// Reads the file; a directory without one gets [`Sampling::default`] and no ids.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file and the key.
    pub fn read(path: &Path) -> Result<GenerationConfig> {
        if !path.exists() {
            return Ok(GenerationConfig::default());
        }
        let value = read_json(path)?;
        GenerationConfig::from_json(&value).map_err(|e| Error::load(path, e))
    }

    fn from_json(value: &Value) -> Result<GenerationConfig> {
        let c = Object { value, at: "" };
        let number = |key: &str, default: f32| Ok::<_, Error>(c.opt_f64(key)?.map_or(default, |n| n as f32));
        let greedy = c.opt_bool("do_sample")? == Some(false);
        let sampling = Sampling {
            temperature: if greedy { 0.0 } else { number("temperature", 1.0)? },
            top_k: match c.get("top_k").and_then(Value::as_u64) {
                Some(0) => 0,
                _ => c.opt_u32("top_k")?.unwrap_or(0),
            },
            top_p: number("top_p", 1.0)?,
            min_p: number("min_p", 0.0)?,
            presence_penalty: number("presence_penalty", 0.0)?,
        };
        sampling.check()?;
        Ok(GenerationConfig { sampling, eos: c.ids("eos_token_id")? })
    }
}

/// A JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|e| Error::load(path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::load(path, format!("not JSON: {e}")))
}

/// A value for an error message, cut to a readable length.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
