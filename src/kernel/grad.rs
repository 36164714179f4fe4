//! Rows of the gradients of what surrounds the operator: convolution, gates, gated norm.
//!
//! `dx` is the gradient of a loss by x, of the shape of x. The gradient of a weight is a sum over all tokens: each cell
//! leaves the sum over its own tokens as one row of `part`, and [`SUM_ROWS`] adds the rows up, both in an order that depends
//! on nothing but the numbers of the launch: the same inputs give the same bits.

use super::{Fields, Kernel, fields, read, update, write};

fields! {
    /// Consts of [`CONV_GRAD`].
    ConvGradConsts {
        /// Taps, 2 to 8.
        taps: u32,
        /// 1: SiLU on the result.
        silu: u32,
    }
}

fields! {
    /// Params of [`CONV_GRAD`] and [`CONV_TAIL_GRAD`].
    ConvGradParams {
        /// Channels.
        channels: u32,
        /// Sequences.
        count: u32,
        /// Elements between the rows of x.
        x_stride: u32,
        /// Element of x where row 0 starts.
        x_off: u32,
        /// Elements between the rows of dy.
        dy_stride: u32,
        /// Element of dy where row 0 starts.
        dy_off: u32,
        /// Elements between the rows of dx.
        dx_stride: u32,
        /// Element of dx where row 0 starts.
        dx_off: u32,
        /// Tokens of a block; blocks start anew with each sequence.
        block: u32,
        /// Cells that share out the blocks: cell i takes blocks i, i + cells, .. in the order of the table.
        cells: u32,
    }
}

/// Gradients of [`super::gdn::CONV`] by x and w, as if the new tail were not used further.
///
/// With `X` the rows of (tail, x), `p[t] = sum_j w[j] X[t - (taps - 1) + j]` before SiLU, per channel:
/// ```text
/// dp[t] = dy[t] silu'(p[t])        silu'(p) = sigmoid(p) (1 + p sigmoid(-p));  1 without SiLU
/// dx[i] = sum_j w[j] dp[i + (taps - 1) - j]        dw[j] = sum_t dp[t] X[t - (taps - 1) + j]
/// ```
/// - x `[T, x_stride]`, dy `[T, dy_stride]`, dx `[T, dx_stride]` f32; w `[channels, taps]` f32
/// - seqs `[count]` of (first token, tokens, slot, 0); tail `[slots, taps - 1, channels]` f32: the old one, oldest first
/// - part `[cells, channels, taps]` f32: dw over the blocks of each cell
/// - p is computed anew, for the first `taps - 1` tokens after a block too
/// - grid: `[ceil(channels / 64), cells, 1]`
pub static CONV_GRAD: Kernel = Kernel {
    name: "conv_grad",
    args: &[read("x"), read("w"), read("seqs"), read("tail"), read("dy"), write("dx"), write("part")],
    consts: ConvGradConsts::FIELDS,
    params: ConvGradParams::FIELDS,
};

fields! {
    /// Consts of [`CONV_TAIL_GRAD`].
    ConvTailGradConsts {
        /// Taps, 2 to 8.
        taps: u32,
        /// 1: SiLU on the result.
        silu: u32,
        /// 1: dtail_out is added; else it is not read.
        add: u32,
        /// 1: dtail is written; else it is left alone.
        store: u32,
    }
}

/// What the tails add to [`CONV_GRAD`], after it: the gradient of the old tail, and that which the new tail hands to x.
///
/// The new tail is rows `len ..` of the `taps - 1 + len` rows of (tail, x), so that `dtail_out[slot]` is added to the
/// gradients of these rows: to dx, and where the sequence is shorter than the tail, to dtail. Row i of the old tail also
/// gets `sum_t w[i - t] dp[t]`, t <= i.
/// - x, w, seqs, tail, dy, dx as there; dtail_out, dtail `[slots, taps - 1, channels]` f32; slots outside the table stay
/// - grid: `[ceil(channels / 64), count, 1]`
pub static CONV_TAIL_GRAD: Kernel = Kernel {
    name: "conv_tail_grad",
    args: &[
        read("x"),
        read("w"),
        read("seqs"),
        read("tail"),
        read("dy"),
        read("dtail_out"),
        update("dx"),
        write("dtail"),
    ],
    consts: ConvTailGradConsts::FIELDS,
    params: ConvGradParams::FIELDS,
};

