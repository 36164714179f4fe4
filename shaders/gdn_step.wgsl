// The recurrence, token by token, for a few tokens of each sequence.
//
//   S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
//
// With S the state before the token and e = exp(g): d = beta (v - e S^T k) and o = s (e S^T q + (k . q) d), so that one
// pass over S and one exchange between threads serve both. Thread (ty, tx) of ROW_GROUPS x QUADS holds rows
// ty * ROWS .. + ROWS of columns 4 tx .. + 4 of S in registers.

@group(0) @binding(1) var<storage, read> q: array<u32>; // [T, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [T, k_stride]
@group(0) @binding(3) var<storage, read> v: array<u32>; // [T, v_stride]
@group(0) @binding(4) var<storage, read> g: array<f32>; // [T, Hv]
@group(0) @binding(5) var<storage, read> beta: array<f32>; // [T, Hv]
@group(0) @binding(6) var<storage, read> seqs: array<vec4<u32>>; // [N]: first token, tokens, slot, 0
@group(0) @binding(7) var<storage, read_write> state: array<vec4<f32>>; // [slots, Hv, K, V / 4]
@group(0) @binding(8) var<storage, read_write> o: array<u32>; // [T, o_stride]

const QUADS = DV_TILE / 4u;
const ROW_GROUPS = LANES / QUADS;
const ROWS = DK / ROW_GROUPS;

const_assert LANES == ROW_GROUPS * QUADS;
const_assert DK % (4u * ROW_GROUPS) == 0u;

// Per row group: S^T k and S^T q [DV_TILE], and (k.k, q.q, k.q, 0), over its rows.
var<workgroup> part_k: array<vec4<f32>, LANES>;
var<workgroup> part_q: array<vec4<f32>, LANES>;
var<workgroup> part_dots: array<vec4<f32>, ROW_GROUPS>;

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

@compute @workgroup_size(LANES)
fn gdn_step(thread: Thread) {
    let cell = cell_of(thread.group);
    let tx = thread.lane % QUADS;
    let ty = thread.lane / QUADS;
    let seq = seqs[cell.x];
    let head = cell.y;
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 4u * tx;

    var s: array<vec4<f32>, ROWS>;
    let state0 = (((seq.z * params.hv + head) * DK + ty * ROWS) * params.dv + column) / 4u;
    for (var r = 0u; r < ROWS; r++) {
        s[r] = state[state0 + r * (params.dv / 4u)];
    }
    for (var t = seq.x; t < seq.x + seq.y; t++) {
        let q0 = params.q_off + t * params.q_stride + head_k * DK + ty * ROWS;
        let k0 = params.k_off + t * params.k_stride + head_k * DK + ty * ROWS;
        var keys: array<vec4<f32>, ROWS / 4u>;
        var sk = vec4<f32>();
        var sq = vec4<f32>();
        var dots = vec4<f32>();
        for (var r = 0u; r < ROWS / 4u; r++) {
            let vk = k4(k0 + 4u * r);
            let vq = q4(q0 + 4u * r);
            keys[r] = vk;
            dots += vec4(dot(vk, vk), dot(vq, vq), dot(vk, vq), 0.0);
            sk += vk.x * s[4u * r] + vk.y * s[4u * r + 1u] + vk.z * s[4u * r + 2u] + vk.w * s[4u * r + 3u];
            sq += vq.x * s[4u * r] + vq.y * s[4u * r + 1u] + vq.z * s[4u * r + 2u] + vq.w * s[4u * r + 3u];
        }
        workgroupBarrier();
        part_k[thread.lane] = sk;
        part_q[thread.lane] = sq;
        if tx == 0u {
            part_dots[ty] = dots;
        }
        workgroupBarrier();
        sk = vec4<f32>();
        sq = vec4<f32>();
        dots = vec4<f32>();
        for (var r = 0u; r < ROW_GROUPS; r++) {
            sk += part_k[r * QUADS + tx];
            sq += part_q[r * QUADS + tx];
            dots += part_dots[r];
        }
        var norm_k = 1.0;
        var norm_q = 1.0;
        if L2NORM == 1u {
            norm_k = 1.0 / sqrt(dots.x + 1e-6);
            norm_q = 1.0 / sqrt(dots.y + 1e-6);
        }
        let e = exp(g[params.g_off + t * params.hv + head]);
        let vv = v4(params.v_off + t * params.v_stride + head * params.dv + column);
        let d = beta[params.g_off + t * params.hv + head] * (vv - e * norm_k * sk);
        if ty == 0u {
            let out = params.scale * norm_q * (e * sq + norm_k * dots.z * d);
            store_o4(params.o_off + t * params.o_stride + head * params.dv + column, out);
        }
        let kd = norm_k * d;
        for (var r = 0u; r < ROWS / 4u; r++) {
            let vk = keys[r];
            s[4u * r] = e * s[4u * r] + vk.x * kd;
            s[4u * r + 1u] = e * s[4u * r + 1u] + vk.y * kd;
            s[4u * r + 2u] = e * s[4u * r + 2u] + vk.z * kd;
            s[4u * r + 3u] = e * s[4u * r + 3u] + vk.w * kd;
        }
    }
    if STORE == 1u {
        for (var r = 0u; r < ROWS; r++) {
            state[state0 + r * (params.dv / 4u)] = s[r];
        }
    }
}
