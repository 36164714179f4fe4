//! The checkpoint's chat template, rendered as Python's jinja2 renders it.

use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::qwen::config::read_json;
use crate::qwen::pyvalue::{self, JsonStyle};

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    /// `bos_token`, `eos_token` and the like, which templates may name.
    tokens: Vec<(String, String)>,
}

const NAME: &str = "chat_template";

/// Steps that one rendering may take, some hundred for each message: a template that never ends is a broken one.
const STEPS: u64 = 20_000_000;
/// Bytes of a prompt at most: many times what the longest context holds.
const LONGEST: usize = 64 << 20;

/// A prompt that is being written, up to [`LONGEST`].
struct Prompt<'a>(&'a mut Vec<u8>);

impl io::Write for Prompt<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > LONGEST - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else the `chat_template` of `tokenizer_config.json`; none where a checkpoint has neither.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file and the line that does not parse.
    pub fn read(dir: &Path) -> Result<Option<ChatTemplate>> {
        let config = tokenizer_config(dir)?;
        let file = dir.join("chat_template.jinja");
        let (source, path) = if file.exists() {
            (std::fs::read_to_string(&file).map_err(|e| Error::load(&file, e))?, file)
        } else {
            match in_config(&config) {
                Some(source) => (source.to_string(), dir.join("tokenizer_config.json")),
                None => return Ok(None),
            }
        };
        let mut template = ChatTemplate::new(&source, path)?;
        template.tokens = special_tokens(dir)?;
        Ok(Some(template))
    }

    /// Compiles a template; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::Load`] with the line that does not parse.
    pub fn new(source: &str, path: impl Into<PathBuf>) -> Result<ChatTemplate> {
        let path = path.into();
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::load(&path, e))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| {
            minijinja::escape_formatter(out, state, &minijinja::Value::from(pyvalue::str(value)))
        });
        environment.add_filter("string", |value: &minijinja::Value| pyvalue::str(value));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned(NAME, source.to_string())
            .map_err(|e| Error::load(&path, format!("broken template: {}", describe(&e))))?;
        Ok(ChatTemplate { environment, path, tokens: Vec::new() })
    }

    /// Renders a conversation.
    ///
    /// - `messages`: a list of `{"role": ..., "content": ...}` as the template expects them. `arguments` of a tool call may
    ///   be an object or a JSON string of one.
    /// - `tools`: a list of tool descriptions, each written as one line of JSON in its own key order
    /// - `add_generation_prompt`: ends with the begin of an answer
    /// - `enable_thinking`: whether the answer begins by reasoning; `None` leaves it to the template
    ///
    /// # Errors
    /// [`Error::Argument`] for messages that are no list or arguments that are no object; [`Error::Load`] naming the template
    /// with its own words if it raises,
    /// or if it does not end or writes without end.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        enable_thinking: Option<bool>,
    ) -> Result<String> {
        let mut context = serde_json::Map::new();
        for (name, token) in &self.tokens {
            context.insert(name.clone(), Value::from(token.as_str()));
        }
        context.insert("messages".into(), with_parsed_arguments(messages)?);
        // transformers passes None where there are no tools, and leaves enable_thinking undefined where it is not given.
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("add_generation_prompt".into(), Value::from(add_generation_prompt));
        if let Some(thinking) = enable_thinking {
            context.insert("enable_thinking".into(), Value::from(thinking));
        }
        let template = self.environment.get_template(NAME).map_err(|e| self.failed(&e))?;
        let mut text = Vec::new();
        template.render_captured_to(Serde(context), Prompt(&mut text)).map_err(|e| self.failed(&e))?;
        String::from_utf8(text).map_err(|e| Error::load(&self.path, e))
    }

    fn failed(&self, e: &minijinja::Error) -> Error {
        let why = match e.kind() {
            ErrorKind::OutOfFuel => format!("the template does not end within {STEPS} steps"),
            ErrorKind::WriteFailure => format!("the template writes more than {LONGEST} bytes"),
            _ => format!("the template refuses: {}", describe(e)),
        };
        Error::load(&self.path, why)
    }
}

/// The message of a template error, with its line.
fn describe(e: &minijinja::Error) -> String {
    let what = e.detail().map_or_else(|| e.kind().to_string(), str::to_string);
    match e.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// The `chat_template` of a tokenizer config: a text, or a list of named ones of which `default` counts.
fn in_config(config: &Value) -> Option<&str> {
    match config.get("chat_template")? {
        Value::String(source) => Some(source),
        Value::Array(named) => {
            let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first())?.get("template")?.as_str()
        }
        _ => None,
    }
}

/// Special tokens by name, such as `eos_token`, from `tokenizer_config.json`: texts, or objects with their text under
/// `content`. None where the file is absent.
///
/// # Errors
/// [`Error::Load`] if the file is not JSON.
pub fn special_tokens(dir: &Path) -> Result<Vec<(String, String)>> {
    let config = tokenizer_config(dir)?;
    let named = config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
    Ok(named
        .filter_map(|(name, v)| Some((name.clone(), v.as_str().or_else(|| v.get("content")?.as_str())?.to_string())))
        .collect())
}

fn tokenizer_config(dir: &Path) -> Result<Value> {
    let path = dir.join("tokenizer_config.json");
    if path.exists() { read_json(&path) } else { Ok(Value::Null) }
}

/// The messages with every `arguments` that is a JSON string replaced by what it holds.
fn with_parsed_arguments(messages: &Value) -> Result<Value> {
    let mut messages = messages.clone();
    let Some(list) = messages.as_array_mut() else {
        return Err(Error::argument("messages", messages, "a list of messages"));
    };
    for (m, message) in list.iter_mut().enumerate() {
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        for (c, call) in calls.into_iter().flatten().enumerate() {
            let function = if call.get("function").is_some() { call.get_mut("function") } else { Some(call) };
            let Some(arguments) = function.and_then(|f| f.get_mut("arguments")) else { continue };
            if let Some(text) = arguments.as_str() {
                let what = || format!("messages[{m}].tool_calls[{c}].arguments");
                let parsed: Value = serde_json::from_str(text)
                    .map_err(|e| Error::argument(what(), format!("{text:?} ({e})"), "a JSON object"))?;
                if !parsed.is_object() {
                    return Err(Error::argument(what(), format!("{text:?}"), "a JSON object"));
                }
                *arguments = parsed;
            }
        }
    }
    Ok(messages)
}

/// The filter `tojson` as transformers defines it for chat templates.
fn to_json(value: &minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = match options.get::<Option<minijinja::Value>>("indent")? {
        None => None,
        Some(v) => match v.as_str() {
            Some(text) => Some(text.to_string()),
            None => Some(" ".repeat(u8::try_from(v)? as usize)),
        },
    };
    let style = JsonStyle {
        indent,
        separators: options.get::<Option<Vec<String>>>("separators")?.and_then(|s| {
            let [item, colon] = <[String; 2]>::try_from(s).ok()?;
            Some((item, colon))
        }),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    pyvalue::json(value, &style)
}
