//! What clients may ask for: JSON bodies read into requests, each parameter served, ignored or refused by name.
//!
//! `null` is the same as leaving a parameter out, as in OpenAI's API; a parameter that nobody knows is refused, as there.

pub mod chat;
pub mod completion;
pub mod fields;

use std::hash::{BuildHasher, Hasher, RandomState};

use gatedelta::qwen::Sampling;
use serde_json::Value;

use self::fields::Fields;
use crate::error::ApiError;

/// How an answer is drawn and when it ends.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Start of the random numbers.
    pub seed: u64,
    /// Tokens at most.
    pub max_tokens: u64,
    /// What the model ends its answers with does not end this one.
    pub ignore_eos: bool,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Log-probabilities: of the token drawn and of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Added to the logits of these ids.
    pub bias: Vec<(u32, f32)>,
}

/// What the served model is, as far as requests depend on it.
#[derive(Debug, Clone)]
pub struct Served {
    /// The name that clients ask for.
    pub name: String,
    /// Ids that there are.
    pub vocab: u32,
    /// What the checkpoint asks for.
    pub sampling: Sampling,
    /// Tokens of an answer at most, whatever is asked for.
    pub max_tokens: u64,
}

/// Most texts of `stop`, and the most bytes of one.
const STOPS: usize = 4;
const STOP_BYTES: usize = 256;

/// What is common to chats and completions, short of `logprobs` and the names of the token limit.
fn settings(fields: &mut Fields, served: &Served, max_tokens: Option<u64>) -> Result<Settings, ApiError> {
    let own = served.sampling;
    let sampling = Sampling {
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(own.presence_penalty),
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(own.temperature),
        top_k: fields.whole("top_k", 0, i64::from(u32::MAX))?.map_or(own.top_k, |k| k as u32),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(own.top_p),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(own.min_p),
    };
    let seed = fields.whole("seed", i64::MIN, i64::MAX)?.map_or_else(random_seed, |seed| seed as u64);
    let is_zero = |value: &Value| value.as_f64() == Some(0.0);
    fields.refuse("frequency_penalty", is_zero, "this server has presence_penalty only")?;
    let is_one = |value: &Value| value.as_i64() == Some(1);
    fields.refuse("n", is_one, "this server gives one answer to a request")?;
    fields.refuse("best_of", is_one, "this server gives one answer to a request")?;
    // Who asks, and how OpenAI bills, caches and stores: nothing that an answer depends on.
    fields.ignore(&["user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention"]);
    Ok(Settings {
        sampling,
        seed,
        max_tokens: max_tokens.unwrap_or(u64::MAX).min(served.max_tokens),
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        stop: stops(fields)?,
        logprobs: None,
        bias: bias(fields, served)?,
    })
}

/// Checks the model's name.
fn model(fields: &mut Fields, served: &Served) -> Result<(), ApiError> {
    let asked = fields.string("model")?.ok_or_else(|| ApiError::missing("model"))?;
    if asked == served.name { Ok(()) } else { Err(ApiError::no_model(&asked, &served.name)) }
}

/// Whether the answer is streamed, and whether usage comes at the end of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streaming {
    /// Server-sent events instead of one object.
    pub stream: bool,
    /// A last event with the usage.
    pub usage: bool,
}

fn streaming(fields: &mut Fields) -> Result<Streaming, ApiError> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    let mut usage = false;
    if let Some(options) = fields.take("stream_options") {
        if !stream {
            return Err(ApiError::invalid("stream_options", "no stream", "it only where 'stream' is true"));
        }
        let mut options = Fields::new(options, "stream_options")?;
        usage = options.flag("include_usage")?.unwrap_or(false);
        options.ignore(&["include_obfuscation"]);
        options.finish()?;
    }
    Ok(Streaming { stream, usage })
}

fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(several)) => {
            let text = |(i, value): (usize, Value)| match value {
                Value::String(text) => Ok(text),
                other => Err(ApiError::wrong_type(&format!("stop[{i}]"), &other, "a string")),
            };
            several.into_iter().enumerate().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(ApiError::wrong_type("stop", &other, "a string or an array of strings")),
    };
    if stops.len() > STOPS {
        return Err(ApiError::invalid("stop", format!("{} texts", stops.len()), format!("at most {STOPS}")));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > STOP_BYTES) {
        Some(bad) => {
            Err(ApiError::invalid("stop", format!("one of {} bytes", bad.len()), format!("1 to {STOP_BYTES}")))
        }
        None => Ok(stops),
    }
}

fn bias(fields: &mut Fields, served: &Served) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let entry = |(id, value): (String, Value)| {
        let path = format!("logit_bias.{id}");
        let known = id.parse::<u32>().ok().filter(|id| *id < served.vocab);
        let expected = format!("a token id below {}", served.vocab);
        let known = known.ok_or_else(|| ApiError::invalid("logit_bias", format!("the key {id:?}"), expected))?;
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((known, bias as f32)),
            Some(bias) => Err(ApiError::invalid(&path, bias, "-100 to 100")),
            None => Err(ApiError::wrong_type(&path, &value, "a number")),
        }
    };
    map.into_iter().map(entry).collect()
}

/// A seed that nobody chose.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}
