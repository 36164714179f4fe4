//! Parameters that are wrong, unknown or not supported: an error that names them, whatever they are.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::util::{MODEL, calculator, start, user};

/// A request's field by path, replaced; the parameter that the error names; its code.
type Case = (&'static str, Value, &'static str, &'static str);

fn with(mut body: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = body.pointer_mut(parent).unwrap();
    match parent {
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
        other => other[key] = value,
    }
    body
}

fn chats() -> Vec<Case> {
    let part =
        |kind: &str| json!([{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "file:///etc/passwd"}}]);
    let call = |arguments: Value| {
        let function = json!({"name": "calculator", "arguments": arguments});
        json!({"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]})
    };
    let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
    vec![
        ("/model", json!("gpt-4o"), "model", "model_not_found"),
        ("/model", Value::Null, "model", "missing_required_parameter"),
        ("/model", json!(1), "model", "invalid_type"),
        ("/messages", Value::Null, "messages", "missing_required_parameter"),
        ("/messages", json!([]), "messages", "invalid_value"),
        ("/messages", json!("hello"), "messages", "invalid_type"),
        ("/messages/0", json!("hello"), "messages[0]", "invalid_type"),
        ("/messages/0", json!({"content": "hello"}), "messages[0].role", "missing_required_parameter"),
        ("/messages/0", json!({"role": "user"}), "messages[0].content", "missing_required_parameter"),
        ("/messages/0/role", json!("robot"), "messages[0].role", "invalid_value"),
        ("/messages/0/role", json!("assistant"), "messages", "invalid_value"),
        ("/messages/0/content", json!(3), "messages[0].content", "invalid_type"),
        ("/messages/0/content", part("image_url"), "messages[0].content[1].type", "unsupported_parameter"),
        ("/messages/0/content", part("input_audio"), "messages[0].content[1].type", "unsupported_parameter"),
        ("/messages/0/content", part("file"), "messages[0].content[1].type", "unsupported_parameter"),
        ("/messages/0/content", part("hologram"), "messages[0].content[1].type", "invalid_value"),
        ("/messages/0/mood", json!("good"), "messages[0].mood", "unknown_parameter"),
        (
            "/messages/0",
            json!({"role": "tool", "content": "4", "tool_call_id": "x"}),
            "messages[0].tool_call_id",
            "invalid_value",
        ),
        ("/messages/0", call(json!("{")), "messages[0].tool_calls[0].function.arguments", "invalid_value"),
        ("/messages/0", call(json!("[1]")), "messages[0].tool_calls[0].function.arguments", "invalid_value"),
        ("/messages/0", call(json!({})), "messages[0].tool_calls[0].function.arguments", "invalid_type"),
        ("/tools", json!({}), "tools", "invalid_type"),
        ("/tools", json!([{"type": "retrieval"}]), "tools[0].type", "invalid_value"),
        ("/tools", json!([{"type": "custom", "custom": {}}]), "tools[0].type", "unsupported_parameter"),
        ("/tools", json!([tool("a b")]), "tools[0].function.name", "invalid_value"),
        ("/tools", json!([tool("a"), tool("a")]), "tools[1].function.name", "invalid_value"),
        ("/tools/0/function/strict", json!(true), "tools[0].function.strict", "unsupported_parameter"),
        ("/tools/0/function/parameters", json!("x"), "tools[0].function.parameters", "invalid_type"),
        ("/tool_choice", json!("sometimes"), "tool_choice", "invalid_value"),
        ("/tool_choice", tool("other"), "tool_choice.function.name", "invalid_value"),
        ("/max_tokens", json!(0), "max_tokens", "invalid_value"),
        ("/max_tokens", json!("many"), "max_tokens", "invalid_type"),
        ("/max_completion_tokens", json!(-1), "max_completion_tokens", "invalid_value"),
        ("/temperature", json!(2.5), "temperature", "invalid_value"),
        ("/temperature", json!("warm"), "temperature", "invalid_type"),
        ("/top_p", json!(-0.1), "top_p", "invalid_value"),
        ("/presence_penalty", json!(3), "presence_penalty", "invalid_value"),
        ("/frequency_penalty", json!(0.5), "frequency_penalty", "unsupported_parameter"),
        ("/seed", json!(1.5), "seed", "invalid_value"),
        ("/n", json!(2), "n", "unsupported_parameter"),
        ("/stop", json!(["a", "b", "c", "d", "e"]), "stop", "invalid_value"),
        ("/stop", json!([""]), "stop", "invalid_value"),
        ("/stop", json!([1]), "stop[0]", "invalid_type"),
        ("/logit_bias", json!({"99999999": 1}), "logit_bias", "invalid_value"),
        ("/logit_bias", json!({"5": 101}), "logit_bias.5", "invalid_value"),
        ("/top_logprobs", json!(2), "top_logprobs", "invalid_value"),
        ("/stream", json!("yes"), "stream", "invalid_type"),
        ("/stream_options", json!({"include_usage": true}), "stream_options", "invalid_value"),
        ("/response_format", json!({"type": "json_object"}), "response_format", "unsupported_parameter"),
        ("/modalities", json!(["text", "audio"]), "modalities", "unsupported_parameter"),
        ("/functions", json!([]), "functions", "unsupported_parameter"),
        ("/reasoning_effort", json!("high"), "reasoning_effort", "unsupported_parameter"),
        ("/store", json!(true), "store", "unsupported_parameter"),
        ("/chat_template_kwargs", json!({"mode": 1}), "chat_template_kwargs.mode", "unknown_parameter"),
        ("/temprature", json!(1), "temprature", "unknown_parameter"),
    ]
}

fn completions() -> Vec<Case> {
    vec![
        ("/prompt", Value::Null, "prompt", "missing_required_parameter"),
        ("/prompt", json!(""), "prompt", "invalid_value"),
        ("/prompt", json!([]), "prompt", "invalid_value"),
        ("/prompt", json!(["a", "b"]), "prompt", "unsupported_parameter"),
        ("/prompt", json!([1, -2]), "prompt[1]", "invalid_value"),
        ("/prompt", json!([1, "a"]), "prompt[1]", "invalid_value"),
        ("/prompt", json!([1, 4_000_000]), "prompt[1]", "invalid_value"),
        ("/prompt", json!(vec![1; 9000]), "prompt", "context_length_exceeded"),
        ("/echo", json!(true), "echo", "unsupported_parameter"),
        ("/suffix", json!("end"), "suffix", "unsupported_parameter"),
        ("/best_of", json!(3), "best_of", "unsupported_parameter"),
        ("/logprobs", json!(6), "logprobs", "invalid_value"),
        ("/messages", json!([]), "messages", "unknown_parameter"),
    ]
}

#[test]
fn each_is_named() {
    let server = start("--slots 1");
    let chat =
        json!({"model": MODEL, "messages": [user("hello")], "tools": [calculator()], "max_completion_tokens": 2});
    let completion = json!({"model": MODEL, "prompt": "hello", "max_tokens": 2});
    let all = chats().into_iter().map(|case| ("/v1/chat/completions", &chat, case));
    for (path, body, (pointer, value, param, code)) in
        all.chain(completions().into_iter().map(|case| ("/v1/completions", &completion, case)))
    {
        let body = with(body.clone(), pointer, value);
        let reply = server.post(path, &body);
        let error = reply.json()["error"].clone();
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{body}\n{error}");
        assert_eq!(reply.status, if code == "model_not_found" { 404 } else { 400 });
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().len() > 15, "{error}");
    }
    // What changes nothing is taken.
    let mut harmless = chat.clone();
    for (key, value) in [
        ("n", json!(1)),
        ("frequency_penalty", json!(0)),
        ("logit_bias", json!({})),
        ("response_format", json!({"type": "text"})),
        ("user", json!("anna")),
        ("metadata", json!({"a": "b"})),
        ("store", json!(false)),
        ("stop", Value::Null),
        ("tool_choice", Value::Null),
        ("seed", Value::Null),
    ] {
        harmless[key] = value;
    }
    assert_eq!(server.post("/v1/chat/completions", &harmless).status, 200);
    server.quiet();
}

/// JSON of any kind, small.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        Just(json!("user")),
        Just(json!("function")),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let key =
            prop_oneof![Just("type".to_string()), Just("text".to_string()), Just("role".to_string()), "[a-z]{1,6}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Reading a request never panics, and refuses with a parameter's name or reads it.
    #[test]
    fn anything_is_read_or_refused(
        field in prop::sample::select(vec![
            "model", "messages", "tools", "tool_choice", "stop", "logit_bias", "stream_options", "max_tokens", "prompt", "seed",
            "temperature", "top_logprobs", "chat_template_kwargs", "anything",
        ]),
        value in any_json(),
    ) {
        let served = gatedelta_server::request::Served {
            name: MODEL.into(),
            vocab: 2048,
            sampling: gatedelta::qwen::Sampling::GREEDY,
            max_tokens: 100,
        };
        let mut body = json!({"model": MODEL, "messages": [user("hello")]});
        body[field] = value.clone();
        if let Err(why) = gatedelta_server::request::chat::Chat::read(body, &served) {
            prop_assert!(why.param.is_some() && why.status.is_client_error());
        }
        let mut body = json!({"model": MODEL, "prompt": "hello"});
        body[field] = value;
        if let Err(why) = gatedelta_server::request::completion::Completion::read(body, &served) {
            prop_assert!(why.param.is_some() && why.status.is_client_error());
        }
    }
}
