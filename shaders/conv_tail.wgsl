// tail[slot] <- the last taps - 1 rows of (old tail, x).

@group(0) @binding(1) var<storage, read> x: array<f32>; // [T, x_stride]
@group(0) @binding(2) var<storage, read> seqs: array<vec4<u32>>; // [N]: first token, tokens, slot, 0
@group(0) @binding(3) var<storage, read_write> tail: array<f32>; // [slots, TAPS - 1, channels], oldest first

const_assert TAPS >= 2u && TAPS <= 8u;

@compute @workgroup_size(LANES)
fn conv_tail(thread: Thread) {
    let cell = cell_of(thread.group);
    let c = cell.x * LANES + thread.lane;
    if c >= params.channels {
        return;
    }
    let seq = seqs[cell.y];
    let x0 = params.x_off + seq.x * params.x_stride + c;
    let tail0 = seq.z * (TAPS - 1u) * params.channels + c;
    // Row j of the new tail is row tokens + j of (old tail, x): never before j, so ascending order reads before it writes.
    for (var j = 0u; j < TAPS - 1u; j++) {
        let row = seq.y + j;
        if row < TAPS - 1u {
            tail[tail0 + j * params.channels] = tail[tail0 + row * params.channels];
        } else {
            tail[tail0 + j * params.channels] = x[x0 + (row - (TAPS - 1u)) * params.x_stride];
        }
    }
}
