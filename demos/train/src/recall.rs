//! Training on multi-query associative recall: two layers of Gated DeltaNet, or of gated linear attention to compare with.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use gatedelta::burn::{Engine, Qwen35, Qwen35Config, Rule};
use gatedelta::shape::Dtype;
use gatedelta_agent::tools::notes::replace;
use serde_json::{Value, json};

use crate::associative::{Sequence, Shape};
use crate::curve;
use crate::data::Side;
use crate::learn::{Recipe, Run, rate};
use crate::place::Place;
use crate::progress;

/// What happens to the state at a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The gated delta rule
    Delta,
    /// Gated linear attention: the same without the delta
    Linear,
}

/// What a run is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub shape: Shape,
    /// What happens to the state at a token
    #[arg(long, value_enum, default_value_t = Kind::Delta)]
    pub rule: Kind,
    /// Names weights and sequences: the same seed gives the same run
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps of the whole run
    #[arg(long, default_value_t = 5000)]
    pub steps: u64,
    /// Sequences in a step
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub batch: u32,
    /// The highest learning rate
    #[arg(long, default_value_t = 5e-3)]
    pub rate: f64,
    /// Numbers in a token's row
    #[arg(long, default_value_t = 64)]
    pub hidden: usize,
    /// Heads of a layer
    #[arg(long, default_value_t = 2)]
    pub heads: usize,
    /// Size of a head's keys and values: its state is the square of it; a multiple of 16
    #[arg(long, default_value_t = 32)]
    pub dim: usize,
    /// Start the layers as associative memories, whatever the rule
    #[arg(long)]
    pub recalling: bool,
    /// A directory, made if need be; a run that is in it goes on
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// The command `recall`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    place: Place,
    /// Steps between two checkpoints
    #[arg(long, value_name = "N", default_value_t = 200)]
    save: u64,
    /// Held-out sequences at the end
    #[arg(long, value_name = "N", default_value_t = 1000)]
    score: usize,
}

/// Trains up to the end, scores and exports.
///
/// # Errors
/// As [`Settings::open`], [`Settings::train`], [`Settings::score`] and [`Settings::export`].
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let settings = &args.settings;
    let (engine, device) = args.place.open()?;
    let mut run = settings.open(&engine, &device)?;
    let bar = progress(settings.steps, "steps");
    bar.set_position(run.steps());
    settings.train(&mut run, &device, settings.steps, args.save, &mut |run| {
        bar.set_position(run.steps());
        bar.set_message(format!("steps, loss {:.4}", run.losses.last().map_or(f32::NAN, |loss| loss[0])));
    })?;
    bar.finish_and_clear();
    let score = settings.score(&run.model, &device, args.score)?;
    writeln!(out, "{:.2} % of the answers in {} held-out sequences are right", 100.0 * score, args.score)?;
    if let Some(dir) = settings.export(&run.model)? {
        writeln!(out, "the model is in {}", dir.display())?;
    }
    Ok(())
}

impl Settings {
    fn config(&self) -> Qwen35Config {
        let config = Qwen35Config::new(self.shape.keys + self.shape.values, self.hidden, 2 * self.hidden, 2, 1, 1);
        let rule = match self.rule {
            Kind::Delta => Rule::Delta,
            Kind::Linear => Rule::Linear,
        };
        // Two layers and no third: no full attention.
        config
            .with_full_attention_interval(3)
            .with_head_dim(64)
            .with_linear_num_key_heads(self.heads)
            .with_linear_num_value_heads(self.heads)
            .with_linear_key_head_dim(self.dim)
            .with_linear_value_head_dim(self.dim)
            .with_initializer_range(None)
            .with_recalling(self.recalling)
            .with_rule(rule)
    }

    fn to_json(&self) -> Value {
        let Shape { keys, values, pairs, rewrites } = self.shape;
        json!({
            "task": "recall", "keys": keys, "values": values, "pairs": pairs, "rewrites": rewrites,
            "recalling": self.recalling, "rule": format!("{:?}", self.rule), "seed": self.seed,
            "steps": self.steps, "batch": self.batch, "rate": self.rate, "hidden": self.hidden,
            "heads": self.heads, "dim": self.dim,
        })
    }

