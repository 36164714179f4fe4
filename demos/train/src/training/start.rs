//! A model that begins with the weights of another one.
//!
//! Where the other one has another tokenizer, a token that both have keeps its row of the embedding table, and one that is new
//! begins with the mean of the rows of its pieces (Gee, Zugarini, Rigutini, Torroni, "Fast Vocabulary Transfer for Language Model
//! Compression", 2022). What the layers know of copying and calling is kept.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use burn::tensor::{Device, Tensor, TensorData};
use gatedelta::burn::{Engine, Qwen35, Qwen35Config};
use gatedelta::qwen::Tokenizer;
use serde_json::Value;

use super::read_json;
use crate::{learn, tokenizer};

/// A model of `config` for the tokenizer of `dir`, with the weights of `from`: a run's file, made with the same tokenizer, or a
/// directory in the released layout with its own.
///
/// # Errors
/// If `from` is not there, of other sizes, or has a head of its own beside another tokenizer.
pub fn model(from: &Path, config: &Qwen35Config, dir: &Path, engine: &Engine, device: &Device) -> Result<Qwen35> {
    let named = || format!("--start {}", from.display());
    if !from.is_dir() {
        return learn::weights(from, config.init(engine, device)?).with_context(named);
    }
    let (theirs, ours) = (read_json(from).with_context(named)?, read_json(dir)?);
    if theirs["model"]["vocab"] == ours["model"]["vocab"] && theirs["added_tokens"] == ours["added_tokens"] {
        return config.init(engine, device)?.load_checkpoint(from).with_context(named);
    }
    if !config.tie_word_embeddings {
        bail!("{}: a head of its own does not fit another tokenizer", named());
    }
    let their_config = Qwen35Config { vocab_size: tokenizer::size(&theirs), ..config.clone() };
    let old = their_config.init(engine, device)?.load_checkpoint(from).with_context(named)?;
    let pieces = pieces(&ours, &tokenizer::read(dir)?, &theirs, &tokenizer::read(from)?)?;
    let mut new = config.init(engine, device)?;
    let table = table(&pieces, &old)?;
    let id = new.embed_tokens.weight.id;
    new.embed_tokens.weight = new.embed_tokens.weight.clone().transform_for_load(table, id);
    new.layers = old.layers;
    new.norm = old.norm;
    Ok(new)
}

/// All tokens of a `tokenizer.json` by their ids, markers included.
fn tokens(json: &Value) -> Vec<(&str, usize)> {
    let words = json["model"]["vocab"].as_object().into_iter().flatten();
    let markers = json["added_tokens"].as_array().into_iter().flatten();
    let words = words.filter_map(|(token, id)| Some((token.as_str(), id.as_u64()? as usize)));
    let markers = markers.filter_map(|token| Some((token["content"].as_str()?, token["id"].as_u64()? as usize)));
    let mut all: Vec<(&str, usize)> = words.chain(markers).collect();
    all.sort_by_key(|(_, id)| *id);
    all
}

/// For every token of `ours` the tokens of `theirs` that it is made of.
fn pieces(ours: &Value, our: &Tokenizer, theirs: &Value, their: &Tokenizer) -> Result<Vec<Vec<usize>>> {
    let known: HashMap<&str, usize> = tokens(theirs).into_iter().collect();
    let one = |(token, id): (&str, usize)| -> Result<Vec<usize>> {
        if let Some(&same) = known.get(token) {
            return Ok(vec![same]);
        }
        let text = our.decode(&[id as u32], false)?;
        let found: Vec<usize> = their.encode(&text)?.into_iter().map(|id| id as usize).collect();
        if found.is_empty() {
            bail!("token {id}, {token:?}, is nothing to the tokenizer of --start");
        }
        Ok(found)
    };
    tokens(ours).into_iter().map(one).collect()
}

