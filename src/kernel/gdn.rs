//! Rows of the Gated DeltaNet operator and the pieces around it.
//!
//! Strided arguments: element `(t, h, i)` of q is `q[q_off + t * q_stride + h * K + i]`, in numbers of the stored type.
//! Offsets and strides of 16-bit numbers are even: kernels read and write them in pairs.
//! Tables are rows of four u32.

use super::{Fields, Kernel, fields, read, update, write};

fields! {
    /// Consts of [`CONV`].
    ConvConsts {
        /// Taps, 2 to 8.
        taps: u32,
        /// 1: SiLU on the result.
        silu: u32,
        /// 1: the cell covers its whole sequence and writes the new tail; else [`CONV_TAIL`] does.
        store_tail: u32,
    }
}

fields! {
    /// Params of [`CONV`] and [`CONV_TAIL`].
    ConvParams {
        /// Channels.
        channels: u32,
        /// Elements between the rows of x.
        x_stride: u32,
        /// Element of x where row 0 starts.
        x_off: u32,
        /// Elements between the rows of y.
        y_stride: u32,
        /// Element of y where row 0 starts.
        y_off: u32,
        /// Tokens per cell along z.
        block: u32,
    }
}

/// Causal depthwise convolution over time with a carried tail.
///
/// `y[t, c] = silu(sum_j w[c, j] * x[t - (taps - 1) + j, c])`, rows before the sequence from `tail[slot]`.
/// - x `[T, x_stride]` f32, w `[channels, taps]` f32, seqs `[N]` of (first token, tokens, slot, 0)
/// - tail `[slots, taps - 1, channels]` f32, oldest first: the raw inputs before the sequence
/// - y `[T, y_stride]` f32
/// - grid: `[ceil(channels / 64), N, ceil(longest / block)]`
pub static CONV: Kernel = Kernel {
    name: "conv",
    args: &[read("x"), read("w"), read("seqs"), update("tail"), write("y")],
    consts: ConvConsts::FIELDS,
    params: ConvParams::FIELDS,
};

fields! {
    /// Consts of [`CONV_TAIL`].
    ConvTailConsts {
        /// Taps, 2 to 8.
        taps: u32,
    }
}

/// `tail[slot] <-` the last `taps - 1` raw rows of (old tail, x). Runs after [`CONV`] where a sequence spans cells.
/// - grid: `[ceil(channels / 64), N, 1]`
pub static CONV_TAIL: Kernel = Kernel {
    name: "conv_tail",
    args: &[read("x"), read("seqs"), update("tail")],
    consts: ConvTailConsts::FIELDS,
    params: ConvParams::FIELDS,
};

fields! {
    /// Consts of [`GATE`].
    GateConsts {
        /// Tokens x heads that one cell covers.
        block: u32,
    }
}

fields! {
    /// Params of [`GATE`].
    GateParams {
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
    }
}

/// `g = -exp(A_log) softplus(a + dt_bias)`, `beta = sigmoid(b)`; softplus is the identity above 20.
/// - ab `[T, stride]` f32 holding a and b; a_log, dt_bias `[Hv]` f32; g, beta `[T, Hv]` f32
/// - grid: `[ceil(T * Hv / block), 1, 1]`
pub static GATE: Kernel = Kernel {
    name: "gate",
    args: &[read("ab"), read("a_log"), read("dt_bias"), write("g"), write("beta")],
    consts: GateConsts::FIELDS,
    params: GateParams::FIELDS,
};

fields! {
    /// Consts of [`PREPARE`].
    PrepareConsts {
        /// C: tokens per chunk.
        chunk: u32,
        /// K: size of a q/k head.
        dk: u32,
        /// Value heads per key head.
        group: u32,
        /// Type code of q and k.
        qk_type: u32,
        /// 1: q and k are divided by `sqrt(sum of squares + 1e-6)`.
        l2norm: u32,
        /// 1: what the backward pass needs is stored as well.
        grad: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`PREPARE`].
    PrepareParams {
        /// q/k heads.
        hk: u32,
        /// Value heads.
        hv: u32,
        /// 0: `h div group`, 1: `h mod hk`.
        head_map: u32,
        /// Elements between the rows of q.
        q_stride: u32,
        /// Element of q where token 0 of the window starts.
        q_off: u32,
        /// Elements between the rows of k.
        k_stride: u32,
        /// Element of k where token 0 of the window starts.
        k_off: u32,
        /// Element of g and beta where token 0 of the window starts; their row is hv.
        g_off: u32,
        /// s: factor of q.
        scale: f32,
    }
}

