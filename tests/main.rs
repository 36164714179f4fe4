//! One test binary: `cargo test gdn::` runs one file's tests.

mod attention;
mod cpu;
mod contract;
mod formula;
mod gdn;
mod layering;
mod naive;
mod ops;
mod plan;
#[cfg(feature = "qwen")]
mod qwen_text;
mod util;
#[cfg(feature = "webgpu")]
mod webgpu;
