//! What a model needs on a device, added up before anything is allocated.

use crate::error::{Error, Result};
use crate::ops::{AttentionShape, attention_scratch};
use crate::plan::{Limits, Plan, scratch_per_chunk_head};
use crate::qwen::config::{Config, LayerKind};
use crate::qwen::model::LoadOptions;
use crate::shape::{Dtype, Shape};
use crate::tune::{self, Caps};

/// Bytes that a model and one session of it take on a device, with the snapshots that are kept beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The device's name.
    pub device: String,
    /// Positions that a session can hold.
    pub context: u64,
    /// Tokens that a prefill computes at a time.
    pub piece: u64,
    /// How keys and values are stored.
    pub kv: Dtype,
    /// Weights; on a device that reads host memory they stay in the mapped files.
    pub weights: u64,
    /// States of the Gated DeltaNet layers: the same for every context.
    pub states: u64,
    /// Tails of their convolutions.
    pub tails: u64,
    /// Keys and values of a full context; a session takes them page by page as it grows.
    pub cache: u64,
    /// Activations of a piece and scratch of the kernels.
    pub scratch: u64,
    /// What snapshots may take: the budget of a [`Cache`](crate::qwen::Cache).
    pub snapshots: u64,
    /// Memory of the device, where it is known.
    pub available: Option<u64>,
}

/// Context of a session when nobody asks for one: where memory allows it and the model was made for it.
const DEFAULT_CONTEXT: u64 = 32_768;

impl MemoryPlan {
    /// Plans for what is asked for: its context, or the default one, cut to what fits.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the numbers and the largest context that would fit; [`Error::Argument`] for a context of 0
    /// or beyond the model's positions; [`Error::Unsupported`] if the device is too small for even a few tokens at a time.
    pub fn new(config: &Config, caps: &Caps, weights: u64, options: &LoadOptions) -> Result<MemoryPlan> {
        let most = config.max_positions;
        let plan = |context: u64| Self::for_context(config, caps, weights, context, options);
        let wanted = match options.context {
            Some(n) if n == 0 || n > most => return Err(Error::argument("context", n, format!("1 to {most}"))),
            Some(n) => n,
            None => most.min(DEFAULT_CONTEXT),
        };
        let full = plan(wanted)?;
        if full.fits() {
            return Ok(full);
        }
        // The largest context that fits: the sum grows with the context.
        let (mut fits, mut too_many) = (0, wanted);
        while too_many - fits > 1 {
            let middle = fits + (too_many - fits) / 2;
            if plan(middle)?.fits() { fits = middle } else { too_many = middle }
        }
        // Below this a chat does not get far; better to say so than to start.
        if options.context.is_none() && fits >= 512 {
            return plan(fits);
        }
        let would = match fits {
            0 => format!("without any context it needs {}", size(plan(1)?.total())),
            n => format!("a context of at most {n} would fit"),
        };
        let available = size(full.available.unwrap_or(0));
        Err(Error::OutOfMemory {
            device: full.device.clone(),
            what: format!("a model with a context of {wanted}"),
            needed: full.total(),
            limit: format!("{available} are there ({}); {would}", full.summary()),
        })
    }

    fn for_context(
        config: &Config,
        caps: &Caps,
        weights: u64,
        context: u64,
        options: &LoadOptions,
    ) -> Result<MemoryPlan> {
        let kv = options.kv;
        let sizes = Sizes::new(config, caps, context, kv)?;
        let linear = config.count(LayerKind::Linear) as u64;
        let tail = (config.conv_taps as u64 - 1) * config.conv_channels() as u64 * 4;
        Ok(MemoryPlan {
            device: caps.name.clone(),
            context,
            piece: sizes.piece,
            kv,
            weights,
            states: linear * config.linear.state_len() * 4,
            tails: linear * tail,
            cache: (config.count(LayerKind::Full) as u64 * 2 * attention_shape(config, kv).kv_row())
                .saturating_mul(context),
            scratch: sizes.total(),
            snapshots: options.snapshots,
            available: caps.memory,
        })
    }

