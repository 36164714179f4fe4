//! Times the operator: chunked prefill over lengths, decode over batches; the backward pass is in [`crate::bench_grad`].
//!
//! Every row is checked before it is timed: the very recording that is timed runs once over fresh memory, and its outputs are
//! compared with the float64 recurrence on two heads, one that hardly forgets and one that does, over the first tokens; all
//! other outputs must at least be numbers.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use gatedelta::backend::{Backend, View};
use gatedelta::gdn::{Commit, Io, Options, Prefill, Step};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, HeadMap, Heads, Shape};
use gatedelta::tune;
use half::{bf16, f16};

use crate::case::Case;
use crate::timing::{self, Sample};
use crate::{bench_grad, oracle};

/// Tokens that are compared with the float64 recurrence.
const CHECKED_TOKENS: u64 = 2048;

/// What a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// One sequence of so many tokens.
    Prefill(u64),
    /// The gradients of such a prefill.
    Backward(u64),
    /// One token for each of so many sequences, in so many layers one after the other, each with states of its own: a model's
    /// states do not stay in a cache from one token to the next.
    Decode {
        /// Sequences.
        sequences: u64,
        /// Layers.
        layers: u64,
    },
}

impl What {
    /// Tokens of one run, counted once per layer.
    pub fn tokens(self) -> u64 {
        match self {
            What::Prefill(tokens) | What::Backward(tokens) => tokens,
            What::Decode { sequences, layers } => sequences * layers,
        }
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            What::Prefill(_) => "prefill",
            What::Backward(_) => "backward",
            What::Decode { .. } => "decode",
        }
    }

    /// Its size in tables.
    pub fn size(self) -> String {
        match self {
            What::Prefill(tokens) | What::Backward(tokens) => format!("T={tokens}"),
            What::Decode { sequences, layers: 1 } => format!("N={sequences}"),
            What::Decode { sequences, layers } => format!("N={sequences} x{layers}"),
        }
    }
}

/// One measured row.
pub struct Row {
    /// What was run.
    pub what: What,
    /// On which heads.
    pub heads: Heads,
    /// Largest relative error found before timing.
    pub error: f64,
    /// Times of one run.
    pub sample: Sample,
    /// Floating-point operations of one run.
    pub flops: f64,
    /// Bytes that one run must move at least.
    pub bytes: f64,
}

impl Row {
    /// Tokens times value heads.
    pub fn token_heads(&self) -> f64 {
        self.what.tokens() as f64 * self.heads.hv as f64
    }
}

/// Heads of size 128.
///
/// # Errors
/// Head counts that the operator refuses.
pub fn heads(hk: u32, hv: u32) -> gatedelta::Result<Heads> {
    Heads::new(hk, hv, 128, 128, HeadMap::Div)
}

/// Checks and times one row.
///
/// # Errors
/// Whatever the device reports, and an answer that is not right.
pub fn row(backend: &dyn Backend, what: What, heads: Heads, options: Options, budget: Duration) -> Result<Row> {
    let store = options.store;
    let (shape, layers) = match what {
        What::Backward(tokens) => return bench_grad::row(backend, tokens, heads, options, budget),
        What::Prefill(tokens) => (Shape::one(heads, tokens), 1),
        What::Decode { sequences, layers } => (Shape::new(heads, (0..=sequences).collect())?, layers),
    };
    let tokens = shape.tokens();
    // Inputs repeat after the tokens that are checked: time does not depend on them, and making them takes time.
    let block = oracle::inputs("bench", prefix(&shape, tokens.min(CHECKED_TOKENS))?, false, true, 7);
    let memory = Memory::new(backend, &shape, layers, store, &block)?;
    let stride = (heads.hk as u64 * heads.k as u64).max(heads.hv as u64 * heads.v as u64);
    let mut pass = Pass::new();
    match what {
        What::Prefill(_) | What::Backward(_) => {
            Prefill::new(backend, &shape, &options, stride)?.record(&mut pass, &memory.io)?;
        }
        What::Decode { sequences, layers } => {
            let step = Step::new(backend, &shape, &vec![1; sequences as usize], &options, stride)?;
            let own = memory.state.bytes / layers;
            for layer in 0..layers {
                let io = Io { state: memory.state.slice(layer * own, own)?, ..memory.io.clone() };
                step.record(&mut pass, &io, Commit::Store)?;
            }
        }
    }
    backend.load(&pass)?;
    backend.run(&pass)?;
    let error = memory.check(backend, &block, tokens, store)?;
    let bound = match store {
        Dtype::F32 => 1e-5,
        Dtype::F16 => 1e-3,
        Dtype::Bf16 => 5e-3,
    };
    ensure!(error <= bound, "the answer is wrong: relative error {error:.1e}, bound {bound:.0e}");
    let sample = timing::pass(backend, &pass, budget)?;
    let (flops, bytes) = cost(backend, what, &heads, store);
    Ok(Row { what, heads, error, sample, flops, bytes })
}

