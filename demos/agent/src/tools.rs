//! What the model may call: the tools, the check of their arguments, and the run of one call, bounded in time and output.
//!
//! Whatever goes wrong in a tool comes back as text that the model can act on.

pub mod calculator;
pub mod clock;
pub mod files;
pub mod notes;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use self::calculator::Calculator;
use self::clock::{Clock, Time};
use self::files::{Folder, ListFiles, ReadFile};
use self::notes::Notes;
use crate::parse::{Call, types};

/// What the model is told about a tool.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Its name, unique.
    pub name: String,
    /// What it does and gives back, for the model.
    pub description: String,
    /// JSON schema of its arguments.
    pub parameters: Value,
}

impl Spec {
    /// A tool with these parameters: name, schema, whether required.
    pub fn new(name: &str, description: &str, parameters: &[(&str, Value, bool)]) -> Self {
        let properties: Map<String, Value> =
            parameters.iter().map(|(key, schema, _)| (key.to_string(), schema.clone())).collect();
        let required: Vec<&str> = parameters.iter().filter(|(.., required)| *required).map(|(key, ..)| *key).collect();
        Spec {
            name: name.to_string(),
            description: description.to_string(),
            parameters: json!({"type": "object", "properties": properties, "required": required}),
        }
    }

    /// The form that chat templates take.
    pub fn to_json(&self) -> Value {
        json!({"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": self.parameters,
        }})
    }

    /// What is wrong with `arguments`, in words for the model.
    fn check(&self, arguments: &Map<String, Value>) -> Result<(), String> {
        let none = Map::new();
        let properties = self.parameters["properties"].as_object().unwrap_or(&none);
        let names = || properties.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        if let Some(key) = arguments.keys().find(|key| !properties.contains_key(*key)) {
            return Err(format!("{} has no parameter {key:?}; it has: {}", self.name, names()));
        }
        for key in self.parameters["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !arguments.contains_key(key) {
                return Err(format!("{} needs the parameter {key:?}", self.name));
            }
        }
        for (key, value) in arguments {
            let schema = &properties[key];
            let types = types(Some(schema));
            if !types.is_empty() && !types.iter().any(|kind| is_a(value, kind)) {
                return Err(format!(
                    "the parameter {key:?} of {} must be of type {}, not {value}",
                    self.name,
                    types.join(" or ")
                ));
            }
            if let Some(choices) = schema["enum"].as_array().filter(|choices| !choices.contains(value)) {
                let choices: Vec<String> = choices.iter().map(Value::to_string).collect();
                return Err(format!(
                    "the parameter {key:?} of {} must be one of {}, not {value}",
                    self.name,
                    choices.join(", ")
                ));
            }
        }
        Ok(())
    }
}

fn is_a(value: &Value, kind: &str) -> bool {
    match kind {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "null" => value.is_null(),
        _ => true,
    }
}

/// Something the model can call.
pub trait Tool: Send + Sync {
    /// What the model is told about it.
    fn spec(&self) -> Spec;

    /// Runs it. The arguments have been checked against the schema.
    ///
    /// # Errors
    /// What went wrong, in words for the model.
    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String>;
}

/// All tools, in the order in which the model hears of them.
pub fn all(folder: Arc<Folder>, notes: Option<Notes>, time: Time) -> Vec<Arc<dyn Tool>> {
    let mut tools: Vec<Arc<dyn Tool>> = vec![
        Arc::new(Calculator),
        Arc::new(ListFiles(folder.clone())),
        Arc::new(ReadFile(folder)),
        Arc::new(Clock(time)),
    ];
    if let Some(notes) = notes {
        tools.push(Arc::new(notes));
    }
    tools
}

/// How a call went.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Whether the tool did what was asked.
    pub ok: bool,
    /// Its answer, or what went wrong.
    pub text: String,
}

impl Outcome {
    /// A failure.
    pub fn failed(why: impl Into<String>) -> Self {
        Outcome { ok: false, text: why.into() }
    }
}

/// The tools of one agent.
pub struct Toolbox {
    tools: Vec<(Spec, Arc<dyn Tool>)>,
    time_limit: Duration,
}

/// A tool that takes longer is left behind.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Of a longer answer the model gets the beginning.
pub const OUTPUT_LIMIT: usize = 16 * 1024;

impl Toolbox {
    /// These tools, each call bounded by `time_limit`.
    pub fn new(tools: Vec<Arc<dyn Tool>>, time_limit: Duration) -> Self {
        Toolbox { tools: tools.into_iter().map(|tool| (tool.spec(), tool)).collect(), time_limit }
    }

