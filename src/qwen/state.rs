//! What a sequence carries from token to token.
//!
//! States, convolution tails, cache and position belong together: restoring one without the others is wrong. They are in one
//! type so that whoever copies it copies all of it.

use crate::backend::{Backend, View};
use crate::error::Result;
use crate::ops::{self, KvPage};
use crate::pass::Pass;
use crate::qwen::config::{Config, LayerKind};
use crate::qwen::memory::{attention_shape, pages};
use crate::shape::Dtype;

/// The state of one sequence.
#[derive(Debug)]
pub(crate) struct State {
    /// Ids that the state has seen; their number is the next position.
    pub ids: Vec<u32>,
    pub layers: Vec<LayerState>,
    /// First position and length of every page up to the context; layers own the first few.
    pages: Vec<(u64, u64)>,
}

#[derive(Debug)]
pub(crate) enum LayerState {
    Linear {
        /// `[1, Hv, K, V]` f32
        state: View,
        /// `[1, taps - 1, channels]` f32, oldest first, before convolution
        tail: View,
    },
    Full {
        pages: Vec<KvPage>,
    },
}

impl State {
    /// An empty sequence.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn new(config: &Config, backend: &dyn Backend, context: u64, kv: Dtype) -> Result<State> {
        let tail_bytes = (config.conv_taps as u64 - 1) * config.conv_channels() as u64 * 4;
        let layer = |kind: &LayerKind| {
            Ok(match kind {
                LayerKind::Linear => LayerState::Linear {
                    state: backend.alloc("state", config.linear.state_len() * 4)?.view(),
                    tail: backend.alloc("convolution tail", tail_bytes)?.view(),
                },
                LayerKind::Full => LayerState::Full { pages: Vec::new() },
            })
        };
        let layers = config.layers.iter().map(layer).collect::<Result<_>>()?;
        let mut state = State { ids: Vec::new(), layers, pages: pages(config, backend.caps(), context, kv) };
        state.clear(backend)?;
        Ok(state)
    }

    /// The number of tokens seen: the position of the next.
    pub fn position(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Back to an empty sequence; keeps the memory.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn clear(&mut self, backend: &dyn Backend) -> Result<()> {
        let mut pass = Pass::new();
        for layer in &self.layers {
            if let LayerState::Linear { state, tail } = layer {
                ops::fill(backend.caps(), &mut pass, state, 0, state.bytes / 4, 0)?;
                ops::fill(backend.caps(), &mut pass, tail, 0, tail.bytes / 4, 0)?;
            }
        }
        backend.load(&pass)?;
        backend.run(&pass)?;
        self.ids.clear();
        Ok(())
    }

    /// Makes room in the cache for the positions below `end`; true if pages came to it.
    ///
    /// # Errors
    /// What the backend reports; what had been there stays.
    pub fn grow(&mut self, config: &Config, backend: &dyn Backend, kv: Dtype, end: u64) -> Result<bool> {
        let row = attention_shape(config, kv).kv_row();
        let mut grown = false;
        for layer in &mut self.layers {
            let LayerState::Full { pages } = layer else { continue };
            while let Some(&(start, len)) = self.pages.get(pages.len()).filter(|(start, _)| *start < end) {
                let page = |what| Ok::<_, crate::Error>(backend.alloc(what, len * row)?.view());
                pages.push(KvPage { start, len, k: page("page of keys")?, v: page("page of values")? });
                grown = true;
            }
        }
        Ok(grown)
    }

    /// Positions that the page holding position `at` ends before.
    pub fn page_end(&self, at: u64) -> u64 {
        self.pages.iter().map(|(start, len)| start + len).find(|end| *end > at).unwrap_or(at + 1)
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
