//! What requests give: chats, calls, streams, log-probabilities, usage, limits.

use serde_json::{Value, json};

use crate::util::{Running, calculator, endless, first_event, loaded, start, start_with, system, user};

const SUM: &str = "what is 12 * (3 + 4)";

fn ask(extra: Value) -> Value {
    let mut body = json!({
        "messages": [system(), user(SUM)], "tools": [calculator()], "temperature": 0, "max_tokens": 200,
    });
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The message of an answer that came whole.
fn message(answer: &Value) -> &Value {
    &answer["choices"][0]["message"]
}

#[test]
fn a_conversation_with_a_tool() {
    let server = start("--slots 2");
    let first = server.chat(ask(json!({}))).ok();
    assert_eq!((&first["object"], &first["model"]), (&json!("chat.completion"), &json!("gatedelta-agent")));
    assert_eq!(first["choices"][0]["finish_reason"], "tool_calls", "{first}");
    let call = message(&first)["tool_calls"][0].clone();
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("calculator")));
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["expression"].as_str().unwrap().contains("12"), "{arguments}");
    let usage = &first["usage"];
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    let wrote = usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"].as_u64().unwrap(), prompt + wrote);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);

    let mut said = message(&first).clone();
    let result = json!({"role": "tool", "tool_call_id": call["id"], "content": "84"});
    said.as_object_mut().unwrap().remove("refusal");
    let messages = json!([system(), user(SUM), said, result]);
    let second = server.chat(ask(json!({"messages": messages}))).ok();
    assert!(message(&second)["content"].as_str().unwrap().contains("84"), "{second}");
    assert_eq!(second["choices"][0]["finish_reason"], "stop");
    // What was read and written for the first question is still there.
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= prompt, "{second}");
    assert_eq!(server.metric("gatedelta_cached_tokens_total") as u64, cached);
    server.quiet();
}

