// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b).

@group(0) @binding(1) var<storage, read> ab: array<f32>; // [T, stride]
@group(0) @binding(2) var<storage, read> a_log: array<f32>; // [Hv]
@group(0) @binding(3) var<storage, read> dt_bias: array<f32>; // [Hv]
@group(0) @binding(4) var<storage, read_write> g: array<f32>; // [T, Hv]
@group(0) @binding(5) var<storage, read_write> beta: array<f32>; // [T, Hv]

@compute @workgroup_size(LANES)
fn gate(thread: Thread) {
    let first = cell_of(thread.group).x * BLOCK;
    let end = min(params.tokens * params.hv, first + BLOCK);
    for (var i = first + thread.lane; i < end; i += LANES) {
        let t = i / params.hv;
        let h = i - t * params.hv;
        let row = t * params.stride + h;
        g[i] = -exp(a_log[h]) * softplus(ab[params.a_off + row] + dt_bias[h]);
        beta[i] = sigmoid(ab[params.b_off + row]);
    }
}
