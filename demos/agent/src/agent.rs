//! The conversation: asks the model, runs the tools it calls, feeds their answers back, until the model answers.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Result, bail};
use gatedelta::qwen::Restored;
use serde_json::{Value, json};

use crate::engine::{End, Engine, Step};
use crate::event::{Event, Reason, Sink, Summary};
use crate::kept::{Conversation, Kept};
use crate::parse::{self, Broken, Call, Parser};
use crate::repeat::Repeat;
use crate::tools::{Outcome, Spec, Toolbox};

/// Prompts that one question may lead to.
pub const ROUND_LIMIT: usize = 8;
/// Calls in one piece of output; what follows is not waited for.
const CALL_LIMIT: usize = 16;
/// An identical call is run so often for one question,
const SAME_LIMIT: usize = 2;
/// and so many further ones are refused before the answer is ended.
const REFUSAL_LIMIT: usize = 2;

/// What the user can choose.
#[derive(Debug, Clone)]
pub struct Options {
    /// The system text.
    pub system: Option<String>,
    /// Whether the model reasons first; `None` leaves it to the model.
    pub thinking: Option<bool>,
    /// Tokens of reasoning about one question, over all rounds; none for no limit but that on all tokens.
    pub think_budget: Option<usize>,
    /// Tokens written for one question, over all rounds.
    pub max_tokens: usize,
}

/// What ends reasoning, as the model writes it.
const CLOSE_THINK: &str = "</think>\n\n";

/// A model, its tools and a conversation.
pub struct Agent<E> {
    engine: E,
    toolbox: Toolbox,
    specs: Arc<[Spec]>,
    tools: Vec<Value>,
    messages: Vec<Value>,
    /// Messages after the point that the user has gone back to; gone with the next answer.
    later: Vec<Value>,
    raw: String,
    /// The last prompt and what the model wrote on it.
    last: Option<(String, String)>,
    kept: Option<Kept>,
    /// May be changed between questions.
    pub options: Options,
}

/// What one piece of output held.
#[derive(Default)]
struct Output {
    reasoning: String,
    text: String,
    calls: Vec<Result<Call, Broken>>,
}

impl<E: Engine> Agent<E> {
    /// A new conversation.
    pub fn new(engine: E, toolbox: Toolbox, options: Options) -> Self {
        let specs: Arc<[Spec]> = toolbox.specs().into();
        let tools = specs.iter().map(Spec::to_json).collect();
        let mut agent = Agent {
            engine,
            toolbox,
            specs,
            tools,
            messages: Vec::new(),
            later: Vec::new(),
            raw: String::new(),
            last: None,
            kept: None,
            options,
        };
        agent.clear();
        agent
    }

    /// Keeps the conversation in `kept` from here on, and goes on with the one that is there; the number of its turns.
    ///
    /// # Errors
    /// If that cannot be read.
    pub fn keep(&mut self, kept: Kept) -> Result<usize> {
        let Conversation { messages, later } = kept.load()?;
        self.clear();
        self.messages.extend(messages);
        self.later = later;
        self.kept = Some(kept);
        Ok(begins(&self.messages).len())
    }

