//! `chat.completion` and `chat.completion.chunk`.

use std::sync::Arc;

use gatedelta::qwen::Tokenizer;
use gatedelta_agent::parse::{Event, Parser};
use gatedelta_agent::tools::Spec;
use serde_json::{Value, json};

use super::{Head, Logprobs, Reply, Usage, finite, random_id, token_text};
use crate::answer::{End, Likely};

/// See the [module](self).
pub struct ChatReply {
    head: Head,
    tokenizer: Tokenizer,
    parser: Parser,
    /// More than one call.
    parallel: bool,
    content: String,
    reasoning: String,
    calls: Vec<Value>,
    logprobs: Option<Vec<Value>>,
    /// Of `logprobs`, how many are in chunks.
    sent: usize,
    finish: Option<End>,
}

const CHUNK: &str = "chat.completion.chunk";

impl ChatReply {
    /// A reply that may call these tools; `reasoning` says that the prompt ends inside the model's reasoning.
    pub fn new(
        head: Head,
        tokenizer: &Tokenizer,
        tools: Arc<[Spec]>,
        parallel: bool,
        reasoning: bool,
        logprobs: bool,
    ) -> ChatReply {
        let parser = if tools.is_empty() { Parser::prose(reasoning) } else { Parser::new(tools, reasoning) };
        ChatReply {
            head,
            tokenizer: tokenizer.clone(),
            parser,
            parallel,
            content: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            logprobs: logprobs.then(Vec::new),
            sent: 0,
            finish: None,
        }
    }

    fn take(&mut self, events: Vec<Event>) -> Vec<Value> {
        let mut deltas = Vec::new();
        for event in events {
            match event {
                Event::Reasoning(text) => {
                    self.reasoning += &text;
                    deltas.push(json!({"reasoning_content": text}));
                }
                Event::Text(text) => {
                    self.content += &text;
                    deltas.push(json!({"content": text}));
                }
                // The call itself follows, complete.
                Event::Opening(_) => {}
                Event::Call(call) if self.parallel || self.calls.is_empty() => {
                    let arguments = Value::Object(call.arguments).to_string();
                    let function = json!({"name": call.name, "arguments": arguments});
                    let call = json!({"id": random_id("call_"), "type": "function", "function": function});
                    let mut delta = json!({"index": self.calls.len()});
                    if let (Some(delta), Some(call)) = (delta.as_object_mut(), call.as_object()) {
                        delta.extend(call.clone());
                    }
                    deltas.push(json!({"tool_calls": [delta]}));
                    self.calls.push(call);
                }
                Event::Call(_) => {}
                // What cannot be called is what the model said.
                Event::Broken(broken) => {
                    self.content += &broken.raw;
                    deltas.push(json!({"content": broken.raw}));
                }
            }
        }
        deltas.into_iter().map(|delta| self.chunk(delta, None)).collect()
    }

    fn chunk(&mut self, delta: Value, finish: Option<&End>) -> Value {
        let logprobs = match &self.logprobs {
            Some(all) if self.sent < all.len() => json!({"content": all[self.sent..], "refusal": null}),
            _ => Value::Null,
        };
        self.sent = self.logprobs.as_ref().map_or(0, Vec::len);
        let mut choice = json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": null});
        if let Some(end) = finish {
            choice["finish_reason"] = Value::from(self.reason(end));
            choice["stop_reason"] = Value::from(end.detail());
        }
        self.head.chunk(CHUNK, choice)
    }

    fn reason(&self, end: &End) -> &'static str {
        match end.reason() {
            "stop" if !self.calls.is_empty() => "tool_calls",
            other => other,
        }
    }

    fn token(&self, token: &Likely) -> Value {
        let bytes = self.tokenizer.bytes(token.id);
        let text = token_text(&self.tokenizer, token.id);
        json!({"token": text, "logprob": finite(token.logprob), "bytes": bytes})
    }
}

impl Reply for ChatReply {
    fn begin(&mut self) -> Vec<Value> {
        vec![self.chunk(json!({"role": "assistant", "content": ""}), None)]
    }

    fn wrote(&mut self, text: &str, logprobs: Option<Logprobs>) -> Vec<Value> {
        if let Some((token, likeliest)) = logprobs {
            let mut entry = self.token(&token);
            entry["top_logprobs"] = likeliest.iter().map(|token| self.token(token)).collect();
            if let Some(all) = &mut self.logprobs {
                all.push(entry);
            }
        }
        let events = self.parser.push(text);
        self.take(events)
    }

    fn end(&mut self, end: &End) -> Vec<Value> {
        let events = self.parser.finish();
        let mut chunks = self.take(events);
        chunks.push(self.chunk(json!({}), Some(end)));
        self.finish = Some(end.clone());
        chunks
    }

    fn whole(&mut self, usage: &Usage) -> Value {
        let content = if self.content.is_empty() && !self.calls.is_empty() { None } else { Some(&self.content) };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = Value::from(self.reasoning.as_str());
        }
        if !self.calls.is_empty() {
            message["tool_calls"] = Value::from(self.calls.clone());
        }
        let logprobs = self.logprobs.as_ref().map(|all| json!({"content": all, "refusal": null}));
        let finish = self.finish.as_ref();
        let choice = json!({
            "index": 0,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish.map(|end| self.reason(end)),
            "stop_reason": finish.and_then(End::detail),
        });
        let mut whole = self.head.object("chat.completion", json!([choice]));
        whole["usage"] = usage.json();
        whole
    }

    fn usage_chunk(&self, usage: &Usage) -> Value {
        let mut chunk = self.head.object(CHUNK, json!([]));
        chunk["usage"] = usage.json();
        chunk
    }
}
