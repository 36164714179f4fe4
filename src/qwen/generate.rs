//! Answers, token by token.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::qwen::model::Model;
use crate::qwen::sample::{Sampler, Sampling};
use crate::qwen::session::{Got, Session, Want};
use crate::qwen::tokenizer::TextStream;

/// How an answer is made and when it ends.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Start of the random numbers; the same seed gives the same answer.
    pub seed: u64,
    /// Tokens at most; by default as many as the context holds.
    pub max_tokens: Option<u64>,
    /// Ids that end the answer.
    pub stop_ids: Vec<u32>,
    /// Setting this flag ends the answer before its next piece or token.
    pub cancel: Option<Arc<AtomicBool>>,
    /// Keep markers such as `<|im_end|>` in the text.
    pub special: bool,
}

impl GenerateOptions {
    /// What the checkpoint asks for: its sampling, its stop ids.
    pub fn of(model: &Model) -> Self {
        GenerateOptions {
            sampling: model.generation().sampling,
            stop_ids: model.stop_ids().to_vec(),
            ..GenerateOptions::default()
        }
    }
}

/// What happens while an answer is made.
#[derive(Debug, Clone)]
pub enum Event {
    /// A piece of the prompt has been read.
    Prompt {
        /// Tokens read so far.
        done: u64,
        /// Tokens of the prompt.
        total: u64,
    },
    /// A token of the answer.
    Token {
        /// Its id.
        id: u32,
        /// The text that it completes; empty while a character is under way, for markers, and without a tokenizer.
        text: String,
    },
    /// The end: always the last event, and there always is one.
    Done {
        /// What is left of the text: U+FFFD for a character that never became complete.
        text: String,
        /// Why it ended.
        finish: Finish,
        /// How long it took.
        timings: Timings,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone)]
pub enum Finish {
    /// This stop id was drawn; it is not part of the sequence yet.
    Stop(u32),
    /// The tokens that were asked for are there.
    Length,
    /// The context is full.
    Context,
    /// The flag was set.
    Cancelled,
    /// Something failed.
    Failed(Error),
}

/// Tokens and the time they took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Tokens of the prompt that were read.
    pub prompt_tokens: u64,
    /// Time for them, up to the first token of the answer.
    pub prompt: Duration,
    /// Tokens of the answer that were computed after the first.
    pub decoded_tokens: u64,
    /// Time for those.
    pub decode: Duration,
}

impl Timings {
    /// Tokens of the prompt a second.
    pub fn prompt_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt.as_secs_f64().max(1e-9)
    }

    /// Tokens of the answer a second.
    pub fn decode_rate(&self) -> f64 {
        self.decoded_tokens as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// An answer in the making. Each item is computed when it is asked for; dropping it leaves the session at the last token read.
#[derive(Debug)]
pub struct Generation<'a> {
    session: &'a mut Session,
    prompt: Vec<u32>,
    options: GenerateOptions,
    sampler: Sampler,
    text: Option<TextStream>,
    timings: Timings,
    phase: Phase,
    tokens: u64,
}

#[derive(Debug)]
enum Phase {
    /// This many tokens of the prompt have been read.
    Prompt(usize),
    /// This token was drawn and nobody has seen it.
    Drawn(u32),
    /// This token was given out and not read yet.
    Given(u32),
    Over,
}

impl<'a> Generation<'a> {
    pub(crate) fn new(session: &'a mut Session, ids: &[u32], options: &GenerateOptions) -> Result<Self> {
        let sampler = Sampler::new(options.sampling, options.seed)?;
        let text = session.model().tokenizer().ok().map(|t| t.stream(options.special));
        Ok(Generation {
            session,
            prompt: ids.to_vec(),
            options: options.clone(),
            sampler,
            text,
            timings: Timings::default(),
            phase: Phase::Prompt(0),
            tokens: 0,
        })
    }

    /// Reads ids and draws the token after them.
    fn draw(&mut self, ids: &[u32]) -> Result<u32> {
        let greedy = self.sampler.sampling().is_greedy();
        match self.session.append(ids, if greedy { Want::Argmax } else { Want::Logits })? {
            Got::Argmax(id) => Ok(id),
            Got::Logits(logits) => {
                let id = self.sampler.sample(&logits)?;
                self.sampler.accept(id);
                Ok(id)
            }
            Got::Nothing => Err(Error::argument("logits", "none", "those of the last token")),
        }
    }

    fn step(&mut self) -> Result<Event> {
        let cancelled = self.options.cancel.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed));
        if cancelled {
            return Ok(self.done(Finish::Cancelled));
        }
        let begin = Instant::now();
        match self.phase {
            Phase::Prompt(done) => {
                let total = self.prompt.len();
                let end = total.min(done + self.session.piece_tokens());
                let piece = self.prompt[done..end].to_vec();
                self.phase = if end < total {
                    self.session.append(&piece, Want::State)?;
                    Phase::Prompt(end)
                } else {
                    Phase::Drawn(self.draw(&piece)?)
                };
                self.timings.prompt += begin.elapsed();
                self.timings.prompt_tokens = end as u64;
                Ok(Event::Prompt { done: end as u64, total: total as u64 })
            }
            Phase::Drawn(id) => Ok(self.give(id)),
            Phase::Given(id) => {
                if self.options.max_tokens.is_some_and(|most| self.tokens >= most) {
                    return Ok(self.done(Finish::Length));
                }
                if self.session.is_full() {
                    return Ok(self.done(Finish::Context));
                }
                let next = self.draw(&[id])?;
                self.timings.decode += begin.elapsed();
                self.timings.decoded_tokens += 1;
                Ok(self.give(next))
            }
            Phase::Over => Ok(self.done(Finish::Length)),
        }
    }

    /// Hands out a drawn token, or ends with it.
    fn give(&mut self, id: u32) -> Event {
        if self.options.max_tokens == Some(0) {
            return self.done(Finish::Length);
        }
        if self.options.stop_ids.contains(&id) {
            return self.done(Finish::Stop(id));
        }
        self.tokens += 1;
        self.phase = Phase::Given(id);
        // A vocabulary is often padded: a drawn id may have no token, and then no text.
        let text = self.text.as_mut().and_then(|t| t.push(id).ok()).unwrap_or_default();
        Event::Token { id, text }
    }

    fn done(&mut self, finish: Finish) -> Event {
        self.phase = Phase::Over;
        let text = self.text.as_mut().map(|t| t.finish()).unwrap_or_default();
        Event::Done { text, finish, timings: self.timings }
    }
}

impl Iterator for Generation<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if matches!(self.phase, Phase::Over) {
            return None;
        }
        Some(match self.step() {
            Ok(event) => event,
            Err(e) => self.done(Finish::Failed(e)),
        })
    }
}
