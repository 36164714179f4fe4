//! The passes of the model: what the paper's equations become as launches.
//!
//! ```text
//! x = embed[ids]
//! for each layer:   x += mixer(norm(x))     x += down(silu(gate(norm(x))) * up(norm(x)))
//! logits = head(norm(x))
//! ```

use std::ops::Range;

use crate::backend::{Backend, Buffer, View};
use crate::error::Result;
use crate::gdn;
use crate::ops::{self, Attention, Norm, Seqs};
use crate::pass::{Pass, Rows};
use crate::qwen::config::{Config, LayerKind};
use crate::qwen::memory::{InputLayout, Sizes, attention_shape};
use crate::qwen::state::{self, LayerState, State};
use crate::qwen::weights::{Full, Layer, Linear, Mixer, Projection, Weights};
use crate::shape::{Dtype, Shape};
use crate::tune::Caps;

/// Tokens up to which a Gated DeltaNet layer goes token by token; from there on chunks are faster.
const STEP_TOKENS: u64 = 8;

/// The scratch of a session, for pieces of up to T tokens. Each buffer is one of [`Sizes`].
#[derive(Debug)]
pub(crate) struct Scratch {
    pub inputs: Buffer,
    x: View,
    normed: View,
    wide: View,
    mid: View,
    o: View,
    mixed: View,
    g: View,
    beta: View,
    part: View,
    pub logits: View,
    /// `[1]` u32: the largest logit's index
    pub next: View,
}

impl Scratch {
    pub fn new(backend: &dyn Backend, sizes: &Sizes) -> Result<Scratch> {
        let view = |what, bytes: u64| Ok::<_, crate::Error>(backend.alloc(what, bytes.max(16))?.view());
        Ok(Scratch {
            inputs: backend.alloc("inputs of a piece", sizes.inputs)?,
            x: view("residual stream", sizes.x)?,
            normed: view("normed activations", sizes.normed)?,
            wide: view("projected activations", sizes.wide)?,
            mid: view("inner activations", sizes.mid)?,
            o: view("output of the recurrence", sizes.o)?,
            mixed: view("output of a mixer", sizes.mixed)?,
            g: view("decays", sizes.gates)?,
            beta: view("write strengths", sizes.gates)?,
            part: view("partial results of attention", sizes.part)?,
            logits: view("logits", sizes.logits)?,
            next: view("next id", 4)?,
        })
    }
}

/// Where passes work: one per model, since a device runs one pass at a time. It holds nothing from one to the next.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub scratch: Scratch,
    /// The recurrence over whole pieces, once there was one.
    pub piece: Option<gdn::Prefill>,
}

impl Workspace {
    pub fn new(backend: &dyn Backend, sizes: &Sizes) -> Result<Workspace> {
        Ok(Workspace { scratch: Scratch::new(backend, sizes)?, piece: None })
    }
}

/// Everything that a pass is recorded from: the tokens of one or more sequences, one below the other.
///
/// Products see all T rows at once. What depends on a sequence, its state and its cache, is done lane by lane.
pub(crate) struct Recorder<'a> {
    pub config: &'a Config,
    pub weights: &'a Weights,
    pub caps: &'a Caps,
    pub scratch: &'a Scratch,
    pub kv: Dtype,
    pub lanes: &'a [Lane<'a>],
    /// The recurrence over all tokens of an only lane; none where it goes token by token.
    pub prefill: Option<&'a gdn::Prefill>,
}

/// A sequence in a pass.
pub(crate) struct Lane<'a> {
    pub state: &'a State,
    pub tokens: u64,
    /// Positions that the tokens may have when the pass runs.
    pub positions: Range<u64>,
}

/// The device views of a lane in [`InputLayout`].
struct Inputs {
    /// The lane's first row.
    row: u64,
    pos: View,
    rope: View,
    seqs: View,
}

/// True if the rows of several lanes can be bound one by one: attention takes those of each.
pub(crate) fn lanes_fit(caps: &Caps, config: &Config) -> bool {
    let rows = [config.full_row() as u64, config.heads as u64 * config.head_dim as u64];
    config.count(LayerKind::Full) == 0 || rows.iter().all(|row| (row * 4).is_multiple_of(caps.align.max(1)))
}

