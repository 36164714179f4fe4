//! A checkpoint of any shape with random weights, written as released ones are.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{Context, Result};
use gatedelta::qwen::{Config, LayerKind, SplitMix64};
use gatedelta::shape::Dtype;
use safetensors::{Dtype as Stored, View};
use serde_json::json;

/// A tensor of uniform numbers, drawn when it is written.
struct Tensor {
    shape: Vec<usize>,
    dtype: Dtype,
    centre: f32,
    bound: f32,
    seed: u64,
}

impl View for &Tensor {
    fn dtype(&self) -> Stored {
        match self.dtype {
            Dtype::F32 => Stored::F32,
            Dtype::F16 => Stored::F16,
            Dtype::Bf16 => Stored::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut random = SplitMix64::new(self.seed);
        let numbers = self.shape.iter().product::<usize>();
        let mut out = Vec::with_capacity(self.data_len());
        for first in (0..numbers).step_by(4) {
            let bits = random.bits();
            for i in 0..4.min(numbers - first) {
                let unit = (bits >> (16 * i)) as u16 as f32 / 32767.5 - 1.0;
                let x = self.centre + unit * self.bound;
                match self.dtype {
                    Dtype::F32 => out.extend_from_slice(&x.to_le_bytes()),
                    Dtype::F16 => out.extend_from_slice(&half::f16::from_f32(x).to_le_bytes()),
                    Dtype::Bf16 => out.extend_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
                }
            }
        }
        Cow::Owned(out)
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size() as usize
    }
}

/// Writes `config.json` and `model.safetensors` into a directory that exists.
///
/// # Errors
/// If they cannot be written.
pub fn write(dir: &Path, config: &Config, dtype: Dtype) -> Result<()> {
    let tensors = tensors(config, dtype);
    let path = dir.join("model.safetensors");
    safetensors::serialize_to_file(tensors.iter().map(|(name, tensor)| (name, tensor)), None, &path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let path = dir.join("config.json");
    std::fs::write(&path, json(config).to_string()).with_context(|| format!("cannot write {}", path.display()))
}

fn tensors(config: &Config, dtype: Dtype) -> Vec<(String, Tensor)> {
    let c = config;
    let (hidden, ffn, vocab, dim) = (c.hidden, c.ffn, c.vocab, c.head_dim);
    let (hv, v, channels) = (c.linear.hv, c.linear.v, c.conv_channels());
    let mut out: Vec<(String, Tensor)> = Vec::new();
    let mut add = |name: String, shape: &[u32], centre: f32, bound: f32| {
        let seed = out.len() as u64;
        out.push((name, Tensor { shape: shape.iter().map(|n| *n as usize).collect(), dtype, centre, bound, seed }));
    };
    // Uniform with variance 1 / k: a product with it keeps the size of its input.
    let keeps = |k: u32| (3.0 / k as f32).sqrt();
    add("model.embed_tokens.weight".into(), &[vocab, hidden], 0.0, keeps(hidden));
    for (i, kind) in c.layers.iter().enumerate() {
        let name = |tensor: &str| format!("model.layers.{i}.{tensor}");
        add(name("input_layernorm.weight"), &[hidden], 0.0, 0.3);
        let mut matrix = |tensor: &str, n: u32, k: u32| add(name(tensor), &[n, k], 0.0, keeps(k));
        match kind {
            LayerKind::Linear => {
                matrix("linear_attn.in_proj_qkv.weight", channels, hidden);
                matrix("linear_attn.in_proj_z.weight", hv * v, hidden);
                matrix("linear_attn.in_proj_a.weight", hv, hidden);
                matrix("linear_attn.in_proj_b.weight", hv, hidden);
                matrix("linear_attn.out_proj.weight", hidden, hv * v);
                add(name("linear_attn.conv1d.weight"), &[channels, 1, c.conv_taps], 0.0, 0.8);
                add(name("linear_attn.A_log"), &[hv], 0.0, 2.0);
                add(name("linear_attn.dt_bias"), &[hv], -3.0, 2.0);
                add(name("linear_attn.norm.weight"), &[v], 1.0, 0.3);
            }
            LayerKind::Full => {
                matrix("self_attn.q_proj.weight", 2 * c.heads * dim, hidden);
                matrix("self_attn.k_proj.weight", c.kv_heads * dim, hidden);
                matrix("self_attn.v_proj.weight", c.kv_heads * dim, hidden);
                matrix("self_attn.o_proj.weight", hidden, c.heads * dim);
                add(name("self_attn.q_norm.weight"), &[dim], 0.0, 0.3);
                add(name("self_attn.k_norm.weight"), &[dim], 0.0, 0.3);
            }
        }
        add(name("post_attention_layernorm.weight"), &[hidden], 0.0, 0.3);
        add(name("mlp.gate_proj.weight"), &[ffn, hidden], 0.0, keeps(hidden));
        add(name("mlp.up_proj.weight"), &[ffn, hidden], 0.0, keeps(hidden));
        add(name("mlp.down_proj.weight"), &[hidden, ffn], 0.0, keeps(ffn));
    }
    add("model.norm.weight".into(), &[hidden], 0.0, 0.3);
    if !c.tied {
        add("lm_head.weight".into(), &[vocab, hidden], 0.0, keeps(hidden));
    }
    out
}

fn json(config: &Config) -> serde_json::Value {
    let c = config;
    let kind = |kind: &LayerKind| match kind {
        LayerKind::Linear => "linear_attention",
        LayerKind::Full => "full_attention",
    };
    json!({
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers.len(),
        "layer_types": c.layers.iter().map(kind).collect::<Vec<_>>(),
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": c.rope_theta,
            "partial_rotary_factor": f64::from(c.rotary) / f64::from(c.head_dim),
        },
        "linear_num_key_heads": c.linear.hk,
        "linear_num_value_heads": c.linear.hv,
        "linear_key_head_dim": c.linear.k,
        "linear_value_head_dim": c.linear.v,
        "linear_conv_kernel_dim": c.conv_taps,
        "rms_norm_eps": c.eps,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied,
        "eos_token_id": c.eos,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gatedelta::backend::cpu::Cpu;
    use gatedelta::qwen::{LoadOptions, Model};
    use std::sync::Arc;

    #[test]
    fn what_is_written_is_read_as_the_same_shape() {
        let shape = |tied| {
            let mut config = Config::preset("0.8b").unwrap();
            config.layers.truncate(4);
            Config { vocab: 96, hidden: 64, ffn: 48, heads: 2, head_dim: 32, rotary: 8, tied, eos: vec![7], ..config }
        };
        for (config, dtype) in [(shape(true), Dtype::Bf16), (shape(false), Dtype::F32)] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &config, dtype).unwrap();
            assert_eq!(Config::read(&dir.path().join("config.json")).unwrap(), config);
            let model = Model::load(dir.path(), Arc::new(Cpu::new(Some(1)).unwrap()), &LoadOptions::default()).unwrap();
            assert_eq!(model.config().parameters(), config.parameters());
            let logits = model.session().unwrap().prefill(&[1, 2, 3], &mut |_, _| {}).unwrap();
            assert!(logits.iter().all(|x| x.is_finite()) && logits.iter().any(|x| *x != 0.0));
        }
        let absent = Path::new("no/such/directory");
        assert!(format!("{:#}", write(absent, &shape(true), Dtype::F32).unwrap_err()).contains("no/such/directory"));
    }
}