fields! {
    /// Consts of [`GATE_GRAD`].
    GateGradConsts {
        /// Threads of a workgroup, one a head.
        lanes: u32,
    }
}

fields! {
    /// Params of [`GATE_GRAD`].
    GateGradParams {
        /// Tokens.
        tokens: u32,
        /// Value heads.
        hv: u32,
        /// Elements between rows of ab.
        stride: u32,
        /// Element where `a` of token 0 starts.
        a_off: u32,
        /// Element where `b` of token 0 starts.
        b_off: u32,
        /// Elements between rows of dab.
        d_stride: u32,
        /// Element where `da` of token 0 starts.
        da_off: u32,
        /// Element where `db` of token 0 starts.
        db_off: u32,
        /// Tokens of a cell.
        block: u32,
    }
}

/// Gradients of [`super::gdn::GATE`].
///
/// ```text
/// da = -exp(A_log) sigmoid(a + dt_bias) dg        dA_log = sum_t dg g
/// db = sigmoid(b) sigmoid(-b) dbeta               ddt_bias = sum_t da
/// ```
/// - ab `[T, stride]`, dab `[T, d_stride]` f32; a_log, dt_bias `[Hv]` f32; dg, dbeta `[T, Hv]` f32
/// - part `[cells, 2 Hv]` f32: dA_log and ddt_bias over the tokens of each cell
/// - grid: `[ceil(Hv / lanes), max(1, ceil(T / block)), 1]`
pub static GATE_GRAD: Kernel = Kernel {
    name: "gate_grad",
    args: &[read("ab"), read("a_log"), read("dt_bias"), read("dg"), read("dbeta"), write("dab"), write("part")],
    consts: GateGradConsts::FIELDS,
    params: GateGradParams::FIELDS,
};

fields! {
    /// Consts of [`GATED_NORM_GRAD`].
    GatedNormGradConsts {
        /// V.
        dv: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`GATED_NORM_GRAD`].
    GatedNormGradParams {
        /// Value heads.
        hv: u32,
        /// Tokens.
        tokens: u32,
        /// Elements between the rows of z.
        z_stride: u32,
        /// Element of z where token 0 starts.
        z_off: u32,
        /// Elements between the rows of dz.
        dz_stride: u32,
        /// Element of dz where token 0 starts.
        dz_off: u32,
        /// Tokens x heads of a cell.
        block: u32,
        /// Added to the mean square.
        eps: f32,
    }
}

/// Gradients of [`super::gdn::GATED_NORM`].
///
/// With `r = rsqrt(mean(o^2) + eps)` and `u = dy w silu(z)`, over the V numbers of each head:
/// ```text
/// do = r u - r^3 mean(o u) o        dz = dy w o r silu'(z)        dw = sum over tokens and heads of dy o r silu(z)
/// ```
/// - o, dy, d_o `[T, Hv, V]` f32; z `[T, z_stride]`, dz `[T, dz_stride]` f32; w `[V]` f32
/// - part `[cells, V]` f32: dw over the heads of each cell
/// - grid: `[max(1, ceil(T * Hv / block)), 1, 1]`
pub static GATED_NORM_GRAD: Kernel = Kernel {
    name: "gated_norm_grad",
    args: &[read("o"), read("z"), read("w"), read("dy"), write("d_o"), write("dz"), write("part")],
    consts: GatedNormGradConsts::FIELDS,
    params: GatedNormGradParams::FIELDS,
};

fields! {
    /// Consts of [`SUM_ROWS`].
    SumRowsConsts {
        /// Columns of a cell; divides lanes.
        columns: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`SUM_ROWS`].
    SumRowsParams {
        /// Rows.
        rows: u32,
        /// Columns.
        n: u32,
        /// Elements between the rows of x.
        x_stride: u32,
        /// Element of x where row 0 starts.
        x_off: u32,
    }
}

/// `y[c] = sum_r x[r, c]`, in an order that depends on the consts and the number of rows alone; 0 without rows.
/// - x `[rows, x_stride]` f32; y `[n]` f32
/// - grid: `[ceil(n / columns), 1, 1]`
pub static SUM_ROWS: Kernel = Kernel {
    name: "sum_rows",
    args: &[read("x"), write("y")],
    consts: SumRowsConsts::FIELDS,
    params: SumRowsParams::FIELDS,
};
