//! One test binary: `cargo test gdn::` runs one file's tests.

mod gdn;
mod layering;
mod naive;
mod plan;
#[cfg(feature = "qwen")]
mod qwen_text;
mod util;
