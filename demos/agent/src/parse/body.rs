//! The inside of a call: `<parameter=KEY>` blocks, cut apart and typed.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{CLOSE_PARAMETER, NAME_LIMIT, is_name};

const OPEN_PARAMETER: &str = "<parameter=";

/// The arguments written in `body`. `schema` is the JSON schema of the tool's parameters, where the tool is known.
///
/// # Errors
/// What is wrong, in words for the model.
pub fn arguments(body: &str, schema: Option<&Value>) -> Result<Map<String, Value>, String> {
    let properties = schema.and_then(|schema| schema.get("properties")).and_then(Value::as_object);
    let mut arguments = Map::new();
    let mut given = HashSet::new();
    let mut rest = body.trim_ascii();
    if rest.starts_with('{') {
        // Some models write all arguments as one JSON object.
        return serde_json::from_str(rest).map_err(|why| format!("its arguments are not valid JSON: {why}"));
    }
    while !rest.is_empty() {
        let Some((key, value)) = opening(rest) else {
            let found: String = rest.chars().take(40).collect();
            return Err(format!("expected <parameter=NAME>, found {found:?}"));
        };
        given.insert(key);
        let follows = |text: &str| {
            opening(text).is_some_and(|(key, _)| {
                !given.contains(key) && properties.is_none_or(|properties| properties.contains_key(key))
            })
        };
        let (text, after) = cut(value, follows);
        let schema = properties.and_then(|properties| properties.get(key));
        arguments.insert(key.to_string(), typed(unwrap_lines(text), schema));
        rest = after;
    }
    Ok(arguments)
}

/// If `text` begins with `<parameter=KEY>`: the key and what comes after.
fn opening(text: &str) -> Option<(&str, &str)> {
    let text = text.strip_prefix(OPEN_PARAMETER)?;
    let end = text.bytes().take(NAME_LIMIT + 3).position(|b| matches!(b, b'>' | b'\n'))?;
    let key = text[..end].trim_ascii();
    let key = key.strip_prefix('"').and_then(|key| key.strip_suffix('"')).unwrap_or(key);
    // A line end in place of `>` is left to be taken off with the value's first.
    let after = if text.as_bytes()[end] == b'>' { &text[end + 1..] } else { &text[end..] };
    is_name(key).then_some((key, after))
}

/// Cuts the value off the front of `text`: up to the first `</parameter>` that the next parameter follows, else up to the
/// last one, else all of it.
fn cut(text: &str, follows: impl Fn(&str) -> bool) -> (&str, &str) {
    let mut last = text.len();
    for (at, _) in text.match_indices(CLOSE_PARAMETER) {
        let after = text[at + CLOSE_PARAMETER.len()..].trim_ascii_start();
        if follows(after) {
            return (&text[..at], after);
        }
        last = at;
    }
    (&text[..last], "")
}

/// Takes off the line end after the opening tag and the one before the closing tag.
fn unwrap_lines(text: &str) -> &str {
    let text = text.strip_prefix("\r\n").or_else(|| text.strip_prefix('\n')).unwrap_or(text);
    text.strip_suffix("\r\n").or_else(|| text.strip_suffix('\n')).unwrap_or(text)
}

/// A value by its schema: a string stays as it is, anything else is tried as JSON, then as a Python literal, then kept as a
/// string.
fn typed(text: &str, schema: Option<&Value>) -> Value {
    let types = types(schema);
    let word = text.trim_ascii();
    if types.contains(&"string") {
        let null = types.contains(&"null") && matches!(word, "null" | "None");
        return if null { Value::Null } else { Value::String(text.to_string()) };
    }
    let value = match word {
        "True" => Value::Bool(true),
        "False" => Value::Bool(false),
        "None" => Value::Null,
        _ => serde_json::from_str(word).unwrap_or_else(|_| Value::String(text.to_string())),
    };
    match value.as_f64() {
        // 3.0 where 3 is wanted. Beyond 2^53 a float does not name one integer.
        Some(number) if types == ["integer"] && value.is_f64() && number.fract() == 0.0 && number.abs() < 9e15 => {
            Value::from(number as i64)
        }
        _ => value,
    }
}

/// The types that a schema allows, as far as it names them.
pub fn types(schema: Option<&Value>) -> Vec<&str> {
    let Some(schema) = schema else { return Vec::new() };
    match schema.get("type") {
        Some(Value::String(one)) => return vec![one],
        Some(Value::Array(several)) => return several.iter().filter_map(Value::as_str).collect(),
        _ => {}
    }
    if let Some(Value::Array(choices)) = schema.get("enum") {
        return if choices.iter().all(Value::is_string) { vec!["string"] } else { Vec::new() };
    }
    let either = schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array);
    either.into_iter().flatten().flat_map(|schema| types(Some(schema))).collect()
}