/// The message that the deltas of a stream add up to, and its last chunk with a choice.
fn put_together(chunks: &[Value]) -> (Value, Value) {
    let mut message = json!({"content": null, "refusal": null});
    let mut calls = Vec::new();
    for chunk in chunks {
        assert_eq!(chunk["id"], chunks[0]["id"]);
        for (key, value) in chunk["choices"][0]["delta"].as_object().into_iter().flatten() {
            match (key.as_str(), value) {
                ("tool_calls", Value::Array(more)) => calls.extend(more.clone()),
                (key, Value::String(text)) => {
                    let all = message[key].as_str().unwrap_or_default().to_string() + text;
                    message[key] = json!(all);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    for (i, call) in calls.iter_mut().enumerate() {
        assert_eq!(call["index"], i);
        call.as_object_mut().unwrap().remove("index");
        call.as_object_mut().unwrap().remove("id");
    }
    if !calls.is_empty() {
        message["tool_calls"] = json!(calls);
    }
    let last = chunks.iter().rev().find(|chunk| chunk["choices"][0].is_object()).unwrap();
    (message, last["choices"][0].clone())
}

#[test]
fn a_stream_put_together_is_the_whole() {
    let server = start("--slots 1");
    let hello = json!({"messages": [system(), user("hello")], "temperature": 0});
    for body in [ask(json!({})), hello, ask(json!({"messages": [user("send an email to Anna")]}))] {
        let whole = server.chat(body.clone()).ok();
        let mut streamed = body;
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let chunks = server.chat(streamed).chunks();
        let (usage, answer) = chunks.split_last().unwrap();
        assert_eq!((&usage["choices"], &usage["object"]), (&json!([]), &json!("chat.completion.chunk")));
        assert_eq!(usage["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
        assert!(answer.iter().all(|chunk| chunk["usage"].is_null()));
        let (mut streamed, last) = put_together(answer);
        let mut expected = message(&whole).clone();
        for call in expected.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            call.as_object_mut().unwrap().remove("id");
        }
        if expected["content"].is_null() {
            streamed["content"] = Value::Null;
        }
        assert_eq!(streamed, expected);
        assert_eq!(last["finish_reason"], whole["choices"][0]["finish_reason"]);
    }
}

#[test]
fn a_call_can_be_demanded_and_forbidden() {
    let server = start("--slots 1");
    let clock =
        json!({"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}});
    let tools = json!([calculator(), clock]);
    let called = |extra: Value| {
        let answer = server.chat(ask(extra)).ok();
        let calls = message(&answer)["tool_calls"].as_array().cloned().unwrap_or_default();
        calls.iter().map(|call| call["function"]["name"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let hello = json!([system(), user("hello")]);
    for name in ["clock", "calculator"] {
        let choice = json!({"type": "function", "function": {"name": name}});
        let names = called(json!({"tools": tools, "tool_choice": choice, "messages": hello}));
        assert_eq!(names.first().map(String::as_str), Some(name));
    }
    let names = called(json!({"tools": tools, "tool_choice": "required", "messages": hello}));
    assert!(!names.is_empty());
    let names = called(json!({"tools": tools, "tool_choice": "required"}));
    assert_eq!(names.first().map(String::as_str), Some("calculator"));
    assert!(called(json!({"tools": tools, "tool_choice": "none"})).is_empty());
    assert_eq!(called(json!({"tools": tools, "parallel_tool_calls": false})), ["calculator"]);
}

#[test]
fn an_answer_ends_where_the_request_says() {
    let server = start("--slots 1");
    let text = |answer: &Value| answer["choices"][0]["text"].as_str().unwrap().to_string();
    let full = server.complete(endless(24, false)).ok();
    assert_eq!(full["usage"]["completion_tokens"], 24);
    assert_eq!(
        (&full["choices"][0]["finish_reason"], &full["choices"][0]["stop_reason"]),
        (&json!("length"), &json!("max_tokens"))
    );
    let whole = text(&full);
    // From the middle of the text, so that it comes up inside.
    let stop: String = whole.chars().skip(whole.chars().count() / 2).take(3).collect();
    let mut body = endless(24, false);
    body["stop"] = json!([stop, "this does not come up"]);
    let stopped = server.complete(body.clone()).ok();
    assert_eq!(text(&stopped), whole[..whole.find(&stop).unwrap()]);
    assert_eq!(
        (&stopped["choices"][0]["finish_reason"], &stopped["choices"][0]["stop_reason"]),
        (&json!("stop"), &json!(stop))
    );
    body["stream"] = json!(true);
    let streamed: String =
        server.complete(body).chunks().iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(streamed, text(&stopped));

    // The context ends it too.
    let context = loaded().recovery.model().memory().context;
    let mut long = endless(1 << 20, false);
    long["prompt"] = json!(vec![300; context as usize - 3]);
    let full = server.complete(long).ok();
    assert_eq!(full["choices"][0]["stop_reason"], "context", "{full}");
}

#[test]
fn an_end_can_be_passed_over() {
    let server = start("--slots 1");
    let tokens = |body: Value| server.complete(body).ok()["usage"]["completion_tokens"].as_u64().unwrap();
    let prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    let body = json!({"prompt": prompt, "max_tokens": 100, "temperature": 0});
    assert!(tokens(body.clone()) < 100);
    let mut on = body;
    on["ignore_eos"] = json!(true);
    assert_eq!(tokens(on), 100);
}

#[test]
fn the_same_seed_gives_the_same_answer() {
    let server = start("--slots 1");
    let answer = |seed: i64| {
        let mut body = endless(24, false);
        // Nothing tells which digits follow: however sure a model is of what it knows, it has to draw here.
        body["prompt"] = json!("<|im_start|>user\nmy phone number is ");
        body["temperature"] = json!(1.9);
        body["top_p"] = json!(1.0);
        body["seed"] = json!(seed);
        server.complete(body).ok()["choices"][0]["text"].clone()
    };
    assert_eq!(answer(7), answer(7));
    assert_ne!(answer(7), answer(8));
    assert_eq!(answer(-1), answer(-1));
}

#[test]
fn log_probabilities() {
    let server = start("--slots 1");
    let body = ask(
        json!({"tool_choice": "none", "logprobs": true, "top_logprobs": 3, "max_tokens": 6, "messages": [user("hello")]}),
    );
    let answer = server.chat(body.clone()).ok();
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(tokens.len() as u64, answer["usage"]["completion_tokens"].as_u64().unwrap());
    let mut bytes = Vec::new();
    for token in &tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the token is the likeliest.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
        let logprobs: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] <= 0.0, "{logprobs:?}");
        assert!(logprobs.iter().map(|l| l.exp()).sum::<f64>() <= 1.0 + 1e-9);
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
    }
    let content = message(&answer)["content"].as_str().unwrap();
    assert!(String::from_utf8(bytes).unwrap().starts_with(content), "{answer}");
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let chunks = server.chat(streamed).chunks();
    let of_chunks: Vec<Value> = chunks
        .iter()
        .flat_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(of_chunks, tokens);

    let mut body = endless(5, false);
    body["logprobs"] = json!(2);
    let answer = server.complete(body).ok();
    let table = &answer["choices"][0]["logprobs"];
    for column in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(table[column].as_array().unwrap().len(), 5, "{column}");
    }
    let text: String = table["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(answer["choices"][0]["text"], text);
}

#[test]
fn favoured_tokens_come() {
    let server = start("--slots 1");
    let mut body = endless(4, false);
    body["logit_bias"]["300"] = json!(100);
    let answer = server.complete(body).ok();
    let token =
        server.complete(json!({"prompt": [1], "max_tokens": 1, "temperature": 0, "logit_bias": {"300": 100}})).ok();
    let token = token["choices"][0]["text"].as_str().unwrap();
    assert_eq!(answer["choices"][0]["text"], token.repeat(4));
}

#[test]
fn what_is_too_much_waits_or_is_refused() {
    let server = start("--slots 1 --queue 1");
    let mut first = server.open("/v1/completions", &endless(4000, true));
    first_event(&mut first);
    assert_eq!(server.metric("gatedelta_requests_running"), 1.0);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.complete(endless(2, false)));
        while server.metric("gatedelta_requests_waiting") < 1.0 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let refused = server.complete(endless(2, false));
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")));
        assert!((1..=60).contains(&refused.retry_after.unwrap()));
        drop(first);
        // The slot goes to the one that waited.
        assert_eq!(waiting.join().unwrap().ok()["usage"]["completion_tokens"], 2);
    });
    server.quiet();
    assert_eq!(server.metric("gatedelta_answers_total{end=\"cancelled\"}"), 1.0);
}

#[test]
fn time_ends_an_answer() {
    let server = start("--slots 1 --time-limit 0.5");
    let answer = server.complete(endless(4000, false)).ok();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &json!("time_limit")));
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    let mut first = server.open("/v1/completions", &endless(4000, true));
    first_event(&mut first);
    // Its time is over before, or just as, the first one's slot is free.
    let second = server.complete(endless(4000, false));
    assert!([200, 504].contains(&second.status), "{}", second.text);
}

#[test]
fn long_prompts_do_not_stop_the_others() {
    let server = start("--slots 2");
    let mut first = server.open("/v1/completions", &endless(4000, true));
    first_event(&mut first);
    let wrote = server.metric("gatedelta_written_tokens_total");
    let mut long = endless(1, false);
    long["prompt"] = json!(vec![300; 2000]);
    server.complete(long).ok();
    let pieces = server.metric("gatedelta_read_seconds_count");
    let meanwhile = server.metric("gatedelta_written_tokens_total") - wrote;
    assert!(pieces >= 2000.0 / 64.0 && meanwhile >= 25.0, "{pieces} pieces, {meanwhile} tokens");
}

#[test]
fn around_the_answers() {
    let server = start("--slots 1");
    let models = server.get("/v1/models").ok();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("gatedelta-agent")));
    assert_eq!(server.get("/v1/models/gatedelta-agent").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/other").json()["error"]["code"], "model_not_found");
    assert_eq!(server.get("/health").ok(), json!({"status": "ok"}));
    assert_eq!(server.get("/v1/embeddings").json()["error"]["code"], "unknown_url");
    assert_eq!(server.get("/v1/chat/completions").status, 405);
    assert_eq!(server.metric("gatedelta_http_requests_total{path=\"/health\",status=\"200\"}"), 1.0);
    let text = server.get("/metrics").text;
    for name in ["gatedelta_requests_running", "gatedelta_first_token_seconds_bucket", "gatedelta_prompt_tokens_total"]
    {
        assert!(text.contains(name), "{name}");
    }
}

#[test]
fn the_key_is_needed() {
    let key = "a-key-of-twenty-characters";
    let mut server = start_with("--slots 1", Some(key));
    assert_eq!(server.complete(endless(2, false)).status, 200);
    for wrong in [None, Some("a-key-of-twenty-character"), Some("")] {
        server.key = wrong.map(str::to_string);
        for refused in [server.complete(endless(2, false)), server.get("/v1/models"), server.get("/metrics")] {
            assert_eq!((refused.status, &refused.json()["error"]["code"]), (401, &json!("invalid_api_key")));
        }
        assert_eq!(server.get("/health").status, 200);
    }
}

#[test]
fn other_hosts_are_not_served() {
    let server: Running = start("--slots 1");
    for (host, status) in [("localhost", "200"), ("127.0.0.1:1", "200"), ("evil.example", "403"), ("", "403")] {
        let request = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let reply = server.raw(request.as_bytes());
        assert!(reply.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {reply}");
    }
}
