//! Rows of the operator's backward pass.
//!
//! With S the state before a chunk and S' the one after it, the forward pass of a chunk is (symbols as in [`super::gdn`],
//! `K^ = rk K`, `Q^ = rq Q`)
//! ```text
//! W = V - gamma o (K^ S)     N = B (beta o W)     O = s gamma o (Q^ S) + P N     S' = gamma_C S + K^^T (gamma_C/gamma o N)
//! ```
//! and its adjoint, given dO and dS' (the triangular inverse is never differentiated by itself: with `X = B^T dN`,
//! `dL = -B^T dB B^T = -X N^T` because `B diag(beta) W = N`)
//! ```text
//! dN = gamma_C/gamma o (K^ dS') + P^T dO      X = B^T dN      dV = beta o X
//! dS = gamma_C dS' - K^^T (gamma o dV) + Q^^T (s gamma o dO)
//! dP = lower(dO N^T)                          dL = -strictlower(X N^T)
//! dQ^ = s gamma o (dO S^T) + (s G o dP) K^
//! dK^ = gamma_C/gamma o (N dS'^T) - gamma o (dV S^T) + (s G o dP)^T Q^ + (D + D^T) K^      D = diag(beta) G o dL
//! dbeta_i = X_i . W_i + sum_j dL_ij R_ij
//! dc_i = Q^_i . [s gamma o (dO S^T)]_i - K^_i . [gamma_C/gamma o (N dS'^T)]_i - dV_i . (V - W)_i
//!        + sum_j E_ij - sum_j E_ji,        E = dP o P + dL o L
//! dc_C += sum_i K^_i . [gamma_C/gamma o (N dS'^T)]_i + gamma_C <dS', S>          dg_t = sum_(i >= t) dc_i in the chunk
//! ```
//! which is reverse-mode differentiation of Yang et al.'s chunked form, checked in `tests/grad.rs` against the recurrence.
//! The two sums over E are taken from the same f32 numbers: where a gate forgets fast they cancel.
//!
//! A piece of chunks runs `gdn_prepare` and `gdn_scan` (with grad and save), then the rows below in order, over f32 numbers
//! per (chunk, value head):
//! - ws, `5 C C + 9 C`: A, P `[C, C]`, u, o, n `[C]`, gamma_C in a `[C]`, B, G, R `[C, C]`, rk, rq, beta, dc, dbeta `[C]`
//! - saved by the forward scan, `K V + 2 C V`: S `[K, V]`, U, N `[C, V]`
//! - dsaved by the backward scan, `K V + 2 C V`: dS' `[K, V]`, X, Z `[C, V]` with `Z = o o dO`
//!
//! Rows and columns past a short chunk's end are 0 in all of them.

use super::{Fields, Kernel, fields, read, update, write};

fields! {
    /// Consts of [`GRAD_SCAN`].
    GradScanConsts {
        /// C: tokens per chunk.
        chunk: u32,
        /// K.
        dk: u32,
        /// Columns of the state's gradient that one cell carries; divides V.
        dv_tile: u32,
        /// Type code of q and k.
        qk_type: u32,
        /// Type code of do.
        v_type: u32,
        /// 0: all heads walk the segments. 1 and 2: each head its own, see [`super::gdn_cut`].
        walk: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`GRAD_SCAN`].
    GradScanParams {
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
        /// Elements between the rows of do.
        do_stride: u32,
        /// Element of do where token 0 of the window starts.
        do_off: u32,
    }
}

/// Carries the gradient of the state over the chunks of one segment, last to first.
///
/// ```text
/// dN = n o (K dS') + P^T dO     X = B^T dN     dS = gamma_C dS' - K^T (u o beta o X) + Q^T (o o dO)
/// ```
/// - q, k, d_o `[window, *]`; ws, chunks, segments as `gdn_scan` read them
/// - dstate `[slots, Hv, K, V]` f32, the gradient of the state after the segment, replaced by that of the state before it
/// - dsaved is written
/// - walk = 1 or 2: segments `[segments, Hv]`, walks of each head as [`super::gdn_cut`] says; with 2 dsaved is left alone
/// - grid: `[segments, Hv, V / dv_tile]`
pub static GRAD_SCAN: Kernel = Kernel {
    name: "gdn_grad_scan",
    args: &[
        read("q"),
        read("k"),
        read("d_o"),
        read("ws"),
        read("chunks"),
        read("segments"),
        update("dstate"),
        write("dsaved"),
    ],
    consts: GradScanConsts::FIELDS,
    params: GradScanParams::FIELDS,
};

