// dst[dst_off + i] = src[src_off + i], words of 32 bits.

@group(0) @binding(1) var<storage, read> src: array<u32>;
@group(0) @binding(2) var<storage, read_write> dst: array<u32>;

@compute @workgroup_size(LANES)
fn copy(thread: Thread) {
    let first = cell_of(thread.group).x * BLOCK;
    let end = min(params.n, first + BLOCK);
    for (var i = first + thread.lane; i < end; i += LANES) {
        dst[params.dst_off + i] = src[params.src_off + i];
    }
}
