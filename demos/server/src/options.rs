//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser};

/// The environment variable that holds an API key.
pub const KEY: &str = "GATEDELTA_API_KEY";

/// An OpenAI-compatible server on a local Gated DeltaNet model.
///
/// It serves /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics. Where the environment variable
/// GATEDELTA_API_KEY is set, clients must send it. Ctrl-C or SIGTERM lets running answers end; a second one ends them.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Args {
    /// A Qwen3.5 checkpoint: a directory with config.json, safetensors and tokenizer.json [default: a small one inside the
    /// program, trained for the agent's tools]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// The name that clients ask for [default: the directory's; gatedelta-agent for the model inside]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// cpu, cuda, lavapipe, swiftshader or a part of an adapter's name [default: the best that works]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// Where to listen; anything but this machine itself needs an API key to be safe
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// 0 takes a free one, which is told
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,

    /// A file that holds the API key, in place of the environment variable
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Longest prompt and answer together, in tokens [default: what fits, up to 32768]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub context: Option<u64>,

    /// Tokens of an answer at most, whatever is asked for
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_tokens: u64,

    /// Answers written at the same time [default: what fits, up to 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub slots: Option<u16>,

    /// MiB of device memory for what was read, so that prompts which begin alike are not read again
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub cache: u32,

    /// Requests that may wait for a slot; more are refused
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub queue: u16,

    /// Bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = body)]
    pub body_limit: usize,

    /// Open connections; more have to wait
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..))]
    pub connections: u16,

    /// Seconds from a request to the end of its answer
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub time_limit: Duration,

    /// Seconds that a request may take to arrive, first its head and then its body, and a client to take what is sent
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = seconds)]
    pub network_limit: Duration,

    /// Seconds that running answers have to end when the server stops
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = seconds)]
    pub grace: Duration,

    /// Tells on the standard error what happens inside
    #[arg(long, short, action = ArgAction::SetTrue)]
    pub verbose: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let fits = |time: &Duration| !time.is_zero() && *time <= Duration::from_secs(1 << 20);
    time.filter(fits).ok_or_else(|| format!("expected seconds, above 0 and up to {}", 1 << 20))
}

fn body(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(bytes) if (1024..=1 << 30).contains(&bytes) => Ok(bytes),
        _ => Err(format!("expected 1024 to {}", 1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
        let args = |line: &str| Args::try_parse_from(line.split(' '));
        assert_eq!(args("server --grace 0.5").unwrap().grace, Duration::from_millis(500));
        assert!(args("server").unwrap().host.is_loopback());
        for bad in
            ["--slots 0", "--time-limit 0", "--grace -1", "--grace nan", "--host here", "--body-limit 1", "--what"]
        {
            assert!(args(&format!("server {bad}")).is_err(), "{bad}");
        }
    }
}
