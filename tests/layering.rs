//! Modules only look down: the map in `src/lib.rs`, enforced by reading `crate::` paths.

use std::path::{Path, PathBuf};

/// Modules from the bottom up. A file may name the modules of lower rank, and its own.
const RANKS: &[&[&str]] = &[
    &["error"],
    &["shape"],
    &["tune"],
    &["plan", "kernel"],
    // The seam itself: pass and the trait need each other's types.
    &["pass", "backend", "source"],
    &["ops", "gdn"],
    &["device"],
    &["qwen"],
    &["burn"],
];

fn rank(module: &str) -> Option<usize> {
    RANKS.iter().position(|r| r.contains(&module))
}

fn files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The modules that a source names as `crate::module` or in `use crate::{a, b::c}`, outside comments.
fn named(source: &str) -> Vec<String> {
    let code: String = source.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join(" ");
    let mut found = Vec::new();
    let word = |s: &str| -> String { s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    for (at, path) in code.match_indices("crate::") {
        let rest = &code[at + path.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.push(word(rest));
            continue;
        };
        let (mut depth, mut item) = (1, String::new());
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => found.push(word(std::mem::take(&mut item).trim())),
                _ => item.push(c),
            }
            if depth == 0 {
                found.push(word(item.trim()));
                break;
            }
        }
    }
    found
}

/// The first name that breaks the order, if any.
fn violation(module: &str, source: &str) -> Option<String> {
    let own = rank(module)?;
    named(source).into_iter().find(|n| {
        n != module && rank(n).is_some_and(|r| r >= own) && RANKS[own].len() < 2 || rank(n).is_some_and(|r| r > own)
    })
}

#[test]
fn modules_only_look_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&src, &mut all);
    assert!(all.len() > 20);
    for path in all {
        let inside = path.strip_prefix(&src).unwrap().to_string_lossy().into_owned();
        let module = inside.split(['/', '\\', '.']).next().unwrap().to_owned();
        if module == "lib" {
            continue;
        }
        assert!(rank(&module).is_some(), "{inside}: module {module} has no place in the order");
        let source = std::fs::read_to_string(&path).unwrap();
        if let Some(name) = violation(&module, &source) {
            panic!("{inside} names crate::{name}, which is not below it");
        }
    }
}

#[test]
fn only_the_device_module_names_concrete_backends() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&src, &mut all);
    for path in all {
        let inside = path.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
        // Sharing buffers with another library's wgpu is about that one backend.
        let shares = inside == "burn/gpu.rs";
        if inside.starts_with("backend") || inside.starts_with("device") || inside == "lib.rs" || shares {
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let code = source.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        for concrete in ["backend::cpu", "backend::webgpu", "backend::cuda"] {
            assert!(!code.contains(concrete), "{inside} names {concrete}");
        }
    }
}

#[test]
fn a_planted_violation_is_caught() {
    assert_eq!(violation("shape", "use crate::error::Error; use crate::tune::Caps;").as_deref(), Some("tune"));
    assert_eq!(violation("backend", "use crate::{error::{Error, Result}, gdn};").as_deref(), Some("gdn"));
    assert_eq!(violation("gdn", "use crate::{error::Error, pass::Pass, plan::Plan}; // crate::qwen"), None);
}
