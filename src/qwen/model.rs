//! A loaded model, and what is needed to load it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::qwen::config::{Config, GenerationConfig};
use crate::qwen::files::Checkpoint;
use crate::qwen::layer::Workspace;
use crate::qwen::memory::{MemoryPlan, Sizes};
use crate::qwen::random::RandomSource;
use crate::qwen::rehearse::Rehearsal;
use crate::qwen::session::Session;
use crate::qwen::template::{self, ChatTemplate};
use crate::qwen::tokenizer::Tokenizer;
use crate::qwen::turns::Turns;
use crate::qwen::weights::{FileSource, Source, Weights};
use crate::shape::Dtype;
use crate::tune::Caps;

/// How a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// Positions that a session can hold; by default 32768, or as many as the model and the memory allow.
    pub context: Option<u64>,
    /// How keys and values are stored: f32 to the last digit, f16 in half the memory.
    pub kv: Dtype,
    /// Bytes that snapshots may take beside the session, as the budget of a [`Cache`](crate::qwen::Cache) has it: they are a part
    /// of the plan, and what is left is for the context.
    pub snapshots: u64,
}

/// A model on a device. Clones share the weights.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub config: Config,
    pub weights: Weights,
    pub backend: Arc<dyn Backend>,
    pub plan: MemoryPlan,
    pub sizes: Sizes,
    /// Shared by all sessions; made with the first.
    pub workspace: Mutex<Option<Workspace>>,
    pub turns: Option<Turns>,
    generation: GenerationConfig,
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    stop_ids: Vec<u32>,
    pub dir: PathBuf,
    /// Kernels that are being compiled.
    rehearsal: Option<Rehearsal>,
    /// The seed of random weights.
    pub random: Option<(u64, Dtype)>,
    /// The mapped files of others.
    checkpoint: Option<Arc<Checkpoint>>,
    /// Of all models that have taken one another's place.
    pub line: OnceLock<u64>,
    /// Its device is given up: what is on it is nothing any more.
    gone: AtomicBool,
    /// Of all that makes a stored snapshot one of this model, once it was needed.
    #[cfg(feature = "store")]
    pub key: std::sync::OnceLock<u128>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("dir", &self.dir).field("config", &self.config).finish_non_exhaustive()
    }
}

impl Model {
    /// Adds up what loading `dir` would take on a device. Maps the files and reads their headers; allocates nothing there.
    ///
    /// # Errors
    /// As [`Model::load`], short of what a device reports.
    pub fn plan(dir: impl AsRef<Path>, caps: &Caps, options: &LoadOptions) -> Result<MemoryPlan> {
        let dir = dir.as_ref();
        let config = Config::read(&dir.join("config.json"))?;
        let checkpoint = Checkpoint::open(dir)?;
        let weights = Weights::measure(&config, &FileSource::new(&checkpoint, &config)?)?;
        MemoryPlan::new(&config, caps, weights, options)
    }

    /// Loads a directory as released: `config.json`, safetensors files, `tokenizer.json`, a chat template and
    /// `generation_config.json`; the last three may be absent.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file, and the tensor or the key, that is missing, broken or contradicts another;
    /// [`Error::OutOfMemory`] with the numbers if the plan does not fit; what the backend reports.
    pub fn load(dir: impl AsRef<Path>, backend: Arc<dyn Backend>, options: &LoadOptions) -> Result<Model> {
        Model::load_with(dir, backend, options, &mut |_, _| {})
    }

