//! Case files: one call of the operator with its inputs and, usually, its answers, as a safetensors file.
//!
//! Reading checks everything the format promises, so what comes out of [`Case::read`] can be run; each error names the
//! tensor or the metadata entry that breaks the promise.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use gatedelta::gdn::{Inputs, Options};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors};

/// What the operator should give.
#[derive(Debug, Clone, PartialEq)]
pub struct Answers {
    /// `[T, Hv, V]`.
    pub o: Vec<f32>,
    /// `[N, Hv, K, V]`.
    pub ht: Vec<f32>,
}

/// The gradient of a scalar with respect to what the operator gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Cotangents {
    /// `[T, Hv, V]`.
    pub d_o: Vec<f32>,
    /// `[N, Hv, K, V]`; zero where absent.
    pub dht: Option<Vec<f32>>,
}

/// What the gradient of the same scalar with respect to the inputs should be.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[T, Hk, K]`, of the raw q.
    pub dq: Vec<f32>,
    /// `[T, Hk, K]`, of the raw k.
    pub dk: Vec<f32>,
    /// `[T, Hv, V]`.
    pub dv: Vec<f32>,
    /// `[T, Hv]`.
    pub dg: Vec<f32>,
    /// `[T, Hv]`.
    pub dbeta: Vec<f32>,
    /// `[N, Hv, K, V]`; files have it only where they have h0.
    pub dh0: Option<Vec<f32>>,
}

/// One call of the operator.
#[derive(Debug, Clone)]
pub struct Case {
    /// The file's name without its extension.
    pub name: String,
    /// Heads, head sizes and sequences.
    pub shape: Shape,
    /// `[T, Hk, K]`.
    pub q: Vec<f32>,
    /// `[T, Hk, K]`.
    pub k: Vec<f32>,
    /// `[T, Hv, V]`.
    pub v: Vec<f32>,
    /// `[T, Hv]`, log decay.
    pub g: Vec<f32>,
    /// `[T, Hv]`.
    pub beta: Vec<f32>,
    /// `[N, Hv, K, V]`; zero where absent.
    pub h0: Option<Vec<f32>>,
    /// Factor of q; the operator's own `K^-1/2` where absent.
    pub scale: Option<f32>,
    /// q and k are divided by `sqrt(sum of squares + 1e-6)`.
    pub qk_l2norm: bool,
    /// Not of the file: how to cut its sequences, see [`Options::cut`].
    pub cut: Option<u32>,
    /// Not of the file: too large to go any other way than at once.
    pub large: bool,
    /// The file's answers, if it holds both.
    pub answers: Option<Answers>,
    /// The gradient to go back from, if the file has it.
    pub cotangents: Option<Cotangents>,
    /// The gradients that this gives, if the file has them; only beside cotangents.
    pub gradients: Option<Gradients>,
}

