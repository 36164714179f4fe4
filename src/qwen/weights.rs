//! The weights of a model on a device. The only place that knows how checkpoints name their tensors.
//!
//! Large matrices keep the type and, on a device that reads host memory, the very bytes of the file. Small tensors become
//! f32, with the `1 +` of the zero-centred norms added.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::{Backend, Buffer, HostBytes, View};
use crate::error::{Error, Result};
use crate::ops::{Part, Weight};
use crate::qwen::config::{Config, LayerKind};
use crate::qwen::files::Checkpoint;
use crate::shape::Dtype;
use crate::tune::Caps;

/// All weights of a model.
#[derive(Debug)]
pub(crate) struct Weights {
    /// `[vocab, hidden]`
    pub embed: Weight,
    /// `[vocab, hidden]`; the embedding table where they are tied.
    pub head: Weight,
    /// `[hidden]`
    pub norm: View,
    pub layers: Vec<Layer>,
}

/// One layer: mixer, then MLP, each behind its norm.
#[derive(Debug)]
pub(crate) struct Layer {
    /// `[hidden]`
    pub mixer_norm: View,
    pub mixer: Mixer,
    /// `[hidden]`
    pub mlp_norm: View,
    /// `[ffn, hidden]`
    pub gate: Weight,
    /// `[ffn, hidden]`
    pub up: Weight,
    /// `[hidden, ffn]`
    pub down: Weight,
}

#[derive(Debug)]
pub(crate) enum Mixer {
    Linear(Linear),
    Full(Full),
}

/// A Gated DeltaNet mixer.
#[derive(Debug)]
pub(crate) struct Linear {
    /// Rows `[qkv | z | a | b]`, by hidden.
    pub project: Projection,
    /// `[channels, taps]`
    pub conv: View,
    /// `[Hv]`
    pub a_log: View,
    /// `[Hv]`
    pub dt_bias: View,
    /// `[V]`
    pub norm: View,
    /// `[2 Hv + V]`: the three above in a row, for the fused step.
    pub small: View,
    /// `[hidden, Hv V]`
    pub out: Weight,
}

/// A full-attention mixer.
#[derive(Debug)]
pub(crate) struct Full {
    /// Rows `[query and gate per head | k | v]`, by hidden.
    pub project: Projection,
    /// `[D]`
    pub q_norm: View,
    /// `[D]`
    pub k_norm: View,
    /// `[hidden, heads D]`
    pub out: Weight,
}

/// Matrices that read the same input and write next to each other: each with the first column that it writes.
pub(crate) type Projection = Vec<(u64, Weight)>;

/// Where the numbers of a tensor come from.
pub(crate) trait Source {
    /// How a matrix `[n, k]` is stored.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file and the tensor if it is missing, of another shape or of a type that is not read.
    fn dtype(&self, name: &str, n: u64, k: u64) -> Result<Dtype>;

    /// The numbers of a matrix, row by row.
    fn matrix(&self, name: &str, n: u64, k: u64) -> Result<HostBytes>;

    /// A small tensor of this shape as f32.
    fn vector(&self, name: &str, shape: &[u64]) -> Result<Vec<f32>>;

    /// What stands before the names of the text model's tensors.
    fn prefix(&self) -> &str;
}

/// What is done with each tensor on a walk over the model.
trait Visit {
    fn matrix(&mut self, name: &str, n: u64, k: u64) -> Result<Weight>;
    /// Matrices `[n, k]` that become one, each below the last.
    fn stacked(&mut self, names: &[&str], n: u64, k: u64) -> Result<Vec<Weight>>;
    /// A tensor whose numbers all get `plus` added.
    fn vector(&mut self, name: &str, shape: &[u64], plus: f32) -> Result<View>;
    /// Vectors one after the other.
    fn joined(&mut self, names: &[(&str, u64)]) -> Result<View>;
}

