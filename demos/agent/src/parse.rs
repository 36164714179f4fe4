//! The model's output, parsed while it streams: reasoning, text and tool calls.
//!
//! ```text
//! reasoning</think>
//!
//! text
//!
//! <tool_call>
//! <function=NAME>
//! <parameter=KEY>
//! VALUE
//! </parameter>
//! </function>
//! </tool_call>
//! ```
//!
//! One pass over the bytes, each looked at once: the events do not depend on how the stream was cut, up to the cuts between
//! neighbouring deltas. What is not markup is text; nothing is lost, and [`Parser::raw`] holds every byte.
//!
//! Where the format is ambiguous:
//! - `<tool_call>` opens a call only if `<function=` follows; it ends reasoning then. `<function=NAME>` alone opens one at the
//!   start of a line if NAME is a known tool.
//! - Think markers count at the start of the answer and, for `</think>`, inside reasoning; elsewhere they are text.
//! - A value may hold anything, closing tags included. A call ends at its **last** complete closing before the next call opens
//!   or the stream ends; it is reported then. `</parameter>` closes a value only where the call's end follows or a
//!   `<parameter=KEY>` that the tool has and that has not been given.
//! - One of the three closing tags may be missing. A call with less is reported as broken, with its text.

mod body;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::tools::Spec;

pub use body::types;

/// What the stream turned out to hold.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The next piece of reasoning.
    Reasoning(String),
    /// The next piece of the answer.
    Text(String),
    /// A call of this tool began; its arguments are still being written.
    Opening(String),
    /// A complete call.
    Call(Call),
    /// A call that cannot be made.
    Broken(Broken),
}

/// A complete call, its arguments typed by the tool's schema.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The tool that the model asks for, known or not.
    pub name: String,
    /// By name, in the order written.
    pub arguments: Map<String, Value>,
}

/// A call that was cut off or is malformed.
#[derive(Debug, Clone, PartialEq)]
pub struct Broken {
    /// The tool, if its name was readable.
    pub name: Option<String>,
    /// What is wrong.
    pub why: String,
    /// The call as the model wrote it.
    pub raw: String,
}

const OPEN_CALL: &str = "<tool_call>";
const CLOSE_CALL: &str = "</tool_call>";
const OPEN_FUNCTION: &str = "<function=";
const CLOSE_FUNCTION: &str = "</function>";
const CLOSE_PARAMETER: &str = "</parameter>";
const OPEN_THINK: &str = "<think>";
const CLOSE_THINK: &str = "</think>";

/// What can end prose. No tag has a `<` inside, so a failed match can only restart at the byte that failed it.
const PROSE_TAGS: [&str; 4] = [OPEN_CALL, OPEN_FUNCTION, OPEN_THINK, CLOSE_THINK];
/// What matters inside a call.
const CALL_TAGS: [&str; 5] = [CLOSE_PARAMETER, CLOSE_FUNCTION, CLOSE_CALL, OPEN_CALL, OPEN_FUNCTION];

/// Longest name of a tool or parameter that is taken for one.
const NAME_LIMIT: usize = 64;

/// See the [module](self).
pub struct Parser {
    tools: Arc<[Spec]>,
    /// Calls count; without, their tags are text.
    calls: bool,
    raw: String,
    /// Prose before this has been handed out or dropped.
    shown: usize,
    /// Prose before this may be handed out: it ends in no white space and in no part of a tag.
    solid: usize,
    reasoning: bool,
    /// Only white space since the section began.
    blank: bool,
    /// Text or a call has been seen: think markers count no more.
    spoken: bool,
    state: State,
    events: Vec<Event>,
}

#[derive(Clone)]
enum State {
    Prose,
    /// `raw[start..]` is the beginning of a tag.
    Tag {
        start: usize,
    },
    /// `<tool_call>` at `start`, then white space, then perhaps a beginning of `<function=` at `tag`.
    Opened {
        start: usize,
        tag: Option<usize>,
    },
    /// Reading the function's name, from `name` on.
    Name {
        start: usize,
        name: usize,
        bare: bool,
    },
    Call(Frame),
}

