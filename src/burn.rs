//! Layers that train: Gated DeltaNet and the Qwen3.5 model around it, for the framework [burn](https://burn.dev).
//!
//! ```
//! use ::burn::tensor::{Device, Distribution, Tensor};
//! use gatedelta::burn::{Engine, GatedDeltaNetConfig};
//!
//! # fn main() -> gatedelta::Result<()> {
//! // What runs the kernels: any device of this crate. None takes the best that works.
//! let engine = Engine::open(Some("cpu"))?;
//! // Where burn keeps tensors and runs everything else: any device of burn.
//! let device = Device::flex().autodiff();
//!
//! let layer = GatedDeltaNetConfig::new(32)
//!     .with_linear_num_key_heads(1)
//!     .with_linear_num_value_heads(2)
//!     .with_linear_key_head_dim(16)
//!     .with_linear_value_head_dim(16)
//!     .init(&engine, &device)?;
//! let x = Tensor::<3>::random([2, 10, 32], Distribution::Default, &device); // [B, T, hidden]
//! let gradients = layer.forward(x).powi_scalar(2).mean().backward();
//! assert_eq!(layer.in_proj_a.weight.grad(&gradients).unwrap().dims(), [32, 2]);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`rule`] | the operator: forward [`gdn::prefill`](crate::gdn::prefill()), backward [`gdn::backward`](crate::gdn::backward()) |
//! | [`mix`] | the operator with all that lies between a mixer's projections, as one operation |
//! | [`plain`] | the same recurrence in burn's own operations, and gated linear attention without the delta rule |
//! | [`parts`] | convolution, gates, norms, rotary: one function each |
//! | [`mixer`], [`attention`] | the two mixers: [`GatedDeltaNet`], [`GatedAttention`] |
//! | [`model`] | [`RmsNorm`], [`Mlp`], [`Block`], [`Qwen35`] |
//! | [`checkpoint`] | [`Qwen35::save_checkpoint`], [`Qwen35::load_checkpoint`]: a directory in the released layout |
//!
//! # How numbers travel
//! The kernels take host slices. Per call of the rule, f32 numbers that leave burn's device for the host in the forward pass:
//! `T (2 Hk K + Hv V + 2 Hv)` over all sequences, and those of h0; that come back: `T Hv V` and those of ht. In the backward
//! pass the same counts go the other way, as gradients. A whole mixer ([`gated_delta_mix`]) sends and gets `T Hv V` more each
//! way, and its small weights. The host copies of the inputs are kept in between. (burn's matrix products on its own CPU
//! device, Flex, take several threads with burn's feature `rayon`.) Arithmetic inside the operations is f32, whatever the
//! tensors are.
//!
//! With the feature `burn-gpu`, `Engine::share` opens one GPU for burn and the kernels: nothing leaves it then. The same
//! counts are copied within its memory, and the host waits for nothing.
//!
//! # Panics
//! As everywhere in burn, wrong shapes panic in a forward pass, with the argument, what was found and what was expected. So
//! does what the device reports (memory that is not there, a lost device), and a gate given to the rule on the host that is NaN
//! or positive. Functions that build or save return [`Result`].

pub mod attention;
pub mod checkpoint;
#[cfg(feature = "burn-gpu")]
mod gpu;
mod lanes;
pub mod mix;
mod mix_pass;
pub mod mixer;
pub mod model;
pub mod parts;
pub mod plain;
pub mod rule;

use std::fmt;
use std::sync::Arc;

use burn::tensor::Device;
#[cfg(feature = "burn-gpu")]
use burn::tensor::DeviceKind;

use crate::backend::Backend;
use crate::device;
use crate::error::{Error, Result};
use lanes::{Lanes, SHAPES};
use mix_pass::Mix;

pub use attention::{GatedAttention, GatedAttentionConfig};
pub use mix::{MixInputs, gated_delta_mix};
pub use mixer::{GatedDeltaNet, GatedDeltaNetConfig, Rule};
pub use model::{Block, Mixer, Mlp, MlpConfig, Qwen35, Qwen35Config, RmsNorm, RmsNormConfig};
pub use rule::gated_delta_rule;

/// What runs the kernels. Clones share it.
#[derive(Clone)]
pub struct Engine {
    backend: Arc<dyn Backend>,
    lanes: Arc<Lanes<Mix>>,
    #[cfg(feature = "burn-gpu")]
    shared: Option<Arc<gpu::Shared>>,
}

impl Engine {
    /// An engine over a backend that is open already.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Engine {
            backend,
            lanes: Arc::new(Lanes::new(SHAPES)),
            #[cfg(feature = "burn-gpu")]
            shared: None,
        }
    }

    /// Opens the named device, or without a name the best one that works; see [`device::open`].
    ///
    /// # Errors
    /// As [`device::open`].
    pub fn open(name: Option<&str>) -> Result<Self> {
        Ok(Engine::new(device::open(name)?.0))
    }

    /// A GPU that burn and the kernels share: burn's device of this kind, whose tensors the engine reads and writes where
    /// they are. [`DeviceKind::DefaultDevice`] is the best GPU, [`DeviceKind::Cpu`] a driver in software.
    ///
    /// A kind can be shared once in a process, before burn uses it otherwise.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if burn cannot open the device or the device lacks what the kernels need.
    #[cfg(feature = "burn-gpu")]
    pub fn share(kind: DeviceKind) -> Result<(Self, Device)> {
        let (shared, device) = gpu::Shared::open(kind)?;
        let (engine, shared) = (Engine::new(shared.backend()), Some(Arc::new(shared)));
        Ok((Engine { shared, ..engine }, device))
    }

    /// The backend.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Whether the kernels run where tensors of this device of burn are.
    #[cfg(feature = "burn-gpu")]
    fn shares(&self, device: &Device) -> bool {
        self.shared.as_ref().is_some_and(|shared| shared.has(device))
    }

    /// Whether the kernels run where tensors of this device of burn are.
    #[cfg(not(feature = "burn-gpu"))]
    fn shares(&self, _: &Device) -> bool {
        false
    }

    /// The device that burn and the kernels share.
    #[cfg(feature = "burn-gpu")]
    fn shared(&self) -> Result<&gpu::Shared> {
        self.shared
            .as_deref()
            .ok_or_else(|| Error::argument("engine", self.backend.caps().name.clone(), "a shared one"))
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Engine").field(&self.backend.caps().name).finish()
    }
}

/// Ends a forward or backward pass, which have no other way to say what went wrong.
#[track_caller]
fn stop(what: &str, error: &Error) -> ! {
    panic!("{what}: {error}")
}

/// An error unless a tensor has this shape.
fn expect_shape(what: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::argument(what, format!("the shape {found:?}"), format!("{expected:?}")))
}
