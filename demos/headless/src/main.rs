//! Lists devices, proves the kernels right on them, runs single cases, and benchmarks. No window, no network, no state.
//!
//! Exit codes: 0 if all is well, 1 for a failed check or any other error, 2 for a device that is not there, 64 for a command
//! line that cannot be understood.

mod bench;
mod bench_agent;
mod bench_grad;
mod bench_model;
mod bench_op;
mod bench_restore;
mod bench_rows;
mod bench_start;
mod case;
mod check;
mod checkpoints;
mod counted;
mod devices;
mod doors;
mod files;
mod grads;
mod junit;
mod large;
mod observe;
mod oracle;
mod oracle_grad;
mod peak;
mod plot;
#[path = "../../quiet.rs"]
mod quiet;
mod same;
mod table;
mod timing;
mod ways;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The test runner of gatedelta: conformance, single cases and benchmarks on every device
#[derive(Parser, Debug)]
#[command(name = "gatedelta-headless", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List adapters and backends, their limits, whether they work, and which one would be chosen
    Devices,
    /// Check the operator, its gradients and the model on each device against known answers
    Check(check::Args),
    /// Run one case file and write o and ht, and the gradients of a case that has do
    Run(doors::Run),
    /// Write a checkpoint's logits for a list of token ids
    Logits(doors::Logits),
    /// Print the ids that greedy decoding appends to a list of token ids
    Generate(doors::Generate),
    /// Time the operator, its backward pass, whole models and long conversations
    Bench(Box<bench::Args>),
}

fn main() -> ExitCode {
    quiet::hush();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn,wgpu=error,naga=error")).init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    let done = match &cli.command {
        Command::Devices => devices::run().map(|()| true),
        Command::Check(args) => check::run(args),
        Command::Run(args) => doors::run(args).map(|()| true),
        Command::Logits(args) => doors::logits(args).map(|()| true),
        Command::Generate(args) => doors::generate(args).map(|()| true),
        Command::Bench(args) => bench::run(args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            match error.downcast_ref::<gatedelta::Error>() {
                Some(gatedelta::Error::NoDevice { .. }) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Prints; a reader that has gone away is not an error.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
