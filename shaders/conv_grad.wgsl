// dx and dw of the convolution; a thread walks blocks of tokens of one channel.

@group(0) @binding(1) var<storage, read> x: array<f32>; // [T, x_stride]
@group(0) @binding(2) var<storage, read> w: array<f32>; // [channels, TAPS]
@group(0) @binding(3) var<storage, read> seqs: array<vec4<u32>>; // [count]: first token, tokens, slot, 0
@group(0) @binding(4) var<storage, read> tail: array<f32>; // [slots, TAPS - 1, channels], oldest first
@group(0) @binding(5) var<storage, read> dy: array<f32>; // [T, dy_stride]
@group(0) @binding(6) var<storage, read_write> dx: array<f32>; // [T, dx_stride]
@group(0) @binding(7) var<storage, read_write> part: array<f32>; // [cells, channels, TAPS]

const_assert TAPS >= 2u && TAPS <= 8u;

@compute @workgroup_size(LANES)
fn conv_grad(thread: Thread) {
    let cell = cell_of(thread.group);
    let c = cell.x * LANES + thread.lane;
    if c >= params.channels {
        return;
    }
    var weight: array<f32, TAPS>;
    var dweight: array<f32, TAPS>;
    for (var j = 0u; j < TAPS; j++) {
        weight[j] = w[c * TAPS + j];
        dweight[j] = 0.0;
    }
    let cells = max(params.cells, 1u);
    // The next block of this cell, counted from the first block of sequence n.
    var next = cell.y;
    for (var n = 0u; n < params.count; n++) {
        let seq = seqs[n];
        let x0 = params.x_off + seq.x * params.x_stride + c;
        let dy0 = params.dy_off + seq.x * params.dy_stride + c;
        let dx0 = params.dx_off + seq.x * params.dx_stride + c;
        let tail0 = seq.z * (TAPS - 1u) * params.channels + c;
        let blocks = seq.y / params.block + select(0u, 1u, seq.y % params.block > 0u);
        for (; next < blocks; next += cells) {
            let begin = next * params.block;
            let end = min(seq.y, begin + params.block);
            // X of token t and the TAPS - 1 rows before it; dp of token t and the TAPS - 1 tokens before it.
            var rows: array<f32, TAPS>;
            var dp: array<f32, TAPS>;
            for (var j = 0u; j < TAPS - 1u; j++) {
                let row = begin + j;
                if row < TAPS - 1u {
                    rows[j] = tail[tail0 + row * params.channels];
                } else {
                    rows[j] = x[x0 + (row - (TAPS - 1u)) * params.x_stride];
                }
            }
            for (var t = begin; t < end + TAPS - 1u; t++) {
                var d = 0.0;
                if t < seq.y {
                    rows[TAPS - 1u] = x[x0 + t * params.x_stride];
                    d = dy[dy0 + t * params.dy_stride];
                    if SILU == 1u {
                        var p = 0.0;
                        for (var j = 0u; j < TAPS; j++) {
                            p += weight[j] * rows[j];
                        }
                        d *= silu_slope(p);
                    }
                    if t < end {
                        for (var j = 0u; j < TAPS; j++) {
                            dweight[j] += d * rows[j];
                        }
                    }
                }
                dp[TAPS - 1u] = d;
                if t >= begin + TAPS - 1u {
                    // dx[i] = sum_k w[TAPS - 1 - k] dp[i + k]
                    var sum = 0.0;
                    for (var k = 0u; k < TAPS; k++) {
                        sum += weight[TAPS - 1u - k] * dp[k];
                    }
                    dx[dx0 + (t - (TAPS - 1u)) * params.dx_stride] = sum;
                }
                for (var j = 0u; j < TAPS - 1u; j++) {
                    rows[j] = rows[j + 1u];
                    dp[j] = dp[j + 1u];
                }
            }
        }
        next -= blocks;
    }
    for (var j = 0u; j < TAPS; j++) {
        part[(cell.y * params.channels + c) * TAPS + j] = dweight[j];
    }
}
