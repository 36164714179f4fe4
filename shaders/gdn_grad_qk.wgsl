// The gradients of q and k of one chunk and key head, summed over its value heads.
//
//   b = Z S^T + P K
//   a = n o (N dS'^T) - u o ((beta o X) S^T) + P^T Q + R K
//   dq = b - rq^2 q (q . b)     dk = a - rk^2 k (k . a)     (with l2norm; else dq = b, dk = a)
//   dc_i += q_i . [Z S^T]_i - k_i . [n o (N dS'^T)]_i
//   dc_C += sum_i k_i . [n o (N dS'^T)]_i + gamma_C <dS', S>
//
// Threads form a grid of GROUPS x QUADS; thread (ty, tx) holds rows ty * ROWS .. + ROWS of columns 4 tx .. + 4 of a and b in
// registers. S, dS', Z, X and N pass through workgroup memory in slices of V, then P, P^T and R in slices of tokens.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read_write> ws: array<f32>; // [chunks, Hv, 5 C C + 9 C]
@group(0) @binding(4) var<storage, read> saved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]
@group(0) @binding(5) var<storage, read> dsaved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]
@group(0) @binding(6) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(7) var<storage, read_write> dq: array<u32>; // [window, dq_stride]
@group(0) @binding(8) var<storage, read_write> dk: array<u32>; // [window, dk_stride]

const C = CHUNK;
const WS = 5u * C * C + 9u * C;
const QUADS = DK / 4u;
const GROUPS = LANES / QUADS;
const ROWS = C / GROUPS;
// Width of a staged slice, in vec4.
const DEPTH = 1u + u32(DK <= 128u);
// One vec4 after each four rows, so that threads that read four rows apart do not meet in a bank.
const SIDE = DK * DEPTH + QUADS;
// Between the parts of a row's sum: odd for the same reason.
const PART = C + 1u;

const_assert C == 16u || C == 32u;
const_assert LANES == GROUPS * QUADS && LANES >= C;
const_assert C == GROUPS * ROWS;
const_assert DV % (4u * DEPTH) == 0u;
const_assert QUADS * PART + LANES <= 8u * SIDE;

var<workgroup> tile: array<vec4<f32>, 2u * SIDE>; // S, dS' [DK, DEPTH], then parts of sums over K [QUADS, PART] and [LANES]
var<workgroup> rows: array<vec4<f32>, 3u * C * DEPTH>; // Z, -u o beta o X, n o N, or P, P^T, R: [3, C, DEPTH]
var<workgroup> dots: array<f32, C>;

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

fn store_dq4(i: u32, x: vec4<f32>) {
    if QK_TYPE == F32 {
        let bits = bitcast<vec4<u32>>(x);
        dq[i] = bits.x;
        dq[i + 1u] = bits.y;
        dq[i + 2u] = bits.z;
        dq[i + 3u] = bits.w;
    } else {
        dq[i >> 1u] = pack_pair(QK_TYPE, x.xy);
        dq[(i >> 1u) + 1u] = pack_pair(QK_TYPE, x.zw);
    }
}

fn store_dk4(i: u32, x: vec4<f32>) {
    if QK_TYPE == F32 {
        let bits = bitcast<vec4<u32>>(x);
        dk[i] = bits.x;
        dk[i + 1u] = bits.y;
        dk[i + 2u] = bits.z;
        dk[i + 3u] = bits.w;
    } else {
        dk[i >> 1u] = pack_pair(QK_TYPE, x.xy);
        dk[(i >> 1u) + 1u] = pack_pair(QK_TYPE, x.zw);
    }
}

/// q[row, column .. column + 4], 0 past a short chunk's end.
fn q_row(q0: u32, row: u32, len: u32) -> vec4<f32> {
    if row < len {
        return q4(q0 + row * params.q_stride);
    }
    return vec4<f32>();
}

/// The same of k.
fn k_row(k0: u32, row: u32, len: u32) -> vec4<f32> {
    if row < len {
        return k4(k0 + row * params.k_stride);
    }
    return vec4<f32>();
}

/// Value head `member` of a key head.
fn head_of(head_k: u32, member: u32) -> u32 {
    return select(head_k + member * params.hk, head_k * GROUP + member, params.head_map == 0u);
}

/// x against four rows.
fn four_dots(x: vec4<f32>, s0: vec4<f32>, s1: vec4<f32>, s2: vec4<f32>, s3: vec4<f32>) -> vec4<f32> {
    return vec4(dot(x, s0), dot(x, s1), dot(x, s2), dot(x, s3));
}

