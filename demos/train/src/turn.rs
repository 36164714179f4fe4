//! One request through the agent's own loop, with its own tools, and what came of it.

use std::io;

use anyhow::Result;
use gatedelta_agent::agent::{Agent, Options};
use gatedelta_agent::engine::Engine;
use gatedelta_agent::event::{Event, Reason, Sink};
use gatedelta_agent::options::SYSTEM;
use gatedelta_agent::parse::Call;
use gatedelta_agent::tools::Outcome;
use serde_json::Value;

use crate::data::world::World;

/// What came of a request.
#[derive(Debug)]
pub struct Turn {
    /// The whole conversation after it.
    pub messages: Vec<Value>,
    pub calls: Vec<Call>,
    /// One for each call.
    pub results: Vec<Outcome>,
    /// What was said after the last call.
    pub answer: String,
    pub reason: Reason,
    /// Tokens of the last prompt.
    pub prompt_tokens: usize,
    /// All that the model wrote.
    pub raw: String,
}

/// Answers `request` after `history`, in `world`, which the tools change.
///
/// # Errors
/// Whatever the engine gives.
pub fn take(
    engine: &mut dyn Engine,
    world: &World,
    history: &[Value],
    request: &str,
    max_tokens: usize,
) -> Result<Turn> {
    let options = Options { system: Some(SYSTEM.to_string()), thinking: None, think_budget: None, max_tokens };
    let mut agent = Agent::new(engine, world.toolbox()?, options);
    if !history.is_empty() {
        agent.restore(history.to_vec());
    }
    let mut seen = Seen::default();
    let summary = agent.answer(request, &|| false, &mut seen)?;
    Ok(Turn {
        messages: agent.messages().to_vec(),
        calls: seen.calls,
        results: seen.results,
        answer: seen.answer,
        reason: summary.reason,
        prompt_tokens: summary.prompt_tokens,
        raw: agent.raw().to_string(),
    })
}

#[derive(Default)]
struct Seen {
    calls: Vec<Call>,
    results: Vec<Outcome>,
    answer: String,
}

impl Sink for Seen {
    fn event(&mut self, event: Event<'_>) -> io::Result<()> {
        match event {
            Event::Token(text) => self.answer += text,
            Event::ToolCall(call) => self.calls.push(call.clone()),
            Event::ToolResult(_, outcome) => {
                self.results.push(outcome.clone());
                self.answer.clear();
            }
            _ => {}
        }
        Ok(())
    }
}
