//! Chat templates: programs that come with a checkpoint.

use std::sync::OnceLock;

use gatedelta::Error;
use gatedelta::qwen::ChatTemplate;
use serde_json::{Value, json};

pub const WORDS: &[&str] = &[
    "{% for i in range(9) %}",
    "{% endfor %}",
    "{% if messages %}",
    "{% endif %}",
    "{{ messages | tojson(indent=2) }}",
    "{{ x * 99999 }}",
    "loop.index",
    "namespace(a=1)",
    "| string",
    ".split('\\n')",
    "[::-1]",
    "{% macro m() %}{{ m() }}{% endmacro %}",
    "{{ m() }}",
    "raise_exception('no')",
    "{%- set s = s ~ s %}",
    "-9223372036854775808",
    "tools",
    "none",
    "| length",
    "is defined",
];

const FILE: &[u8] = include_bytes!("../../tests/golden/models/tiny-text/chat_template.jinja");

fn chat() -> &'static (Value, Value) {
    static CHAT: OnceLock<(Value, Value)> = OnceLock::new();
    CHAT.get_or_init(|| {
        let call =
            json!({"type": "function", "function": {"name": "add", "arguments": {"a": 1.5, "b": [null, "\u{e9}"]}}});
        let messages = json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "1.5 and more?\n"},
            {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "user", "content": [{"type": "text", "text": "and now"}]},
        ]);
        let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
        (messages, json!([tool]))
    })
}

/// What compiles renders, or refuses in words.
pub fn target(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let named = |why: Error| assert!(matches!(&why, Error::Load { path, .. } if path.ends_with("of.jinja")), "{why}");
    let template = match ChatTemplate::new(source, "of.jinja") {
        Ok(template) => template,
        Err(why) => return named(why),
    };
    let (messages, tools) = chat();
    for (tools, thinking) in [(None, None), (Some(tools), Some(false))] {
        if let Err(why) = template.render(messages, tools, true, thinking) {
            named(why);
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let small = "{% macro m(x) %}{{ x | tojson }}{% endmacro %}{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] }}{% endfor %}";
    vec![FILE.to_vec(), small.as_bytes().to_vec()]
}
