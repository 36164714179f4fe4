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
use crate::ops::{self, Attention, KvPage, Norm, Seqs};
use crate::pass::{Pass, Rows};
use crate::qwen::config::Config;
use crate::qwen::memory::{InputLayout, Sizes, attention_shape};
use crate::qwen::state::{LayerState, State};
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

/// Everything that a pass over `tokens` tokens is recorded from.
pub(crate) struct Recorder<'a> {
    pub config: &'a Config,
    pub weights: &'a Weights,
    pub caps: &'a Caps,
    pub scratch: &'a Scratch,
    pub state: &'a State,
    pub kv: Dtype,
    /// The recurrence over this many tokens; none where it goes token by token.
    pub prefill: Option<&'a gdn::Prefill>,
    /// T
    pub tokens: u64,
    /// Positions that the tokens may have when the pass runs.
    pub positions: Range<u64>,
}

/// The device views of [`InputLayout`].
struct Inputs {
    ids: View,
    pos: View,
    rope: View,
    seqs: View,
}

/// The chunked recurrence for pieces of `tokens` tokens; none where they go token by token.
pub(crate) fn prefill(backend: &dyn Backend, config: &Config, tokens: u64) -> Result<Option<gdn::Prefill>> {
    if tokens <= STEP_TOKENS {
        return Ok(None);
    }
    let options = gdn::Options { scale: None, qk_l2norm: true, store: Dtype::F32 };
    let shape = Shape::one(config.linear, tokens);
    Ok(Some(gdn::Prefill::new(backend, &shape, &options, config.conv_channels() as u64)?))
}

impl Recorder<'_> {
    /// Ids to hidden states: all layers, updating the sequence's state.
    pub fn trunk(&self, pass: &mut Pass) -> Result<()> {
        let layout = InputLayout::new(self.caps, self.config, self.tokens);
        let slice = |at: u64, bytes: u64| self.scratch.inputs.slice(at, bytes);
        let inputs = Inputs {
            ids: slice(layout.ids, self.tokens * 4)?,
            pos: slice(layout.pos, self.tokens * 4)?,
            rope: slice(layout.rope, self.tokens * self.config.rotary as u64 * 4)?,
            seqs: slice(layout.seqs, 16)?,
        };
        ops::embed(self.caps, pass, &inputs.ids, &self.weights.embed, &self.scratch.x, self.tokens)?;
        for (layer, state) in self.weights.layers.iter().zip(&self.state.layers) {
            match (&layer.mixer, state) {
                (Mixer::Linear(w), LayerState::Linear { state, tail }) => {
                    self.linear(pass, layer, w, &inputs, state, tail)?;
                }
                (Mixer::Full(w), LayerState::Full(i)) => self.full(pass, layer, w, &inputs, &self.state.kv(*i))?,
                // Weights and state are made from the same list of layers.
                _ => {}
            }
            self.mlp(pass, layer)?;
        }
        Ok(())
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
            ops::norm_linear(self.caps, pass, &self.scratch.x, norm, w, &y.at(*column), self.tokens)?;
        }
        Ok(())
    }

    /// Gated DeltaNet:
    /// ```text
    /// [m z a b] = project(norm(x))        c = silu(conv(m)) = [q k v]
    /// g = -exp(A_log) softplus(a + dt_bias)        beta = sigmoid(b)
    /// o = recurrence(q / |q|, k / |k|, v, g, beta)        x += out(norm(o) silu(z))
    /// ```
    fn linear(
        &self,
        pass: &mut Pass,
        layer: &Layer,
        w: &Linear,
        inputs: &Inputs,
        state: &View,
        tail: &View,
    ) -> Result<()> {
        let (c, s, caps, t) = (self.config, self.scratch, self.caps, self.tokens);
        let heads = &c.linear;
        let (hk, hv, dk, dv) = (heads.hk as u64, heads.hv as u64, heads.k as u64, heads.v as u64);
        let channels = c.conv_channels() as u64;
        let row = Rows::packed(s.wide.clone(), c.linear_row() as u64);
        let (z, a, b) = (row.at(channels), row.at(channels + hv * dv), row.at(channels + hv * dv + hv));
        self.project(pass, &layer.mixer_norm, &w.project, &row)?;

        let seqs = Seqs { table: &inputs.seqs, count: 1, tokens: t, longest: t, slots: 1 };
        let qkv = Rows::packed(s.mid.clone(), channels);
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
        ops::linear(caps, pass, &Rows::packed(s.mixed.clone(), hv * dv), &w.out, &self.residual(), t, true)
    }

    /// Full attention:
    /// ```text
    /// [q gate k v] = project(norm(x))        q, k = rotary(norm(q)), rotary(norm(k))        cache += k, v
    /// x += out(softmax(q k^T / sqrt(D)) v * sigmoid(gate))
    /// ```
    fn full(&self, pass: &mut Pass, layer: &Layer, w: &Full, inputs: &Inputs, pages: &[KvPage]) -> Result<()> {
        let (c, s, t) = (self.config, self.scratch, self.tokens);
        let row = Rows::packed(s.wide.clone(), c.full_row() as u64);
        self.project(pass, &layer.mixer_norm, &w.project, &row)?;
        let attention = Attention {
            shape: attention_shape(c, self.kv),
            tokens: t,
            positions: self.positions.clone(),
            qkv: &s.wide,
            q_norm: &w.q_norm,
            k_norm: &w.k_norm,
            rope: &inputs.rope,
            pos: &inputs.pos,
            pages,
            q: &s.mid,
            part: &s.part,
            y: &s.mixed,
        };
        ops::attention(self.caps, pass, &attention)?;
        let y = Rows::packed(s.mixed.clone(), c.heads as u64 * c.head_dim as u64);
        ops::linear(self.caps, pass, &y, &w.out, &self.residual(), t, true)
    }

    /// `x += down(silu(gate(n)) * up(n))`, `n = norm(x)`
    fn mlp(&self, pass: &mut Pass, layer: &Layer) -> Result<()> {
        let (s, t) = (self.scratch, self.tokens);
        let norm = Norm { weight: &layer.mlp_norm, eps: self.config.eps, scratch: &s.normed };
        ops::swiglu_up(self.caps, pass, &s.x, norm, &layer.gate, &layer.up, &s.wide, &s.mid, t)?;
        let inner = Rows::packed(s.mid.clone(), self.config.ffn as u64);
        ops::linear(self.caps, pass, &inner, &layer.down, &self.residual(), t, true)
    }

    fn residual(&self) -> Rows {
        Rows::packed(self.scratch.x.clone(), self.config.hidden as u64)
    }
}
