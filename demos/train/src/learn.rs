//! A run of training: a model, its optimiser, how far it is, and the one file that holds all of it.
//!
//! Losses stay where they were computed until they are asked for: on a GPU every look at a number waits for all work before it.
//!
//! The file `run.safetensors` is replaced in one step, so that a run that is killed at any moment goes on from a whole one. It holds
//! every number byte for byte: what goes on is bit for bit what would have gone on without the stop.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::store::ModuleRecord;
use burn::tensor::{Bytes, Tensor};
use gatedelta::burn::Qwen35;
use gatedelta_agent::tools::notes::replace;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::flat::Flat;

/// A model of the same sizes with the weights of a run's file.
///
/// # Errors
/// If the file is not there, no run's, or one of other sizes.
pub fn weights(file: &Path, model: Qwen35) -> Result<Qwen35> {
    let read = || -> Result<Qwen35> {
        let bytes = std::fs::read(file)?;
        let record = SafeTensors::deserialize(&bytes)?.tensor("model")?.data().to_vec();
        Ok(model.try_load_record(ModuleRecord::from_bytes(Bytes::from_bytes_vec(record))?)?)
    };
    read().with_context(|| format!("{} gives no weights", file.display()))
}

/// See the [module](self). `N` losses are kept for every step; the first is the one to look at.
pub struct Run<const N: usize> {
    pub model: Qwen35,
    optimiser: Optimiser,
    /// The losses of the steps that were read so far.
    pub losses: Vec<[f32; N]>,
    /// Those of the steps after them, `[N]` each, where they were computed.
    unread: Vec<Tensor<1>>,
    /// Steps after which other data was looked at, and its losses.
    pub held: Vec<(u64, [f32; N])>,
    /// What the run was started with; it goes on with the same or not at all.
    settings: Value,
    path: PathBuf,
}

/// How gradients become steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recipe {
    /// burn's AdamW.
    Plain,
    /// AdamW as language models are trained with: betas 0.9 and 0.95, eps 1e-8, weight decay 0.1 on matrices alone, and
    /// gradients of norm 1 at the most.
    Language,
}

/// What carries the recipe out.
enum Optimiser {
    Plain(Box<ModuleOptimizer>),
    Language(Box<Flat>),
}

impl Optimiser {
    /// Before the first step of a model.
    fn new(recipe: Recipe, model: &Qwen35) -> Result<Self> {
        Ok(match recipe {
            Recipe::Plain => Optimiser::Plain(Box::new(AdamWConfig::new().init())),
            Recipe::Language => Optimiser::Language(Box::new(Flat::new(model)?)),
        })
    }

    fn step(&mut self, rate: f64, model: Qwen35, gradients: GradientsParams) -> Qwen35 {
        match self {
            Optimiser::Plain(adamw) => adamw.step(rate, model, gradients),
            Optimiser::Language(flat) => flat.step(rate, model, gradients),
        }
    }

    fn state(&self) -> Result<Vec<u8>> {
        Ok(match self {
            Optimiser::Plain(adamw) => adamw.into_bytes()?.to_vec(),
            Optimiser::Language(flat) => flat.state()?,
        })
    }

    /// After so many steps of a model, with this state.
    fn restored(&self, model: &Qwen35, state: Vec<u8>, steps: u64) -> Result<Self> {
        Ok(match self {
            Optimiser::Plain(adamw) => {
                Optimiser::Plain(Box::new(adamw.as_ref().clone().from_bytes(Bytes::from_bytes_vec(state))?))
            }
            Optimiser::Language(_) => {
                let mut flat = Flat::new(model)?;
                flat.restore(&state, steps)?;
                Optimiser::Language(Box::new(flat))
            }
        })
    }
}

/// The learning rate of step `at` (from 0) of `steps`: rises in the first twentieth, then falls as a cosine to the part `last` of
/// the highest.
pub fn rate(highest: f64, last: f64, at: u64, steps: u64) -> f64 {
    let rise = (steps / 20).max(1);
    if at < rise {
        return highest * (at + 1) as f64 / rise as f64;
    }
    let way = (at - rise) as f64 / (steps - rise).max(1) as f64;
    highest * (last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * way.min(1.0)).cos()))
}

impl<const N: usize> Run<N> {
    /// A new run in the directory `dir`, or the one that is there already.
    ///
    /// # Errors
    /// If the run in `dir` was started with other settings, or its file is broken.
    pub fn open(dir: &Path, model: Qwen35, recipe: Recipe, settings: Value) -> Result<Self> {
        let path = dir.join("run.safetensors");
        let optimiser = Optimiser::new(recipe, &model)?;
        let mut run =
            Run { model, optimiser, losses: Vec::new(), unread: Vec::new(), held: Vec::new(), settings, path };
        if run.path.exists() {
            let path = run.path.clone();
            run.load().with_context(|| format!("the run in {} cannot go on", path.display()))?;
        }
        Ok(run)
    }

