//! Makes a small checkpoint with random weights, in the layout of the released ones.
//!
//! The same seed gives the same bytes on every machine: the numbers come from integer arithmetic alone.

use std::path::Path;

use anyhow::{Context, Result};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::builtin;

const VOCAB: usize = 512;
/// Ids of the tokenizer; the rest pads the vocabulary, as in the released checkpoints.
const TOKENS: usize = 477;
const HIDDEN: usize = 96;
const FFN: usize = 160;
const LAYERS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const LINEAR_HEADS: usize = 2;
const LINEAR_DIM: usize = 64;
const TAPS: usize = 4;

/// The key of `config.json` that marks a checkpoint as untrained; its value says what to expect.
pub const MARK: &str = "untrained";

fn config(seed: u64) -> Value {
    let layers: Vec<&str> =
        (1..=LAYERS).map(|n| if n % 4 == 0 { "full_attention" } else { "linear_attention" }).collect();
    json!({
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "untrained": format!("its weights are random (seed {seed}), so what it says is noise"),
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "layer_types": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "attention_bias": false,
        "attn_output_gate": true,
        "linear_num_key_heads": LINEAR_HEADS,
        "linear_num_value_heads": LINEAR_HEADS,
        "linear_key_head_dim": LINEAR_DIM,
        "linear_value_head_dim": LINEAR_DIM,
        "linear_conv_kernel_dim": TAPS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
            "mrope_interleaved": true, "mrope_section": [4, 2, 2],
        },
        "max_position_embeddings": 65536,
        "tie_word_embeddings": true,
        "eos_token_id": 468,
    })
}

/// How a tensor's numbers are drawn.
#[derive(Clone, Copy)]
enum Fill {
    /// Normal with this deviation.
    Normal(f32),
    /// All the same.
    Constant(f32),
    /// Evenly from a range.
    Uniform(f32, f32),
}

/// Names, dimensions and numbers of all tensors.
fn tensors() -> Vec<(String, Vec<usize>, Fill)> {
    // Deviations that keep the activations near 1 from layer to layer.
    let from = |inputs: usize| Fill::Normal(1.0 / (inputs as f32).sqrt());
    let qkv = 3 * LINEAR_HEADS * LINEAR_DIM;
    let value = LINEAR_HEADS * LINEAR_DIM;
    let mut all = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN], Fill::Normal(0.05)),
        ("model.norm.weight".to_string(), vec![HIDDEN], Fill::Constant(0.0)),
    ];
    for layer in 0..LAYERS {
        let mut add =
            |name: &str, dims: &[usize], fill| all.push((format!("model.layers.{layer}.{name}"), dims.to_vec(), fill));
        add("input_layernorm.weight", &[HIDDEN], Fill::Constant(0.0));
        add("post_attention_layernorm.weight", &[HIDDEN], Fill::Constant(0.0));
        add("mlp.gate_proj.weight", &[FFN, HIDDEN], from(HIDDEN));
        add("mlp.up_proj.weight", &[FFN, HIDDEN], from(HIDDEN));
        add("mlp.down_proj.weight", &[HIDDEN, FFN], from(FFN));
        if (layer + 1) % 4 == 0 {
            add("self_attn.q_proj.weight", &[2 * HEADS * HEAD_DIM, HIDDEN], from(HIDDEN));
            add("self_attn.k_proj.weight", &[KV_HEADS * HEAD_DIM, HIDDEN], from(HIDDEN));
            add("self_attn.v_proj.weight", &[KV_HEADS * HEAD_DIM, HIDDEN], from(HIDDEN));
            add("self_attn.o_proj.weight", &[HIDDEN, HEADS * HEAD_DIM], from(HEADS * HEAD_DIM));
            add("self_attn.q_norm.weight", &[HEAD_DIM], Fill::Constant(0.0));
            add("self_attn.k_norm.weight", &[HEAD_DIM], Fill::Constant(0.0));
        } else {
            add("linear_attn.in_proj_qkv.weight", &[qkv, HIDDEN], from(HIDDEN));
            add("linear_attn.in_proj_z.weight", &[value, HIDDEN], from(HIDDEN));
            add("linear_attn.in_proj_b.weight", &[LINEAR_HEADS, HIDDEN], from(HIDDEN));
            add("linear_attn.in_proj_a.weight", &[LINEAR_HEADS, HIDDEN], from(HIDDEN));
            add("linear_attn.conv1d.weight", &[qkv, 1, TAPS], from(TAPS));
            add("linear_attn.A_log", &[LINEAR_HEADS], Fill::Uniform(0.0, 2.75));
            add("linear_attn.dt_bias", &[LINEAR_HEADS], Fill::Uniform(-6.9, -2.2));
            add("linear_attn.norm.weight", &[LINEAR_DIM], Fill::Constant(1.0));
            add("linear_attn.out_proj.weight", &[HIDDEN, value], from(value));
        }
    }
    all
}

/// Writes the checkpoint of `seed` into `dir`, which is made if need be.
///
/// # Errors
/// Where it cannot be written.
pub fn make(dir: &Path, seed: u64) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    let mut random = Random(seed);
    let mut data = Vec::new();
    for (name, dims, fill) in tensors() {
        let count: usize = dims.iter().product();
        let mut bytes = Vec::with_capacity(2 * count);
        for at in 0..count {
            let drawn = random.draw(fill);
            // Padding ids get the logit 0, never among the largest.
            let padding = name.ends_with("embed_tokens.weight") && at >= TOKENS * HIDDEN;
            bytes.extend_from_slice(&bf16(if padding { 0.0 } else { drawn }));
        }
        data.push((name, dims, bytes));
    }
    let views = data.iter().map(|(name, dims, bytes)| Ok((name, TensorView::new(Dtype::BF16, dims.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    let weights = safetensors::serialize(views, metadata)?;
    let config = format!("{:#}\n", config(seed));
    for (name, content) in builtin::FILES {
        let content = match name {
            "config.json" => config.as_bytes(),
            "model.safetensors" => &weights,
            _ => content,
        };
        let path = dir.join(name);
        std::fs::write(&path, content).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn draw(&mut self, fill: Fill) -> f32 {
        let mut unit = || (self.bits() >> 40) as f32 / (1u64 << 24) as f32;
        match fill {
            Fill::Constant(value) => value,
            Fill::Uniform(low, high) => low + (high - low) * unit(),
            // The sum of twelve uniform numbers has variance 1 and is near enough to normal; logarithms and cosines are not the
            // same to the last bit everywhere.
            Fill::Normal(deviation) => deviation * ((0..12).map(|_| unit()).sum::<f32>() - 6.0),
        }
    }
}

/// Little-endian bf16, rounded to nearest, ties to even.
fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_checkpoint_is_what_seed_0_makes() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), 0).unwrap();
        let mut size = 0;
        for (name, content) in builtin::FILES {
            let made = std::fs::read(dir.path().join(name)).unwrap();
            assert!(made == content, "{name} differs: run gatedelta-agent --make-untrained demos/agent/model --seed 0");
            size += content.len();
        }
        assert!(size <= 1_500_000, "{size} bytes");
    }

    #[test]
    fn another_seed_makes_other_weights() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), 1).unwrap();
        let made = std::fs::read(dir.path().join("model.safetensors")).unwrap();
        let (_, built_in) = builtin::FILES[5];
        assert_eq!(made.len(), built_in.len());
        assert_ne!(made, built_in);
    }
}