    /// Has conversation and state outlive the program, where there is a place for them.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn save(&mut self) -> Result<()> {
        if let Some(kept) = &self.kept {
            let system = self.messages.iter().take_while(|message| message["role"] == "system").count();
            let (messages, later) = (self.messages[system..].to_vec(), self.later.clone());
            kept.save(&Conversation { messages, later })?;
            self.engine.save()?;
        }
        Ok(())
    }

    /// Has the engine get ready for the next question; how much of the conversation needs no reading.
    ///
    /// # Errors
    /// Whatever the engine gives.
    pub fn prepare(&mut self) -> Result<Option<Restored>> {
        if begins(&self.messages).is_empty() {
            return Ok(None);
        }
        let text = self.engine.render(&self.messages, &self.tools, self.options.thinking)?;
        self.engine.prepare(&text)
    }

    /// What the engine holds in memory.
    pub fn memory(&self) -> String {
        self.engine.memory()
    }

    /// The questions of the conversation, and after how many of them it stands.
    pub fn turns(&self) -> (Vec<String>, usize) {
        let question = |message: &Value| message["content"].as_str().unwrap_or_default().to_string();
        let questions = |list: &[Value]| begins(list).into_iter().map(|at| question(&list[at])).collect::<Vec<_>>();
        let now = questions(&self.messages);
        let at = now.len();
        ([now, questions(&self.later)].concat(), at)
    }

    /// Goes to the end of a turn, the first being 1 and 0 the begin, back or forth.
    ///
    /// # Errors
    /// If there is no such turn.
    pub fn goto(&mut self, turn: usize) -> Result<()> {
        let count = self.turns().0.len();
        if turn > count {
            bail!("there is no turn {turn}; the conversation has {count}");
        }
        let mut all = std::mem::take(&mut self.messages);
        all.append(&mut self.later);
        let end = begins(&all).get(turn).copied().unwrap_or(all.len());
        self.later = all.split_off(end);
        self.messages = all;
        Ok(())
    }

    /// Goes back before the last question, which is given; none if there is no question.
    pub fn undo(&mut self) -> Option<String> {
        let (questions, at) = self.turns();
        let before = at.checked_sub(1)?;
        self.goto(before).ok()?;
        questions.into_iter().nth(before)
    }

    /// Answers a question and goes on as if it had not been asked.
    ///
    /// # Errors
    /// As [`Agent::answer`].
    pub fn aside(&mut self, question: &str, stop: &dyn Fn() -> bool, sink: &mut dyn Sink) -> Result<Summary> {
        let (before, later) = (self.messages.len(), self.later.clone());
        let answer = self.answer(question, stop, sink);
        self.messages.truncate(before);
        self.later = later;
        answer
    }

    /// Forgets the conversation.
    pub fn clear(&mut self) {
        self.messages.clear();
        self.later.clear();
        if let Some(system) = &self.options.system {
            self.messages.push(json!({"role": "system", "content": system}));
        }
    }

    /// The conversation so far, as chat templates take it.
    pub fn messages(&self) -> &[Value] {
        &self.messages
    }

    /// Goes on from another conversation, system text included.
    pub fn restore(&mut self, messages: Vec<Value>) {
        self.messages = messages;
    }

    /// The model.
    pub fn engine(&self) -> &E {
        &self.engine
    }

    /// The same, to be used between questions.
    pub fn engine_mut(&mut self) -> &mut E {
        &mut self.engine
    }

    /// What the model is told about its tools.
    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// All that the model wrote for the last question, as it wrote it; rounds are separated by an empty line.
    pub fn raw(&self) -> &str {
        &self.raw
    }

    /// Answers a question. `stop` is asked throughout whether the user wants it to end.
    ///
    /// # Errors
    /// Whatever the engine or the sink gives; the conversation is then as it was before.
    pub fn answer(&mut self, question: &str, stop: &dyn Fn() -> bool, sink: &mut dyn Sink) -> Result<Summary> {
        let before = self.messages.len();
        self.raw.clear();
        self.last = None;
        self.messages.push(json!({"role": "user", "content": question}));
        let mut summary = Summary::default();
        match self.rounds(stop, sink, &mut summary) {
            Ok(reason) => summary.reason = reason,
            Err(why) => {
                self.messages.truncate(before);
                return Err(why);
            }
        }
        if self.raw.trim().is_empty() {
            // A question without an answer would only confuse the next one.
            self.messages.truncate(before);
        } else {
            self.later.clear();
        }
        Ok(summary)
    }

    fn rounds(&mut self, stop: &dyn Fn() -> bool, sink: &mut dyn Sink, summary: &mut Summary) -> Result<Reason> {
        let mut made: HashMap<String, usize> = HashMap::new();
        let mut refused = 0;
        for round in 1..=ROUND_LIMIT {
            let (output, reason) = self.round(stop, sink, summary)?;
            if reason != Reason::Stop || output.calls.is_empty() {
                return Ok(reason);
            }
            if round == ROUND_LIMIT {
                break;
            }
            for item in &output.calls {
                let outcome = match item {
                    _ if stop() => Outcome::failed("the user interrupted before this call"),
                    Err(broken) => Outcome::failed(format!("this call was not understood: {}", broken.why)),
                    Ok(call) => {
                        let times = made.entry(json!([call.name, call.arguments]).to_string()).or_default();
                        *times += 1;
                        if *times > SAME_LIMIT {
                            refused += 1;
                            let why = format!(
                                "not run again: this is call number {times} of {} with the same arguments. Answer with what you know.",
                                call.name
                            );
                            self.refuse(call, why, sink)?
                        } else {
                            summary.tool_calls += 1;
                            self.run(call, stop, sink)?
                        }
                    }
                };
                let mut text = defuse(&outcome.text);
                if round + 1 == ROUND_LIMIT {
                    text += "\n[No further calls are possible. Answer now.]";
                }
                self.messages.push(json!({"role": "tool", "content": text}));
            }
            if stop() {
                return Ok(Reason::Interrupted);
            }
            if refused > REFUSAL_LIMIT {
                return Ok(Reason::ToolLimit);
            }
            if summary.generated_tokens >= self.options.max_tokens {
                return Ok(Reason::Length);
            }
        }
        Ok(Reason::ToolLimit)
    }

    /// One prompt and what the model makes of it, which joins the conversation.
    fn round(
        &mut self,
        stop: &dyn Fn() -> bool,
        sink: &mut dyn Sink,
        summary: &mut Summary,
    ) -> Result<(Output, Reason)> {
        let mut prompt = self.engine.render(&self.messages, &self.tools, self.options.thinking)?;
        if let Some((before, wrote)) = self.last.take() {
            prompt = appended(prompt, &before, &wrote);
        }
        let mut parser = Parser::new(self.specs.clone(), prompt.trim_end().ends_with("<think>"));
        let mut output = Output::default();
        let mut repeat = Repeat::new();
        let reason = loop {
            let reasoned = summary.reasoning_tokens;
            let left = self.options.think_budget.map(|budget| budget.saturating_sub(reasoned));
            if parser.reasons() && left == Some(0) {
                let line = if parser.raw().is_empty() || parser.raw().ends_with('\n') { "" } else { "\n" };
                output.take(parser.push(&format!("{line}{CLOSE_THINK}")), sink)?;
                sink.event(Event::ReasoningCut(reasoned))?;
                summary.reasoning_cut = true;
            }
            let (mut ours, mut thoughts, mut full) = (None, 0, false);
            let budget = self.options.max_tokens.saturating_sub(summary.generated_tokens);
            let answer = self.engine.generate(&format!("{prompt}{}", parser.raw()), budget, &mut |step| {
                match step {
                    Step::Read { done, total, reused } => sink.event(Event::Prefill { done, total, reused })?,
                    Step::Rest { text } => output.take(parser.push(text), sink)?,
                    Step::Notice { text } => sink.event(Event::Notice(text))?,
                    Step::Wrote { id, text } => {
                        output.take(parser.push(text), sink)?;
                        thoughts += usize::from(parser.reasons());
                        if repeat.push(id) {
                            ours = Some(Reason::Repetition);
                        } else if output.calls.len() >= CALL_LIMIT {
                            ours = Some(Reason::Stop);
                        } else {
                            full = parser.reasons() && left.is_some_and(|left| thoughts >= left);
                        }
                    }
                }
                Ok(ours.is_none() && !full && !stop())
            })?;
            summary.prompt_tokens = answer.prompt;
            summary.read_tokens += answer.read;
            summary.reused_tokens += answer.reused;
            summary.reread_tokens += answer.reread;
            summary.generated_tokens += answer.wrote;
            summary.reasoning_tokens += thoughts;
            summary.decoded_tokens += answer.decoded;
            summary.prefill += answer.reading;
            summary.decode += answer.writing;
            match answer.end {
                End::Cancelled if full && !stop() => {}
                End::Stop => break Reason::Stop,
                End::Budget => break Reason::Length,
                End::Context => break Reason::Context,
                End::Cancelled => break ours.unwrap_or(Reason::Interrupted),
            }
        };
        output.take(parser.finish(), sink)?;
        if !self.raw.is_empty() {
            self.raw.push_str("\n\n");
        }
        self.raw.push_str(parser.raw());
        self.last = Some((prompt, parser.raw().to_string()));
        if !parser.raw().trim().is_empty() {
            self.messages.push(output.message(parser.raw(), reason));
        }
        Ok((output, reason))
    }

    fn run(&self, call: &Call, stop: &dyn Fn() -> bool, sink: &mut dyn Sink) -> Result<Outcome> {
        sink.event(Event::ToolCall(call))?;
        let outcome = self.toolbox.run(call, stop);
        sink.event(Event::ToolResult(&call.name, &outcome))?;
        Ok(outcome)
    }

    fn refuse(&self, call: &Call, why: String, sink: &mut dyn Sink) -> Result<Outcome> {
        let outcome = Outcome::failed(why);
        sink.event(Event::ToolCall(call))?;
        sink.event(Event::ToolResult(&call.name, &outcome))?;
        Ok(outcome)
    }
}

