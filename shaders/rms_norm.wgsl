// y[r] = x[row0 + r] * rsqrt(mean(x[row0 + r]^2) + eps) * w

@group(0) @binding(1) var<storage, read> x: array<f32>; // [row0 + rows, dim]
@group(0) @binding(2) var<storage, read> w: array<f32>; // [dim]
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [rows, dim]

@compute @workgroup_size(LANES)
fn rms_norm(thread: Thread) {
    let r = cell_of(thread.group).x;
    let x0 = (params.row0 + r) * params.dim;
    let y0 = r * params.dim;

    var sum = 0.0;
    for (var i = thread.lane; i < params.dim; i += LANES) {
        sum += x[x0 + i] * x[x0 + i];
    }
    let norm = inverseSqrt(reduce_sum(sum, thread) / f32(params.dim) + params.eps);
    for (var i = thread.lane; i < params.dim; i += LANES) {
        y[y0 + i] = x[x0 + i] * norm * w[i];
    }
}
