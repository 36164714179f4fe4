//! What happens while the agent works, for whoever shows it.

use std::io;
use std::time::Duration;

use gatedelta::qwen::Restored;
use serde_json::Value;

use crate::parse::{Broken, Call};
use crate::tools::Outcome;

/// One thing that happened.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The model is loaded.
    Start(&'a Start),
    /// A conversation of so many turns goes on; how much of it needs no reading.
    Restored(usize, &'a Restored),
    /// Of a prompt of `total` tokens `done` are read, `reused` of them without reading: they were still in memory.
    Prefill { done: usize, total: usize, reused: usize },
    /// The next piece of reasoning.
    Reasoning(&'a str),
    /// The reasoning was ended after so many tokens: its budget is used up. The answer follows.
    ReasoningCut(usize),
    /// The next piece of the answer.
    Token(&'a str),
    /// A call of this tool is being written.
    Opening(&'a str),
    /// A tool is about to run.
    ToolCall(&'a Call),
    /// A tool has run, or was refused.
    ToolResult(&'a str, &'a Outcome),
    /// A call that cannot be made.
    BrokenCall(&'a Broken),
    /// Something befell the device, and the answer goes on.
    Notice(&'a str),
    /// The answer is complete.
    Done(&'a Summary),
    /// The answer failed; the conversation is as it was before the question.
    Error(&'a str),
}

/// Takes events.
pub trait Sink {
    /// Shows one.
    ///
    /// # Errors
    /// When there is nobody left to show it to.
    fn event(&mut self, event: Event<'_>) -> io::Result<()>;
}

/// What the agent runs on.
#[derive(Debug, Clone)]
pub struct Start {
    /// The device.
    pub device: String,
    /// Why this device.
    pub why: String,
    /// The checkpoint.
    pub model: String,
    /// Its size and shape in words.
    pub shape: String,
    /// For the model inside the program: what it is, and questions to begin with.
    pub try_it: Option<(&'static str, &'static [&'static str])>,
    /// Names of the tools.
    pub tools: Vec<String>,
    /// The folder that the file tools see.
    pub folder: Option<String>,
    /// Longest conversation, in tokens.
    pub context: usize,
    /// How tokens are drawn.
    pub sampling: Value,
}

/// How an answer went.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Why it ended.
    pub reason: Reason,
    /// Tokens of the last prompt.
    pub prompt_tokens: usize,
    /// Tokens read for this answer, over all prompts.
    pub read_tokens: usize,
    /// Prompt tokens that were still in memory, over all prompts.
    pub reused_tokens: usize,
    /// Of those read, how many had been read before: the prompt departs from what was in memory, over all prompts.
    pub reread_tokens: usize,
    /// Tokens written, over all rounds.
    pub generated_tokens: usize,
    /// Of these, how many were reasoning.
    pub reasoning_tokens: usize,
    /// The reasoning was ended because its budget was used up.
    pub reasoning_cut: bool,
    /// Of all written, how many count for the speed: the first of a round is a part of reading.
    pub decoded_tokens: usize,
    /// Tools run.
    pub tool_calls: usize,
    /// Time spent reading.
    pub prefill: Duration,
    /// Time spent writing.
    pub decode: Duration,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reason {
    /// The model ended it.
    #[default]
    Stop,
    /// The token budget is used up.
    Length,
    /// The conversation fills the context.
    Context,
    /// The user stopped it.
    Interrupted,
    /// The model wrote the same again and again.
    Repetition,
    /// The model went on calling tools, or made the same call again and again.
    ToolLimit,
}

impl Reason {
    /// The word for it in events.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Stop => "stop",
            Reason::Length => "length",
            Reason::Context => "context",
            Reason::Interrupted => "interrupted",
            Reason::Repetition => "repetition",
            Reason::ToolLimit => "tool_limit",
        }
    }

    /// What a reader should know beyond the answer itself.
    pub fn note(self) -> Option<&'static str> {
        match self {
            Reason::Stop => None,
            Reason::Length => Some("cut at the token budget, see --max-tokens"),
            Reason::Context => Some("cut: the conversation fills the context, see /clear and --context"),
            Reason::Interrupted => Some("interrupted"),
            Reason::Repetition => Some("cut: the model repeated itself"),
            Reason::ToolLimit => Some("stopped: the model kept calling tools without answering"),
        }
    }
}

impl Summary {
    /// Tokens written a second; 0 where there were too few to tell.
    pub fn rate(&self) -> f64 {
        if self.decode.is_zero() { 0.0 } else { self.decoded_tokens as f64 / self.decode.as_secs_f64() }
    }
}
