//! A byte-level BPE tokenizer of the generated conversations, in the form of the family: its normaliser, its splitting (digits one
//! by one), its decoder and its added tokens are those of the agent's model; words and merges are new.
//!
//! Names of people and cities are left out of what it is trained on: those that training data has would become tokens of their
//! own, and those that it lacks would be cut into pieces that were never copied. So all of them are cut alike.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use gatedelta_agent::builtin;
use gatedelta_agent::tools::notes::replace;
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::data::names;

/// Vocabularies that can be trained: at least the bytes, the markers and some words; at most what the ids of a data file hold.
pub const SIZES: std::ops::RangeInclusive<usize> = 300..=65_536;

/// The tokenizer of the agent's model.
fn family() -> Result<Value> {
    let (_, json) = builtin::FILES.iter().find(|(name, _)| *name == "tokenizer.json").context("no tokenizer.json")?;
    Ok(serde_json::from_slice(json)?)
}

/// A `tokenizer.json` of at most `size` tokens, markers included, for these texts. The same texts give the same bytes.
///
/// # Errors
/// For a size that is not in [`SIZES`].
pub fn train(texts: &[String], size: usize) -> Result<Value> {
    if !SIZES.contains(&size) {
        bail!("--vocab is {size}; expected {} to {}", SIZES.start(), SIZES.end());
    }
    let mut form = family()?;
    let markers: Vec<String> = form["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|token| Some(token["content"].as_str()?.to_string()))
        .collect();
    let mut bare = form.clone();
    bare["added_tokens"] = json!([]);
    bare["model"]["vocab"] = json!({});
    bare["model"]["merges"] = json!([]);
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&bare)?).map_err(anyhow::Error::msg)?;
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(size - markers.len())
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let names = names::proper();
    let texts: Vec<String> = texts.iter().map(|text| without(text, &names)).collect();
    let pieces = texts.iter().flat_map(|text| between(text, &markers));
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), pieces).map_err(anyhow::Error::msg)?;

    let trained: Value = serde_json::from_str(&tokenizer.to_string(false).map_err(anyhow::Error::msg)?)?;
    let words = words(&trained);
    for key in ["vocab", "merges"] {
        form["model"][key] = trained["model"][key].clone();
    }
    // Markers come after the words, as in the released tokenizers.
    for (at, token) in form["added_tokens"].as_array_mut().into_iter().flatten().enumerate() {
        token["id"] = json!(words + at);
    }
    Ok(form)
}

/// A text without these words.
fn without(text: &str, names: &HashSet<&str>) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find(char::is_alphabetic) {
        let end = rest[begin..].find(|c: char| !c.is_alphabetic()).map_or(rest.len(), |length| begin + length);
        kept += &rest[..if names.contains(&rest[begin..end]) { begin } else { end }];
        rest = &rest[end..];
    }
    kept + rest
}

/// What is left of a text between the markers, which are tokens already.
fn between<'a>(text: &'a str, markers: &[String]) -> Vec<&'a str> {
    markers
        .iter()
        .fold(vec![text], |pieces, marker| pieces.iter().flat_map(|piece| piece.split(marker.as_str())).collect())
}

/// Tokens of a `tokenizer.json` that stand for text: ids from 0 on.
pub fn words(json: &Value) -> usize {
    json["model"]["vocab"].as_object().map_or(0, serde_json::Map::len)
}

/// Tokens of a `tokenizer.json`, markers included.
pub fn size(json: &Value) -> usize {
    words(json) + json["added_tokens"].as_array().map_or(0, Vec::len)
}

/// Writes the files that belong to a tokenizer into `dir`, which is made if need be.
///
/// # Errors
/// Where they cannot be written.
pub fn write(json: &Value, dir: &Path) -> Result<()> {
    let tokenizer = format!("{json:#}\n");
    for (name, content) in builtin::FILES {
        let content = match name {
            "tokenizer.json" => tokenizer.as_bytes(),
            "tokenizer_config.json" | "chat_template.jinja" => content,
            _ => continue,
        };
        let path = dir.join(name);
        replace(&path, content).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

/// The tokenizer of a folder, whatever model it belongs to.
///
/// # Errors
/// If it is not there or broken.
pub fn read(dir: &Path) -> Result<gatedelta::qwen::Tokenizer> {
    Ok(gatedelta::qwen::Tokenizer::read(&dir.join("tokenizer.json"), u32::from(u16::MAX) + 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Side;
    use crate::data::scene::{Maker, Number, any, estimate, template};
    use crate::draw::Draw;

    fn texts() -> Vec<String> {
        let maker = Maker { template: template().unwrap(), measure: &estimate, distance: Some(100) };
        let mut draw = Draw::new(&[5]);
        (0..40).map(|index| maker.text(any(&mut draw), Number { seed: 5, side: Side::Train, index }).unwrap()).collect()
    }

    #[test]
    fn trained_read_and_reversed() {
        let texts = texts();
        let json = train(&texts, 700).unwrap();
        assert_eq!(size(&json), 700);
        assert_eq!(json, train(&texts, 700).unwrap(), "the same texts give the same tokenizer");
        let dir = tempfile::tempdir().unwrap();
        write(&json, dir.path()).unwrap();
        let tokenizer = read(dir.path()).unwrap();

        for text in texts.iter().map(String::as_str).chain(["naïve 日本 \u{1F600}\n\n  tabs\t", "a\r\nb"]) {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap(), true).unwrap(), text);
        }
        let ids = |text: &str| tokenizer.encode(text).unwrap();
        for marker in
            ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
        {
            assert_eq!(ids(marker), [tokenizer.id(marker).unwrap()], "{marker}");
            assert_eq!(tokenizer.is_special(ids(marker)[0]), marker.contains('|'), "{marker}");
        }
        assert_eq!(ids("90210").len(), 5, "digits are split");
        let short = ids(&texts[0]).len();
        assert!(short * 2 < texts[0].len(), "{short} tokens of {} bytes", texts[0].len());
        assert_eq!(ids(" the").len(), 1, "frequent words are one token");
        assert!(gatedelta::qwen::ChatTemplate::read(dir.path()).unwrap().is_some());
    }

    #[test]
    fn names_are_cut_alike() {
        assert_eq!(
            without("Ada, (Adam) in Europe/Budapest: 3 Ada's", &["Ada", "Budapest"].into()),
            ", (Adam) in Europe/: 3 's"
        );
        let texts = vec!["Ada has a lamp, and Ada is in Paris. ".repeat(50)];
        let dir = tempfile::tempdir().unwrap();
        write(&train(&texts, 300).unwrap(), dir.path()).unwrap();
        let tokenizer = read(dir.path()).unwrap();
        let count = |text: &str| tokenizer.encode(text).unwrap().len();
        assert_eq!((count(" lamp"), count(" has")), (1, 1));
        assert!(count(" Ada") > 2 && count(" Paris") > 3);
    }

    #[test]
    fn bad_sizes_are_refused() {
        for size in [0, 299, 70_000] {
            assert!(train(&[], size).unwrap_err().to_string().contains("300 to 65536"));
        }
        // Without text there are the bytes and the markers.
        assert_eq!(size(&train(&[], 300).unwrap()), 265);
    }
}
