//! Training of the agent's model on generated conversations.

pub mod batches;
pub mod drills;
pub mod loss;
mod start;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn::module::Module;
use burn::tensor::Device;
use gatedelta::burn::{Engine, Qwen35, Qwen35Config};
use gatedelta::shape::Dtype;
use gatedelta_agent::tools::notes::replace;
use serde_json::{Value, json};

use self::batches::{Batch, Batches, Role};
use self::drills::Drills;
use crate::dataset::Dataset;
use crate::learn::{Recipe, Run, rate};
use crate::place::Place;
use crate::{curve, progress, tokenizer};

/// Steps between two looks at the losses.
const READ: u64 = 10;
/// Batches of held-out data that are looked at.
const HELD: usize = 4;

/// The sizes of the model.
#[derive(Debug, Clone, clap::Args)]
pub struct Sizes {
    /// Numbers in a token's row
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Layers; every fourth is full attention
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Inner size of the MLP
    #[arg(long, default_value_t = 384)]
    intermediate: usize,
    /// Heads of q, k and v of linear attention
    #[arg(long, default_value_t = 4)]
    linear_heads: usize,
    /// Size of such a head, a multiple of 16
    #[arg(long, default_value_t = 64)]
    linear_dim: usize,
    /// Query heads of full attention
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Heads of keys and values of full attention
    #[arg(long, default_value_t = 2)]
    kv_heads: usize,
    /// Size of a head of full attention
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    /// Tokens of the longest conversation that is trained on, and that the model is made for
    #[arg(long, default_value_t = 8192)]
    context: usize,
}

/// What a run is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    sizes: Sizes,
    /// Steps of the whole run
    #[arg(long, value_name = "N", default_value_t = 4000)]
    steps: u64,
    /// Tokens in a step, about
    #[arg(long, value_name = "N", default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Start linear attention as it is drawn, not as an associative memory
    #[arg(long)]
    plain_start: bool,
    /// Weights to begin with: a file run.safetensors, or a directory in the released layout, whose tokenizer may be another one
    #[arg(long, value_name = "PATH")]
    start: Option<PathBuf>,
    /// Steps at the start that drill looking back
    #[arg(long, value_name = "N", default_value_t = 0)]
    drill: u64,
    /// The part of the steps after them that are drills too, from 0 to 0.5
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = up_to(0.5))]
    drill_share: f64,
    /// The highest learning rate
    #[arg(long, default_value_t = 2e-3)]
    rate: f64,
    /// What the rate falls to in the end, as a part of the highest
    #[arg(long, value_name = "X", default_value_t = 0.1, value_parser = up_to(1.0))]
    last_rate: f64,
    /// Width of the distribution that the embedding table is drawn from
    #[arg(long, default_value_t = 0.02)]
    embedding_range: f64,
    /// What the width of matrices that write to the residual stream is multiplied by
    #[arg(long, default_value_t = 1.0)]
    residual_scale: f64,
    /// What the tokens that the model reads count, beside those that it writes
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    context_weight: f64,
    /// Names weights and batches: the same seed gives the same run
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A directory, made if need be; a run that is in it goes on
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// The command `agent`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    settings: Settings,
    /// Conversations, from the command data
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Held-out conversations, to see the loss on them at every checkpoint
    #[arg(long, value_name = "FILE")]
    held: Option<PathBuf>,
    /// The directory of the tokenizer that made them
    #[arg(long, value_name = "DIR")]
    tokenizer: PathBuf,
    #[command(flatten)]
    place: Place,
    /// Steps between two checkpoints
    #[arg(long, value_name = "N", default_value_t = 200)]
    save: u64,
    /// Stops after so many minutes, at a checkpoint; the same command goes on
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
}

