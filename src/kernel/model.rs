//! Rows of the rest of a Qwen3.5 layer: products with weights, norms, rotary attention, activation, sampling.
//!
//! Activations are f32; weights keep the type of the checkpoint. Small weights (norms, gates, convolution) are f32, with the
//! `1 +` of zero-centred norms already added.

use super::{Fields, Kernel, fields, read, update, write};

fields! {
    /// Consts of [`EMBED`].
    EmbedConsts {
        /// Type code of the table.
        w_type: u32,
    }
}

fields! {
    /// Params of [`EMBED`].
    EmbedParams {
        /// Numbers in a row.
        dim: u32,
        /// First id that this part of the table holds.
        row0: u32,
        /// Rows in this part; ids outside it leave x alone.
        rows: u32,
    }
}

/// `x[t] = table[ids[t]]`, for the ids that this part of the table holds.
/// - ids `[T]` u32; table `[rows, dim]`; x `[T, dim]` f32
/// - grid: `[T, 1, 1]`
pub static EMBED: Kernel = Kernel {
    name: "embed",
    args: &[read("ids"), read("table"), update("x")],
    consts: EmbedConsts::FIELDS,
    params: EmbedParams::FIELDS,
};

fields! {
    /// Consts of [`RMS_NORM`].
    RmsNormConsts {
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`RMS_NORM`].
    RmsNormParams {
        /// Numbers in a row.
        dim: u32,
        /// Row of x that belongs to row 0 of y.
        row0: u32,
        /// Added to the mean square.
        eps: f32,
    }
}

/// `y[r] = x[row0 + r] * rsqrt(mean(x^2) + eps) * w`.
/// - x `[*, dim]` f32, w `[dim]` f32, y `[rows, dim]` f32
/// - grid: `[rows, 1, 1]`
pub static RMS_NORM: Kernel = Kernel {
    name: "rms_norm",
    args: &[read("x"), read("w"), write("y")],
    consts: RmsNormConsts::FIELDS,
    params: RmsNormParams::FIELDS,
};

fields! {
    /// Consts of [`MATMUL`].
    MatmulConsts {
        /// Type code of w.
        w_type: u32,
        /// 1: adds to y instead of replacing it.
        add: u32,
        /// Rows of x that a cell covers.
        tile_m: u32,
        /// Rows of w that a cell covers.
        tile_n: u32,
        /// Depth of one staged slice; 0: nothing is staged, each thread reads its own rows of w.
        tile_k: u32,
        /// Rows of x that a thread covers; divides tile_m.
        reg_m: u32,
        /// Rows of w that a thread covers; divides tile_n.
        reg_n: u32,
        /// Threads of a workgroup: `tile_m / reg_m * tile_n / reg_n`.
        lanes: u32,
        /// 1: rows of x and w start at multiples of 16 bytes and k fills them, so that loads are 16 bytes wide.
        wide: u32,
    }
}

fields! {
    /// Params of [`MATMUL`].
    MatmulParams {
        /// Rows of x and y.
        m: u32,
        /// Rows of w: columns of y.
        n: u32,
        /// Numbers in a row of w.
        k: u32,
        /// Elements between the rows of x.
        x_stride: u32,
        /// Element of x where row 0 starts.
        x_off: u32,
        /// Elements between the rows of y.
        y_stride: u32,
        /// Element of y where row 0 starts.
        y_off: u32,
    }
}

/// `y[i, j] (+)= sum_k x[i, k] w[j, k]` for many rows of x.
/// - x `[m, x_stride]` f32; w `[n, k]`; y `[m, y_stride]` f32
/// - grid: `[ceil(n / tile_n), ceil(m / tile_m), 1]`
pub static MATMUL: Kernel = Kernel {
    name: "matmul",
    args: &[read("x"), read("w"), update("y")],
    consts: MatmulConsts::FIELDS,
    params: MatmulParams::FIELDS,
};

fields! {
    /// Consts of [`MATVEC`].
    MatvecConsts {
        /// Type code of w and up.
        w_type: u32,
        /// 1: adds to y instead of replacing it.
        add: u32,
        /// 1: x goes through its RMS norm first.
        norm: u32,
        /// 1: y gets `silu(x w^T) * (x up^T)`.
        glu: u32,
        /// Rows of w that a cell covers.
        rows: u32,
        /// Rows of x there is room for: 1, 2, 4 or 8; at least m.
        batch: u32,
        /// Threads of a workgroup.
        lanes: u32,
        /// 1: rows of x and w start at multiples of 16 bytes and k fills them, so that loads are 16 bytes wide.
        wide: u32,
    }
}

