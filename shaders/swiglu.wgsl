// y = silu(gate) * up

@group(0) @binding(1) var<storage, read> gate_up: array<f32>; // [rows, 2 dim]: gate, then up
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [rows, dim]

@compute @workgroup_size(LANES)
fn swiglu(thread: Thread) {
    let first = cell_of(thread.group).x * BLOCK;
    let end = min(first + BLOCK, params.rows * params.dim);
    for (var i = first + thread.lane; i < end; i += LANES) {
        let g = i + i / params.dim * params.dim;
        y[i] = silu(gate_up[g]) * gate_up[g + params.dim];
    }
}
