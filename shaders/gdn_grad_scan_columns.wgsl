// gdn_grad_scan for drivers that run threads as lanes of vector registers (see gdn_scan_columns.wgsl): a thread carries two
// whole columns of dS.
//
//   dN = n o (K dS') + P^T dO     X = B^T dN     dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z, Z = o o dO
//
// WALK = 1: the walk of each head; 2: the same from zero, and nothing is saved.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read> d_o: array<u32>; // [window, do_stride]
@group(0) @binding(4) var<storage, read> ws: array<vec4<f32>>; // [chunks, Hv, (5 C C + 9 C) / 4]
@group(0) @binding(5) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(6) var<storage, read> segments: array<vec4<u32>>; // [segments] or walks [segments, Hv]
@group(0) @binding(7) var<storage, read_write> dstate: array<vec2<f32>>; // [slots, Hv, K, V / 2]
@group(0) @binding(8) var<storage, read_write> dsaved: array<vec2<f32>>; // [chunks, Hv, (K V + 2 C V) / 2]

const C = CHUNK;
const_assert C == 16u;
const_assert LANES == DV_TILE / 2u;
const_assert DK % 4u == 0u;

/// Four rows of dS, or one number of each of four tokens: [4, 2].
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

fn do2(i: u32) -> vec2<f32> {
    if V_TYPE == F32 {
        return bitcast<vec2<f32>>(vec2(d_o[i], d_o[i + 1u]));
    }
    return unpack_pair(V_TYPE, d_o[i >> 1u]);
}

/// Where the rows of tokens 4 i .. 4 i + 4 of a chunk start; tokens past its end repeat the last one, and count nothing
/// because their rows of P and B and their u, o and n are 0.
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

/// sum + K[rows, d .. d + 4] dS', for four tokens.
fn k_times(sum: Four, rows: vec4<u32>, d: u32, s: Four, thread: Thread) -> Four {
    let x = k_pair(rows.x + d, rows.y + d, thread);
    let y = k_pair(rows.z + d, rows.w + d, thread);
    return sum + Four(s * x[0], s * x[1], s * y[0], s * y[1]);
}

/// sum + X[4 j .. 4 j + 4, 4 i .. 4 i + 4]^T W for the [C, C] matrix X at `at`.
fn ws_transposed_times(sum: Four, at: u32, j: u32, i: u32, w: Four, thread: Thread) -> Four {
    let first = at + j * C + i;
    let x = ws_pair(first, first + C / 4u, thread);
    let y = ws_pair(first + C / 2u, first + 3u * C / 4u, thread);
    return sum + w * transpose(mat4x4<f32>(x[0], x[1], y[0], y[1]));
}

/// s + K[rows, d .. d + 4]^T X, for four tokens.
fn k_transposed_times(s: Four, rows: vec4<u32>, d: u32, n: Four, thread: Thread) -> Four {
    let x = k_pair(rows.x + d, rows.y + d, thread);
    let y = k_pair(rows.z + d, rows.w + d, thread);
    return s + n * transpose(mat4x4<f32>(x[0], x[1], y[0], y[1]));
}

/// s + Q[rows, d .. d + 4]^T Z, for four tokens.
fn q_transposed_times(s: Four, rows: vec4<u32>, d: u32, z: Four, thread: Thread) -> Four {
    let x = q_pair(rows.x + d, rows.y + d, thread);
    let y = q_pair(rows.z + d, rows.w + d, thread);
    return s + z * transpose(mat4x4<f32>(x[0], x[1], y[0], y[1]));
}

/// Rows scaled one by one.
fn scaled(x: Four, by: vec4<f32>) -> Four {
    return Four(x[0] * by.x, x[1] * by.y, x[2] * by.z, x[3] * by.w);
}

fn do_of(rows: vec4<u32>) -> Four {
    return Four(do2(rows.x), do2(rows.y), do2(rows.z), do2(rows.w));
}

