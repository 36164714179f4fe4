// da = -exp(A_log) sigmoid(a + dt_bias) dg, db = sigmoid(b) sigmoid(-b) dbeta, and the sums of dA_log and ddt_bias; a thread
// walks a block of tokens of one head.

@group(0) @binding(1) var<storage, read> ab: array<f32>; // [T, stride]
@group(0) @binding(2) var<storage, read> a_log: array<f32>; // [Hv]
@group(0) @binding(3) var<storage, read> dt_bias: array<f32>; // [Hv]
@group(0) @binding(4) var<storage, read> dg: array<f32>; // [T, Hv]
@group(0) @binding(5) var<storage, read> dbeta: array<f32>; // [T, Hv]
@group(0) @binding(6) var<storage, read_write> dab: array<f32>; // [T, d_stride]
@group(0) @binding(7) var<storage, read_write> part: array<f32>; // [cells, 2 Hv]

@compute @workgroup_size(LANES)
fn gate_grad(thread: Thread) {
    let cell = cell_of(thread.group);
    let h = cell.x * LANES + thread.lane;
    if h >= params.hv {
        return;
    }
    let rate = -exp(a_log[h]);
    let bias = dt_bias[h];
    let first = cell.y * params.block;
    let end = min(params.tokens, first + params.block);
    var sums = vec2<f32>();
    for (var t = first; t < end; t++) {
        let row = t * params.stride + h;
        let a = ab[params.a_off + row] + bias;
        let b = ab[params.b_off + row];
        let d = rate * dg[t * params.hv + h];
        // Above 20, where softplus is the identity, sigmoid is 1.
        let da = d * sigmoid(a);
        let d_row = t * params.d_stride + h;
        dab[params.da_off + d_row] = da;
        // 1 - sigmoid(b) would lose the digits of a small difference.
        dab[params.db_off + d_row] = sigmoid(b) * sigmoid(-b) * dbeta[t * params.hv + h];
        sums += vec2(d * softplus(a), da);
    }
    part[cell.y * 2u * params.hv + h] = sums.x;
    part[(cell.y * 2u + 1u) * params.hv + h] = sums.y;
}