    /// Everything together.
    pub fn total(&self) -> u64 {
        self.rows().iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// True if it fits the device, or if nobody knows.
    pub fn fits(&self) -> bool {
        self.available.is_none_or(|n| self.total() <= n)
    }

    fn rows(&self) -> [(&'static str, u64); 6] {
        [
            ("weights", self.weights),
            ("states", self.states),
            ("convolution tails", self.tails),
            ("keys and values", self.cache),
            ("scratch", self.scratch),
            ("snapshots", self.snapshots),
        ]
    }

    fn summary(&self) -> String {
        let row = |(what, bytes)| format!("{what} {}", size(bytes));
        self.rows().into_iter().filter(|(_, bytes)| *bytes > 0).map(row).collect::<Vec<_>>().join(", ")
    }
}

impl std::fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "memory on {}, context {}, {} cache:", self.device, self.context, self.kv)?;
        for (what, bytes) in self.rows().into_iter().filter(|(_, bytes)| *bytes > 0) {
            writeln!(f, "  {what:<18} {:>10}", size(bytes))?;
        }
        write!(f, "  {:<18} {:>10}", "total", size(self.total()))?;
        match self.available {
            Some(n) => write!(f, " of {}", size(n)),
            None => Ok(()),
        }
    }
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    match mib {
        _ if mib >= 1024.0 => format!("{:.2} GiB", mib / 1024.0),
        _ if mib >= 1.0 => format!("{mib:.1} MiB"),
        _ => format!("{:.1} KiB", bytes as f64 / 1024.0),
    }
}

/// Heads and sizes of the full-attention layers.
pub(crate) fn attention_shape(config: &Config, kv: Dtype) -> AttentionShape {
    AttentionShape {
        heads: config.heads,
        kv_heads: config.kv_heads,
        dim: config.head_dim,
        rot: config.rotary,
        kv_dtype: kv,
        eps: config.eps,
        scale: (config.head_dim as f32).powf(-0.5),
    }
}

/// First position and length of every page of the cache, up to the context.
///
/// Each is as long as all before it together, so that a long context has few; one is at most what a kernel can see.
pub(crate) fn pages(config: &Config, caps: &Caps, context: u64, kv: Dtype) -> Vec<(u64, u64)> {
    let row = attention_shape(config, kv).kv_row();
    let first = tune::kv_page(caps, row);
    let most = (caps.max_binding.min(caps.max_buffer) / row).max(1);
    let mut out = Vec::new();
    let mut start = 0;
    while start < context {
        let len = start.max(first).min(most).min(context - start);
        out.push((start, len));
        start += len;
    }
    out
}

/// Most pages of a cache, each of which is a launch: the longest context of a released model has less than a tenth.
const PAGES: u64 = 256;

/// Bytes of every scratch buffer of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// T: tokens that a prefill computes at a time.
    pub piece: u64,
    /// Rows of logits that are computed at a time when all are asked for.
    pub logit_rows: u64,
    /// What the host writes per piece: ids, positions, rotary table, table of sequences.
    pub inputs: u64,
    /// Residual stream `[T, hidden]`.
    pub x: u64,
    /// `[T, hidden]`
    pub normed: u64,
    /// A projected row of a mixer, or gate and up of the MLP: `[T, widest]`.
    pub wide: u64,
    /// After the convolution, queries after their norm, or the MLP's activation: `[T, widest]`.
    pub mid: u64,
    /// Output of the recurrence `[T, Hv V]`.
    pub o: u64,
    /// Gated output of a mixer `[T, max(Hv V, heads D)]`.
    pub mixed: u64,
    /// g, and as much again for beta: `[T, Hv]`.
    pub gates: u64,
    /// Partial results of attention.
    pub part: u64,
    /// `[logit_rows, vocab]`
    pub logits: u64,
    /// Tables and scratch of the recurrence, for whole pieces and for a shorter last one.
    pub recurrence: u64,
}

impl Sizes {
    /// The sizes for the largest piece whose buffers all fit the device's bindings.
    pub fn new(config: &Config, caps: &Caps, context: u64, kv: Dtype) -> Result<Sizes> {
        let most = caps.max_binding.min(caps.max_buffer);
        let row = attention_shape(config, kv).kv_row();
        if context / (most / row).max(1) > PAGES {
            return Err(Error::Unsupported {
                what: format!("a context of {context}"),
                by: caps.name.clone(),
                why: format!(
                    "keys of one position take {row} bytes of {most} in one piece, and there are {PAGES} pieces at most"
                ),
            });
        }
        let mut piece = tune::prefill_tokens(caps).min(context.next_power_of_two());
        loop {
            let sizes = Sizes::for_piece(config, caps, context, kv, piece);
            match sizes {
                Ok(sizes) if sizes.largest() <= most => return Ok(sizes),
                Ok(sizes) if piece <= 1 => {
                    return Err(Error::Unsupported {
                        what: "the model".into(),
                        by: caps.name.clone(),
                        why: format!("one token needs {} bytes in one piece of {most}", sizes.largest()),
                    });
                }
                Err(e) if piece <= 1 => return Err(e),
                _ => piece /= 2,
            }
        }
    }

