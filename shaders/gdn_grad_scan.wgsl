// Carries the gradient of one head's state over the chunks of one segment, last to first, for DV_TILE columns.
//
//   dN = n o (K dS') + P^T dO     X = B^T dN     dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z, Z = o o dO
//
// Threads form a grid of ROW_GROUPS x QUADS as in gdn_scan.wgsl; thread (ty, tx) holds rows ty * ROWS .. + ROWS of columns
// 4 tx .. + 4 of dS in registers, and computes rows ty + t * ROW_GROUPS of the [C, DV_TILE] products.
//
// WALK = 1: the walk of each head; 2: the same from zero, and nothing is saved.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [window, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [window, k_stride]
@group(0) @binding(3) var<storage, read> d_o: array<u32>; // [window, do_stride]
@group(0) @binding(4) var<storage, read> ws: array<f32>; // [chunks, Hv, 5 C C + 9 C]
@group(0) @binding(5) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(6) var<storage, read> segments: array<vec4<u32>>; // [segments] or walks [segments, Hv]
@group(0) @binding(7) var<storage, read_write> dstate: array<vec4<f32>>; // [slots, Hv, K, V / 4]
@group(0) @binding(8) var<storage, read_write> dsaved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]

const C = CHUNK;
const QUADS = DV_TILE / 4u;
const ROW_GROUPS = LANES / QUADS;
const ROWS = DK / ROW_GROUPS;
const TOKENS = (C + ROW_GROUPS - 1u) / ROW_GROUPS;
const DEPTH = 16u + 16u * u32(DK % 32u == 0u);
// Tokens of q and of k in a slice for the update of dS.
const SLICE = max(C * DEPTH / (2u * DK), 1u);

const_assert C == 16u || C == 32u;
const_assert DV_TILE % 16u == 0u;
const_assert LANES == ROW_GROUPS * QUADS;
const_assert DK % (4u * ROW_GROUPS) == 0u;

// K: [C, DEPTH], then dN: [C, DV_TILE], then K and Q: [SLICE, DK] each
var<workgroup> tile_k: array<vec4<f32>, max(max(C * DEPTH / 4u, C * QUADS), SLICE * DK / 2u)>;
var<workgroup> tile_s: array<vec4<f32>, max(DEPTH, C) * QUADS>; // dS: [DEPTH, DV_TILE], then -u o beta o X: [C, DV_TILE]
var<workgroup> tile_o: array<vec4<f32>, C * QUADS>; // dO, then Z: [C, DV_TILE]

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

fn do4(i: u32) -> vec4<f32> {
    if V_TYPE == F32 {
        return bitcast<vec4<f32>>(vec4(d_o[i], d_o[i + 1u], d_o[i + 2u], d_o[i + 3u]));
    }
    let at = i >> 1u;
    return vec4(unpack_pair(V_TYPE, d_o[at]), unpack_pair(V_TYPE, d_o[at + 1u]));
}

