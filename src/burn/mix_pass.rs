//! The launches behind [`gated_delta_mix`](super::gated_delta_mix) and its gradients, and their memory.

use super::lanes::{Part, Way, Work, room, whole};
use crate::backend::{Backend, View};
use crate::error::Result;
use crate::gdn::{Backward, GradIo, Io, Options, Prefill};
use crate::ops::{self, ConvGrad, GateGrad, GatedNormGrad, Seqs};
use crate::pass::{Pass, Rows};
use crate::shape::Shape;
use crate::tune::Caps;

/// The operation of one shape.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Mix {
    pub shape: Shape,
    pub taps: u32,
    pub eps: f32,
}

/// Arguments of the way forward, by number; the way back has the same and then `o` and `dy`.
pub(super) const ARGUMENTS: usize = 7;
const QKV: usize = 0;
const Z: usize = 1;
const AB: usize = 2;
const CONV: usize = 3;
const A_LOG: usize = 4;
const DT_BIAS: usize = 5;
const NORM: usize = 6;

/// q, k or v: columns of the convolution's input, in memory of its own behind it.
struct Channels {
    /// Before it in a row.
    from: u64,
    channels: u64,
    /// `[channels, taps]`
    w: View,
    /// `[T, channels]`: what the convolution makes of it.
    y: Rows,
}

/// What both directions read and write.
pub(super) struct Memory {
    /// `[T, C]`, before the convolution.
    x: Rows,
    parts: [Channels; 3],
    /// `[T, Hv V]`
    z: Rows,
    /// `[T, 2 Hv]`: a, then b.
    ab: Rows,
    /// `[Hv]`
    a_log: View,
    /// `[Hv]`
    dt_bias: View,
    /// `[V]`
    norm: View,
    /// `[T, Hv]`
    g: View,
    /// `[T, Hv]`
    beta: View,
    /// `[T, Hv V]`
    o: View,
    /// `[B]` of (first token, tokens, slot, 0)
    table: View,
    /// `[B, taps - 1, C]`: no token comes before the first.
    tail: View,
}

impl Mix {
    /// Numbers of a row before the convolution: q, k and v.
    pub fn width(&self) -> u64 {
        let h = &self.shape.heads;
        2 * (h.hk as u64 * h.k as u64) + h.hv as u64 * h.v as u64
    }

    /// Whether tensors of this shape can be bound whole, as the convolution needs it.
    pub fn fits(&self, caps: &Caps) -> bool {
        self.shape.tokens() * self.width() * 4 <= caps.max_binding
    }

    fn options() -> Options {
        Options { qk_l2norm: true, ..Options::default() }
    }

    fn memory(&self, backend: &dyn Backend) -> Result<Memory> {
        let h = &self.shape.heads;
        let (t, hv, v) = (self.shape.tokens(), h.hv as u64, h.v as u64);
        let (qk, vo, width, taps) = (h.hk as u64 * h.k as u64, hv * v, self.width(), self.taps as u64);
        let room = |what: &str, numbers| room(backend, what, numbers);
        let part = |what: &str, from: u64, channels: u64| {
            Ok(Channels {
                from,
                channels,
                w: room("weights of a convolution", channels * taps)?,
                y: Rows::packed(room(what, t * channels)?, channels),
            })
        };
        let count = self.shape.sequences();
        let table = room("table of sequences", count as u64 * 4)?;
        let firsts = self.shape.cu_seqlens();
        let rows: Vec<[u32; 4]> =
            (0..count).map(|n| [firsts[n] as u32, (firsts[n + 1] - firsts[n]) as u32, n as u32, 0]).collect();
        backend.write(&table, bytemuck::cast_slice(&rows))?;
        Ok(Memory {
            x: Rows::packed(room("qkv", t * width)?, width),
            parts: [part("q", 0, qk)?, part("k", qk, qk)?, part("v", 2 * qk, vo)?],
            z: Rows::packed(room("z", t * vo)?, vo),
            ab: Rows::packed(room("a and b", 2 * t * hv)?, 2 * hv),
            a_log: room("a_log", hv)?,
            dt_bias: room("dt_bias", hv)?,
            norm: room("norm", v)?,
            g: room("g", t * hv)?,
            beta: room("beta", t * hv)?,
            o: room("o", t * vo)?,
            table,
            tail: room("tails", count as u64 * (taps - 1) * width)?,
        })
    }

