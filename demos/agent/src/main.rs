//! The program `gatedelta-agent`.

#[path = "../../quiet.rs"]
mod quiet;

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet::hush();
    gatedelta_agent::main()
}