/// A call that is open, or that may have ended but could still turn out to go on.
#[derive(Clone)]
struct Frame {
    start: usize,
    name: Result<String, String>,
    body: usize,
    /// Where a tag may have begun.
    tag: Option<usize>,
    /// What the tags just before say, with white space alone between them.
    chain: Chain,
    /// The best closing so far; of equals the last.
    best: Option<Close>,
}

#[derive(Clone, Copy, PartialEq)]
enum Chain {
    None,
    /// `</parameter>`, or the head of the call.
    Parameter,
    /// `</function>`.
    Function(Close),
    /// `<tool_call>` at this place.
    Opener(usize),
}

#[derive(Clone, Copy, PartialEq)]
struct Close {
    /// 2 for `</tool_call>`, 1 for `</parameter>` (or no parameter) before `</function>`; a call needs one of them.
    rank: u8,
    body_end: usize,
    end: usize,
}

impl Parser {
    /// A parser for one answer; `reasoning` says whether the prompt ends with an open `<think>`.
    pub fn new(tools: Arc<[Spec]>, reasoning: bool) -> Self {
        Parser {
            tools,
            calls: true,
            raw: String::new(),
            shown: 0,
            solid: 0,
            reasoning,
            blank: true,
            spoken: false,
            state: State::Prose,
            events: Vec::new(),
        }
    }

    /// A parser for an answer that can call nothing: all but its reasoning is text.
    pub fn prose(reasoning: bool) -> Self {
        Parser { calls: false, ..Parser::new(Arc::new([]), reasoning) }
    }

    /// Everything pushed so far.
    pub fn raw(&self) -> &str {
        &self.raw
    }

    /// True while what comes is reasoning.
    pub fn reasons(&self) -> bool {
        self.reasoning
    }

    /// Takes the next piece of the stream and returns what became certain.
    pub fn push(&mut self, piece: &str) -> Vec<Event> {
        let from = self.raw.len();
        self.raw.push_str(piece);
        for at in from..self.raw.len() {
            // A byte that ends one reading may begin another; it never takes more than three.
            while !self.step(at) {}
        }
        self.flush();
        std::mem::take(&mut self.events)
    }

    /// Ends the stream.
    pub fn finish(&mut self) -> Vec<Event> {
        let end = self.raw.trim_ascii_end().len();
        match std::mem::replace(&mut self.state, State::Prose) {
            State::Prose => {}
            State::Tag { start } => {
                self.solid_from(start);
                self.solid = end;
            }
            State::Opened { start, .. } | State::Name { start, bare: false, .. } => {
                self.flush();
                self.broken(start, None, "it was cut off before the name of the tool");
            }
            State::Name { start, bare: true, .. } => {
                self.solid_from(start);
                self.solid = end;
            }
            State::Call(frame) => match frame.best.filter(|close| close.rank > 0) {
                Some(close) => {
                    self.close(&frame, close);
                    self.trailing(close.end, end);
                }
                None => self.broken(frame.start, frame.name.ok(), "it was cut off before its end"),
            },
        }
        self.flush();
        std::mem::take(&mut self.events)
    }

