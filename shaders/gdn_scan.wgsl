// Carries the state of one head over the chunks of one segment, for DV_TILE columns.
//
//   W = V - u o (K S)        N = A W
//   O = o o (Q S) + P N      S <- gamma_C S + K^T (n o N)
//
// SAVE = 1: S before the chunk, U = u o (K S) and N go into o instead of O. SAVE = 2: neither.
// WALK = 1: the walk of each head; 2: the same from zero; 3: from the identity with v = 0, for heads with a transition.
//
// Threads form a grid of ROW_GROUPS x QUADS; thread (ty, tx) holds rows ty * ROWS .. + ROWS of columns 4 tx .. + 4 of S in
// registers, and computes rows ty + t * ROW_GROUPS of the [C, DV_TILE] products. K and Q pass through workgroup memory in
// slices: of DEPTH columns for the products with S, of SLICE tokens for the update of S.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read> v: array<u32>; // [window, v_stride]
@group(0) @binding(4) var<storage, read> ws: array<vec4<f32>>; // [chunks, Hv, WS]
@group(0) @binding(5) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(6) var<storage, read> segments: array<vec4<u32>>; // [segments] or walks [segments, Hv]
@group(0) @binding(7) var<storage, read_write> state: array<vec4<f32>>; // [slots, Hv, K, V / 4]
@group(0) @binding(8) var<storage, read_write> o: array<u32>; // [window, o_stride] or [chunks, Hv, K V + 2 C V]

const C = CHUNK;
const WS = select(2u * C * C + 4u * C, 5u * C * C + 9u * C, GRAD == 1u) / 4u;
const QUADS = DV_TILE / 4u;
const ROW_GROUPS = LANES / QUADS;
const ROWS = DK / ROW_GROUPS;
const TOKENS = (C + ROW_GROUPS - 1u) / ROW_GROUPS;
const DEPTH = 16u + 16u * u32(DK % 32u == 0u);
const SLICE = C * DEPTH / DK;

const_assert C == 16u || C == 32u;
const_assert DV_TILE % 16u == 0u;
const_assert LANES == ROW_GROUPS * QUADS;
const_assert DK % (4u * ROW_GROUPS) == 0u;
const_assert SLICE > 0u;

var<workgroup> tile_k: array<vec4<f32>, C * DEPTH / 4u>; // K: [C, DEPTH] or [SLICE, DK]
var<workgroup> tile_q: array<vec4<f32>, max(C * DEPTH / 4u, C * QUADS)>; // Q: [C, DEPTH], then N: [C, DV_TILE]
var<workgroup> tile_s: array<vec4<f32>, max(DEPTH, C) * QUADS>; // S: [DEPTH, DV_TILE], then W: [C, DV_TILE]

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

fn v4(i: u32) -> vec4<f32> {
    if V_TYPE == F32 {
        return bitcast<vec4<f32>>(vec4(v[i], v[i + 1u], v[i + 2u], v[i + 3u]));
    }
    let at = i >> 1u;
    return vec4(unpack_pair(V_TYPE, v[at]), unpack_pair(V_TYPE, v[at + 1u]));
}

fn store_o4(i: u32, x: vec4<f32>) {
    if V_TYPE == F32 {
        let bits = bitcast<vec4<u32>>(x);
        o[i] = bits.x;
        o[i + 1u] = bits.y;
        o[i + 2u] = bits.z;
        o[i + 3u] = bits.w;
    } else {
        o[i >> 1u] = pack_pair(V_TYPE, x.xy);
        o[(i >> 1u) + 1u] = pack_pair(V_TYPE, x.zw);
    }
}

/// Four numbers that the backward pass needs.
fn save4(i: u32, x: vec4<f32>) {
    let bits = bitcast<vec4<u32>>(x);
    o[i] = bits.x;
    o[i + 1u] = bits.y;
    o[i + 2u] = bits.z;
    o[i + 3u] = bits.w;
}

