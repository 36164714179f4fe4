//! Answers, token by token.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::qwen::model::Model;
use crate::qwen::sample::{Sampler, Sampling};
use crate::qwen::session::{Got, Session, Want};
use crate::qwen::state::cache::Reason;
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

/// What an answer is drawn with, beside the sequence: with both it goes on as if nothing had happened.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub sampler: Sampler,
    /// The token that was drawn last and is not read yet; none before the first and after the end.
    pub next: Option<u32>,
    /// The position of its first token.
    pub begin: u64,
    /// Tokens given out.
    pub given: u64,
}

/// An answer in the making. Each item is computed when it is asked for; dropping it leaves the session at the last token read.
#[derive(Debug)]
pub struct Generation<'a> {
    session: &'a mut Session,
    prompt: Vec<u32>,
    /// Ends of the pieces of the prompt, with the snapshots that are due there.
    cuts: std::vec::IntoIter<(usize, Option<Reason>)>,
    options: GenerateOptions,
    text: Option<TextStream>,
    timings: Timings,
    phase: Phase,
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
        let cuts = session.cuts(ids);
        let begin = (session.ids().len() + ids.len()) as u64;
        session.answer = Some(Answer { sampler, next: None, begin, given: 0 });
        Ok(Self::at(session, ids.to_vec(), cuts, options, Phase::Prompt(0)))
    }

    pub(crate) fn resume(session: &'a mut Session, options: &GenerateOptions) -> Result<Self> {
        let position = session.ids().len() as u64;
        let under_way = session.answer.as_ref().and_then(|a| Some((a.next?, a.begin, a.given)));
        let Some((next, begin, given)) =
            under_way.filter(|(_, begin, given)| [position, position + 1].contains(&(begin + given)))
        else {
            return Err(Error::argument(
                "session",
                "no answer under way",
                "one that was stopped or restored in an answer",
            ));
        };
        let phase = if begin + given > position { Phase::Given(next) } else { Phase::Drawn(next) };
        let shown = session.ids().get(begin as usize..).unwrap_or_default().to_vec();
        let mut out = Self::at(session, Vec::new(), Vec::new(), options, phase);
        // What is held back of the text depends on what was given out.
        let shown = shown.into_iter().chain((begin + given > position).then_some(next));
        if let Some(text) = &mut out.text {
            shown.for_each(|id| drop(text.push(id)));
        }
        Ok(out)
    }

    fn at(
        session: &'a mut Session,
        prompt: Vec<u32>,
        cuts: Vec<(usize, Option<Reason>)>,
        options: &GenerateOptions,
        phase: Phase,
    ) -> Self {
        let text = session.model().tokenizer().ok().map(|t| t.stream(options.special));
        let (options, cuts) = (options.clone(), cuts.into_iter());
        Generation { session, prompt, cuts, options, text, timings: Timings::default(), phase }
    }

    /// The session, between two items: its snapshots hold the answer under way.
    pub fn session(&self) -> &Session {
        self.session
    }

    /// Reads ids and draws the token after them.
    fn draw(&mut self, ids: &[u32]) -> Result<u32> {
        let missing = || Error::argument("logits", "none", "those of the last token");
        let greedy = self.session.answer.as_ref().is_some_and(|a| a.sampler.sampling().is_greedy());
        let got = self.session.append(ids, if greedy { Want::Argmax } else { Want::Logits })?;
        let answer = self.session.answer.as_mut().ok_or_else(missing)?;
        answer.next = None;
        let id = match got {
            Got::Argmax(id) => id,
            Got::Logits(logits) => {
                let id = answer.sampler.sample(&logits)?;
                answer.sampler.accept(id);
                id
            }
            Got::Nothing => return Err(missing()),
        };
        if !self.options.stop_ids.contains(&id) {
            answer.next = Some(id);
        }
        Ok(id)
    }

    /// Tokens given out.
    fn given(&self) -> u64 {
        self.session.answer.as_ref().map_or(0, |a| a.given)
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
                let (end, reason) = self.cuts.next().unwrap_or((total, None));
                let piece = self.prompt[done..end].to_vec();
                self.phase = if end < total {
                    self.session.append(&piece, Want::State)?;
                    self.session.keep(reason);
                    Phase::Prompt(end)
                } else {
                    let id = self.draw(&piece)?;
                    self.session.keep(Some(Reason::Prompt));
                    Phase::Drawn(id)
                };
                self.timings.prompt += begin.elapsed();
                self.timings.prompt_tokens = end as u64;
                Ok(Event::Prompt { done: end as u64, total: total as u64 })
            }
            Phase::Drawn(id) => Ok(self.give(id)),
            Phase::Given(id) => {
                if self.options.max_tokens.is_some_and(|most| self.given() >= most) {
                    return Ok(self.done(Finish::Length));
                }
                if self.session.is_full() {
                    return Ok(self.done(Finish::Context));
                }
                let next = self.draw(&[id])?;
                if self.session.is_due() {
                    self.session.keep(Some(Reason::Every));
                }
                self.timings.decode += begin.elapsed();
                self.timings.decoded_tokens += 1;
                Ok(self.give(next))
            }
            Phase::Over => Ok(self.done(Finish::Length)),
        }
    }

    /// Hands out a drawn token, or ends with it.
    fn give(&mut self, id: u32) -> Event {
        if self.options.max_tokens.is_some_and(|most| self.given() >= most) {
            return self.done(Finish::Length);
        }
        if self.options.stop_ids.contains(&id) {
            return self.done(Finish::Stop(id));
        }
        if let Some(answer) = &mut self.session.answer {
            answer.given += 1;
        }
        self.phase = Phase::Given(id);
        // A vocabulary is often padded: a drawn id may have no token, and then no text.
        let text = self.text.as_mut().and_then(|t| t.push(id).ok()).unwrap_or_default();
        Event::Token { id, text }
    }

    fn done(&mut self, finish: Finish) -> Event {
        self.phase = Phase::Over;
        if !matches!(finish, Finish::Failed(_)) && self.given() > 0 {
            self.session.keep(Some(Reason::Answer));
        }
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
