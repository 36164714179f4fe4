// x[t] = table[ids[t]], for the ids that this part of the table holds.

@group(0) @binding(1) var<storage, read> ids: array<u32>; // [T]
@group(0) @binding(2) var<storage, read> table: array<u32>; // [rows, dim] of W_TYPE
@group(0) @binding(3) var<storage, read_write> x: array<f32>; // [T, dim]

@compute @workgroup_size(LANES)
fn embed(thread: Thread) {
    let t = cell_of(thread.group).x;
    // An id before this part wraps around to a large number.
    let row = ids[t] - params.row0;
    if row >= params.rows {
        return;
    }
    for (var i = thread.lane; i < params.dim; i += LANES) {
        let e = row * params.dim + i;
        x[t * params.dim + i] = number(W_TYPE, table[word_of(W_TYPE, e)], e);
    }
}
