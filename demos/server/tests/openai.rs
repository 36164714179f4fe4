//! The official Python client, where Python can have it.

use std::path::Path;
use std::process::Command;

use crate::util::{MODEL, start_with};

const KEY: &str = "a-key-of-twenty-characters";

/// The Python of an environment with the client; why there is none.
fn python() -> Result<std::path::PathBuf, String> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("openai-client");
    let python = dir.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" });
    let has =
        |python: &Path| Command::new(python).args(["-c", "import openai"]).output().is_ok_and(|o| o.status.success());
    if has(&python) {
        return Ok(python);
    }
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_string()),
        Err(why) => Err(why.to_string()),
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&dir)).map_err(|why| format!("python3 -m venv: {why}"))?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "openai>=2,<4"];
    run(Command::new(&python).args(install)).map_err(|why| format!("pip install openai: {why}"))?;
    Ok(python)
}

#[test]
fn the_official_client() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            let required = std::env::var("GATEDELTA_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name.trim() == "openai"), "openai is required: {why}");
            println!("skipped: the official client: {why}");
            return;
        }
    };
    let server = start_with("--slots 2", Some(KEY));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let output =
        Command::new(python).arg(script).args([&format!("http://{}/v1", server.address), KEY, MODEL]).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.trim().ends_with("all passed"), "{stdout}\n{stderr}");
    server.quiet();
}
