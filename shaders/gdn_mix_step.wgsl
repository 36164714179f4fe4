// One decoded token of a mixer after its convolution, fused: L2 norm, gates, recurrence, gated norm.
//
// As gdn_step, but the state of the whole head stays in device memory: it is read twice (for S^T k and S^T q, then for its
// update), the second time from a cache. Thread (ty, tx) takes rows ty, ty + ROW_GROUPS, ... of columns 4 tx .. + 4.

@group(0) @binding(1) var<storage, read> qkv: array<f32>; // [N, qkv_stride]: q [Hk K], k [Hk K], v [Hv V]
@group(0) @binding(2) var<storage, read> proj: array<f32>; // [N, p_stride]: z [Hv V], a [Hv], b [Hv]
@group(0) @binding(3) var<storage, read> small: array<f32>; // [2 Hv + V]: A_log, dt_bias, norm weight
@group(0) @binding(4) var<storage, read> seqs: array<vec4<u32>>; // [N]: first token, tokens, slot, 0
@group(0) @binding(5) var<storage, read_write> state: array<vec4<f32>>; // [slots, Hv, K, V / 4]
@group(0) @binding(6) var<storage, read_write> y: array<f32>; // [T, Hv V]

const QUADS = DV / 4u;
const ROW_GROUPS = LANES / QUADS;

const_assert ROW_GROUPS > 0u;

var<workgroup> part_k: array<vec4<f32>, LANES>;
var<workgroup> part_q: array<vec4<f32>, LANES>;

@compute @workgroup_size(LANES)
fn gdn_mix_step(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let tx = lane % QUADS;
    let ty = lane / QUADS;
    let works = ty < ROW_GROUPS;
    let seq = seqs[cell.x];
    let head = cell.y;
    let head_k = select(head % params.hk, head / (params.hv / params.hk), params.head_map == 0u);
    let state0 = (seq.z * params.hv + head) * DK * QUADS + tx;

    for (var t = seq.x; t < seq.x + seq.y; t++) {
        let q0 = t * params.qkv_stride + head_k * DK;
        let k0 = q0 + params.hk * DK;
        let v0 = t * params.qkv_stride + 2u * params.hk * DK + head * DV + 4u * tx;
        let p0 = t * params.p_stride;

        var dots = vec4<f32>();
        for (var i = lane; i < DK; i += LANES) {
            let x = vec2(qkv[k0 + i], qkv[q0 + i]);
            dots += vec4(x.x * x.x, x.y * x.y, x.x * x.y, 0.0);
        }
        dots = reduce_sum4(dots, thread);
        var sk = vec4<f32>();
        var sq = vec4<f32>();
        if works {
            for (var r = ty; r < DK; r += ROW_GROUPS) {
                let s = state[state0 + r * QUADS];
                sk += qkv[k0 + r] * s;
                sq += qkv[q0 + r] * s;
            }
        }
        part_k[lane] = sk;
        part_q[lane] = sq;
        workgroupBarrier();
        sk = vec4<f32>();
        sq = vec4<f32>();
        for (var r = 0u; r < ROW_GROUPS; r++) {
            sk += part_k[r * QUADS + tx];
            sq += part_q[r * QUADS + tx];
        }
        let norm_k = 1.0 / sqrt(dots.x + 1e-6);
        let norm_q = 1.0 / sqrt(dots.y + 1e-6);
        let a = proj[p0 + params.a_off + head] + small[params.hv + head];
        let e = exp(-exp(small[head]) * softplus(a));
        let beta = sigmoid(proj[p0 + params.b_off + head]);
        let v = vec4(qkv[v0], qkv[v0 + 1u], qkv[v0 + 2u], qkv[v0 + 3u]);
        let d = beta * (v - e * norm_k * sk);
        let o = params.scale * norm_q * (e * sq + norm_k * dots.z * d);
        let kd = norm_k * d;
        if works {
            for (var r = ty; r < DK; r += ROW_GROUPS) {
                let i = state0 + r * QUADS;
                state[i] = e * state[i] + qkv[k0 + r] * kd;
            }
        }
        let square = reduce_sum(select(0.0, dot(o, o), ty == 0u), thread);
        if ty == 0u {
            let norm = 1.0 / sqrt(square / f32(DV) + params.eps);
            for (var c = 0u; c < 4u; c++) {
                let i = 4u * tx + c;
                let z = proj[p0 + params.z_off + head * DV + i];
                y[(t * params.hv + head) * DV + i] = o[c] * norm * small[2u * params.hv + i] * silu(z);
            }
        }
    }
}
