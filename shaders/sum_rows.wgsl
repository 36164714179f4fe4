// y[c] = sum_r x[r, c]. Thread (ty, tx) adds up rows ty, ty + ROW_GROUPS, .. of column tx; then the groups are added up in
// order.

@group(0) @binding(1) var<storage, read> x: array<f32>; // [rows, x_stride]
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [n]

const ROW_GROUPS = LANES / COLUMNS;

const_assert LANES % COLUMNS == 0u;

var<workgroup> sums: array<f32, LANES>;

@compute @workgroup_size(LANES)
fn sum_rows(thread: Thread) {
    let tx = thread.lane % COLUMNS;
    let ty = thread.lane / COLUMNS;
    let c = cell_of(thread.group).x * COLUMNS + tx;
    var sum = 0.0;
    if c < params.n {
        for (var r = ty; r < params.rows; r += ROW_GROUPS) {
            sum += x[params.x_off + r * params.x_stride + c];
        }
    }
    sums[thread.lane] = sum;
    workgroupBarrier();
    if ty == 0u && c < params.n {
        for (var g = 1u; g < ROW_GROUPS; g++) {
            sum += sums[g * COLUMNS + tx];
        }
        y[c] = sum;
    }
}
