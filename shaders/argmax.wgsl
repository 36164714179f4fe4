// The index of the largest number of a row; the smallest index among equals; NaN never wins.

@group(0) @binding(1) var<storage, read> x: array<f32>; // [rows, n]
@group(0) @binding(2) var<storage, read_write> ids: array<u32>; // [rows]

var<workgroup> best_value: array<f32, LANES>;
var<workgroup> best_index: array<u32, LANES>;

/// NaN loses every comparison. A row without a number ends with index 0xffffffff.
fn wins(value: f32, index: u32, other: f32, other_index: u32) -> bool {
    return value > other || (value == other && index < other_index);
}

@compute @workgroup_size(LANES)
fn argmax(thread: Thread) {
    let row = cell_of(thread.group).x;
    let x0 = row * params.n;
    let lane = thread.lane;

    // Below every number, -infinity included, so that the first number wins: no index stands for none yet.
    var value = 0.0;
    var index = 0xffffffffu;
    // Four loads under way at a time: a row is read by one workgroup, whose time is latency.
    for (var i = lane; i < params.n; i += 4u * LANES) {
        for (var j = 0u; j < 4u; j++) {
            let at = i + j * LANES;
            let v = x[x0 + min(at, params.n - 1u)];
            if at < params.n && (v > value || (index == 0xffffffffu && v == v)) {
                value = v;
                index = at;
            }
        }
    }
    best_value[lane] = value;
    best_index[lane] = index;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half && best_index[lane + half] != 0xffffffffu {
            let v = best_value[lane + half];
            let i = best_index[lane + half];
            if best_index[lane] == 0xffffffffu || wins(v, i, best_value[lane], best_index[lane]) {
                best_value[lane] = v;
                best_index[lane] = i;
            }
        }
        workgroupBarrier();
    }
    if lane == 0u {
        ids[row] = best_index[0];
    }
}
