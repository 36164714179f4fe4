// What the tails add to conv_grad: dtail of the old tail, and dtail_out of the new one.

@group(0) @binding(1) var<storage, read> x: array<f32>; // [T, x_stride]
@group(0) @binding(2) var<storage, read> w: array<f32>; // [channels, TAPS]
@group(0) @binding(3) var<storage, read> seqs: array<vec4<u32>>; // [count]: first token, tokens, slot, 0
@group(0) @binding(4) var<storage, read> tail: array<f32>; // [slots, TAPS - 1, channels], oldest first
@group(0) @binding(5) var<storage, read> dy: array<f32>; // [T, dy_stride]
@group(0) @binding(6) var<storage, read> dtail_out: array<f32>; // [slots, TAPS - 1, channels]
@group(0) @binding(7) var<storage, read_write> dx: array<f32>; // [T, dx_stride]
@group(0) @binding(8) var<storage, read_write> dtail: array<f32>; // [slots, TAPS - 1, channels]

const_assert TAPS >= 2u && TAPS <= 8u;

@compute @workgroup_size(LANES)
fn conv_tail_grad(thread: Thread) {
    let cell = cell_of(thread.group);
    let c = cell.x * LANES + thread.lane;
    if c >= params.channels {
        return;
    }
    let seq = seqs[cell.y];
    let x0 = params.x_off + seq.x * params.x_stride + c;
    let dy0 = params.dy_off + seq.x * params.dy_stride + c;
    let dx0 = params.dx_off + seq.x * params.dx_stride + c;
    let tail0 = seq.z * (TAPS - 1u) * params.channels + c;

    if STORE == 1u {
        var weight: array<f32, TAPS>;
        // X of token t and the TAPS - 1 rows before it.
        var rows: array<f32, TAPS>;
        var sums: array<f32, TAPS>;
        for (var j = 0u; j < TAPS; j++) {
            weight[j] = w[c * TAPS + j];
            sums[j] = 0.0;
            if j < TAPS - 1u {
                rows[j] = tail[tail0 + j * params.channels];
            }
        }
        for (var t = 0u; t < TAPS - 1u; t++) {
            if t < seq.y {
                rows[TAPS - 1u] = x[x0 + t * params.x_stride];
                var d = dy[dy0 + t * params.dy_stride];
                if SILU == 1u {
                    var p = 0.0;
                    for (var j = 0u; j < TAPS; j++) {
                        p += weight[j] * rows[j];
                    }
                    d *= silu_slope(p);
                }
                for (var i = t; i < TAPS - 1u; i++) {
                    sums[i] += weight[i - t] * d;
                }
                for (var j = 0u; j < TAPS - 1u; j++) {
                    rows[j] = rows[j + 1u];
                }
            }
        }
        for (var i = 0u; i < TAPS - 1u; i++) {
            // Row i of the old tail is row i - tokens of the new one.
            if ADD == 1u && i >= seq.y {
                sums[i] += dtail_out[tail0 + (i - seq.y) * params.channels];
            }
            dtail[tail0 + i * params.channels] = sums[i];
        }
    }
    if ADD == 1u {
        // Row i of the new tail is row tokens + i of (old tail, x).
        for (var i = 0u; i < TAPS - 1u; i++) {
            if seq.y + i >= TAPS - 1u {
                dx[dx0 + (seq.y + i - (TAPS - 1u)) * params.dx_stride] += dtail_out[tail0 + i * params.channels];
            }
        }
    }
}
