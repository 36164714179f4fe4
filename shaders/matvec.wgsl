// y (+)= n w^T for few rows of x, or y = silu(n w^T) * (n up^T) with GLU; n = x * rsqrt(mean(x^2) + eps) * norm with NORM.
//
// The threads of a workgroup share ROWS rows of w: each takes 16 bytes of every row at a time, neighbours next to it, and
// all meet in one reduction per row of x.

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [m, x_stride]
@group(0) @binding(2) var<storage, read> norm: array<vec4<f32>>; // [k]
@group(0) @binding(3) var<storage, read> w: array<vec4<u32>>; // [n, k] of W_TYPE
@group(0) @binding(4) var<storage, read> up: array<vec4<u32>>; // [n, k] of W_TYPE
@group(0) @binding(5) var<storage, read_write> y: array<f32>; // [m, y_stride]

const_assert ROWS % 4u == 0u;

const HALVES = W_TYPE != F32;
// Numbers in 16 bytes of w.
const STEP = 4u + 4u * u32(HALVES);
// sums[b * WIDTH + r]: row b of x with row r of w, then with row r - ROWS of up.
const WIDTH = ROWS * (1u + GLU);

var<private> sums: array<f32, BATCH * WIDTH>;
var<private> squares: array<f32, BATCH>;

fn x_one(i: u32) -> f32 {
    return x[i >> 2u][i & 3u];
}

fn w_one(i: u32) -> f32 {
    let word = word_of(W_TYPE, i);
    return number(W_TYPE, w[word >> 2u][word & 3u], i);
}

fn up_one(i: u32) -> f32 {
    let word = word_of(W_TYPE, i);
    return number(W_TYPE, up[word >> 2u][word & 3u], i);
}

/// sum + the products of STEP numbers of a row of x, in two halves, with those of w.
fn add_products(sum: f32, lo: vec4<f32>, hi: vec4<f32>, words: vec4<u32>) -> f32 {
    if HALVES {
        let a = unpack_pair(W_TYPE, words.x);
        let b = unpack_pair(W_TYPE, words.y);
        let c = unpack_pair(W_TYPE, words.z);
        let d = unpack_pair(W_TYPE, words.w);
        let first = fma(lo.w, b.y, fma(lo.z, b.x, fma(lo.y, a.y, fma(lo.x, a.x, sum))));
        return fma(hi.w, d.y, fma(hi.z, d.x, fma(hi.y, c.y, fma(hi.x, c.x, first))));
    }
    let v = bitcast<vec4<f32>>(words);
    return fma(lo.w, v.w, fma(lo.z, v.z, fma(lo.y, v.y, fma(lo.x, v.x, sum))));
}

fn wide_sums(row0: u32, lane: u32) {
    let chunks = params.k / STEP;
    for (var c = lane; c < chunks; c += LANES) {
        var lo: array<vec4<f32>, BATCH>;
        var hi: array<vec4<f32>, BATCH>;
        for (var b = 0u; b < BATCH; b++) {
            let i = (params.x_off + min(b, params.m - 1u) * params.x_stride + c * STEP) >> 2u;
            lo[b] = x[i];
            if HALVES {
                hi[b] = x[i + 1u];
            }
            if NORM == 1u {
                squares[b] += dot(lo[b], lo[b]);
                lo[b] *= norm[(c * STEP) >> 2u];
                if HALVES {
                    squares[b] += dot(hi[b], hi[b]);
                    hi[b] *= norm[((c * STEP) >> 2u) + 1u];
                }
            }
        }
        for (var r = 0u; r < ROWS; r++) {
            let at = min(row0 + r, params.n - 1u) * chunks + c;
            let words = w[at];
            for (var b = 0u; b < BATCH; b++) {
                sums[b * WIDTH + r] = add_products(sums[b * WIDTH + r], lo[b], hi[b], words);
            }
            if GLU == 1u {
                let other = up[at];
                for (var b = 0u; b < BATCH; b++) {
                    sums[b * WIDTH + ROWS + r] = add_products(sums[b * WIDTH + ROWS + r], lo[b], hi[b], other);
                }
            }
        }
    }
}

fn narrow_sums(row0: u32, lane: u32) {
    for (var i = lane; i < params.k; i += LANES) {
        for (var b = 0u; b < BATCH; b++) {
            var v = x_one(params.x_off + min(b, params.m - 1u) * params.x_stride + i);
            if NORM == 1u {
                squares[b] += v * v;
                v *= norm[i >> 2u][i & 3u];
            }
            for (var r = 0u; r < ROWS; r++) {
                let at = min(row0 + r, params.n - 1u) * params.k + i;
                sums[b * WIDTH + r] += v * w_one(at);
                if GLU == 1u {
                    sums[b * WIDTH + ROWS + r] += v * up_one(at);
                }
            }
        }
    }
}

/// Four sums over the workgroup, from `first` on.
fn reduced(first: u32, thread: Thread) -> vec4<f32> {
    return reduce_sum4(vec4(sums[first], sums[first + 1u], sums[first + 2u], sums[first + 3u]), thread);
}

@compute @workgroup_size(LANES)
fn matvec(thread: Thread) {
    let row0 = cell_of(thread.group).x * ROWS;
    let lane = thread.lane;
    for (var i = 0u; i < BATCH * WIDTH; i++) {
        sums[i] = 0.0;
    }
    for (var b = 0u; b < BATCH; b++) {
        squares[b] = 0.0;
    }
    if WIDE == 1u {
        wide_sums(row0, lane);
    } else {
        narrow_sums(row0, lane);
    }
    for (var b = 0u; b < BATCH; b++) {
        var scale = 1.0;
        if NORM == 1u {
            scale = inverseSqrt(reduce_sum(squares[b], thread) / f32(params.k) + params.eps);
        }
        for (var r = 0u; r < ROWS; r += 4u) {
            var four = reduced(b * WIDTH + r, thread) * scale;
            if GLU == 1u {
                let other = reduced(b * WIDTH + ROWS + r, thread) * scale;
                four *= other / (1.0 + exp(-four));
            }
            let row = row0 + r + lane;
            if lane < 4u && row < params.n && b < params.m {
                let at = params.y_off + b * params.y_stride + row;
                if ADD == 1u {
                    y[at] += four[lane];
                } else {
                    y[at] = four[lane];
                }
            }
        }
    }
}
