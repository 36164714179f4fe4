//! What a sequence carries from token to token, as a value: taken, kept, brought back, shared.
//!
//! ```text
//! state.rs     the state of one sequence on the device        snapshot.rs  the same at one moment, whole or not at all
//! history.rs   its tokens and the pieces they were read in    tree.rs      values by the tokens that lead to them
//! pages.rs     keys and values, shared until someone writes   cache.rs     snapshots within a budget, found by prefix
//! host.rs      snapshots in host memory, to move them         store.rs     snapshots on disk (feature `store`)
//! mirror.rs    a copy in host memory that follows a sequence, for the case that its device is lost
//! ```
//!
//! States, convolution tails, cache and tokens belong together: restoring one without the others is wrong. They are in one
//! type so that whoever copies it copies all of it.
//!
//! What depends on the length of the text, keys and values, is shared and never copied whole; what does not, states and tails,
//! is copied, on the device. Both are views of device memory, so a batch may hold the states of its sequences side by side.

pub mod cache;
pub(crate) mod history;
pub mod host;
pub(crate) mod mirror;
pub(crate) mod pages;
pub mod snapshot;
#[cfg(feature = "store")]
pub mod store;
mod tree;

use crate::backend::{Backend, View};
use crate::error::Result;
use crate::ops::{self, KvPage};
use crate::pass::Pass;
use crate::qwen::config::{Config, LayerKind};
use crate::qwen::memory::{attention_shape, pages};
use crate::qwen::state::history::History;
use crate::qwen::state::pages::{PageLayout, Pages};
use crate::shape::Dtype;
use crate::tune::Caps;

/// The state of one sequence.
#[derive(Debug)]
pub(crate) struct State {
    /// Tokens that the state has seen; their number is the next position.
    pub history: History,
    pub layers: Vec<LayerState>,
    pub pages: Pages,
    pub layout: PageLayout,
    /// Some of it was computed on another device: what follows has not the bits that it would have had here alone.
    pub moved: bool,
}

#[derive(Debug)]
pub(crate) enum LayerState {
    Linear {
        /// `[1, Hv, K, V]` f32
        state: View,
        /// `[1, taps - 1, channels]` f32, oldest first, before convolution
        tail: View,
    },
    /// Its number among the full-attention layers.
    Full(usize),
}

/// Bytes of state and tail of every Gated DeltaNet layer.
pub(crate) fn fixed_bytes(config: &Config) -> impl Iterator<Item = u64> {
    let tail = (config.conv_taps as u64 - 1) * config.conv_channels() as u64 * 4;
    let count = config.count(LayerKind::Linear) as usize;
    let layer = [config.linear.state_len() * 4, tail];
    std::iter::repeat_n(layer, count).flatten()
}

/// How a model lays out keys and values for sequences of up to `context` positions.
pub(crate) fn page_layout(config: &Config, caps: &Caps, context: u64, kv: Dtype) -> PageLayout {
    PageLayout {
        pages: pages(config, caps, context, kv),
        layers: config.count(LayerKind::Full) as usize,
        row: attention_shape(config, kv).kv_row(),
    }
}

/// Device memory for states and tails, of undefined content.
pub(crate) fn alloc_fixed(config: &Config, backend: &dyn Backend) -> Result<Vec<View>> {
    let names = ["state", "convolution tail"].into_iter().cycle();
    fixed_bytes(config).zip(names).map(|(bytes, what)| Ok(backend.alloc(what, bytes)?.view())).collect()
}

/// Records the copy of states and tails from one place to another of the same model.
pub(crate) fn copy_fixed(caps: &Caps, pass: &mut Pass, from: &[View], to: &[View]) -> Result<()> {
    from.iter().zip(to).try_for_each(|(from, to)| ops::copy(caps, pass, from, 0, to, 0, from.bytes / 4))
}

impl State {
    /// An empty sequence.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn new(config: &Config, backend: &dyn Backend, context: u64, kv: Dtype) -> Result<State> {
        let mut fixed = alloc_fixed(config, backend)?.into_iter();
        let mut full = 0..;
        let layer = |kind: &LayerKind| match kind {
            LayerKind::Linear => Some(LayerState::Linear { state: fixed.next()?, tail: fixed.next()? }),
            LayerKind::Full => full.next().map(LayerState::Full),
        };
        let layers = config.layers.iter().filter_map(layer).collect();
        let layout = page_layout(config, backend.caps(), context, kv);
        let mut state = State { history: History::default(), layers, pages: Pages::default(), layout, moved: false };
        state.clear(backend)?;
        Ok(state)
    }

    /// The same tokens without memory anywhere.
    pub fn nowhere(&self) -> State {
        let (layers, pages, layout) = (Vec::new(), Pages::default(), PageLayout::default());
        State { history: self.history.clone(), layers, pages, layout, moved: self.moved }
    }

    /// True if it has no memory: there is no model without layers.
    pub fn is_nowhere(&self) -> bool {
        self.layers.is_empty()
    }

    /// The number of tokens seen: the position of the next.
    pub fn position(&self) -> u64 {
        self.history.len()
    }

    /// States and tails, layer by layer.
    pub fn fixed(&self) -> Vec<View> {
        let views = |layer: &LayerState| match layer {
            LayerState::Linear { state, tail } => vec![state.clone(), tail.clone()],
            LayerState::Full(_) => Vec::new(),
        };
        self.layers.iter().flat_map(views).collect()
    }

    /// Back to an empty sequence; keeps the memory.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn clear(&mut self, backend: &dyn Backend) -> Result<()> {
        let mut pass = Pass::new();
        for view in self.fixed() {
            ops::fill(backend.caps(), &mut pass, &view, 0, view.bytes / 4, 0)?;
        }
        backend.load(&pass)?;
        backend.run(&pass)?;
        self.history.clear();
        self.moved = false;
        Ok(())
    }

    /// Makes room in the cache for the positions from the next one up to `end`; true if pages came or changed.
    ///
    /// # Errors
    /// What the backend reports; what had been there stays.
    pub fn grow(&mut self, backend: &dyn Backend, end: u64) -> Result<bool> {
        self.pages.take(&self.layout, backend, self.history.len(), end)
    }

    /// The cache of a full-attention layer.
    pub fn kv(&self, layer: usize) -> Vec<KvPage> {
        self.pages.layer(layer)
    }

    /// Positions that the page holding position `at` ends before.
    pub fn page_end(&self, at: u64) -> u64 {
        self.layout.pages.iter().map(|(start, len)| start + len).find(|end| *end > at).unwrap_or(at + 1)
    }
}

/// The rotary table of positions `start .. start + tokens`: per position `rot / 2` cosines, then `rot / 2` sines.
///
/// Angles are taken in f64: near position 262144 f32 tells angles apart only by sixty-fourths of a radian.
pub(crate) fn rope(config: &Config, start: u64, tokens: u64) -> Vec<f32> {
    let rot = config.rotary as usize;
    let frequencies: Vec<f64> = (0..rot / 2).map(|j| config.rope_theta.powf(-(2.0 * j as f64) / rot as f64)).collect();
    let mut out = Vec::with_capacity(tokens as usize * rot);
    for position in start..start + tokens {
        let angles = || frequencies.iter().map(|f| position as f64 * f);
        out.extend(angles().map(|a| a.cos() as f32));
        out.extend(angles().map(|a| a.sin() as f32));
    }
    out
}
