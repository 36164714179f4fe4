//! `tokenizer.json`.

use std::fs;

use gatedelta::Error;
use gatedelta::qwen::Tokenizer;

pub const WORDS: &[&str] = &[
    "null",
    "true",
    "4294967295",
    "added_tokens",
    "special",
    "ByteLevel",
    "Sequence",
    "Split",
    "Regex",
    "\"(a+)+$\"",
    "merges",
    "ignore_merges",
    "byte_fallback",
    "[]",
    "\\u0000",
    "BPE",
    "WordPiece",
    "Unigram",
    "NFC",
];

const FILE: &[u8] = include_bytes!("../../tests/golden/models/tiny-text/tokenizer.json");
const VOCAB: u32 = 512;
const TEXT: &str =
    "<|im_start|>user\nWhat is 17.5% of 2480? \u{e9}\u{1f600}\u{0} don't\r\n  aaaaaaaaaaaaaaaa<|im_end|>\n";

/// What is taken encodes a text to ids of the model, and gives some text back.
pub fn target(data: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, data).unwrap();
    let tokenizer = match Tokenizer::read(&path, VOCAB) {
        Ok(tokenizer) => tokenizer,
        Err(why) => {
            assert!(matches!(&why, Error::Load { path: found, .. } if *found == path), "{why}");
            return;
        }
    };
    let Ok(ids) = tokenizer.encode(TEXT) else { return };
    assert!(ids.iter().all(|id| *id < VOCAB));
    let whole = tokenizer.decode(&ids, true).unwrap();
    let mut stream = tokenizer.stream(true);
    let pieces: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(pieces + &stream.finish(), whole);
    (0..VOCAB + 2).for_each(|id| assert_eq!(tokenizer.has(id), tokenizer.bytes(id).is_some()));
}

pub fn seeds() -> Vec<Vec<u8>> {
    vec![FILE.to_vec()]
}
