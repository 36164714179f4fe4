// gdn_scan for drivers that run threads as lanes of vector registers: there a load with one address for all lanes costs a
// few cycles, one with an address per lane a hundred, and a barrier a thousand. So a thread carries two whole columns of S
// and exchanges nothing; q, k, A and P are read at addresses that all threads share.
//
//   W = V - u o (K S)        N = A W
//   O = o o (Q S) + P N      S <- gamma_C S + K^T (n o N)
//
// SAVE = 1: S before the chunk, U = u o (K S) and N go into o instead of O. SAVE = 2: neither.
// WALK = 1: the walk of each head; 2: the same from zero; 3: from the identity with v = 0, for heads with a transition.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read> v: array<u32>; // [window, v_stride]
@group(0) @binding(4) var<storage, read> ws: array<vec4<f32>>; // [chunks, Hv, WS]
@group(0) @binding(5) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(6) var<storage, read> segments: array<vec4<u32>>; // [segments] or walks [segments, Hv]
@group(0) @binding(7) var<storage, read_write> state: array<vec2<f32>>; // [slots, Hv, K, V / 2]
@group(0) @binding(8) var<storage, read_write> o: array<u32>; // [window, o_stride] or [chunks, Hv, K V + 2 C V]

const C = CHUNK;
const WS = select(2u * C * C + 4u * C, 5u * C * C + 9u * C, GRAD == 1u) / 4u;
const_assert C == 16u;
const_assert LANES == DV_TILE / 2u;
const_assert DK % 4u == 0u;

/// Four rows of S, or one number of each of four tokens: [4, 2].
alias Four = mat4x2<f32>;

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

fn v2(i: u32) -> vec2<f32> {
    if V_TYPE == F32 {
        return bitcast<vec2<f32>>(vec2(v[i], v[i + 1u]));
    }
    return unpack_pair(V_TYPE, v[i >> 1u]);
}

fn store_o2(i: u32, x: vec2<f32>) {
    if V_TYPE == F32 {
        o[i] = bitcast<u32>(x.x);
        o[i + 1u] = bitcast<u32>(x.y);
    } else {
        o[i >> 1u] = pack_pair(V_TYPE, x);
    }
}

/// Where the rows of tokens 4 i .. 4 i + 4 of a chunk start; tokens past its end repeat the last one, and count nothing
/// because their rows of A and P and their u, o and n are 0.
fn rows_of(row0: u32, stride: u32, len: u32, i: u32) -> vec4<u32> {
    return row0 + stride * min(4u * i + vec4(0u, 1u, 2u, 3u), vec4(len - 1u));
}

/// ws[a] and ws[b], the same for all threads.
fn ws_pair(a: u32, b: u32, thread: Thread) -> mat2x4<f32> {
    if SHARED_LOADS {
        let i = pair_at(4u * a, 4u * b, thread);
        return pair_of(ws[i / 4u][i % 4u]);
    }
    return mat2x4<f32>(ws[a], ws[b]);
}

/// sum + K[rows, d .. d + 4] S, for four tokens.
fn k_times(sum: Four, rows: vec4<u32>, d: u32, s: Four, thread: Thread) -> Four {
    let x = k_pair(rows.x + d, rows.y + d, thread);
    let y = k_pair(rows.z + d, rows.w + d, thread);
    return sum + Four(s * x[0], s * x[1], s * y[0], s * y[1]);
}

/// sum + Q[rows, d .. d + 4] S, for four tokens.
fn q_times(sum: Four, rows: vec4<u32>, d: u32, s: Four, thread: Thread) -> Four {
    let x = q_pair(rows.x + d, rows.y + d, thread);
    let y = q_pair(rows.z + d, rows.w + d, thread);
    return sum + Four(s * x[0], s * x[1], s * y[0], s * y[1]);
}

/// sum + X[4 i .. 4 i + 4, 4 j .. 4 j + 4] W for the [C, C] matrix X at `at`.
fn ws_times(sum: Four, at: u32, i: u32, j: u32, w: Four, thread: Thread) -> Four {
    let first = at + i * C + j;
    let x = ws_pair(first, first + C / 4u, thread);
    let y = ws_pair(first + C / 2u, first + 3u * C / 4u, thread);
    return sum + Four(w * x[0], w * x[1], w * y[0], w * y[1]);
}

/// s + K[rows, d .. d + 4]^T N, for four tokens.
fn k_transposed_times(s: Four, rows: vec4<u32>, d: u32, n: Four, thread: Thread) -> Four {
    let x = k_pair(rows.x + d, rows.y + d, thread);
    let y = k_pair(rows.z + d, rows.w + d, thread);
    return s + n * transpose(mat4x4<f32>(x[0], x[1], y[0], y[1]));
}