/// The embedding table `[pieces, hidden]` whose rows are the means of these rows of the table of `old`.
fn table(pieces: &[Vec<usize>], old: &Qwen35) -> Result<Tensor<2>> {
    let weight = old.embed_tokens.weight.val();
    let ([rows, hidden], device) = (weight.dims(), weight.device());
    let numbers: Vec<f32> = weight.try_into_vec_as()?;
    let mut table = Vec::with_capacity(pieces.len() * hidden);
    for of in pieces {
        if let Some(beyond) = of.iter().find(|id| **id >= rows) {
            bail!("the tokenizer of --start has the token {beyond}, and its embedding table {rows} rows");
        }
        let sum = |at: usize| of.iter().map(|id| numbers[id * hidden + at]).sum::<f32>();
        table.extend((0..hidden).map(|at| sum(at) / of.len() as f32));
    }
    Ok(Tensor::from_data(TensorData::new(table, [pieces.len(), hidden]), &device))
}

#[cfg(test)]
mod tests {
    use gatedelta::shape::Dtype;

    use super::*;
    use crate::learn::alone;
    use crate::training::tests::{engine, tiny};

    /// The tokenizer of a text, in a directory.
    fn written(dir: &Path, text: &str) -> Value {
        tokenizer::write(&tokenizer::train(&[text.repeat(20)], 300).unwrap(), dir).unwrap();
        read_json(dir).unwrap()
    }

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.try_into_vec_as().unwrap()
    }

    #[test]
    fn tokens_that_are_new_begin_as_the_mean_of_their_pieces() {
        let _alone = alone();
        let (engine, device) = (engine(), Device::flex().autodiff());
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let theirs = written(from.path(), "a lamp and a lamp ");
        let ours = written(to.path(), "many lanterns and many lanterns ");
        let sized = |json: &Value| Qwen35Config { vocab_size: tokenizer::size(json), ..tiny() };
        let old = sized(&theirs).init(&engine, &device).unwrap();
        old.save_checkpoint(from.path(), Dtype::F32).unwrap();
        let config = sized(&ours);
        let new = model(from.path(), &config, to.path(), &engine, &device).unwrap();

        let (was, is) = (numbers(old.embed_tokens.weight.val()), numbers(new.embed_tokens.weight.val()));
        let row = |table: &[f32], id: usize| table[32 * id..32 * (id + 1)].to_vec();
        let id = |json: &Value, token: &str| tokens(json).iter().find(|(found, _)| *found == token).unwrap().1;
        for both in ["a", "x", "Ġand", "<|im_end|>"] {
            assert_eq!(row(&is, id(&ours, both)), row(&was, id(&theirs, both)), "{both}");
        }
        let read = tokenizer::read(from.path()).unwrap();
        let parts = read.encode(" lanterns").unwrap();
        assert!(parts.len() > 1);
        let mean: Vec<f32> = (0..32)
            .map(|at| parts.iter().map(|id| was[32 * *id as usize + at]).sum::<f32>() / parts.len() as f32)
            .collect();
        assert_eq!(row(&is, id(&ours, "Ġlanterns")), mean);
        assert_eq!(numbers(new.layers[1].mlp.up_proj.weight.val()), numbers(old.layers[1].mlp.up_proj.weight.val()));
        assert!(new.embed_tokens.weight.val().is_require_grad());

        // With the same tokenizer everything is as it was.
        let config = sized(&theirs);
        let same = model(from.path(), &config, from.path(), &engine, &device).unwrap();
        assert_eq!(numbers(same.embed_tokens.weight.val()), was);
        assert!(same.layers[0].mlp.up_proj.weight.val().is_require_grad());
        let wide = Qwen35Config { intermediate_size: 64, ..config };
        let why = format!("{:#}", model(from.path(), &wide, from.path(), &engine, &device).err().unwrap());
        assert!(why.contains("--start") && why.contains("expected [64, 32]"), "{why}");
        let why = format!("{:#}", model(&from.path().join("no"), &wide, to.path(), &engine, &device).err().unwrap());
        assert!(why.contains("--start") && why.contains("gives no weights"), "{why}");
    }
}
