//! Text to ids and back, and text out of ids that arrive one by one.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};

/// The checkpoint's tokenizer.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    /// Per id: the bytes it stands for; none for an id without a token.
    bytes: Vec<Option<Box<[u8]>>>,
    /// Per id: left out of decoded text.
    special: Vec<bool>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, for a model of `vocab` ids. The model may have more ids than the tokenizer, not fewer.
    ///
    /// # Errors
    /// [`Error::Load`] naming the file: not a tokenizer, not byte-level, or one of another model.
    pub fn read(path: &Path, vocab: u32) -> Result<Self> {
        let json = std::fs::read(path).map_err(|e| Error::load(path, e))?;
        // First: the library panics where a decoder is not JSON.
        let listed: Listed = serde_json::from_slice(&json).map_err(|e| Error::load(path, e))?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| Error::load(path, e))?;
        if !matches!(tokenizer.get_decoder(), Some(tokenizers::DecoderWrapper::ByteLevel(_))) {
            return Err(Error::load(path, "its decoder is not ByteLevel"));
        }
        // The library numbers added tokens itself where the file's numbers leave gaps; the model knows the file's.
        for AddedToken { id, content } in listed.added_tokens {
            if tokenizer.token_to_id(&content) != Some(id) {
                return Err(Error::load(path, format!("added token {content:?} cannot have id {id}: ids have gaps")));
            }
        }
        let of_char = byte_of_char();
        let mut bytes = vec![None; vocab as usize];
        for (token, id) in tokenizer.get_vocab(true) {
            let Some(slot) = bytes.get_mut(id as usize) else {
                let why = format!("token {token:?} has id {id} and the model has {vocab}: it belongs to another model");
                return Err(Error::load(path, why));
            };
            let mapped: Option<Vec<u8>> = token.chars().map(|c| of_char.get(c as usize).copied().flatten()).collect();
            *slot = Some(mapped.unwrap_or_else(|| token.into_bytes()).into_boxed_slice());
        }
        let mut special = vec![false; vocab as usize];
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if let Some(slot) = special.get_mut(id as usize) {
                *slot = token.special;
            }
        }
        Ok(Tokenizer { inner: Arc::new(Inner { tokenizer, bytes, special }) })
    }

    /// The ids of a text. Markers such as `<|im_start|>` in it become their own ids.
    ///
    /// # Errors
    /// [`Error::Argument`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = self.inner.tokenizer.encode_fast(text, false);
        let encoded = encoded.map_err(|e| Error::argument("text to encode", e, "text that the tokenizer accepts"))?;
        Ok(encoded.get_ids().to_vec())
    }

    /// The text of all ids together; `special` keeps markers such as `<|im_end|>`. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Argument`] naming an id that has no token.
    pub fn decode(&self, ids: &[u32], special: bool) -> Result<String> {
        let mut stream = self.stream(special);
        let mut text = String::new();
        for id in ids {
            text.push_str(&stream.push(*id)?);
        }
        text.push_str(&stream.finish());
        Ok(text)
    }

    /// Text out of ids that arrive one by one.
    pub fn stream(&self, special: bool) -> TextStream {
        TextStream { tokenizer: self.clone(), special, held: Vec::new() }
    }

    /// The id of a token, by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.tokenizer.token_to_id(token)
    }

    /// The bytes that an id stands for, which need not be whole characters; none for an id without a token.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.inner.bytes.get(id as usize)?.as_deref()
    }

    /// True if the id has a token.
    pub fn has(&self, id: u32) -> bool {
        self.inner.bytes.get(id as usize).is_some_and(Option::is_some)
    }

    /// True for markers that [`Tokenizer::decode`] leaves out unless asked.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special.get(id as usize).copied().unwrap_or(false)
    }
}

/// The parts of `tokenizer.json` that the library does not take literally, or not at all.
#[derive(serde::Deserialize)]
struct Listed {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default, rename = "decoder")]
    _decoder: serde_json::Value,
}

#[derive(serde::Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} ids)", self.inner.bytes.iter().flatten().count())
    }
}

/// Turns ids into text as they arrive, holding back bytes until the character they begin is complete.
///
/// What it gives, put together, is what [`Tokenizer::decode`] gives for all ids at once.
#[derive(Debug, Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    special: bool,
    /// The begin of a character: at most 3 bytes between calls.
    held: Vec<u8>,
}

impl TextStream {
    /// Takes the next id; the text that is certain now, often empty.
    ///
    /// # Errors
    /// [`Error::Argument`] if the id has no token.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let inner = &self.tokenizer.inner;
        let Some(Some(bytes)) = inner.bytes.get(id as usize) else {
            return Err(Error::argument("token id", id, "an id of the tokenizer"));
        };
        if self.special || !inner.special[id as usize] {
            self.held.extend_from_slice(bytes);
        }
        let mut text = String::new();
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    // An error without a length is a character whose end has not arrived.
                    let Some(n) = e.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[n..];
                }
            }
        }
        self.held = rest.to_vec();
        Ok(text)
    }

    /// Ends the text: U+FFFD for a character that never became complete.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        String::from_utf8_lossy(&held).into_owned()
    }
}

/// GPT-2's alphabet, inverted: printable Latin-1 stands for itself, the other 68 bytes for U+0100 onwards, in order.
fn byte_of_char() -> Vec<Option<u8>> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut table = vec![None; 0x144];
    let mut next = 0x100;
    for b in 0..=255u8 {
        if printable(b) {
            table[b as usize] = Some(b);
        } else {
            table[next] = Some(b);
            next += 1;
        }
    }
    table
}
