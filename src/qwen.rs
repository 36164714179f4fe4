//! The Qwen3.5 runtime.

pub mod config;
pub mod files;
mod pyvalue;
pub mod sample;
pub mod template;
pub mod tokenizer;

pub use config::{Config, GenerationConfig, LayerKind};
pub use sample::{Sampler, Sampling, SplitMix64};
pub use template::ChatTemplate;
pub use tokenizer::{TextStream, Tokenizer};
