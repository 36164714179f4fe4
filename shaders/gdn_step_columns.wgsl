// gdn_step for drivers that run threads as lanes of vector registers (see gdn_scan_columns.wgsl): a thread carries two
// whole columns of S and exchanges nothing; q and k are read at addresses that all threads share.
//
//   S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q

@group(0) @binding(1) var<storage, read> q: array<u32>; // [T, q_stride]
@group(0) @binding(2) var<storage, read> k: array<u32>; // [T, k_stride]
@group(0) @binding(3) var<storage, read> v: array<u32>; // [T, v_stride]
@group(0) @binding(4) var<storage, read> g: array<f32>; // [T, Hv]
@group(0) @binding(5) var<storage, read> beta: array<f32>; // [T, Hv]
@group(0) @binding(6) var<storage, read> seqs: array<vec4<u32>>; // [N]: first token, tokens, slot, 0
@group(0) @binding(7) var<storage, read_write> state: array<vec2<f32>>; // [slots, Hv, K, V / 2]
@group(0) @binding(8) var<storage, read_write> o: array<u32>; // [T, o_stride]

const_assert LANES == DV_TILE / 2u;
const_assert DK % 4u == 0u;

/// Four rows of S: [4, 2].
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

@compute @workgroup_size(LANES)
fn gdn_step(thread: Thread) {
    let cell = cell_of(thread.group);
    let seq = seqs[cell.x];
    let head = cell.y;
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 2u * thread.lane;

    var s: array<Four, DK / 4u>;
    let state0 = (((seq.z * params.hv + head) * DK) * params.dv + column) / 2u;
    let step = params.dv / 2u;
    for (var d = 0u; d < DK / 4u; d++) {
        let at = state0 + 4u * d * step;
        s[d] = Four(state[at], state[at + step], state[at + 2u * step], state[at + 3u * step]);
    }
    for (var t = seq.x; t < seq.x + seq.y; t++) {
        let q0 = params.q_off + t * params.q_stride + head_k * DK;
        let k0 = params.k_off + t * params.k_stride + head_k * DK;
        var sk = vec2<f32>();
        var sq = vec2<f32>();
        var kk = 0.0;
        var qq = 0.0;
        var kq = 0.0;
        for (var d = 0u; d < DK / 4u; d++) {
            let vk = k4(k0 + 4u * d);
            let vq = q4(q0 + 4u * d);
            sk += s[d] * vk;
            sq += s[d] * vq;
            kk += dot(vk, vk);
            qq += dot(vq, vq);
            kq += dot(vk, vq);
        }
        var norm_k = 1.0;
        var norm_q = 1.0;
        if L2NORM == 1u {
            norm_k = 1.0 / sqrt(kk + 1e-6);
            norm_q = 1.0 / sqrt(qq + 1e-6);
        }
        let e = exp(g[params.g_off + t * params.hv + head]);
        let x = v2(params.v_off + t * params.v_stride + head * params.dv + column);
        let delta = beta[params.g_off + t * params.hv + head] * (x - e * norm_k * sk);
        let out = params.scale * norm_q * (e * sq + norm_k * kq * delta);
        store_o2(params.o_off + t * params.o_stride + head * params.dv + column, out);
        let kd = norm_k * delta;
        for (var d = 0u; d < DK / 4u; d++) {
            let vk = k4(k0 + 4u * d);
            s[d] = e * s[d] + Four(vk.x * kd, vk.y * kd, vk.z * kd, vk.w * kd);
        }
    }
    if STORE == 1u {
        for (var d = 0u; d < DK / 4u; d++) {
            let at = state0 + 4u * d * step;
            state[at] = s[d][0];
            state[at + step] = s[d][1];
            state[at + 2u * step] = s[d][2];
            state[at + 3u * step] = s[d][3];
        }
    }
}
