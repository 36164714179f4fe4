//! Gated DeltaNet kernels and a Qwen3.5 runtime for the CPU and every GPU that wgpu reaches.

pub mod backend;
pub mod error;
pub mod gdn;
pub mod kernel;
pub mod ops;
pub mod pass;
pub mod plan;
#[cfg(feature = "qwen")]
pub mod qwen;
pub mod shape;
pub mod source;
pub mod tune;

pub use error::{Error, Result};
