//! Token ids of many conversations in one safetensors file.
//!
//! | tensor | shape | content |
//! |---|---|---|
//! | `ids` | `[T]` u16 | all conversations, one after the other |
//! | `mask` | `[T]` u8 | 1 for tokens that the model writes: those of the assistant up to and with `<|im_end|>` |
//! | `offsets` | `[N + 1]` u64 | where conversations begin; the last one is T |
//! | `kinds` | `[N]` u8 | the kind of the last request, by its place in the list of kinds |

use std::path::Path;

use anyhow::{Context, Result, bail};
use gatedelta::qwen::Tokenizer;
use gatedelta_agent::tools::notes::replace;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

use crate::data::Kind;

/// See the [module](self).
#[derive(Debug)]
pub struct Dataset {
    pub ids: Vec<u16>,
    pub mask: Vec<u8>,
    pub offsets: Vec<u64>,
    pub kinds: Vec<u8>,
}

const BEGIN: &str = "<|im_start|>assistant\n";
const END: &str = "<|im_end|>";
/// What the prompt gives to a model that does not reason: it belongs to the prompt.
const NO_THOUGHT: &str = "<think>\n\n</think>\n\n";

/// A text cut into parts that the model reads (false) and parts that it writes (true).
pub fn parts(text: &str) -> Vec<(&str, bool)> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(begin) = rest.find(BEGIN) {
        let mut from = begin + BEGIN.len();
        if rest[from..].starts_with(NO_THOUGHT) {
            from += NO_THOUGHT.len();
        }
        let to = rest[from..].find(END).map_or(rest.len(), |end| from + end + END.len());
        parts.push((&rest[..from], false));
        parts.push((&rest[from..to], true));
        rest = &rest[to..];
    }
    parts.push((rest, false));
    parts
}

impl Dataset {
    pub fn new() -> Self {
        Dataset { ids: Vec::new(), mask: Vec::new(), offsets: vec![0], kinds: Vec::new() }
    }

    /// Adds a conversation as the chat template renders it.
    ///
    /// # Errors
    /// If an id needs more than 16 bits.
    pub fn push(&mut self, tokenizer: &Tokenizer, kind: Kind, text: &str) -> Result<()> {
        for (part, written) in parts(text) {
            for id in tokenizer.encode(part)? {
                self.ids.push(u16::try_from(id).with_context(|| format!("token id {id} needs more than 16 bits"))?);
                self.mask.push(u8::from(written));
            }
        }
        self.offsets.push(self.ids.len() as u64);
        self.kinds.push(kind as u8);
        Ok(())
    }

    /// Reads a file that [`Dataset::write`] wrote, and what was said about it.
    ///
    /// # Errors
    /// If it is not there, or not such a file.
    #[cfg_attr(not(feature = "burn"), allow(dead_code, reason = "what trains reads it, and the tests"))]
    pub fn read(path: &Path) -> Result<(Self, Value)> {
        let read = || -> Result<(Self, Value)> {
            let bytes = std::fs::read(path)?;
            let (_, head) = SafeTensors::read_metadata(&bytes)?;
            let about = head.metadata().as_ref().and_then(|about| about.get("about")).context("it has no \"about\"")?;
            let file = SafeTensors::deserialize(&bytes)?;
            let tensor = |name: &str, dtype: Dtype| -> Result<Vec<u8>> {
                let tensor = file.tensor(name)?;
                if tensor.dtype() != dtype || tensor.shape().len() != 1 {
                    bail!("{name} is {:?} {:?}; expected one dimension of {dtype:?}", tensor.dtype(), tensor.shape());
                }
                Ok(tensor.data().to_vec())
            };
            let eight = |bytes: &[u8]| u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
            let data = Dataset {
                ids: tensor("ids", Dtype::U16)?
                    .chunks_exact(2)
                    .map(|two| u16::from_le_bytes([two[0], two[1]]))
                    .collect(),
                mask: tensor("mask", Dtype::U8)?,
                offsets: tensor("offsets", Dtype::U64)?.chunks_exact(8).map(eight).collect(),
                kinds: tensor("kinds", Dtype::U8)?,
            };
            let (first, last) = (data.offsets.first().copied(), data.offsets.last().copied());
            if first != Some(0) || last != Some(data.ids.len() as u64) || !data.offsets.is_sorted() {
                bail!("offsets go from {first:?} to {last:?}; expected rising from 0 to {}", data.ids.len());
            }
            for (what, found, expected) in
                [("mask", data.mask.len(), data.ids.len()), ("kinds", data.kinds.len(), data.offsets.len() - 1)]
            {
                if found != expected {
                    bail!("{what} has {found} numbers; expected {expected}");
                }
            }
            Ok((data, serde_json::from_str(about)?))
        };
        read().with_context(|| format!("{} is no data file", path.display()))
    }

