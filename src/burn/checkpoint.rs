//! A trained model as a directory in the released layout.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use safetensors::tensor::TensorView;

use super::{Qwen35, Rule};
use crate::error::{Error, Result};
use crate::qwen::files::Checkpoint;
use crate::shape::Dtype;

impl Qwen35 {
    /// Writes `config.json` and `model.safetensors` into `dir`, which is made if need be: a text-only checkpoint that
    /// [`qwen::Model::load`](crate::qwen::Model::load) and transformers read. Tokenizer and template are the caller's to add.
    ///
    /// `A_log` and `linear_attn.norm.weight` are f32 always, as released; everything else is stored as `dtype`. Both files are
    /// written beside their places and flushed before either is moved there: on a full disk, or if the process is killed while
    /// it writes, what was there before stays.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model without the delta rule, [`Error::Save`] naming the file, [`Error::Device`] if burn
    /// cannot read a weight.
    pub fn save_checkpoint(&self, dir: impl AsRef<Path>, dtype: Dtype) -> Result<()> {
        if self.config().rule == Rule::Linear {
            return Err(Error::Unsupported {
                what: "a checkpoint of gated linear attention".into(),
                by: "the released layout".into(),
                why: "its linear_attention layers follow the gated delta rule".into(),
            });
        }
        let dir = dir.as_ref();
        let config = self.config().to_json()?;
        let mut weights = Weights { dtype, path: Vec::new(), tensors: Ok(Vec::new()) };
        self.visit(&mut weights);
        let tensors = weights.tensors?;
        std::fs::create_dir_all(dir).map_err(|e| Error::save(dir, e))?;
        let names = ["model.safetensors", "config.json"];
        let files = names.map(|name| dir.join(name));
        let partial = names.map(|name| dir.join(format!("{name}.partial")));
        let saved = write_tensors(&partial[0], &tensors)
            .and_then(|()| {
                std::fs::write(&partial[1], format!("{config:#}\n")).map_err(|e| Error::save(&partial[1], e))
            })
            .and_then(|()| partial.iter().try_for_each(|path| flush(path)))
            .and_then(|()| partial.iter().zip(&files).try_for_each(|(from, to)| move_to(from, to)));
        if saved.is_err() {
            // What stands there is of no use; if even this fails there is nothing to add to the error.
            partial.iter().for_each(|path| drop(std::fs::remove_file(path)));
        }
        saved
    }

    /// The same model with the weights of a directory that [`Qwen35::save_checkpoint`] wrote, widened to f32.
    ///
    /// # Errors
    /// [`Error::Load`] naming the directory or the file, and the tensor where one is missing, of another shape, or of a type
    /// that is neither f32 nor f16 nor bf16.
    pub fn load_checkpoint(self, dir: impl AsRef<Path>) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir.as_ref())?;
        let mut reading = Reading { checkpoint, path: Vec::new(), failed: None };
        let model = self.map(&mut reading);
        reading.failed.map_or(Ok(model), Err)
    }
}

/// Gives the weights of a model the numbers that their released names have.
struct Reading {
    checkpoint: Checkpoint,
    /// As in [`Weights`].
    path: Vec<(String, String)>,
    /// The first thing that went wrong.
    failed: Option<Error>,
}

impl ModuleMapper for Reading {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.failed.is_some() {
            return param;
        }
        match self.read(&param.val()) {
            Ok(tensor) => {
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(why) => {
                self.failed = Some(why);
                param
            }
        }
    }
}

impl Reading {
    /// The tensor that takes the place of `old`.
    fn read<const D: usize>(&self, old: &Tensor<D>) -> Result<Tensor<D>> {
        let name = released(&self.path);
        let stored = self.checkpoint.tensor(&name)?;
        let mut shape = old.dims();
        if is_linear(&self.path) {
            shape.swap(D - 2, D - 1);
        }
        let failed = |why: String| Error::load(stored.file.as_path(), format!("{name}: {why}"));
        if stored.shape != shape {
            return Err(failed(format!("shape {:?}, expected {shape:?}", stored.shape)));
        }
        let numbers = numbers(stored.dtype, stored.bytes.bytes())
            .ok_or_else(|| failed(format!("type {:?}, expected F32, F16 or BF16", stored.dtype)))?;
        let tensor = Tensor::from_data(TensorData::new(numbers, shape), &old.device());
        Ok(if is_linear(&self.path) { tensor.transpose() } else { tensor })
    }
}

