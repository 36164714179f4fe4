//! `/v1/chat/completions`.

use std::collections::HashSet;
use std::sync::Arc;

use gatedelta_agent::tools::Spec;
use serde_json::{Value, json};

use super::fields::Fields;
use super::{Served, Settings, Streaming, model, settings, streaming};
use crate::error::ApiError;

/// A chat, ready for the model's template.
#[derive(Debug, Clone)]
pub struct Chat {
    /// As chat templates take them: contents are texts, arguments are objects.
    pub messages: Vec<Value>,
    /// What the model may call; empty where it shall not.
    pub tools: Arc<[Spec]>,
    /// The same in the client's own words, for the template.
    pub described: Vec<Value>,
    /// Names of which the answer has to call one; empty where it need not.
    pub forced: Vec<String>,
    /// More than one call in an answer.
    pub parallel: bool,
    /// Whether the model reasons first; `None` leaves it to its template.
    pub thinking: Option<bool>,
    /// How the answer is drawn.
    pub settings: Settings,
    /// How it is sent.
    pub streaming: Streaming,
}

/// Most tools of a request.
const TOOLS: usize = 128;
/// Longest name of a tool.
const NAME: usize = 64;
/// Most of `top_logprobs`.
const TOP_LOGPROBS: i64 = 20;

impl Chat {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// Naming the first parameter that is missing, wrong, unknown or not supported.
    pub fn read(body: Value, served: &Served) -> Result<Chat, ApiError> {
        let mut fields = Fields::new(body, "")?;
        model(&mut fields, served)?;
        let messages = messages(&mut fields)?;
        let (tools, described) = tools(&mut fields)?;
        let (tools, described, forced) = choice(&mut fields, tools, described)?;
        let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        let mut thinking = thinking(&mut fields)?;
        if !forced.is_empty() {
            // The answer begins with the call.
            thinking = Some(false);
        }
        let older = fields.whole("max_tokens", 1, i64::MAX)?;
        let newer = fields.whole("max_completion_tokens", 1, i64::MAX)?;
        if let (Some(older), Some(newer)) = (older, newer)
            && older != newer
        {
            let found = format!("{older} beside 'max_completion_tokens' {newer}");
            return Err(ApiError::invalid("max_tokens", found, "one of them, or the same in both"));
        }
        let mut settings = settings(&mut fields, served, newer.or(older).map(|n| n as u64))?;
        let logprobs = fields.flag("logprobs")?.unwrap_or(false);
        let top = fields.whole("top_logprobs", 0, TOP_LOGPROBS)?;
        if top.is_some() && !logprobs {
            return Err(ApiError::invalid("top_logprobs", "no 'logprobs'", "it only where 'logprobs' is true"));
        }
        settings.logprobs = logprobs.then_some(top.unwrap_or(0) as usize);
        let streaming = streaming(&mut fields)?;
        refuse_the_rest(&mut fields)?;
        fields.finish()?;
        Ok(Chat { messages, tools, described, forced, parallel, thinking, settings, streaming })
    }
}

/// What OpenAI's API knows and a local model of text cannot do.
fn refuse_the_rest(fields: &mut Fields) -> Result<(), ApiError> {
    let never = |_: &Value| false;
    let is_false = |value: &Value| *value == Value::Bool(false);
    let text = |value: &Value| value["type"] == "text";
    fields.refuse("response_format", text, "answers are not constrained to JSON")?;
    fields.refuse("modalities", |value| *value == json!(["text"]), "this model reads and writes text only")?;
    fields.refuse("audio", never, "this model reads and writes text only")?;
    fields.refuse("prediction", never, "there are no predicted outputs")?;
    fields.refuse("web_search_options", never, "this server fetches nothing")?;
    fields.refuse("functions", never, "use 'tools'")?;
    fields.refuse("function_call", never, "use 'tool_choice'")?;
    fields.refuse("reasoning_effort", never, "use chat_template_kwargs.enable_thinking, true or false")?;
    fields.refuse("verbosity", never, "the model has no such setting")?;
    fields.refuse("store", is_false, "this server stores nothing")?;
    fields.refuse("service_tier", |value| *value == "auto" || *value == "default", "there are no tiers")
}

/// `chat_template_kwargs.enable_thinking`, as other servers of such models have it.
fn thinking(fields: &mut Fields) -> Result<Option<bool>, ApiError> {
    let Some(options) = fields.take("chat_template_kwargs") else { return Ok(None) };
    let mut options = Fields::new(options, "chat_template_kwargs")?;
    let thinking = options.flag("enable_thinking")?;
    options.finish()?;
    Ok(thinking)
}

fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.array("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "an empty array", "at least one message"));
    }
    let mut out: Vec<Value> = Vec::with_capacity(list.len());
    // Calls that were made; a result must name one of them.
    let mut calls = HashSet::new();
    for (i, message) in list.into_iter().enumerate() {
        let path = format!("messages[{i}]");
        let mut message = Fields::new(message, path.as_str())?;
        let role = message.string("role")?.ok_or_else(|| ApiError::missing(&format!("{path}.role")))?;
        message.ignore(&["name"]);
        match role.as_str() {
            "system" | "developer" => {
                let content = required_text(&mut message)?;
                // Templates take one system text, at the begin.
                let only = out.len() == 1;
                match out.last_mut() {
                    Some(last) if only && last["role"] == "system" => {
                        let before = last["content"].as_str().unwrap_or_default();
                        last["content"] = Value::from(format!("{before}\n\n{content}"));
                    }
                    Some(_) => {
                        return Err(ApiError::invalid(
                            &format!("{path}.role"),
                            role,
                            "system messages at the begin only",
                        ));
                    }
                    None => out.push(json!({"role": "system", "content": content})),
                }
            }
            "user" => out.push(json!({"role": "user", "content": required_text(&mut message)?})),
            "assistant" => {
                let content = text(&mut message)?;
                let made = tool_calls(&mut message, &mut calls)?;
                if content.is_none() && made.is_empty() {
                    return Err(ApiError::missing(&message.path("content")));
                }
                let mut turn = json!({"role": "assistant", "content": content.unwrap_or_default()});
                if let Some(reasoning) = message.string("reasoning_content")? {
                    turn["reasoning_content"] = Value::from(defuse(&reasoning));
                }
                if !made.is_empty() {
                    turn["tool_calls"] = Value::from(made);
                }
                message.refuse("audio", |_| false, "this model reads and writes text only")?;
                message.refuse("function_call", |_| false, "use 'tool_calls'")?;
                message.refuse("refusal", |value| *value == "", "put it into 'content'")?;
                message.ignore(&["annotations"]);
                out.push(turn);
            }
            "tool" => {
                let id = message.string("tool_call_id")?;
                let id = id.ok_or_else(|| ApiError::missing(&message.path("tool_call_id")))?;
                if !calls.contains(&id) {
                    let expected = "the id of a call in a message of the assistant before it";
                    return Err(ApiError::invalid(&message.path("tool_call_id"), format!("{id:?}"), expected));
                }
                out.push(json!({"role": "tool", "content": required_text(&mut message)?}));
            }
            other => {
                let expected = "system, developer, user, assistant or tool";
                return Err(ApiError::invalid(&message.path("role"), format!("{other:?}"), expected));
            }
        }
        message.finish()?;
    }
    Ok(out)
}

fn required_text(message: &mut Fields) -> Result<String, ApiError> {
    text(message)?.ok_or_else(|| ApiError::missing(&message.path("content")))
}

/// `content`: a text, or parts that are all texts.
fn text(message: &mut Fields) -> Result<Option<String>, ApiError> {
    let path = message.path("content");
    let parts = match message.take("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(defuse(&text))),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(ApiError::wrong_type(&path, &other, "a string or an array of parts")),
    };
    let mut out = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut part = Fields::new(part, format!("{path}[{i}]"))?;
        let kind = part.string("type")?.ok_or_else(|| ApiError::missing(&part.path("type")))?;
        match kind.as_str() {
            "text" => {
                let text = part.string("text")?.ok_or_else(|| ApiError::missing(&part.path("text")))?;
                out.push_str(&defuse(&text));
                part.finish()?;
            }
            "image_url" | "input_audio" | "file" | "video_url" => {
                let why =
                    format!("{kind} cannot be read: this model reads text only, and the server opens no files or URLs");
                return Err(ApiError::unsupported(&part.path("type"), &why));
            }
            other => return Err(ApiError::invalid(&part.path("type"), format!("{other:?}"), "\"text\"")),
        }
    }
    Ok(Some(out))
}

fn tool_calls(message: &mut Fields, made: &mut HashSet<String>) -> Result<Vec<Value>, ApiError> {
    let path = message.path("tool_calls");
    let mut out = Vec::new();
    for (i, call) in message.array("tool_calls")?.into_iter().flatten().enumerate() {
        let mut call = Fields::new(call, format!("{path}[{i}]"))?;
        let id = call.string("id")?.ok_or_else(|| ApiError::missing(&call.path("id")))?;
        is_function(&mut call)?;
        let mut function = Fields::new(call.required("function")?, call.path("function"))?;
        let name = name(&mut function)?;
        let at = function.path("arguments");
        let arguments = function.string("arguments")?.ok_or_else(|| ApiError::missing(&at))?;
        let arguments: Value = match serde_json::from_str(&arguments) {
            Ok(Value::Object(map)) => defused(Value::Object(map)),
            Ok(_) => return Err(ApiError::invalid(&at, "JSON that is no object", "a JSON object as a string")),
            Err(why) => return Err(ApiError::invalid(&at, format!("no JSON ({why})"), "a JSON object as a string")),
        };
        function.finish()?;
        call.finish()?;
        made.insert(id);
        out.push(json!({"type": "function", "function": {"name": name, "arguments": arguments}}));
    }
    Ok(out)
}

