// Merges the partial results of attend and applies the output gate.
//
// m = max m_s    y = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s * sigmoid(gate)

@group(0) @binding(1) var<storage, read> part: array<f32>; // [T, heads, slots, D + 2]: m, l, acc
@group(0) @binding(2) var<storage, read> qkv: array<f32>; // [T, qkv_stride]; the gate of head h is at (2 h + 1) D
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [T, heads D]

@compute @workgroup_size(LANES)
fn attend_merge(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.x;
    let t = cell.y;
    let first = (t * params.heads + head) * params.slots * (DIM + 2u);
    let gate = t * params.qkv_stride + (2u * head + 1u) * DIM;
    let to = (t * params.heads + head) * DIM;

    var most = part[first];
    for (var s = 1u; s < params.slots; s++) {
        most = max(most, part[first + s * (DIM + 2u)]);
    }
    var total = 0.0;
    for (var s = 0u; s < params.slots; s++) {
        let at = first + s * (DIM + 2u);
        total += exp(part[at] - most) * part[at + 1u];
    }
    for (var i = thread.lane; i < DIM; i += LANES) {
        var sum = 0.0;
        for (var s = 0u; s < params.slots; s++) {
            let at = first + s * (DIM + 2u);
            sum += exp(part[at] - most) * part[at + 2u + i];
        }
        // A token that sees no key gets 0.
        y[to + i] = select(sum / total, 0.0, total == 0.0) * sigmoid(qkv[gate + i]);
    }
}
