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
const_assert DK % 8u == 0u;

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

/// k d^T for four rows.
fn rows(k: vec4<f32>, d: vec2<f32>) -> Four {
    return Four(k.x * d, k.y * d, k.z * d, k.w * d);
}

@compute @workgroup_size(LANES)
fn gdn_step(thread: Thread) {
    let cell = cell_of(thread.group);
    let seq = seqs[cell.x];
    let head = cell.y;
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let column = cell.z * DV_TILE + 2u * thread.lane;

    // K / 4, as a number that compilers do not know: they would unroll the loops to some hundred KB of code.
    let depth = min(DK / 4u, arrayLength(&state));
    var s: array<Four, DK / 4u>;
    let state0 = (((seq.z * params.hv + head) * DK) * params.dv + column) / 2u;
    let step = params.dv / 2u;
    for (var d = 0u; d < depth; d++) {
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
        for (var d = 0u; d < depth; d += 2u) {
            let vk = k_pair(k0 + 4u * d, k0 + 4u * d + 4u, thread);
            let vq = q_pair(q0 + 4u * d, q0 + 4u * d + 4u, thread);
            let low = s[d];
            let high = s[d + 1u];
            sk += low * vk[0] + high * vk[1];
            sq += low * vq[0] + high * vq[1];
            kk += dot(vk[0], vk[0]) + dot(vk[1], vk[1]);
            qq += dot(vq[0], vq[0]) + dot(vq[1], vq[1]);
            kq += dot(vk[0], vq[0]) + dot(vk[1], vq[1]);
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
        for (var d = 0u; d < depth; d += 2u) {
            let vk = k_pair(k0 + 4u * d, k0 + 4u * d + 4u, thread);
            s[d] = e * s[d] + rows(vk[0], kd);
            s[d + 1u] = e * s[d + 1u] + rows(vk[1], kd);
        }
    }
    if STORE == 1u {
        for (var d = 0u; d < depth; d++) {
            let at = state0 + 4u * d * step;
            state[at] = s[d][0];
            state[at + step] = s[d][1];
            state[at + 2u * step] = s[d][2];
            state[at + 3u * step] = s[d][3];
        }
    }
}