/// Everything in a chunk that does not need the state, for one key head and all its value heads.
///
/// With `c` the cumulated gates of the chunk, `gamma = exp(c)`, `G_ij = exp(c_i - c_j) [i >= j]`, `rq`, `rk` the inverse
/// norms (1 without l2norm):
/// ```text
/// A  = (I + strictlower(diag(beta) G o (rk K)(rk K)^T))^-1 diag(beta)      (G inside or outside: the same matrix)
/// P  = s (rq Q)(rk K)^T o G
/// u  = gamma rk      o  = s gamma rq      n  = (gamma_C / gamma) rk
/// ```
/// - q, k `[window, *]`; g, beta `[window, Hv]` f32; chunks `[chunks]` of (first token in the window, tokens, sequence, 0)
/// - ws per (chunk, value head), `2 C C + 4 C` f32: A `[C, C]`, P `[C, C]`, u `[C]`, o `[C]`, n `[C]`, then `[C]` whose
///   first number is gamma_C and whose second is 1 if no token of the chunk can make a state longer, `0 <= beta |rk k|^2 <= 2`,
///   else 0. Rows and columns past a short chunk's end are 0, so the scan needs no masks.
/// - with grad, ws per (chunk, value head) goes on to `5 C C + 9 C` f32: `B = (I + L)^-1` `[C, C]`, so that
///   `A = B diag(beta)`; G `[C, C]`; `R = strictlower(G o (rk K)(rk K)^T)` `[C, C]`, so that `L = diag(beta) R`; rk, rq,
///   beta `[C]`; and two `[C]` that [`super::gdn_grad`] fills
/// - cumulated gates keep whole and fractional part apart (`c = whole + frac`), so that differences after a cliff stay
///   exact to f32 rounding; g below -1e4 counts as -1e4
/// - grid: `[chunks, Hk, 1]`
pub static PREPARE: Kernel = Kernel {
    name: "gdn_prepare",
    args: &[read("q"), read("k"), read("g"), read("beta"), read("chunks"), write("ws")],
    consts: PrepareConsts::FIELDS,
    params: PrepareParams::FIELDS,
};

fields! {
    /// Consts of [`SCAN`].
    ScanConsts {
        /// C: tokens per chunk.
        chunk: u32,
        /// K.
        dk: u32,
        /// Columns of the state that one cell carries; divides V.
        dv_tile: u32,
        /// Type code of q and k.
        qk_type: u32,
        /// Type code of v and o.
        v_type: u32,
        /// 0: o is computed. 1: what the backward pass needs is stored in its place. 2: neither, only the state moves on.
        save: u32,
        /// 0: all heads walk the segments. 1 to 3: each head its own, see [`super::gdn_cut`].
        walk: u32,
        /// 1: ws is the longer one of the backward pass.
        grad: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`SCAN`].
    ScanParams {
        /// q/k heads.
        hk: u32,
        /// Value heads.
        hv: u32,
        /// 0: `h div group`, 1: `h mod hk`.
        head_map: u32,
        /// V.
        dv: u32,
        /// Elements between the rows of q.
        q_stride: u32,
        /// Element of q where token 0 of the window starts.
        q_off: u32,
        /// Elements between the rows of k.
        k_stride: u32,
        /// Element of k where token 0 of the window starts.
        k_off: u32,
        /// Elements between the rows of v.
        v_stride: u32,
        /// Element of v where token 0 of the window starts.
        v_off: u32,
        /// Elements between the rows of o.
        o_stride: u32,
        /// Element of o where token 0 of the window starts.
        o_off: u32,
    }
}

/// Carries the state over the chunks of one segment.
///
/// ```text
/// W = V - u o (K S)        N = A W
/// O = o o (Q S) + P N      S <- gamma_C S + K^T (n o N)
/// ```
/// - q, k, v, o `[window, *]`; ws, chunks as [`PREPARE`] wrote and read them
/// - segments `[segments]` of (first chunk, chunks, state slot, _); state `[slots, Hv, K, V]` f32, updated in place
/// - walk = 1 to 3: segments `[segments, Hv]`, walks of each head as [`super::gdn_cut`] says; with 2 and 3 save is 2, and with
///   3 v is not read and V is K
/// - save = 1: grad is 1; q is not read; o is f32, per (chunk of the launch, value head) `K V + 2 C V` numbers:
///   S before the chunk `[K, V]`, `U = u o (K S)` and N `[C, V]`, rows past a short chunk's end as 0
/// - save = 2: neither q nor o is touched
/// - grid: `[segments, Hv, V / dv_tile]`
pub static SCAN: Kernel = Kernel {
    name: "gdn_scan",
    args: &[read("q"), read("k"), read("v"), read("ws"), read("chunks"), read("segments"), update("state"), write("o")],
    consts: ScanConsts::FIELDS,
    params: ScanParams::FIELDS,
};