/// Trains up to the end or until the time is over.
///
/// # Errors
/// Whatever is wrong with the files, the sizes and the device; as [`Training::train`].
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let (engine, device) = args.place.open()?;
    let (data, about) = Dataset::read(&args.data)?;
    let held = args.held.as_deref().map(Dataset::read).transpose()?;
    let mut training = Training::open(&args.settings, &args.tokenizer, (&data, about), &engine, &device)?;
    training.held = held.as_ref().map(|(data, _)| training.batches(data)).transpose()?;
    training.describe(out)?;

    let bar = progress(args.settings.steps, "steps");
    let (began, until) = (Instant::now(), args.minutes.map(|minutes| Duration::from_secs_f64(minutes.max(0.0) * 60.0)));
    // Steps are timed from this one on: those before it compile kernels.
    let (first, mut warm) = (training.run.steps() + READ, None);
    training.train(args.save, &mut |run, speed| {
        if run.steps() == first {
            warm = Some(Instant::now());
        }
        bar.set_position(run.steps());
        if let Some([answers, context]) = run.losses.last() {
            bar.set_message(format!("steps, loss {answers:.4} (context {context:.4}), {speed:.0} tokens/s"));
        }
        until.is_none_or(|until| began.elapsed() < until)
    })?;
    bar.finish_and_clear();
    let steps = training.run.steps();
    if let Some(warm) = warm.filter(|_| steps > first) {
        let each = warm.elapsed().as_secs_f64() / (steps - first) as f64;
        writeln!(out, "it took {:.1} minutes, {each:.3} s a step", began.elapsed().as_secs_f64() / 60.0)?;
    }
    training.report(out)
}

/// A run over its data.
pub struct Training<'a> {
    settings: &'a Settings,
    tokenizer: &'a Path,
    device: Device,
    pub run: Run<2>,
    batches: Batches<'a>,
    drills: Drills,
    held: Option<Batches<'a>>,
}

/// What a step is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// One of the drills at the start, by its number.
    First(u64),
    /// A later drill.
    Drill(u64),
    /// Conversations.
    Data(u64),
}

impl Step {
    /// Of step `at` of a run with `first` drills at the start and a part `share` of the others.
    fn of(at: u64, first: u64, share: f64) -> Step {
        let Some(at) = at.checked_sub(first) else { return Step::First(at) };
        // They are spread evenly: drill n is the step at which n + 1 of them are due.
        let due = |steps: u64| (steps as f64 * share).floor() as u64;
        let before = due(at);
        if due(at + 1) > before { Step::Drill(before) } else { Step::Data(at - before) }
    }
}

/// Reads a part of something, from 0 to `most`.
fn up_to(most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| match text.parse() {
        Ok(part) if (0.0..=most).contains(&part) => Ok(part),
        _ => Err(format!("expected a number from 0 to {most}")),
    }
}