impl Case {
    /// Reads and checks a case file.
    ///
    /// # Errors
    /// The path, then the tensor or metadata entry that is missing or does not fit, what was found and what was expected.
    pub fn read(path: &Path) -> Result<Case> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Case::parse(name, &bytes).with_context(|| format!("{} is not a usable case", path.display()))
    }

    fn parse(name: String, bytes: &[u8]) -> Result<Case> {
        let (_, header) = SafeTensors::read_metadata(bytes).context("not a safetensors file")?;
        let file = SafeTensors::deserialize(bytes).context("not a safetensors file")?;
        let empty = HashMap::new();
        let meta = Meta(header.metadata().as_ref().unwrap_or(&empty));
        meta.must_be("op", "gated_delta_rule")?;
        meta.must_be("version", "1")?;
        let scale = meta.scale()?;
        let qk_l2norm = meta.flag("qk_l2norm")?;

        let tensors = Tensors(&file);
        let [t, hk, k_dim] = tensors.dims("q")?;
        let [_, hv, v_dim] = tensors.dims("v")?;
        let [offsets] = tensors.dims("cu_seqlens")?;
        let n = offsets.saturating_sub(1);
        let narrow =
            |what: &str, n: usize| u32::try_from(n).with_context(|| format!("{what}: {n} does not fit 32 bits"));
        let heads = Heads::new(
            narrow("Hk (dimension 1 of q)", hk)?,
            narrow("Hv (dimension 1 of v)", hv)?,
            narrow("K (dimension 2 of q)", k_dim)?,
            narrow("V (dimension 2 of v)", v_dim)?,
            HeadMap::Div,
        )?;
        let cu_seqlens = tensors.offsets("cu_seqlens")?;
        let shape = Shape::new(heads, cu_seqlens)?;
        ensure!(
            shape.tokens() == t as u64,
            "cu_seqlens[{n}]: found {}, expected {t}, the number of tokens in q",
            shape.tokens()
        );

        let (qk, vo, gate, state) = (vec![t, hk, k_dim], vec![t, hv, v_dim], vec![t, hv], vec![n, hv, k_dim, v_dim]);
        let answers = match (tensors.optional("o", &vo)?, tensors.optional("ht", &state)?) {
            (Some(o), Some(ht)) => Some(Answers { o, ht }),
            _ => None,
        };
        let h0 = tensors.optional("h0", &state)?;
        let cotangents = match (tensors.optional("do", &vo)?, tensors.optional("dht", &state)?) {
            (Some(d_o), dht) => Some(Cotangents { d_o, dht }),
            (None, Some(_)) => bail!("tensor do is missing, and dht is there"),
            (None, None) => None,
        };
        let gradients = if tensors.has_gradients(h0.is_some())? {
            Some(Gradients {
                dq: tensors.numbers("dq", &qk)?,
                dk: tensors.numbers("dk", &qk)?,
                dv: tensors.numbers("dv", &vo)?,
                dg: tensors.numbers("dg", &gate)?,
                dbeta: tensors.numbers("dbeta", &gate)?,
                dh0: tensors.optional("dh0", &state)?,
            })
        } else {
            None
        };
        Ok(Case {
            name,
            q: tensors.numbers("q", &qk)?,
            k: tensors.numbers("k", &qk)?,
            v: tensors.numbers("v", &vo)?,
            g: tensors.numbers("g", &gate)?,
            beta: tensors.numbers("beta", &gate)?,
            h0,
            shape,
            scale,
            qk_l2norm,
            cut: None,
            large: false,
            answers,
            cotangents,
            gradients,
        })
    }

    /// The call, with its numbers stored as `store` on the device.
    pub fn inputs(&self, store: Dtype) -> Inputs<'_> {
        Inputs {
            shape: self.shape.clone(),
            q: &self.q,
            k: &self.k,
            v: &self.v,
            g: &self.g,
            beta: &self.beta,
            h0: self.h0.as_deref(),
            options: self.options(store),
        }
    }

    /// Scale, norm and storage.
    pub fn options(&self, store: Dtype) -> Options {
        Options { scale: self.scale, qk_l2norm: self.qk_l2norm, store, cut: self.cut, exact: false, scratch: None }
    }

    /// `[T, Hk, K]`.
    pub fn q_dims(&self) -> Vec<usize> {
        vec![self.shape.tokens() as usize, self.shape.heads.hk as usize, self.shape.heads.k as usize]
    }

    /// `[T, Hv]`.
    pub fn gate_dims(&self) -> Vec<usize> {
        vec![self.shape.tokens() as usize, self.shape.heads.hv as usize]
    }

    /// `[T, Hv, V]`.
    pub fn o_dims(&self) -> Vec<usize> {
        vec![self.shape.tokens() as usize, self.shape.heads.hv as usize, self.shape.heads.v as usize]
    }

    /// `[N, Hv, K, V]`.
    pub fn state_dims(&self) -> Vec<usize> {
        let heads = self.shape.heads;
        vec![self.shape.sequences(), heads.hv as usize, heads.k as usize, heads.v as usize]
    }
}

/// All case files of a directory, by name.
///
/// # Errors
/// A directory that cannot be listed or holds no case.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot list the cases in {}", dir.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list the cases in {}", dir.display()))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    ensure!(!paths.is_empty(), "no case files (*.safetensors) in {}", dir.display());
    paths.sort();
    Ok(paths)
}

/// A file's metadata.
struct Meta<'a>(&'a HashMap<String, String>);

impl Meta<'_> {
    fn must_be(&self, key: &str, wanted: &str) -> Result<()> {
        match self.0.get(key) {
            Some(found) if found == wanted => Ok(()),
            Some(found) => bail!("metadata {key}: found {found:?}, expected {wanted:?}"),
            None => bail!("metadata {key}: missing, expected {wanted:?}"),
        }
    }

    fn scale(&self) -> Result<Option<f32>> {
        let Some(text) = self.0.get("scale") else { return Ok(None) };
        match text.parse::<f64>() {
            Ok(scale) if (scale as f32).is_finite() => Ok(Some(scale as f32)),
            _ => bail!("metadata scale: found {text:?}, expected a finite number"),
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.0.get(key).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(found) => bail!("metadata {key}: found {found:?}, expected \"true\" or \"false\""),
        }
    }
}

