//! The command line.

use std::path::PathBuf;

use clap::Parser;
use gatedelta_agent::options::Args;

/// A window on a local Gated DeltaNet model.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Options {
    /// A Qwen3.5 checkpoint: a directory with config.json, safetensors and tokenizer.json [default: the last one, at first the
    /// one inside the program]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// cpu, cuda, lavapipe, swiftshader or a part of an adapter's name [default: the last choice, at first the best that works]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// The folder that the model may list and read; it cannot leave it
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub folder: PathBuf,

    /// Where notes are kept [default: in the user's data directory, as gatedelta-agent does]
    #[arg(long, value_name = "FILE")]
    pub notes: Option<PathBuf>,

    /// Where the conversation and the settings are kept [default: gatedelta-desktop in the user's data directory]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Longest conversation in tokens [default: what fits, up to 32768]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,

    /// Always takes the likeliest token
    #[arg(long)]
    pub greedy: bool,

    /// Tells on the standard error what happens inside
    #[arg(long, short)]
    pub verbose: bool,
}

impl Options {
    /// What the agent is given.
    pub fn agent(&self) -> Args {
        Args {
            model: self.model.clone(),
            device: self.device.clone(),
            folder: self.folder.clone(),
            notes: self.notes.clone(),
            context: self.context.map(|n| n as usize),
            greedy: self.greedy,
            ..Args::default()
        }
    }

    /// Where the conversation is kept.
    pub fn data(&self) -> Option<PathBuf> {
        self.data.clone().or_else(|| Some(dirs::data_dir()?.join("gatedelta-desktop")))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
        let options = |line: &str| Options::try_parse_from(line.split(' '));
        let given = options("desktop --data d --context 9 --greedy").unwrap();
        assert_eq!((given.data(), given.agent().context, given.agent().greedy), (Some("d".into()), Some(9), true));
        assert!(options("desktop --context 0").is_err());
    }
}
