//! `/v1/completions`.

use serde_json::Value;

use super::fields::Fields;
use super::{Served, Settings, Streaming, model, settings, streaming};
use crate::error::ApiError;

/// A prompt to go on from.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The prompt.
    pub prompt: Prompt,
    /// How the text is drawn.
    pub settings: Settings,
    /// How it is sent.
    pub streaming: Streaming,
}

/// What to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A text, in which markers of the chat format count.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// Tokens unless the request says otherwise, as in OpenAI's API.
const TOKENS: u64 = 16;
/// Most of `logprobs`.
const LOGPROBS: i64 = 5;

impl Completion {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// Naming the first parameter that is missing, wrong, unknown or not supported.
    pub fn read(body: Value, served: &Served) -> Result<Completion, ApiError> {
        let mut fields = Fields::new(body, "")?;
        model(&mut fields, served)?;
        let prompt = prompt(&mut fields, served)?;
        let most = fields.whole("max_tokens", 1, i64::MAX)?.map_or(TOKENS, |n| n as u64);
        let mut settings = settings(&mut fields, served, Some(most))?;
        settings.logprobs = fields.whole("logprobs", 0, LOGPROBS)?.map(|n| n as usize);
        let streaming = streaming(&mut fields)?;
        fields.refuse("echo", |value| *value == Value::Bool(false), "the prompt is not sent back")?;
        fields.refuse("suffix", |value| *value == "", "text is added at the end only")?;
        fields.finish()?;
        Ok(Completion { prompt, settings, streaming })
    }
}

fn prompt(fields: &mut Fields, served: &Served) -> Result<Prompt, ApiError> {
    let expected = "a string or an array of token ids";
    let mut list = match fields.required("prompt")? {
        Value::String(text) => return Ok(Prompt::Text(text)),
        Value::Array(list) => list,
        other => return Err(ApiError::wrong_type("prompt", &other, expected)),
    };
    match list.as_mut_slice() {
        [] => return Err(ApiError::invalid("prompt", "an empty array", expected)),
        [Value::String(text)] => return Ok(Prompt::Text(std::mem::take(text))),
        [Value::Array(ids)] => list = std::mem::take(ids),
        [Value::String(_) | Value::Array(_), ..] => {
            return Err(ApiError::unsupported("prompt", "this server takes one prompt a request"));
        }
        _ => {}
    }
    let id = |(i, value): (usize, &Value)| {
        let id = value.as_u64().filter(|id| *id < u64::from(served.vocab));
        let expected = format!("a token id below {}", served.vocab);
        id.map(|id| id as u32).ok_or_else(|| ApiError::invalid(&format!("prompt[{i}]"), value, expected))
    };
    Ok(Prompt::Ids(list.iter().enumerate().map(id).collect::<Result<_, _>>()?))
}
