//! Data, tokenizer and scores for the small model that the agent demo carries.
//!
//! Exit codes: 0 fine; 1 an error, with its message on the standard error; 2 a wrong command line.

mod associative;
#[cfg(feature = "burn")]
mod curve;
mod data;
mod dataset;
mod draw;
mod eval;
#[cfg(feature = "burn")]
mod flat;
#[cfg(feature = "burn")]
mod learn;
mod logits;
#[cfg(feature = "burn")]
mod place;
#[path = "../../quiet.rs"]
mod quiet;
#[cfg(feature = "burn")]
mod recall;
mod tokenizer;
#[cfg(feature = "burn")]
mod training;
mod turn;

use std::io::{self, Write};
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use gatedelta::qwen::Tokenizer;
use gatedelta_agent::engine::local::Local;
use gatedelta_agent::tools::notes::replace;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::data::scene::{Maker, Measure, Number, any, estimate, template};
use crate::data::{Kind, Side};
use crate::dataset::Dataset;
use crate::draw::Draw;

/// Data, tokenizer and scores for the small model of the agent demo.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print conversations as the model sees them
    Sample {
        #[command(flatten)]
        number: Seed,
        /// The kind of the last request [default: whole conversations of the training data]
        #[arg(long)]
        kind: Option<Kind>,
        /// How many
        #[arg(long, default_value_t = 1)]
        count: u64,
        /// Leaves out the system turn with the tools, the same in every conversation
        #[arg(long)]
        brief: bool,
    },
    /// Train a tokenizer on conversations, and write it with the chat template
    Tokenizer {
        /// Names the conversations
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Tokens, markers included
        #[arg(long, default_value_t = 4096)]
        vocab: usize,
        /// Conversations that it is trained on
        #[arg(long, default_value_t = 4000)]
        conversations: u64,
        /// A directory, made if need be
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write conversations as token ids into one safetensors file
    Data {
        #[command(flatten)]
        number: Seed,
        /// How many
        #[arg(long)]
        conversations: u64,
        /// A directory with tokenizer.json
        #[arg(long, value_name = "DIR")]
        tokenizer: PathBuf,
        /// The file to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Ends every conversation with its first request of interest: none goes on to others
        #[arg(long)]
        short: bool,
        /// Threads [default: as many as there are cores]; the file is the same for any number of them
        #[arg(long)]
        threads: Option<NonZero<usize>>,
    },
    /// Score a model on held-out requests, through the agent's own loop and tools
    Eval {
        /// A checkpoint, as the agent takes it
        #[arg(long, value_name = "DIR")]
        model: PathBuf,
        /// Names the requests
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Requests of each kind
        #[arg(long, default_value_t = 100)]
        per_kind: u64,
        /// Only this kind; may be given several times
        #[arg(long)]
        kind: Vec<Kind>,
        /// Tokens between a fact and the question for it, at the least
        #[arg(long, default_value_t = 4000)]
        distance: usize,
        /// As the agent's option
        #[arg(long, value_name = "NAME")]
        device: Option<String>,
        /// Prints so many of the requests that went wrong
        #[arg(long, value_name = "N", default_value_t = 0)]
        failures: usize,
        /// Requests at once, each with the model in memory
        #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
        threads: u8,
        /// Writes the counts, and all that went wrong, to this file too
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Write the logits of a text, every token's, to compare with other programs
    Logits(logits::Args),
    /// Print sequences of multi-query associative recall: tokens, and after ">" the answer where one is asked for
    Pairs {
        #[command(flatten)]
        number: Seed,
        /// How many sequences
        #[arg(long, default_value_t = 1)]
        count: u64,
        #[command(flatten)]
        shape: associative::Shape,
    },
    /// Train two layers on multi-query associative recall, and score them on held-out sequences
    #[cfg(feature = "burn")]
    Recall(recall::Args),
    /// Train the agent's model on conversations
    #[cfg(feature = "burn")]
    Agent(training::Args),
}

#[derive(Debug, clap::Args)]
struct Seed {
    /// Names what is generated: the same seed gives the same
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Wordings, names and numbers that training data does not have
    #[arg(long)]
    held_out: bool,
}

impl Seed {
    fn side(&self) -> Side {
        if self.held_out { Side::HeldOut } else { Side::Train }
    }

    fn number(&self, index: u64) -> Number {
        Number { seed: self.seed, side: self.side(), index }
    }
}

fn main() -> ExitCode {
    quiet::hush();
    let cli = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error")).init();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody reads any more.
        Err(why) if why.downcast_ref::<io::Error>().is_some_and(|why| why.kind() == io::ErrorKind::BrokenPipe) => {
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    let mut out = io::stdout().lock();
    match command {
        Command::Sample { number, kind, count, brief } => {
            let maker = maker(&estimate, None)?;
            for index in 0..count {
                let text = match kind {
                    Some(kind) => maker.text(kind, number.number(index))?,
                    None => maker.conversation(number.number(index))?.1,
                };
                let turns = text.split_once("<|im_end|>\n").map_or("", |(_, turns)| turns);
                writeln!(out, "{}", if brief { turns } else { &text })?;
            }
        }
        Command::Tokenizer { seed, vocab, conversations, out: dir } => {
            let number = Seed { seed, held_out: false };
            let mut texts = Vec::new();
            let make = |index| Ok(maker(&estimate, None)?.conversation(number.number(index))?.1);
            in_order(conversations, None, &make, &mut |text| {
                texts.push(text);
                Ok(())
            })?;
            let json = tokenizer::train(&texts, vocab)?;
            tokenizer::write(&json, &dir)?;
            let read = tokenizer::read(&dir)?;
            let bytes: usize = texts.iter().map(String::len).sum();
            let tokens = texts.iter().map(|text| Ok(read.encode(text)?.len())).sum::<Result<usize>>()?;
            let ratio = bytes as f64 / tokens.max(1) as f64;
            writeln!(
                out,
                "{} tokens; {bytes} bytes of text in {tokens} of them, {ratio:.2} bytes each",
                tokenizer::size(&json)
            )?;
        }
        Command::Data { number, conversations, tokenizer: dir, out: path, short, threads } => {
            let tokenizer = tokenizer::read(&dir)?;
            let measure = |text: &str| tokens(&tokenizer, text);
            let maker = maker(&measure, None)?;
            let make = |index| {
                let kind = drawn(&number, index);
                let (kind, text) = match short {
                    true => (kind, maker.text(kind, number.number(index))?),
                    false => maker.conversation(number.number(index))?,
                };
                let mut one = Dataset::new();
                one.push(&tokenizer, kind, &text)?;
                Ok(one)
            };
            let mut data = Dataset::new();
            in_order(conversations, threads, &make, &mut |one| {
                data.append(&one);
                Ok(())
            })?;
            let kinds: Vec<String> = Kind::all().iter().map(|kind| kind.name()).collect();
            data.write(&path, &json!({"seed": number.seed, "held_out": number.held_out, "kinds": kinds}))?;
            let written: usize = data.mask.iter().map(|&bit| usize::from(bit)).sum();
            let longest = data.offsets.windows(2).map(|two| two[1] - two[0]).max().unwrap_or(0);
            let all = data.ids.len();
            writeln!(
                out,
                "{conversations} conversations, {all} tokens, {written} of them the model's; the longest has {longest}"
            )?;
        }
        Command::Eval { model, seed, per_kind, kind, distance, device, failures, threads, json } => {
            let tokenizer = tokenizer::read(&model)?;
            let measure = |text: &str| tokens(&tokenizer, text);
            let maker = maker(&measure, Some(distance))?;
            let kinds = if kind.is_empty() { Kind::all() } else { &kind };
            let mut args: Vec<std::ffi::OsString> = vec!["gatedelta-train".into(), "--greedy".into()];
            args.extend(["--model".into(), model.into_os_string()]);
            device.into_iter().for_each(|device| args.extend(["--device".into(), device.into()]));
            let args = gatedelta_agent::options::Args::try_parse_from(args)?;
            let mut engines = (0..threads).map(|_| Local::load(&args)).collect::<Result<Vec<_>>>()?;
            let bar = progress(kinds.len() as u64 * per_kind, "requests");
            let report = eval::run(&mut engines, &maker, seed, kinds, per_kind, &|| bar.inc(1))?;
            bar.finish_and_clear();
            for failure in report.failures.iter().take(failures) {
                writeln!(out, "{failure}\n")?;
            }
            write!(out, "{report}")?;
            if let Some(path) = json {
                let text = format!("{:#}\n", report.to_json());
                replace(&path, text.as_bytes()).with_context(|| format!("{} cannot be written", path.display()))?;
            }
        }
        Command::Logits(args) => logits::run(&args, &mut out)?,
        Command::Pairs { number, count, shape } => {
            for index in 0..count {
                let sequence = shape.sequence(number.seed, number.side(), index)?;
                let both = sequence.tokens.iter().zip(&sequence.targets);
                let words = both.map(|(token, target)| match target {
                    Some(target) => format!("{token}>{target}"),
                    None => token.to_string(),
                });
                writeln!(out, "{}", words.collect::<Vec<_>>().join(" "))?;
            }
        }
        #[cfg(feature = "burn")]
        Command::Recall(args) => recall::run(&args, &mut out)?,
        #[cfg(feature = "burn")]
        Command::Agent(args) => training::run(&args, &mut out)?,
    }
    Ok(out.flush()?)
}

fn maker(measure: Measure<'_>, distance: Option<usize>) -> Result<Maker<'_>> {
    Ok(Maker { template: template()?, measure, distance })
}

/// The kind of a conversation whose kind was left open.
fn drawn(number: &Seed, index: u64) -> Kind {
    any(&mut Draw::new(&[number.seed, number.side() as u64, index]))
}

/// What the tokenizer makes of a text; nothing where it refuses, which no generated text meets.
fn tokens(tokenizer: &Tokenizer, text: &str) -> usize {
    tokenizer.encode(text).map_or(0, |ids| ids.len())
}

/// Makes so many conversations on `threads` threads and hands them over in order.
fn in_order<T: Send>(
    count: u64,
    threads: Option<NonZero<usize>>,
    make: &(dyn Fn(u64) -> Result<T> + Sync),
    each: &mut dyn FnMut(T) -> Result<()>,
) -> Result<()> {
    let threads = threads.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZero::get) as u64;
    let bar = progress(count, "conversations");
    let batch = 64 * threads;
    for first in (0..count).step_by(batch as usize) {
        let end = (first + batch).min(count);
        let made: Vec<Result<Vec<T>>> = thread::scope(|scope| {
            // Thread t makes the t-th part of the batch.
            let part = |t: u64| first + (end - first) * t / threads..first + (end - first) * (t + 1) / threads;
            let one = |index| make(index).with_context(|| format!("conversation {index}"));
            let started: Vec<_> =
                (0..threads).map(|t| scope.spawn(move || part(t).map(one).collect::<Result<Vec<T>>>())).collect();
            let joined = started.into_iter().map(|thread| thread.join());
            joined.map(|made| made.unwrap_or_else(|_| bail!("a thread that makes conversations failed"))).collect()
        });
        for part in made {
            part?.into_iter().try_for_each(&mut *each)?;
        }
        bar.set_position(end);
    }
    bar.finish_and_clear();
    Ok(())
}

/// A bar on the standard error, where that is a terminal.
fn progress(total: u64, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ ");
    ProgressBar::new(total).with_style(style).with_message(what.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        for line in [
            "sample --seed 1 --kind read-compute --count 3 --held-out",
            "pairs",
            "pairs --pairs 4 --rewrites 6",
            "eval --model x --kind recall --kind clock",
        ] {
            assert!(Cli::try_parse_from(std::iter::once("train").chain(line.split(' '))).is_ok(), "{line}");
        }
        for line in ["sample --kind nothing", "data --conversations 3", "eval"] {
            assert!(Cli::try_parse_from(std::iter::once("train").chain(line.split(' '))).is_err(), "{line}");
        }
    }
}
