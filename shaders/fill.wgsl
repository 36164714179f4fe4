// dst[dst_off + i] = word.

@group(0) @binding(1) var<storage, read_write> dst: array<u32>;

@compute @workgroup_size(LANES)
fn fill(thread: Thread) {
    let first = cell_of(thread.group).x * BLOCK;
    let end = min(params.n, first + BLOCK);
    for (var i = first + thread.lane; i < end; i += LANES) {
        dst[params.dst_off + i] = params.word;
    }
}