/// Stored numbers as f32; none of a type that is not read.
fn numbers(dtype: safetensors::Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let two = |one: fn([u8; 2]) -> f32| bytes.chunks_exact(2).map(|b| one([b[0], b[1]])).collect();
    match dtype {
        safetensors::Dtype::F32 => {
            Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        safetensors::Dtype::F16 => Some(two(|b| half::f16::from_le_bytes(b).to_f32())),
        safetensors::Dtype::BF16 => Some(two(|b| half::bf16::from_le_bytes(b).to_f32())),
        _ => None,
    }
}

/// Waits until the disk has the whole file.
fn flush(path: &Path) -> Result<()> {
    // Windows flushes only what may be written.
    let file = File::options().write(true).open(path);
    file.and_then(|file| file.sync_all()).map_err(|e| Error::save(path, e))
}

fn move_to(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|e| Error::save(to, e))
}

fn write_tensors(path: &Path, tensors: &[Stored]) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for t in tensors {
        let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes).map_err(|e| Error::save(path, e))?;
        views.push((t.name.as_str(), view));
    }
    // transformers asks which framework wrote the file.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| Error::save(path, e))
}

/// A tensor as the file holds it.
struct Stored {
    name: String,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Collects the weights of a model under their released names.
struct Weights {
    dtype: Dtype,
    /// Field or index, and what kind of thing it is part of.
    path: Vec<(String, String)>,
    tensors: Result<Vec<Stored>>,
}

impl ModuleVisitor for Weights {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Ok(mut tensors) = std::mem::replace(&mut self.tensors, Ok(Vec::new())) {
            self.tensors = self.store(param.val()).map(|tensor| {
                tensors.push(tensor);
                tensors
            });
        }
    }
}

impl Weights {
    fn store<const D: usize>(&self, tensor: Tensor<D>) -> Result<Stored> {
        let name = released(&self.path);
        let tensor = if is_linear(&self.path) { tensor.transpose() } else { tensor };
        let shape = tensor.dims().to_vec();
        let failed = |why: String| Error::Device { device: "burn".into(), why: format!("{name}: {why}") };
        let numbers = tensor.try_into_vec_as::<f32>().map_err(|e| failed(format!("{e:?}")))?;
        let wide = name.ends_with("A_log") || name.ends_with("linear_attn.norm.weight");
        let (dtype, bytes) = match if wide { Dtype::F32 } else { self.dtype } {
            Dtype::F32 => (safetensors::Dtype::F32, bytes(&numbers, f32::to_le_bytes)),
            Dtype::F16 => (safetensors::Dtype::F16, bytes(&numbers, |x| half::f16::from_f32(x).to_le_bytes())),
            Dtype::Bf16 => (safetensors::Dtype::BF16, bytes(&numbers, |x| half::bf16::from_f32(x).to_le_bytes())),
        };
        Ok(Stored { name, dtype, shape, bytes })
    }
}

fn bytes<const N: usize>(numbers: &[f32], one: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    numbers.iter().flat_map(|&x| one(x)).collect()
}

/// Whether a weight is the matrix of a Linear, which burn keeps as `[in, out]`.
fn is_linear(path: &[(String, String)]) -> bool {
    path.last().is_some_and(|(_, container)| container == "Struct:Linear")
}

/// The released name of a weight.
fn released(path: &[(String, String)]) -> String {
    let mut parts = Vec::with_capacity(path.len() + 1);
    for (i, (name, container)) in path.iter().enumerate() {
        match (name.as_str(), path.get(i + 1).map(|(variant, _)| variant.as_str())) {
            ("mixer", Some("Linear")) => parts.push("linear_attn"),
            ("mixer", _) => parts.push("self_attn"),
            _ if container.starts_with("Enum:") => {}
            ("a_log", _) => parts.push("A_log"),
            (name, _) => parts.push(name),
        }
    }
    if parts.first() != Some(&"lm_head") {
        parts.insert(0, "model");
    }
    parts.join(".")
}
