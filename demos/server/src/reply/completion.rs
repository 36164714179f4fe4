//! `text_completion`.

use gatedelta::qwen::Tokenizer;
use serde_json::{Map, Value, json};

use super::{Head, Logprobs, Reply, Usage, finite, token_text};
use crate::answer::End;

/// See the [module](self).
pub struct CompletionReply {
    head: Head,
    tokenizer: Tokenizer,
    text: String,
    /// Characters of `text`.
    length: usize,
    logprobs: Option<Table>,
    finish: Option<End>,
}

/// Log-probabilities, column by column.
#[derive(Default, Clone)]
struct Table {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    likeliest: Vec<Value>,
    /// Characters before the token.
    offsets: Vec<Value>,
}

const OBJECT: &str = "text_completion";

impl Table {
    fn json(&self, from: usize) -> Value {
        json!({
            "tokens": self.tokens[from..],
            "token_logprobs": self.logprobs[from..],
            "top_logprobs": self.likeliest[from..],
            "text_offset": self.offsets[from..],
        })
    }
}

impl CompletionReply {
    /// A reply without text.
    pub fn new(head: Head, tokenizer: &Tokenizer, logprobs: bool) -> CompletionReply {
        let logprobs = logprobs.then(Table::default);
        CompletionReply { head, tokenizer: tokenizer.clone(), text: String::new(), length: 0, logprobs, finish: None }
    }

    fn choice(&self, text: &str, logprobs: Option<Value>, end: Option<&End>) -> Value {
        let mut choice = json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": end.map(End::reason)});
        if let Some(end) = end {
            choice["stop_reason"] = Value::from(end.detail());
        }
        choice
    }
}

impl Reply for CompletionReply {
    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn wrote(&mut self, text: &str, logprobs: Option<Logprobs>) -> Vec<Value> {
        let mut row = None;
        if let (Some(table), Some((token, likeliest))) = (&mut self.logprobs, logprobs) {
            table.tokens.push(Value::from(token_text(&self.tokenizer, token.id)));
            table.logprobs.push(Value::from(finite(token.logprob)));
            let likeliest =
                likeliest.iter().map(|t| (token_text(&self.tokenizer, t.id), Value::from(finite(t.logprob))));
            table.likeliest.push(Value::Object(likeliest.collect::<Map<_, _>>()));
            table.offsets.push(Value::from(self.length));
            row = Some(table.json(table.tokens.len() - 1));
        }
        self.text += text;
        self.length += text.chars().count();
        vec![self.head.chunk(OBJECT, self.choice(text, row, None))]
    }

    fn end(&mut self, end: &End) -> Vec<Value> {
        self.finish = Some(end.clone());
        vec![self.head.chunk(OBJECT, self.choice("", None, Some(end)))]
    }

    fn whole(&mut self, usage: &Usage) -> Value {
        let logprobs = self.logprobs.as_ref().map(|table| table.json(0));
        let choice = self.choice(&self.text, logprobs, self.finish.as_ref());
        let mut whole = self.head.object(OBJECT, json!([choice]));
        whole["usage"] = usage.json();
        whole
    }

    fn usage_chunk(&self, usage: &Usage) -> Value {
        let mut chunk = self.head.object(OBJECT, json!([]));
        chunk["usage"] = usage.json();
        chunk
    }
}
