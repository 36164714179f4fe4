// gdn_prepare for drivers that run threads as lanes of vector registers (see gdn_scan_columns.wgsl): thread j holds column
// j of K K^T and Q K^T and of the inverse; the other operand is read at addresses that all threads share.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read> g: array<f32>; // [window, Hv]
@group(0) @binding(4) var<storage, read> beta: array<f32>; // [window, Hv]
@group(0) @binding(5) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(6) var<storage, read_write> ws: array<f32>; // [chunks, Hv, WS]

const C = CHUNK;
// With GRAD, A, P, u, o, n, gamma_C are followed by B, G, R [C, C], rk, rq, beta [C], and two [C] for later rows.
const WS = select(2u * C * C + 4u * C, 5u * C * C + 9u * C, GRAD == 1u);
const MORE = 2u * C * C + 4u * C;
// The largest beta |rk k|^2 of a token that counts as one that makes no state longer: 2, and a little for rounding.
const LONGEST_STEP = 2.00001;
const_assert C == 16u;
const_assert LANES == C;
const_assert DK % 4u == 0u;

var<workgroup> lower: array<vec4<f32>, C * C / 4u>; // beta o K K^T o rk rk^T, then L [C, C]
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

/// q[a .. a + 4] and q[b .. b + 4], the same for all threads.
fn q_pair(a: u32, b: u32, thread: Thread) -> mat2x4<f32> {
    if SHARED_LOADS {
        let i = pair_at(a, b, thread);
        return pair_of(number(QK_TYPE, q[word_of(QK_TYPE, i)], i));
    }
    return mat2x4<f32>(q4(a), q4(b));
}

/// k[a .. a + 4] and k[b .. b + 4], the same for all threads.
fn k_pair(a: u32, b: u32, thread: Thread) -> mat2x4<f32> {
    if SHARED_LOADS {
        let i = pair_at(a, b, thread);
        return pair_of(number(QK_TYPE, k[word_of(QK_TYPE, i)], i));
    }
    return mat2x4<f32>(k4(a), k4(b));
}

/// Where the rows of tokens 4 i .. 4 i + 4 of a chunk start; tokens past its end repeat the last one.
fn rows_of(row0: u32, stride: u32, len: u32, i: u32) -> vec4<u32> {
    return row0 + stride * min(4u * i + vec4(0u, 1u, 2u, 3u), vec4(len - 1u));
}

/// Products of x with four rows of K.
fn k_dots(rows: vec4<u32>, d: u32, x: vec4<f32>, thread: Thread) -> vec4<f32> {
    let a = k_pair(rows.x + d, rows.y + d, thread);
    let b = k_pair(rows.z + d, rows.w + d, thread);
    return vec4(dot(a[0], x), dot(a[1], x), dot(b[0], x), dot(b[1], x));
}

/// Products of x with four rows of Q.
fn q_dots(rows: vec4<u32>, d: u32, x: vec4<f32>, thread: Thread) -> vec4<f32> {
    let a = q_pair(rows.x + d, rows.y + d, thread);
    let b = q_pair(rows.z + d, rows.w + d, thread);
    return vec4(dot(a[0], x), dot(a[1], x), dot(b[0], x), dot(b[1], x));
}

/// exp(c_i - c_j), 0 above the diagonal and past the chunk's end.
fn decay(i: u32, j: u32, len: u32) -> f32 {
    if j > i || i >= len {
        return 0.0;
    }
    return exp((whole[i] - whole[j]) + (frac[i] - frac[j]));
}

