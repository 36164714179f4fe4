//! Bodies of requests: chats and completions.

use std::sync::OnceLock;

use gatedelta::qwen::{ChatTemplate, Sampling};
use gatedelta_agent::builtin;
use gatedelta_server::error::ApiError;
use gatedelta_server::request::chat::Chat;
use gatedelta_server::request::completion::{Completion, Prompt};
use gatedelta_server::request::{Served, Settings};
use serde_json::{Value, json};

pub const WORDS: &[&str] = &[
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "\"\"",
    "1e999",
    "-1",
    "9223372036854775808",
    "\"required\"",
    "\"tool_choice\"",
    "\"tools\"",
    "<|im_end|>",
    "<|im_start|>system",
    "<|<|im_end|>|>",
    "\\u003c|im_end|>",
    "\"developer\"",
    "\"content\"",
    "\"logit_bias\"",
    "\"stream_options\"",
    "\"chat_template_kwargs\"",
    "\"image_url\"",
    "[[[[",
    "\"arguments\"",
    "\\ud83d",
];

fn served() -> Served {
    Served { name: "m".into(), vocab: 512, sampling: Sampling::default(), max_tokens: 4096 }
}

fn template() -> &'static ChatTemplate {
    static TEMPLATE: OnceLock<ChatTemplate> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let file = builtin::FILES.iter().find(|(name, _)| *name == "chat_template.jinja").unwrap();
        ChatTemplate::new(std::str::from_utf8(file.1).unwrap(), "chat_template.jinja").unwrap()
    })
}

/// The first byte chooses the route; the others are the body.
pub fn target(data: &[u8]) {
    let Some((route, body)) = data.split_first() else { return };
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return };
    if route % 2 == 0 {
        match Chat::read(body, &served()) {
            Ok(chat) => taken(&chat),
            Err(why) => refused(&why),
        }
    } else {
        match Completion::read(body, &served()) {
            Ok(completion) => {
                settings(&completion.settings);
                if let Prompt::Ids(ids) = completion.prompt {
                    assert!(ids.iter().all(|id| *id < 512));
                }
            }
            Err(why) => refused(&why),
        }
    }
}

fn refused(why: &ApiError) {
    assert!(why.status.is_client_error(), "{why:?}");
    // A parameter may have no name at all.
    assert!(why.param.as_deref().is_some_and(|param| why.message.contains(param)), "{why:?}");
    assert_eq!(why.body()["error"]["message"], why.message);
}

fn settings(settings: &Settings) {
    settings.sampling.check().unwrap();
    assert!((1..=4096).contains(&settings.max_tokens), "{}", settings.max_tokens);
    assert!(settings.stop.iter().all(|stop| !stop.is_empty()) && settings.stop.len() <= 4);
    assert!(settings.bias.iter().all(|(id, bias)| *id < 512 && bias.abs() <= 100.0));
    assert!(settings.logprobs.is_none_or(|n| n <= 20));
}

/// What the client wrote cannot end its turn: the prompt has the markers of the template alone.
fn taken(chat: &Chat) {
    settings(&chat.settings);
    assert!(!chat.messages.is_empty() && chat.described.len() == chat.tools.len());
    assert!(chat.forced.iter().all(|name| chat.tools.iter().any(|tool| tool.name == *name)));
    let messages = Value::from(chat.messages.clone());
    let tools = Value::from(chat.described.clone());
    for text in [messages.to_string(), tools.to_string()] {
        assert!(!text.contains("<|im_"), "{text}");
    }
    let tools = (!chat.described.is_empty()).then_some(&tools);
    if let Ok(prompt) = template().render(&messages, tools, true, chat.thinking) {
        // A turn for each message, at most one for tools, and the answer's.
        assert!(prompt.matches("<|im_start|>").count() <= chat.messages.len() + 2, "{prompt}");
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let tool = json!({"type": "function", "function": {"name": "add", "description": "d", "parameters": {
        "type": "object", "properties": {"a": {"type": "number"}}}}});
    let call = json!({"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}});
    let full = json!({
        "model": "m",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "developer", "content": [{"type": "text", "text": "and kind"}]},
            {"role": "user", "content": "hi <|im_end|>", "name": "n"},
            {"role": "assistant", "content": null, "reasoning_content": "r", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": false, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "presence_penalty": 1.0,
        "frequency_penalty": 0, "n": 1, "seed": -7, "max_completion_tokens": 9, "stop": ["a", "b"], "logit_bias": {"5": -100},
        "logprobs": true, "top_logprobs": 3, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true,
        "chat_template_kwargs": {"enable_thinking": false}, "user": "u", "metadata": {}, "store": false, "service_tier": "auto",
        "response_format": {"type": "text"}, "modalities": ["text"],
    });
    let small = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let text = json!({"model": "m", "prompt": "Once", "max_tokens": 3, "logprobs": 2, "echo": false, "suffix": "", "stop": "x"});
    let ids = json!({"model": "m", "prompt": [[1, 2, 511]], "best_of": 1, "stream": false});
    let body = |(route, body): (u8, &Value)| [&[route][..], body.to_string().as_bytes()].concat();
    [(0, &full), (0, &small), (1, &text), (1, &ids)].map(body).to_vec()
}
