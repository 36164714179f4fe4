//! Checkpoints that are broken in one place each: the error names the file and what is wrong, and nothing panics.

use std::path::Path;

use gatedelta::Error;
use gatedelta::qwen::{Config, LoadOptions, MemoryPlan, Model};
use gatedelta::tune::Caps;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::util::{devices, golden};

/// A copy of a golden checkpoint.
fn copy(model: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(model)).unwrap() {
        let path = entry.unwrap().path();
        if !path.file_name().unwrap().to_string_lossy().starts_with("expected") {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

fn text() -> tempfile::TempDir {
    copy("models/tiny-text")
}

fn vision() -> tempfile::TempDir {
    copy("models/tiny-vision")
}

fn load(dir: &Path) -> Result<Model, Error> {
    Model::load(dir, devices()[0].backend.clone(), &LoadOptions { context: Some(64), ..LoadOptions::default() })
}

/// The directory is refused by an error of a file that holds all these words.
#[track_caller]
fn refused(dir: &Path, words: &[&str]) {
    let e = load(dir).unwrap_err();
    assert!(matches!(e, Error::Load { .. }), "{e:?}");
    for word in words {
        assert!(e.to_string().contains(word), "no {word:?} in: {e}");
    }
}

fn edit(dir: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(file);
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Changes the header of a safetensors file and writes it back with the same data.
fn edit_header(dir: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(file);
    let bytes = std::fs::read(&path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    change(&mut header);
    let header = header.to_string().into_bytes();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], &header[..], &bytes[8 + n..]].concat()).unwrap();
}

const FILE: &str = "model.safetensors";
const NORM: &str = "model.layers.1.input_layernorm.weight";

#[test]
fn a_whole_copy_loads() {
    load(text().path()).unwrap();
    load(vision().path()).unwrap();
}

#[test]
fn shards_are_found_without_an_index() {
    let dir = vision();
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    load(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors-00002-of-00002.safetensors")).unwrap();
    refused(dir.path(), &["no file holds tensor"]);
}

#[test]
fn missing_files_are_named() {
    let dir = vision();
    let shard = "model.safetensors-00002-of-00002.safetensors";
    std::fs::remove_file(dir.path().join(shard)).unwrap();
    refused(dir.path(), &[shard, "the shard is missing", "tensor"]);
    let dir = text();
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    refused(dir.path(), &["no .safetensors file"]);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["config.json"]);
    refused(&dir.path().join("nowhere"), &["nowhere"]);
}

#[test]
fn an_index_does_not_leave_its_directory() {
    for file in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."] {
        let dir = vision();
        edit(dir.path(), "model.safetensors.index.json", |v| v["weight_map"]["lm_head.weight"] = json!(file));
        refused(dir.path(), &["index.json", "lm_head.weight", "plain file name"]);
    }
}

#[test]
fn files_cut_short_are_refused() {
    let dir = text();
    let path = dir.path().join(FILE);
    let bytes = std::fs::read(&path).unwrap();
    for (keep, word) in [
        (0, "too short"),
        (5, "too short"),
        (8, "its header claims"),
        (500, "its header claims"),
        (bytes.len() - 1, "claims the bytes"),
    ] {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        refused(dir.path(), &[FILE, word]);
    }
    std::fs::write(&path, [&bytes[..], &[0; 7]].concat()).unwrap();
    refused(dir.path(), &[FILE, "its tensors end at byte"]);
}

#[test]
fn huge_header_lengths_are_refused() {
    let dir = text();
    let path = dir.path().join(FILE);
    let bytes = std::fs::read(&path).unwrap();
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 40, bytes.len() as u64] {
        std::fs::write(&path, [&length.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
        refused(dir.path(), &[FILE, "its header claims"]);
    }
}

#[test]
fn headers_that_lie_are_refused_with_the_tensor() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 7] = [
        (|t| t["dtype"] = json!("F99"), "unknown dtype"),
        (|t| t["dtype"] = json!("I16"), "dtype I16"),
        (|t| t["data_offsets"] = json!([0, u64::MAX]), "claims the bytes"),
        (|t| t["data_offsets"] = json!([192, 0]), "claims the bytes"),
        (|t| t["shape"] = json!([97]), "does not take the"),
        (|t| t["shape"] = json!([u64::MAX, u64::MAX]), "does not take the"),
        (|t| t["shape"] = json!([2, 48]), "has the shape [2, 48], and the config asks for [96]"),
    ];
    for (change, word) in cases {
        let dir = text();
        edit_header(dir.path(), FILE, |h| change(&mut h[NORM]));
        refused(dir.path(), &[FILE, NORM, word]);
    }
    let dir = text();
    edit_header(dir.path(), FILE, |h| {
        h.as_object_mut().unwrap().shift_remove(NORM).unwrap();
    });
    refused(dir.path(), &[FILE, "the one before it ends at 317704"]);
    let dir = text();
    edit_header(dir.path(), FILE, |h| {
        let tensor = h.as_object_mut().unwrap().shift_remove(NORM).unwrap();
        h["renamed"] = tensor;
    });
    refused(dir.path(), &[NORM, "no file holds tensor"]);
}

