//! Tokenizer, streaming text and chat template against what Python made of them.

use std::path::{Path, PathBuf};

use gatedelta::Error;
use gatedelta::qwen::{ChatTemplate, Config, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn models() -> [PathBuf; 2] {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    [dir.join("tiny-text"), dir.join("tiny-vision")]
}

fn expected(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("expected_text.json")).unwrap()).unwrap()
}

fn tokenizer(dir: &Path) -> Tokenizer {
    let config = Config::read(&dir.join("config.json")).unwrap();
    Tokenizer::read(&dir.join("tokenizer.json"), config.vocab).unwrap()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

#[test]
fn chats_render_and_encode_as_in_python() {
    for dir in models() {
        let template = ChatTemplate::read(&dir).unwrap().unwrap();
        let tokenizer = tokenizer(&dir);
        let expected = expected(&dir);
        let chats = expected["chat"].as_array().unwrap();
        assert!(chats.len() >= 4);
        for chat in chats {
            let thinking = chat.get("enable_thinking").and_then(Value::as_bool);
            let prompt = chat["add_generation_prompt"].as_bool().unwrap();
            let text = template.render(&chat["messages"], chat.get("tools"), prompt, thinking).unwrap();
            assert_eq!(text, chat["rendered"].as_str().unwrap());
            assert_eq!(tokenizer.encode(&text).unwrap(), ids(&chat["ids"]));
        }
    }
}

#[test]
fn texts_encode_and_decode_as_in_python() {
    for dir in models() {
        let tokenizer = tokenizer(&dir);
        let expected = expected(&dir);
        let cases = expected["encode"].as_array().unwrap();
        assert!(cases.len() >= 9);
        for case in cases {
            let got = tokenizer.encode(case["text"].as_str().unwrap()).unwrap();
            assert_eq!(got, ids(&case["ids"]), "{case}");
            let decoded = case["decoded"].as_str().unwrap();
            assert_eq!(tokenizer.decode(&got, true).unwrap(), decoded);
            let bytes: Vec<u8> = got.iter().flat_map(|id| tokenizer.bytes(*id).unwrap()).copied().collect();
            assert_eq!(String::from_utf8_lossy(&bytes), decoded);
        }
    }
}

#[test]
fn arguments_may_be_a_json_string() {
    let dir = &models()[0];
    let template = ChatTemplate::read(dir).unwrap().unwrap();
    let mut chat = expected(dir)["chat"][2].clone();
    let rendered = chat["rendered"].as_str().unwrap().to_string();
    let arguments = &mut chat["messages"][1]["tool_calls"][0]["function"]["arguments"];
    *arguments = Value::from(arguments.to_string());
    assert_eq!(template.render(&chat["messages"], chat.get("tools"), true, None).unwrap(), rendered);
    for broken in ["{", "[1]", "", "\"text\""] {
        chat["messages"][1]["tool_calls"][0]["function"]["arguments"] = Value::from(broken);
        let e = template.render(&chat["messages"], chat.get("tools"), true, None).unwrap_err();
        assert!(matches!(&e, Error::Argument { what, .. } if what == "messages[1].tool_calls[0].arguments"), "{e}");
    }
}

/// Each text is what Python's jinja2 3.1 gives with `json.dumps(ensure_ascii=False)` as `tojson`.
#[test]
fn values_are_written_as_python_writes_them() {
    let value = json!({
        "b": true, "n": null, "i": -3, "big": 18446744073709551615u64, "f": 1.0, "e": 1e16, "s": 1e-5, "x": 1e22,
        "d": 0.1, "t": "it's \"q\" <&> é\u{7f}\u{1}\n\\", "l": [1, "a'b", [], {}], "m": {"z": 1, "a": [false]}
    });
    for (template, python) in [
        ("{{ m.b }} {{ m.n }} {{ m.i }} {{ m.f }}", "True None -3 1.0"),
        ("{{ m.e }} {{ m.s }} {{ m.x }} {{ m.d }}", "1e+16 1e-05 1e+22 0.1"),
        ("{{ m.big | string }}|{{ m.b | string }}", "18446744073709551615|True"),
        ("{{ m.l }}", "[1, \"a'b\", [], {}]"),
        ("{{ m.m }}", "{'z': 1, 'a': [False]}"),
        ("{{ m.m | tojson }}", "{\"z\": 1, \"a\": [false]}"),
        ("{{ m.m | tojson(sort_keys=true) }}", "{\"a\": [false], \"z\": 1}"),
        ("{{ m.m | tojson(indent=2) }}", "{\n  \"z\": 1,\n  \"a\": [\n    false\n  ]\n}"),
        ("{{ m.m | tojson(separators=(',', ':')) }}", "{\"z\":1,\"a\":[false]}"),
        ("{{ m.t | tojson }}", "\"it's \\\"q\\\" <&> é\u{7f}\\u0001\\n\\\\\""),
        ("{{ 'é🙂' | tojson(ensure_ascii=true) }}", "\"\\u00e9\\ud83d\\ude42\""),
        ("{{ [m.e, m.f, m.n, m.big] | tojson }}", "[1e+16, 1.0, null, 18446744073709551615]"),
        ("{{ m.nothing }}|{{ m.nothing is defined }}", "|False"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("  {% if true %}\n  x\n  {% endif %}\ny\n", "  x\ny"),
    ] {
        let t = ChatTemplate::new(&template.replace("m.", "messages[0]."), "t").unwrap();
        assert_eq!(t.render(&json!([value]), None, false, None).unwrap(), python, "{template}");
    }
}

#[test]
fn a_template_that_raises_or_is_broken_is_an_error() {
    let dir = &models()[0];
    let template = ChatTemplate::read(dir).unwrap().unwrap();
    for (messages, word) in [
        (json!([]), "no messages"),
        (json!([{"role": "system", "content": "x"}]), "no user turn"),
        (json!([{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]), "unknown role robot"),
    ] {
        let e = template.render(&messages, None, true, None).unwrap_err().to_string();
        assert!(e.contains(word) && e.contains("chat_template.jinja"), "{e}");
    }
    let e = template.render(&json!({"role": "user"}), None, true, None).unwrap_err();
    assert!(matches!(e, Error::Argument { ref what, .. } if what == "messages"), "{e}");
    let e = ChatTemplate::new("a\n{% if %}", "broken.jinja").unwrap_err().to_string();
    assert!(e.contains("broken.jinja") && e.contains("line 2"), "{e}");
    // Endless recursion and unknown filters end as errors too.
    for source in ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1 | no_such_filter }}", "{{ no_such() }}"] {
        let e = ChatTemplate::new(source, "t").and_then(|t| t.render(&json!([]), None, false, None)).unwrap_err();
        assert!(matches!(e, Error::Load { .. }), "{e}");
    }
    // So do templates that do not end, and those that write without end.
    let many = "{% for i in range(99999) %}";
    for (source, word) in [
        (format!("{many}{many}{{% endfor %}}{{% endfor %}}"), "does not end within"),
        (format!("{many}{{{{ 'x' * 9999 }}}}{{% endfor %}}"), "writes more than"),
    ] {
        let e = ChatTemplate::new(&source, "t").unwrap().render(&json!([]), None, false, None).unwrap_err();
        assert!(matches!(e, Error::Load { .. }) && e.to_string().contains(word), "{e}");
    }
}

