//! The operator from host slices to host vectors: upload, run, read back.

use super::{Backward, Commit, GradIo, Io, MAX_STEP_TOKENS, Options, Prefill, Step};
use crate::backend::{Backend, Buffer, View};
use crate::error::{Error, Result};
use crate::pass::{Pass, Rows};
use crate::shape::{Dtype, Shape};

/// What goes in, as f32 on the host; q, k, v and o travel in `options.store`.
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// Sequences and heads.
    pub shape: Shape,
    /// `[T, Hk, K]`.
    pub q: &'a [f32],
    /// `[T, Hk, K]`.
    pub k: &'a [f32],
    /// `[T, Hv, V]`.
    pub v: &'a [f32],
    /// `[T, Hv]`, log decay, at most 0.
    pub g: &'a [f32],
    /// `[T, Hv]`.
    pub beta: &'a [f32],
    /// `[N, Hv, K, V]`; zero if none.
    pub h0: Option<&'a [f32]>,
    /// Scale, norm and storage.
    pub options: Options,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub struct Outputs {
    /// `[T, Hv, V]`.
    pub o: Vec<f32>,
    /// `[N, Hv, K, V]`: the state after each sequence.
    pub ht: Vec<f32>,
}

impl Inputs<'_> {
    /// Checks lengths and gates.
    fn check(&self) -> Result<()> {
        let (t, h) = (self.shape.tokens(), &self.shape.heads);
        let n = self.shape.sequences() as u64;
        let (hk, hv, k, v) = (h.hk as u64, h.hv as u64, h.k as u64, h.v as u64);
        let mut lengths = vec![
            ("q", self.q.len(), t * hk * k, format!("[T, Hk, K] = [{t}, {hk}, {k}]")),
            ("k", self.k.len(), t * hk * k, format!("[T, Hk, K] = [{t}, {hk}, {k}]")),
            ("v", self.v.len(), t * hv * v, format!("[T, Hv, V] = [{t}, {hv}, {v}]")),
            ("g", self.g.len(), t * hv, format!("[T, Hv] = [{t}, {hv}]")),
            ("beta", self.beta.len(), t * hv, format!("[T, Hv] = [{t}, {hv}]")),
        ];
        if let Some(h0) = self.h0 {
            lengths.push(("h0", h0.len(), n * h.state_len(), format!("[N, Hv, K, V] = [{n}, {hv}, {k}, {v}]")));
        }
        check_lengths(lengths)?;
        // NaN is not <= 0 either.
        if let Some(i) = self.g.iter().position(|g| !matches!(g.partial_cmp(&0.0), Some(o) if o.is_le())) {
            let what = format!("g[{}, {}]", i as u64 / hv, i as u64 % hv);
            return Err(Error::argument(what, self.g[i], "a log decay of at most 0"));
        }
        Ok(())
    }
}

/// Refuses (name, numbers found, numbers expected, shape) that differ.
fn check_lengths(lengths: Vec<(&str, usize, u64, String)>) -> Result<()> {
    for (what, found, expected, shape) in lengths {
        if found as u64 != expected {
            return Err(Error::argument(what, format!("{found} numbers"), format!("{expected} for {shape}")));
        }
    }
    Ok(())
}

/// Numbers on the device, in their stored form.
fn put(backend: &dyn Backend, what: &str, values: &[f32], dtype: Dtype) -> Result<View> {
    let bytes = to_bytes(values, dtype);
    let buffer = alloc(backend, what, bytes.len() as u64)?;
    let view = buffer.slice(0, bytes.len() as u64)?;
    backend.write(&view, &bytes)?;
    Ok(view)
}

/// Memory for an answer. All bits set is NaN in every stored type: a number that no kernel writes cannot pass for one.
fn poisoned(backend: &dyn Backend, what: &str, bytes: u64) -> Result<View> {
    let view = alloc(backend, what, bytes)?.slice(0, bytes)?;
    backend.write(&view, &vec![0xff; bytes as usize])?;
    Ok(view)
}

/// Tensors of one call on the device.
struct Uploaded {
    io: Io,
    state: View,
    o: View,
}

fn upload(backend: &dyn Backend, inputs: &Inputs<'_>) -> Result<Uploaded> {
    let (t, h) = (inputs.shape.tokens(), &inputs.shape.heads);
    let store = inputs.options.store;
    let (qk, vo) = (h.hk as u64 * h.k as u64, h.hv as u64 * h.v as u64);
    let put = |what: &str, values: &[f32], dtype: Dtype| put(backend, what, values, dtype);
    let state_len = inputs.shape.sequences() as u64 * h.state_len();
    let state = match inputs.h0 {
        Some(h0) => put("state", h0, Dtype::F32)?,
        None => put("state", &vec![0.0; state_len as usize], Dtype::F32)?,
    };
    let o = poisoned(backend, "o", t * vo * store.size())?;
    let io = Io {
        q: Rows::packed(put("q", inputs.q, store)?, qk),
        k: Rows::packed(put("k", inputs.k, store)?, qk),
        v: Rows::packed(put("v", inputs.v, store)?, vo),
        g: put("g", inputs.g, Dtype::F32)?,
        beta: put("beta", inputs.beta, Dtype::F32)?,
        state: state.clone(),
        o: Rows::packed(o.clone(), vo),
    };
    Ok(Uploaded { io, state, o })
}