    /// Where the arguments go.
    fn inputs(&self, m: &Memory) -> Result<Vec<Part>> {
        let mut inputs = vec![whole(QKV, &m.x.view), whole(Z, &m.z.view), whole(AB, &m.ab.view)];
        let taps = self.taps as u64;
        inputs.extend(m.parts.iter().map(|p| Part { tensor: CONV, at: p.from * taps, view: p.w.clone() }));
        inputs.extend([whole(A_LOG, &m.a_log), whole(DT_BIAS, &m.dt_bias), whole(NORM, &m.norm)]);
        Ok(inputs)
    }

    fn seqs<'a>(&self, m: &'a Memory) -> Seqs<'a> {
        let lengths = self.shape.cu_seqlens().windows(2).map(|ends| ends[1] - ends[0]);
        let count = self.shape.sequences() as u64;
        let longest = lengths.max().unwrap_or(0);
        Seqs { table: &m.table, count, tokens: self.shape.tokens(), longest, slots: count }
    }

    /// `q, k, v = silu(conv(qkv))` and the gates.
    fn before(&self, caps: &Caps, pass: &mut Pass, m: &Memory) -> Result<()> {
        for p in &m.parts {
            let tail = self.clear_tail(caps, pass, m, p.channels)?;
            ops::conv(caps, pass, &m.x.at(p.from), &p.w, self.seqs(m), &tail, &p.y, p.channels, self.taps, true)?;
        }
        let (t, hv) = (self.shape.tokens(), self.shape.heads.hv as u64);
        ops::gate(caps, pass, &m.ab, &m.ab.at(hv), &m.a_log, &m.dt_bias, &m.g, &m.beta, t, hv)
    }

    /// The tails of so many channels, zero: a convolution leaves its own last rows there.
    fn clear_tail(&self, caps: &Caps, pass: &mut Pass, m: &Memory, channels: u64) -> Result<View> {
        let numbers = self.shape.sequences() as u64 * (self.taps as u64 - 1) * channels;
        let tail = m.tail.slice(0, numbers * 4)?;
        ops::fill(caps, pass, &tail, 0, numbers, 0)?;
        Ok(tail)
    }
}

impl Work for Mix {
    type Memory = Memory;

    /// Results: y and o.
    fn forward(&self, backend: &dyn Backend) -> Result<(Memory, Way)> {
        let (caps, heads) = (backend.caps(), &self.shape.heads);
        let m = self.memory(backend)?;
        let vo = heads.hv as u64 * heads.v as u64;
        let state = room(backend, "state", self.shape.sequences() as u64 * heads.state_len())?;
        let y = room(backend, "y", self.shape.tokens() * vo)?;
        let mut pass = Pass::new();
        self.before(caps, &mut pass, &m)?;
        ops::fill(caps, &mut pass, &state, 0, state.bytes / 4, 0)?;
        let [q, k, v] = m.parts.each_ref().map(|p| p.y.clone());
        let o = Rows::packed(m.o.clone(), vo);
        let io = Io { q, k, v, g: m.g.clone(), beta: m.beta.clone(), state, o };
        Prefill::new(backend, &self.shape, &Self::options(), widest(&m))?.record(&mut pass, &io)?;
        ops::gated_norm(caps, &mut pass, heads, &m.o, &m.z, &m.norm, &y, self.shape.tokens(), self.eps)?;
        let way = Way { inputs: self.inputs(&m)?, outputs: vec![whole(0, &y), whole(1, &m.o)], pass };
        Ok((m, way))
    }