fields! {
    /// Consts of [`STEP`].
    StepConsts {
        /// K.
        dk: u32,
        /// Columns of the state that one cell carries; divides V.
        dv_tile: u32,
        /// Type code of q and k.
        qk_type: u32,
        /// Type code of v and o.
        v_type: u32,
        /// 1: q and k are divided by `sqrt(sum of squares + 1e-6)`.
        l2norm: u32,
        /// 1: the state after the tokens is stored; 0: only o is written (verify without commitment).
        store: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`STEP`].
    StepParams {
        /// q/k heads.
        hk: u32,
        /// Value heads.
        hv: u32,
        /// 0: `h div group`, 1: `h mod hk`.
        head_map: u32,
        /// V.
        dv: u32,
        /// Elements between the rows of q.
        q_stride: u32,
        /// Element of q where token 0 starts.
        q_off: u32,
        /// Elements between the rows of k.
        k_stride: u32,
        /// Element of k where token 0 starts.
        k_off: u32,
        /// Elements between the rows of v.
        v_stride: u32,
        /// Element of v where token 0 starts.
        v_off: u32,
        /// Elements between the rows of o.
        o_stride: u32,
        /// Element of o where token 0 starts.
        o_off: u32,
        /// Element of g and beta where token 0 starts; their row is hv.
        g_off: u32,
        /// s: factor of q.
        scale: f32,
    }
}

/// The recurrence, token by token, for a few tokens of each sequence: decode and verify.
///
/// ```text
/// S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
/// ```
/// - q, k, v, o `[T, *]`; g, beta `[T, Hv]` f32; seqs `[N]` of (first token, tokens, state slot, 0)
/// - state `[slots, Hv, K, V]` f32
/// - grid: `[N, Hv, V / dv_tile]`
pub static STEP: Kernel = Kernel {
    name: "gdn_step",
    args: &[read("q"), read("k"), read("v"), read("g"), read("beta"), read("seqs"), update("state"), write("o")],
    consts: StepConsts::FIELDS,
    params: StepParams::FIELDS,
};

fields! {
    /// Consts of [`GATED_NORM`].
    GatedNormConsts {
        /// V.
        dv: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`GATED_NORM`].
    GatedNormParams {
        /// Value heads.
        hv: u32,
        /// Tokens.
        tokens: u32,
        /// Elements between the rows of z.
        z_stride: u32,
        /// Element of z where token 0 starts.
        z_off: u32,
        /// Added to the mean square.
        eps: f32,
    }
}

/// `y = o * rsqrt(mean(o^2) + eps) * w * silu(z)` over the V numbers of each head.
/// - o, y `[T, Hv, V]` f32; z `[T, z_stride]` f32; w `[V]` f32
/// - grid: `[Hv, T, 1]`
pub static GATED_NORM: Kernel = Kernel {
    name: "gated_norm",
    args: &[read("o"), read("z"), read("w"), write("y")],
    consts: GatedNormConsts::FIELDS,
    params: GatedNormParams::FIELDS,
};

fields! {
    /// Consts of [`MIX_STEP`].
    MixStepConsts {
        /// K.
        dk: u32,
        /// V.
        dv: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`MIX_STEP`].
    MixStepParams {
        /// q/k heads.
        hk: u32,
        /// Value heads.
        hv: u32,
        /// 0: `h div group`, 1: `h mod hk`.
        head_map: u32,
        /// Elements between the rows of qkv (after convolution: `[q: Hk K][k: Hk K][v: Hv V]`).
        qkv_stride: u32,
        /// Elements between the rows of proj.
        p_stride: u32,
        /// Element of proj where z of token 0 starts.
        z_off: u32,
        /// Element of proj where a of token 0 starts.
        a_off: u32,
        /// Element of proj where b of token 0 starts.
        b_off: u32,
        /// s: factor of q.
        scale: f32,
        /// eps of the gated norm.
        eps: f32,
    }
}

/// One decoded token of a Gated DeltaNet mixer after its convolution, fused: L2 norm, gates, recurrence, gated norm.
/// - qkv `[N, qkv_stride]` f32, proj `[N, p_stride]` f32 (z, a, b), small `[2 Hv + V]` f32: A_log, dt_bias, norm weight
/// - seqs `[N]` of (first token, tokens, state slot, 0), one token or more, in order
/// - state `[slots, Hv, K, V]` f32; y `[T, Hv V]` f32
/// - grid: `[N, Hv, 1]`
pub static MIX_STEP: Kernel = Kernel {
    name: "gdn_mix_step",
    args: &[read("qkv"), read("proj"), read("small"), read("seqs"), update("state"), write("y")],
    consts: MixStepConsts::FIELDS,
    params: MixStepParams::FIELDS,
};
