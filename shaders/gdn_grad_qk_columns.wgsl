// gdn_grad_qk for drivers that run threads as lanes of vector registers (see gdn_scan_columns.wgsl): a thread has two columns
// of a and b, and reads rows of Z, X, N, P and R at addresses that all threads share.
//
//   b = Z S^T + P K
//   a = n o (N dS'^T) - u o ((beta o X) S^T) + P^T Q + R K
//   dq = b - rq^2 q (q . b)     dk = a - rk^2 k (k . a)     (with l2norm; else dq = b, dk = a)
//   dc_i += q_i . [Z S^T]_i - k_i . [n o (N dS'^T)]_i
//   dc_C += sum_i k_i . [n o (N dS'^T)]_i + gamma_C <dS', S>

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read_write> ws: array<vec4<f32>>; // [chunks, Hv, WS]
@group(0) @binding(4) var<storage, read> saved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]
@group(0) @binding(5) var<storage, read> dsaved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]
@group(0) @binding(6) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(7) var<storage, read_write> dq: array<u32>; // [window, dq_stride]
@group(0) @binding(8) var<storage, read_write> dk: array<u32>; // [window, dk_stride]

const C = CHUNK;
const WS = (5u * C * C + 9u * C) / 4u;
const BLOCKS = C / 4u;
const_assert C == 16u;
const_assert LANES == DK / 2u;

/// One number of each of four tokens, in two columns: [4, 2].
alias Four = mat4x2<f32>;
/// The same for all tokens of a chunk: [C, 2].
alias Column = array<Four, BLOCKS>;

var<workgroup> part: array<vec4<f32>, BLOCKS * LANES>; // parts of sums over K, four rows together
var<workgroup> inner_part: array<f32, LANES>; // parts of <dS', S>
var<workgroup> sums: array<vec4<f32>, BLOCKS>;

fn q2(i: u32) -> vec2<f32> {
    if QK_TYPE == F32 {
        return bitcast<vec2<f32>>(vec2(q[i], q[i + 1u]));
    }
    return unpack_pair(QK_TYPE, q[i >> 1u]);
}

fn k2(i: u32) -> vec2<f32> {
    if QK_TYPE == F32 {
        return bitcast<vec2<f32>>(vec2(k[i], k[i + 1u]));
    }
    return unpack_pair(QK_TYPE, k[i >> 1u]);
}

/// Where the rows of tokens 4 i .. 4 i + 4 of a chunk start; tokens past its end repeat the last one, and count nothing
/// because their rows and columns of P and R and their rows of Z and N are 0.
fn rows_of(row0: u32, stride: u32, len: u32, i: u32) -> vec4<u32> {
    return row0 + stride * min(4u * i + vec4(0u, 1u, 2u, 3u), vec4(len - 1u));
}

fn q_of(rows: vec4<u32>) -> Four {
    return Four(q2(rows.x), q2(rows.y), q2(rows.z), q2(rows.w));
}

fn k_of(rows: vec4<u32>) -> Four {
    return Four(k2(rows.x), k2(rows.y), k2(rows.z), k2(rows.w));
}

/// ws[a] and ws[b], the same for all threads.
fn ws_pair(a: u32, b: u32, thread: Thread) -> mat2x4<f32> {
    if SHARED_LOADS {
        let i = pair_at(4u * a, 4u * b, thread);
        return pair_of(ws[i / 4u][i % 4u]);
    }
    return mat2x4<f32>(ws[a], ws[b]);
}

/// saved[a] and saved[b], the same for all threads.
fn saved_pair(a: u32, b: u32, thread: Thread) -> mat2x4<f32> {
    if SHARED_LOADS {
        let i = pair_at(4u * a, 4u * b, thread);
        return pair_of(saved[i / 4u][i % 4u]);
    }
    return mat2x4<f32>(saved[a], saved[b]);
}

/// dsaved[a] and dsaved[b], the same for all threads.
fn dsaved_pair(a: u32, b: u32, thread: Thread) -> mat2x4<f32> {
    if SHARED_LOADS {
        let i = pair_at(4u * a, 4u * b, thread);
        return pair_of(dsaved[i / 4u][i % 4u]);
    }
    return mat2x4<f32>(dsaved[a], dsaved[b]);
}

/// sum + four rows of saved from `at` on times S^T, given four numbers of two rows of S.
fn saved_times(sum: Four, at: u32, s: mat2x4<f32>, thread: Thread) -> Four {
    let x = saved_pair(at, at + DV / 4u, thread);
    let y = saved_pair(at + DV / 2u, at + 3u * DV / 4u, thread);
    return sum + Four(x[0] * s, x[1] * s, y[0] * s, y[1] * s);
}