/// Rows scaled one by one.
fn scaled(x: Four, by: vec4<f32>) -> Four {
    return Four(x[0] * by.x, x[1] * by.y, x[2] * by.z, x[3] * by.w);
}

fn v_of(rows: vec4<u32>) -> Four {
    if WALK == 3u {
        return Four();
    }
    return Four(v2(rows.x), v2(rows.y), v2(rows.z), v2(rows.w));
}

fn store_o(row0: u32, len: u32, i: u32, x: Four) {
    for (var j = 0u; j < 4u; j++) {
        if 4u * i + j < len {
            store_o2(row0 + (4u * i + j) * params.o_stride, x[j]);
        }
    }
}

/// Four rows of two numbers that the backward pass needs.
fn save_four(row0: u32, x: Four) {
    for (var j = 0u; j < 4u; j++) {
        o[row0 + j * params.dv] = bitcast<u32>(x[j].x);
        o[row0 + j * params.dv + 1u] = bitcast<u32>(x[j].y);
    }
}

@compute @workgroup_size(LANES)
fn gdn_scan(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.y;
    let walk = walk_of(WALK, segments[select(cell.x, cell.x * params.hv + head, WALK > 0u)]);
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 2u * thread.lane;

    // K / 4, as a number that compilers do not know: they would unroll the loops to some hundred KB of code.
    let depth = min(DK / 4u, arrayLength(&state));
    var s: array<Four, DK / 4u>;
    let state0 = (head * DK * params.dv + column) / 2u;
    let step = params.dv / 2u;
    let slot = params.hv * DK * step;
    for (var d = 0u; d < depth; d++) {
        s[d] = Four();
        if WALK < 2u && walk.chunks > 0u {
            let at = state0 + walk.slot * slot + 4u * d * step;
            s[d] = Four(state[at], state[at + step], state[at + 2u * step], state[at + 3u * step]);
        }
        if WALK == 3u {
            let own = vec2(column, column + 1u);
            let row = 4u * d;
            s[d] = Four(
                vec2<f32>(vec2(row) == own),
                vec2<f32>(vec2(row + 1u) == own),
                vec2<f32>(vec2(row + 2u) == own),
                vec2<f32>(vec2(row + 3u) == own),
            );
        }
    }

    let end = min(walk.first + walk.chunks, arrayLength(&chunks));
    for (var at = walk.first; at < end; at++) {
        let chunk = chunks[at];
        let len = clamp(chunk.y, 1u, C);
        let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK;
        let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK;
        let v0 = params.v_off + chunk.x * params.v_stride + head * params.dv + column;
        let o0 = params.o_off + chunk.x * params.o_stride + head * params.dv + column;
        let a0 = (at * params.hv + head) * WS; // A [C, C / 4]
        let p0 = a0 + C * C / 4u; // P [C, C / 4]
        let u0 = p0 + C * C / 4u; // u, o, n, gamma_C [C / 4] each

        let saved0 = (at * params.hv + head) * (DK + 2u * C) * params.dv + column; // S [K, V]
        let u_saved0 = saved0 + DK * params.dv; // U [C, V], N [C, V]
        let n_saved0 = u_saved0 + C * params.dv;

        let ka = rows_of(k0, params.k_stride, len, 0u);
        let kb = rows_of(k0, params.k_stride, len, 1u);
        let kc = rows_of(k0, params.k_stride, len, 2u);
        let kd = rows_of(k0, params.k_stride, len, 3u);
        let qa = rows_of(q0, params.q_stride, len, 0u);
        let qb = rows_of(q0, params.q_stride, len, 1u);
        let qc = rows_of(q0, params.q_stride, len, 2u);
        let qd = rows_of(q0, params.q_stride, len, 3u);
        var wa = Four();
        var wb = Four();
        var wc = Four();
        var wd = Four();
        var oa = Four();
        var ob = Four();
        var oc = Four();
        var od = Four();
        for (var d = 0u; d < depth; d++) {
            let rows = s[d];
            wa = k_times(wa, ka, 4u * d, rows, thread);
            wb = k_times(wb, kb, 4u * d, rows, thread);
            wc = k_times(wc, kc, 4u * d, rows, thread);
            wd = k_times(wd, kd, 4u * d, rows, thread);
            if SAVE == 0u {
                oa = q_times(oa, qa, 4u * d, rows, thread);
                ob = q_times(ob, qb, 4u * d, rows, thread);
                oc = q_times(oc, qc, 4u * d, rows, thread);
                od = q_times(od, qd, 4u * d, rows, thread);
            }
            if SAVE == 1u {
                save_four(saved0 + 4u * d * params.dv, rows);
            }
        }
        // W = V - u o (K S)
        let u = ws_pair(u0, u0 + 1u, thread);
        let u_end = ws_pair(u0 + 2u, u0 + 3u, thread);
        wa = scaled(wa, u[0]);
        wb = scaled(wb, u[1]);
        wc = scaled(wc, u_end[0]);
        wd = scaled(wd, u_end[1]);
        if SAVE == 1u {
            save_four(u_saved0, wa);
            save_four(u_saved0 + 4u * params.dv, wb);
            save_four(u_saved0 + 8u * params.dv, wc);
            save_four(u_saved0 + 12u * params.dv, wd);
        }
        wa = v_of(rows_of(v0, params.v_stride, len, 0u)) - wa;
        wb = v_of(rows_of(v0, params.v_stride, len, 1u)) - wb;
        wc = v_of(rows_of(v0, params.v_stride, len, 2u)) - wc;
        wd = v_of(rows_of(v0, params.v_stride, len, 3u)) - wd;
        // N = A W; A is lower triangular
        var na = ws_times(Four(), a0, 0u, 0u, wa, thread);
        var nb = ws_times(Four(), a0, 1u, 0u, wa, thread);
        nb = ws_times(nb, a0, 1u, 1u, wb, thread);
        var nc = ws_times(Four(), a0, 2u, 0u, wa, thread);
        nc = ws_times(nc, a0, 2u, 1u, wb, thread);
        nc = ws_times(nc, a0, 2u, 2u, wc, thread);
        var nd = ws_times(Four(), a0, 3u, 0u, wa, thread);
        nd = ws_times(nd, a0, 3u, 1u, wb, thread);
        nd = ws_times(nd, a0, 3u, 2u, wc, thread);
        nd = ws_times(nd, a0, 3u, 3u, wd, thread);
        if SAVE == 1u {
            save_four(n_saved0, na);
            save_four(n_saved0 + 4u * params.dv, nb);
            save_four(n_saved0 + 8u * params.dv, nc);
            save_four(n_saved0 + 12u * params.dv, nd);
        }
        // O = o o (Q S) + P N; P is lower triangular
        if SAVE == 0u {
            let f0 = u0 + C / 4u;
            let f = ws_pair(f0, f0 + 1u, thread);
            let f_end = ws_pair(f0 + 2u, f0 + 3u, thread);
            oa = ws_times(scaled(oa, f[0]), p0, 0u, 0u, na, thread);
            ob = ws_times(scaled(ob, f[1]), p0, 1u, 0u, na, thread);
            ob = ws_times(ob, p0, 1u, 1u, nb, thread);
            oc = ws_times(scaled(oc, f_end[0]), p0, 2u, 0u, na, thread);
            oc = ws_times(oc, p0, 2u, 1u, nb, thread);
            oc = ws_times(oc, p0, 2u, 2u, nc, thread);
            od = ws_times(scaled(od, f_end[1]), p0, 3u, 0u, na, thread);
            od = ws_times(od, p0, 3u, 1u, nb, thread);
            od = ws_times(od, p0, 3u, 2u, nc, thread);
            od = ws_times(od, p0, 3u, 3u, nd, thread);
            store_o(o0, len, 0u, oa);
            store_o(o0, len, 1u, ob);
            store_o(o0, len, 2u, oc);
            store_o(o0, len, 3u, od);
        }
        // S <- gamma_C S + K^T (n o N)
        let e0 = u0 + C / 2u;
        let e = ws_pair(e0, e0 + 1u, thread);
        let e_end = ws_pair(e0 + 2u, e0 + 3u, thread);
        na = scaled(na, e[0]);
        nb = scaled(nb, e[1]);
        nc = scaled(nc, e_end[0]);
        nd = scaled(nd, e_end[1]);
        let gamma = ws[u0 + 3u * C / 4u].x;
        for (var d = 0u; d < depth; d++) {
            var rows = gamma * s[d];
            rows = k_transposed_times(rows, ka, 4u * d, na, thread);
            rows = k_transposed_times(rows, kb, 4u * d, nb, thread);
            rows = k_transposed_times(rows, kc, 4u * d, nc, thread);
            rows = k_transposed_times(rows, kd, 4u * d, nd, thread);
            s[d] = rows;
        }
    }
    if walk.chunks > 0u {
        for (var d = 0u; d < depth; d++) {
            let at = state0 + walk.to * slot + 4u * d * step;
            state[at] = s[d][0];
            state[at + step] = s[d][1];
            state[at + 2u * step] = s[d][2];
            state[at + 3u * step] = s[d][3];
        }
    }
}
