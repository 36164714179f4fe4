//! One test binary: `cargo test gdn::` runs one file's tests.

mod attention;
#[cfg(feature = "burn")]
mod burn;
#[cfg(feature = "burn-gpu")]
mod burn_gpu;
#[cfg(feature = "burn")]
mod burn_mix;
#[cfg(feature = "webgpu")]
mod contract;
mod cpu;
mod cuda;
mod cut;
mod formula;
mod formula_grad;
mod gdn;
mod grad;
mod grad_around;
mod grad_around_bad;
mod layering;
mod naive;
mod ops;
mod plan;
#[cfg(feature = "qwen")]
mod qwen;
#[cfg(feature = "qwen")]
mod qwen_bad;
#[cfg(feature = "qwen")]
mod qwen_batch;
#[cfg(feature = "qwen")]
mod qwen_naive;
#[cfg(feature = "qwen")]
mod qwen_recover;
#[cfg(feature = "qwen")]
mod qwen_sample;
#[cfg(feature = "qwen")]
mod qwen_state;
#[cfg(feature = "store")]
mod qwen_store;
#[cfg(feature = "qwen")]
mod qwen_text;
mod util;
#[cfg(feature = "webgpu")]
mod webgpu;