    /// What the model is told.
    pub fn specs(&self) -> Vec<Spec> {
        self.tools.iter().map(|(spec, _)| spec.clone()).collect()
    }

    /// Runs a call; `stop` is asked now and then whether to give up.
    pub fn run(&self, call: &Call, stop: &dyn Fn() -> bool) -> Outcome {
        let Some((spec, tool)) = self.tools.iter().find(|(spec, _)| spec.name == call.name) else {
            let names: Vec<&str> = self.tools.iter().map(|(spec, _)| spec.name.as_str()).collect();
            return Outcome::failed(format!("there is no tool {:?}; there are: {}", call.name, names.join(", ")));
        };
        if let Err(why) = spec.check(&call.arguments) {
            return Outcome::failed(why);
        }
        let (answer, arrives) = channel();
        let (tool, arguments) = (tool.clone(), call.arguments.clone());
        // A thread of its own: one that hangs is left behind and ends with the program.
        let started = std::thread::Builder::new().name(format!("tool {}", call.name)).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| tool.call(&arguments)));
            // The receiver may have given up.
            let _ = answer.send(result.unwrap_or_else(|_| Err("the tool failed for a reason of its own".to_string())));
        });
        if let Err(why) = started {
            return Outcome::failed(format!("the tool could not be started: {why}"));
        }
        let begin = Instant::now();
        loop {
            match arrives.recv_timeout(Duration::from_millis(20)) {
                Ok(Ok(text)) => return Outcome { ok: true, text: shorten(text) },
                Ok(Err(why)) => return Outcome::failed(shorten(why)),
                Err(RecvTimeoutError::Disconnected) => return Outcome::failed("the tool ended without an answer"),
                Err(RecvTimeoutError::Timeout) if stop() => return Outcome::failed("the user interrupted the tool"),
                Err(RecvTimeoutError::Timeout) if begin.elapsed() >= self.time_limit => {
                    return Outcome::failed(format!(
                        "the tool did not answer within {:.1} s",
                        self.time_limit.as_secs_f64()
                    ));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// As much of the text as fits into `limit` bytes.
pub fn beginning(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

fn shorten(mut text: String) -> String {
    if text.len() > OUTPUT_LIMIT {
        let bytes = text.len();
        text.truncate(beginning(&text, OUTPUT_LIMIT).len());
        text += &format!("\n[cut: the first {} of {bytes} bytes]", text.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Odd;

    impl Tool for Odd {
        fn spec(&self) -> Spec {
            let how = json!({"type": "string", "enum": ["hang", "panic", "long", "fail"]});
            Spec::new("odd", "", &[("how", how, true), ("n", json!({"type": "integer"}), false)])
        }

        fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
            match arguments["how"].as_str() {
                Some("hang") => loop {
                    std::thread::sleep(Duration::from_secs(1));
                },
                Some("panic") => panic!("a planted failure"),
                Some("long") => Ok("é".repeat(OUTPUT_LIMIT)),
                _ => Err("it failed".into()),
            }
        }
    }

    fn run(name: &str, arguments: Value, stop: bool) -> String {
        // Telling of a panic takes its time.
        let limit = if arguments["how"] == "hang" { 200 } else { 60_000 };
        let toolbox = Toolbox::new(vec![Arc::new(Odd)], Duration::from_millis(limit));
        let call = Call { name: name.into(), arguments: arguments.as_object().unwrap().clone() };
        toolbox.run(&call, &|| stop).text
    }

    #[test]
    fn whatever_a_tool_does_is_an_answer() {
        assert!(run("odd", json!({"how": "hang"}), false).contains("within 0.2 s"));
        assert!(run("odd", json!({"how": "hang"}), true).contains("interrupted"));
        assert!(run("odd", json!({"how": "panic"}), false).contains("reason of its own"));
        assert_eq!(run("odd", json!({"how": "fail"}), false), "it failed");
        let long = run("odd", json!({"how": "long"}), false);
        assert!(long.len() < OUTPUT_LIMIT + 100 && long.contains("of 32768 bytes"));
    }

    #[test]
    fn arguments_are_checked_first() {
        for (name, arguments, expected) in [
            ("other", json!({}), "there are: odd"),
            ("odd", json!({}), "needs the parameter \"how\""),
            ("odd", json!({"how": "fail", "x": 1}), "no parameter \"x\"; it has: how, n"),
            ("odd", json!({"how": 1}), "must be of type string, not 1"),
            ("odd", json!({"how": "fail", "n": "three"}), "must be of type integer, not \"three\""),
            ("odd", json!({"how": "sing"}), "must be one of \"hang\", "),
        ] {
            let found = run(name, arguments, false);
            assert!(found.contains(expected), "{found}");
        }
    }
}