    /// Takes the byte at `at`; false if the state changed and the byte is to be taken again.
    fn step(&mut self, at: usize) -> bool {
        let byte = self.raw.as_bytes()[at];
        match &mut self.state {
            State::Prose => {
                if byte == b'<' {
                    self.state = State::Tag { start: at };
                } else if !byte.is_ascii_whitespace() {
                    self.solid_from(at);
                    self.solid = at + 1;
                }
                true
            }
            State::Tag { start } => {
                let start = *start;
                match find(&PROSE_TAGS, &self.raw.as_bytes()[start..=at]) {
                    Found::Whole(tag) => {
                        self.prose_tag(tag, start, at + 1);
                        true
                    }
                    Found::Part => true,
                    Found::None => {
                        self.literal(start, at);
                        false
                    }
                }
            }
            State::Opened { start, tag } => {
                let start = *start;
                match *tag {
                    None if byte.is_ascii_whitespace() => true,
                    None if byte == b'<' => {
                        *tag = Some(at);
                        true
                    }
                    None => {
                        self.literal(start, start + OPEN_CALL.len());
                        false
                    }
                    Some(tag) => match find(&[OPEN_FUNCTION], &self.raw.as_bytes()[tag..=at]) {
                        Found::Whole(_) => {
                            self.state = State::Name { start, name: at + 1, bare: false };
                            true
                        }
                        Found::Part => true,
                        Found::None => {
                            self.literal(start, start + OPEN_CALL.len());
                            self.state = State::Tag { start: tag };
                            false
                        }
                    },
                }
            }
            State::Name { start, name, bare } => {
                let (start, from, bare) = (*start, *name, *bare);
                let ends = matches!(byte, b'>' | b'\n' | b'<') || !byte.is_ascii();
                if !ends && at - from < NAME_LIMIT + 2 {
                    return true;
                }
                let name = name_in(&self.raw[from..at]);
                if bare && !name.as_ref().is_ok_and(|name| self.tools.iter().any(|tool| tool.name == *name)) {
                    self.literal(start, at);
                    return false;
                }
                self.flush();
                self.reasoning = false;
                self.spoken = true;
                if let Ok(name) = &name {
                    self.events.push(Event::Opening(name.clone()));
                }
                let body = if byte == b'>' { at + 1 } else { at };
                let frame = Frame { start, name, body, tag: None, chain: Chain::Parameter, best: None };
                self.state = State::Call(frame);
                byte == b'>'
            }
            State::Call(frame) => {
                let Some(tag) = frame.tag else {
                    if byte == b'<' {
                        frame.tag = Some(at);
                    } else if !byte.is_ascii_whitespace() {
                        frame.chain = Chain::None;
                    }
                    return true;
                };
                match find(&CALL_TAGS, &self.raw.as_bytes()[tag..=at]) {
                    Found::Whole(which) => {
                        frame.tag = None;
                        if let Some((opener, close)) = frame.tag_seen(which, tag, at + 1) {
                            let frame = frame.clone();
                            self.close(&frame, close);
                            self.trailing(close.end, opener);
                            self.state = State::Name { start: opener, name: at + 1, bare: false };
                        }
                        true
                    }
                    Found::Part => true,
                    Found::None => {
                        frame.tag = None;
                        frame.chain = Chain::None;
                        false
                    }
                }
            }
        }
    }

    /// A whole tag in prose.
    fn prose_tag(&mut self, tag: &str, start: usize, end: usize) {
        let answer_begins = self.blank && !self.spoken;
        match tag {
            OPEN_CALL if self.calls => self.state = State::Opened { start, tag: None },
            OPEN_FUNCTION if self.calls && !self.reasoning && self.line_begins(start) => {
                self.state = State::Name { start, name: end, bare: true };
            }
            CLOSE_THINK if self.reasoning || answer_begins => self.section(false, end),
            OPEN_THINK if answer_begins => self.section(true, end),
            _ => self.literal(start, end),
        }
    }

    /// Begins reasoning or text at `at`.
    fn section(&mut self, reasoning: bool, at: usize) {
        self.flush();
        self.reasoning = reasoning;
        self.shown = at;
        self.solid = at;
        self.blank = true;
        self.state = State::Prose;
    }

    /// What looked like a tag from `start` to `end` is prose.
    fn literal(&mut self, start: usize, end: usize) {
        self.solid_from(start);
        self.solid = end;
        self.state = State::Prose;
    }

    /// Prose that is not white space begins or goes on at `at`.
    fn solid_from(&mut self, at: usize) {
        if self.blank {
            self.blank = false;
            self.shown = at;
        }
        self.spoken |= !self.reasoning;
    }

