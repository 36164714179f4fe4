//! Safetensors headers and indices of shards, behind which the numbers of a whole checkpoint lie.

use std::fs;
use std::sync::{Arc, OnceLock};

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::qwen::files::Checkpoint;
use gatedelta::qwen::{LoadOptions, Model};

pub const WORDS: &[&str] = &[
    "F32",
    "BF16",
    "F4",
    "I64",
    "shape",
    "data_offsets",
    "__metadata__",
    "[0,0]",
    "../model.safetensors",
    "weight_map",
];

const CONFIG: &[u8] = include_bytes!("../../tests/golden/models/tiny-text/config.json");
const FILE: &[u8] = include_bytes!("../../tests/golden/models/tiny-text/model.safetensors");

/// Where the numbers begin.
fn data() -> usize {
    8 + u64::from_le_bytes(FILE[..8].try_into().unwrap()) as usize
}

fn cpu() -> Arc<dyn Backend> {
    static CPU: OnceLock<Arc<dyn Backend>> = OnceLock::new();
    CPU.get_or_init(|| Arc::new(Cpu::new(Some(1)).unwrap())).clone()
}

/// What begins with a brace is an index beside a whole file, all else the front of the file.
pub fn target(front: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("config.json"), CONFIG).unwrap();
    if front.starts_with(b"{") {
        fs::write(path("model.safetensors.index.json"), front).unwrap();
        fs::write(path("model.safetensors"), FILE).unwrap();
    } else {
        fs::write(path("model.safetensors"), [front, &FILE[data()..]].concat()).unwrap();
    }
    let named = |why: Error| {
        let named = matches!(&why, Error::Load { path, .. } if path.starts_with(dir.path()));
        assert!(named, "it names no file: {why}");
    };
    match Checkpoint::open(dir.path()) {
        Ok(checkpoint) => {
            for name in checkpoint.names() {
                let tensor = checkpoint.tensor(name).unwrap();
                let bits = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize();
                assert_eq!(bits, 8 * tensor.bytes.bytes().len(), "{name}");
            }
        }
        Err(why) => return named(why),
    }
    let options = LoadOptions { context: Some(16), ..LoadOptions::default() };
    match Model::load(dir.path(), cpu(), &options) {
        Ok(model) => {
            assert!(model.memory().weights <= 2 * (front.len() + FILE.len()) as u64);
            let logits = model.session().unwrap().prefill(&[1, 2, 3], &mut |_, _| {}).unwrap();
            assert_eq!(logits.len(), model.config().vocab as usize);
        }
        Err(why) => named(why),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&FILE[8..data()]).unwrap();
    let names = header.keys().filter(|name| *name != "__metadata__");
    let map: serde_json::Map<_, _> = names.map(|name| (name.clone(), "model.safetensors".into())).collect();
    let index = serde_json::json!({"metadata": {"total_size": FILE.len()}, "weight_map": map});
    vec![FILE[..data()].to_vec(), index.to_string().into_bytes()]
}