    /// Adds the conversations of `other`.
    pub fn append(&mut self, other: &Dataset) {
        let before = self.ids.len() as u64;
        self.ids.extend(&other.ids);
        self.mask.extend(&other.mask);
        self.offsets.extend(other.offsets.iter().skip(1).map(|offset| before + offset));
        self.kinds.extend(&other.kinds);
    }

    /// Writes the file in one step: a reader finds the old one or the new one, whole. `about` becomes the file's metadata.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self, path: &Path, about: &Value) -> Result<()> {
        let ids: Vec<u8> = self.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let offsets: Vec<u8> = self.offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let views = [
            ("ids", TensorView::new(Dtype::U16, vec![self.ids.len()], &ids)?),
            ("mask", TensorView::new(Dtype::U8, vec![self.mask.len()], &self.mask)?),
            ("offsets", TensorView::new(Dtype::U64, vec![self.offsets.len()], &offsets)?),
            ("kinds", TensorView::new(Dtype::U8, vec![self.kinds.len()], &self.kinds)?),
        ];
        // One entry alone: several would come in another order each time.
        let about = [("about".to_string(), about.to_string())].into();
        let bytes = safetensors::serialize(views, Some(about))?;
        replace(path, &bytes).with_context(|| format!("{} cannot be written", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Side;
    use crate::data::scene::{Maker, Number, estimate, template};
    use crate::tokenizer;

    #[test]
    fn the_model_writes_what_follows_the_prompt() {
        let text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n\
            <|im_start|>assistant\n<think>\n\n</think>\n\n<tool_call>\nx\n</tool_call><|im_end|>\n";
        let written: Vec<&str> =
            parts(text).into_iter().filter_map(|(part, written)| written.then_some(part)).collect();
        assert_eq!(written, ["Hello!<|im_end|>", "<tool_call>\nx\n</tool_call><|im_end|>"]);
        assert_eq!(parts(text).iter().map(|(part, _)| *part).collect::<String>(), text);
        assert_eq!(parts("nothing"), [("nothing", false)]);
    }

    #[test]
    fn kinds_fit_and_files_hold_what_was_pushed() {
        let maker = Maker { template: template().unwrap(), measure: &estimate, distance: Some(50) };
        let number = |index| Number { seed: 8, side: Side::Train, index };
        let texts: Vec<(Kind, String)> =
            Kind::all().iter().map(|&kind| (kind, maker.text(kind, number(0)).unwrap())).collect();
        let all: Vec<String> = texts.iter().map(|(_, text)| text.clone()).collect();
        let dir = tempfile::tempdir().unwrap();
        tokenizer::write(&tokenizer::train(&all, 600).unwrap(), dir.path()).unwrap();
        let tokenizer = tokenizer::read(dir.path()).unwrap();
        let mut data = Dataset::new();
        for (kind, text) in &texts {
            data.push(&tokenizer, *kind, text).unwrap();
        }

        let path = dir.path().join("data.safetensors");
        data.write(&path, &serde_json::json!({"seed": 8})).unwrap();
        let (read, about) = Dataset::read(&path).unwrap();
        assert_eq!(
            (&read.ids, &read.mask, &read.offsets, &read.kinds),
            (&data.ids, &data.mask, &data.offsets, &data.kinds)
        );
        assert_eq!((about, read.offsets.len()), (serde_json::json!({"seed": 8}), texts.len() + 1));
        let short = Dataset { mask: vec![0; 3], ..read };
        short.write(&path, &Value::Null).unwrap();
        let why = format!("{:#}", Dataset::read(&path).unwrap_err());
        assert!(why.contains("mask has 3 numbers; expected"), "{why}");
        assert!(Dataset::read(&dir.path().join("tokenizer.json")).is_err() && Dataset::read(dir.path()).is_err());
        for (at, (kind, text)) in texts.iter().enumerate() {
            let range = data.offsets[at] as usize..data.offsets[at + 1] as usize;
            let ids: Vec<u32> = data.ids[range.clone()].iter().map(|&id| u32::from(id)).collect();
            assert_eq!(&tokenizer.decode(&ids, true).unwrap(), text, "{}", kind.name());
            // Cut into parts or not, the ids are the same: what is trained on is what the runtime reads.
            assert_eq!(ids, tokenizer.encode(text).unwrap(), "{}", kind.name());
            assert_eq!(data.mask[range.end - 2], 1, "the end of the turn is written");
            assert_eq!((data.mask[range.start], data.mask[range.end - 1]), (0, 0));
            assert_eq!(usize::from(data.kinds[at]), at);
        }
    }
}