    /// Opens the run in the directory of these settings.
    ///
    /// # Errors
    /// As [`Run::open`], and for sizes that no model can have.
    pub fn open(&self, engine: &Engine, device: &Device) -> Result<Run<1>> {
        self.shape.check()?;
        device.seed(self.seed);
        Run::open(&self.out, self.config().init(engine, device)?, Recipe::Plain, self.to_json())
    }

    fn sequences(&self, side: Side, from: u64, count: usize) -> Result<Vec<Sequence>> {
        (from..from + count as u64).map(|index| self.shape.sequence(self.seed, side, index)).collect()
    }

    /// Trains up to `end` steps; `each` hears of every step, and whether it was just saved.
    ///
    /// # Errors
    /// If a loss is not a number or a file cannot be written.
    pub fn train(
        &self,
        run: &mut Run<1>,
        device: &Device,
        end: u64,
        save: u64,
        each: &mut dyn FnMut(&Run<1>),
    ) -> Result<()> {
        while run.steps() < end.min(self.steps) {
            let at = run.steps();
            // The sequences of a step depend on its number alone: a run goes on with those it would have had.
            let sequences = self.sequences(Side::Train, at * u64::from(self.batch), self.batch as usize)?;
            let answers = answers(&run.model, &sequences, self.shape.pairs, device);
            let right = targets(&sequences, self.shape.pairs, device);
            let loss = log_softmax(answers, 2).gather(2, right).mean().neg();
            run.step(loss.clone(), loss, rate(self.rate, 0.1, at, self.steps));
            run.read()?;
            if run.steps() % save.max(1) == 0 || run.steps() == self.steps {
                run.save()?;
                self.draw(run)?;
            }
            each(run);
        }
        Ok(())
    }

    /// The loss so far as a picture.
    fn draw(&self, run: &Run<1>) -> Result<()> {
        let title = format!("associative recall, {} pairs, rule {:?}", self.shape.pairs, self.rule);
        let path = self.out.join("loss.svg");
        let svg = curve::svg(&title, "loss", &run.curve(), &[]);
        replace(&path, svg.as_bytes()).with_context(|| format!("{} cannot be written", path.display()))
    }

    /// The part of the answers in `count` held-out sequences that is right.
    ///
    /// # Errors
    /// If a sequence cannot be made or the answers cannot be read.
    pub fn score(&self, model: &Qwen35, device: &Device, count: usize) -> Result<f64> {
        let mut right = 0;
        let batch = self.batch.max(1) as usize;
        for from in (0..count).step_by(batch) {
            let sequences = self.sequences(Side::HeldOut, from as u64, batch.min(count - from))?;
            let found = answers(model, &sequences, self.shape.pairs, device).argmax(2).try_into_vec_as::<i64>()?;
            let wanted = sequences.iter().flat_map(|sequence| sequence.targets.iter().flatten());
            right += found.iter().zip(wanted).filter(|(found, wanted)| **found == i64::from(**wanted)).count();
        }
        Ok(right as f64 / (count * self.shape.pairs).max(1) as f64)
    }

    /// Writes the model in the released layout, where it has one.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn export(&self, model: &Qwen35) -> Result<Option<PathBuf>> {
        let dir = self.out.join("model");
        if self.rule == Kind::Linear {
            return Ok(None);
        }
        model.save_checkpoint(&dir, Dtype::F32)?;
        Ok(Some(dir))
    }
}

/// Logits `[B, pairs, vocab]` at the tokens that ask.
fn answers(model: &Qwen35, sequences: &[Sequence], pairs: usize, device: &Device) -> Tensor<3> {
    let (b, t) = (sequences.len(), sequences.first().map_or(0, |sequence| sequence.tokens.len()));
    let ids: Vec<i64> = sequences.iter().flat_map(|sequence| sequence.tokens.iter().map(|&id| i64::from(id))).collect();
    let hidden = model.hidden(Tensor::<2, Int>::from_data(TensorData::new(ids, [b, t]), device));
    // The end of a sequence asks, once for every pair.
    model.logits(hidden.narrow(1, t - pairs, pairs))
}