    /// Results: the gradients of the arguments.
    fn backward(&self, backend: &dyn Backend, m: &Memory) -> Result<Way> {
        let (caps, heads) = (backend.caps(), self.shape.heads);
        let (t, hv, v) = (self.shape.tokens(), heads.hv as u64, heads.v as u64);
        let (vo, taps) = (hv * v, self.taps as u64);
        let room = |what: &str, numbers| room(backend, what, numbers);
        let mut pass = Pass::new();
        self.before(caps, &mut pass, m)?;

        let (dy, d_o, dnorm) = (room("dy", t * vo)?, room("d_o", t * vo)?, room("dnorm", v)?);
        let dz = Rows::packed(room("dz", t * vo)?, vo);
        let scratch = room("scratch of a gated norm", ops::gated_norm_grad_scratch(caps, &heads, t).div_ceil(4))?;
        let (o, z, w, eps) = (&m.o, &m.z, &m.norm, self.eps);
        let of = GatedNormGrad {
            heads,
            tokens: t,
            eps,
            o,
            z,
            w,
            dy: &dy,
            d_o: &d_o,
            dz: &dz,
            dw: &dnorm,
            scratch: &scratch,
        };
        ops::gated_norm_grad(caps, &mut pass, &of)?;

        let [q, k, v] = m.parts.each_ref().map(|p| p.y.clone());
        let d = m.parts.each_ref().map(|p| Ok(Rows::packed(room("dq, dk or dv", t * p.channels)?, p.channels)));
        let [dq, dk, dv] = d;
        let (dq, dk, dv): (Rows, Rows, Rows) = (dq?, dk?, dv?);
        let dstate = room("dstate", self.shape.sequences() as u64 * heads.state_len())?;
        ops::fill(caps, &mut pass, &dstate, 0, dstate.bytes / 4, 0)?;
        let io = GradIo {
            q,
            k,
            v,
            g: m.g.clone(),
            beta: m.beta.clone(),
            h0: None,
            d_o: Rows::packed(d_o, vo),
            dq: dq.clone(),
            dk: dk.clone(),
            dv: dv.clone(),
            dg: room("dg", t * hv)?,
            dbeta: room("dbeta", t * hv)?,
            dstate,
        };
        Backward::new(backend, &self.shape, &Self::options(), widest(m))?.record(&mut pass, &io)?;

        let dab = Rows::packed(room("da and db", 2 * t * hv)?, 2 * hv);
        let (da_log, ddt_bias) = (room("da_log", hv)?, room("ddt_bias", hv)?);
        let scratch = room("scratch of gates", ops::gate_grad_scratch(caps, t, hv).div_ceil(4))?;
        let of = GateGrad {
            tokens: t,
            hv,
            a: &m.ab,
            b: &m.ab.at(hv),
            a_log: &m.a_log,
            dt_bias: &m.dt_bias,
            dg: &io.dg,
            dbeta: &io.dbeta,
            da: &dab,
            db: &dab.at(hv),
            da_log: &da_log,
            ddt_bias: &ddt_bias,
            scratch: &scratch,
        };
        ops::gate_grad(caps, &mut pass, &of)?;

        let dx = Rows::packed(room("dqkv", t * self.width())?, self.width());
        let (seqs, mut dconv) = (self.seqs(m), Vec::new());
        for (p, dy) in m.parts.iter().zip([&dq, &dk, &dv]) {
            let tail = self.clear_tail(caps, &mut pass, m, p.channels)?;
            let dw = room("dconv", p.channels * taps)?;
            let bytes = ops::conv_grad_scratch(caps, &seqs, p.channels, self.taps);
            let of = ConvGrad {
                channels: p.channels,
                taps: self.taps,
                silu: true,
                seqs,
                x: &m.x.at(p.from),
                w: &p.w,
                tail: &tail,
                dy,
                dtail_out: None,
                dx: &dx.at(p.from),
                dw: &dw,
                dtail: None,
                scratch: &room("scratch of a convolution", bytes.div_ceil(4))?,
            };
            ops::conv_grad(caps, &mut pass, &of)?;
            dconv.push(Part { tensor: CONV, at: p.from * taps, view: dw });
        }

        let mut inputs = self.inputs(m)?;
        inputs.extend([whole(ARGUMENTS, &m.o), whole(ARGUMENTS + 1, &dy)]);
        let mut outputs = vec![whole(QKV, &dx.view), whole(Z, &dz.view), whole(AB, &dab.view)];
        outputs.extend(dconv);
        outputs.extend([whole(A_LOG, &da_log), whole(DT_BIAS, &ddt_bias), whole(NORM, &dnorm)]);
        Ok(Way { inputs, outputs, pass })
    }
}

/// The largest row of q, k and v.
fn widest(m: &Memory) -> u64 {
    m.parts.iter().map(|p| p.channels).max().unwrap_or(0)
}