fn tools(fields: &mut Fields) -> Result<(Vec<Spec>, Vec<Value>), ApiError> {
    let list = fields.array("tools")?.unwrap_or_default();
    if list.len() > TOOLS {
        return Err(ApiError::invalid("tools", format!("{} tools", list.len()), format!("at most {TOOLS}")));
    }
    let (mut specs, mut described): (Vec<Spec>, Vec<Value>) = (Vec::new(), Vec::new());
    for (i, tool) in list.into_iter().enumerate() {
        let own_words = defused(tool.clone());
        let mut tool = Fields::new(tool, format!("tools[{i}]"))?;
        is_function(&mut tool)?;
        let mut function = Fields::new(tool.required("function")?, tool.path("function"))?;
        let name = name(&mut function)?;
        if specs.iter().any(|spec| spec.name == name) {
            return Err(ApiError::invalid(&function.path("name"), format!("{name:?} again"), "each name once"));
        }
        let description = function.string("description")?.unwrap_or_default();
        let parameters = function.object("parameters")?.map_or_else(|| json!({"type": "object"}), Value::Object);
        let is_false = |value: &Value| *value == Value::Bool(false);
        function.refuse("strict", is_false, "calls are not constrained to the schema; check their arguments")?;
        function.finish()?;
        tool.finish()?;
        specs.push(Spec { name, description, parameters });
        described.push(own_words);
    }
    Ok((specs, described))
}

fn is_function(fields: &mut Fields) -> Result<(), ApiError> {
    let kind = fields.string("type")?.ok_or_else(|| ApiError::missing(&fields.path("type")))?;
    match kind.as_str() {
        "function" => Ok(()),
        "custom" => Err(ApiError::unsupported(&fields.path("type"), "there are tools of type \"function\" only")),
        other => Err(ApiError::invalid(&fields.path("type"), format!("{other:?}"), "\"function\"")),
    }
}

/// A tool's name: what neither breaks the format of a call nor the template.
fn name(function: &mut Fields) -> Result<String, ApiError> {
    let path = function.path("name");
    let name = function.string("name")?.ok_or_else(|| ApiError::missing(&path))?;
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || name.len() > NAME || !name.chars().all(fits) {
        let expected = format!("1 to {NAME} of the characters a-z, A-Z, 0-9, _ and -");
        return Err(ApiError::invalid(&path, format!("{name:?}"), expected));
    }
    Ok(name)
}

type Choice = (Arc<[Spec]>, Vec<Value>, Vec<String>);

/// `tool_choice`: the tools that the model sees, and those of which it has to call one.
fn choice(fields: &mut Fields, tools: Vec<Spec>, described: Vec<Value>) -> Result<Choice, ApiError> {
    let all = || tools.iter().map(|tool| tool.name.clone()).collect::<Vec<_>>();
    let forced = match fields.take("tool_choice") {
        None => Vec::new(),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Vec::new(),
            "none" => return Ok((Arc::new([]), Vec::new(), Vec::new())),
            "required" if tools.is_empty() => {
                return Err(ApiError::invalid("tool_choice", "\"required\" without tools", "tools to choose from"));
            }
            "required" => all(),
            other => {
                let expected = "\"none\", \"auto\", \"required\" or an object that names a function";
                return Err(ApiError::invalid("tool_choice", format!("{other:?}"), expected));
            }
        },
        Some(value) => {
            let mut choice = Fields::new(value, "tool_choice")?;
            is_function(&mut choice)?;
            let mut function = Fields::new(choice.required("function")?, "tool_choice.function")?;
            let name = name(&mut function)?;
            function.finish()?;
            choice.finish()?;
            if !all().contains(&name) {
                let expected = "the name of one of 'tools'";
                return Err(ApiError::invalid("tool_choice.function.name", format!("{name:?}"), expected));
            }
            vec![name]
        }
    };
    Ok((tools.into(), described, forced))
}

/// A text without the markers of the chat format, such as `<|im_end|>`: whoever wrote it cannot end its turn and begin another.
fn defuse(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("<|") {
        let (before, after) = rest.split_at(at + 1);
        out.push_str(before);
        let word = after[1..].trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
        if word.starts_with("|>") {
            out.push(' ');
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// The same for every text inside a value.
fn defused(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(defuse(&text)),
        Value::Array(list) => Value::Array(list.into_iter().map(defused).collect()),
        Value::Object(map) => map.into_iter().map(|(key, value)| (defuse(&key), defused(value))).collect(),
        other => other,
    }
}
