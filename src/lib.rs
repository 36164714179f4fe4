//! Gated DeltaNet kernels and a Qwen3.5 runtime for the CPU, NVIDIA GPUs through CUDA, and every GPU that wgpu reaches.
//!
//! Gated DeltaNet is the linear-attention layer of Qwen3-Next and Qwen3.5: per head, a state `S [K, V]` of fixed size takes
//! the place of a growing cache of keys and values.
//!
//! ```text
//! S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//! ```
//!
//! # The operator
//!
//! ```
//! use gatedelta::gdn::{self, Inputs, Options};
//! use gatedelta::shape::{HeadMap, Heads, Shape};
//!
//! # fn main() -> gatedelta::Result<()> {
//! let (backend, account) = gatedelta::device::open(Some("cpu"))?;
//! println!("{account}");
//!
//! // Two sequences of 3 and 2 tokens; one q/k head, two value heads.
//! let heads = Heads::new(1, 2, 16, 32, HeadMap::Div)?;
//! let out = gdn::prefill(
//!     &*backend,
//!     &Inputs {
//!         shape: Shape::new(heads, vec![0, 3, 5])?,
//!         q: &[0.1; 5 * 16],      // [T, Hk, K]
//!         k: &[0.25; 5 * 16],     // [T, Hk, K]
//!         v: &[1.0; 5 * 2 * 32],  // [T, Hv, V]
//!         g: &[-0.1; 5 * 2],      // [T, Hv], log decay
//!         beta: &[0.5; 5 * 2],    // [T, Hv]
//!         h0: None,               // [N, Hv, K, V]
//!         options: Options { qk_l2norm: true, ..Options::default() },
//!     },
//! )?;
//! assert_eq!(out.o.len(), 5 * 2 * 32); // [T, Hv, V]
//! assert_eq!(out.ht.len(), 2 * 2 * 16 * 32); // [N, Hv, K, V]
//! # Ok(())
//! # }
//! ```
//!
//! # The model
//!
//! With the feature `qwen`, the module `qwen` loads a Qwen3.5-family checkpoint as released, plans its memory, and generates.
//! What a sequence has read is a value there: snapshots, forks, rewinding, a cache that finds them by prefix, and with the feature
//! `store` a place for them on disk. A session of a `qwen::Recovery` outlives its device: when that is lost, or has no memory left,
//! it is opened again, or the CPU takes its place, and the answer goes on where it was.
//!
//! # Training
//!
//! With the feature `burn`, the module `burn` holds the layer, the block and the model as modules of the training framework
//! burn, with the gradients of these kernels, and writes checkpoints that `qwen` loads.
//!
//! # The map
//!
//! What a request goes through, top to bottom; modules only look down.
//!
//! | module | what it is |
//! |---|---|
//! | `burn` | layers that train: the operator with its gradients, the model around it, its checkpoints |
//! | `qwen` | the runtime: configuration, weights, tokenizer, template, sessions and their state, sampling |
//! | [`device`] | which device is used and why; the self-test that it must pass |
//! | [`gdn`] | the operator: prefill, decode, verify, backward, as launches over device memory and from host slices |
//! | [`ops`] | the other operations of the model and their gradients, as launches |
//! | [`plan`] | chunks, segments, pieces and scratch of a prefill, from shape, tile and limits |
//! | [`tune`] | capabilities of a device, and every size chosen from them |
//! | [`pass`] | launches as plain data: kernel, numbers, memory, grid |
//! | [`kernel`] | the kernel table: the contract between launches, CPU functions and shaders |
//! | [`backend`] | the seam: memory, and running a pass |
//! | [`backend::cpu`] | the CPU: one function per kernel row, threads and SIMD chosen at run time |
//! | `backend::cuda` | CUDA: the kernels of `cuda/`, compiled beforehand |
//! | `backend::webgpu` | wgpu: Vulkan, Metal, DX12; `source` assembles `shaders/<row>.wgsl` |
//! | [`shape`], [`error`] | lengths and heads with their checks; errors with their numbers |
//!
//! A new operator adds rows to the kernel table and never changes the seam; a new backend implements the seam and the rows
//! and never touches an operator.
//!
//! # Words
//!
//! T tokens; N sequences; Hk, Hv q/k and value heads; K, V their sizes; q, k, v, g (log decay), beta; `cu_seqlens` where
//! sequences begin; chunk: the tokens that prefill takes at once; S the state, `[K, V]` per value head, always f32.
//!
//! The formulas are those of Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), in
//! the chunked (WY) form of Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024).

#![warn(missing_docs)]

pub mod backend;
#[cfg(feature = "burn")]
pub mod burn;
pub mod device;
pub mod error;
pub mod gdn;
pub mod kernel;
pub mod ops;
pub mod pass;
pub mod plan;
#[cfg(feature = "qwen")]
pub mod qwen;
pub mod shape;
#[cfg(feature = "webgpu")]
pub mod source;
pub mod tune;

pub use error::{Error, Result};