fields! {
    /// Params of [`MATVEC`].
    MatvecParams {
        /// Rows of x and y.
        m: u32,
        /// Rows of w: columns of y.
        n: u32,
        /// Numbers in a row of w.
        k: u32,
        /// Elements between the rows of x.
        x_stride: u32,
        /// Element of x where row 0 starts.
        x_off: u32,
        /// Elements between the rows of y.
        y_stride: u32,
        /// Element of y where row 0 starts.
        y_off: u32,
        /// Added to the mean square by the norm.
        eps: f32,
    }
}

/// The same for few rows of x (up to 8), bound by reading w once; with the norm before and the activation after it, so that
/// a decoded token takes few launches.
///
/// `n = x * rsqrt(mean(x^2) + eps) * norm` with NORM, else x; `y (+)= n w^T`, or `silu(n w^T) * (n up^T)` with GLU.
/// - x `[m, x_stride]` f32; norm `[k]` f32 (any memory without NORM); w, up `[n, k]` (any memory for up without GLU);
///   y `[m, y_stride]` f32
/// - grid: `[ceil(n / rows), 1, 1]`
pub static MATVEC: Kernel = Kernel {
    name: "matvec",
    args: &[read("x"), read("norm"), read("w"), read("up"), update("y")],
    consts: MatvecConsts::FIELDS,
    params: MatvecParams::FIELDS,
};

fields! {
    /// Consts of [`ATTN_PREPARE`].
    AttnPrepareConsts {
        /// D: size of a head.
        dim: u32,
        /// Rotated numbers of a head, a multiple of 2.
        rot: u32,
        /// Type code of the caches.
        kv_type: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`ATTN_PREPARE`].
    AttnPrepareParams {
        /// Query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// First position that this page of the caches holds; other positions are left alone.
        page_start: u32,
        /// Positions in the page.
        page_len: u32,
        /// eps of both norms.
        eps: f32,
    }
}

/// Query and key norms, rotary, and the write of k and v into one page of the caches.
///
/// - qkv `[T, 2 heads D + 2 kv D]` f32: per query head `[query D | gate D]`, then k heads, then v heads
/// - q_norm, k_norm `[D]` f32; rope `[T, rot]` f32: `rot / 2` cosines, then `rot / 2` sines; pos `[T]` u32
/// - q `[T, heads, D]` f32; k_cache, v_cache `[page_len, kv, D]`
/// - rotary pairs i with `i + rot / 2`: `(a, b) -> (a cos - b sin, b cos + a sin)`
/// - grid: `[heads + 2 kv, T, 1]`: query heads, key heads, value heads
pub static ATTN_PREPARE: Kernel = Kernel {
    name: "attn_prepare",
    args: &[
        read("qkv"),
        read("q_norm"),
        read("k_norm"),
        read("rope"),
        read("pos"),
        update("q"),
        update("k_cache"),
        update("v_cache"),
    ],
    consts: AttnPrepareConsts::FIELDS,
    params: AttnPrepareParams::FIELDS,
};

fields! {
    /// Consts of [`ATTEND`].
    AttendConsts {
        /// D: size of a head.
        dim: u32,
        /// Type code of the caches.
        kv_type: u32,
        /// Query rows that a cell covers.
        tile_q: u32,
        /// Keys of one staged slice.
        tile_k: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`ATTEND`].
    AttendParams {
        /// Query tokens.
        tokens: u32,
        /// Query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// First position that this page holds.
        page_start: u32,
        /// Positions in the page.
        page_len: u32,
        /// Keys per split: a cell takes keys `[page_start + z * span, page_start + (z + 1) * span)` of the page.
        span: u32,
        /// Slot of the partial results of split 0 of this page.
        slot0: u32,
        /// Slots of partial results in all.
        slots: u32,
        /// Factor of the scores.
        scale: f32,
    }
}