#[test]
fn a_template_may_live_in_the_tokenizer_config() {
    let dir = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::read(dir.path()).unwrap().is_none());
    let named = json!([{"name": "other", "template": "no"}, {"name": "default", "template": "{{ eos_token }}yes"}]);
    for (template, text) in [(json!("{{ eos_token }}{{ messages[0] }}"), "<e>a"), (named, "<e>yes")] {
        let config = json!({"chat_template": template, "eos_token": {"content": "<e>", "special": true}});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let template = ChatTemplate::read(dir.path()).unwrap().unwrap();
        assert_eq!(template.render(&json!(["a"]), None, false, None).unwrap(), text);
    }
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let dir = &models()[0];
    let e = Tokenizer::read(&dir.join("tokenizer.json"), 300).unwrap_err();
    let text = e.to_string();
    assert!(matches!(e, Error::Load { .. }) && text.contains("the model has 300"), "{text}");
    let other = tempfile::tempdir().unwrap();
    let path = other.path().join("tokenizer.json");
    let json = std::fs::read_to_string(dir.join("tokenizer.json")).unwrap();
    for broken in [&json[..json.len() / 2], "{}", "", "[1, 2]"] {
        std::fs::write(&path, broken).unwrap();
        assert!(matches!(Tokenizer::read(&path, 512), Err(Error::Load { .. })));
    }
    let mut value: Value = serde_json::from_str(&json).unwrap();
    value["decoder"] = Value::Null;
    std::fs::write(&path, value.to_string()).unwrap();
    assert!(Tokenizer::read(&path, 512).unwrap_err().to_string().contains("ByteLevel"));
}

#[test]
fn ids_without_a_token_are_refused() {
    let tokenizer = tokenizer(&models()[0]);
    for id in [511, 512, u32::MAX] {
        assert!(matches!(tokenizer.decode(&[0, id], true), Err(Error::Argument { .. })), "{id}");
        assert!(tokenizer.bytes(id).is_none());
    }
}

/// The pieces of a stream, in order.
fn pieces(tokenizer: &Tokenizer, ids: &[u32], special: bool) -> Vec<String> {
    let mut stream = tokenizer.stream(special);
    let mut out: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    out.push(stream.finish());
    out
}

proptest! {
    #[test]
    fn a_stream_of_valid_text_never_splits_a_character(text in "\\PC{0,40}|[a-z日本語🙂é ]{0,40}") {
        let dir = &models()[0];
        let tokenizer = tokenizer(dir);
        let library = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        let pieces = pieces(&tokenizer, &ids, true);
        let whole = library.decode(&ids, false).unwrap();
        prop_assert_eq!(&pieces.concat(), &whole);
        let count = |s: &str| s.matches('\u{FFFD}').count();
        prop_assert_eq!(count(&pieces.concat()), count(&text));
    }

    #[test]
    fn a_stream_of_any_ids_is_the_whole_decode(ids in prop::collection::vec(0u32..477, 0..60), special: bool) {
        let dir = &models()[0];
        let tokenizer = tokenizer(dir);
        let library = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        let pieces = pieces(&tokenizer, &ids, special);
        prop_assert_eq!(pieces.concat(), library.decode(&ids, !special).unwrap());
    }
}
