//! Operations that only move or scale numbers: embedding, norm, activation, argmax, copies.

use super::weight::Weight;
use super::{need, small, some, words};
use crate::backend::View;
use crate::error::{Error, Result};
use crate::kernel::model::{
    ARGMAX, ArgmaxConsts, ArgmaxParams, COPY, EMBED, EmbedConsts, EmbedParams, FILL, RMS_NORM, RmsNormConsts,
    RmsNormParams, SWIGLU, SwigluConsts, SwigluParams, WordsConsts, WordsParams,
};
use crate::pass::Pass;
use crate::tune::{self, Caps};

/// `x[t] = table[ids[t]]`. An id outside the table leaves its row of x alone.
/// - ids `[tokens]` u32; table `[vocabulary, dim]`; x `[tokens, dim]` f32
///
/// # Errors
/// [`Error::Argument`] naming the argument that is too small or unaligned; [`Error::Unsupported`] for one that is too large.
pub fn embed(caps: &Caps, pass: &mut Pass, ids: &View, table: &Weight, x: &View, tokens: u64) -> Result<()> {
    table.check("table")?;
    let dim = table.k;
    let ids = words(caps, "ids", ids, &[tokens])?;
    let x = words(caps, "x", x, &[tokens, dim])?;
    for part in &table.parts {
        let view = need(caps, "table", &part.view, table.dtype.size(), &[part.rows, dim])?;
        let params = EmbedParams {
            dim: some("dim (numbers in a row)", dim)?,
            row0: small("table: first row of a part", part.row0)?,
            rows: small("table: rows of a part", part.rows)?,
        };
        let grid = [small("tokens", tokens)?, 1, 1];
        pass.launch(
            &EMBED,
            EmbedConsts { w_type: table.dtype.code() },
            params,
            &[&ids, &view, &x],
            grid,
            tokens * dim * 8,
        );
    }
    Ok(())
}

/// `y[r] = x[row0 + r] * rsqrt(mean(x[row0 + r]^2) + eps) * w`.
/// - x `[row0 + rows, dim]` f32, w `[dim]` f32, y `[rows, dim]` f32
///
/// # Errors
/// As [`embed`].
#[allow(clippy::too_many_arguments)]
pub fn rms_norm(
    caps: &Caps,
    pass: &mut Pass,
    x: &View,
    row0: u64,
    w: &View,
    y: &View,
    rows: u64,
    dim: u64,
    eps: f32,
) -> Result<()> {
    let x = words(caps, "x", x, &[row0.saturating_add(rows), dim])?;
    let w = words(caps, "w", w, &[dim])?;
    let y = words(caps, "y", y, &[rows, dim])?;
    let params = RmsNormParams { dim: some("dim", dim)?, row0: small("row0", row0)?, eps };
    let consts = RmsNormConsts { lanes: tune::row_lanes(caps, dim) };
    pass.launch(&RMS_NORM, consts, params, &[&x, &w, &y], [small("rows", rows)?, 1, 1], rows * dim * 12);
    Ok(())
}

/// `y = silu(gate) * up`.
/// - gate_up `[rows, 2 dim]` f32: gate, then up; y `[rows, dim]` f32
///
/// # Errors
/// As [`embed`].
pub fn swiglu(caps: &Caps, pass: &mut Pass, gate_up: &View, y: &View, rows: u64, dim: u64) -> Result<()> {
    let gate_up = words(caps, "gate_up", gate_up, &[2, rows, dim])?;
    let y = words(caps, "y", y, &[rows, dim])?;
    let params = SwigluParams { rows: small("rows", rows)?, dim: some("dim", dim)? };
    let block = tune::block(caps);
    let grid = [small("y: cells", (rows * dim).div_ceil(block as u64))?, 1, 1];
    pass.launch(&SWIGLU, SwigluConsts { block }, params, &[&gate_up, &y], grid, rows * dim * 20);
    Ok(())
}

/// The index of the largest number of each row; the smallest index among equals; NaN never wins. A row of
/// NaN alone gives 2^32 - 1.
/// - x `[rows, n]` f32; ids `[rows]` u32
///
/// # Errors
/// As [`embed`].
pub fn argmax(caps: &Caps, pass: &mut Pass, x: &View, ids: &View, rows: u64, n: u64) -> Result<()> {
    let x = words(caps, "x", x, &[rows, n])?;
    let ids = words(caps, "ids", ids, &[rows])?;
    let consts = ArgmaxConsts { lanes: tune::argmax_lanes(caps) };
    let params = ArgmaxParams { n: some("n (numbers in a row)", n)? };
    pass.launch(&ARGMAX, consts, params, &[&x, &ids], [small("rows", rows)?, 1, 1], rows * n * 5);
    Ok(())
}

/// `to[to_at + i] = from[from_at + i]` for `n` words of 32 bits, between two different buffers.
///
/// # Errors
/// As [`embed`]; [`Error::Argument`] if both are the same buffer.
pub fn copy(caps: &Caps, pass: &mut Pass, from: &View, from_at: u64, to: &View, to_at: u64, n: u64) -> Result<()> {
    if from.buffer.id() == to.buffer.id() {
        return Err(Error::argument("to", "the buffer of from", "another buffer"));
    }
    let from = words(caps, "from", from, &[from_at.saturating_add(n)])?;
    let to = words(caps, "to", to, &[to_at.saturating_add(n)])?;
    let (params, grid) = stretch(caps, n, from_at, to_at, 0)?;
    pass.launch(&COPY, WordsConsts { block: tune::block(caps) }, params, &[&from, &to], grid, n * 8);
    Ok(())
}

/// `to[at + i] = word` for `n` words of 32 bits.
///
/// # Errors
/// As [`embed`].
pub fn fill(caps: &Caps, pass: &mut Pass, to: &View, at: u64, n: u64, word: u32) -> Result<()> {
    let to = words(caps, "to", to, &[at.saturating_add(n)])?;
    let (params, grid) = stretch(caps, n, 0, at, word)?;
    pass.launch(&FILL, WordsConsts { block: tune::block(caps) }, params, &[&to], grid, n * 4);
    Ok(())
}

/// Params and grid of [`COPY`] and [`FILL`].
fn stretch(caps: &Caps, n: u64, from: u64, to: u64, word: u32) -> Result<(WordsParams, [u32; 3])> {
    let params = WordsParams { n: small("n", n)?, src_off: small("from", from)?, dst_off: small("to", to)?, word };
    Ok((params, [small("cells", n.div_ceil(tune::block(caps) as u64))?, 1, 1]))
}
