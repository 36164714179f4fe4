// y[i, j] (+)= sum_k x[i, k] w[j, k] for many rows of x.

@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [m, x_stride]
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>; // [n, k] of W_TYPE
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [m, y_stride]

// Threads along the rows of w and of x.
const NX = TILE_N / REG_N;
const NY = TILE_M / REG_M;
const_assert NX * NY == LANES;
const_assert TILE_N % REG_N == 0u && TILE_M % REG_M == 0u;

const STAGED = TILE_K > 0u;
const HALVES = W_TYPE != F32;
// Numbers in 16 bytes of w.
const STEP = 4u + 4u * u32(HALVES);
const_assert TILE_K % STEP == 0u;

// Fours of k in a slice.
const KV = max(TILE_K / 4u, 1u);
// 16-byte words of w in a row of a slice.
const KW = max(TILE_K / STEP, 1u);
// Slices of x and w: four numbers along k for each row. Rows are permuted within groups of 8 by the place along k, so that
// neither the writes (neighbours along k) nor the reads (neighbours along rows) of a group of threads meet in a bank.
const TURN = max(8u / KV, 1u);
const_assert !STAGED || (KV <= 8u && TILE_M % 8u == 0u && TILE_N % 8u == 0u);
var<workgroup> x_slice: array<vec4<f32>, select(1u, KV * TILE_M, STAGED)>;
var<workgroup> w_slice: array<vec4<f32>, select(1u, KV * TILE_N, STAGED)>;

var<private> sums: array<f32, REG_M * REG_N>; // [REG_M, REG_N]

fn w_one(i: u32) -> f32 {
    let word = word_of(W_TYPE, i);
    return number(W_TYPE, w[word >> 2u][word & 3u], i);
}

/// x[row, k .. k + 4], zeros past the end.
fn x_four(row: u32, k: u32) -> vec4<f32> {
    let at = params.x_off + min(row, params.m - 1u) * params.x_stride + k;
    if WIDE == 1u {
        return select(vec4(0.0), x[at >> 2u], k < params.k);
    }
    var four = vec4(0.0);
    for (var j = 0u; j < 4u; j++) {
        if k + j < params.k {
            four[j] = x[(at + j) >> 2u][(at + j) & 3u];
        }
    }
    return four;
}

/// w[row, k .. k + 4] one by one, zeros past the end.
fn w_four(row: u32, k: u32) -> vec4<f32> {
    let at = min(row, params.n - 1u) * params.k + k;
    var four = vec4(0.0);
    for (var j = 0u; j < 4u; j++) {
        if k + j < params.k {
            four[j] = w_one(at + j);
        }
    }
    return four;
}

/// The 16 bytes of w from w[row, k] on, zeros past the end.
fn w_words(row: u32, k: u32) -> vec4<u32> {
    let at = (min(row, params.n - 1u) * params.k + k) / STEP;
    return select(vec4(0u), w[at], k < params.k);
}

fn lower(words: vec4<u32>) -> vec4<f32> {
    if HALVES {
        return vec4(unpack_pair(W_TYPE, words.x), unpack_pair(W_TYPE, words.y));
    }
    return bitcast<vec4<f32>>(words);
}

fn upper(words: vec4<u32>) -> vec4<f32> {
    return vec4(unpack_pair(W_TYPE, words.z), unpack_pair(W_TYPE, words.w));
}

fn add_products(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

/// Slices of x and w through workgroup memory, sums in registers.
fn staged(m0: u32, n0: u32, lane: u32) {
    let tx = lane % NX;
    let ty = lane / NX;
    for (var k0 = 0u; k0 < params.k; k0 += TILE_K) {
        for (var i = lane; i < TILE_M * KV; i += LANES) {
            let row = i / KV;
            let at = i % KV;
            x_slice[at * TILE_M + (row ^ (at * TURN))] = x_four(m0 + row, k0 + at * 4u);
        }
        if WIDE == 1u {
            for (var i = lane; i < TILE_N * KW; i += LANES) {
                let row = i / KW;
                let at = i % KW * (STEP / 4u);
                let words = w_words(n0 + row, k0 + at * 4u);
                w_slice[at * TILE_N + (row ^ (at * TURN))] = lower(words);
                if HALVES {
                    w_slice[(at + 1u) * TILE_N + (row ^ ((at + 1u) * TURN))] = upper(words);
                }
            }
        } else {
            for (var i = lane; i < TILE_N * KV; i += LANES) {
                let row = i / KV;
                let at = i % KV;
                w_slice[at * TILE_N + (row ^ (at * TURN))] = w_four(n0 + row, k0 + at * 4u);
            }
        }
        workgroupBarrier();
        for (var at = 0u; at < KV; at++) {
            var b: array<vec4<f32>, REG_N>;
            for (var j = 0u; j < REG_N; j++) {
                b[j] = w_slice[at * TILE_N + ((tx + j * NX) ^ (at * TURN))];
            }
            for (var i = 0u; i < REG_M; i++) {
                let a = x_slice[at * TILE_M + ((ty + i * NY) ^ (at * TURN))];
                for (var j = 0u; j < REG_N; j++) {
                    sums[i * REG_N + j] = add_products(sums[i * REG_N + j], a, b[j]);
                }
            }
        }
        workgroupBarrier();
    }
}

/// Each thread reads its own rows of x and w.
fn unstaged(m0: u32, n0: u32, lane: u32) {
    let tx = lane % NX;
    let ty = lane / NX;
    for (var k = 0u; k < params.k; k += STEP) {
        var lo: array<vec4<f32>, REG_M>;
        var hi: array<vec4<f32>, REG_M>;
        for (var i = 0u; i < REG_M; i++) {
            lo[i] = x_four(m0 + ty + i * NY, k);
            if HALVES {
                hi[i] = x_four(m0 + ty + i * NY, k + 4u);
            }
        }
        for (var j = 0u; j < REG_N; j++) {
            let row = n0 + tx + j * NX;
            var w_lo: vec4<f32>;
            var w_hi: vec4<f32>;
            if WIDE == 1u {
                let words = w_words(row, k);
                w_lo = lower(words);
                w_hi = upper(words);
            } else {
                w_lo = w_four(row, k);
                w_hi = w_four(row, k + 4u);
            }
            for (var i = 0u; i < REG_M; i++) {
                var sum = add_products(sums[i * REG_N + j], lo[i], w_lo);
                if HALVES {
                    sum = add_products(sum, hi[i], w_hi);
                }
                sums[i * REG_N + j] = sum;
            }
        }
    }
}

@compute @workgroup_size(LANES)
fn matmul(thread: Thread) {
    let cell = cell_of(thread.group);
    let n0 = cell.x * TILE_N;
    let m0 = cell.y * TILE_M;
    for (var i = 0u; i < REG_M * REG_N; i++) {
        sums[i] = 0.0;
    }
    if STAGED {
        staged(m0, n0, thread.lane);
    } else {
        unstaged(m0, n0, thread.lane);
    }
    for (var i = 0u; i < REG_M; i++) {
        let row = m0 + thread.lane / NX + i * NY;
        for (var j = 0u; j < REG_N; j++) {
            let column = n0 + thread.lane % NX + j * NX;
            if row < params.m && column < params.n {
                let at = params.y_off + row * params.y_stride + column;
                if ADD == 1u {
                    y[at] += sums[i * REG_N + j];
                } else {
                    y[at] = sums[i * REG_N + j];
                }
            }
        }
    }
}
