//! Template values written as Python writes them: `json.dumps`, `str` and `repr`.
//!
//! Chat templates are run by Python when a model is trained, so every space and quote of these counts.

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::ValueKind;

/// Layout of [`json`].
#[derive(Debug, Clone, Default)]
pub struct JsonStyle {
    /// One entry a line, each level indented by this.
    pub indent: Option<String>,
    /// Between entries and between key and value; Python's defaults where absent.
    pub separators: Option<(String, String)>,
    /// Keys in order of their code points instead of the mapping's own order.
    pub sort_keys: bool,
    /// Everything outside ASCII as `\uXXXX`.
    pub ascii: bool,
}

/// `json.dumps(value, ensure_ascii=False)` in the given style.
///
/// # Errors
/// Says which kind of value has no JSON form.
pub fn json(value: &Value, style: &JsonStyle) -> Result<String, minijinja::Error> {
    let mut out = String::new();
    write_json(&mut out, value, style, 0)?;
    Ok(out)
}

fn write_json(out: &mut String, value: &Value, style: &JsonStyle, level: usize) -> Result<(), minijinja::Error> {
    let default_item = if style.indent.is_some() { "," } else { ", " };
    let (item, colon) = match &style.separators {
        Some((item, colon)) => (item.as_str(), colon.as_str()),
        None => (default_item, ": "),
    };
    let newline = |out: &mut String, level: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..level).for_each(|_| out.push_str(indent));
        }
    };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value, ["NaN", "Infinity", "-Infinity"])),
        ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for entry in value.try_iter()? {
                if !empty {
                    out.push_str(item);
                }
                empty = false;
                newline(out, level + 1);
                write_json(out, &entry, style, level + 1)?;
            }
            if !empty {
                newline(out, level);
            }
            out.push(']');
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            out.push('{');
            for (i, key) in keys.iter().enumerate() {
                if i > 0 {
                    out.push_str(item);
                }
                newline(out, level + 1);
                // Python writes any scalar key as a string of its JSON form.
                match key.as_str() {
                    Some(text) => write_json_string(out, text, style.ascii),
                    None => write_json_string(out, &json(key, &JsonStyle::default())?, style.ascii),
                }
                out.push_str(colon);
                write_json(out, &value.get_item(key)?, style, level + 1)?;
            }
            if !keys.is_empty() {
                newline(out, level);
            }
            out.push('}');
        }
        kind => {
            let why = format!("tojson: a value of kind {kind} has no JSON form");
            return Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, why));
        }
    }
    Ok(())
}

fn write_json_string(out: &mut String, text: &str, ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && c as u32 > 0x7e) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `str(value)`: what `{{ value }}` and `value | string` write.
pub fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().to_string(),
        ValueKind::Undefined => String::new(),
        _ => {
            let mut out = String::new();
            write_repr(&mut out, value);
            out
        }
    }
}

fn write_repr(out: &mut String, value: &Value) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, ["nan", "inf", "-inf"])),
        ValueKind::String => write_repr_string(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            out.push('[');
            for (i, entry) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &entry);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &key);
                out.push_str(": ");
                write_repr(out, &value.get_item(&key).unwrap_or_default());
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

fn write_repr_string(out: &mut String, text: &str) {
    // Python prefers single quotes and changes only to avoid escapes.
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c < ' ' || ('\u{7f}'..='\u{a0}').contains(&c) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A number; `words` name NaN and the infinities.
fn number(value: &Value, words: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if x.is_nan() {
        return words[0].into();
    }
    if x.is_infinite() {
        return words[if x > 0.0 { 1 } else { 2 }].into();
    }
    // Both languages write the shortest digits that read back the same; Python turns to exponents below 1e-4 and from 1e16.
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(e) => ('-', e),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{x:?}")
}
