// Causal softmax attention over one page of the caches, as partial results: m, l and acc per query row and split.
//
// Query row r of key head c is head c * group + r % group of token r / group. A workgroup carries TILE_Q query rows over the
// keys of a split, TILE_K at a time:
//   S = scale Q K^T, masked    m' = max(m, rowmax S)    P = exp(S - m')
//   l <- exp(m - m') l + rowsum P    acc <- exp(m - m') acc + P V

@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>; // [T, heads, D]
@group(0) @binding(2) var<storage, read> k_cache: array<vec4<u32>>; // [page_len, kv, D] of KV_TYPE
@group(0) @binding(3) var<storage, read> v_cache: array<vec4<u32>>; // [page_len, kv, D] of KV_TYPE
@group(0) @binding(4) var<storage, read> pos: array<u32>; // [T]
@group(0) @binding(5) var<storage, read_write> part: array<f32>; // [T, heads, slots, D + 2]

const NOTHING = -3e38;

const HALVES = KV_TYPE != F32;
// 16-byte words in 8 numbers of a cache, and in a row of a head.
const WORDS8 = 2u - u32(HALVES);
const WORDS = DIM / 8u * WORDS8;

// Scores: threads along keys and along query rows, and the query rows and keys of one thread.
const REG_K = 2u;
const SX = TILE_K / REG_K;
const SY = LANES / SX;
const REG_Q = TILE_Q / SY;
const_assert SX * SY == LANES && REG_Q * SY == TILE_Q && TILE_K % REG_K == 0u;
// Depth of a slice of q and k in fours along D: what 16 KiB leave beside the scores. Rows are permuted as in matmul.
const DV_MOST = select(8u, 16u, TILE_Q <= 16u);
const DV = select(4u, DV_MOST, DIM % (DV_MOST * 4u) == 0u);
const_assert DIM % (DV * 4u) == 0u;
const TURN = max(8u / DV, 1u);

// Softmax: threads of a query row.
const PER_ROW = LANES / TILE_Q;
const_assert PER_ROW * TILE_Q == LANES && TILE_K % PER_ROW == 0u;

// Output: threads along D, 8 numbers each; groups of threads along query rows; rows of a thread.
const OX = DIM / 8u;
const OY = LANES / OX;
const OUT_ROWS = (TILE_Q + OY - 1u) / OY;
const_assert OY > 0u;

var<workgroup> q_slice: array<vec4<f32>, DV * TILE_Q>;
var<workgroup> k_slice: array<vec4<f32>, DV * TILE_K>;
var<workgroup> scores: array<f32, TILE_Q * TILE_K>; // S, then P
var<workgroup> shared_row: array<f32, LANES>; // a number per thread for its neighbours in a row
var<workgroup> decay: array<f32, TILE_Q>; // exp(m - m')

var<private> s: array<f32, REG_Q * REG_K>;
var<private> acc: array<vec4<f32>, OUT_ROWS * 2u>; // [OUT_ROWS, 8]

/// The first four numbers of 16 bytes of a cache.
fn lower(words: vec4<u32>) -> vec4<f32> {
    if HALVES {
        return vec4(unpack_pair(KV_TYPE, words.x), unpack_pair(KV_TYPE, words.y));
    }
    return bitcast<vec4<f32>>(words);
}

fn upper(words: vec4<u32>) -> vec4<f32> {
    return vec4(unpack_pair(KV_TYPE, words.z), unpack_pair(KV_TYPE, words.w));
}

/// Four of q from element 4 d on: query row `row` of key head `head`, zeros past the last row.
fn q_four(row: u32, head: u32, group: u32, d: u32) -> vec4<f32> {
    if row >= params.tokens * group {
        return vec4(0.0);
    }
    let at = row / group * params.heads + head * group + row % group;
    return q[at * (DIM / 4u) + d];
}

