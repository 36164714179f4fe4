// The index of the largest number of a row; the smallest index among equals; NaN never wins.

@group(0) @binding(1) var<storage, read> x: array<f32>; // [rows, n]
@group(0) @binding(2) var<storage, read_write> ids: array<u32>; // [rows]

const AT_ONCE = 16u;
const NONE = 0xffffffffu;

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

    // While there is no index, any number wins, -infinity too.
    var value = 0.0;
    var index = NONE;
    // Many loads under way at a time: a row is read by one workgroup, whose time is latency.
    for (var i = lane; i < params.n; i += AT_ONCE * LANES) {
        var v: array<f32, AT_ONCE>;
        for (var j = 0u; j < AT_ONCE; j++) {
            v[j] = x[x0 + min(i + j * LANES, params.n - 1u)];
        }
        // Past the end the last number comes again, with a larger index, and does not win.
        for (var j = 0u; j < AT_ONCE; j++) {
            if v[j] > value || (index == NONE && v[j] == v[j]) {
                value = v[j];
                index = min(i + j * LANES, params.n - 1u);
            }
        }
    }
    best_value[lane] = value;
    best_index[lane] = index;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half && best_index[lane + half] != NONE {
            let v = best_value[lane + half];
            let i = best_index[lane + half];
            if best_index[lane] == NONE || wins(v, i, best_value[lane], best_index[lane]) {
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