impl Weights {
    /// Checks every tensor against the config; the bytes that the weights take on a device. Reads nothing large.
    ///
    /// # Errors
    /// As [`Source::dtype`].
    pub fn measure(config: &Config, source: &dyn Source) -> Result<u64> {
        let mut measure = Measure { source, bytes: 0 };
        walk(config, source.prefix(), &mut measure)?;
        Ok(measure.bytes)
    }

    /// The weights as they will be on a device, in shape and size, without memory.
    ///
    /// # Errors
    /// As [`Source::dtype`].
    pub fn sketch(config: &Config, source: &dyn Source, caps: &Caps) -> Result<Weights> {
        walk(config, source.prefix(), &mut Sketch { source, caps })
    }

    /// Brings the weights to the device; `progress` gets the bytes done so far.
    ///
    /// # Errors
    /// As [`Source::dtype`], and what the backend reports.
    pub fn load(
        config: &Config,
        source: &dyn Source,
        backend: &dyn Backend,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Weights> {
        let mut import = Import { source, backend, caps: backend.caps(), done: 0, progress };
        walk(config, source.prefix(), &mut import)
    }
}

/// Visits every tensor of the model.
fn walk(config: &Config, prefix: &str, visit: &mut dyn Visit) -> Result<Weights> {
    let (hidden, vocab) = (config.hidden as u64, config.vocab as u64);
    let embed = visit.matrix(&format!("{prefix}embed_tokens.weight"), vocab, hidden)?;
    let mut layers = Vec::with_capacity(config.layers.len());
    for (i, kind) in config.layers.iter().enumerate() {
        layers.push(walk_layer(config, &format!("{prefix}layers.{i}."), *kind, visit)?);
    }
    let norm = visit.vector(&format!("{prefix}norm.weight"), &[hidden], 1.0)?;
    let head = if config.tied { embed.clone() } else { visit.matrix("lm_head.weight", vocab, hidden)? };
    Ok(Weights { embed, head, norm, layers })
}

fn walk_layer(config: &Config, at: &str, kind: LayerKind, visit: &mut dyn Visit) -> Result<Layer> {
    let (hidden, ffn) = (config.hidden as u64, config.ffn as u64);
    let mixer_norm = visit.vector(&format!("{at}input_layernorm.weight"), &[hidden], 1.0)?;
    let mixer = match kind {
        LayerKind::Linear => Mixer::Linear(walk_linear(config, &format!("{at}linear_attn."), visit)?),
        LayerKind::Full => Mixer::Full(walk_full(config, &format!("{at}self_attn."), visit)?),
    };
    Ok(Layer {
        mixer_norm,
        mixer,
        mlp_norm: visit.vector(&format!("{at}post_attention_layernorm.weight"), &[hidden], 1.0)?,
        gate: visit.matrix(&format!("{at}mlp.gate_proj.weight"), ffn, hidden)?,
        up: visit.matrix(&format!("{at}mlp.up_proj.weight"), ffn, hidden)?,
        down: visit.matrix(&format!("{at}mlp.down_proj.weight"), hidden, ffn)?,
    })
}

fn walk_linear(config: &Config, at: &str, visit: &mut dyn Visit) -> Result<Linear> {
    let hidden = config.hidden as u64;
    let (hv, dv) = (config.linear.hv as u64, config.linear.v as u64);
    let (channels, taps) = (config.conv_channels() as u64, config.conv_taps as u64);
    let name = |tensor: &str| format!("{at}{tensor}");
    let mut project = vec![
        visit.matrix(&name("in_proj_qkv.weight"), channels, hidden)?,
        visit.matrix(&name("in_proj_z.weight"), hv * dv, hidden)?,
    ];
    project.extend(visit.stacked(&[&name("in_proj_a.weight"), &name("in_proj_b.weight")], hv, hidden)?);
    let (a_log, dt_bias, norm) = (name("A_log"), name("dt_bias"), name("norm.weight"));
    Ok(Linear {
        project: side_by_side(project)?,
        conv: visit.vector(&name("conv1d.weight"), &[channels, 1, taps], 0.0)?,
        a_log: visit.vector(&a_log, &[hv], 0.0)?,
        dt_bias: visit.vector(&dt_bias, &[hv], 0.0)?,
        norm: visit.vector(&norm, &[dv], 0.0)?,
        small: visit.joined(&[(&a_log, hv), (&dt_bias, hv), (&norm, dv)])?,
        out: visit.matrix(&name("out_proj.weight"), hidden, hv * dv)?,
    })
}

fn walk_full(config: &Config, at: &str, visit: &mut dyn Visit) -> Result<Full> {
    let (hidden, dim) = (config.hidden as u64, config.head_dim as u64);
    let (heads, kv) = (config.heads as u64, config.kv_heads as u64);
    let name = |tensor: &str| format!("{at}{tensor}");
    let mut project = vec![visit.matrix(&name("q_proj.weight"), 2 * heads * dim, hidden)?];
    project.push(visit.matrix(&name("k_proj.weight"), kv * dim, hidden)?);
    project.push(visit.matrix(&name("v_proj.weight"), kv * dim, hidden)?);
    Ok(Full {
        project: side_by_side(project)?,
        q_norm: visit.vector(&name("q_norm.weight"), &[dim], 1.0)?,
        k_norm: visit.vector(&name("k_norm.weight"), &[dim], 1.0)?,
        out: visit.matrix(&name("o_proj.weight"), hidden, heads * dim)?,
    })
}

/// Gives each matrix its columns; neighbours of one type become one [`Weight`].
fn side_by_side(weights: Vec<Weight>) -> Result<Projection> {
    let mut out: Projection = Vec::new();
    let mut column = 0;
    for w in weights {
        let n = w.n;
        match out.last_mut() {
            Some((_, last)) if last.dtype == w.dtype => *last = Weight::stack(&[last.clone(), w])?,
            _ => out.push((column, w)),
        }
        column += n;
    }
    Ok(out)
}

/// Checks and adds up; the weights it builds have no memory.
struct Measure<'a> {
    source: &'a dyn Source,
    bytes: u64,
}