@compute @workgroup_size(LANES)
fn gdn_grad_scan(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let tx = lane % QUADS;
    let ty = lane / QUADS;
    let head = cell.y;
    let walk = walk_of(WALK, segments[select(cell.x, cell.x * params.hv + head, WALK > 0u)]);
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 4u * tx;
    let row = params.dv / 4u;

    // dS [ROWS, 4]
    var s: array<vec4<f32>, ROWS>;
    let state0 = ((head * DK + ty * ROWS) * params.dv + column) / 4u;
    let slot = params.hv * DK * row;
    for (var r = 0u; r < ROWS; r++) {
        s[r] = vec4<f32>();
        if WALK < 2u && walk.chunks > 0u {
            s[r] = dstate[state0 + walk.slot * slot + r * row];
        }
    }

    let end = min(walk.first + walk.chunks, arrayLength(&chunks));
    for (var at = end; at > walk.first; at--) {
        let chunk = chunks[at - 1u];
        let len = min(chunk.y, C);
        let q0 = params.q_off + chunk.x * params.q_stride + head_k * DK;
        let k0 = params.k_off + chunk.x * params.k_stride + head_k * DK;
        let do0 = params.do_off + chunk.x * params.do_stride + head * params.dv + column;
        let cell0 = (at - 1u) * params.hv + head;
        let p0 = cell0 * (5u * C * C + 9u * C) + C * C; // P [C, C]
        let u0 = p0 + C * C; // u, o, n, gamma_C [C] each
        let b0 = u0 + 4u * C; // B [C, C]
        let beta0 = b0 + 3u * C * C + 2u * C; // beta [C]
        let saved0 = (cell0 * (DK + 2u * C) * params.dv + column) / 4u; // dS' [K, V / 4], X, Z [C, V / 4]
        let ds0 = saved0 + ty * ROWS * row;
        let x0 = saved0 + DK * row;

        if WALK != 2u {
            for (var r = 0u; r < ROWS; r++) {
                dsaved[ds0 + r * row] = s[r];
            }
        }
        // kds = K dS' [TOKENS, 4]
        var kds: array<vec4<f32>, TOKENS>;
        for (var t = 0u; t < TOKENS; t++) {
            kds[t] = vec4<f32>();
        }
        for (var depth = 0u; depth < DK; depth += DEPTH) {
            workgroupBarrier();
            for (var e = lane; e < C * DEPTH / 4u; e += LANES) {
                let i = e / (DEPTH / 4u);
                var vk = vec4<f32>();
                if i < len {
                    vk = k4(k0 + i * params.k_stride + depth + 4u * (e % (DEPTH / 4u)));
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
            if depth == 0u {
                for (var i = ty; i < C; i += ROW_GROUPS) {
                    var x = vec4<f32>();
                    if i < len {
                        x = do4(do0 + i * params.do_stride);
                    }
                    tile_o[i * QUADS + tx] = x;
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
                    kds[t] += vk.x * s0 + vk.y * s1 + vk.z * s2 + vk.w * s3;
                }
            }
        }
        workgroupBarrier();
        // dN = n o (K dS') + P^T dO; P is lower triangular
        for (var t = 0u; t < TOKENS; t++) {
            let i = ty + t * ROW_GROUPS;
            if i < C {
                var dn = ws[u0 + 2u * C + i] * kds[t];
                for (var j = i; j < len; j++) {
                    dn += ws[p0 + j * C + i] * tile_o[j * QUADS + tx];
                }
                tile_k[i * QUADS + tx] = dn;
            }
        }
        workgroupBarrier();
        // X = B^T dN, Z = o o dO; B is lower triangular
        for (var t = 0u; t < TOKENS; t++) {
            let i = ty + t * ROW_GROUPS;
            if i < C {
                var x = vec4<f32>();
                for (var j = i; j < len; j++) {
                    x += ws[b0 + j * C + i] * tile_k[j * QUADS + tx];
                }
                tile_s[i * QUADS + tx] = -(ws[u0 + i] * ws[beta0 + i]) * x;
                let z = ws[u0 + C + i] * tile_o[i * QUADS + tx];
                if WALK != 2u {
                    dsaved[x0 + i * row] = x;
                    dsaved[x0 + (C + i) * row] = z;
                }
                tile_o[i * QUADS + tx] = z;
            }
        }
        // dS = gamma_C dS' - K^T (u o beta o X) + Q^T Z
        let gamma = ws[u0 + 3u * C];
        for (var r = 0u; r < ROWS; r++) {
            s[r] *= gamma;
        }
        for (var first = 0u; first < len; first += SLICE) {
            let count = min(SLICE, len - first);
            workgroupBarrier();
            for (var e = lane; e < count * (DK / 4u); e += LANES) {
                let i = first + e / (DK / 4u);
                let col = 4u * (e % (DK / 4u));
                tile_k[e] = k4(k0 + i * params.k_stride + col);
                tile_k[SLICE * DK / 4u + e] = q4(q0 + i * params.q_stride + col);
            }
            workgroupBarrier();
            for (var i = 0u; i < count; i++) {
                let x = tile_s[(first + i) * QUADS + tx];
                let g = tile_o[(first + i) * QUADS + tx];
                for (var r = 0u; r < ROWS / 4u; r++) {
                    let col = i * (DK / 4u) + ty * (ROWS / 4u) + r;
                    let vk = tile_k[col];
                    let vq = tile_k[SLICE * DK / 4u + col];
                    s[4u * r] += vk.x * x + vq.x * g;
                    s[4u * r + 1u] += vk.y * x + vq.y * g;
                    s[4u * r + 2u] += vk.z * x + vq.z * g;
                    s[4u * r + 3u] += vk.w * x + vq.w * g;
                }
            }
        }
    }
    if walk.chunks > 0u {
        for (var r = 0u; r < ROWS; r++) {
            dstate[state0 + walk.to * slot + r * row] = s[r];
        }
    }
}
