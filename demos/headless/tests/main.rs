//! The built program, from outside: exit codes, error texts, files and printed ids.

mod check;
mod rows;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use tempfile::TempDir;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path)
}

fn program(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gatedelta-headless"))
        .args(args)
        .env_remove("GATEDELTA_DEVICE")
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Asserts an exit code and that standard error speaks of every one of `words`.
fn fails(output: &Output, code: i32, words: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
}

/// A safetensors file in parts, to be put together again with something wrong.
struct Parts {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn read(path: &Path) -> Parts {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor =
            |(name, view): (String, TensorView<'_>)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec());
        Parts {
            metadata: header.metadata().clone().unwrap_or_default(),
            tensors: file.tensors().into_iter().map(tensor).collect(),
        }
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Dtype, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }

    fn write(&self, path: &Path) {
        let views = self
            .tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        std::fs::write(path, safetensors::serialize(views, Some(self.metadata.clone())).unwrap()).unwrap();
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let data = &self.tensors.iter().find(|t| t.0 == name).unwrap().3;
        data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

fn offsets(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn error(found: &[f32], wanted: &[f32]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let square = |x: f64| x * x;
    let off: f64 = found.iter().zip(wanted).map(|(&x, &y)| square(x as f64 - y as f64)).sum();
    (off / wanted.iter().map(|&y| square(y as f64)).sum::<f64>()).sqrt()
}

/// Runs a case that was changed and asserts that it is refused with these words and leaves no file.
fn refused(change: impl FnOnce(&mut Parts), words: &[&str]) {
    let dir = TempDir::new().unwrap();
    let (case, out) = (dir.path().join("case.safetensors"), dir.path().join("out.safetensors"));
    let mut parts = Parts::read(&golden("cases/varlen_with_empty.safetensors"));
    change(&mut parts);
    parts.write(&case);
    let output = program(&["run", "--device", "cpu", "--case", path(&case), "--out", path(&out)]);
    fails(&output, 1, &[&["error: ", "case.safetensors"], words].concat());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["case.safetensors"]);
}

#[test]
fn a_missing_tensor_is_named() {
    for name in ["q", "k", "v", "g", "beta", "cu_seqlens"] {
        refused(|parts| parts.tensors.retain(|t| t.0 != name), &[&format!("tensor {name} is missing")]);
    }
}

#[test]
fn a_shape_that_does_not_fit_is_named() {
    for name in ["k", "g", "beta", "h0", "o", "ht", "do", "dbeta"] {
        let change = |parts: &mut Parts| {
            let (_, _, shape, data) = parts.tensor(name);
            let row = data.len() / shape[0];
            shape[0] -= 1;
            data.truncate(data.len() - row);
        };
        refused(change, &[&format!("tensor {name}: found shape"), "expected ["]);
    }
    refused(|parts| parts.tensor("q").2 = vec![147, 128], &["tensor q: found shape [147, 128], expected 3 dimensions"]);
}

#[test]
fn a_type_that_does_not_fit_is_named() {
    refused(|parts| parts.tensor("g").1 = Dtype::I32, &["tensor g: found I32, expected F32"]);
    refused(|parts| parts.tensor("cu_seqlens").1 = Dtype::F32, &["tensor cu_seqlens: found F32, expected I32"]);
}

#[test]
fn heads_out_of_range_are_named() {
    // 128 numbers of v per token as 1 x 128, 128 of q as 2 x 64: Hv = 1 is no multiple of Hk = 2.
    let reshape = |parts: &mut Parts| {
        for name in ["v", "o", "do", "dv"] {
            parts.tensor(name).2 = vec![147, 1, 128];
        }
    };
    refused(reshape, &["Hv (value heads): found 1, expected a multiple of Hk = 2"]);
    let reshape = |parts: &mut Parts| {
        for name in ["q", "k", "dq", "dk"] {
            parts.tensor(name).2 = vec![147, 16, 8];
        }
        for name in ["v", "o", "do", "dv"] {
            parts.tensor(name).2 = vec![147, 16, 8];
        }
    };
    refused(reshape, &["K (q/k head size): found 8, expected a multiple of 16"]);
}

#[test]
fn offsets_that_do_not_fit_are_named() {
    let mut original = Parts::read(&golden("cases/varlen_with_empty.safetensors"));
    let data = original.tensor("cu_seqlens").3.clone();
    let cu: Vec<i32> = data.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let with = |i: usize, n: i32| {
        let mut cu = cu.clone();
        cu[i] = n;
        move |parts: &mut Parts| parts.tensor("cu_seqlens").3 = offsets(&cu)
    };
    refused(with(0, 1), &["cu_seqlens[0]: found 1, expected 0"]);
    refused(with(2, 200), &["cu_seqlens[3]: found", "expected at least cu_seqlens[2] = 200"]);
    refused(with(5, 146), &["cu_seqlens[5]: found 146, expected 147"]);
    refused(with(1, -3), &["cu_seqlens[1]: found -3"]);
    refused(|parts| (parts.tensor("cu_seqlens").2, parts.tensor("cu_seqlens").3) = (vec![0], vec![]), &["cu_seqlens"]);
}

#[test]
fn metadata_that_does_not_fit_is_named() {
    let set = |key: &'static str, value: &'static str| {
        move |parts: &mut Parts| {
            parts.metadata.insert(key.into(), value.into());
        }
    };
    refused(set("scale", "large"), &["metadata scale: found \"large\", expected a finite number"]);
    refused(set("scale", "nan"), &["metadata scale"]);
    refused(set("scale", "1e300"), &["metadata scale"]);
    refused(set("qk_l2norm", "yes"), &["metadata qk_l2norm: found \"yes\""]);
    refused(set("op", "softmax"), &["metadata op: found \"softmax\", expected \"gated_delta_rule\""]);
    refused(set("version", "2"), &["metadata version: found \"2\""]);
}

#[test]
fn a_gate_above_zero_is_named() {
    refused(|parts| parts.tensor("g").3[..4].copy_from_slice(&0.5f32.to_le_bytes()), &["g[0, 0]: found 0.5"]);
}

#[test]
fn files_that_are_no_case_are_refused() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out.safetensors");
    let whole = std::fs::read(golden("cases/one_token.safetensors")).unwrap();
    for (name, bytes) in [
        ("empty", &whole[..0]),
        ("short", &whole[..7]),
        ("cut", &whole[..whole.len() - 5]),
        ("text", b"not a case file"),
    ] {
        let case = dir.path().join(name);
        std::fs::write(&case, bytes).unwrap();
        let output = program(&["run", "--device", "cpu", "--case", path(&case), "--out", path(&out)]);
        fails(&output, 1, &[name, "not a safetensors file"]);
        assert!(!out.exists());
    }
    let absent = dir.path().join("absent");
    fails(
        &program(&["run", "--device", "cpu", "--case", path(&absent), "--out", path(&out)]),
        1,
        &["cannot read", "absent"],
    );
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let dir = TempDir::new().unwrap();
    let case = golden("cases/one_token.safetensors");
    for out in [dir.path().to_path_buf(), dir.path().join("no/such/out")] {
        let output = program(&["run", "--device", "cpu", "--case", path(&case), "--out", path(&out)]);
        fails(&output, 1, &["cannot write", path(&out)]);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_case_gives_its_answers_in_every_way() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out.safetensors");
    for name in ["varlen_with_empty", "qk_l2norm", "one_token", "no_initial_state"] {
        let case = golden(&format!("cases/{name}.safetensors"));
        let wanted = Parts::read(&case);
        for way in ["prefill", "split", "decode", "verify"] {
            let output = program(&["run", "--device", "cpu", "--case", path(&case), "--out", path(&out), "--way", way]);
            assert!(output.status.success(), "{}", text(&output.stderr));
            let found = Parts::read(&out);
            let mut names: Vec<_> = found.tensors.iter().map(|t| (t.0.as_str(), t.1, t.2.clone())).collect();
            names.sort_by_key(|t| t.0);
            let shape = |name: &str| wanted.tensors.iter().find(|t| t.0 == name).unwrap().2.clone();
            // dh0 is written without h0 too; what the file says of it, if anything, is compared below.
            let expected = ["dbeta", "dg", "dh0", "dk", "dq", "dv", "ht", "o"]
                .map(|name| (name, Dtype::F32, shape(if name == "dh0" { "ht" } else { name })));
            assert_eq!(names, expected);
            let dh0 = name != "no_initial_state";
            assert_eq!(wanted.tensors.iter().any(|t| t.0 == "dh0"), dh0);
            let (printed, mut said) = (text(&output.stdout), Vec::new());
            for tensor in ["o", "ht", "dq", "dk", "dv", "dg", "dbeta"].iter().chain(dh0.then_some(&"dh0")) {
                let error = error(&found.floats(tensor), &wanted.floats(tensor));
                assert!(error <= 1e-5, "{name} {way} {tensor}: {error:e}");
                said.push(format!("of {tensor} {error:.1e}"));
            }
            assert!(printed.contains(&format!("relative error {}\n", said.join(", "))), "{printed}: {said:?}");
        }
    }
}

#[test]
fn half_a_set_of_gradients_is_refused() {
    for name in ["dq", "dk", "dv", "dg", "dbeta", "dh0"] {
        refused(|parts| parts.tensors.retain(|t| t.0 != name), &[&format!("tensor {name} is missing, and d")]);
    }
    refused(|parts| parts.tensors.retain(|t| t.0 != "do"), &["tensor do is missing, and dht is there"]);
    refused(
        |parts| parts.tensors.retain(|t| !["do", "dht"].contains(&t.0.as_str())),
        &["tensor do is missing, and dq is there"],
    );
}

#[test]
fn without_dht_the_gradients_are_those_of_zeros() {
    let dir = TempDir::new().unwrap();
    let (case, out) = (dir.path().join("case.safetensors"), dir.path().join("out.safetensors"));
    let mut parts = Parts::read(&golden("cases/varlen_with_empty.safetensors"));
    parts.tensors.retain(|t| !["dq", "dk", "dv", "dg", "dbeta", "dh0"].contains(&t.0.as_str()));
    let run = |parts: &Parts| {
        parts.write(&case);
        let output = program(&["run", "--device", "cpu", "--case", path(&case), "--out", path(&out)]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let found = Parts::read(&out);
        ["dq", "dk", "dv", "dg", "dbeta", "dh0"].map(|name| found.floats(name))
    };
    let given = run(&parts);
    parts.tensor("dht").3.fill(0);
    let zeros = run(&parts);
    parts.tensors.retain(|t| t.0 != "dht");
    assert_eq!(run(&parts), zeros);
    assert_ne!(given, zeros);
    parts.tensors.retain(|t| t.0 != "do");
    parts.write(&case);
    let output = program(&["run", "--device", "cpu", "--case", path(&case), "--out", path(&out)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(Parts::read(&out).tensors.len(), 2, "gradients out of nothing");
}

#[test]
fn lavapipe_gives_the_same_answers() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out.safetensors");
    let case = golden("cases/varlen_with_empty.safetensors");
    let wanted = Parts::read(&case);
    for (way, store, bound) in [("prefill", "f32", 1e-5), ("verify", "f32", 1e-5), ("split", "bf16", 5e-3)] {
        let run = ["run", "--device", "lavapipe", "--case", path(&case), "--out", path(&out)];
        let output = program(&[&run[..], &["--way", way, "--store", store]].concat());
        if output.status.code() == Some(2) {
            let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name.trim() == "lavapipe"), "{}", text(&output.stderr));
            println!("skipped: lavapipe: {}", text(&output.stderr));
            return;
        }
        assert!(output.status.success(), "{}", text(&output.stderr));
        let found = Parts::read(&out);
        for tensor in ["o", "ht", "dq", "dk", "dv", "dg", "dbeta", "dh0"] {
            let error = error(&found.floats(tensor), &wanted.floats(tensor));
            assert!(error <= bound, "{way} {store} {tensor}: {error:e}");
        }
    }
}

#[test]
fn unknown_metadata_and_absent_answers_are_no_obstacle() {
    let dir = TempDir::new().unwrap();
    let (case, out) = (dir.path().join("case.safetensors"), dir.path().join("out.safetensors"));
    let original = golden("cases/qk_l2norm.safetensors");
    let (mut parts, wanted) = (Parts::read(&original), Parts::read(&original));
    parts.metadata.insert("author".into(), "somebody".into());
    parts.tensors.retain(|t| ["q", "k", "v", "g", "beta", "cu_seqlens", "h0"].contains(&t.0.as_str()));
    parts.write(&case);
    let output = program(&["run", "--device", "CPU", "--case", path(&case), "--out", path(&out)]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(error(&Parts::read(&out).floats("o"), &wanted.floats("o")) <= 1e-5);
}

#[test]
fn an_unknown_device_lists_the_choices() {
    let dir = TempDir::new().unwrap();
    let (case, out) = (golden("cases/one_token.safetensors"), dir.path().join("out"));
    let run = ["run", "--device", "abacus", "--case", path(&case), "--out", path(&out)];
    fails(&program(&run), 2, &["abacus", "\"cpu\""]);
    fails(&program(&["check", "--device", "cpu", "--device", "abacus"]), 2, &["abacus", "\"cpu\""]);
    fails(&program(&["bench", "--device", "abacus", "--op"]), 2, &["abacus"]);
    assert!(!out.exists());
}

#[test]
fn a_command_line_that_cannot_be_understood_is_neither_failure_nor_absence() {
    for args in [
        &["check", "--frobnicate"][..],
        &["check", "--runs", "0"],
        &["run"],
        &["frobnicate"],
        &[],
        &["logits", "--ids", "1,x"],
    ] {
        assert_eq!(program(args).status.code(), Some(64), "{args:?}");
    }
    assert_eq!(program(&["--help"]).status.code(), Some(0));
    assert_eq!(program(&["--version"]).status.code(), Some(0));
}

#[test]
fn devices_lists_the_cpu_and_a_choice() {
    let output = program(&["devices"]);
    assert!(output.status.success());
    let text = text(&output.stdout);
    for word in ["cpu", "threads", "self-test", "* chosen: "] {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
}

/// The ids of a prompt of a checkpoint, comma-separated.
fn list(parts: &Parts, name: &str) -> String {
    let data = &parts.tensors.iter().find(|t| t.0 == name).unwrap().3;
    let ids = data.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]).to_string());
    ids.collect::<Vec<_>>().join(",")
}

#[test]
fn a_checkpoint_gives_its_ids_and_logits() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out.safetensors");
    for name in ["tiny-text", "tiny-vision"] {
        let model = golden(&format!("models/{name}"));
        let wanted = Parts::read(&model.join("expected.safetensors"));
        let ids = list(&wanted, "prompt0.ids");
        let output = program(&["generate", "--device", "cpu", "--model", path(&model), "--ids", &ids, "-n", "24"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout).lines().last(), Some(list(&wanted, "prompt0.greedy").as_str()));

        let output =
            program(&["logits", "--device", "cpu", "--model", path(&model), "--ids", &ids, "--out", path(&out)]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let found = Parts::read(&out);
        let shape = &wanted.tensors.iter().find(|t| t.0 == "prompt0.logits").unwrap().2;
        assert_eq!((found.tensors.len(), &found.tensors[0].0, &found.tensors[0].2), (1, &"logits".to_string(), shape));
        let error = error(&found.floats("logits"), &wanted.floats("prompt0.logits"));
        assert!(error <= 1e-4, "{name}: {error:e}");
    }
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out");
    let model = golden("models/tiny-text");
    let logits = ["logits", "--device", "cpu", "--model", path(&model), "--ids", "1,512", "--out", path(&out)];
    fails(&program(&logits), 1, &["512"]);
    fails(&program(&["generate", "--device", "cpu", "--model", path(dir.path()), "--ids", "1"]), 1, &["config.json"]);
    assert!(!out.exists());
}

#[test]
fn bench_checks_before_it_times() {
    let args =
        ["bench", "--device", "cpu", "--op", "--heads", "1/2", "--tokens", "64,100", "--seconds", "0.01", "--json"];
    let output = program(&args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows[0]["bench"], "device");
    let prefills: Vec<_> = rows.iter().filter(|r| r["bench"] == "prefill").collect();
    assert_eq!(prefills.len(), 2);
    for row in rows.iter().skip(1) {
        assert!(row["median_s"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["relative_error"].as_f64().unwrap() <= 1e-5, "{row}");
    }
    assert!(rows.iter().all(|r| r["bench"] != "backward"), "only 512, 2048 and 8192 are gone back over");
    for wrong in ["-1", "nan", "1e300"] {
        fails(&program(&["bench", "--device", "cpu", "--op", &format!("--seconds={wrong}")]), 1, &["--seconds"]);
    }
}

#[test]
fn bench_goes_back_over_a_prefill() {
    // Longer than what is compared with float64, so that the rest must be zero; shared key heads.
    for store in ["f32", "bf16"] {
        let args = ["bench", "--device", "cpu", "--op", "--heads", "2/4", "--tokens", "2048", "--seconds", "0.01"];
        let output = program(&[&args[..], &["--store", store, "--json"]].concat());
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        let rows: Vec<serde_json::Value> =
            text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |name: &str| rows.iter().find(|r| r["bench"] == name).unwrap();
        let (prefill, backward) = (of("prefill"), of("backward"));
        assert_eq!(backward["size"], "T=2048");
        let bound = if store == "f32" { 1e-5 } else { 5e-3 };
        assert!(backward["relative_error"].as_f64().unwrap() <= bound, "{backward}");
        let ratio = backward["median_s"].as_f64().unwrap() / prefill["median_s"].as_f64().unwrap();
        assert!((backward["times_prefill"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9, "{backward}");
        assert!(prefill["times_prefill"].is_null());
    }
    let args = ["bench", "--device", "cpu", "--op", "--heads", "1/1", "--tokens", "512", "--seconds", "0.01"];
    let printed = text(&program(&args).stdout);
    assert!(printed.lines().any(|l| l.starts_with("backward  T=512 ")), "{printed}");
    assert!(printed.contains("times the prefill at T=512"), "{printed}");
}

#[test]
fn a_start_is_told_stage_by_stage() {
    let args = ["bench", "--start", "--device", "cpu", "--shape", "agent", "--runs", "2", "--json"];
    let output = program(&args);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    let rows: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<_> = rows.iter().map(|row| row["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["first start", "kernels kept"]);
    for row in &rows {
        let of = |name: &str| row[name].as_f64().unwrap();
        // 2048 ids and 8 layers as bf16: all weights of the shape.
        assert!((10e6..11.5e6).contains(&of("weight_bytes")), "{row}");
        assert!(of("first_s") > 0.0 && of("load_s") > 0.0 && of("total_s") >= of("first_s"), "{row}");
        assert_eq!(of("kernels"), 0.0, "the CPU's are compiled with the program");
    }
    fails(&program(&["bench", "--start", "--shape", "huge", "--device", "cpu"]), 1, &["--shape", "huge"]);
    let absent = ["bench", "--start", "--device", "cpu", "--model", "no/such/model"];
    fails(&program(&absent), 1, &["config.json", "a start failed"]);
    for wrong in [&["bench", "--runs", "2"][..], &["bench", "--start", "--runs", "0"], &["bench", "--start", "--once"]]
    {
        assert_eq!(program(wrong).status.code(), Some(64), "{wrong:?}");
    }
}

#[test]
fn a_conversation_is_read_once_and_plotted() {
    let dir = TempDir::new().unwrap();
    let plot = dir.path().join("plot.svg");
    let args =
        ["bench", "--agent", "--device", "cpu", "--turns", "6", "--length", "9000", "--plot", path(&plot), "--json"];
    let output = program(&args);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    let rows: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (turns, summary) = (&rows[..6], &rows[6]);
    assert_eq!((rows.len(), &summary["bench"]), (7, &"agent".into()));
    // 1290 of the system, then turns of 128 + 41 + 1035 + 81; a token that was written is read with what follows it.
    let mut position = 0;
    for (i, turn) in turns.iter().enumerate() {
        let new = if i == 0 { 1290 + 128 } else { 1 + 128 };
        for (prompt, new, written) in [("question", new, 41), ("result", 1 + 1035, 81)] {
            let prompt = &turn[prompt];
            let counts = ["restored", "read", "again"].map(|count| prompt[count].as_u64().unwrap());
            assert_eq!(counts, [position, new, 0], "{turn}");
            let [first, linear, full] = ["first_token_s", "linear_s", "full_s"].map(|s| prompt[s].as_f64().unwrap());
            assert!(linear > 0.0 && full > 0.0 && linear + full < first, "{turn}");
            position += new + written - 1;
        }
        let bytes = |of: &str| turn[of].as_u64().unwrap();
        assert_eq!(bytes("position"), position);
        // 2 layers with k and v of 2 heads of 64 f32; pages of 4096, 4096 and what is left.
        let pages = [4096, 8192, 9000].into_iter().find(|end| position <= *end).unwrap();
        assert_eq!(bytes("kv_bytes"), pages * 2048, "{turn}");
        // 6 layers with a state of 4 x 64 x 64 and a tail of 3 x 768 f32, for the session and each snapshot.
        assert_eq!(bytes("fixed_bytes"), 6 * (4 * 64 * 64 + 3 * 768) * 4 * (1 + bytes("snapshots")), "{turn}");
        assert_eq!(turn["other_bytes"], turns[0]["other_bytes"]);
    }
    assert_eq!(position, 8999);
    let numbers = ["kv_bytes_per_token_predicted", "kv_bytes_per_token", "other_growth_bytes", "read_again"];
    assert_eq!(numbers.map(|name| summary[name].as_f64().unwrap()), [2048.0, 2048.0, 0.0, 0.0]);
    assert_eq!((&summary["memory_holds"], &summary["back_restored"]), (&true.into(), &8999.into()));

    let svg = std::fs::read_to_string(&plot).unwrap();
    let (mut areas, mut lines) = (0, 0);
    let mut reader = quick_xml::Reader::from_str(&svg);
    loop {
        match reader.read_event().unwrap() {
            quick_xml::events::Event::Empty(e) => {
                areas += (e.name().as_ref() == "polygon") as usize;
                lines += (e.name().as_ref() == "polyline") as usize;
            }
            quick_xml::events::Event::Eof => break,
            _ => {}
        }
    }
    assert!(areas == 6 && lines > 5, "{svg}");
}

#[test]
fn a_conversation_that_cannot_be_held_is_refused() {
    let dir = TempDir::new().unwrap();
    let (plot, nowhere) = (dir.path().join("plot.svg"), dir.path().join("no/such.svg"));
    let bench = |more: &[&str]| program(&[&["bench", "--device", "cpu", "--agent"], more].concat());
    fails(&bench(&["--turns", "2", "--plot", path(&plot)]), 1, &["--turns 2", "at least 3"]);
    fails(&bench(&["--length", "1000", "--plot", path(&plot)]), 1, &["--length 1000", "6432"]);
    fails(&bench(&["--plot", path(&nowhere)]), 1, &["--plot", "no/such.svg"]);
    fails(&bench(&["--shape", "huge", "--plot", path(&plot)]), 1, &["--shape", "huge"]);
    let model = golden("models/tiny-text");
    fails(&bench(&["--model", path(&model), "--plot", path(&plot)]), 1, &["context", "100000"]);
    assert_eq!(program(&["bench", "--turns", "3"]).status.code(), Some(64));
    assert_eq!(bench(&["--op"]).status.code(), Some(64));
}