    fn load(&mut self) -> Result<()> {
        let bytes = std::fs::read(&self.path)?;
        let (_, head) = SafeTensors::read_metadata(&bytes)?;
        let about = head.metadata().as_ref().and_then(|about| about.get("about")).context("it is no file of a run")?;
        let about: Value = serde_json::from_str(about)?;
        if about["settings"] != self.settings {
            bail!("it was started with {}; these are {}", about["settings"], self.settings);
        }
        let file = SafeTensors::deserialize(&bytes)?;
        let record = |name: &str| -> Result<Vec<u8>> { Ok(file.tensor(name)?.data().to_vec()) };
        let model = ModuleRecord::from_bytes(Bytes::from_bytes_vec(record("model")?))?;
        self.model = self.model.clone().try_load_record(model)?;
        let numbers = |name: &str| -> Result<Vec<f32>> {
            let four = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            Ok(file.tensor(name)?.data().chunks_exact(4).map(four).collect())
        };
        self.losses = numbers("losses")?.chunks_exact(N).map(|row| std::array::from_fn(|i| row[i])).collect();
        self.optimiser = self.optimiser.restored(&self.model, record("optimiser")?, self.losses.len() as u64)?;
        let held = numbers("held")?;
        self.held = held.chunks_exact(N + 1).map(|row| (row[0] as u64, std::array::from_fn(|i| row[i + 1]))).collect();
        Ok(())
    }

    /// Writes the file, after reading what was not read of the losses.
    ///
    /// # Errors
    /// As [`Run::read`], and where the file cannot be written; the one before it stays.
    pub fn save(&mut self) -> Result<()> {
        self.read()?;
        let model = self.model.clone().into_record().into_bytes()?;
        let optimiser = self.optimiser.state()?;
        let losses: Vec<u8> = self.losses.iter().flatten().flat_map(|loss| loss.to_le_bytes()).collect();
        // Up to 2^24 a step is itself as f32.
        let held = self.held.iter().flat_map(|(step, losses)| std::iter::once(*step as f32).chain(*losses));
        let held: Vec<u8> = held.flat_map(f32::to_le_bytes).collect();
        let views = [
            ("model", TensorView::new(Dtype::U8, vec![model.len()], &model)?),
            ("optimiser", TensorView::new(Dtype::U8, vec![optimiser.len()], &optimiser)?),
            ("losses", TensorView::new(Dtype::F32, vec![self.losses.len(), N], &losses)?),
            ("held", TensorView::new(Dtype::F32, vec![self.held.len(), N + 1], &held)?),
        ];
        let about = [("about".to_string(), json!({"settings": self.settings}).to_string())].into();
        let bytes = safetensors::serialize(views, Some(about))?;
        replace(&self.path, &bytes).with_context(|| format!("{} cannot be written", self.path.display()))
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        (self.losses.len() + self.unread.len()) as u64
    }

    /// The first loss of every step that was read.
    pub fn curve(&self) -> Vec<f32> {
        self.losses.iter().map(|losses| losses[0]).collect()
    }

    /// One step down the gradient of a loss `[1]` of the model; `kept [N]` is what is kept of it.
    pub fn step(&mut self, loss: Tensor<1>, kept: Tensor<1>, rate: f64) {
        let kept = kept.inner();
        let gradients = GradientsParams::from_grads(loss.backward(), &self.model);
        self.model = self.optimiser.step(rate, self.model.clone(), gradients);
        self.unread.push(kept);
    }

    /// Reads the losses of the last steps, once all of their work is done.
    ///
    /// # Errors
    /// If one of them is no number: the run is over, and its file is as it was.
    pub fn read(&mut self) -> Result<()> {
        if self.unread.is_empty() {
            return Ok(());
        }
        let all: Vec<f32> = Tensor::cat(std::mem::take(&mut self.unread), 0).try_into_vec_as()?;
        for row in all.chunks_exact(N) {
            if let Some(bad) = row.iter().find(|loss| !loss.is_finite()) {
                bail!("the loss of step {} is {bad}: try a lower --rate", self.losses.len() + 1);
            }
            self.losses.push(std::array::from_fn(|i| row[i]));
        }
        Ok(())
    }
}

/// burn draws random numbers from one stream for all threads: a test that makes a model waits for the others.
#[cfg(test)]
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Int, TensorData};
    use gatedelta::burn::Engine;

    use super::*;
    use crate::training::tests::tiny;

    fn loss(model: &Qwen35, device: &Device) -> Tensor<1> {
        let ids = Tensor::<2, Int>::from_data(TensorData::new((0..20i64).collect(), [2, 10]), device);
        model.forward(ids).powi_scalar(2).mean()
    }

    #[test]
    fn a_loss_that_is_no_number_ends_the_run_and_leaves_the_file() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let dir = tempfile::tempdir().unwrap();
        let model = tiny().init(&Engine::open(Some("cpu")).unwrap(), &device).unwrap();
        let mut run = Run::<1>::open(dir.path(), model, Recipe::Language, json!({})).unwrap();
        let step = |run: &mut Run<1>, times: f64| {
            let loss = loss(&run.model, &device) * times;
            run.step(loss.clone(), loss, 1e-3);
        };
        step(&mut run, 1.0);
        run.save().unwrap();
        let before = std::fs::read(dir.path().join("run.safetensors")).unwrap();
        step(&mut run, 1.0);
        step(&mut run, f64::NAN);
        // Its weights are numbers still: the step after it has a loss.
        step(&mut run, 1.0);
        assert_eq!((run.steps(), run.losses.len()), (4, 1));
        let why = run.save().unwrap_err().to_string();
        assert!(why.contains("the loss of step 3 is NaN"), "{why}");
        assert!(run.losses[1][0].is_finite() && run.losses.len() == 2);
        assert!(loss(&run.model, &device).into_scalar::<f32>().is_finite());
        assert_eq!(std::fs::read(dir.path().join("run.safetensors")).unwrap(), before);
    }
}
