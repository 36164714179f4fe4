use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn tools() -> Arc<[Spec]> {
    let spec = |name: &str, properties: Value| Spec {
        name: name.to_string(),
        description: String::new(),
        parameters: json!({"type": "object", "properties": properties}),
    };
    Arc::new([
        spec("note", json!({"text": {"type": "string"}, "tag": {"type": "string"}})),
        spec(
            "add",
            json!({"a": {"type": "integer"}, "b": {"type": "number"}, "exact": {"type": "boolean"}, "list": {"type": "array"}}),
        ),
        spec("clock", json!({})),
    ])
}

/// Neighbouring deltas joined.
fn join(events: impl IntoIterator<Item = Event>) -> Vec<Event> {
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

fn parse(text: &str, reasoning: bool) -> Vec<Event> {
    let mut parser = Parser::new(tools(), reasoning);
    let mut events = parser.push(text);
    events.extend(parser.finish());
    assert_eq!(parser.raw(), text);
    join(events)
}

fn text(text: &str) -> Event {
    Event::Text(text.to_string())
}

fn call(name: &str, arguments: Value) -> [Event; 2] {
    let arguments = arguments.as_object().unwrap().clone();
    [Event::Opening(name.to_string()), Event::Call(Call { name: name.to_string(), arguments })]
}

#[test]
fn prose_calls_nothing() {
    let call = "<tool_call>\n<function=clock>\n</function>\n</tool_call>\n<function=clock></function> <think>";
    let mut parser = Parser::prose(true);
    let mut events = parser.push(&format!("why\n</think>\n\n{call}"));
    events.extend(parser.finish());
    assert_eq!(join(events), [Event::Reasoning("why".into()), text(call)]);
}

#[test]
fn the_form_of_the_template() {
    let out = "why\n</think>\n\nLooking.\n\n<tool_call>\n<function=note>\n<parameter=text>\na\nb\n</parameter>\n\
        <parameter=tag>\n7\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n\
        <parameter=exact>\nTrue\n</parameter>\n<parameter=list>\n[1, {\"x\": null}]\n</parameter>\n</function>\n</tool_call>";
    let mut expected = vec![Event::Reasoning("why".into()), text("Looking.")];
    expected.extend(call("note", json!({"text": "a\nb", "tag": "7"})));
    expected.extend(call("add", json!({"a": 3, "exact": true, "list": [1, {"x": null}]})));
    assert_eq!(parse(out, true), expected);
}

#[test]
fn prose_alone() {
    assert_eq!(parse("\n\n a < b <i>x</i>\n\n b \n", false), [text("a < b <i>x</i>\n\n b")]);
    assert_eq!(parse("", false), []);
    assert_eq!(parse("never ends", true), [Event::Reasoning("never ends".into())]);
    assert_eq!(parse("héllo <é <ü", false), [text("héllo <é <ü")]);
}

#[test]
fn think_markers_count_at_the_start_only() {
    let expected = [Event::Reasoning("r".into()), text("t")];
    for (out, open) in [("r</think>t", true), ("<think>r</think>t", false), ("<think>\nr\n</think>\n\nt", true)] {
        assert_eq!(parse(out, open), expected, "{out}");
    }
    assert_eq!(parse("\n</think>\n\nt", false), [text("t")]);
    assert_eq!(parse("say <think> or </think>.", false), [text("say <think> or </think>.")]);
}

#[test]
fn a_call_ends_reasoning() {
    let mut expected = vec![Event::Reasoning("I need the time.".into())];
    expected.extend(call("clock", json!({})));
    assert_eq!(parse("I need the time.\n<tool_call>\n<function=clock>\n</function>\n</tool_call>", true), expected);
    let mention = "a <tool_call> is how I would call";
    assert_eq!(parse(mention, true), [Event::Reasoning(mention.into())]);
}

#[test]
fn missing_line_ends_and_tags() {
    let expected = call("add", json!({"a": 1, "b": 2.5}));
    for out in [
        "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2.5</parameter></function></tool_call>",
        "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2.5</parameter></function>",
        "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2.5</function></tool_call>",
        "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2.5</parameter></tool_call>",
        "<function=add><parameter=a>1</parameter><parameter=b>2.5</parameter></function></tool_call>",
        "<tool_call>\r\n<function=\"add\">\r\n<parameter=a>\r\n1\r\n</parameter> <parameter=b>\n 2.5 \n</parameter></function></tool_call>\n\n",
        "<tool_call>\n<function=add\n<parameter=a\n1\n</parameter>\n<parameter=b>\n2.5</parameter></function></tool_call>",
        "<tool_call>\n<function=add>\n{\"a\": 1, \"b\": 2.5}\n</function>\n</tool_call>",
    ] {
        assert_eq!(parse(out, false), expected, "{out}");
    }
}

#[test]
fn values_hold_markup() {
    for value in [
        "a < b && c > d &lt;",
        "x</parameter>y",
        "x\n</parameter>\ny\n</parameter>",
        "<parameter=unknown>\n1\n</parameter>",
        "</parameter>\n<parameter=unknown>",
        "</parameter>\n<parameter=text>",
        "</function></tool_call>",
        "<tool_call><function=x><parameter=y>1</parameter></function></tool_call> is how",
        "</think><think><|im_end|>",
        "<tool_call>",
        "\n\n",
        "",
    ] {
        let out =
            format!("<tool_call>\n<function=note>\n<parameter=text>\n{value}\n</parameter>\n</function>\n</tool_call>");
        assert_eq!(parse(&out, false), call("note", json!({ "text": value })), "{value}");
    }
}

#[test]
fn text_after_a_call_is_kept() {
    let mut expected = call("clock", json!({})).to_vec();
    expected.push(text("and <b> then"));
    expected.extend(call("clock", json!({})));
    expected.push(text("end"));
    let one = "<tool_call><function=clock></function></tool_call>";
    assert_eq!(parse(&format!("{one} and <b> then {one}end\n"), false), expected);
}

#[test]
fn what_cannot_be_called_is_reported_with_its_text() {
    for (out, name, why) in [
        ("<tool_call>", None, "cut off"),
        ("<tool_call>\n<func", None, "cut off"),
        ("<tool_call>\n<function=no", None, "cut off"),
        ("<tool_call><function=note><parameter=text>half", Some("note"), "cut off"),
        ("<tool_call><function=note><parameter=text>half</parameter>", Some("note"), "cut off"),
        ("<tool_call><function=a b><parameter=x>1</parameter></function></tool_call>", None, "not the name"),
        ("<tool_call><function=ééé></function></tool_call>", None, "not the name"),
        ("<tool_call><function=note>text: 1</function></tool_call>", Some("note"), "expected <parameter=NAME>"),
        ("<tool_call><function=note>{\"text\": }</function></tool_call>", Some("note"), "JSON"),
    ] {
        match parse(out, false).last() {
            Some(Event::Broken(broken)) => {
                assert_eq!((broken.name.as_deref(), broken.raw.as_str()), (name, out));
                assert!(broken.why.contains(why), "{}", broken.why);
            }
            other => panic!("{out}: {other:?}"),
        }
    }
}

#[test]
fn values_are_typed_by_the_schema() {
    let value = |key: &str, value: &str| {
        let out = format!("<tool_call><function=add><parameter={key}>\n{value}\n</parameter></function></tool_call>");
        match parse(&out, false).pop() {
            Some(Event::Call(call)) => call.arguments[key].clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(value("a", "3"), json!(3));
    assert_eq!(value("a", " 3.0 "), json!(3));
    assert_eq!(value("a", "three"), json!("three"));
    assert_eq!(value("a", "1e400"), json!("1e400"));
    assert_eq!(value("b", "3"), json!(3));
    assert_eq!(value("exact", "False"), json!(false));
    assert_eq!(value("exact", "true"), json!(true));
    assert_eq!(value("list", "None"), json!(null));
    assert_eq!(value("new", "\"x\""), json!("x"));
    assert_eq!(value("new", "x"), json!("x"));
    let deep = "[".repeat(100_000);
    assert_eq!(value("list", &deep), json!(deep));
    let types = |schema: Value| body::types(Some(&schema)).join(" ");
    assert_eq!(types(json!({"anyOf": [{"type": "string"}, {"type": ["null", "integer"]}]})), "string null integer");
    assert_eq!(types(json!({"enum": ["x", "y"]})), "string");
    assert_eq!(types(json!({"enum": ["x", 1]})), "");
}

#[test]
fn time_grows_with_length_alone() {
    let patterns = [
        "<",
        "<tool_call>",
        "<tool_call> ",
        "</parameter>",
        "</parameter>\n<parameter=a>",
        "</function>",
        "\n",
        " <function=note",
        "x",
        "</parameter></function></tool_call>",
    ];
    for head in ["", "<tool_call><function=note><parameter=text>"] {
        for pattern in patterns {
            let pieces = 400_000 / pattern.len();
            let begin = Instant::now();
            let mut parser = Parser::new(tools(), false);
            parser.push(head);
            for _ in 0..pieces {
                for at in 0..pattern.len() {
                    parser.push(&pattern[at..at + 1]);
                }
            }
            parser.finish();
            // Milliseconds when linear, minutes when quadratic.
            assert!(begin.elapsed().as_secs() < 10, "{head}{pattern:?}: {:?}", begin.elapsed());
        }
    }
}

/// Text made of what the parser looks for, and near misses of it.
fn markup() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        prop::sample::select(vec![
            "<tool_call>",
            "</tool_call>",
            "<function=note>",
            "<function=add>",
            "<function=",
            "</function>",
            "<parameter=text>",
            "<parameter=tag>",
            "<parameter=zzz>",
            "<parameter=",
            "</parameter>",
            "<think>",
            "</think>",
            "<",
            "</",
            ">",
            "\n",
            " ",
            "\r\n",
            "<tool_",
            "é",
            "日本",
            "🙂",
            "\u{301}",
            "\0",
            "{",
            "}",
            "\"",
            "1",
            "True",
        ])
        .prop_map(str::to_string),
        "[a-z <>/=\\n]{0,6}",
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// A value that the format can carry: what looks like the end of the call with another call after it is read as that.
fn value() -> impl Strategy<Value = String> {
    markup().prop_filter("ambiguous in the format itself", |value| {
        let flat: String = value.split_ascii_whitespace().collect();
        !flat.contains("<tool_call><function=") && !flat.contains("</parameter><parameter=t")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_split_gives_the_same_events(out in markup(), reasoning: bool, cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let whole = parse(&out, reasoning);
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(out.len() + 1)).filter(|&at| out.is_char_boundary(at)).collect();
        places.extend([0, out.len()]);
        places.sort_unstable();
        let mut parser = Parser::new(tools(), reasoning);
        let mut events = Vec::new();
        for pair in places.windows(2) {
            events.extend(parser.push(&out[pair[0]..pair[1]]));
        }
        events.extend(parser.finish());
        prop_assert_eq!(join(events), whole.clone());

        let mut parser = Parser::new(tools(), reasoning);
        let mut events: Vec<Event> = out.chars().flat_map(|c| parser.push(c.encode_utf8(&mut [0; 4]))).collect();
        events.extend(parser.finish());
        prop_assert_eq!(join(events), whole);
    }

    #[test]
    fn any_text_is_taken(out in any::<String>(), reasoning: bool) {
        parse(&out, reasoning);
    }

    #[test]
    fn calls_come_back_as_written(before in "[a-z .]{0,20}", calls in prop::collection::vec((value(), value()), 1..4)) {
        let mut out = before.clone();
        let mut expected: Vec<Event> = Some(before.trim()).filter(|text| !text.is_empty()).map(text).into_iter().collect();
        for (one, two) in &calls {
            out += &format!("\n<tool_call>\n<function=note>\n<parameter=text>\n{one}\n</parameter>\n\
                <parameter=tag>\n{two}\n</parameter>\n</function>\n</tool_call>");
            expected.extend(call("note", json!({"text": one, "tag": two})));
        }
        prop_assert_eq!(parse(&out, false), expected);
    }

    #[test]
    fn prose_is_never_lost(out in "[a-z <>/\\n]{0,80}") {
        prop_assert_eq!(parse(&out, false), Some(out.trim()).filter(|text| !text.is_empty()).map(text).into_iter().collect::<Vec<_>>());
    }
}
