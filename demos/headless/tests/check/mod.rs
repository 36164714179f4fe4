//! `check`: what passes, and what fails where and why.

use tempfile::TempDir;

use crate::{Parts, fails, golden, path, program, text};

#[test]
fn check_fails_on_wrong_answers_and_says_where() {
    let dir = TempDir::new().unwrap();
    let mut parts = Parts::read(&golden("cases/one_token.safetensors"));
    parts.write(&dir.path().join("right.safetensors"));
    parts.tensor("o").3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    parts.write(&dir.path().join("wrong.safetensors"));
    let (cases, models, junit) = (path(dir.path()), golden("models"), dir.path().join("report.xml"));
    let output =
        program(&["check", "--device", "cpu", "--cases", cases, "--models", path(&models), "--junit", path(&junit)]);
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}{}", text(&output.stderr));
    assert!(printed.lines().any(|l| l.starts_with("right") && l.ends_with("PASS")), "{printed}");
    assert!(printed.lines().any(|l| l.starts_with("wrong") && l.ends_with("FAIL")), "{printed}");
    assert!(printed.contains("12 failed: FAIL"), "{printed}");

    let report = std::fs::read_to_string(&junit).unwrap();
    let (mut cases, mut failures) = (0, 0);
    let mut reader = quick_xml::Reader::from_str(&report);
    loop {
        match reader.read_event().unwrap() {
            quick_xml::events::Event::Start(e) => {
                cases += (e.name().as_ref() == "testcase") as usize;
                failures += (e.name().as_ref() == "failure") as usize;
            }
            quick_xml::events::Event::Eof => break,
            _ => {}
        }
    }
    assert!(cases > 24, "{report}");
    assert_eq!(failures, 12);
}

#[test]
fn check_fails_on_a_wrong_gradient_and_on_nan() {
    let dir = TempDir::new().unwrap();
    let original = golden("cases/one_token.safetensors");
    let change = |name: &str, tensor: &str, x: f32| {
        let mut parts = Parts::read(&original);
        parts.tensor(tensor).3[..4].copy_from_slice(&x.to_le_bytes());
        parts.write(&dir.path().join(format!("{name}.safetensors")));
    };
    change("wrong", "dk", 1e6);
    change("nan", "dbeta", f32::NAN);
    // Without cotangents there is nothing to go back from, and nothing to fail.
    let mut parts = Parts::read(&original);
    parts.tensors.retain(|t| !t.0.starts_with('d'));
    parts.write(&dir.path().join("forward.safetensors"));
    let (models, junit) = (golden("models"), dir.path().join("report.xml"));
    let output = program(&[
        "check",
        "--device",
        "cpu",
        "--cases",
        path(dir.path()),
        "--models",
        path(&models),
        "--junit",
        path(&junit),
    ]);
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}{}", text(&output.stderr));
    for (name, tensor, error) in [("wrong", "dk", "1.0e0"), ("nan", "dbeta", "NaN")] {
        let rows: Vec<_> = printed.lines().filter(|l| l.starts_with(&format!("{name} ")) && l.ends_with("L")).collect();
        assert_eq!(rows.len(), 1, "{printed}");
        for store in ["f32", "f16", "bf16"] {
            let why = format!("{name} backward {store}: {tensor}: relative error {error}");
            assert!(printed.contains(&why), "{why:?} is not in {printed}");
        }
    }
    let forward = printed.lines().filter(|l| l.starts_with("forward ") && l.ends_with("PASS")).count();
    assert_eq!(forward, 4, "{printed}");
    assert!(printed.contains(" 6 failed: FAIL"), "{printed}");
    let report = std::fs::read_to_string(&junit).unwrap();
    assert!(report.contains("failures=\"6\"") && report.contains("name=\"backward bf16\""), "{report}");
}

#[test]
fn check_passes_on_the_cpu() {
    let output = program(&["check", "--device", "cpu", "--runs", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let printed = text(&output.stdout);
    assert!(printed.ends_with("0 failed: PASS\n"));
    // The generated cases are gone back over as well: the other head map, large heads.
    for name in ["varlen_with_empty", "generated_mod_heads", "generated_large_heads"] {
        let rows: Vec<_> = printed.lines().filter(|l| l.starts_with(name)).collect();
        let columns = rows[4].split_whitespace().count();
        assert_eq!((rows.len(), columns, rows[4].ends_with("PASS")), (5, 10, true), "{rows:?}");
    }
}

#[test]
fn check_needs_cases_and_answers() {
    let dir = TempDir::new().unwrap();
    let none = program(&["check", "--device", "cpu", "--cases", path(dir.path())]);
    fails(&none, 1, &["no case files", path(dir.path())]);
    let mut parts = Parts::read(&golden("cases/one_token.safetensors"));
    parts.tensors.retain(|t| t.0 != "ht");
    parts.write(&dir.path().join("bare.safetensors"));
    fails(&program(&["check", "--device", "cpu", "--cases", path(dir.path())]), 1, &["bare.safetensors", "o or ht"]);
    fails(&program(&["check", "--device", "cpu", "--models", path(dir.path())]), 1, &[path(dir.path())]);
}