/// A buffer of at least 16 bytes: devices do not have empty ones.
fn alloc(backend: &dyn Backend, what: &str, bytes: u64) -> Result<Buffer> {
    backend.alloc(what, bytes.max(16))
}

fn download(backend: &dyn Backend, up: &Uploaded, store: Dtype) -> Result<Outputs> {
    let o = backend.read(&up.o)?;
    let ht = backend.read(&up.state)?;
    Ok(Outputs { o: from_bytes(&o.wait()?, store), ht: ht.wait_as()? })
}

/// What comes out when there is nothing to do.
fn untouched(inputs: &Inputs<'_>) -> Outputs {
    let n = inputs.shape.sequences() * inputs.shape.heads.state_len() as usize;
    Outputs { o: Vec::new(), ht: inputs.h0.map_or_else(|| vec![0.0; n], <[f32]>::to_vec) }
}

fn widest(inputs: &Inputs<'_>) -> u64 {
    let h = &inputs.shape.heads;
    (h.hk as u64 * h.k as u64).max(h.hv as u64 * h.v as u64)
}

/// Chunked prefill of a ragged batch.
///
/// # Errors
/// [`Error::Argument`] for a slice of the wrong length or a gate above 0, and whatever the backend reports.
pub fn prefill(backend: &dyn Backend, inputs: &Inputs<'_>) -> Result<Outputs> {
    inputs.check()?;
    if inputs.shape.tokens() == 0 {
        return Ok(untouched(inputs));
    }
    let up = upload(backend, inputs)?;
    let mut pass = Pass::new();
    Prefill::new(backend, &inputs.shape, &inputs.options, widest(inputs))?.record(&mut pass, &up.io)?;
    backend.run(&pass)?;
    download(backend, &up, inputs.options.store)
}

/// Gradients of a scalar with respect to what a prefill gave.
#[derive(Debug, Clone, Copy)]
pub struct Cotangents<'a> {
    /// `[T, Hv, V]`: with respect to o.
    pub d_o: &'a [f32],
    /// `[N, Hv, K, V]`: with respect to ht; zero if none.
    pub dht: Option<&'a [f32]>,
}

/// Gradients of the same scalar with respect to what went into the prefill.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[T, Hk, K]`; of the raw q, where the operator norms it.
    pub dq: Vec<f32>,
    /// `[T, Hk, K]`; of the raw k, where the operator norms it.
    pub dk: Vec<f32>,
    /// `[T, Hv, V]`.
    pub dv: Vec<f32>,
    /// `[T, Hv]`.
    pub dg: Vec<f32>,
    /// `[T, Hv]`.
    pub dbeta: Vec<f32>,
    /// `[N, Hv, K, V]`; also where no initial state was given.
    pub dh0: Vec<f32>,
}

