// Gradients of y = o * rsqrt(mean(o^2) + eps) * w * silu(z); a workgroup takes head after head, a thread the same columns of
// each.

@group(0) @binding(1) var<storage, read> o: array<f32>; // [T, Hv, V]
@group(0) @binding(2) var<storage, read> z: array<f32>; // [T, z_stride]
@group(0) @binding(3) var<storage, read> w: array<f32>; // [V]
@group(0) @binding(4) var<storage, read> dy: array<f32>; // [T, Hv, V]
@group(0) @binding(5) var<storage, read_write> d_o: array<f32>; // [T, Hv, V]
@group(0) @binding(6) var<storage, read_write> dz: array<f32>; // [T, dz_stride]
@group(0) @binding(7) var<storage, read_write> part: array<f32>; // [cells, V]

// Columns of a thread.
const WIDE = (DV + LANES - 1u) / LANES;

@compute @workgroup_size(LANES)
fn gated_norm_grad(thread: Thread) {
    let cell = cell_of(thread.group).x;
    let lane = thread.lane;
    let first = cell * params.block;
    let end = min(params.tokens * params.hv, first + params.block);

    var weight: array<f32, WIDE>;
    var dweight: array<f32, WIDE>;
    for (var k = 0u; k < WIDE; k++) {
        let i = k * LANES + lane;
        weight[k] = 0.0;
        dweight[k] = 0.0;
        if i < DV {
            weight[k] = w[i];
        }
    }
    for (var row = first; row < end; row++) {
        let t = row / params.hv;
        let column = (row - t * params.hv) * DV;
        let z0 = params.z_off + t * params.z_stride + column;
        let dz0 = params.dz_off + t * params.dz_stride + column;
        // o, dy silu(z), dy silu'(z)
        var own: array<vec3<f32>, WIDE>;
        // sum o^2, sum o u
        var sums = vec4<f32>();
        for (var k = 0u; k < WIDE; k++) {
            let i = k * LANES + lane;
            own[k] = vec3<f32>();
            if i < DV {
                let gate = z[z0 + i];
                own[k] = vec3(o[row * DV + i], dy[row * DV + i] * vec2(silu(gate), silu_slope(gate)));
                sums += vec4(own[k].x * own[k].x, own[k].x * own[k].y * weight[k], 0.0, 0.0);
            }
        }
        sums = reduce_sum4(sums, thread) / f32(DV);
        let norm = inverseSqrt(sums.x + params.eps);
        let pull = norm * norm * sums.y;
        for (var k = 0u; k < WIDE; k++) {
            let i = k * LANES + lane;
            if i < DV {
                let x = own[k].x * norm;
                d_o[row * DV + i] = norm * (own[k].y * weight[k] - pull * own[k].x);
                dz[dz0 + i] = own[k].z * weight[k] * x;
                dweight[k] += own[k].y * x;
            }
        }
    }
    for (var k = 0u; k < WIDE; k++) {
        let i = k * LANES + lane;
        if i < DV {
            part[cell * DV + i] = dweight[k];
        }
    }
}