#[test]
fn a_config_that_contradicts_the_tensors_is_refused() {
    for (key, value, words) in [
        ("hidden_size", json!(128), ["embed_tokens", "config asks for"]),
        ("num_hidden_layers", json!(3), ["layer_types", "3, one a layer"]),
        ("linear_num_value_heads", json!(4), ["in_proj_qkv", "config asks for"]),
        ("linear_num_value_heads", json!(3), ["config.json", "a multiple of Hk"]),
        ("linear_key_head_dim", json!(17), ["config.json", "K (q/k head size)"]),
        ("vocab_size", json!(600), ["embed_tokens", "config asks for"]),
        ("tie_word_embeddings", json!(false), ["lm_head.weight", "no file holds"]),
        ("vocab_size", json!(-1), ["config.json", "vocab_size"]),
        ("hidden_size", json!("wide"), ["config.json", "hidden_size"]),
        ("hidden_act", json!("gelu"), ["config.json", "silu"]),
        ("attention_bias", json!(true), ["config.json", "attention_bias"]),
        ("num_attention_heads", json!(3), ["config.json", "num_key_value_heads"]),
        ("rope_parameters", json!({"rope_type": "yarn"}), ["config.json", "yarn"]),
        ("layer_types", json!(["full_attention", 1, 2, 3]), ["config.json", "layer_types[1]"]),
        ("quantization_config", json!({"bits": 4}), ["config.json", "quantization_config"]),
        ("max_position_embeddings", json!(0), ["config.json", "max_position_embeddings"]),
        ("linear_conv_kernel_dim", json!(9), ["config.json", "linear_conv_kernel_dim"]),
    ] {
        let dir = text();
        edit(dir.path(), "config.json", |c| c[key] = value);
        refused(dir.path(), &words);
    }
    // Fewer layers than the files hold.
    let dir = text();
    edit(dir.path(), "config.json", |c| {
        c["num_hidden_layers"] = json!(3);
        c["layer_types"].as_array_mut().unwrap().pop();
    });
    refused(dir.path(), &[FILE, "belongs to layer 3 and the config has 3"]);
}

/// Row lengths are computed in u32: a config whose rows do not fit is refused before anybody does.
#[test]
fn a_config_of_rows_without_measure_is_refused() {
    let dir = text();
    let config = |heads: u64, kv: u64, dim: u64| {
        edit(dir.path(), "config.json", |c| {
            c["num_attention_heads"] = json!(heads);
            c["num_key_value_heads"] = json!(kv);
            c["head_dim"] = json!(dim);
        });
        Config::read(&dir.path().join("config.json"))
    };
    for (heads, kv, dim) in [(1 << 24, 1, 256), (1 << 24, 1 << 24, 256), (1 << 23, 1, 4)] {
        let why = config(heads, kv, dim).unwrap_err().to_string();
        assert!(why.contains("num_attention_heads") && why.contains("at most 2^24"), "{why}");
    }
    let wide = config(1 << 14, 1 << 14, 256).unwrap();
    assert!(wide.parameters() > 1 << 24 && wide.full_row() == 1 << 24);
    // Keys of one position are 16 MiB: a device that sees 32 at a time would need a page for two positions.
    let small = Caps { max_binding: 32 << 20, ..caps(1 << 40) };
    let options = LoadOptions { context: Some(1000), ..LoadOptions::default() };
    let why = MemoryPlan::new(&wide, &small, 0, &options).unwrap_err();
    assert!(matches!(&why, Error::Unsupported { .. }) && why.to_string().contains("a context of 1000"), "{why}");
}

#[test]
fn other_architectures_are_named() {
    for name in ["LlamaForCausalLM", "Qwen3_5MoeForConditionalGeneration", "Qwen3NextForCausalLM"] {
        let dir = text();
        edit(dir.path(), "config.json", |c| c["architectures"] = json!([name]));
        refused(dir.path(), &["config.json", name, "Qwen3_5ForCausalLM"]);
    }
    let dir = text();
    for broken in ["", "{", "[]", "null", "{\"architectures\": 3}"] {
        std::fs::write(dir.path().join("config.json"), broken).unwrap();
        refused(dir.path(), &["config.json"]);
    }
}

