// What a chunk needs before the state is known: A, P, u, o, n and gamma_C for one key head and all its value heads.
//
// 64 threads form an 8 x 8 grid; thread (ti, tj) holds the EDGE x EDGE block of K K^T and Q K^T at row ti * EDGE, column
// tj * EDGE in registers. The gates are applied per value head, then each column of the inverse is solved by one thread.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read> g: array<f32>; // [window, Hv]
@group(0) @binding(4) var<storage, read> beta: array<f32>; // [window, Hv]
@group(0) @binding(5) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(6) var<storage, read_write> ws: array<f32>; // [chunks, Hv, WS]

const C = CHUNK;
const EDGE = C / 8u;
// Depth of a staged slice of q and k, in vec4.
const DEPTH = 4u;
// With GRAD, A, P, u, o, n, gamma_C are followed by B, G, R [C, C], rk, rq, beta [C], and two [C] for later rows.
const WS = select(2u * C * C + 4u * C, 5u * C * C + 9u * C, GRAD == 1u);
const MORE = 2u * C * C + 4u * C;
// The largest beta |rk k|^2 of a token that counts as one that makes no state longer: 2, and a little for rounding.
const LONGEST_STEP = 2.00001;

const_assert LANES == 64u;
const_assert C == 16u || C == 32u;
const_assert DK % 16u == 0u;

var<workgroup> tile_q: array<vec4<f32>, C * DEPTH>; // [C, DEPTH]
var<workgroup> tile_k: array<vec4<f32>, C * DEPTH>; // [C, DEPTH]
var<workgroup> lower: array<f32, C * C>; // L [C, C]
var<workgroup> inverse: array<f32, C * C>; // (I + L)^-1 [C, C]
var<workgroup> norm_q: array<f32, C>;
var<workgroup> norm_k: array<f32, C>;
var<workgroup> square_k: array<f32, C>; // |rk k|^2
// Cumulated gates c = whole + frac, whole an integer and |frac| <= 1/2: differences of large c keep their digits.
var<workgroup> whole: array<f32, C>;
var<workgroup> frac: array<f32, C>;

fn q4(i: u32) -> vec4<f32> {
    if QK_TYPE == F32 {
        return bitcast<vec4<f32>>(vec4(q[i], q[i + 1u], q[i + 2u], q[i + 3u]));
    }
    let at = i >> 1u;
    return vec4(unpack_pair(QK_TYPE, q[at]), unpack_pair(QK_TYPE, q[at + 1u]));
}

fn k4(i: u32) -> vec4<f32> {
    if QK_TYPE == F32 {
        return bitcast<vec4<f32>>(vec4(k[i], k[i + 1u], k[i + 2u], k[i + 3u]));
    }
    let at = i >> 1u;
    return vec4(unpack_pair(QK_TYPE, k[at]), unpack_pair(QK_TYPE, k[at + 1u]));
}

/// exp(c_i - c_j) for i >= j.
fn decay(i: u32, j: u32) -> f32 {
    return exp((whole[i] - whole[j]) + (frac[i] - frac[j]));
}