impl Visit for Measure<'_> {
    fn matrix(&mut self, name: &str, n: u64, k: u64) -> Result<Weight> {
        let dtype = self.source.dtype(name, n, k)?;
        self.bytes += n * k * dtype.size();
        Ok(Weight { dtype, n, k, parts: Vec::new() })
    }

    fn stacked(&mut self, names: &[&str], n: u64, k: u64) -> Result<Vec<Weight>> {
        names.iter().map(|name| self.matrix(name, n, k)).collect()
    }

    fn vector(&mut self, name: &str, shape: &[u64], _: f32) -> Result<View> {
        // Small: read, so that a type that is not known is found before anything is allocated.
        self.bytes += self.source.vector(name, shape)?.len() as u64 * 4;
        Ok(Buffer::from_handle((), 0).view())
    }

    fn joined(&mut self, names: &[(&str, u64)]) -> Result<View> {
        self.bytes += names.iter().map(|(_, len)| len * 4).sum::<u64>();
        Ok(Buffer::from_handle((), 0).view())
    }
}

/// Weights of the right sizes in memory that does not exist.
struct Sketch<'a> {
    source: &'a dyn Source,
    caps: &'a Caps,
}

impl Sketch<'_> {
    fn weight(&self, dtype: Dtype, n: u64, k: u64) -> Result<Weight> {
        let part = |rows: Range<u64>| {
            let (row0, rows) = (rows.start, rows.end - rows.start);
            Part { row0, rows, view: Buffer::from_handle((), rows * k * dtype.size()).view() }
        };
        Ok(Weight { dtype, n, k, parts: Weight::split(self.caps, dtype, n, k)?.into_iter().map(part).collect() })
    }
}