impl<'a> Training<'a> {
    /// Opens the run in the directory of the settings, over a data file and what it says about itself.
    ///
    /// # Errors
    /// As [`Run::open`]; for sizes that no model can have, a tokenizer that is not there, and data that is not made by it.
    pub fn open(
        settings: &'a Settings,
        tokenizer: &'a Path,
        (data, about): (&'a Dataset, Value),
        engine: &Engine,
        device: &Device,
    ) -> Result<Self> {
        let config = settings.config(tokenizer)?;
        let largest = data.ids.iter().max().map_or(0, |id| usize::from(*id));
        if largest >= config.vocab_size {
            bail!(
                "--data has the token {largest}, and the tokenizer of {} has {} tokens",
                tokenizer.display(),
                config.vocab_size
            );
        }
        device.seed(settings.seed);
        let model = match &settings.start {
            Some(from) => start::model(from, &config, tokenizer, engine, device)?,
            None => config.init(engine, device)?,
        };
        let about = settings.to_json(&config, data, about)?;
        let run = Run::open(&settings.out, model, Recipe::Language, about)?;
        let device = device.clone();
        let batches = settings.batches(data)?;
        let words = tokenizer::words(&read_json(tokenizer)?);
        let drills = Drills::new(&tokenizer::read(tokenizer)?, words, settings.seed)?;
        Ok(Training { settings, tokenizer, device, run, batches, drills, held: None })
    }

    fn batches(&self, data: &'a Dataset) -> Result<Batches<'a>> {
        self.settings.batches(data)
    }

    /// What is trained, on what.
    fn describe(&mut self, out: &mut dyn Write) -> Result<()> {
        let parameters = self.run.model.config().check()?.parameters();
        let (each, left_out) = (self.batches.per_epoch(), self.batches.left_out());
        writeln!(out, "{parameters} parameters, {:.2} MB as bf16", 2e-6 * parameters as f64)?;
        let drills = (0..self.settings.steps).filter(|&at| !matches!(self.settings.step(at), Step::Data(_))).count();
        let epochs = (self.settings.steps - drills as u64) as f64 / each as f64;
        write!(out, "{each} steps in an epoch, {epochs:.1} epochs and {drills} drills")?;
        writeln!(out, "; {left_out} conversations do not fit into {} tokens", self.settings.sizes.context)?;
        if self.run.steps() > 0 {
            writeln!(out, "goes on after step {}", self.run.steps())?;
        }
        Ok(())
    }

    /// How far it came.
    fn report(&self, out: &mut dyn Write) -> Result<()> {
        writeln!(out, "{} of {} steps are done", self.run.steps(), self.settings.steps)?;
        if let Some([answers, context]) = self.run.losses.last() {
            writeln!(out, "loss of the last step: answers {answers:.4}, context {context:.4}")?;
        }
        if let Some((step, [answers, context])) = self.run.held.last() {
            writeln!(out, "held out, after step {step}: answers {answers:.4}, context {context:.4}")?;
        }
        Ok(writeln!(out, "the model is in {}", self.settings.out.join("model").display())?)
    }

    /// Trains up to the end, or until `each`, which hears of every step and of tokens per second, gives false; then saves.
    ///
    /// # Errors
    /// If a loss is not a number or a file cannot be written.
    pub fn train(&mut self, save: u64, each: &mut dyn FnMut(&Run<2>, f64) -> bool) -> Result<()> {
        let (mut since, mut tokens, mut speed) = (Instant::now(), 0, 0.0);
        let mut saved = self.run.steps();
        while self.run.steps() < self.settings.steps {
            let at = self.run.steps();
            let batch = self.batch(at);
            let kept = loss::means(&self.run.model, &batch, &self.device);
            let loss =
                kept.clone().narrow(0, 0, 1) + kept.clone().narrow(0, 1, 1) * self.settings.context_weight_at(at);
            self.run.step(loss, kept, self.settings.rate_at(at));
            tokens += batch.tokens();
            if (at + 1) % READ == 0 {
                self.run.read()?;
                speed = tokens as f64 / since.elapsed().as_secs_f64();
                (since, tokens) = (Instant::now(), 0);
            }
            if (at + 1) % save.max(1) == 0 {
                self.save()?;
                saved = at + 1;
                (since, tokens) = (Instant::now(), 0);
            }
            if !each(&self.run, speed) {
                break;
            }
        }
        if saved < self.run.steps() || self.run.steps() == 0 {
            self.save()?;
        }
        Ok(())
    }

    /// What step `at` is trained on.
    fn batch(&mut self, at: u64) -> Batch {
        let tokens = self.settings.tokens as usize;
        match self.settings.step(at) {
            Step::First(at) => self.drills.first(at, tokens),
            Step::Drill(at) => self.drills.later(at, tokens),
            Step::Data(at) => self.batches.batch(at),
        }
    }

    /// The run, its loss as a picture, and the model.
    fn save(&mut self) -> Result<()> {
        self.run.read()?;
        if let Some(losses) = self.held_out()? {
            self.run.held.push((self.run.steps(), losses));
        }
        self.run.save()?;
        let path = self.settings.out.join("loss.svg");
        let held: Vec<(u64, f32)> = self.run.held.iter().map(|(step, losses)| (*step, losses[0])).collect();
        let mut losses = self.run.curve();
        // A drill in between shows what the step before it showed.
        for at in (1..losses.len()).filter(|at| matches!(self.settings.step(*at as u64), Step::Drill(_))) {
            losses[at] = losses[at - 1];
        }
        let svg = curve::svg("the agent's model: loss of what it writes", "loss", &losses, &held);
        replace(&path, svg.as_bytes()).with_context(|| format!("{} cannot be written", path.display()))?;
        export(&self.run.model, self.tokenizer, &self.settings.out.join("model"))
    }

    /// The losses of held-out data, if there is any: means over all tokens of up to [`HELD`] batches, the same ones always.
    fn held_out(&mut self) -> Result<Option<[f32; 2]>> {
        let Some(held) = &mut self.held else { return Ok(None) };
        let (model, device) = (self.run.model.valid(), self.device.clone().without_autodiff());
        let (all, mut sums, mut counts) = (held.per_epoch(), None, [0; 2]);
        for at in 0..all.min(HELD) {
            let batch = held.batch(at as u64);
            let sum = loss::sums(&model, &batch, &device);
            sums = Some(match sums {
                None => sum,
                Some(before) => before + sum,
            });
            counts[0] += batch.count(Role::Answer);
            counts[1] += batch.count(Role::Context);
        }
        let Some(sums) = sums else { return Ok(None) };
        let sums: Vec<f32> = sums.try_into_vec_as()?;
        Ok(Some(std::array::from_fn(|i| sums[i] / counts[i].max(1) as f32)))
    }
}

impl Settings {
    /// # Errors
    /// For a tokenizer that is not there.
    fn config(&self, dir: &Path) -> Result<Qwen35Config> {
        let vocab = tokenizer::size(&read_json(dir)?);
        let sizes = &self.sizes;
        let config =
            Qwen35Config::new(vocab, sizes.hidden, sizes.intermediate, sizes.layers, sizes.heads, sizes.kv_heads);
        Ok(config
            .with_head_dim(sizes.head_dim)
            .with_linear_num_key_heads(sizes.linear_heads)
            .with_linear_num_value_heads(sizes.linear_heads)
            .with_linear_key_head_dim(sizes.linear_dim)
            .with_linear_value_head_dim(sizes.linear_dim)
            .with_max_position_embeddings(sizes.context)
            .with_eos_token_id(Some(marker(dir, "<|im_end|>")?))
            .with_initializer_range(None)
            .with_recalling(!self.plain_start)
            .with_embedding_range(self.embedding_range)
            .with_residual_scale(self.residual_scale))
    }

    fn to_json(&self, config: &Qwen35Config, data: &Dataset, about: Value) -> Result<Value> {
        Ok(json!({
            "task": "agent", "model": config.to_json()?, "data": about, "conversations": data.kinds.len(), "of_tokens": data.ids.len(),
            "steps": self.steps, "tokens": self.tokens, "plain_start": self.plain_start, "start": self.start, "drill": self.drill, "drill_share": self.drill_share, "rate": self.rate, "last_rate": self.last_rate,
            "embedding_range": self.embedding_range, "residual_scale": self.residual_scale, "context_weight": self.context_weight, "seed": self.seed,
        }))
    }

    /// What the tokens that are read count at step `at`: those of later drills are random, and there is nothing to learn of them.
    fn context_weight_at(&self, at: u64) -> f64 {
        if let Step::Drill(_) = self.step(at) { 0.0 } else { self.context_weight }
    }

    fn rate_at(&self, at: u64) -> f64 {
        rate(self.rate, self.last_rate, at, self.steps)
    }

    fn step(&self, at: u64) -> Step {
        Step::of(at, self.drill, self.drill_share)
    }

    fn batches<'a>(&self, data: &'a Dataset) -> Result<Batches<'a>> {
        Batches::new(data, self.seed, self.tokens as usize, self.sizes.context)
    }
}

