//! The runtime of this repository as the agent's engine: one session that keeps what it has read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use gatedelta::device::{self, Account};
use gatedelta::qwen::{Event, Finish, GenerateOptions, LoadOptions, Model, Sampling, Session};
use serde_json::{Value, json};

use super::{Answer, End, Engine, Step};
use crate::event::Start;
use crate::options::Args;
use crate::{builtin, ui, untrained};

/// See the [module](self).
pub struct Local {
    model: Model,
    session: Session,
    options: GenerateOptions,
    /// Ends an answer from within.
    cancel: Arc<AtomicBool>,
    /// The last answer failed: what the session holds is not to be trusted.
    failed: bool,
    account: Account,
    name: String,
    untrained: Option<String>,
    _unpacked: Option<tempfile::TempDir>,
}

impl Local {
    /// Opens a device and loads the checkpoint, with a bar where that takes a while.
    ///
    /// # Errors
    /// Whatever is wrong with the device's name, the checkpoint or the sampling options.
    pub fn load(args: &Args) -> Result<Self> {
        let unpacked = match &args.model {
            Some(_) => None,
            None => {
                let dir = tempfile::Builder::new().prefix("gatedelta-agent-").tempdir();
                let dir = dir.context("there is no place for temporary files")?;
                builtin::unpack(dir.path())
                    .with_context(|| format!("the built-in checkpoint cannot be put into {}", dir.path().display()))?;
                Some(dir)
            }
        };
        let (dir, name) = match (&args.model, &unpacked) {
            (Some(dir), _) => (dir.clone(), dir.display().to_string()),
            (None, Some(dir)) => (dir.path().to_path_buf(), "the built-in tiny checkpoint".to_string()),
            (None, None) => (PathBuf::new(), String::new()),
        };
        if !dir.is_dir() {
            bail!("--model {}: there is no such directory", dir.display());
        }
        let untrained = untrained_mark(&dir);
        let busy = ui::spinner("looking for devices");
        let opened = device::open(args.device.as_deref());
        busy.finish_and_clear();
        let (backend, account) = opened?;

        let bar = ui::progress(0, "loading {bar:30} {bytes}/{total_bytes}, {eta} left");
        let options = LoadOptions { context: args.context.map(|n| n as u64), ..LoadOptions::default() };
        let model = Model::load_with(&dir, backend, &options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let model = model?;
        let tokenizer = model.tokenizer().map(|_| ());
        tokenizer.and_then(|()| model.chat_template().map(|_| ())).context("this checkpoint cannot chat")?;

        let cancel = Arc::new(AtomicBool::new(false));
        let mut options = GenerateOptions::of(&model);
        options.sampling = sampling(args, options.sampling);
        options.sampling.check()?;
        options.seed = args.seed.unwrap_or_else(clock_seed);
        options.cancel = Some(cancel.clone());
        let session = model.session()?;
        Ok(Local { model, session, options, cancel, failed: false, account, name, untrained, _unpacked: unpacked })
    }

    /// Which devices there are and why this one was chosen.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// What to tell the user at the start; the tools are filled in by others.
    pub fn start(&self) -> Start {
        let (config, memory, sampling) = (self.model.config(), self.model.memory(), self.options.sampling);
        let chosen = self.account.chosen.and_then(|at| self.account.candidates.get(at));
        Start {
            device: chosen.map_or_else(String::new, |device| format!("{} ({})", device.name, device.driver)),
            why: self.account.why.clone(),
            model: self.name.clone(),
            shape: format!(
                "{} parameters, {} layers; {} with a context of {} tokens",
                ui::count(config.parameters()),
                config.layers.len(),
                indicatif::BinaryBytes(memory.total()),
                memory.context,
            ),
            untrained: self.untrained.clone(),
            tools: Vec::new(),
            folder: None,
            context: memory.context as usize,
            sampling: if sampling.is_greedy() {
                json!({"greedy": true})
            } else {
                json!({
                    "temperature": sampling.temperature,
                    "top_k": sampling.top_k,
                    "top_p": sampling.top_p,
                    "min_p": sampling.min_p,
                    "presence_penalty": sampling.presence_penalty,
                    "seed": self.options.seed,
                })
            },
        }
    }

    /// How many tokens at the front of `ids` need no reading. What cannot be kept is forgotten.
    fn keep(&mut self, ids: &[u32]) -> Result<usize> {
        let held = self.session.ids();
        if !self.failed && held.len() < ids.len() && ids.starts_with(held) {
            return Ok(held.len());
        }
        self.session.reset()?;
        self.failed = false;
        Ok(0)
    }
}

impl Engine for Local {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        let messages = Value::from(messages);
        let tools = (!tools.is_empty()).then(|| Value::from(tools));
        Ok(self.model.chat_template()?.render(&messages, tools.as_ref(), true, thinking)?)
    }