    fn for_piece(config: &Config, caps: &Caps, context: u64, kv: Dtype, t: u64) -> Result<Sizes> {
        let (hidden, ffn, vocab) = (config.hidden as u64, config.ffn as u64, config.vocab as u64);
        let heads = &config.linear;
        let channels = config.conv_channels() as u64;
        let row = heads.hv as u64 * heads.v as u64;
        let attended = config.heads as u64 * config.head_dim as u64;
        let shape = attention_shape(config, kv);
        let pages = pages(config, caps, context, kv);
        let part = |tokens: u64| part_bytes(caps, &shape, tokens, &pages, context);
        let tile = tune::prefill_tile(caps, heads, Dtype::F32);
        let limits = Limits {
            max_binding: caps.max_binding,
            align: caps.align,
            token_bytes: channels.max(row) * 4,
            state_bytes: heads.state_len() * 4,
            chunk_bytes: scratch_per_chunk_head(tile.chunk),
        };
        let plan = Plan::new(&Shape::one(*heads, t), &tile, &limits)?;
        let logit_rows = ((16 << 20) / (vocab * 4)).clamp(1, t);
        Ok(Sizes {
            piece: t,
            logit_rows,
            inputs: InputLayout::new(caps, config, &[t]).bytes,
            x: t * hidden * 4,
            normed: t * hidden * 4,
            wide: t * 4 * (config.linear_row() as u64).max(config.full_row() as u64).max(2 * ffn),
            mid: t * 4 * channels.max(attended).max(ffn),
            o: t * row * 4,
            mixed: t * row.max(attended) * 4,
            gates: t * heads.hv as u64 * 4,
            part: (1..=t).map(part).max().unwrap_or(0),
            logits: logit_rows * vocab * 4,
            recurrence: 2
                * (plan.scratch + plan.tables.len() as u64 * 4 + plan.cut_bytes(heads, caps.align).iter().sum::<u64>()),
        })
    }

    fn all(&self) -> [u64; 10] {
        [
            self.inputs,
            self.x,
            self.normed,
            self.wide,
            self.mid,
            self.o,
            self.mixed,
            2 * self.gates,
            self.part,
            self.logits,
        ]
    }

    fn largest(&self) -> u64 {
        self.all().into_iter().max().unwrap_or(0)
    }

    fn total(&self) -> u64 {
        self.all().iter().sum::<u64>() + self.recurrence
    }
}

/// Bytes of partial results that no piece of `tokens` tokens exceeds, wherever in the context it ends.
fn part_bytes(caps: &Caps, shape: &AttentionShape, tokens: u64, pages: &[(u64, u64)], context: u64) -> u64 {
    // Splits of one page without end are the most that any end gives; each further page adds at most one.
    let endless = 1 << 31;
    let one = attention_scratch(caps, shape, tokens, [(0, endless)], endless);
    let slot = tokens * shape.heads as u64 * (shape.dim as u64 + 2) * 4;
    let exact = attention_scratch(caps, shape, tokens, pages.iter().copied(), context);
    exact.max(one + (pages.len() as u64).saturating_sub(1) * slot)
}

/// Where the inputs of a pass lie in their buffer: byte offsets that the device can bind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InputLayout {
    /// `[T]` u32, of all lanes one after the other
    pub ids: u64,
    /// What each sequence has of its own.
    pub lanes: Vec<LaneLayout>,
    /// All of it.
    pub bytes: u64,
}

/// The part of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneLayout {
    /// `[tokens]` u32
    pub pos: u64,
    /// `[tokens, rotary]` f32
    pub rope: u64,
    /// `[1]` of (first row, tokens, slot, 0)
    pub seqs: u64,
}

impl InputLayout {
    /// For so many tokens of each lane.
    pub fn new(caps: &Caps, config: &Config, lanes: &[u64]) -> Self {
        let after = |at: u64, bytes: u64| (at + bytes).next_multiple_of(caps.align.max(16));
        let mut end = after(0, lanes.iter().sum::<u64>() * 4);
        let lane = |tokens: &u64| {
            let pos = end;
            let rope = after(pos, tokens * 4);
            let seqs = after(rope, tokens * config.rotary as u64 * 4);
            end = after(seqs, 16);
            LaneLayout { pos, rope, seqs }
        };
        let lanes = lanes.iter().map(lane).collect();
        InputLayout { ids: 0, lanes, bytes: end }
    }
}
