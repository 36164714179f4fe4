//! The logits of a text, as a file that other programs compare with theirs.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use gatedelta::device;
use gatedelta::qwen::{LoadOptions, Model};
use gatedelta_agent::tools::notes::replace;
use safetensors::{Dtype, tensor::TensorView};

/// The command `logits`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A checkpoint in the released layout
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A text; markers of the template in it are tokens
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The file to write: ids `[T]` u32, logits `[T, vocab]` f32, and the text as metadata
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// As the agent's option
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

/// Writes the file.
///
/// # Errors
/// Whatever is wrong with the checkpoint, the text or the device; where the file cannot be written.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<()> {
    let text =
        std::fs::read_to_string(&args.text).with_context(|| format!("{} cannot be read", args.text.display()))?;
    let (backend, _) = device::open(args.device.as_deref())?;
    let model = Model::load(&args.model, backend, &LoadOptions::default())?;
    let ids = model.tokenizer()?.encode(&text)?;
    let logits = model.session()?.logits(&ids)?;
    let vocab = model.config().vocab as usize;
    let rows: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let numbers: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let views = [
        ("ids", TensorView::new(Dtype::U32, vec![ids.len()], &numbers)?),
        ("logits", TensorView::new(Dtype::F32, vec![ids.len(), vocab], &rows)?),
    ];
    let bytes = safetensors::serialize(views, Some([("text".to_string(), text)].into()))?;
    replace(&args.out, &bytes).with_context(|| format!("{} cannot be written", args.out.display()))?;
    Ok(writeln!(out, "{} tokens, {vocab} logits each", ids.len())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gatedelta::qwen::Config;
    use gatedelta_agent::builtin;
    use safetensors::SafeTensors;

    #[test]
    fn the_file_holds_ids_and_logits_of_every_token() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        builtin::unpack(dir.path()).unwrap();
        let text = "<|im_start|>user\nhello there<|im_end|>\n";
        std::fs::write(path("text"), text).unwrap();
        let device = Some("cpu".to_string());
        let args = Args { model: dir.path().into(), text: path("text"), out: path("out"), device };
        run(&args, &mut Vec::new()).unwrap();
        let bytes = std::fs::read(path("out")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("ids").unwrap().data().to_vec();
        let logits = file.tensor("logits").unwrap();
        let tokens = ids.len() / 4;
        let vocab = Config::read(&dir.path().join("config.json")).unwrap().vocab as usize;
        assert_eq!(logits.shape(), [tokens, vocab]);
        assert!(tokens > 5 && logits.data().chunks(4).all(|x| f32::from_le_bytes(x.try_into().unwrap()).is_finite()));
        let why = run(&Args { text: path("nothing"), ..args }, &mut Vec::new()).unwrap_err().to_string();
        assert!(why.contains("nothing cannot be read"), "{why}");
    }
}