/// The first `tokens` tokens of a shape of one sequence, or its first sequences of one token.
fn prefix(shape: &Shape, tokens: u64) -> gatedelta::Result<Shape> {
    let cu = shape.cu_seqlens().iter().map(|&t| t.min(tokens));
    let mut cu: Vec<u64> = if shape.sequences() == 1 { vec![0, tokens] } else { cu.collect() };
    cu.dedup();
    Shape::new(shape.heads, cu)
}

/// Operations of the algorithm in use, counting whole tiles, and bytes of inputs, outputs and states.
fn cost(backend: &dyn Backend, what: What, heads: &Heads, store: Dtype) -> (f64, f64) {
    let (hk, hv, k, v) = (heads.hk as f64, heads.hv as f64, heads.k as f64, heads.v as f64);
    let token_bytes = (2.0 * hk * k + 2.0 * hv * v) * store.size() as f64 + 8.0 * hv;
    let state_bytes = 8.0 * heads.state_len() as f64;
    match what {
        What::Prefill(tokens) | What::Backward(tokens) => {
            let c = tune::tile(backend.caps(), heads).chunk as f64;
            let chunks = (tokens as f64 / c).ceil();
            // Q K^T and K K^T, the inverse; K S, Q S and K^T N; A W and P N.
            let per_chunk = hk * 4.0 * c * c * k + hv * (2.0 * c * c * c / 3.0 + 6.0 * c * k * v + 4.0 * c * c * v);
            (chunks * per_chunk, tokens as f64 * token_bytes + state_bytes)
        }
        // Decay, S^T k, the update, S^T q.
        What::Decode { .. } => {
            let n = what.tokens() as f64;
            (n * 7.0 * heads.state_len() as f64, n * (token_bytes + state_bytes))
        }
    }
}

/// Device memory of one row.
struct Memory {
    io: Io,
    o: View,
    state: View,
}

impl Memory {
    fn new(backend: &dyn Backend, shape: &Shape, layers: u64, store: Dtype, block: &Case) -> Result<Memory> {
        let (tokens, heads) = (shape.tokens(), &shape.heads);
        let (qk, vo, gates) = (heads.hk as u64 * heads.k as u64, heads.hv as u64 * heads.v as u64, heads.hv as u64);
        let fill =
            |name: &str, values: &[f32], width: u64, store: Dtype| fill(backend, name, values, tokens * width, store);
        let h0 = block.h0.as_deref().context("benchmark inputs have initial states")?;
        let states = layers * shape.sequences() as u64 * heads.state_len();
        let state = self::fill(backend, "state", h0, states, Dtype::F32)?;
        let nan = vec![f32::NAN; block.v.len()];
        let o = fill("o", &nan, vo, store)?;
        let io = Io {
            q: Rows::packed(fill("q", &block.q, qk, store)?, qk),
            k: Rows::packed(fill("k", &block.k, qk, store)?, qk),
            v: Rows::packed(fill("v", &block.v, vo, store)?, vo),
            g: fill("g", &block.g, gates, Dtype::F32)?,
            beta: fill("beta", &block.beta, gates, Dtype::F32)?,
            state: state.clone(),
            o: Rows::packed(o.clone(), vo),
        };
        Ok(Memory { io, o, state })
    }