/// The right answers, `[B, pairs, 1]`.
fn targets(sequences: &[Sequence], pairs: usize, device: &Device) -> Tensor<3, Int> {
    let ids: Vec<i64> =
        sequences.iter().flat_map(|sequence| sequence.targets.iter().flatten().map(|&id| i64::from(id))).collect();
    Tensor::from_data(TensorData::new(ids, [sequences.len(), pairs, 1]), device)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::learn::alone;

    fn settings(out: &Path, rule: Kind) -> Settings {
        let shape = Shape { keys: 8, values: 64, pairs: 2, rewrites: 1 };
        let out = out.to_path_buf();
        Settings {
            shape,
            rule,
            seed: 1,
            steps: 12,
            batch: 4,
            rate: 1e-2,
            hidden: 32,
            heads: 2,
            dim: 32,
            recalling: false,
            out,
        }
    }

    fn parts() -> (Engine, Device) {
        (Engine::open(Some("cpu")).unwrap(), Device::flex().autodiff())
    }

    #[test]
    fn a_run_that_was_stopped_goes_on_bit_for_bit() {
        let _alone = alone();
        let (engine, device) = parts();
        let (whole, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let in_one = settings(whole.path(), Kind::Delta);
        let mut run = in_one.open(&engine, &device).unwrap();
        in_one.train(&mut run, &device, 12, 100, &mut |_| {}).unwrap();

        let in_two = settings(stopped.path(), Kind::Delta);
        // Saved at 5, killed at 7.
        in_two.train(&mut in_two.open(&engine, &device).unwrap(), &device, 7, 5, &mut |_| {}).unwrap();
        let mut again = in_two.open(&engine, &device).unwrap();
        assert_eq!(again.steps(), 5);
        in_two.train(&mut again, &device, 12, 100, &mut |_| {}).unwrap();
        assert_eq!(run.losses, again.losses);
        let bytes = |run: &Run<1>| {
            run.model
                .clone()
                .save_checkpoint(whole.path().join("x"), Dtype::F32)
                .map(|()| std::fs::read(whole.path().join("x/model.safetensors")).unwrap())
                .unwrap()
        };
        assert!(bytes(&run) == bytes(&again), "the weights are the same");
        assert!(std::fs::read_to_string(stopped.path().join("loss.svg")).unwrap().contains("<polyline"));
        assert!(in_two.export(&again.model).unwrap().is_some_and(|dir| dir.join("config.json").exists()));

        let score = in_two.score(&again.model, &device, 10).unwrap();
        assert!((0.0..=1.0).contains(&score));
        let shape = Shape { rewrites: 2, ..in_two.shape };
        for other in [
            Settings { rate: 2e-2, ..in_two.clone() },
            Settings { recalling: true, ..in_two.clone() },
            Settings { shape, ..in_two.clone() },
        ] {
            let why = format!("{:#}", other.open(&engine, &device).err().unwrap());
            assert!(why.contains("was started with"), "{why}");
        }
        std::fs::write(stopped.path().join("run.safetensors"), [0; 20]).unwrap();
        assert!(in_two.open(&engine, &device).is_err());
    }

    #[test]
    fn the_loss_falls() {
        let _alone = alone();
        let (engine, device) = parts();
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { steps: 150, batch: 32, ..settings(dir.path(), Kind::Delta) };
        let mut run = settings.open(&engine, &device).unwrap();
        settings.train(&mut run, &device, 150, 1000, &mut |_| {}).unwrap();
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        let losses = run.curve();
        let (first, last) = (mean(&losses[..10]), mean(&losses[130..]));
        // Of 72 tokens only the 64 values are ever right: that much is learnt at once.
        assert!(last < first - 0.05, "{first} {last}");
    }

    #[test]
    fn the_rule_without_delta_trains_too_and_has_no_layout() {
        let _alone = alone();
        let (engine, device) = parts();
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), Kind::Linear);
        let mut run = settings.open(&engine, &device).unwrap();
        settings.train(&mut run, &device, 2, 1, &mut |_| {}).unwrap();
        assert_eq!((run.steps(), settings.export(&run.model).unwrap()), (2, None));
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let rates: Vec<f64> = (0..100).map(|at| rate(1.0, 0.1, at, 100)).collect();
        assert!((rates[0] - 0.2).abs() < 1e-9 && (rates[5] - 1.0).abs() < 1e-9 && rates[99] < 0.11, "{rates:?}");
        assert!(rates[5..].windows(2).all(|two| two[1] <= two[0]));
        assert!(rate(1.0, 0.1, 0, 1).is_finite());
    }
}
