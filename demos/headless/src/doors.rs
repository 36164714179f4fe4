//! `run`, `logits`, `generate`: one thing in, one thing out, for tools outside that compare.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use gatedelta::device;
use gatedelta::shape::Dtype;

use crate::case::{self, Case};
use crate::ways::Way;
use crate::{checkpoints, grads, oracle, say};

/// Arguments of `run`.
#[derive(clap::Args, Debug)]
pub struct Run {
    /// cpu, cuda, lavapipe, swiftshader, or a part of an adapter's name
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The case file
    #[arg(long, value_name = "FILE")]
    case: PathBuf,
    /// Where to write o and ht as safetensors, and dq, dk, dv, dg, dbeta and dh0 if the case has do (dht is zero where absent)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// How q, k, v, o and their gradients are stored on the device
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = dtype)]
    store: Dtype,
    /// How to get o and ht: prefill, split, decode or verify; gradients have one way
    #[arg(long, value_name = "WAY", default_value = "prefill", value_parser = way)]
    way: Way,
}

/// Arguments of `logits`.
#[derive(clap::Args, Debug)]
pub struct Logits {
    #[command(flatten)]
    prompt: Prompt,
    /// Where to write logits [T, vocab], as safetensors
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Arguments of `generate`.
#[derive(clap::Args, Debug)]
pub struct Generate {
    #[command(flatten)]
    prompt: Prompt,
    /// Ids to append; none of them ends it early
    #[arg(short, value_name = "COUNT", default_value_t = 24)]
    n: usize,
}

#[derive(clap::Args, Debug)]
struct Prompt {
    /// cpu, cuda, lavapipe, swiftshader, or a part of an adapter's name
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// The checkpoint's directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
}

/// A storage type by name.
///
/// # Errors
/// Any other name.
pub fn dtype(name: &str) -> Result<Dtype, String> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|d| d.to_string() == name)
        .ok_or_else(|| "expected f32, f16 or bf16".into())
}

fn way(name: &str) -> Result<Way, String> {
    Way::ALL.into_iter().find(|w| w.name() == name).ok_or_else(|| "expected prefill, split, decode or verify".into())
}

/// Runs one case, and goes back from its cotangents if it has them.
///
/// # Errors
/// A case that cannot be used, a device that does not exist, whatever the library or the file system reports.
pub fn run(args: &Run) -> Result<()> {
    let case = Case::read(&args.case)?;
    let (backend, _) = device::open(args.device.as_deref())?;
    let of_case = || args.case.display().to_string();
    let out = args.way.compute(&*backend, &case, args.store, 1).with_context(of_case)?;
    let back = match case.cotangents {
        Some(_) => Some(grads::compute(&*backend, &case, args.store, 1).with_context(of_case)?),
        None => None,
    };
    let mut tensors = vec![("o", case.o_dims(), &out.o[..]), ("ht", case.state_dims(), &out.ht[..])];
    if let Some(back) = &back {
        let (q, v, gate) = (case.q_dims(), case.o_dims(), case.gate_dims());
        let dims = [q.clone(), q, v, gate.clone(), gate, case.state_dims()];
        tensors.extend(grads::named(back).into_iter().zip(dims).map(|((name, data), dims)| (name, dims, data)));
    }
    case::write(&args.out, &tensors)?;

    let mut errors = Vec::new();
    if let Some(answers) = &case.answers {
        errors.push(("o", oracle::error(&out.o, &answers.o)));
        errors.push(("ht", oracle::error(&out.ht, &answers.ht)));
    }
    if let (Some(back), Some(wanted)) = (&back, &case.gradients) {
        let found = grads::named(back).into_iter().zip(grads::errors(back, wanted));
        errors.extend(found.filter_map(|((name, _), error)| error.map(|error| (name, error))));
    }
    if !errors.is_empty() {
        let errors: Vec<_> = errors.iter().map(|(name, e)| format!("of {name} {}", crate::table::error(*e))).collect();
        say(&format!("{} on {}: relative error {}\n", case.name, backend.caps().name, errors.join(", ")));
    }
    Ok(())
}

/// Writes the logits after every id.
///
/// # Errors
/// A checkpoint that cannot be used, ids outside its vocabulary, a device that does not exist, whatever the library or the
/// file system reports.
pub fn logits(args: &Logits) -> Result<()> {
    let (backend, _) = device::open(args.prompt.device.as_deref())?;
    let model = checkpoints::load(&backend, &args.prompt.model)?;
    let logits = checkpoints::logits(&model, &args.prompt.ids)?;
    let tokens = args.prompt.ids.len();
    ensure!(logits.len() % tokens == 0, "{} logits do not make up {tokens} rows", logits.len());
    case::write(&args.out, &[("logits", vec![tokens, logits.len() / tokens], &logits)])
}

/// Prints the greedy continuation.
///
/// # Errors
/// As [`logits`].
pub fn generate(args: &Generate) -> Result<()> {
    let (backend, _) = device::open(args.prompt.device.as_deref())?;
    let model = checkpoints::load(&backend, &args.prompt.model)?;
    let ids = checkpoints::greedy(&model, &args.prompt.ids, args.n)?;
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    say(&format!("{}\n", ids.join(",")));
    Ok(())
}
