// y = o * rsqrt(mean(o^2) + eps) * w * silu(z) over the V numbers of a head.

@group(0) @binding(1) var<storage, read> o: array<f32>; // [T, Hv, V]
@group(0) @binding(2) var<storage, read> z: array<f32>; // [T, z_stride]
@group(0) @binding(3) var<storage, read> w: array<f32>; // [V]
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [T, Hv, V]

@compute @workgroup_size(LANES)
fn gated_norm(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.x;
    let t = cell.y;
    let o0 = (t * params.hv + head) * DV;
    let z0 = params.z_off + t * params.z_stride + head * DV;

    var sum = 0.0;
    for (var i = thread.lane; i < DV; i += LANES) {
        sum += o[o0 + i] * o[o0 + i];
    }
    let norm = inverseSqrt(reduce_sum(sum, thread) / f32(DV) + params.eps);
    for (var i = thread.lane; i < DV; i += LANES) {
        y[o0 + i] = o[o0 + i] * norm * w[i] * silu(z[z0 + i]);
    }
}