/// The same of dsaved.
fn dsaved_times(sum: Four, at: u32, s: mat2x4<f32>, thread: Thread) -> Four {
    let x = dsaved_pair(at, at + DV / 4u, thread);
    let y = dsaved_pair(at + DV / 2u, at + 3u * DV / 4u, thread);
    return sum + Four(x[0] * s, x[1] * s, y[0] * s, y[1] * s);
}

/// Rows 4 i .. 4 i + 4, columns 4 j .. 4 j + 4 of the [C, C] matrix at `at`.
fn block_of(at: u32, i: u32, j: u32, thread: Thread) -> mat4x4<f32> {
    let first = at + i * C + j;
    let x = ws_pair(first, first + C / 4u, thread);
    let y = ws_pair(first + C / 2u, first + 3u * C / 4u, thread);
    return mat4x4<f32>(x[0], x[1], y[0], y[1]);
}

/// Rows scaled one by one.
fn scaled(x: Four, by: vec4<f32>) -> Four {
    return Four(x[0] * by.x, x[1] * by.y, x[2] * by.z, x[3] * by.w);
}

/// Products of the rows of x and y.
fn row_dots(x: Four, y: Four) -> vec4<f32> {
    return vec4(dot(x[0], y[0]), dot(x[1], y[1]), dot(x[2], y[2]), dot(x[3], y[3]));
}

/// The number of threads, as one that compilers do not know: they would unroll loops over it.
fn lanes() -> u32 {
    return min(LANES, arrayLength(&saved));
}

/// Sums over all threads' parts of rows 4 i .. 4 i + 4.
fn sum_of(i: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var lane = 0u; lane < lanes(); lane++) {
        sum += part[i * LANES + lane];
    }
    return sum;
}

fn store_dq2(i: u32, x: vec2<f32>) {
    if QK_TYPE == F32 {
        dq[i] = bitcast<u32>(x.x);
        dq[i + 1u] = bitcast<u32>(x.y);
    } else {
        dq[i >> 1u] = pack_pair(QK_TYPE, x);
    }
}

fn store_dk2(i: u32, x: vec2<f32>) {
    if QK_TYPE == F32 {
        dk[i] = bitcast<u32>(x.x);
        dk[i + 1u] = bitcast<u32>(x.y);
    } else {
        dk[i >> 1u] = pack_pair(QK_TYPE, x);
    }
}