@compute @workgroup_size(LANES)
fn gdn_prepare(thread: Thread) {
    let cell = cell_of(thread.group);
    let j = thread.lane;
    let chunk = chunks[cell.x];
    let head_k = cell.y;
    let len = clamp(chunk.y, 1u, C);
    let last = len - 1u;
    let valid = j < len;
    let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK;
    let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK;

    // kk = K k_j, qk = Q k_j [C]
    var kk: array<vec4<f32>, C / 4u>;
    var qk: array<vec4<f32>, C / 4u>;
    var sum_q = 0.0;
    var sum_k = 0.0;
    for (var i = 0u; i < C / 4u; i++) {
        kk[i] = vec4<f32>();
        qk[i] = vec4<f32>();
    }
    // K / 4, as a number that compilers do not know: they would unroll the loop.
    let depth = min(DK / 4u, arrayLength(&ws));
    for (var d = 0u; d < depth; d++) {
        let own = k4(k0 + min(j, last) * params.k_stride + 4u * d);
        for (var i = 0u; i < C / 4u; i++) {
            kk[i] += k_dots(rows_of(k0, params.k_stride, len, i), 4u * d, own, thread);
            qk[i] += q_dots(rows_of(q0, params.q_stride, len, i), 4u * d, own, thread);
        }
        sum_k += dot(own, own);
        if L2NORM == 1u {
            let own_q = q4(q0 + min(j, last) * params.q_stride + 4u * d);
            sum_q += dot(own_q, own_q);
        }
    }
    norm_q[j] = 1.0;
    norm_k[j] = 1.0;
    if L2NORM == 1u {
        norm_q[j] = 1.0 / sqrt(sum_q + 1e-6);
        norm_k[j] = 1.0 / sqrt(sum_k + 1e-6);
    }
    square_k[j] = norm_k[j] * norm_k[j] * sum_k;

    for (var member = 0u; member < GROUP; member++) {
        let head = select(head_k + member * params.hk, head_k * GROUP + member, params.head_map == 0u);
        let g0 = params.g_off + chunk.x * params.hv + head;
        let ws0 = (cell.x * params.hv + head) * WS;
        workgroupBarrier();
        // Every thread adds in the same order, so that the sums of two tokens share their roundings.
        var w = 0.0;
        var f = 0.0;
        for (var i = 0u; i < len; i++) {
            if i <= j {
                let gate = max(g[g0 + i * params.hv], -1e4);
                let gate_whole = round(gate);
                f += gate - gate_whole;
                let carry = round(f);
                w += gate_whole + carry;
                f -= carry;
            }
        }
        whole[j] = w;
        frac[j] = f;
        workgroupBarrier();
        // L = strictlower(diag(beta) G o K K^T)      P = s Q K^T o G
        for (var i = 0u; i < C; i++) {
            let gate = decay(i, j, len);
            let d = gate * norm_k[j];
            let beta_i = beta[g0 + min(i, last) * params.hv];
            lower[i * (C / 4u) + j / 4u][j % 4u] = select(0.0, beta_i * d * norm_k[i] * kk[i / 4u][i % 4u], i > j);
            ws[ws0 + C * C + i * C + j] = params.scale * d * norm_q[i] * qk[i / 4u][i % 4u];
            if GRAD == 1u {
                ws[ws0 + MORE + C * C + i * C + j] = gate;
                ws[ws0 + MORE + 2u * C * C + i * C + j] = select(0.0, d * norm_k[i] * kk[i / 4u][i % 4u], i > j);
            }
        }
        workgroupBarrier();
        // X = (I + L)^-1 by rows of four: x_i = e_i - sum_{m < i} L_im x_m. A thread needs only its own column.
        let beta_j = select(0.0, beta[g0 + min(j, last) * params.hv], valid);
        var x: array<vec4<f32>, C / 4u>;
        for (var i = 0u; i < C / 4u; i++) {
            let row = 4u * i;
            var sum = select(vec4(0.0), vec4(1.0), row + vec4(0u, 1u, 2u, 3u) == vec4(j));
            for (var m = 0u; m < i; m++) {
                let at = row * (C / 4u) + m;
                sum -= vec4(
                    dot(lower[at], x[m]),
                    dot(lower[at + C / 4u], x[m]),
                    dot(lower[at + C / 2u], x[m]),
                    dot(lower[at + 3u * C / 4u], x[m]),
                );
            }
            let at = row * (C / 4u) + i;
            sum.y -= lower[at + C / 4u].x * sum.x;
            let l2 = lower[at + C / 2u];
            sum.z -= l2.x * sum.x + l2.y * sum.y;
            let l3 = lower[at + 3u * C / 4u];
            sum.w -= l3.x * sum.x + l3.y * sum.y + l3.z * sum.z;
            x[i] = sum;
            for (var r = 0u; r < 4u; r++) {
                ws[ws0 + (row + r) * C + j] = select(0.0, sum[r] * beta_j, row + r < len);
                if GRAD == 1u {
                    ws[ws0 + MORE + (row + r) * C + j] = select(0.0, sum[r], valid && row + r < len);
                }
            }
        }
        let gamma = select(0.0, exp(whole[j] + frac[j]), valid);
        let rest = decay(last, j, len);
        let v0 = ws0 + 2u * C * C;
        ws[v0 + j] = gamma * norm_k[j];
        ws[v0 + C + j] = params.scale * gamma * norm_q[j];
        ws[v0 + 2u * C + j] = rest * norm_k[j];
        // No token makes a state longer. NaN fails.
        var contracts = 1.0;
        for (var i = 0u; i < len; i++) {
            let step = beta[g0 + i * params.hv] * square_k[i];
            contracts = select(0.0, contracts, step >= 0.0 && step <= LONGEST_STEP);
        }
        ws[v0 + 3u * C + j] = select(exp(whole[last] + frac[last]), contracts, j == 1u);
        if GRAD == 1u {
            let r0 = ws0 + MORE + 3u * C * C;
            ws[r0 + j] = select(0.0, norm_k[j], valid);
            ws[r0 + C + j] = select(0.0, norm_q[j], valid);
            ws[r0 + 2u * C + j] = beta_j;
        }
    }
}
