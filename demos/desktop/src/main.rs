//! The program `gatedelta-desktop`.

use std::process::ExitCode;

fn main() -> ExitCode {
    gatedelta_desktop::main()
}