impl Visit for Sketch<'_> {
    fn matrix(&mut self, name: &str, n: u64, k: u64) -> Result<Weight> {
        self.weight(self.source.dtype(name, n, k)?, n, k)
    }

    fn stacked(&mut self, names: &[&str], n: u64, k: u64) -> Result<Vec<Weight>> {
        let dtypes = names.iter().map(|name| self.source.dtype(name, n, k)).collect::<Result<Vec<_>>>()?;
        if dtypes.windows(2).any(|w| w[0] != w[1]) {
            return dtypes.into_iter().map(|dtype| self.weight(dtype, n, k)).collect();
        }
        Ok(vec![self.weight(dtypes[0], n * names.len() as u64, k)?])
    }

    fn vector(&mut self, _: &str, shape: &[u64], _: f32) -> Result<View> {
        Ok(Buffer::from_handle((), shape.iter().product::<u64>() * 4).view())
    }

    fn joined(&mut self, names: &[(&str, u64)]) -> Result<View> {
        Ok(Buffer::from_handle((), names.iter().map(|(_, len)| len * 4).sum()).view())
    }
}

/// Brings tensors to a device.
struct Import<'a> {
    source: &'a dyn Source,
    backend: &'a dyn Backend,
    caps: &'a Caps,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Import<'_> {
    fn weight(&mut self, name: &str, dtype: Dtype, n: u64, k: u64, bytes: &HostBytes) -> Result<Weight> {
        let row = k * dtype.size();
        let mut parts = Vec::new();
        for rows in Weight::split(self.caps, dtype, n, k)? {
            let part = bytes.slice((rows.start * row) as usize..(rows.end * row) as usize)?;
            let view = self.backend.import(name, aligned(part, dtype)?)?.view();
            parts.push(Part { row0: rows.start, rows: rows.end - rows.start, view });
        }
        self.progress(n * row);
        Ok(Weight { dtype, n, k, parts })
    }

    fn numbers(&mut self, name: &str, numbers: Vec<f32>) -> Result<View> {
        let bytes = numbers.len() as u64 * 4;
        let view = self.backend.import(name, HostBytes::new(Arc::new(Owned(numbers))))?.view();
        self.progress(bytes);
        Ok(view)
    }

    fn progress(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done);
    }
}

impl Visit for Import<'_> {
    fn matrix(&mut self, name: &str, n: u64, k: u64) -> Result<Weight> {
        let dtype = self.source.dtype(name, n, k)?;
        let bytes = self.source.matrix(name, n, k)?;
        self.weight(name, dtype, n, k, &bytes)
    }

    /// Copies, to save a launch: for matrices of a few rows.
    fn stacked(&mut self, names: &[&str], n: u64, k: u64) -> Result<Vec<Weight>> {
        let dtypes = names.iter().map(|name| self.source.dtype(name, n, k)).collect::<Result<Vec<_>>>()?;
        if dtypes.windows(2).any(|w| w[0] != w[1]) {
            return names.iter().map(|name| self.matrix(name, n, k)).collect();
        }
        let mut all = Vec::new();
        for name in names {
            all.extend_from_slice(self.source.matrix(name, n, k)?.bytes());
        }
        let rows = n * names.len() as u64;
        let bytes = HostBytes::new(Arc::new(all));
        Ok(vec![self.weight(names[0], dtypes[0], rows, k, &bytes)?])
    }

    fn vector(&mut self, name: &str, shape: &[u64], plus: f32) -> Result<View> {
        let mut numbers = self.source.vector(name, shape)?;
        numbers.iter_mut().for_each(|n| *n += plus);
        self.numbers(name, numbers)
    }

    fn joined(&mut self, names: &[(&str, u64)]) -> Result<View> {
        let mut all = Vec::new();
        for (name, len) in names {
            all.extend(self.source.vector(name, &[*len])?);
        }
        self.numbers(names[0].0, all)
    }
}

