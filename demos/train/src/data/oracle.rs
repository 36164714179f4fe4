//! The perfect model: it knows what to do, and writes it as the chat template would have it.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gatedelta::qwen::ChatTemplate;
use gatedelta_agent::engine::{Answer, End, Engine, Step};
use gatedelta_agent::parse::Call;
use serde_json::{Value, json};

use crate::data::{Act, Action};

/// Serves one task.
pub struct Oracle<'a> {
    template: &'a ChatTemplate,
    acts: &'a [Act],
    /// How many of them are done.
    done: usize,
    /// The conversation and the tools of the last prompt.
    asked: RefCell<(Vec<Value>, Vec<Value>)>,
    /// What an answer must hold to be right, once it has been given.
    pub must: Vec<String>,
}

impl<'a> Oracle<'a> {
    pub fn new(template: &'a ChatTemplate, acts: &'a [Act]) -> Self {
        Oracle { template, acts, done: 0, asked: RefCell::default(), must: Vec::new() }
    }

    /// What the tools have said since the user's request.
    fn results(messages: &[Value]) -> Vec<String> {
        let since = messages.iter().rposition(|message| message["role"] == "user").unwrap_or(0);
        let tools = messages[since..].iter().filter(|message| message["role"] == "tool");
        tools.filter_map(|message| Some(message["content"].as_str()?.to_string())).collect()
    }
}

/// A message of the assistant that does this.
pub fn message(action: &Action) -> Value {
    let message = |text: &str, call: &Call| {
        json!({"role": "assistant", "content": text, "tool_calls": [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}},
        ]})
    };
    match action {
        Action::Call(call) => message("", call),
        Action::Work { text, call } => message(text, call),
        Action::Say { text, .. } => json!({"role": "assistant", "content": text}),
    }
}

impl Engine for Oracle<'_> {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        self.asked.replace((messages.to_vec(), tools.to_vec()));
        Ok(self.template.render(&messages.into(), Some(&tools.into()), true, thinking)?)
    }

    fn generate(
        &mut self,
        prompt: &str,
        _budget: usize,
        each: &mut dyn FnMut(Step<'_>) -> Result<bool>,
    ) -> Result<Answer> {
        let (mut messages, tools) = self.asked.take();
        let act = self.acts.get(self.done).context("the agent asks for more than the task has")?;
        self.done += 1;
        let action = act(&Self::results(&messages));
        messages.push(message(&action));
        if let Action::Say { must, .. } = action {
            self.must = must;
        }
        let whole = self.template.render(&messages.into(), Some(&tools.into()), false, None)?;
        let Some(wrote) = whole.strip_prefix(prompt).and_then(|rest| rest.strip_suffix("<|im_end|>\n")) else {
            bail!("the chat template does not go on from its own prompt");
        };
        each(Step::Read { done: 1, total: 1, reused: 0 })?;
        each(Step::Wrote { id: 0, text: wrote })?;
        let none = Duration::ZERO;
        Ok(Answer {
            end: End::Stop,
            prompt: 1,
            reused: 0,
            read: 1,
            reread: 0,
            wrote: 1,
            decoded: 0,
            reading: none,
            writing: none,
        })
    }
}
