// Merges the partial results of attend and applies the output gate.
//
// m = max m_s    y = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s * sigmoid(gate)

@group(0) @binding(1) var<storage, read> part: array<f32>; // [T, heads, slots, D + 2]: m, l, acc
@group(0) @binding(2) var<storage, read> qkv: array<f32>; // [T, qkv_stride]; the gate of head h is at (2 h + 1) D
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [T, heads D]

// Threads along D, numbers of D of a thread, and groups of threads that share the slots.
const COLUMNS = min(LANES, select(16u, 64u, DIM % 64u == 0u));
const OWN = DIM / COLUMNS;
const GROUPS = LANES / COLUMNS;
const_assert DIM % COLUMNS == 0u && LANES % COLUMNS == 0u;

var<workgroup> sums: array<f32, GROUPS * DIM>;

@compute @workgroup_size(LANES)
fn attend_merge(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.x;
    let t = cell.y;
    let first = (t * params.heads + head) * params.slots * (DIM + 2u);
    let gate = t * params.qkv_stride + (2u * head + 1u) * DIM;
    let to = (t * params.heads + head) * DIM;

    var most = -3e38;
    for (var s = thread.lane; s < params.slots; s += LANES) {
        most = max(most, part[first + s * (DIM + 2u)]);
    }
    most = reduce_max(most, thread);
    var total = 0.0;
    for (var s = thread.lane; s < params.slots; s += LANES) {
        let at = first + s * (DIM + 2u);
        total += exp(part[at] - most) * part[at + 1u];
    }
    total = reduce_sum(total, thread);

    let column = thread.lane % COLUMNS;
    let group = thread.lane / COLUMNS;
    var own: array<f32, OWN>;
    for (var i = 0u; i < OWN; i++) {
        own[i] = 0.0;
    }
    for (var s = group; s < params.slots; s += GROUPS) {
        let at = first + s * (DIM + 2u);
        let weight = exp(part[at] - most);
        for (var i = 0u; i < OWN; i++) {
            own[i] += weight * part[at + 2u + column + i * COLUMNS];
        }
    }
    for (var i = 0u; i < OWN; i++) {
        sums[group * DIM + column + i * COLUMNS] = own[i];
    }
    workgroupBarrier();
    for (var i = thread.lane; i < DIM; i += LANES) {
        var sum = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            sum += sums[g * DIM + i];
        }
        // A token that sees no key gets 0.
        y[to + i] = select(sum / total, 0.0, total == 0.0) * sigmoid(qkv[gate + i]);
    }
}