/// Numbers as bytes, aligned for their type.
pub(crate) struct Owned<T>(pub Vec<T>);

impl<T: bytemuck::NoUninit> AsRef<[u8]> for Owned<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// The bytes themselves if kernels can read them where they are, else a copy. Files written by common tools are aligned.
fn aligned(bytes: HostBytes, dtype: Dtype) -> Result<HostBytes> {
    if (bytes.bytes().as_ptr() as usize).is_multiple_of(dtype.size() as usize) {
        return Ok(bytes);
    }
    let len = bytes.bytes().len();
    let mut words = vec![0u32; len.div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..len].copy_from_slice(bytes.bytes());
    HostBytes::new(Arc::new(Owned(words))).slice(0..len)
}

/// What stands before the names of a checkpoint's text tensors: with a vision part, or without.
const PREFIXES: [&str; 2] = ["model.language_model.", "model."];

/// The tensors of a checkpoint.
pub(crate) struct FileSource<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'static str,
}

impl<'a> FileSource<'a> {
    /// Looks at the names only.
    ///
    /// # Errors
    /// [`Error::Load`] if the checkpoint has more layers than the config.
    pub fn new(checkpoint: &'a Checkpoint, config: &Config) -> Result<Self> {
        let released = checkpoint.names().any(|name| name.starts_with(PREFIXES[0]));
        let prefix = PREFIXES[if released { 0 } else { 1 }];
        // Everything but the text model is passed over: model.visual.*, mtp.*, lm_head where the head is tied.
        for name in checkpoint.names() {
            let layer = name.strip_prefix(prefix).and_then(|n| n.strip_prefix("layers.")?.split('.').next());
            if let Some(i) = layer.and_then(|i| i.parse::<usize>().ok())
                && i >= config.layers.len()
            {
                let file = checkpoint.tensor(name)?.file.as_path().to_path_buf();
                let why = format!("tensor {name} belongs to layer {i} and the config has {}", config.layers.len());
                return Err(Error::load(file, why));
            }
        }
        Ok(FileSource { checkpoint, prefix })
    }

    /// The tensor's type, if it has this shape and a type that is read.
    fn check(&self, name: &str, shape: &[u64]) -> Result<Dtype> {
        let tensor = self.checkpoint.tensor(name)?;
        let wrong = |why: String| Error::load(tensor.file.as_path(), format!("tensor {name} {why}"));
        if !tensor.shape.iter().map(|&d| d as u64).eq(shape.iter().copied()) {
            return Err(wrong(format!("has the shape {:?}, and the config asks for {shape:?}", tensor.shape)));
        }
        match tensor.dtype {
            safetensors::Dtype::F32 => Ok(Dtype::F32),
            safetensors::Dtype::F16 => Ok(Dtype::F16),
            safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
            other => Err(wrong(format!("has the dtype {other:?}; F32, F16 and BF16 are read"))),
        }
    }
}

impl Source for FileSource<'_> {
    fn dtype(&self, name: &str, n: u64, k: u64) -> Result<Dtype> {
        self.check(name, &[n, k])
    }

    fn matrix(&self, name: &str, _: u64, _: u64) -> Result<HostBytes> {
        Ok(self.checkpoint.tensor(name)?.bytes.clone())
    }

    fn vector(&self, name: &str, shape: &[u64]) -> Result<Vec<f32>> {
        let dtype = self.check(name, shape)?;
        let tensor = self.checkpoint.tensor(name)?;
        Ok(to_f32(tensor.bytes.bytes(), dtype))
    }

    fn prefix(&self) -> &str {
        self.prefix
    }
}

/// Little-endian numbers of any alignment.
fn to_f32(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => pairs().map(|b| half::f16::from_bits(b).to_f32()).collect(),
        Dtype::Bf16 => pairs().map(|b| half::bf16::from_bits(b).to_f32()).collect(),
    }
}