@compute @workgroup_size(LANES)
fn gdn_grad_qk(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let chunk = chunks[cell.x];
    let head_k = cell.y;
    let len = clamp(chunk.y, 1u, C);
    let column = head_k * DK + 2u * lane;
    let q0 = params.q_off + chunk.x * params.q_stride + column;
    let k0 = params.k_off + chunk.x * params.k_stride + column;
    let dq0 = params.dq_off + chunk.x * params.dq_stride + column;
    let dk0 = params.dk_off + chunk.x * params.dk_stride + column;
    // V / 4, as a number that compilers do not know: they would unroll the loop.
    let depth = min(DV / 4u, arrayLength(&dsaved));

    var qs: Column;
    var ks: Column;
    var a: Column;
    var b: Column;
    for (var i = 0u; i < BLOCKS; i++) {
        qs[i] = q_of(rows_of(q0, params.q_stride, len, i));
        ks[i] = k_of(rows_of(k0, params.k_stride, len, i));
        a[i] = Four();
        b[i] = Four();
    }
    for (var member = 0u; member < GROUP; member++) {
        let head = select(head_k + member * params.hk, head_k * GROUP + member, params.head_map == 0u);
        let cell0 = cell.x * params.hv + head;
        let p0 = cell0 * WS + C * C / 4u; // P [C, C / 4]
        let u0 = p0 + C * C / 4u; // u, o, n, gamma_C [C / 4] each
        let r0 = u0 + C + C * C / 2u; // R [C, C / 4]
        let beta0 = r0 + C * C / 4u + C / 2u; // beta, dc [C / 4]
        let s0 = cell0 * (DK + 2u * C) * (DV / 4u); // S of saved, dS' of dsaved [K, V / 4]
        let x0 = s0 + DK * (DV / 4u); // X [C, V / 4] of dsaved
        let n0 = x0 + C * (DV / 4u); // N of saved, Z of dsaved [C, V / 4]

        // zs = Z S^T, xs = X S^T, nd = N dS'^T
        var zs: Column;
        var xs: Column;
        var nd: Column;
        for (var i = 0u; i < BLOCKS; i++) {
            zs[i] = Four();
            xs[i] = Four();
            nd[i] = Four();
        }
        var inner = 0.0;
        let own = s0 + 2u * lane * (DV / 4u);
        for (var d = 0u; d < depth; d++) {
            let s = mat2x4<f32>(saved[own + d], saved[own + DV / 4u + d]);
            let ds = mat2x4<f32>(dsaved[own + d], dsaved[own + DV / 4u + d]);
            inner += dot(s[0], ds[0]) + dot(s[1], ds[1]);
            for (var i = 0u; i < BLOCKS; i++) {
                zs[i] = dsaved_times(zs[i], n0 + i * DV + d, s, thread);
                xs[i] = dsaved_times(xs[i], x0 + i * DV + d, s, thread);
                nd[i] = saved_times(nd[i], n0 + i * DV + d, ds, thread);
            }
        }
        workgroupBarrier();
        for (var i = 0u; i < BLOCKS; i++) {
            part[i * LANES + lane] = row_dots(qs[i], zs[i]);
        }
        inner_part[lane] = inner;
        workgroupBarrier();
        var dc = vec4<f32>();
        if lane < BLOCKS {
            dc = sum_of(lane);
        }
        workgroupBarrier();
        for (var i = 0u; i < BLOCKS; i++) {
            nd[i] = scaled(nd[i], ws[u0 + C / 2u + i]);
            part[i * LANES + lane] = row_dots(ks[i], nd[i]);
        }
        workgroupBarrier();
        if lane < BLOCKS {
            // The last token's own share cancels: its factor is 1 whatever its gate.
            let k_dots = select(vec4<f32>(), sum_of(lane), 4u * lane + vec4(0u, 1u, 2u, 3u) < vec4(len - 1u));
            dc -= k_dots;
            sums[lane] = k_dots;
        }
        workgroupBarrier();
        if lane < BLOCKS {
            if lane == (len - 1u) / 4u {
                var all = vec4<f32>();
                for (var i = 0u; i < BLOCKS; i++) {
                    all += sums[i];
                }
                var share = 0.0;
                for (var other = 0u; other < lanes(); other++) {
                    share += inner_part[other];
                }
                let last = vec4((len - 1u) % 4u) == vec4(0u, 1u, 2u, 3u);
                dc += select(vec4<f32>(), vec4(dot(all, vec4(1.0)) + ws[u0 + 3u * C / 4u].x * share), last);
            }
            ws[beta0 + C / 4u + lane] += dc;
        }
        // b += Z S^T + P K     a += n o (N dS'^T) - u o ((beta o X) S^T) + P^T Q + R K
        for (var i = 0u; i < BLOCKS; i++) {
            b[i] += zs[i];
            a[i] += nd[i] - scaled(xs[i], ws[u0 + i] * ws[beta0 + i]);
        }
        for (var j = 0u; 4u * j < len; j++) {
            let kj = k_of(rows_of(k0, params.k_stride, len, j));
            let qj = q_of(rows_of(q0, params.q_stride, len, j));
            for (var i = 0u; i < BLOCKS; i++) {
                b[i] += kj * block_of(p0, i, j, thread);
                a[i] += qj * transpose(block_of(p0, j, i, thread));
                a[i] += kj * block_of(r0, i, j, thread);
            }
        }
    }

    if L2NORM == 1u {
        // The norms are the same for all value heads.
        let head = select(head_k, head_k * GROUP, params.head_map == 0u);
        let norm0 = (cell.x * params.hv + head) * WS + 5u * C * C / 4u + C; // rk, rq [C / 4]
        workgroupBarrier();
        for (var i = 0u; i < BLOCKS; i++) {
            part[i * LANES + lane] = row_dots(qs[i], b[i]);
        }
        workgroupBarrier();
        if lane < BLOCKS {
            let norm = ws[norm0 + C / 4u + lane];
            sums[lane] = norm * norm * sum_of(lane);
        }
        workgroupBarrier();
        for (var i = 0u; i < BLOCKS; i++) {
            b[i] -= scaled(qs[i], sums[i]);
            part[i * LANES + lane] = row_dots(ks[i], a[i]);
        }
        workgroupBarrier();
        if lane < BLOCKS {
            let norm = ws[norm0 + lane];
            sums[lane] = norm * norm * sum_of(lane);
        }
        workgroupBarrier();
        for (var i = 0u; i < BLOCKS; i++) {
            a[i] -= scaled(ks[i], sums[i]);
        }
    }
    for (var i = 0u; i < BLOCKS; i++) {
        for (var j = 0u; j < 4u; j++) {
            let row = 4u * i + j;
            if row < len {
                store_dq2(dq0 + row * params.dq_stride, b[i][j]);
                store_dk2(dk0 + row * params.dk_stride, a[i][j]);
            }
        }
    }
}
