//! `bench --rows`: what other libraries are timed over too.

use std::path::Path;
use std::process::Output;

use tempfile::TempDir;

use crate::{fails, path, program, text};

/// The lines of `bench --rows` over the rows in tests/rows.
fn rows(args: &[&str]) -> (Output, Vec<serde_json::Value>) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows/rows.json");
    let output = program(&[&["bench", "--rows", path(&file), "--seconds", "0.01", "--json"], args].concat());
    let lines = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (output, lines)
}

#[test]
fn bench_runs_the_rows_that_others_run() {
    // The answers are of compare/peers_cuda.py (`--peers float64`); the decode of them left out, so that its row is compared
    // with this program's own.
    let answers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows");
    for (device, store, bound) in [("cpu", "f32", 1e-5), ("cpu", "bf16", 5e-3), ("lavapipe", "bf16", 5e-3)] {
        let (output, lines) = rows(&["--device", device, "--store", store, "--answers", path(&answers)]);
        if output.status.code() == Some(2) {
            let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name.trim() == device), "{}", text(&output.stderr));
            println!("skipped: {device}: {}", text(&output.stderr));
            continue;
        }
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        assert_eq!(lines[0]["bench"], "peer");
        assert_eq!(lines[1]["bench"], "first_call");
        assert_eq!(lines.len(), 5);
        for (line, checked) in lines[2..].iter().zip(["float64 answers", "float64 answers", "this program's float64"]) {
            assert!(line["checked"].as_str().unwrap().starts_with(checked), "{line}");
            assert!(line["median_s"].as_f64().unwrap() > 0.0 && line["right"] == true, "{line}");
            for error in line["errors"].as_object().unwrap().values() {
                assert!(error.as_f64().unwrap() <= bound, "{line}");
            }
        }
        let (_, own) = rows(&["--device", device, "--store", store, "--kinds", "backward"]);
        assert_eq!(own.len(), 3);
        assert!(own[2]["checked"].as_str().unwrap().starts_with("this program's float64"), "{}", own[2]);
    }
}

#[test]
fn rows_that_cannot_be_judged_have_failed() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("rows.json");
    let run = |rows: &str, args: &[&str]| {
        std::fs::write(&file, format!(r#"{{"k": 128, "v": 128, "seed": 7, "rows": [{rows}]}}"#)).unwrap();
        program(&[&["bench", "--device", "cpu", "--rows", path(&file), "--seconds", "0"], args].concat())
    };
    let row = |what: &str| {
        format!(r#"{{"id": "a/b", "kind": "forward", "hk": 1, "hv": 2, "lengths": "x", "gates": "table", {what}}}"#)
    };
    // No answers, and too much for this program's own.
    let large = run(&row(r#""seqlens": [4096]"#), &[]);
    assert_eq!(large.status.code(), Some(1));
    assert!(text(&large.stdout).contains("a/b failed: nothing to compare with"), "{}", text(&large.stdout));
    // Answers for other numbers.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rows/forward_1-2_66+3.safetensors");
    std::fs::copy(source, dir.path().join("a_b.safetensors")).unwrap();
    let other = run(&row(r#""seqlens": [65, 3]"#), &["--answers", path(dir.path())]);
    assert!(text(&other.stdout).contains("answers for other inputs"), "{}", text(&other.stdout));
    let few = run(&row(r#""seqlens": [64]"#), &["--within", "0"]);
    assert!(text(&few.stdout).contains("1 rows were not reached"), "{}", text(&few.stdout));
    for (wrong, words) in [
        (r#""seqlens": [1, "x"]"#, &["row 0", "seqlens"][..]),
        (r#""seqlens": [-1]"#, &["row 0", "seqlens"]),
        (r#""kind": "sideways", "seqlens": [1]"#, &["row 0", "sideways", "forward, backward or decode"]),
        (r#""kind": "decode", "seqlens": [2]"#, &["row 0", "expected ones in a decode"]),
        (r#""gates": "wide", "seqlens": [1]"#, &["row 0", "wide", "table, spread or raw"]),
        (r#""hv": 3.5, "seqlens": [1]"#, &["row 0", "hv"]),
    ] {
        fails(&run(&row(wrong), &[]), 1, words);
    }
    fails(&run("", &[]), 1, &["no row of these kinds"]);
    fails(&run(&row(r#""seqlens": [1]"#), &["--kinds", "sideways"]), 1, &["--kinds", "sideways"]);
    fails(&run(&row(r#""seqlens": [1]"#), &["--within=-1"]), 1, &["--within"]);
}
