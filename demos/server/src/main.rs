//! The program `gatedelta-server`.

#[path = "../../quiet.rs"]
mod quiet;

use std::process::ExitCode;

fn main() -> ExitCode {
    quiet::hush();
    gatedelta_server::main()
}