@compute @workgroup_size(LANES)
fn attend(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let head = cell.y;
    let group = params.heads / params.kv_heads;
    let row0 = cell.x * TILE_Q;
    let rows = params.tokens * group;

    // Places of the page: this split's, up to the last that a token of the tile sees.
    let first = cell.z * params.span;
    var seen = 0u;
    for (var t = row0 / group; t <= (min(row0 + TILE_Q, rows) - 1u) / group; t++) {
        seen = max(seen, pos[t] + 1u);
    }
    let in_page = min(select(seen - params.page_start, 0u, seen < params.page_start), params.page_len);
    let end = min(first + params.span, in_page);

    // The query row whose softmax this thread shares, and the last place that its token sees.
    let own = lane / PER_ROW;
    let own_part = lane % PER_ROW;
    let own_seen = pos[min((row0 + own) / group, params.tokens - 1u)] + 1u;
    let own_end = min(select(own_seen - params.page_start, 0u, own_seen < params.page_start), end);
    var m = NOTHING;
    var l = 0.0; // of this thread's keys alone

    let sx = lane % SX;
    let sy = lane / SX;
    let ox = lane % OX;
    let oy = lane / OX;
    for (var i = 0u; i < OUT_ROWS * 2u; i++) {
        acc[i] = vec4(0.0);
    }

    for (var k0 = first; k0 < end; k0 += TILE_K) {
        // S = scale Q K^T
        for (var i = 0u; i < REG_Q * REG_K; i++) {
            s[i] = 0.0;
        }
        for (var d0 = 0u; d0 < DIM / 4u; d0 += DV) {
            workgroupBarrier();
            for (var i = lane; i < TILE_Q * DV; i += LANES) {
                let r = i / DV;
                let at = i % DV;
                q_slice[at * TILE_Q + (r ^ (at * TURN % TILE_Q))] = q_four(row0 + r, head, group, d0 + at) * params.scale;
            }
            for (var i = lane; i < TILE_K * DV / 2u; i += LANES) {
                let key = i / (DV / 2u);
                let at = i % (DV / 2u) * 2u;
                let place = min(k0 + key, params.page_len - 1u);
                let word = (place * params.kv_heads + head) * WORDS + (d0 + at) / 2u * WORDS8;
                let words = k_cache[word];
                k_slice[at * TILE_K + (key ^ (at * TURN))] = lower(words);
                if HALVES {
                    k_slice[(at + 1u) * TILE_K + (key ^ ((at + 1u) * TURN))] = upper(words);
                } else {
                    k_slice[(at + 1u) * TILE_K + (key ^ ((at + 1u) * TURN))] = lower(k_cache[word + 1u]);
                }
            }
            workgroupBarrier();
            for (var at = 0u; at < DV; at++) {
                var b: array<vec4<f32>, REG_K>;
                for (var j = 0u; j < REG_K; j++) {
                    b[j] = k_slice[at * TILE_K + ((sx + j * SX) ^ (at * TURN))];
                }
                for (var i = 0u; i < REG_Q; i++) {
                    let a = q_slice[at * TILE_Q + ((sy + i * SY) ^ (at * TURN % TILE_Q))];
                    for (var j = 0u; j < REG_K; j++) {
                        let sum = s[i * REG_K + j];
                        s[i * REG_K + j] = fma(a.w, b[j].w, fma(a.z, b[j].z, fma(a.y, b[j].y, fma(a.x, b[j].x, sum))));
                    }
                }
            }
        }
        for (var i = 0u; i < REG_Q; i++) {
            for (var j = 0u; j < REG_K; j++) {
                scores[(sy + i * SY) * TILE_K + sx + j * SX] = s[i * REG_K + j];
            }
        }
        workgroupBarrier();

        // m' and P; a masked place has P = 0.
        var most = NOTHING;
        for (var j = own_part; j < TILE_K; j += PER_ROW) {
            if k0 + j < own_end {
                most = max(most, scores[own * TILE_K + j]);
            }
        }
        shared_row[lane] = most;
        workgroupBarrier();
        var next = m;
        for (var j = 0u; j < PER_ROW; j++) {
            next = max(next, shared_row[own * PER_ROW + j]);
        }
        let shrink = exp(m - next);
        l *= shrink;
        m = next;
        for (var j = own_part; j < TILE_K; j += PER_ROW) {
            var p = 0.0;
            if k0 + j < own_end {
                p = exp(scores[own * TILE_K + j] - m);
            }
            scores[own * TILE_K + j] = p;
            l += p;
        }
        if own_part == 0u {
            decay[own] = shrink;
        }
        workgroupBarrier();

        // acc <- exp(m - m') acc + P V
        if oy < OY {
            for (var i = 0u; i < OUT_ROWS; i++) {
                let f = decay[min(oy + i * OY, TILE_Q - 1u)];
                acc[2u * i] *= f;
                acc[2u * i + 1u] *= f;
            }
            // Four keys at a time, so that their loads are under way together. Places past the end have P = 0, and are
            // replaced by the last: a place that no token of the tile sees may hold anything, and 0 NaN is not 0.
            for (var j0 = 0u; j0 < min(TILE_K, end - k0); j0 += 4u) {
                var lo: array<vec4<f32>, 4>;
                var hi: array<vec4<f32>, 4>;
                for (var j = 0u; j < 4u; j++) {
                    let place = min(k0 + j0 + j, end - 1u);
                    let word = (place * params.kv_heads + head) * WORDS + ox * WORDS8;
                    let words = v_cache[word];
                    lo[j] = lower(words);
                    if HALVES {
                        hi[j] = upper(words);
                    } else {
                        hi[j] = lower(v_cache[word + 1u]);
                    }
                }
                for (var i = 0u; i < OUT_ROWS; i++) {
                    let at = min(oy + i * OY, TILE_Q - 1u) * TILE_K + j0;
                    for (var j = 0u; j < 4u; j++) {
                        acc[2u * i] += scores[at + j] * lo[j];
                        acc[2u * i + 1u] += scores[at + j] * hi[j];
                    }
                }
            }
        }
    }

    // l of a row from its threads.
    workgroupBarrier();
    shared_row[lane] = l;
    if own_part == 0u {
        decay[own] = m;
    }
    workgroupBarrier();
    let slot = params.slot0 + cell.z;
    if oy < OY {
        for (var i = 0u; i < OUT_ROWS; i++) {
            let r = oy + i * OY;
            if r < TILE_Q && row0 + r < rows {
                let query = (row0 + r) / group * params.heads + head * group + (row0 + r) % group;
                let to = (query * params.slots + slot) * (DIM + 2u);
                for (var j = 0u; j < 4u; j++) {
                    part[to + 2u + ox * 8u + j] = acc[2u * i][j];
                    part[to + 2u + ox * 8u + 4u + j] = acc[2u * i + 1u][j];
                }
                if ox == 0u {
                    var total = 0.0;
                    for (var j = 0u; j < PER_ROW; j++) {
                        total += shared_row[r * PER_ROW + j];
                    }
                    part[to] = decay[r];
                    part[to + 1u] = total;
                }
            }
        }
    }
}