/// The `tokenizer.json` of a directory.
fn read_json(dir: &Path) -> Result<Value> {
    let path = dir.join("tokenizer.json");
    let json = std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    serde_json::from_slice(&json).with_context(|| format!("{} is broken", path.display()))
}

/// The id of a marker in the tokenizer of a directory.
fn marker(dir: &Path, name: &str) -> Result<u32> {
    tokenizer::read(dir)?.id(name).with_context(|| format!("the tokenizer of {} has no {name}", dir.display()))
}

/// Writes the model with the files of its tokenizer as a directory in the released layout, weights as bf16.
///
/// # Errors
/// Where it cannot be written.
fn export(model: &Qwen35, tokenizer: &Path, dir: &Path) -> Result<()> {
    model.save_checkpoint(dir, Dtype::Bf16)?;
    let (end, text) = (marker(tokenizer, "<|im_end|>")?, marker(tokenizer, "<|endoftext|>")?);
    // Its answers are exact or wrong: nothing is gained by drawing them.
    let generation = json!({"eos_token_id": [end, text], "pad_token_id": text, "do_sample": false});
    let write = |name: &str, content: &[u8]| {
        let path = dir.join(name);
        replace(&path, content).with_context(|| format!("{} cannot be written", path.display()))
    };
    write("generation_config.json", format!("{generation:#}\n").as_bytes())?;
    // The last one says that the model is whole (`gpu.sh`).
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let path = tokenizer.join(name);
        write(name, &std::fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?)?;
    }
    Ok(())
}

#[cfg(test)]
pub mod tests;
