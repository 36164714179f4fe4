//! A run of training: a model, its optimiser, how far it is, and the one file that holds all of it.
//!
//! The file `run.safetensors` is replaced in one step, so that a run that is killed at any moment goes on from a whole one. It holds
//! burn's own records byte for byte: what goes on is bit for bit what would have gone on without the stop.

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

/// See the [module](self).
pub struct Run {
    pub model: Qwen35,
    optimiser: ModuleOptimizer,
    /// The loss of every step so far.
    pub losses: Vec<f32>,
    /// What the run was started with; it goes on with the same or not at all.
    settings: Value,
    path: PathBuf,
}

/// The learning rate of step `at` (from 0) of `steps`: rises in the first twentieth, then falls as a cosine to a tenth.
pub fn rate(highest: f64, at: u64, steps: u64) -> f64 {
    let rise = (steps / 20).max(1);
    if at < rise {
        return highest * (at + 1) as f64 / rise as f64;
    }
    let way = (at - rise) as f64 / (steps - rise).max(1) as f64;
    highest * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * way.min(1.0)).cos()))
}

impl Run {
    /// A new run in the directory `dir`, or the one that is there already.
    ///
    /// # Errors
    /// If the run in `dir` was started with other settings, or its file is broken.
    pub fn open(dir: &Path, model: Qwen35, settings: Value) -> Result<Run> {
        let path = dir.join("run.safetensors");
        let mut run = Run { model, optimiser: AdamWConfig::new().init(), losses: Vec::new(), settings, path };
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
        let record = |name: &str| -> Result<Bytes> { Ok(Bytes::from_bytes_vec(file.tensor(name)?.data().to_vec())) };
        self.model = self.model.clone().try_load_record(ModuleRecord::from_bytes(record("model")?)?)?;
        self.optimiser = self.optimiser.clone().from_bytes(record("optimiser")?)?;
        let losses = file.tensor("losses")?.data();
        self.losses =
            losses.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
        Ok(())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Where it cannot be written; the one before it stays.
    pub fn save(&self) -> Result<()> {
        let model = self.model.clone().into_record().into_bytes()?;
        let optimiser = self.optimiser.into_bytes()?;
        let losses: Vec<u8> = self.losses.iter().flat_map(|loss| loss.to_le_bytes()).collect();
        let views = [
            ("model", TensorView::new(Dtype::U8, vec![model.len()], &model)?),
            ("optimiser", TensorView::new(Dtype::U8, vec![optimiser.len()], &optimiser)?),
            ("losses", TensorView::new(Dtype::F32, vec![self.losses.len()], &losses)?),
        ];
        let about = [("about".to_string(), json!({"settings": self.settings}).to_string())].into();
        let bytes = safetensors::serialize(views, Some(about))?;
        replace(&self.path, &bytes).with_context(|| format!("{} cannot be written", self.path.display()))
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.losses.len() as u64
    }

    /// One step down the gradient of a loss `[1]` of the model.
    ///
    /// # Errors
    /// If the loss is not a number: the model stays as it was.
    pub fn step(&mut self, loss: Tensor<1>, rate: f64) -> Result<()> {
        let value: f32 = loss.clone().try_into_scalar()?;
        if !value.is_finite() {
            bail!("the loss of step {} is {value}: try a lower --rate", self.steps() + 1);
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &self.model);
        self.model = self.optimiser.step(rate, self.model.clone(), gradients);
        self.losses.push(value);
        Ok(())
    }
}