fn save_four(at: u32, x: Four) {
    if WALK == 2u {
        return;
    }
    let step = params.dv / 2u;
    dsaved[at] = x[0];
    dsaved[at + step] = x[1];
    dsaved[at + 2u * step] = x[2];
    dsaved[at + 3u * step] = x[3];
}

@compute @workgroup_size(LANES)
fn gdn_grad_scan(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.y;
    let walk = walk_of(WALK, segments[select(cell.x, cell.x * params.hv + head, WALK > 0u)]);
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 2u * thread.lane;

    // K / 4, as a number that compilers do not know: they would unroll the loops to some hundred KB of code.
    let depth = min(DK / 4u, arrayLength(&dstate));
    var s: array<Four, DK / 4u>;
    let state0 = (head * DK * params.dv + column) / 2u;
    let step = params.dv / 2u;
    let slot = params.hv * DK * step;
    for (var d = 0u; d < depth; d++) {
        s[d] = Four();
        if WALK < 2u && walk.chunks > 0u {
            let at = state0 + walk.slot * slot + 4u * d * step;
            s[d] = Four(dstate[at], dstate[at + step], dstate[at + 2u * step], dstate[at + 3u * step]);
        }
    }

    let end = min(walk.first + walk.chunks, arrayLength(&chunks));
    for (var at = end; at > walk.first; at--) {
        let chunk = chunks[at - 1u];
        let len = clamp(chunk.y, 1u, C);
        let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK;
        let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK;
        let do0 = params.do_off + chunk.x * params.do_stride + head * params.dv + column;
        let cell0 = (at - 1u) * params.hv + head;
        let p0 = (cell0 * (5u * C * C + 9u * C) + C * C) / 4u; // P [C, C / 4]
        let u0 = p0 + C * C / 4u; // u, o, n, gamma_C [C / 4] each
        let b0 = u0 + C; // B [C, C / 4]
        let beta0 = b0 + 3u * C * C / 4u + C / 2u; // beta [C / 4]
        let saved0 = (cell0 * (DK + 2u * C) * params.dv + column) / 2u; // dS' [K, V / 2]
        let x0 = saved0 + DK * step; // X, Z [C, V / 2]
        let z0 = x0 + C * step;

        let ka = rows_of(k0, params.k_stride, len, 0u);
        let kb = rows_of(k0, params.k_stride, len, 1u);
        let kc = rows_of(k0, params.k_stride, len, 2u);
        let kd = rows_of(k0, params.k_stride, len, 3u);
        var na = Four();
        var nb = Four();
        var nc = Four();
        var nd = Four();
        for (var d = 0u; d < depth; d++) {
            let rows = s[d];
            save_four(saved0 + 4u * d * step, rows);
            na = k_times(na, ka, 4u * d, rows, thread);
            nb = k_times(nb, kb, 4u * d, rows, thread);
            nc = k_times(nc, kc, 4u * d, rows, thread);
            nd = k_times(nd, kd, 4u * d, rows, thread);
        }
        // dN = n o (K dS') + P^T dO; P is lower triangular
        var za = do_of(rows_of(do0, params.do_stride, len, 0u));
        var zb = do_of(rows_of(do0, params.do_stride, len, 1u));
        var zc = do_of(rows_of(do0, params.do_stride, len, 2u));
        var zd = do_of(rows_of(do0, params.do_stride, len, 3u));
        let e0 = u0 + C / 2u;
        let e = ws_pair(e0, e0 + 1u, thread);
        let e_end = ws_pair(e0 + 2u, e0 + 3u, thread);
        na = ws_transposed_times(scaled(na, e[0]), p0, 0u, 0u, za, thread);
        na = ws_transposed_times(na, p0, 1u, 0u, zb, thread);
        na = ws_transposed_times(na, p0, 2u, 0u, zc, thread);
        na = ws_transposed_times(na, p0, 3u, 0u, zd, thread);
        nb = ws_transposed_times(scaled(nb, e[1]), p0, 1u, 1u, zb, thread);
        nb = ws_transposed_times(nb, p0, 2u, 1u, zc, thread);
        nb = ws_transposed_times(nb, p0, 3u, 1u, zd, thread);
        nc = ws_transposed_times(scaled(nc, e_end[0]), p0, 2u, 2u, zc, thread);
        nc = ws_transposed_times(nc, p0, 3u, 2u, zd, thread);
        nd = ws_transposed_times(scaled(nd, e_end[1]), p0, 3u, 3u, zd, thread);
        // X = B^T dN; B is lower triangular
        var xa = ws_transposed_times(Four(), b0, 0u, 0u, na, thread);
        xa = ws_transposed_times(xa, b0, 1u, 0u, nb, thread);
        xa = ws_transposed_times(xa, b0, 2u, 0u, nc, thread);
        xa = ws_transposed_times(xa, b0, 3u, 0u, nd, thread);
        var xb = ws_transposed_times(Four(), b0, 1u, 1u, nb, thread);
        xb = ws_transposed_times(xb, b0, 2u, 1u, nc, thread);
        xb = ws_transposed_times(xb, b0, 3u, 1u, nd, thread);
        var xc = ws_transposed_times(Four(), b0, 2u, 2u, nc, thread);
        xc = ws_transposed_times(xc, b0, 3u, 2u, nd, thread);
        var xd = ws_transposed_times(Four(), b0, 3u, 3u, nd, thread);
        save_four(x0, xa);
        save_four(x0 + 4u * step, xb);
        save_four(x0 + 8u * step, xc);
        save_four(x0 + 12u * step, xd);
        // Z = o o dO
        let f0 = u0 + C / 4u;
        let f = ws_pair(f0, f0 + 1u, thread);
        let f_end = ws_pair(f0 + 2u, f0 + 3u, thread);
        za = scaled(za, f[0]);
        zb = scaled(zb, f[1]);
        zc = scaled(zc, f_end[0]);
        zd = scaled(zd, f_end[1]);
        save_four(z0, za);
        save_four(z0 + 4u * step, zb);
        save_four(z0 + 8u * step, zc);
        save_four(z0 + 12u * step, zd);
        // dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z
        let u = ws_pair(u0, u0 + 1u, thread);
        let u_end = ws_pair(u0 + 2u, u0 + 3u, thread);
        let beta = ws_pair(beta0, beta0 + 1u, thread);
        let beta_end = ws_pair(beta0 + 2u, beta0 + 3u, thread);
        xa = scaled(xa, -(u[0] * beta[0]));
        xb = scaled(xb, -(u[1] * beta[1]));
        xc = scaled(xc, -(u_end[0] * beta_end[0]));
        xd = scaled(xd, -(u_end[1] * beta_end[1]));
        let qa = rows_of(q0, params.q_stride, len, 0u);
        let qb = rows_of(q0, params.q_stride, len, 1u);
        let qc = rows_of(q0, params.q_stride, len, 2u);
        let qd = rows_of(q0, params.q_stride, len, 3u);
        let gamma = ws[u0 + 3u * C / 4u].x;
        for (var d = 0u; d < depth; d++) {
            var rows = gamma * s[d];
            rows = k_transposed_times(rows, ka, 4u * d, xa, thread);
            rows = k_transposed_times(rows, kb, 4u * d, xb, thread);
            rows = k_transposed_times(rows, kc, 4u * d, xc, thread);
            rows = k_transposed_times(rows, kd, 4u * d, xd, thread);
            rows = q_transposed_times(rows, qa, 4u * d, za, thread);
            rows = q_transposed_times(rows, qb, 4u * d, zb, thread);
            rows = q_transposed_times(rows, qc, 4u * d, zc, thread);
            rows = q_transposed_times(rows, qd, 4u * d, zd, thread);
            s[d] = rows;
        }
    }
    if walk.chunks > 0u {
        for (var d = 0u; d < depth; d++) {
            let at = state0 + walk.to * slot + 4u * d * step;
            dstate[at] = s[d][0];
            dstate[at + step] = s[d][1];
            dstate[at + 2u * step] = s[d][2];
            dstate[at + 3u * step] = s[d][3];
        }
    }
}