/// The gradients of [`prefill`]. d_o travels, and dq, dk, dv are stored, in `options.store`.
///
/// NaN or infinity in d_o or dht spreads to the gradients of the same sequence and head from that token's chunk back, and to
/// nothing else but the q and k that its heads share.
///
/// # Errors
/// As [`prefill`], and [`Error::Argument`] for cotangents of the wrong length.
pub fn backward(backend: &dyn Backend, inputs: &Inputs<'_>, cotangents: &Cotangents<'_>) -> Result<Gradients> {
    inputs.check()?;
    let (shape, store) = (&inputs.shape, inputs.options.store);
    let (t, h, n) = (shape.tokens(), &shape.heads, shape.sequences() as u64);
    let (hv, k, v) = (h.hv as u64, h.k as u64, h.v as u64);
    let (qk, vo, states) = (h.hk as u64 * k, hv * v, n * h.state_len());
    let mut lengths = vec![("d_o", cotangents.d_o.len(), t * vo, format!("[T, Hv, V] = [{t}, {hv}, {v}]"))];
    if let Some(dht) = cotangents.dht {
        lengths.push(("dht", dht.len(), states, format!("[N, Hv, K, V] = [{n}, {hv}, {k}, {v}]")));
    }
    check_lengths(lengths)?;
    let zeros;
    let dht = match cotangents.dht {
        Some(dht) => dht,
        None => {
            zeros = vec![0.0; states as usize];
            &zeros
        }
    };
    if t == 0 {
        let empty = Vec::new;
        return Ok(Gradients { dq: empty(), dk: empty(), dv: empty(), dg: empty(), dbeta: empty(), dh0: dht.to_vec() });
    }
    let put = |what: &str, values: &[f32], dtype: Dtype| put(backend, what, values, dtype);
    let poisoned = |what: &str, numbers: u64, dtype: Dtype| poisoned(backend, what, numbers * dtype.size());
    let io = GradIo {
        q: Rows::packed(put("q", inputs.q, store)?, qk),
        k: Rows::packed(put("k", inputs.k, store)?, qk),
        v: Rows::packed(put("v", inputs.v, store)?, vo),
        g: put("g", inputs.g, Dtype::F32)?,
        beta: put("beta", inputs.beta, Dtype::F32)?,
        h0: inputs.h0.map(|h0| put("h0", h0, Dtype::F32)).transpose()?,
        d_o: Rows::packed(put("d_o", cotangents.d_o, store)?, vo),
        dq: Rows::packed(poisoned("dq", t * qk, store)?, qk),
        dk: Rows::packed(poisoned("dk", t * qk, store)?, qk),
        dv: Rows::packed(poisoned("dv", t * vo, store)?, vo),
        dg: poisoned("dg", t * hv, Dtype::F32)?,
        dbeta: poisoned("dbeta", t * hv, Dtype::F32)?,
        dstate: put("dstate", dht, Dtype::F32)?,
    };
    let mut pass = Pass::new();
    Backward::new(backend, shape, &inputs.options, widest(inputs))?.record(&mut pass, &io)?;
    backend.run(&pass)?;
    let reads = [&io.dq.view, &io.dk.view, &io.dv.view].map(|view| backend.read(view));
    let gates = [&io.dg, &io.dbeta, &io.dstate].map(|view| backend.read(view));
    let [dq, dk, dv] = reads.map(|r| r.and_then(|r| Ok(from_bytes(&r.wait()?, store))));
    let [dg, dbeta, dh0] = gates.map(|r| r.and_then(|r| r.wait_as::<f32>()));
    Ok(Gradients { dq: dq?, dk: dk?, dv: dv?, dg: dg?, dbeta: dbeta?, dh0: dh0? })
}

/// Token by token: one token of each sequence, or up to [`MAX_STEP_TOKENS`].
///
/// # Errors
/// As [`prefill`], and [`Error::Argument`] for a sequence of more than [`MAX_STEP_TOKENS`] tokens.
pub fn decode(backend: &dyn Backend, inputs: &Inputs<'_>) -> Result<Outputs> {
    let all: Vec<u32> = lengths(&inputs.shape)?;
    step(backend, inputs, &all)
}

/// Computes o for all tokens, and the state after the first `accepted[n]` tokens of each sequence only.
///
/// The state is bit for bit what [`decode`] of those tokens alone would leave.
///
/// # Errors
/// As [`decode`], and [`Error::Argument`] for an accepted count above the sequence's tokens.
pub fn verify(backend: &dyn Backend, inputs: &Inputs<'_>, accepted: &[u32]) -> Result<Outputs> {
    lengths(&inputs.shape)?;
    step(backend, inputs, accepted)
}

/// Tokens of each sequence, none above [`MAX_STEP_TOKENS`].
fn lengths(shape: &Shape) -> Result<Vec<u32>> {
    let tokens = |(n, w): (usize, &[u64])| match w[1] - w[0] {
        t if t <= MAX_STEP_TOKENS as u64 => Ok(t as u32),
        t => Err(Error::argument(format!("tokens of sequence {n}"), t, format!("at most {MAX_STEP_TOKENS}"))),
    };
    shape.cu_seqlens().windows(2).enumerate().map(tokens).collect()
}

fn step(backend: &dyn Backend, inputs: &Inputs<'_>, accepted: &[u32]) -> Result<Outputs> {
    inputs.check()?;
    let all = lengths(&inputs.shape)?;
    let accept = Step::new(backend, &inputs.shape, accepted, &inputs.options, widest(inputs))?;
    if inputs.shape.tokens() == 0 {
        return Ok(untouched(inputs));
    }
    let up = upload(backend, inputs)?;
    let mut pass = Pass::new();
    if accepted != all {
        let look = Step::new(backend, &inputs.shape, &all, &inputs.options, widest(inputs))?;
        look.record(&mut pass, &up.io, Commit::Discard)?;
    }
    accept.record(&mut pass, &up.io, Commit::Store)?;
    backend.run(&pass)?;
    download(backend, &up, inputs.options.store)
}

/// f32 numbers in their stored form, padded to whole 32-bit words.
fn to_bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes: Vec<u8> = match dtype {
        Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    };
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The inverse of [`to_bytes`].
fn from_bytes(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => bytemuck::allocation::pod_collect_to_vec(bytes),
        Dtype::F16 => halves().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => halves().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
    }
}
