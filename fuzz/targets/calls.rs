//! The parser of reasoning, text and tool calls.

use std::sync::{Arc, OnceLock};

use gatedelta_agent::parse::{Event, Parser};
use gatedelta_agent::tools::Spec;
use serde_json::{Value, json};

pub const WORDS: &[&str] = &[
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "<function=note>",
    "<function=add>\n",
    "</function>",
    "<parameter=text>\n",
    "<parameter=a>",
    "</parameter>",
    "\n</parameter>\n",
    "<think>",
    "</think>",
    "\n",
    "<",
    "{\"a\": 1}",
    "[1, {\"x\": null}]",
    "True",
    "1e999",
    "9007199254740993",
    "\u{e9}",
];

fn tools() -> Arc<[Spec]> {
    static TOOLS: OnceLock<Arc<[Spec]>> = OnceLock::new();
    let spec = |name: &str, properties: Value| Spec {
        name: name.to_string(),
        description: String::new(),
        parameters: json!({"type": "object", "properties": properties}),
    };
    TOOLS
        .get_or_init(|| {
            Arc::new([
                spec("note", json!({"text": {"type": "string"}, "tag": {"type": ["string", "null"]}})),
                spec(
                    "add",
                    json!({"a": {"type": "integer"}, "b": {"type": "number"}, "list": {"anyOf": [{"type": "array"}]}}),
                ),
                spec("clock", json!({})),
            ])
        })
        .clone()
}

fn parser(flags: u8) -> Parser {
    if flags & 2 != 0 { Parser::prose(flags & 1 != 0) } else { Parser::new(tools(), flags & 1 != 0) }
}

/// Neighbouring deltas joined.
fn join(events: Vec<Event>) -> Vec<Event> {
    let mut joined: Vec<Event> = Vec::new();
    for event in events {
        match (joined.last_mut(), event) {
            (Some(Event::Text(text)), Event::Text(more)) => text.push_str(&more),
            (Some(Event::Reasoning(text)), Event::Reasoning(more)) => text.push_str(&more),
            (_, event) => joined.push(event),
        }
    }
    joined
}

/// The first byte says how the parser begins and how the stream is cut; the others are the answer.
pub fn target(data: &[u8]) {
    let Some((flags, text)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let mut whole = parser(*flags);
    let mut events = whole.push(&text);
    events.extend(whole.finish());
    assert_eq!(whole.raw(), text);
    let events = join(events);

    let mut pieces = parser(*flags);
    let mut found = Vec::new();
    let width = usize::from(flags >> 2) % 13 + 1;
    let chars: Vec<char> = text.chars().collect();
    for piece in chars.chunks(width) {
        found.extend(pieces.push(&piece.iter().collect::<String>()));
    }
    found.extend(pieces.finish());
    assert_eq!(join(found), events, "it depends on how the stream was cut");

    let mut shown = 0;
    for event in &events {
        match event {
            Event::Reasoning(part) | Event::Text(part) => {
                assert!(text.contains(part.as_str()) || part.len() <= text.len());
                shown += part.len();
            }
            Event::Broken(broken) => {
                assert!(text.contains(&broken.raw) && !broken.why.is_empty());
                shown += broken.raw.len();
            }
            Event::Call(call) => {
                let written = Value::Object(call.arguments.clone()).to_string();
                assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), Value::Object(call.arguments.clone()));
                assert!(!call.name.is_empty() && text.contains(&call.name));
            }
            Event::Opening(name) => assert!(text.contains(name.as_str())),
        }
    }
    assert!(shown <= text.len(), "more than there was");
}

pub fn seeds() -> Vec<Vec<u8>> {
    let texts = [
        "why\n</think>\n\nLooking.\n\n<tool_call>\n<function=note>\n<parameter=text>\na\nb\n</parameter>\n<parameter=tag>\n7\n\
         </parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n<parameter=list>\n\
         [1, {\"x\": null}]\n</parameter>\n</function>\n</tool_call>",
        "<function=clock>\n</function>\nand <function=none></function>",
        "<tool_call>\n<function=add>\n{\"a\": 3.0, \"b\": \"<parameter=\"}\n</function>\n</tool_call> after\n<think>no</think>",
        "<think>a < b</think>\n\ntext <tool_call> no\n<tool_call><function=\"note\"\n<parameter=text\nvalue</function>",
    ];
    (0..8u8).flat_map(|flags| texts.map(|text| [&[flags * 5][..], text.as_bytes()].concat())).collect()
}
