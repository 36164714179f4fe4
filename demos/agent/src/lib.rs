//! A terminal agent on a local Gated DeltaNet model: it streams its answer, calls tools and feeds back what they say.
//!
//! The program is [`main`]; the rest is public for those who make and judge models for it.

pub mod agent;
pub mod builtin;
pub mod engine;
pub mod event;
mod interrupt;
mod json;
pub mod kept;
pub mod options;
pub mod parse;
mod repeat;
mod repl;
pub mod tools;
mod ui;

use std::io::{self, Read};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;

use crate::agent::Agent;
use crate::engine::local::Local;
use crate::event::{Event, Reason, Sink, Start};
use crate::interrupt::Interrupt;
use crate::json::JsonLines;
use crate::kept::Kept;
use crate::options::Args;
use crate::tools::{TIME_LIMIT, Tool, Toolbox, clock::Time, files::Folder, notes::Notes};
use crate::ui::Terminal;

/// As shells report a program that SIGINT ended.
const INTERRUPTED: u8 = 130;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let level = if args.verbose { "info" } else { "error" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
    let mut sink: Box<dyn Sink> = if args.json { Box::new(JsonLines(io::stdout())) } else { Box::new(Terminal::new()) };
    let result = run(&args, &mut *sink);
    report(result, args.json.then_some(&mut *sink))
}

/// Turns an error into a message and an exit code. Where the reader of the output has gone, nothing is left to say.
fn report(result: Result<ExitCode>, sink: Option<&mut dyn Sink>) -> ExitCode {
    let why = match result {
        Ok(code) => return code,
        Err(why) => why,
    };
    let gone = |why: &io::Error| why.kind() == io::ErrorKind::BrokenPipe;
    if !why.downcast_ref::<io::Error>().is_some_and(gone) {
        eprintln!("error: {why:#}");
        if let Some(sink) = sink {
            // The exit code says it too.
            let _ = sink.event(Event::Error(&format!("{why:#}")));
        }
    }
    ExitCode::FAILURE
}

fn run(args: &Args, sink: &mut dyn Sink) -> Result<ExitCode> {
    let interrupt = Interrupt::install().context("Ctrl-C cannot be handled")?;
    let prompt = match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("the prompt cannot be read from the standard input")?;
            Some(text)
        }
        prompt => prompt.map(str::to_string),
    };
    if prompt.as_deref().is_some_and(|prompt| prompt.trim().is_empty()) {
        anyhow::bail!("the prompt is empty");
    }
    let (tools, folder) = tools(args)?;
    let mut local = Local::load(args)?;
    let kept = keep(args, prompt.is_none(), &mut local)?;
    let toolbox = Toolbox::new(tools, TIME_LIMIT);
    let start = Start {
        tools: toolbox.specs().into_iter().map(|spec| spec.name).collect(),
        folder: folder.map(|folder| folder.path().display().to_string()),
        ..local.start()
    };
    let options = agent::Options {
        system: args.system.clone().filter(|text| !text.trim().is_empty()),
        thinking: args.thinking(),
        think_budget: args.think_budget,
        max_tokens: args.max_tokens.unwrap_or(options::TOKENS),
    };
    let account = local.account().to_string();
    let notices = local.notices();
    let mut agent = Agent::new(local, toolbox, options);
    sink.event(Event::Start(&start))?;
    for text in &notices {
        sink.event(Event::Notice(text))?;
    }
    if let Some(kept) = kept {
        let turns = agent.keep(kept)?;
        if let Some(restored) = agent.prepare()? {
            sink.event(Event::Restored(turns, &restored))?;
        }
    }
    let Some(prompt) = prompt else {
        return repl::run(&mut agent, sink, &interrupt, args.json, &account);
    };
    let summary = interrupt.during(|stop| agent.answer(&prompt, stop, sink))?;
    sink.event(Event::Done(&summary))?;
    agent.save()?;
    Ok(if summary.reason == Reason::Interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// Where the conversation is kept, with the model's state beside it. A place that the user named has to work.
fn keep(args: &Args, conversation: bool, local: &mut Local) -> Result<Option<Kept>> {
    let own = || Kept::default_folder().filter(|_| conversation && ui::interactive() && !args.no_session && !args.json);
    let Some(folder) = args.session.clone().or_else(own) else { return Ok(None) };
    match local.keep_in(&folder.join("state")) {
        Ok(()) => Ok(Some(Kept::new(&folder))),
        Err(why) if args.session.is_some() => {
            Err(why).with_context(|| format!("--session {} cannot be used", folder.display()))
        }
        Err(why) => {
            eprintln!("This conversation is not kept: {why:#}");
            // What the other one has read of the same beginning needs no reading here.
            if let Err(why) = local.find_in(&folder.join("state")) {
                log::info!("{why:#}");
            }
            Ok(None)
        }
    }
}

/// Tools, and the folder that they see.
pub type Tools = (Vec<Arc<dyn Tool>>, Option<Arc<Folder>>);

/// The tools that the command line asks for.
///
/// # Errors
/// If the folder cannot be opened.
pub fn tools(args: &Args) -> Result<Tools> {
    if args.no_tools {
        return Ok((Vec::new(), None));
    }
    let folder =
        Folder::open(&args.folder).with_context(|| format!("--folder {} cannot be opened", args.folder.display()))?;
    let notes = args.notes.clone().or_else(Notes::default_path).map(|path| Notes::new(path, Time::System));
    if notes.is_none() {
        log::warn!("no notes: this system names no place for them; give one with --notes FILE");
    }
    Ok((tools::all(folder.clone(), notes, Time::System), Some(folder)))
}