/// What the host writes for a pass over some tokens of each lane, `(ids, first position)`, laid out as [`InputLayout`] says.
pub(crate) fn inputs(caps: &Caps, config: &Config, lanes: &[(&[u32], u64)]) -> Vec<u8> {
    let tokens: Vec<u64> = lanes.iter().map(|(ids, _)| ids.len() as u64).collect();
    let layout = InputLayout::new(caps, config, &tokens);
    let mut bytes = vec![0u8; layout.bytes as usize];
    let mut put = |at: u64, data: &[u8]| bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
    let mut row = 0;
    for ((ids, start), at) in lanes.iter().zip(&layout.lanes) {
        let tokens = ids.len() as u64;
        let positions: Vec<u32> = (*start..start + tokens).map(|p| p as u32).collect();
        put(row * 4, bytemuck::cast_slice(ids));
        put(at.pos, bytemuck::cast_slice(&positions));
        put(at.rope, bytemuck::cast_slice(&state::rope(config, *start, tokens)));
        put(at.seqs, bytemuck::cast_slice(&[row as u32, tokens as u32, 0, 0]));
        row += tokens;
    }
    bytes
}

/// The chunked recurrence for pieces of `tokens` tokens; none where they go token by token.
pub(crate) fn prefill(backend: &dyn Backend, config: &Config, tokens: u64) -> Result<Option<gdn::Prefill>> {
    if tokens <= STEP_TOKENS {
        return Ok(None);
    }
    let options = gdn::Options { qk_l2norm: true, ..gdn::Options::default() };
    let shape = Shape::one(config.linear, tokens);
    Ok(Some(gdn::Prefill::new(backend, &shape, &options, config.conv_channels() as u64)?))
}

