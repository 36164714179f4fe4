//! The Qwen3.5 runtime: a directory as released becomes a [`Model`] on any [`Backend`](crate::backend::Backend), a
//! [`Session`] of it reads tokens, and [`Session::generate`] answers.
//!
//! ```no_run
//! # fn main() -> gatedelta::Result<()> {
//! use gatedelta::qwen::{Event, GenerateOptions, LoadOptions, Model};
//! let (backend, _) = gatedelta::device::open(None)?;
//! let model = Model::load("Qwen3.5-0.8B", backend, &LoadOptions::default())?;
//! println!("{}", model.memory());
//!
//! let messages = serde_json::json!([{ "role": "user", "content": "Why is the sky blue?" }]);
//! let prompt = model.chat_template()?.render(&messages, None, true, None)?;
//! let ids = model.tokenizer()?.encode(&prompt)?;
//!
//! let mut session = model.session()?;
//! for event in session.generate(&ids, &GenerateOptions::of(&model))? {
//!     match event {
//!         Event::Prompt { done, total } => eprintln!("read {done} of {total}"),
//!         Event::Token { text, .. } => print!("{text}"),
//!         Event::Done { finish, timings, .. } => eprintln!("{finish:?}, {:.1} tokens/s", timings.decode_rate()),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it knows |
//! |---|---|
//! | [`config`] | `config.json`, `generation_config.json` |
//! | [`files`] | safetensors files, shards, index |
//! | [`tokenizer`] | text and ids, streaming |
//! | [`template`] | chats as the model was trained to read them |
//! | [`sample`] | from logits to a token |
//! | [`memory`] | what fits, before anything is allocated |
//! | [`model`], [`session`], [`generate`] | loading, reading, answering |
//! | [`batch`] | several sequences in one pass |
//! | [`recover`] | going on after the device was lost, or has no memory |
//! | [`state`] | what a sequence carries, as a value: snapshots, forks, rewinding, the cache that finds them |

pub mod batch;
pub mod config;
pub mod files;
pub mod generate;
mod layer;
pub mod memory;
pub mod model;
mod pyvalue;
mod random;
pub mod recover;
mod rehearse;
pub mod sample;
pub mod session;
pub mod state;
pub mod template;
pub mod tokenizer;
mod turns;
mod weights;

pub use batch::Batch;
pub use config::{Config, GenerationConfig, LayerKind};
pub use generate::{Event, Finish, GenerateOptions, Generation, Timings};
pub use memory::MemoryPlan;
pub use model::{LoadOptions, Model};
pub use recover::{Notice, Place, Recovered, Recovery};
pub use sample::{Sampler, Sampling, SplitMix64};
pub use session::Session;
pub use state::cache::{Cache, Evicted, Kept, Origin, Reason, Restored, Usage};
pub use state::host::HostSnapshot;
pub use state::snapshot::Snapshot;
#[cfg(feature = "store")]
pub use state::store::Store;
pub use template::ChatTemplate;
pub use tokenizer::{TextStream, Tokenizer};
