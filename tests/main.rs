//! The integration tests, as one binary.

#[cfg(feature = "qwen")]
mod qwen_text;