/// Causal softmax attention over one page of the caches, as partial results.
///
/// Token t sees the positions `0 ..= pos[t]`. A split writes, per token and head, the maximum m of its scores, the sum l of
/// `exp(score - m)` and the sum acc `[D]` of `exp(score - m) v`; a split that a token cannot see writes m = -3e38, l = 0,
/// acc = 0.
///
/// The `group = heads / kv` query heads of a key head share its cells, so that keys and values are read once for all of
/// them: query row `r` of key head `c` is head `c * group + r % group` of token `r / group`.
/// - q `[T, heads, D]` f32; k_cache, v_cache `[page_len, kv, D]`; pos `[T]` u32
/// - part `[T, heads, slots, D + 2]` f32: m, l, acc
/// - grid: `[ceil(T * group / tile_q), kv, splits]`; splits past the last key in use may be left out
pub static ATTEND: Kernel = Kernel {
    name: "attend",
    args: &[read("q"), read("k_cache"), read("v_cache"), read("pos"), update("part")],
    consts: AttendConsts::FIELDS,
    params: AttendParams::FIELDS,
};

fields! {
    /// Consts of [`ATTEND_MERGE`].
    AttendMergeConsts {
        /// D: size of a head.
        dim: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`ATTEND_MERGE`].
    AttendMergeParams {
        /// Query heads.
        heads: u32,
        /// Slots of partial results.
        slots: u32,
        /// Elements between the rows of qkv.
        qkv_stride: u32,
    }
}

/// Merges the partial results and applies the output gate: `y = (sum over slots) * sigmoid(gate)`.
/// - part as [`ATTEND`] wrote it; qkv as [`ATTN_PREPARE`] read it (the gate of head h is at `(2 h + 1) D`)
/// - y `[T, heads D]` f32
/// - grid: `[heads, T, 1]`
pub static ATTEND_MERGE: Kernel = Kernel {
    name: "attend_merge",
    args: &[read("part"), read("qkv"), write("y")],
    consts: AttendMergeConsts::FIELDS,
    params: AttendMergeParams::FIELDS,
};

fields! {
    /// Consts of [`SWIGLU`].
    SwigluConsts {
        /// Numbers that one cell covers.
        block: u32,
    }
}

fields! {
    /// Params of [`SWIGLU`].
    SwigluParams {
        /// Rows.
        rows: u32,
        /// Numbers in a row of y.
        dim: u32,
    }
}

/// `y = silu(gate) * up`.
/// - gate_up `[rows, 2 dim]` f32: gate, then up; y `[rows, dim]` f32
/// - grid: `[ceil(rows * dim / block), 1, 1]`
pub static SWIGLU: Kernel = Kernel {
    name: "swiglu",
    args: &[read("gate_up"), write("y")],
    consts: SwigluConsts::FIELDS,
    params: SwigluParams::FIELDS,
};

fields! {
    /// Consts of [`ARGMAX`].
    ArgmaxConsts {
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`ARGMAX`].
    ArgmaxParams {
        /// Numbers in a row.
        n: u32,
    }
}

/// The index of the largest number of each row; the smallest index among equals; NaN never wins. A row of
/// NaN alone gives 2^32 - 1.
/// - x `[rows, n]` f32; ids `[rows]` u32
/// - grid: `[rows, 1, 1]`
pub static ARGMAX: Kernel = Kernel {
    name: "argmax",
    args: &[read("x"), write("ids")],
    consts: ArgmaxConsts::FIELDS,
    params: ArgmaxParams::FIELDS,
};

fields! {
    /// Consts of [`COPY`] and [`FILL`].
    WordsConsts {
        /// Words that one cell covers.
        block: u32,
    }
}

fields! {
    /// Params of [`COPY`] and [`FILL`].
    WordsParams {
        /// Words to write.
        n: u32,
        /// First word of the source.
        src_off: u32,
        /// First word of the target.
        dst_off: u32,
        /// The word that [`FILL`] writes.
        word: u32,
    }
}

/// `dst[dst_off + i] = src[src_off + i]`, words of 32 bits, between two different buffers.
/// - grid: `[ceil(n / block), 1, 1]`
pub static COPY: Kernel = Kernel {
    name: "copy",
    args: &[read("src"), update("dst")],
    consts: WordsConsts::FIELDS,
    params: WordsParams::FIELDS,
};

/// `dst[dst_off + i] = word`.
/// - grid: `[ceil(n / block), 1, 1]`
pub static FILL: Kernel =
    Kernel { name: "fill", args: &[update("dst")], consts: WordsConsts::FIELDS, params: WordsParams::FIELDS };
