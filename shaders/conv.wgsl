// y[t, c] = act(sum_j w[c, j] * x[t - (taps - 1) + j, c]); a thread walks one channel over a block of tokens.

@group(0) @binding(1) var<storage, read> x: array<f32>; // [T, x_stride]
@group(0) @binding(2) var<storage, read> w: array<f32>; // [channels, TAPS]
@group(0) @binding(3) var<storage, read> seqs: array<vec4<u32>>; // [N]: first token, tokens, slot, 0
@group(0) @binding(4) var<storage, read_write> tail: array<f32>; // [slots, TAPS - 1, channels], oldest first
@group(0) @binding(5) var<storage, read_write> y: array<f32>; // [T, y_stride]

const_assert TAPS >= 2u && TAPS <= 8u;

@compute @workgroup_size(LANES)
fn conv(thread: Thread) {
    let cell = cell_of(thread.group);
    let c = cell.x * LANES + thread.lane;
    if c >= params.channels {
        return;
    }
    let seq = seqs[cell.y];
    let begin = cell.z * params.block;
    let end = min(seq.y, begin + params.block);
    if begin > end || (begin == end && begin > 0u) {
        return;
    }
    let x0 = params.x_off + seq.x * params.x_stride + c;
    let y0 = params.y_off + seq.x * params.y_stride + c;
    let tail0 = seq.z * (TAPS - 1u) * params.channels + c;

    var weight: array<f32, TAPS>;
    // The TAPS - 1 inputs before token t, oldest first.
    var past: array<f32, TAPS>;
    for (var j = 0u; j < TAPS; j++) {
        weight[j] = w[c * TAPS + j];
        // Row begin - (TAPS - 1) + j of the sequence; negative ones are in the tail.
        let row = begin + j;
        if j < TAPS - 1u {
            if row < TAPS - 1u {
                past[j] = tail[tail0 + row * params.channels];
            } else {
                past[j] = x[x0 + (row - (TAPS - 1u)) * params.x_stride];
            }
        }
    }
    for (var t = begin; t < end; t++) {
        past[TAPS - 1u] = x[x0 + t * params.x_stride];
        var sum = 0.0;
        for (var j = 0u; j < TAPS; j++) {
            sum += weight[j] * past[j];
        }
        for (var j = 0u; j < TAPS - 1u; j++) {
            past[j] = past[j + 1u];
        }
        if SILU == 1u {
            sum = silu(sum);
        }
        y[y0 + t * params.y_stride] = sum;
    }
    if STORE_TAIL == 1u {
        for (var j = 0u; j < TAPS - 1u; j++) {
            tail[tail0 + j * params.channels] = past[j];
        }
    }
}