@compute @workgroup_size(LANES)
fn gdn_scan(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let tx = lane % QUADS;
    let ty = lane / QUADS;
    let head = cell.y;
    let walk = walk_of(WALK, segments[select(cell.x, cell.x * params.hv + head, WALK > 0u)]);
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 4u * tx;

    // S [ROWS, 4]
    var s: array<vec4<f32>, ROWS>;
    let state0 = ((head * DK + ty * ROWS) * params.dv + column) / 4u;
    let slot = params.hv * DK * params.dv / 4u;
    for (var r = 0u; r < ROWS; r++) {
        s[r] = vec4<f32>();
        if WALK < 2u && walk.chunks > 0u {
            s[r] = state[state0 + walk.slot * slot + r * (params.dv / 4u)];
        }
        if WALK == 3u {
            s[r] = vec4<f32>(vec4(ty * ROWS + r) == column + vec4(0u, 1u, 2u, 3u));
        }
    }

    let end = min(walk.first + walk.chunks, arrayLength(&chunks));
    for (var at = walk.first; at < end; at++) {
        let chunk = chunks[at];
        let len = min(chunk.y, C);
        let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK;
        let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK;
        let v0 = params.v_off + chunk.x * params.v_stride + head * params.dv + column;
        let o0 = params.o_off + chunk.x * params.o_stride + head * params.dv + column;
        let a0 = (at * params.hv + head) * WS; // A [C, C / 4]
        let p0 = a0 + C * C / 4u; // P [C, C / 4]
        let u0 = p0 + C * C / 4u; // u, o, n, gamma_C [C / 4] each

        let saved0 = (at * params.hv + head) * (DK + 2u * C) * params.dv + column; // S [K, V]
        let u_saved0 = saved0 + DK * params.dv; // U [C, V], N [C, V]
        if SAVE == 1u {
            for (var r = 0u; r < ROWS; r++) {
                save4(saved0 + (ty * ROWS + r) * params.dv, s[r]);
            }
        }

        // ks = K S, qs = Q S [TOKENS, 4]
        var ks: array<vec4<f32>, TOKENS>;
        var qs: array<vec4<f32>, TOKENS>;
        for (var t = 0u; t < TOKENS; t++) {
            ks[t] = vec4<f32>();
            qs[t] = vec4<f32>();
        }
        for (var depth = 0u; depth < DK; depth += DEPTH) {
            workgroupBarrier();
            for (var e = lane; e < C * DEPTH / 4u; e += LANES) {
                let row = e / (DEPTH / 4u);
                let col = depth + 4u * (e % (DEPTH / 4u));
                var vq = vec4<f32>();
                var vk = vec4<f32>();
                if row < len {
                    if SAVE == 0u {
                        vq = q4(q0 + row * params.q_stride + col);
                    }
                    vk = k4(k0 + row * params.k_stride + col);
                }
                if SAVE == 0u {
                    tile_q[e] = vq;
                }
                tile_k[e] = vk;
            }
            for (var r = 0u; r < ROWS; r++) {
                // Rows before the slice wrap around to large numbers.
                let d = ty * ROWS + r - depth;
                if d < DEPTH {
                    tile_s[d * QUADS + tx] = s[r];
                }
            }
            workgroupBarrier();
            for (var d = 0u; d < DEPTH / 4u; d++) {
                let s0 = tile_s[(4u * d) * QUADS + tx];
                let s1 = tile_s[(4u * d + 1u) * QUADS + tx];
                let s2 = tile_s[(4u * d + 2u) * QUADS + tx];
                let s3 = tile_s[(4u * d + 3u) * QUADS + tx];
                for (var t = 0u; t < TOKENS; t++) {
                    let i = min(ty + t * ROW_GROUPS, C - 1u);
                    let vk = tile_k[i * (DEPTH / 4u) + d];
                    ks[t] += vk.x * s0 + vk.y * s1 + vk.z * s2 + vk.w * s3;
                    if SAVE == 0u {
                        let vq = tile_q[i * (DEPTH / 4u) + d];
                        qs[t] += vq.x * s0 + vq.y * s1 + vq.z * s2 + vq.w * s3;
                    }
                }
            }
        }
        workgroupBarrier();
        // W = V - u o (K S)
        for (var t = 0u; t < TOKENS; t++) {
            let i = ty + t * ROW_GROUPS;
            if i < C {
                var w = vec4<f32>();
                var u = vec4<f32>();
                if i < len {
                    u = ws[u0 + i / 4u][i % 4u] * ks[t];
                    w = -u;
                    if WALK != 3u {
                        w += v4(v0 + i * params.v_stride);
                    }
                }
                tile_s[i * QUADS + tx] = w;
                if SAVE == 1u {
                    save4(u_saved0 + i * params.dv, u);
                }
            }
        }
        workgroupBarrier();
        // N = A W; A is lower triangular
        for (var t = 0u; t < TOKENS; t++) {
            let i = ty + t * ROW_GROUPS;
            if i < C {
                var n = vec4<f32>();
                for (var j = 0u; j <= i / 4u; j++) {
                    let a = ws[a0 + i * (C / 4u) + j];
                    n += a.x * tile_s[(4u * j) * QUADS + tx] + a.y * tile_s[(4u * j + 1u) * QUADS + tx]
                        + a.z * tile_s[(4u * j + 2u) * QUADS + tx] + a.w * tile_s[(4u * j + 3u) * QUADS + tx];
                }
                tile_q[i * QUADS + tx] = n;
                if SAVE == 1u {
                    save4(u_saved0 + (C + i) * params.dv, n);
                }
            }
        }
        workgroupBarrier();
        // O = o o (Q S) + P N; P is lower triangular
        for (var t = 0u; t < TOKENS; t++) {
            let i = ty + t * ROW_GROUPS;
            if SAVE == 0u && i < len {
                var out = ws[u0 + C / 4u + i / 4u][i % 4u] * qs[t];
                for (var j = 0u; j <= i / 4u; j++) {
                    let p = ws[p0 + i * (C / 4u) + j];
                    out += p.x * tile_q[(4u * j) * QUADS + tx] + p.y * tile_q[(4u * j + 1u) * QUADS + tx]
                        + p.z * tile_q[(4u * j + 2u) * QUADS + tx] + p.w * tile_q[(4u * j + 3u) * QUADS + tx];
                }
                store_o4(o0 + i * params.o_stride, out);
            }
        }
        // S <- gamma_C S + K^T (n o N)
        let gamma = ws[u0 + 3u * (C / 4u)].x;
        for (var r = 0u; r < ROWS; r++) {
            s[r] *= gamma;
        }
        for (var first = 0u; first < len; first += SLICE) {
            let count = min(SLICE, len - first);
            workgroupBarrier();
            for (var e = lane; e < count * (DK / 4u); e += LANES) {
                let i = first + e / (DK / 4u);
                let vk = k4(k0 + i * params.k_stride + 4u * (e % (DK / 4u)));
                tile_k[e] = ws[u0 + 2u * (C / 4u) + i / 4u][i % 4u] * vk;
            }
            workgroupBarrier();
            for (var i = 0u; i < count; i++) {
                let n = tile_q[(first + i) * QUADS + tx];
                for (var r = 0u; r < ROWS / 4u; r++) {
                    let vk = tile_k[i * (DK / 4u) + ty * (ROWS / 4u) + r];
                    s[4u * r] += vk.x * n;
                    s[4u * r + 1u] += vk.y * n;
                    s[4u * r + 2u] += vk.z * n;
                    s[4u * r + 3u] += vk.w * n;
                }
            }
        }
    }
    if walk.chunks > 0u {
        for (var r = 0u; r < ROWS; r++) {
            state[state0 + walk.to * slot + r * (params.dv / 4u)] = s[r];
        }
    }
}