impl Recorder<'_> {
    /// Ids to hidden states: all layers, updating the sequence's state.
    pub fn trunk(&self, pass: &mut Pass) -> Result<()> {
        let lanes: Vec<u64> = self.lanes.iter().map(|lane| lane.tokens).collect();
        let layout = InputLayout::new(self.caps, self.config, &lanes);
        let slice = |at: u64, bytes: u64| self.scratch.inputs.slice(at, bytes);
        let ids = slice(layout.ids, self.rows() * 4)?;
        let mut inputs = Vec::with_capacity(lanes.len());
        let mut row = 0;
        for (tokens, at) in lanes.iter().zip(&layout.lanes) {
            inputs.push(Inputs {
                row,
                pos: slice(at.pos, tokens * 4)?,
                rope: slice(at.rope, tokens * self.config.rotary as u64 * 4)?,
                seqs: slice(at.seqs, 16)?,
            });
            row += tokens;
        }
        ops::embed(self.caps, pass, &ids, &self.weights.embed, &self.scratch.x, self.rows())?;
        for (i, layer) in self.weights.layers.iter().enumerate() {
            match &layer.mixer {
                Mixer::Linear(w) => self.linear(pass, layer, w, &inputs, i)?,
                Mixer::Full(w) => self.full(pass, layer, w, &inputs, i)?,
            }
            self.mlp(pass, layer)?;
        }
        Ok(())
    }

    /// T: tokens of all lanes.
    fn rows(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.tokens).sum()
    }

    /// Hidden states of the rows to logits, one row below the other from row 0 of the logits.
    pub fn head(&self, pass: &mut Pass, rows: Range<u64>) -> Result<()> {
        let (s, w) = (self.scratch, self.weights);
        let n = rows.end - rows.start;
        let (hidden, vocab) = (self.config.hidden as u64, self.config.vocab as u64);
        ops::rms_norm(self.caps, pass, &s.x, rows.start, &w.norm, &s.normed, n, hidden, self.config.eps)?;
        let (x, y) = (Rows::packed(s.normed.clone(), hidden), Rows::packed(s.logits.clone(), vocab));
        ops::linear(self.caps, pass, &x, &w.head, &y, n, false)
    }

    /// Row 0 of the logits to the index of its largest.
    pub fn argmax(&self, pass: &mut Pass) -> Result<()> {
        ops::argmax(self.caps, pass, &self.scratch.logits, &self.scratch.next, 1, self.config.vocab as u64)
    }

    /// `y = norm(x) w^T` for all matrices of a projection, side by side in y.
    fn project(&self, pass: &mut Pass, norm: &View, project: &Projection, y: &Rows) -> Result<()> {
        let norm = Norm { weight: norm, eps: self.config.eps, scratch: &self.scratch.normed };
        for (column, w) in project {
            ops::norm_linear(self.caps, pass, &self.scratch.x, norm, w, &y.at(*column), self.rows())?;
        }
        Ok(())
    }

    /// Gated DeltaNet:
    /// ```text
    /// [m z a b] = project(norm(x))        c = silu(conv(m)) = [q k v]
    /// g = -exp(A_log) softplus(a + dt_bias)        beta = sigmoid(b)
    /// o = recurrence(q / |q|, k / |k|, v, g, beta)        x += out(norm(o) silu(z))
    /// ```
    fn linear(&self, pass: &mut Pass, layer: &Layer, w: &Linear, inputs: &[Inputs], index: usize) -> Result<()> {
        let (c, s, caps, t) = (self.config, self.scratch, self.caps, self.rows());
        let heads = &c.linear;
        let (hk, hv, dk, dv) = (heads.hk as u64, heads.hv as u64, heads.k as u64, heads.v as u64);
        let channels = c.conv_channels() as u64;
        let row = Rows::packed(s.wide.clone(), c.linear_row() as u64);
        let (z, a, b) = (row.at(channels), row.at(channels + hv * dv), row.at(channels + hv * dv + hv));
        self.project(pass, &layer.mixer_norm, &w.project, &row)?;

        let qkv = Rows::packed(s.mid.clone(), channels);
        for (lane, inputs) in self.lanes.iter().zip(inputs) {
            // Weights and state are made from the same list of layers.
            let LayerState::Linear { state, tail } = &lane.state.layers[index] else { continue };
            let seqs = Seqs { table: &inputs.seqs, count: 1, tokens: t, longest: lane.tokens, slots: 1 };
            ops::conv(caps, pass, &row, &w.conv, seqs, tail, &qkv, channels, c.conv_taps, true)?;
            match self.prefill {
                None => {
                    let scale = (heads.k as f32).powf(-0.5);
                    let small = &w.small;
                    ops::mix_step(caps, pass, heads, &s.mid, [&z, &a, &b], small, seqs, state, &s.mixed, scale, c.eps)?;
                }
                Some(prefill) => {
                    ops::gate(caps, pass, &a, &b, &w.a_log, &w.dt_bias, &s.g, &s.beta, t, hv)?;
                    let io = gdn::Io {
                        q: qkv.at(0),
                        k: qkv.at(hk * dk),
                        v: qkv.at(2 * hk * dk),
                        g: s.g.clone(),
                        beta: s.beta.clone(),
                        state: state.clone(),
                        o: Rows::packed(s.o.clone(), hv * dv),
                    };
                    prefill.record(pass, &io)?;
                    ops::gated_norm(caps, pass, heads, &s.o, &z, &w.norm, &s.mixed, t, c.eps)?;
                }
            }
        }
        ops::linear(caps, pass, &Rows::packed(s.mixed.clone(), hv * dv), &w.out, &self.residual(), t, true)
    }

    /// Full attention:
    /// ```text
    /// [q gate k v] = project(norm(x))        q, k = rotary(norm(q)), rotary(norm(k))        cache += k, v
    /// x += out(softmax(q k^T / sqrt(D)) v * sigmoid(gate))
    /// ```
    fn full(&self, pass: &mut Pass, layer: &Layer, w: &Full, inputs: &[Inputs], index: usize) -> Result<()> {
        let (c, s, t) = (self.config, self.scratch, self.rows());
        let (width, attended) = (c.full_row() as u64, c.heads as u64 * c.head_dim as u64);
        let row = Rows::packed(s.wide.clone(), width);
        self.project(pass, &layer.mixer_norm, &w.project, &row)?;
        for (lane, inputs) in self.lanes.iter().zip(inputs) {
            let LayerState::Full(cache) = &lane.state.layers[index] else { continue };
            let rows = |view: &View, width: u64| view.slice(inputs.row * width * 4, lane.tokens * width * 4);
            let attention = Attention {
                shape: attention_shape(c, self.kv),
                tokens: lane.tokens,
                positions: lane.positions.clone(),
                qkv: &rows(&s.wide, width)?,
                q_norm: &w.q_norm,
                k_norm: &w.k_norm,
                rope: &inputs.rope,
                pos: &inputs.pos,
                pages: &lane.state.kv(*cache),
                q: &s.mid,
                part: &s.part,
                y: &rows(&s.mixed, attended)?,
            };
            ops::attention(self.caps, pass, &attention)?;
        }
        let y = Rows::packed(s.mixed.clone(), attended);
        ops::linear(self.caps, pass, &y, &w.out, &self.residual(), t, true)
    }

    /// `x += down(silu(gate(n)) * up(n))`, `n = norm(x)`
    fn mlp(&self, pass: &mut Pass, layer: &Layer) -> Result<()> {
        let (s, t) = (self.scratch, self.rows());
        let norm = Norm { weight: &layer.mlp_norm, eps: self.config.eps, scratch: &s.normed };
        ops::swiglu_up(self.caps, pass, &s.x, norm, &layer.gate, &layer.up, &s.wide, &s.mid, t)?;
        let inner = Rows::packed(s.mid.clone(), self.config.ffn as u64);
        ops::linear(self.caps, pass, &inner, &layer.down, &self.residual(), t, true)
    }

    fn residual(&self) -> Rows {
        Rows::packed(self.scratch.x.clone(), self.config.hidden as u64)
    }
}