    /// The same, telling `progress` the bytes of weights that are on the device and their total.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_with(
        dir: impl AsRef<Path>,
        backend: Arc<dyn Backend>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        let dir = dir.as_ref();
        let config = Config::read(&dir.join("config.json"))?;
        let generation = GenerationConfig::read(&dir.join("generation_config.json"))?;
        let tokenizer_path = dir.join("tokenizer.json");
        let tokenizer =
            if tokenizer_path.exists() { Some(Tokenizer::read(&tokenizer_path, config.vocab)?) } else { None };
        let template = ChatTemplate::read(dir)?;
        let end = template::special_tokens(dir)?.into_iter().find(|(name, _)| name == "eos_token");
        let checkpoint = Arc::new(Checkpoint::open(dir)?);
        let source = FileSource::new(&checkpoint, &config)?;
        let mut inner = Inner::new(config, &source, backend, options, progress)?;
        inner.checkpoint = Some(checkpoint.clone());
        inner.stop_ids =
            stop_ids(&inner.config, &generation, end.and_then(|(_, token)| tokenizer.as_ref()?.id(&token)));
        if let Some(tokenizer) = &tokenizer
            && let Some(id) = inner.stop_ids.iter().find(|id| !tokenizer.has(**id))
        {
            let why = format!("it has no token {id}, which ends an answer of this model: it belongs to another one");
            return Err(Error::load(tokenizer_path, why));
        }
        inner.turns = tokenizer.as_ref().and_then(Turns::new);
        inner.generation = generation;
        inner.tokenizer = tokenizer;
        inner.template = template;
        inner.dir = dir.to_path_buf();
        Ok(Model { inner: Arc::new(inner) })
    }

    /// A model of this shape with random weights of one type, for benchmarks: it computes all that a trained one does and
    /// means nothing. It has no tokenizer and no template.
    ///
    /// # Errors
    /// [`Error::Argument`] for a config that does not hold together; as [`Model::load`] for memory and device.
    pub fn random(
        config: Config,
        backend: Arc<dyn Backend>,
        seed: u64,
        dtype: Dtype,
        options: &LoadOptions,
    ) -> Result<Model> {
        config.check()?;
        let mut inner = Inner::new(config, &RandomSource { seed, dtype }, backend, options, &mut |_, _| {})?;
        inner.random = Some((seed, dtype));
        Ok(Model { inner: Arc::new(inner) })
    }

    /// The same model on another device, for sessions of the same length: from the weights as they are mapped, whatever has
    /// become of the files meanwhile.
    pub(crate) fn again(&self, backend: Arc<dyn Backend>, progress: &mut dyn FnMut(u64, u64)) -> Result<Model> {
        let old = &self.inner;
        let options = LoadOptions { context: Some(old.plan.context), kv: old.plan.kv, snapshots: old.plan.snapshots };
        let config = old.config.clone();
        let inner = match (&old.checkpoint, old.random) {
            (Some(checkpoint), _) => {
                Inner::new(config, &FileSource::new(checkpoint, &old.config)?, backend, &options, progress)?
            }
            (None, Some((seed, dtype))) => {
                Inner::new(config, &RandomSource { seed, dtype }, backend, &options, progress)?
            }
            (None, None) => return Err(Error::load(&old.dir, "nothing is known of where the weights came from")),
        };
        Ok(Model {
            inner: Arc::new(Inner {
                turns: old.turns.clone(),
                generation: old.generation.clone(),
                tokenizer: old.tokenizer.clone(),
                template: old.template.clone(),
                stop_ids: old.stop_ids.clone(),
                dir: old.dir.clone(),
                random: old.random,
                checkpoint: old.checkpoint.clone(),
                line: old.line.clone(),
                ..inner
            }),
        })
    }

    /// Gives the device up, and the memory there as far as that goes.
    pub(crate) fn give_up(&self) {
        self.inner.gone.store(true, Ordering::Release);
        if let Ok(mut workspace) = self.inner.workspace.try_lock() {
            *workspace = None;
        }
        self.inner.backend.abandon();
    }

    /// True once the device was given up.
    pub(crate) fn is_gone(&self) -> bool {
        self.inner.gone.load(Ordering::Acquire)
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn session(&self) -> Result<Session> {
        Session::new(self.clone())
    }

    /// Waits until the kernels are compiled that the model is likely to need, which began before its weights were loaded.
    /// `progress` gets those that are and their number. How long compiling took, the time of loading included where both went
    /// on together; nothing on devices whose kernels are compiled beforehand. Nobody has to wait: a pass compiles what it lacks,
    /// and says what is wrong with it.
    pub fn ready(&self, progress: &mut dyn FnMut(u64, u64)) -> Duration {
        self.inner.rehearsal.as_ref().map_or(Duration::ZERO, |rehearsal| rehearsal.wait(progress))
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Where the model is and what it takes there.
    pub fn memory(&self) -> &MemoryPlan {
        &self.inner.plan
    }

    /// Where the model is.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.inner.backend
    }

    /// What the checkpoint asks for when it answers.
    pub fn generation(&self) -> &GenerationConfig {
        &self.inner.generation
    }

    /// Ids that end an answer: those of `generation_config.json` and `config.json` and the tokenizer's own end of a turn.
    pub fn stop_ids(&self) -> &[u32] {
        &self.inner.stop_ids
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Load`] if the checkpoint came without one.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || Error::load(&self.inner.dir, "there is no tokenizer.json");
        self.inner.tokenizer.as_ref().ok_or_else(missing)
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::Load`] if the checkpoint came without one.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        let missing = || Error::load(&self.inner.dir, "there is no chat template");
        self.inner.template.as_ref().ok_or_else(missing)
    }
}

impl Inner {
    /// Where the weights came from, in words.
    pub fn source(&self) -> String {
        match self.random {
            Some((seed, dtype)) => format!("drawn from seed {seed} as {dtype}"),
            None => self.dir.display().to_string(),
        }
    }

    /// Plans, then brings the weights to the device, which compiles the kernels meanwhile.
    fn new(
        config: Config,
        source: &dyn Source,
        backend: Arc<dyn Backend>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Inner> {
        let total = Weights::measure(&config, source)?;
        if options.kv == Dtype::Bf16 {
            return Err(Error::argument("kv", options.kv, "f32 or f16"));
        }
        let plan = MemoryPlan::new(&config, backend.caps(), total, options)?;
        let sizes = Sizes::new(&config, backend.caps(), plan.context, plan.kv)?;
        let rehearsal = Rehearsal::begin(&config, source, &backend, &plan, &sizes);
        let weights = Weights::load(&config, source, backend.as_ref(), &mut |done| progress(done, total))?;
        Ok(Inner { rehearsal, ..Inner::from_parts(config, weights, backend, plan, sizes) })
    }

    /// A model with nothing but weights.
    pub fn from_parts(
        config: Config,
        weights: Weights,
        backend: Arc<dyn Backend>,
        plan: MemoryPlan,
        sizes: Sizes,
    ) -> Inner {
        Inner {
            config,
            weights,
            backend,
            plan,
            sizes,
            rehearsal: None,
            workspace: Mutex::new(None),
            turns: None,
            generation: GenerationConfig::default(),
            tokenizer: None,
            template: None,
            stop_ids: Vec::new(),
            dir: PathBuf::new(),
            random: None,
            checkpoint: None,
            line: OnceLock::new(),
            gone: AtomicBool::new(false),
            #[cfg(feature = "store")]
            key: std::sync::OnceLock::new(),
        }
    }
}

/// All ids that end an answer, ascending; `own` is the end of a turn that the tokenizer names.
fn stop_ids(config: &Config, generation: &GenerationConfig, own: Option<u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = generation.eos.iter().chain(&config.eos).copied().chain(own).collect();
    ids.retain(|id| *id < config.vocab);
    ids.sort_unstable();
    ids.dedup();
    ids
}
