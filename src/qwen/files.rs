//! The safetensors files of a checkpoint: found, mapped, and their headers checked. Nothing large is read here.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::Value;

use crate::backend::HostBytes;
use crate::error::{Error, Result};
use crate::qwen::config::read_json;

/// The tensors of a directory, by name.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    tensors: HashMap<String, Tensor>,
}

/// A tensor in a mapped file.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The file that holds it.
    pub file: Arc<PathBuf>,
    /// How its numbers are stored; may be a type that the runtime does not read.
    pub dtype: safetensors::Dtype,
    /// Its dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Its bytes in the mapped file.
    pub bytes: HostBytes,
}

impl Checkpoint {
    /// Maps the files of `dir`: those of `model.safetensors.index.json`, else `model.safetensors`, else
    /// `model*.safetensors`, else `*.safetensors`.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file, and the tensor where one is to blame: no weights, a missing shard, a file that is
    /// cut short or not what its header says, a name that two files claim.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for path in shards(dir)? {
            let path = Arc::new(path);
            for (name, tensor) in map(&path)? {
                if let Some(other) = tensors.insert(name.clone(), tensor) {
                    let why = format!("tensor {name} is also in {}", other.file.display());
                    return Err(Error::load(path.as_path(), why));
                }
            }
        }
        Ok(Checkpoint { dir: dir.to_path_buf(), tensors })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A tensor.
    ///
    /// # Errors
    /// [`Error::Load`] naming the directory and the tensor if no file holds it.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let missing = || Error::load(&self.dir, format!("no file holds tensor {name}, which the config asks for"));
        self.tensors.get(name).ok_or_else(missing)
    }

    /// All names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

/// The files that hold the weights.
pub(crate) fn shards(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Err(Error::load(dir, "not a directory"));
    }
    let index = dir.join("model.safetensors.index.json");
    if index.exists() {
        return indexed(dir, &index);
    }
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let entries = std::fs::read_dir(dir).map_err(|e| Error::load(dir, e))?;
    let mut all: Vec<PathBuf> = entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    all.sort();
    let named = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("model"));
    if all.iter().any(named) {
        all.retain(named);
    }
    if all.is_empty() {
        return Err(Error::load(dir, "no .safetensors file"));
    }
    Ok(all)
}

/// The files that an index lists, each once.
fn indexed(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let value = read_json(index)?;
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::load(index, "no object weight_map"));
    };
    // File name to the first tensor that names it.
    let mut files: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, file) in map {
        match file.as_str() {
            Some(file) => files.entry(file).or_insert(name),
            None => return Err(Error::load(index, format!("weight_map of {name} is not a file name"))),
        };
    }
    if files.is_empty() {
        return Err(Error::load(index, "weight_map is empty"));
    }
    let mut paths = Vec::new();
    for (file, name) in files {
        if Path::new(file).file_name() != Some(file.as_ref()) {
            return Err(Error::load(index, format!("weight_map of {name} is {file:?}, not a plain file name")));
        }
        let path = dir.join(file);
        if !path.is_file() {
            return Err(Error::load(path, format!("the shard is missing; the index puts tensor {name} there")));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// Maps one file.
fn map(path: &Arc<PathBuf>) -> Result<Vec<(String, Tensor)>> {
    let file = std::fs::File::open(path.as_path()).map_err(|e| Error::load(path.as_path(), e))?;
    // SAFETY: the map is read-only and lives as long as somebody refers to it. Another process that rewrites the file
    // meanwhile changes the numbers read, one that truncates it stops this process: the price of not copying, the same for
    // every runtime that maps its weights.
    let mapped = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::load(path.as_path(), e))?;
    let (header, meta) = match SafeTensors::read_metadata(&mapped) {
        Ok(read) => read,
        Err(e) => return Err(Error::load(path.as_path(), explain(&mapped).unwrap_or_else(|| e.to_string()))),
    };
    let data = HostBytes::new(Arc::new(mapped));
    let tensors = meta.tensors();
    let mut out = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let (begin, end) = info.data_offsets;
        let bytes = data.slice(8 + header + begin..8 + header + end)?;
        out.push((name, Tensor { file: path.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes }));
    }
    Ok(out)
}

/// Why a refused file is wrong, with the tensor and the numbers; none where the header itself cannot be read.
fn explain(file: &[u8]) -> Option<String> {
    let Some(length) = file.first_chunk::<8>().map(|b| u64::from_le_bytes(*b)) else {
        return Some(format!("{} bytes is too short for a safetensors file", file.len()));
    };
    let rest = &file[8..];
    let Some(header) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
        return Some(format!("its header claims {length} bytes and the file has {}", file.len()));
    };
    let data = rest.len() - header.len();
    let value: Value = serde_json::from_slice(header).ok()?;
    let mut spans = Vec::new();
    for (name, entry) in value.as_object()?.iter().filter(|(name, _)| *name != "__metadata__") {
        let text = entry.get("dtype").and_then(Value::as_str).unwrap_or("nothing");
        let dtype: Option<safetensors::Dtype> = serde_json::from_value(Value::from(text)).ok();
        let Some(dtype) = dtype else {
            return Some(format!("tensor {name} has the unknown dtype {text:?}"));
        };
        let numbers = |key: &str| entry.get(key)?.as_array()?.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>();
        let (Some(shape), Some(offsets)) = (numbers("shape"), numbers("data_offsets")) else {
            return Some(format!("tensor {name} has no usable shape and data_offsets"));
        };
        let &[begin, end] = offsets.as_slice() else {
            return Some(format!("tensor {name} has {} data_offsets, not 2", offsets.len()));
        };
        if begin > end || end > data as u64 {
            return Some(format!("tensor {name} claims the bytes {begin}..{end} and the file holds {data} of data"));
        }
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d));
        if bits != Some((end - begin) * 8) {
            return Some(format!("tensor {name}, {text} {shape:?}, does not take the {} bytes it claims", end - begin));
        }
        spans.push((begin, end, name));
    }
    spans.sort_unstable();
    let mut reach = 0;
    for (begin, end, name) in spans {
        if begin != reach {
            return Some(format!(
                "tensor {name} begins at byte {begin} of the data and the one before it ends at {reach}"
            ));
        }
        reach = end;
    }
    (reach != data as u64).then(|| format!("its tensors end at byte {reach} of {data} of data"))
}