    fn line_begins(&self, at: usize) -> bool {
        let before = self.raw[..at].trim_end_matches([' ', '\t']);
        self.blank || before.ends_with('\n')
    }

    /// Hands out the prose that is certain.
    fn flush(&mut self) {
        if self.shown < self.solid {
            let text = self.raw[self.shown..self.solid].to_string();
            self.events.push(if self.reasoning { Event::Reasoning(text) } else { Event::Text(text) });
            self.shown = self.solid;
        }
    }

    /// Text between a call and what follows it.
    fn trailing(&mut self, from: usize, to: usize) {
        let text = self.raw[from..to.max(from)].trim_ascii();
        if !text.is_empty() {
            self.events.push(Event::Text(text.to_string()));
        }
        self.shown = to;
        self.solid = to;
    }

    /// The call of `frame`, ended by `close`.
    fn close(&mut self, frame: &Frame, close: Close) {
        let body = &self.raw[frame.body..close.body_end];
        let call = frame.name.clone().and_then(|name| {
            let schema = self.tools.iter().find(|tool| tool.name == name).map(|tool| &tool.parameters);
            Ok(Call { arguments: body::arguments(body, schema)?, name })
        });
        let event = match call {
            Ok(call) => Event::Call(call),
            Err(why) => {
                let raw = self.raw[frame.start..close.end].to_string();
                Event::Broken(Broken { name: frame.name.clone().ok(), why, raw })
            }
        };
        self.events.push(event);
    }

    fn broken(&mut self, start: usize, name: Option<String>, why: &str) {
        let raw = self.raw[start..].to_string();
        self.events.push(Event::Broken(Broken { name, why: why.to_string(), raw }));
        self.shown = self.raw.len();
        self.solid = self.shown;
    }
}

impl Frame {
    /// Takes a tag at `start..end`. If it opens the next call, gives where that begins and how this one ended.
    fn tag_seen(&mut self, tag: &str, start: usize, end: usize) -> Option<(usize, Close)> {
        let next = match (tag, self.chain) {
            (CLOSE_PARAMETER, _) => Chain::Parameter,
            (CLOSE_FUNCTION, chain) => {
                let close = Close { rank: u8::from(chain == Chain::Parameter), body_end: start, end };
                self.offer(close);
                Chain::Function(close)
            }
            (CLOSE_CALL, Chain::Function(close)) => {
                self.offer(Close { rank: close.rank + 2, end, ..close });
                Chain::None
            }
            (CLOSE_CALL, Chain::Parameter) => {
                self.offer(Close { rank: 2, body_end: start, end });
                Chain::None
            }
            (OPEN_CALL, _) => Chain::Opener(start),
            (OPEN_FUNCTION, Chain::Opener(opener)) => match self.best {
                Some(close) if close.rank > 0 => return Some((opener, close)),
                _ => Chain::None,
            },
            _ => Chain::None,
        };
        self.chain = next;
        None
    }

    fn offer(&mut self, close: Close) {
        if self.best.is_none_or(|best| best.rank <= close.rank) {
            self.best = Some(close);
        }
    }
}

enum Found {
    Whole(&'static str),
    Part,
    None,
}

fn find(tags: &[&'static str], seen: &[u8]) -> Found {
    for &tag in tags {
        if tag.as_bytes() == seen {
            return Found::Whole(tag);
        }
    }
    if tags.iter().any(|tag| tag.as_bytes().starts_with(seen)) { Found::Part } else { Found::None }
}

/// The name in `text`, quotes and white space aside.
fn name_in(text: &str) -> Result<String, String> {
    let name = text.trim_ascii();
    let name = name.strip_prefix('"').and_then(|name| name.strip_suffix('"')).unwrap_or(name);
    if is_name(name) { Ok(name.to_string()) } else { Err(format!("{name:?} is not the name of a tool")) }
}

/// Letters, digits, `_`, `-` and `.`.
fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !text.is_empty() && text.len() <= NAME_LIMIT && text.chars().all(good)
}
