//! The conversation at the terminal, or over lines of the standard input.

use std::io::{self, BufRead};
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use rustyline::{DefaultEditor, error::ReadlineError};

use crate::agent::{Agent, Options};
use crate::engine::Engine;
use crate::event::{Event, Sink, Summary};
use crate::interrupt::Interrupt;
use crate::ui::{interactive, visible};

const HELP: &str = "Commands:
  /help             this list
  /tools            what the model can call
  /device           the devices that were found, and why this one runs
  /clear            forgets the conversation
  /history          the questions so far
  /undo             takes the last question back
  /goto N           goes to the end of turn N, back or forth; 0 is the begin
  /aside QUESTION   asks beside the conversation, which does not hear of it
  /memory           what is held where, and what that saved
  /think on|off     lets the model reason before it answers, or not
  /think auto       leaves that to the model
  /think N          ends the reasoning about a question after N tokens
  /raw              the last answer as the model wrote it, calls and all
  /exit             ends the program; so does Ctrl-D, or Ctrl-C twice
Ctrl-C during an answer stops the answer. Anything else is a question.";

/// Converses until the user has enough.
///
/// # Errors
/// If the terminal fails. A failed answer is reported and the conversation goes on; over lines it shows in the exit code.
pub fn run<E: Engine>(
    agent: &mut Agent<E>,
    sink: &mut dyn Sink,
    interrupt: &Interrupt,
    json: bool,
    account: &str,
) -> Result<ExitCode> {
    if json || !interactive() {
        let mut answered = true;
        for line in io::stdin().lock().lines() {
            let line = line?;
            if !line.trim().is_empty() {
                answered &= ask(agent, &line, sink, interrupt)?;
            }
        }
        return Ok(if answered { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    eprintln!("Type a question, or /help.");
    let mut editor = DefaultEditor::new()?;
    let mut leaving = false;
    loop {
        let line = match editor.readline("\n> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) if leaving => break,
            Err(ReadlineError::Interrupted) => {
                leaving = true;
                eprintln!("Ctrl-C again or /exit ends the program.");
                continue;
            }
            Err(ReadlineError::Eof) => break,
            Err(why) => return Err(why.into()),
        };
        leaving = false;
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        editor.add_history_entry(line)?;
        let aside = |line: &str| line.strip_prefix("/aside ").map(|question| question.trim().to_string());
        match (aside(line), line.strip_prefix('/')) {
            (Some(question), _) => {
                show(interrupt.during(|stop| agent.aside(&question, stop, sink)), sink)?;
            }
            (None, Some(command)) => {
                if !obey(agent, command, account) {
                    break;
                }
                save(agent);
            }
            (None, None) => {
                ask(agent, line, sink, interrupt)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks and shows the answer; false if it failed.
fn ask<E: Engine>(agent: &mut Agent<E>, line: &str, sink: &mut dyn Sink, interrupt: &Interrupt) -> Result<bool> {
    let answered = show(interrupt.during(|stop| agent.answer(line, stop, sink)), sink)?;
    save(agent);
    Ok(answered)
}

/// Keeps the conversation. What stands against it is no reason to end it.
fn save<E: Engine>(agent: &mut Agent<E>) {
    if let Err(why) = agent.save() {
        eprintln!("The conversation could not be kept: {why:#}");
    }
}

/// Shows how an answer went; false if it failed.
fn show(answer: Result<Summary>, sink: &mut dyn Sink) -> Result<bool> {
    let answered = answer.is_ok();
    match answer {
        Ok(summary) => sink.event(Event::Done(&summary))?,
        // Nobody reads any more.
        Err(why) if why.is::<io::Error>() => return Err(why),
        Err(why) => sink.event(Event::Error(&format!("{why:#}")))?,
    }
    Ok(answered)
}

/// Does what a command says; false if that is to end.
fn obey<E: Engine>(agent: &mut Agent<E>, command: &str, account: &str) -> bool {
    let words: Vec<&str> = command.split_whitespace().collect();
    match words.as_slice() {
        ["exit" | "quit" | "q"] => return false,
        ["help" | "?"] => println!("{HELP}"),
        ["tools"] if agent.specs().is_empty() => println!("The model has no tools."),
        ["tools"] => {
            for spec in agent.specs() {
                println!("  {:<12} {}", spec.name, spec.description);
            }
        }
        ["device"] => println!("{account}"),
        ["clear"] => {
            agent.clear();
            println!("The conversation is forgotten.");
        }
        ["history"] => {
            let (questions, at) = agent.turns();
            for (i, question) in questions.iter().enumerate() {
                let mark = if i + 1 == at {
                    "now"
                } else if i >= at {
                    "later"
                } else {
                    ""
                };
                let line = visible(question.lines().next().unwrap_or_default());
                println!("{:>4} {mark:<5} {line}", i + 1);
            }
            if questions.is_empty() {
                println!("Nothing has been asked yet.");
            }
        }
        ["undo"] => match agent.undo() {
            Some(question) => println!("Taken back: {}", visible(&question)),
            None => println!("There is nothing to take back."),
        },
        ["goto", n] => match n.parse().map_err(|_| anyhow!("/goto takes the number of a turn, not {n:?}")) {
            Ok(n) => match agent.goto(n) {
                Ok(()) => println!("The conversation stands after turn {n}."),
                Err(why) => println!("{why}."),
            },
            Err(why) => println!("{why}."),
        },
        ["memory"] => println!("{}", agent.memory()),
        ["think"] => println!("Reasoning is {}.", thinking(&agent.options)),
        ["think", word @ ("on" | "off" | "auto")] => {
            agent.options.thinking = match *word {
                "on" => Some(true),
                "off" => Some(false),
                _ => None,
            };
            println!("Reasoning is {}.", thinking(&agent.options));
        }
        ["think", n] => match n.parse() {
            Ok(n) if n > 0 => {
                agent.options.think_budget = Some(n);
                println!("Reasoning is {}.", thinking(&agent.options));
            }
            _ => println!("/think takes on, off, auto or a number of tokens from 1 on, not {n:?}."),
        },
        ["raw"] if agent.raw().is_empty() => println!("The model has not written anything yet."),
        ["raw"] => println!("{}", visible(agent.raw())),
        _ => println!("There is no command /{command}; /help lists those there are."),
    }
    true
}

fn thinking(options: &Options) -> String {
    let said = match options.thinking {
        Some(true) => "on",
        Some(false) => return "off".into(),
        None => "left to the model",
    };
    match options.think_budget {
        Some(n) => format!("{said}, and ended after {n} tokens"),
        None => said.into(),
    }
}
