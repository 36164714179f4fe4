//! What the agent needs of a model.

pub mod local;

use std::time::Duration;

use anyhow::Result;
use gatedelta::qwen::Restored;
use serde_json::Value;

/// A model that continues text.
pub trait Engine {
    /// The prompt for a conversation, in the model's own chat format.
    ///
    /// # Errors
    /// If the model's template refuses the conversation.
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String>;

    /// Reads `prompt` and continues it by at most `budget` tokens. `each` hears of every step; when it gives false, or an error,
    /// the answer ends there.
    ///
    /// # Errors
    /// Whatever goes wrong in the model, and what `each` gave.
    fn generate(
        &mut self,
        prompt: &str,
        budget: usize,
        each: &mut dyn FnMut(Step<'_>) -> Result<bool>,
    ) -> Result<Answer>;

    /// Gets ready for a prompt that goes on from `text`; how much of it needs no reading, where that is known.
    ///
    /// # Errors
    /// Whatever goes wrong in the model.
    fn prepare(&mut self, _text: &str) -> Result<Option<Restored>> {
        Ok(None)
    }

    /// Has what was read and written outlive the program, where there is a place for it.
    ///
    /// # Errors
    /// If it cannot be written.
    fn save(&mut self) -> Result<()> {
        Ok(())
    }

    /// What it holds in memory, in lines for the user.
    fn memory(&self) -> String {
        "Nothing is known of the memory.".into()
    }
}

impl<E: Engine + ?Sized> Engine for &mut E {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        (**self).render(messages, tools, thinking)
    }

    fn generate(
        &mut self,
        prompt: &str,
        budget: usize,
        each: &mut dyn FnMut(Step<'_>) -> Result<bool>,
    ) -> Result<Answer> {
        (**self).generate(prompt, budget, each)
    }

    fn prepare(&mut self, text: &str) -> Result<Option<Restored>> {
        (**self).prepare(text)
    }

    fn save(&mut self) -> Result<()> {
        (**self).save()
    }

    fn memory(&self) -> String {
        (**self).memory()
    }
}

/// A step of the model.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// `done` of `total` prompt tokens are read, the first `reused` without reading.
    Read { done: usize, total: usize, reused: usize },
    /// A token and the text it made certain, often none.
    Wrote { id: u32, text: &'a str },
    /// Text that was held back and belongs to no further token.
    Rest { text: &'a str },
    /// Something the user should know, such as that the device failed and another took its place.
    Notice { text: &'a str },
}

/// How a continuation went.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Why it ended.
    pub end: End,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, how many were still in memory.
    pub reused: usize,
    /// Of the rest, how many were read before the answer ended.
    pub read: usize,
    /// Of those read, how many had been read before: the prompt departs from what was in memory, between two snapshots.
    pub reread: usize,
    /// Tokens written.
    pub wrote: usize,
    /// Of these, how many were computed while writing: all but the first.
    pub decoded: usize,
    /// Time spent reading, up to the first token.
    pub reading: Duration,
    /// Time spent on the decoded tokens.
    pub writing: Duration,
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Stop,
    /// The budget is used up.
    Budget,
    /// The context is full.
    Context,
    /// The caller ended it.
    Cancelled,
}