    /// The largest relative error of two heads over the block's tokens, and of their states where the block is all there is.
    fn check(&self, backend: &dyn Backend, block: &Case, tokens: u64, store: Dtype) -> Result<f64> {
        let heads = block.shape.heads;
        let (hv, dv) = (heads.hv as usize, heads.v as usize);
        let part = stored(&block.v, store).len() as u64;
        let read = |view: &View, at: u64, store: Dtype| -> Result<Vec<f32>> {
            let numbers = loaded(&backend.read(&view.slice(at, part.min(view.bytes - at))?)?.wait()?, store);
            let bad = numbers.iter().filter(|x| !x.is_finite()).count();
            ensure!(bad == 0, "the answer is wrong: {bad} numbers are not finite");
            Ok(numbers)
        };
        let o = read(&self.o, 0, store)?;
        for at in (part..self.o.bytes).step_by(part as usize) {
            read(&self.o, at, store)?;
        }
        let ht = loaded(&backend.read(&self.state)?.wait()?, Dtype::F32);
        ensure!(ht.iter().all(|x| x.is_finite()), "the answer is wrong: states are not finite");

        let (mut o64, mut ht64) = (vec![0.0; o.len()], vec![0.0; block.state_dims().iter().product()]);
        // States of further layers follow those of the first.
        let ht = &ht[..ht64.len()];
        let mut worst = 0.0f64;
        for h in [0, heads.hv - 1] {
            for n in 0..block.shape.sequences() {
                oracle::head(block, n, h, &mut o64, &mut ht64);
            }
            worst = worst.max(oracle::error(&of_head(&o, dv, hv, h), &of_head(&o64, dv, hv, h)));
            if tokens == block.shape.tokens() {
                let size = (heads.k * heads.v) as usize;
                worst = worst.max(oracle::error(&of_head(ht, size, hv, h), &of_head(&ht64, size, hv, h)));
            }
        }
        Ok(worst)
    }
}

/// Memory for so many numbers, filled with the values over and over.
pub fn fill(backend: &dyn Backend, what: &str, values: &[f32], numbers: u64, store: Dtype) -> Result<View> {
    let total = numbers * store.size();
    // Devices have no empty buffers.
    let view = backend.alloc(what, total.max(16))?.slice(0, total)?;
    repeat(backend, &view, &stored(values, store))?;
    Ok(view)
}

/// Writes the bytes over and over until the view is full.
pub fn repeat(backend: &dyn Backend, view: &View, bytes: &[u8]) -> Result<()> {
    let mut at = 0;
    while at < view.bytes {
        let part = (bytes.len() as u64).min(view.bytes - at);
        backend.write(&view.slice(at, part)?, &bytes[..part as usize])?;
        at += part;
    }
    Ok(())
}

/// The part of head `h` in rows of `heads` heads of `size` numbers.
pub fn of_head(x: &[f32], size: usize, heads: usize, h: u32) -> Vec<f32> {
    x.chunks_exact(size).skip(h as usize).step_by(heads).flatten().copied().collect()
}

/// Numbers as a device holds them.
pub fn stored(values: &[f32], store: Dtype) -> Vec<u8> {
    match store {
        Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
        Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// The inverse of [`stored`].
pub fn loaded(bytes: &[u8], store: Dtype) -> Vec<f32> {
    let halves = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match store {
        Dtype::F32 => bytemuck::allocation::pod_collect_to_vec(bytes),
        Dtype::F16 => halves.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => halves.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
    }
}