    fn generate(
        &mut self,
        prompt: &str,
        budget: usize,
        each: &mut dyn FnMut(Step<'_>) -> Result<bool>,
    ) -> Result<Answer> {
        let ids = self.model.tokenizer()?.encode(prompt)?;
        let context = self.model.memory().context;
        if ids.len() as u64 >= context {
            bail!(
                "the conversation has {} tokens and the context holds {context}: /clear forgets it, --context makes room",
                ids.len()
            );
        }
        let (total, reused) = (ids.len(), self.keep(&ids)?);
        let mut answer = Answer {
            end: End::Cancelled,
            prompt: total,
            reused,
            wrote: 0,
            decoded: 0,
            reading: Duration::ZERO,
            writing: Duration::ZERO,
        };
        self.cancel.store(false, Ordering::Relaxed);
        if !each(Step::Read { done: reused, total, reused })? {
            return Ok(answer);
        }
        self.options.max_tokens = Some(budget as u64);
        // Rounds of one conversation must not draw the same numbers.
        self.options.seed = self.options.seed.wrapping_add(1);
        for event in self.session.generate(&ids[reused..], &self.options)? {
            let goes_on = match event {
                Event::Prompt { done, .. } => each(Step::Read { done: reused + done as usize, total, reused })?,
                Event::Token { id, text } => {
                    answer.wrote += 1;
                    each(Step::Wrote { id, text: &text })?
                }
                Event::Done { text, finish, timings } => {
                    if !text.is_empty() {
                        each(Step::Rest { text: &text })?;
                    }
                    answer.decoded = timings.decoded_tokens as usize;
                    answer.reading = timings.prompt;
                    answer.writing = timings.decode;
                    answer.end = match finish {
                        Finish::Stop(_) => End::Stop,
                        Finish::Length => End::Budget,
                        Finish::Context => End::Context,
                        Finish::Cancelled => End::Cancelled,
                        Finish::Failed(why) => {
                            self.failed = true;
                            return Err(why.into());
                        }
                    };
                    true
                }
            };
            if !goes_on {
                self.cancel.store(true, Ordering::Relaxed);
            }
        }
        Ok(answer)
    }
}

/// The checkpoint's own choice with the user's in its place where there is one.
fn sampling(args: &Args, own: Sampling) -> Sampling {
    if args.greedy {
        return Sampling { presence_penalty: args.presence_penalty.unwrap_or(0.0), ..Sampling::GREEDY };
    }
    Sampling {
        temperature: args.temperature.unwrap_or(own.temperature),
        top_k: args.top_k.unwrap_or(own.top_k),
        top_p: args.top_p.unwrap_or(own.top_p),
        min_p: args.min_p.unwrap_or(own.min_p),
        presence_penalty: args.presence_penalty.unwrap_or(own.presence_penalty),
    }
}

/// What a checkpoint of ours says about being untrained.
fn untrained_mark(dir: &Path) -> Option<String> {
    let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).ok()?).ok()?;
    Some(config.get(untrained::MARK)?.as_str()?.to_string())
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}