impl Output {
    fn take(&mut self, events: Vec<parse::Event>, sink: &mut dyn Sink) -> Result<()> {
        for event in events {
            match event {
                parse::Event::Reasoning(text) => {
                    sink.event(Event::Reasoning(&text))?;
                    self.reasoning += &text;
                }
                parse::Event::Text(text) => {
                    sink.event(Event::Token(&text))?;
                    self.text += &text;
                }
                parse::Event::Opening(name) => sink.event(Event::Opening(&name))?,
                parse::Event::Call(call) => self.calls.push(Ok(call)),
                parse::Event::Broken(broken) => {
                    sink.event(Event::BrokenCall(&broken))?;
                    self.calls.push(Err(broken));
                }
            }
        }
        Ok(())
    }

    /// The assistant's turn as chat templates take it. What could not be parsed, and calls that will not be made, stay as they
    /// were written.
    fn message(&self, raw: &str, reason: Reason) -> Value {
        if reason != Reason::Stop && !self.calls.is_empty() || self.calls.iter().any(Result::is_err) {
            return json!({"role": "assistant", "content": raw});
        }
        let mut message = json!({"role": "assistant", "content": self.text});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = json!(self.reasoning);
        }
        if !self.calls.is_empty() {
            let calls = self.calls.iter().flatten();
            message["tool_calls"] = calls
                .map(|call| json!({"type": "function", "function": {"name": call.name, "arguments": call.arguments}}))
                .collect();
        }
        message
    }
}

/// Where the turns of a conversation begin.
fn begins(messages: &[Value]) -> Vec<usize> {
    (0..messages.len()).filter(|at| messages[*at]["role"] == "user").collect()
}

/// A prompt that goes on from `before` with what the model wrote, word for word: a template writes the same call in its own way,
/// and all from there on would have to be read again.
fn appended(prompt: String, before: &str, wrote: &str) -> String {
    const END: &str = "<|im_end|>";
    let rest = prompt.strip_prefix(before);
    match rest.and_then(|rest| rest.find(END).map(|at| &rest[at..])) {
        Some(after) if !wrote.contains(END) => format!("{before}{wrote}{after}"),
        _ => prompt,
    }
}

/// A tool's answer without the markers of the chat format, which would end its turn and begin another.
pub fn defuse(text: &str) -> String {
    text.replace("<|", "< |").replace("</tool_response", "< /tool_response")
}