/// A file's tensors.
struct Tensors<'a>(&'a SafeTensors<'a>);

impl<'a> Tensors<'a> {
    fn get(&self, name: &str) -> Result<TensorView<'a>> {
        self.0.tensor(name).ok().with_context(|| format!("tensor {name} is missing"))
    }

    /// The dimensions of a tensor that must have `R` of them.
    fn dims<const R: usize>(&self, name: &str) -> Result<[usize; R]> {
        let dims = self.get(name)?.shape().to_vec();
        dims.as_slice()
            .try_into()
            .ok()
            .with_context(|| format!("tensor {name}: found shape {dims:?}, expected {R} dimensions"))
    }

    fn numbers(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let view = self.get(name)?;
        expect_type(name, &view, Stored::F32)?;
        ensure!(view.shape() == dims, "tensor {name}: found shape {:?}, expected {dims:?}", view.shape());
        Ok(words(view.data()).map(f32::from_le_bytes).collect())
    }

    fn optional(&self, name: &str, dims: &[usize]) -> Result<Option<Vec<f32>>> {
        if self.0.tensor(name).is_ok() { self.numbers(name, dims).map(Some) } else { Ok(None) }
    }

    /// Whether the file has gradients: all of them, and what they come from, or none.
    fn has_gradients(&self, h0: bool) -> Result<bool> {
        let has = |name: &&str| self.0.tensor(name).is_ok();
        let Some(found) = ["dq", "dk", "dv", "dg", "dbeta", "dh0"].iter().find(|name| has(name)) else {
            return Ok(false);
        };
        let last = if h0 { &["dh0"][..] } else { &[] };
        match ["do", "dq", "dk", "dv", "dg", "dbeta"].iter().chain(last).find(|name| !has(name)) {
            Some(missing) => bail!("tensor {missing} is missing, and {found} is there"),
            None => Ok(true),
        }
    }

    fn offsets(&self, name: &str) -> Result<Vec<u64>> {
        let view = self.get(name)?;
        expect_type(name, &view, Stored::I32)?;
        words(view.data())
            .map(i32::from_le_bytes)
            .enumerate()
            .map(|(i, n)| u64::try_from(n).ok().with_context(|| format!("{name}[{i}]: found {n}, expected 0 or more")))
            .collect()
    }
}

fn expect_type(name: &str, view: &TensorView<'_>, wanted: Stored) -> Result<()> {
    ensure!(view.dtype() == wanted, "tensor {name}: found {:?}, expected {wanted:?}", view.dtype());
    Ok(())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = [u8; 4]> {
    bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

/// Reads one tensor of 32-bit integers, such as the ids beside a checkpoint's answers.
///
/// # Errors
/// A missing tensor or another type.
pub fn ids(file: &SafeTensors<'_>, name: &str) -> Result<Vec<u32>> {
    Ok(Tensors(file).offsets(name)?.into_iter().map(|id| id as u32).collect())
}

/// Reads one tensor of f32 with its shape.
///
/// # Errors
/// A missing tensor or another type.
pub fn floats(file: &SafeTensors<'_>, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
    let dims = Tensors(file).get(name)?.shape().to_vec();
    Ok((dims.clone(), Tensors(file).numbers(name, &dims)?))
}

/// Writes f32 tensors as a safetensors file that appears whole or not at all.
///
/// # Errors
/// A shape that does not fit its numbers, a target that is not a plain file, whatever the file system reports.
pub fn write(path: &Path, tensors: &[(&str, Vec<usize>, &[f32])]) -> Result<()> {
    let mut views = Vec::new();
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, data)| data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    for ((name, dims, _), bytes) in tensors.iter().zip(&bytes) {
        let view = TensorView::new(Stored::F32, dims.clone(), bytes)
            .with_context(|| format!("{name}: {} bytes do not make up {dims:?}", bytes.len()))?;
        views.push((*name, view));
    }
    let file = safetensors::serialize(views, None)?;
    replace(path, &file).with_context(|| format!("cannot write {}", path.display()))
}

/// Puts a file in place with a rename, so that a reader or an interruption never sees half of it.
///
/// # Errors
/// A target that exists and is not a plain file, whatever the file system reports.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        ensure!(found.is_file(), "it exists and is not a plain file");
    }
    let name = path.file_name().context("it has no file name")?.to_string_lossy();
    let part = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let done = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if done.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    Ok(done?)
}