#[test]
fn the_texts_beside_the_weights_are_checked_too() {
    let dir = text();
    edit(dir.path(), "tokenizer.json", |t| t["added_tokens"][8]["id"] = json!(500));
    refused(dir.path(), &["tokenizer.json", "</tool_response>", "500"]);
    let dir = text();
    edit(dir.path(), "tokenizer.json", |t| t["added_tokens"] = json!([]));
    refused(dir.path(), &["tokenizer.json", "no token 468", "another"]);
    // The library panics here; an escape that is none, and a file that ends inside of its decoder.
    let whole = std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    let at = whole.rfind("\"ByteLevel\"").unwrap();
    assert!(whole[..at].trim_end().ends_with("\"type\":"));
    for broken in [whole[..at].to_string(), whole[..at].to_string() + "\"\\ud800\"" + &whole[at + 11..]] {
        std::fs::write(dir.path().join("tokenizer.json"), broken).unwrap();
        refused(dir.path(), &["tokenizer.json"]);
    }
    let dir = text();
    std::fs::write(dir.path().join("chat_template.jinja"), "{% for %}").unwrap();
    refused(dir.path(), &["chat_template.jinja", "broken template"]);
    let dir = text();
    edit(dir.path(), "generation_config.json", |g| g["top_p"] = json!(1.5));
    refused(dir.path(), &["generation_config.json", "top_p"]);
    let dir = text();
    edit(dir.path(), "generation_config.json", |g| g["eos_token_id"] = json!("end"));
    refused(dir.path(), &["generation_config.json", "eos_token_id"]);
    // Without them the weights still load, and who asks for them is told.
    let dir = text();
    for file in ["tokenizer.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"] {
        std::fs::remove_file(dir.path().join(file)).unwrap();
    }
    let model = load(dir.path()).unwrap();
    assert!(model.tokenizer().unwrap_err().to_string().contains("tokenizer.json"));
    assert!(model.chat_template().is_err());
    assert_eq!(model.stop_ids(), [468]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_flipped_byte_of_a_header_panics(at in 0usize..6000, byte: u8) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = std::fs::read(golden("models/tiny-text").join(FILE)).unwrap();
        bytes[at] = byte;
        std::fs::write(dir.path().join(FILE), bytes).unwrap();
        std::fs::copy(golden("models/tiny-text").join("config.json"), dir.path().join("config.json")).unwrap();
        let _ = Model::plan(dir.path(), devices()[0].backend.caps(), &LoadOptions::default());
    }
}

fn caps(memory: u64) -> Caps {
    Caps { memory: Some(memory), ..devices()[0].backend.caps().clone() }
}

#[test]
fn the_plan_says_what_does_not_fit_and_what_would() {
    let dir = golden("models/tiny-vision");
    let plan = |context, memory| Model::plan(&dir, &caps(memory), &LoadOptions { context, ..LoadOptions::default() });
    let whole = plan(Some(50_000), 1 << 40).unwrap();
    assert_eq!(whole.states, 6 * 2 * 128 * 128 * 4);
    assert_eq!(whole.tails, 6 * 3 * 512 * 4);
    assert_eq!(whole.cache, 2 * 2 * 64 * 4 * 50_000);
    assert!(whole.to_string().contains("keys and values"));
    let e = plan(Some(50_000), whole.total() - 1).unwrap_err();
    let Error::OutOfMemory { needed, ref limit, .. } = e else { panic!("{e:?}") };
    assert_eq!(needed, whole.total());
    // The context that it proposes fits, and one more does not.
    let would: u64 = limit.split("at most ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    plan(Some(would), whole.total() - 1).unwrap();
    plan(Some(would + 1), whole.total() - 1).unwrap_err();
    // Nobody asked for a context: what fits is taken.
    let free = plan(None, whole.total() * 2 / 3).unwrap();
    assert!(free.context < 32_768 && free.fits());
    let e = plan(None, 1 << 20).unwrap_err().to_string();
    assert!(e.contains("without any context it needs"), "{e}");
    // Snapshots are a part of it: they leave that much less for the context.
    let options = LoadOptions { context: Some(50_000), snapshots: 3 << 20, ..LoadOptions::default() };
    let with = Model::plan(&dir, &caps(1 << 40), &options).unwrap();
    assert_eq!((with.snapshots, with.total()), (3 << 20, whole.total() + (3 << 20)));
    let line = with.to_string();
    assert!(line.lines().any(|l| l.trim_start().starts_with("snapshots") && l.ends_with("3.0 MiB")), "{line}");
    assert!(!whole.to_string().contains("snapshots"));
    let e = Model::plan(&dir, &caps(whole.total()), &options).unwrap_err().to_string();
    assert!(e.contains("snapshots 3.0 MiB"), "{e}");
    let exact = caps(plan(None, 1 << 40).unwrap().total());
    let less = Model::plan(&dir, &exact, &LoadOptions { context: None, ..options }).unwrap();
    assert!(less.context < 32_768 && less.fits());
    for context in [0, 65_537] {
        assert!(matches!(plan(Some(context), 1 << 40), Err(Error::Argument { .. })));
    }
}