@compute @workgroup_size(LANES)
fn gdn_prepare(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let ti = lane / 8u;
    let tj = lane % 8u;
    let chunk = chunks[cell.x];
    let head_k = cell.y;
    let len = min(chunk.y, C);
    let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK;
    let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK;

    // kk = K K^T, qk = Q K^T [EDGE, EDGE]: columns as the components of rows would need EDGE = 4.
    var kk: array<f32, EDGE * EDGE>;
    var qk: array<f32, EDGE * EDGE>;
    for (var e = 0u; e < EDGE * EDGE; e++) {
        kk[e] = 0.0;
        qk[e] = 0.0;
    }
    var sum_q = 0.0;
    var sum_k = 0.0;
    for (var depth = 0u; depth < DK; depth += 4u * DEPTH) {
        workgroupBarrier();
        for (var e = lane; e < C * DEPTH; e += LANES) {
            let row = e / DEPTH;
            let col = depth + 4u * (e % DEPTH);
            var vq = vec4<f32>();
            var vk = vec4<f32>();
            if row < len {
                vq = q4(q0 + row * params.q_stride + col);
                vk = k4(k0 + row * params.k_stride + col);
            }
            tile_q[e] = vq;
            tile_k[e] = vk;
        }
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            for (var b = 0u; b < EDGE; b++) {
                let right = tile_k[(tj * EDGE + b) * DEPTH + d];
                for (var a = 0u; a < EDGE; a++) {
                    kk[a * EDGE + b] += dot(tile_k[(ti * EDGE + a) * DEPTH + d], right);
                    qk[a * EDGE + b] += dot(tile_q[(ti * EDGE + a) * DEPTH + d], right);
                }
            }
        }
        if L2NORM == 1u && lane < C {
            for (var d = 0u; d < DEPTH; d++) {
                let vq = tile_q[lane * DEPTH + d];
                let vk = tile_k[lane * DEPTH + d];
                sum_q += dot(vq, vq);
                sum_k += dot(vk, vk);
            }
        }
    }
    if lane < C {
        norm_q[lane] = 1.0;
        norm_k[lane] = 1.0;
        if L2NORM == 1u {
            norm_q[lane] = 1.0 / sqrt(sum_q + 1e-6);
            norm_k[lane] = 1.0 / sqrt(sum_k + 1e-6);
        }
    }

    workgroupBarrier();
    if ti == tj {
        for (var a = 0u; a < EDGE; a++) {
            let i = ti * EDGE + a;
            square_k[i] = norm_k[i] * norm_k[i] * kk[a * EDGE + a];
        }
    }

    for (var member = 0u; member < GROUP; member++) {
        let head = select(head_k + member * params.hk, head_k * GROUP + member, params.head_map == 0u);
        let g0 = params.g_off + chunk.x * params.hv + head;
        let ws0 = (cell.x * params.hv + head) * WS;
        workgroupBarrier();
        if lane < C {
            // Every thread adds in the same order, so that the sums of two tokens share their roundings.
            var w = 0.0;
            var f = 0.0;
            for (var j = 0u; j <= min(lane, len - 1u); j++) {
                let gate = max(g[g0 + j * params.hv], -1e4);
                let gate_whole = round(gate);
                f += gate - gate_whole;
                let carry = round(f);
                w += gate_whole + carry;
                f -= carry;
            }
            whole[lane] = w;
            frac[lane] = f;
        }
        workgroupBarrier();
        // L = strictlower(diag(beta) G o K K^T)      P = s Q K^T o G
        for (var a = 0u; a < EDGE; a++) {
            let i = ti * EDGE + a;
            let beta_i = beta[g0 + min(i, len - 1u) * params.hv];
            for (var b = 0u; b < EDGE; b++) {
                let j = tj * EDGE + b;
                var l = 0.0;
                var p = 0.0;
                var gate = 0.0;
                var r = 0.0;
                if j <= i && i < len {
                    gate = decay(i, j);
                    let d = gate * norm_k[j];
                    p = params.scale * d * norm_q[i] * qk[a * EDGE + b];
                    if j < i {
                        l = beta_i * d * norm_k[i] * kk[a * EDGE + b];
                        r = d * norm_k[i] * kk[a * EDGE + b];
                    }
                }
                lower[i * C + j] = l;
                ws[ws0 + C * C + i * C + j] = p;
                if GRAD == 1u {
                    ws[ws0 + MORE + C * C + i * C + j] = gate;
                    ws[ws0 + MORE + 2u * C * C + i * C + j] = r;
                }
            }
        }
        workgroupBarrier();
        if lane < C {
            // X = (I + L)^-1 by rows: x_i = e_i - sum_{m < i} L_im x_m. A thread reads only the column it wrote.
            let j = lane;
            let valid = j < len;
            let beta_j = select(0.0, beta[g0 + min(j, len - 1u) * params.hv], valid);
            for (var i = 0u; i < C; i++) {
                var x = select(0.0, 1.0, i == j);
                for (var m = 0u; m < i; m++) {
                    x -= lower[i * C + m] * inverse[m * C + j];
                }
                inverse[i * C + j] = x;
                ws[ws0 + i * C + j] = select(0.0, x * beta_j, valid && i < len);
                if GRAD == 1u {
                    ws[ws0 + MORE + i * C + j] = select(0.0, x, valid && i < len);
                }
            }
            let gamma = select(0.0, exp(whole[j] + frac[j]), valid);
            let last = len - 1u;
            let rest = select(0.0, decay(last, min(j, last)), valid);
            let v0 = ws0 + 2u * C * C;
            ws[v0 + j] = gamma * norm_k[j];
            ws[v0 + C + j] = params.scale * gamma * norm_q[j];
            ws[v0 + 2u * C + j] = rest * norm_k[j];
            if j != 1u {
                ws[v0 + 3u * C + j] = exp(whole[last] + frac[last]);
            } else {
                // No token makes a state longer. NaN fails.
                var contracts = 1.0;
                for (var i = 0u; i < len; i++) {
                    let step = beta[g0 + i * params.hv] * square_k[i];
                    contracts = select(0.0, contracts, step >= 0.0 && step <= LONGEST_STEP);
                }
                ws[v0 + 3u * C + 1u] = contracts;
            }
            if GRAD == 1u {
                let r0 = ws0 + MORE + 3u * C * C;
                ws[r0 + j] = select(0.0, norm_k[j], valid);
                ws[r0 + C + j] = select(0.0, norm_q[j], valid);
                ws[r0 + 2u * C + j] = beta_j;
            }
        }
    }
}
