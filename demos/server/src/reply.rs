//! Answers as OpenAI's API gives them, whole and in chunks.
//!
//! A reply takes what the model writes, piece by piece, and gives the chunks of a stream; at its end it can be had whole too. Both
//! are made of the same pieces, so that a stream put together is the whole.

pub mod chat;
pub mod completion;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{SystemTime, UNIX_EPOCH};

use gatedelta::qwen::Tokenizer;
use serde_json::{Value, json};

use crate::answer::{End, Likely};

/// A token's log-probability, and those of the likeliest.
pub type Logprobs = (Likely, Vec<Likely>);

/// An answer in one of the API's forms.
pub trait Reply: Send {
    /// Chunks before anything is written.
    fn begin(&mut self) -> Vec<Value>;

    /// Takes the next piece; its chunks.
    fn wrote(&mut self, text: &str, logprobs: Option<Logprobs>) -> Vec<Value>;

    /// Takes the end; its chunks.
    fn end(&mut self, end: &End) -> Vec<Value>;

    /// All of it.
    fn whole(&mut self, usage: &Usage) -> Value;

    /// A last chunk that holds nothing but the usage.
    fn usage_chunk(&self, usage: &Usage) -> Value;
}

/// What stands in every chunk.
#[derive(Debug, Clone)]
pub struct Head {
    id: String,
    created: u64,
    model: String,
    /// Every chunk but the last says that usage comes later.
    usage: bool,
}

impl Head {
    /// A new one, with an id of its own.
    pub fn new(prefix: &str, model: &str, usage: bool) -> Head {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Head { id: random_id(prefix), created, model: model.to_string(), usage }
    }

    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices})
    }

    fn chunk(&self, kind: &str, choice: Value) -> Value {
        let mut chunk = self.object(kind, json!([choice]));
        if self.usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

/// Tokens of a request and of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: u64,
    /// Of these, how many were in memory.
    pub cached: u64,
    /// Tokens of the answer.
    pub completion: u64,
}

impl Usage {
    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

/// An id that is not used twice.
pub fn random_id(prefix: &str) -> String {
    let bits = || RandomState::new().build_hasher().finish();
    format!("{prefix}{:016x}{:08x}", bits(), bits() as u32)
}

/// A token as text, with U+FFFD where it is a part of a character only.
fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    tokenizer.decode(&[id], true).unwrap_or_default()
}

/// JSON has no infinity: what was impossible is very unlikely.
fn finite(logprob: f64) -> f64 {
    logprob.max(-9999.0)
}