fields! {
    /// Consts of [`GRAD_CHUNK`].
    GradChunkConsts {
        /// C: tokens per chunk.
        chunk: u32,
        /// K.
        dk: u32,
        /// V.
        dv: u32,
        /// Type code of v, do and dv.
        v_type: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`GRAD_CHUNK`].
    GradChunkParams {
        /// Value heads.
        hv: u32,
        /// Elements between the rows of v.
        v_stride: u32,
        /// Element of v where token 0 of the window starts.
        v_off: u32,
        /// Elements between the rows of do.
        do_stride: u32,
        /// Element of do where token 0 of the window starts.
        do_off: u32,
        /// Elements between the rows of dv.
        dv_stride: u32,
        /// Element of dv where token 0 of the window starts.
        dv_off: u32,
        /// s: factor of q.
        scale: f32,
    }
}

/// The gradients inside a chunk that are no bigger than it, for one value head.
///
/// ```text
/// dP = lower(dO N^T)     dL = -strictlower(X N^T)     E = dP o P + diag(beta) R o dL
/// dv = beta o X          dbeta_i = X_i . (V - U)_i + sum_j dL_ij R_ij
/// dc_i = -dv_i . U_i + sum_j E_ij - sum_j E_ji
/// ```
/// - v, d_o, dv `[window, *]`; U, N, X of saved and dsaved; chunks as before
/// - ws: dc and dbeta are written; P becomes `s rq_i rk_j G_ij dP_ij` and R becomes `D + D^T`,
///   `D_ij = beta_i rk_i rk_j G_ij dL_ij`: the factors of Q and K in the next row
/// - grid: `[chunks, Hv, 1]`
pub static GRAD_CHUNK: Kernel = Kernel {
    name: "gdn_grad_chunk",
    args: &[read("v"), read("d_o"), update("ws"), read("saved"), read("dsaved"), read("chunks"), write("dv")],
    consts: GradChunkConsts::FIELDS,
    params: GradChunkParams::FIELDS,
};

fields! {
    /// Consts of [`GRAD_QK`].
    GradQkConsts {
        /// C: tokens per chunk.
        chunk: u32,
        /// K.
        dk: u32,
        /// V.
        dv: u32,
        /// Value heads per key head.
        group: u32,
        /// Type code of q, k, dq and dk.
        qk_type: u32,
        /// 1: the gradients are those of q and k before their L2 norm.
        l2norm: u32,
        /// Threads of a workgroup.
        lanes: u32,
    }
}

fields! {
    /// Params of [`GRAD_QK`].
    GradQkParams {
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
        /// Elements between the rows of dq.
        dq_stride: u32,
        /// Element of dq where token 0 of the window starts.
        dq_off: u32,
        /// Elements between the rows of dk.
        dk_stride: u32,
        /// Element of dk where token 0 of the window starts.
        dk_off: u32,
    }
}

/// The gradients of q and k of one chunk and key head, summed over its value heads in the order of their index.
///
/// With P and R as [`GRAD_CHUNK`] left them:
/// ```text
/// b = Z S^T + P K
/// a = n o (N dS'^T) - u o ((beta o X) S^T) + P^T Q + R K
/// dq = b - rq^2 q (q . b)     dk = a - rk^2 k (k . a)     (with l2norm; else dq = b, dk = a)
/// dc_i += q_i . [Z S^T]_i - k_i . [n o (N dS'^T)]_i
/// dc_C += sum_i k_i . [n o (N dS'^T)]_i + gamma_C <dS', S>
/// ```
/// - q, k, dq, dk `[window, *]`; S, N of saved, all of dsaved; chunks as before
/// - ws: dc is completed
/// - grid: `[chunks, Hk, 1]`
pub static GRAD_QK: Kernel = Kernel {
    name: "gdn_grad_qk",
    args: &[
        read("q"),
        read("k"),
        update("ws"),
        read("saved"),
        read("dsaved"),
        read("chunks"),
        write("dq"),
        write("dk"),
    ],
    consts: GradQkConsts::FIELDS,
    params: GradQkParams::FIELDS,
};

fields! {
    /// Consts of [`GRAD_GATES`].
    GradGatesConsts {
        /// C: tokens per chunk.
        chunk: u32,
    }
}

fields! {
    /// Params of [`GRAD_GATES`].
    GradGatesParams {
        /// Value heads.
        hv: u32,
        /// Element of dg and dbeta where token 0 of the window starts; their row is hv.
        g_off: u32,
    }
}

/// `dg_t = sum of dc_i over i >= t in the chunk`, summed from its end; `dbeta` as [`GRAD_CHUNK`] left it.
/// - ws, chunks as before; dg, dbeta `[window, Hv]` f32
/// - grid: `[chunks, ceil(Hv / 64), 1]`
pub static GRAD_GATES: Kernel = Kernel {
    name: "gdn_grad_gates",
    args: &[read("ws"), read("chunks"), write("dg"), write("dbeta")],
    consts: GradGatesConsts::FIELDS,
    params: GradGatesParams::FIELDS,
};