fn put_part(i: u32, x: f32) {
    tile[i / 4u][i % 4u] = x;
}

fn part(i: u32) -> f32 {
    return tile[i / 4u][i % 4u];
}

/// The sum of one row's parts.
fn row_sum(row: u32) -> f32 {
    var sum = 0.0;
    for (var quad = 0u; quad < QUADS; quad++) {
        sum += part(quad * PART + row);
    }
    return sum;
}

@compute @workgroup_size(LANES)
fn gdn_grad_qk(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let tx = lane % QUADS;
    let row0 = lane / QUADS * ROWS;
    let chunk = chunks[cell.x];
    let head_k = cell.y;
    let len = min(chunk.y, C);
    let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK + 4u * tx;
    let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK + 4u * tx;
    let dq0 = params.dq_off + chunk.x * params.dq_stride + head_k * DK + 4u * tx;
    let dk0 = params.dk_off + chunk.x * params.dk_stride + head_k * DK + 4u * tx;

    // a, b [ROWS, 4]
    var a: array<vec4<f32>, ROWS>;
    var b: array<vec4<f32>, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        a[r] = vec4<f32>();
        b[r] = vec4<f32>();
    }
    for (var member = 0u; member < GROUP; member++) {
        let head = head_of(head_k, member);
        let u0 = (cell.x * params.hv + head) * WS + 2u * C * C; // u, o, n, gamma_C [C] each
        let beta0 = u0 + 4u * C + 3u * C * C + 2u * C; // beta, dc [C]
        let s0 = (cell.x * params.hv + head) * (DK + 2u * C) * (DV / 4u); // S of saved, dS' of dsaved [K, V / 4]
        let x0 = s0 + DK * (DV / 4u); // X [C, V / 4] of dsaved
        let n0 = x0 + C * (DV / 4u); // N of saved, Z of dsaved [C, V / 4]

        // of_s = Z S^T, of_ds = n o (N dS'^T) [ROWS, 4]
        var of_s: array<vec4<f32>, ROWS>;
        var of_ds: array<vec4<f32>, ROWS>;
        for (var r = 0u; r < ROWS; r++) {
            of_s[r] = vec4<f32>();
            of_ds[r] = vec4<f32>();
        }
        var inner = 0.0; // a part of <dS', S>
        for (var slice = 0u; slice < DV / 4u; slice += DEPTH) {
            workgroupBarrier();
            for (var e = lane; e < DK * DEPTH; e += LANES) {
                let row = e / DEPTH;
                let at = s0 + row * (DV / 4u) + slice + e % DEPTH;
                let vs = saved[at];
                let vd = dsaved[at];
                tile[e + row / 4u] = vs;
                tile[SIDE + e + row / 4u] = vd;
                inner += dot(vs, vd);
            }
            for (var e = lane; e < C * DEPTH; e += LANES) {
                let row = e / DEPTH;
                let at = row * (DV / 4u) + slice + e % DEPTH;
                rows[e] = dsaved[n0 + at];
                rows[C * DEPTH + e] = -(ws[u0 + row] * ws[beta0 + row]) * dsaved[x0 + at];
                rows[2u * C * DEPTH + e] = ws[u0 + 2u * C + row] * saved[n0 + at];
            }
            workgroupBarrier();
            for (var d = 0u; d < DEPTH; d++) {
                let at = tx * (4u * DEPTH + 1u) + d;
                let sa = tile[at];
                let sb = tile[at + DEPTH];
                let sc = tile[at + 2u * DEPTH];
                let sd = tile[at + 3u * DEPTH];
                for (var r = 0u; r < ROWS; r++) {
                    let row = (row0 + r) * DEPTH + d;
                    of_s[r] += four_dots(rows[row], sa, sb, sc, sd);
                    a[r] += four_dots(rows[C * DEPTH + row], sa, sb, sc, sd);
                }
                let da = tile[SIDE + at];
                let db = tile[SIDE + at + DEPTH];
                let dc = tile[SIDE + at + 2u * DEPTH];
                let dd = tile[SIDE + at + 3u * DEPTH];
                for (var r = 0u; r < ROWS; r++) {
                    of_ds[r] += four_dots(rows[2u * C * DEPTH + (row0 + r) * DEPTH + d], da, db, dc, dd);
                }
            }
        }
        workgroupBarrier();
        for (var r = 0u; r < ROWS; r++) {
            put_part(tx * PART + row0 + r, dot(q_row(q0, row0 + r, len), of_s[r]));
            b[r] += of_s[r];
        }
        workgroupBarrier();
        var dc_row = 0.0;
        if lane < C {
            dc_row = row_sum(lane);
        }
        workgroupBarrier();
        for (var r = 0u; r < ROWS; r++) {
            put_part(tx * PART + row0 + r, dot(k_row(k0, row0 + r, len), of_ds[r]));
            a[r] += of_ds[r];
        }
        put_part(QUADS * PART + lane, inner);
        workgroupBarrier();
        if lane < C {
            let k_dot = row_sum(lane);
            var share = 0.0;
            for (var e = lane; e < LANES; e += C) {
                share += part(QUADS * PART + e);
            }
            dc_row -= k_dot;
            dots[lane] = k_dot + ws[u0 + 3u * C] * share;
        }
        workgroupBarrier();
        if lane < len {
            if lane == len - 1u {
                for (var i = 0u; i < C; i++) {
                    dc_row += dots[i];
                }
            }
            ws[beta0 + C + lane] += dc_row;
        }
    }

    // b += P K     a += P^T Q + R K, with P and R summed over the value heads
    for (var first = 0u; first < len; first += 4u * DEPTH) {
        workgroupBarrier();
        for (var e = lane; e < C * DEPTH; e += LANES) {
            let i = e / DEPTH;
            let j = first + 4u * (e % DEPTH);
            var p = vec4<f32>();
            var p_transposed = vec4<f32>();
            var r = vec4<f32>();
            for (var member = 0u; member < GROUP; member++) {
                let p0 = (cell.x * params.hv + head_of(head_k, member)) * WS + C * C; // P [C, C]
                let r0 = p0 + 3u * C * C + 4u * C; // R [C, C]
                let at = p0 + i * C + j;
                let across = p0 + j * C + i;
                let of_r = r0 + i * C + j;
                p += vec4(ws[at], ws[at + 1u], ws[at + 2u], ws[at + 3u]);
                p_transposed += vec4(ws[across], ws[across + C], ws[across + 2u * C], ws[across + 3u * C]);
                r += vec4(ws[of_r], ws[of_r + 1u], ws[of_r + 2u], ws[of_r + 3u]);
            }
            rows[e] = p;
            rows[C * DEPTH + e] = p_transposed;
            rows[2u * C * DEPTH + e] = r;
        }
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            let j = first + 4u * d;
            let ka = k_row(k0, j, len);
            let kb = k_row(k0, j + 1u, len);
            let kc = k_row(k0, j + 2u, len);
            let kd = k_row(k0, j + 3u, len);
            let qa = q_row(q0, j, len);
            let qb = q_row(q0, j + 1u, len);
            let qc = q_row(q0, j + 2u, len);
            let qd = q_row(q0, j + 3u, len);
            for (var r = 0u; r < ROWS; r++) {
                let row = (row0 + r) * DEPTH + d;
                let p = rows[row];
                let t = rows[C * DEPTH + row];
                let x = rows[2u * C * DEPTH + row];
                b[r] += p.x * ka + p.y * kb + p.z * kc + p.w * kd;
                a[r] += t.x * qa + t.y * qb + t.z * qc + t.w * qd;
                a[r] += x.x * ka + x.y * kb + x.z * kc + x.w * kd;
            }
        }
    }

    if L2NORM == 1u {
        // The norms are the same for all value heads.
        let norm0 = (cell.x * params.hv + head_of(head_k, 0u)) * WS + 5u * C * C + 4u * C; // rk, rq [C]
        for (var r = 0u; r < ROWS; r++) {
            put_part(tx * PART + row0 + r, dot(q_row(q0, row0 + r, len), b[r]));
        }
        workgroupBarrier();
        if lane < C {
            let norm = ws[norm0 + C + lane];
            dots[lane] = norm * norm * row_sum(lane);
        }
        workgroupBarrier();
        for (var r = 0u; r < ROWS; r++) {
            b[r] -= dots[row0 + r] * q_row(q0, row0 + r, len);
            put_part(tx * PART + row0 + r, dot(k_row(k0, row0 + r, len), a[r]));
        }
        workgroupBarrier();
        if lane < C {
            let norm = ws[norm0 + lane];
            dots[lane] = norm * norm * row_sum(lane);
        }
        workgroupBarrier();
        for (var r = 0u; r < ROWS; r++) {
            a[r] -= dots[row0 + r] * k_row(k0, row0 + r, len);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if row0 + r < len {
            store_dq4(dq0 + (row0 + r) * params.dq_stride, b[r]);
            store_dk4(dk0 + (row0 + r) * params.dk_stride, a[r]);
        }
    }
}
