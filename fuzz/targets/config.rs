//! `config.json`, `generation_config.json` and `tokenizer_config.json`.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::qwen::{ChatTemplate, Config, GenerationConfig, LoadOptions, MemoryPlan, template};
use gatedelta::shape::Dtype;
use gatedelta::tune::Caps;

pub const WORDS: &[&str] = &[
    "null",
    "true",
    "4294967295",
    "16777216",
    "1e308",
    "-0.0",
    "[]",
    "{}",
    "text_config",
    "rope_parameters",
    "layer_types",
    "full_attention_interval",
    "linear_num_value_heads",
    "head_dim",
    "default",
    "chat_template",
    "\\ud800",
];

const FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../tests/golden/models/tiny-text/config.json")),
    ("generation_config.json", include_bytes!("../../tests/golden/models/tiny-text/generation_config.json")),
    ("tokenizer_config.json", include_bytes!("../../tests/golden/models/tiny-text/tokenizer_config.json")),
    ("config.json", include_bytes!("../../tests/golden/models/tiny-vision/config.json")),
];

/// The CPU, and a device that sees little memory at a time.
fn caps() -> &'static [Caps; 2] {
    static CAPS: OnceLock<[Caps; 2]> = OnceLock::new();
    CAPS.get_or_init(|| {
        let cpu = Cpu::new(Some(1)).unwrap().caps().clone();
        let small = Caps { max_binding: 1 << 27, max_buffer: 1 << 28, memory: Some(1 << 32), ..cpu.clone() };
        [cpu, small]
    })
}

/// The first byte chooses the file, the others are its content.
pub fn target(data: &[u8]) {
    let Some((which, content)) = data.split_first() else { return };
    let (name, _) = FILES[usize::from(*which) % FILES.len()];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    match name {
        "config.json" => config(&path),
        "generation_config.json" => match GenerationConfig::read(&path) {
            Ok(generation) => generation.sampling.check().unwrap(),
            Err(why) => named(&why, &path),
        },
        _ => {
            let read = template::special_tokens(dir.path()).and_then(|_| ChatTemplate::read(dir.path()));
            read.map(drop).unwrap_or_else(|why| named(&why, &path));
        }
    }
}

fn named(why: &Error, path: &Path) {
    assert!(matches!(why, Error::Load { path: found, .. } if found == path), "it does not name the file: {why}");
}

/// What is taken holds together: it passes its own check, and all that is computed from it can be computed.
fn config(path: &Path) {
    let config = match Config::read(path) {
        Ok(config) => config,
        Err(why) => return named(&why, path),
    };
    config.check().unwrap();
    assert!(config.parameters() > 0 && config.linear_row() > config.conv_channels() && config.full_row() > 0);
    for caps in caps() {
        for context in [None, Some(1), Some(config.max_positions)] {
            match MemoryPlan::new(&config, caps, 1 << 20, &LoadOptions { context, kv: Dtype::F16, snapshots: 1 << 20 })
            {
                Ok(plan) => assert!(plan.fits() && plan.total() > 1 << 20),
                Err(Error::OutOfMemory { .. } | Error::Unsupported { .. } | Error::Argument { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    FILES.iter().enumerate().map(|(i, (_, file))| [&[i as u8][..], file].concat()).collect()
}
