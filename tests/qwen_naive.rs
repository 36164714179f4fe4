//! A small Qwen3.5 checkpoint with random weights, written as files, and the model as plain float64 formulas.

use std::collections::BTreeMap;
use std::path::Path;

use gatedelta::shape::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::util::Random;

/// Sizes of a checkpoint.
#[derive(Debug, Clone)]
pub struct Tiny {
    pub hidden: usize,
    pub ffn: usize,
    /// 'L' and 'F', first layer to last.
    pub layers: &'static str,
    pub heads: usize,
    pub kv: usize,
    pub dim: usize,
    pub hk: usize,
    pub hv: usize,
    pub k: usize,
    pub v: usize,
    pub taps: usize,
    pub vocab: usize,
    pub tied: bool,
}

impl Default for Tiny {
    fn default() -> Self {
        Tiny {
            hidden: 48,
            ffn: 80,
            layers: "LFL",
            heads: 4,
            kv: 2,
            dim: 32,
            hk: 2,
            hv: 6,
            k: 16,
            v: 32,
            taps: 4,
            vocab: 96,
            tied: false,
        }
    }
}

/// Tensors by name: shape and numbers.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl Tiny {
    pub fn config(&self) -> Value {
        let kinds: Vec<&str> =
            self.layers.chars().map(|c| if c == 'L' { "linear_attention" } else { "full_attention" }).collect();
        json!({
            "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": self.vocab,
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": kinds.len(),
            "layer_types": kinds, "num_attention_heads": self.heads, "num_key_value_heads": self.kv,
            "head_dim": self.dim, "linear_num_key_heads": self.hk, "linear_num_value_heads": self.hv,
            "linear_key_head_dim": self.k, "linear_value_head_dim": self.v, "linear_conv_kernel_dim": self.taps,
            "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 65536,
            "tie_word_embeddings": self.tied,
            "rope_parameters": { "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25 }
        })
    }

    /// Random tensors, rounded to `dtype` so that the files hold them exactly.
    pub fn tensors(&self, seed: u64, dtype: Dtype) -> Tensors {
        let mut r = Random::new(seed);
        let mut all = Tensors::new();
        let mut add = |name: String, shape: &[usize], centre: f32, spread: f32| {
            let n = shape.iter().product();
            let numbers = (0..n).map(|_| round(centre + spread * r.normal(), dtype)).collect();
            all.insert(name, (shape.to_vec(), numbers));
        };
        let (h, f) = (self.hidden, self.ffn);
        let scale = |k: usize| (k as f32).powf(-0.5);
        add("model.embed_tokens.weight".into(), &[self.vocab, h], 0.0, 1.0);
        add("model.norm.weight".into(), &[h], 0.0, 0.3);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, h], 0.0, scale(h));
        }
        for (i, kind) in self.layers.chars().enumerate() {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            add(at("input_layernorm.weight"), &[h], 0.0, 0.3);
            add(at("post_attention_layernorm.weight"), &[h], 0.0, 0.3);
            add(at("mlp.gate_proj.weight"), &[f, h], 0.0, scale(h));
            add(at("mlp.up_proj.weight"), &[f, h], 0.0, scale(h));
            add(at("mlp.down_proj.weight"), &[h, f], 0.0, scale(f));
            if kind == 'L' {
                let (qk, v) = (self.hk * self.k, self.hv * self.v);
                add(at("linear_attn.in_proj_qkv.weight"), &[2 * qk + v, h], 0.0, scale(h));
                add(at("linear_attn.in_proj_z.weight"), &[v, h], 0.0, scale(h));
                add(at("linear_attn.in_proj_a.weight"), &[self.hv, h], 0.0, scale(h));
                add(at("linear_attn.in_proj_b.weight"), &[self.hv, h], 0.0, scale(h));
                add(at("linear_attn.conv1d.weight"), &[2 * qk + v, 1, self.taps], 0.0, 0.5);
                add(at("linear_attn.A_log"), &[self.hv], -1.0, 1.0);
                add(at("linear_attn.dt_bias"), &[self.hv], -1.0, 1.0);
                add(at("linear_attn.norm.weight"), &[self.v], 1.0, 0.3);
                add(at("linear_attn.out_proj.weight"), &[h, v], 0.0, scale(v));
            } else {
                let (q, kv) = (self.heads * self.dim, self.kv * self.dim);
                add(at("self_attn.q_proj.weight"), &[2 * q, h], 0.0, scale(h));
                add(at("self_attn.k_proj.weight"), &[kv, h], 0.0, scale(h));
                add(at("self_attn.v_proj.weight"), &[kv, h], 0.0, scale(h));
                add(at("self_attn.o_proj.weight"), &[h, q], 0.0, scale(q));
                add(at("self_attn.q_norm.weight"), &[self.dim], 0.0, 0.3);
                add(at("self_attn.k_norm.weight"), &[self.dim], 0.0, 0.3);
            }
        }
        all
    }

    /// Writes `config.json` and `model.safetensors`.
    pub fn write(&self, dir: &Path, tensors: &Tensors, dtype: Dtype) {
        std::fs::write(dir.join("config.json"), self.config().to_string()).unwrap();
        let bytes: Vec<Vec<u8>> = tensors.values().map(|(_, numbers)| stored(numbers, dtype)).collect();
        let kind = match dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        };
        let views = tensors.iter().zip(&bytes);
        let views = views.map(|((name, (shape, _)), b)| (name, TensorView::new(kind, shape.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    }

    /// Logits `[T, vocab]` of a sequence, by the formulas.
    pub fn logits(&self, tensors: &Tensors, ids: &[u32]) -> Vec<f64> {
        let get = |name: &str| -> Vec<f64> { tensors[name].1.iter().map(|&x| x as f64).collect() };
        let h = self.hidden;
        let embed = get("model.embed_tokens.weight");
        let mut x: Vec<f64> =
            ids.iter().flat_map(|&id| embed[id as usize * h..(id as usize + 1) * h].to_vec()).collect();
        for (i, kind) in self.layers.chars().enumerate() {
            let w = |name: &str| get(&format!("model.layers.{i}.{name}"));
            let n = norm(&x, &w("input_layernorm.weight"), 1.0);
            let y = if kind == 'L' { self.linear(&w, &n) } else { self.full(&w, &n) };
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
            let n = norm(&x, &w("post_attention_layernorm.weight"), 1.0);
            let (gate, up) = (product(&n, &w("mlp.gate_proj.weight"), h), product(&n, &w("mlp.up_proj.weight"), h));
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect();
            let y = product(&inner, &w("mlp.down_proj.weight"), self.ffn);
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        }
        let n = norm(&x, &get("model.norm.weight"), 1.0);
        product(&n, &if self.tied { embed } else { get("lm_head.weight") }, h)
    }

    fn linear(&self, w: &dyn Fn(&str) -> Vec<f64>, x: &[f64]) -> Vec<f64> {
        let at = |name: &str| w(&format!("linear_attn.{name}"));
        let (h, hk, hv, dk, dv) = (self.hidden, self.hk, self.hv, self.k, self.v);
        let (t, channels) = (x.len() / h, 2 * hk * dk + hv * dv);
        let m = product(x, &at("in_proj_qkv.weight"), h);
        let z = product(x, &at("in_proj_z.weight"), h);
        let (a, b) = (product(x, &at("in_proj_a.weight"), h), product(x, &at("in_proj_b.weight"), h));
        let (conv, a_log, dt_bias) = (at("conv1d.weight"), at("A_log"), at("dt_bias"));
        let mut state = vec![0.0; hv * dk * dv];
        let mut out = vec![0.0; t * hv * dv];
        for i in 0..t {
            let c: Vec<f64> = (0..channels)
                .map(|c| {
                    let tap = |j: usize| (i + j + 1).checked_sub(self.taps).map_or(0.0, |r| m[r * channels + c]);
                    silu((0..self.taps).map(|j| conv[c * self.taps + j] * tap(j)).sum())
                })
                .collect();
            for head in 0..hv {
                let kh = head / (hv / hk);
                let unit = |x: &[f64]| -> Vec<f64> {
                    let n = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                    x.iter().map(|x| x / n).collect()
                };
                let q = unit(&c[kh * dk..(kh + 1) * dk]);
                let k = unit(&c[(hk + kh) * dk..(hk + kh + 1) * dk]);
                let v = &c[2 * hk * dk + head * dv..2 * hk * dk + (head + 1) * dv];
                let g = -a_log[head].exp() * (a[i * hv + head] + dt_bias[head]).exp().ln_1p();
                let beta = 1.0 / (1.0 + (-b[i * hv + head]).exp());
                let s = &mut state[head * dk * dv..(head + 1) * dk * dv];
                s.iter_mut().for_each(|s| *s *= g.exp());
                let o = &mut out[(i * hv + head) * dv..(i * hv + head + 1) * dv];
                for j in 0..dv {
                    let seen: f64 = (0..dk).map(|r| s[r * dv + j] * k[r]).sum();
                    let d = beta * (v[j] - seen);
                    (0..dk).for_each(|r| s[r * dv + j] += k[r] * d);
                    o[j] = (0..dk).map(|r| s[r * dv + j] * q[r]).sum::<f64>() * (dk as f64).powf(-0.5);
                }
            }
        }
        let normed = norm(&out, &at("norm.weight"), 0.0);
        let gated: Vec<f64> = normed.iter().zip(&z).map(|(o, z)| o * silu(*z)).collect();
        product(&gated, &at("out_proj.weight"), hv * dv)
    }

    fn full(&self, w: &dyn Fn(&str) -> Vec<f64>, x: &[f64]) -> Vec<f64> {
        let at = |name: &str| w(&format!("self_attn.{name}"));
        let (h, heads, kv, d) = (self.hidden, self.heads, self.kv, self.dim);
        let t = x.len() / h;
        let qg = product(x, &at("q_proj.weight"), h);
        let v = product(x, &at("v_proj.weight"), h);
        let split: Vec<f64> = qg.chunks(2 * d).flat_map(|c| c[..d].to_vec()).collect();
        let q = self.rotated(norm(&split, &at("q_norm.weight"), 1.0), heads);
        let k = self.rotated(norm(&product(x, &at("k_proj.weight"), h), &at("k_norm.weight"), 1.0), kv);
        let mut y = vec![0.0; t * heads * d];
        for i in 0..t {
            for head in 0..heads {
                let kh = head / (heads / kv);
                let query = &q[(i * heads + head) * d..][..d];
                let dot = |j: usize| query.iter().zip(&k[(j * kv + kh) * d..][..d]).map(|(a, b)| a * b).sum::<f64>();
                let scores: Vec<f64> = (0..=i).map(|j| dot(j) * (d as f64).powf(-0.5)).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                let out = &mut y[(i * heads + head) * d..][..d];
                for (j, weight) in weights.iter().enumerate() {
                    let value = &v[(j * kv + kh) * d..][..d];
                    out.iter_mut().zip(value).for_each(|(o, v)| *o += weight / total * v);
                }
                let gate = &qg[(i * heads + head) * 2 * d + d..][..d];
                out.iter_mut().zip(gate).for_each(|(o, g)| *o /= 1.0 + (-g).exp());
            }
        }
        product(&y, &at("o_proj.weight"), heads * d)
    }

    /// Rotary on the first quarter of each head of `[T, heads, dim]`.
    fn rotated(&self, mut x: Vec<f64>, heads: usize) -> Vec<f64> {
        let half = self.dim / 8;
        for (i, head) in x.chunks_mut(self.dim).enumerate() {
            let position = (i / heads) as f64;
            for j in 0..half {
                let angle = position * 1e7f64.powf(-(j as f64) / half as f64);
                let (a, b) = (head[j], head[j + half]);
                head[j] = a * angle.cos() - b * angle.sin();
                head[j + half] = b * angle.cos() + a * angle.sin();
            }
        }
        x
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// RMS norm of each run of `w.len()` numbers, times `plus + w`.
fn norm(x: &[f64], w: &[f64], plus: f64) -> Vec<f64> {
    x.chunks(w.len())
        .flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            row.iter().zip(w).map(|(x, w)| x / (mean + 1e-6).sqrt() * (plus + w)).collect::<Vec<_>>()
        })
        .collect()
}

/// `y[i, j] = sum_k x[i, k] w[j, k]`
fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(k).flat_map(|row| w.chunks(k).map(move |col| dot(row, col))).collect()
}

fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

fn stored(numbers: &[f32], dtype: Dtype) -> Vec<u8> {
    let each = |x: &f32| match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
    };
    numbers.iter().flat_map(each).collect()
}
