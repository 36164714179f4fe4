//! The program `gatedelta-agent`.

use std::process::ExitCode;

fn main() -> ExitCode {
    gatedelta_agent::main()
}
