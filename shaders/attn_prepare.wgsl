// Norms and rotary of queries and keys, and the write of keys and values into one page of the caches.

@group(0) @binding(1) var<storage, read> qkv: array<f32>; // [T, 2 heads D + 2 kv D]: [query | gate] a head, keys, values
@group(0) @binding(2) var<storage, read> q_norm: array<f32>; // [D]
@group(0) @binding(3) var<storage, read> k_norm: array<f32>; // [D]
@group(0) @binding(4) var<storage, read> rope: array<f32>; // [T, rot]: cosines, then sines
@group(0) @binding(5) var<storage, read> pos: array<u32>; // [T]
@group(0) @binding(6) var<storage, read_write> q: array<f32>; // [T, heads, D]
@group(0) @binding(7) var<storage, read_write> k_cache: array<u32>; // [page_len, kv, D] of KV_TYPE
@group(0) @binding(8) var<storage, read_write> v_cache: array<u32>; // [page_len, kv, D] of KV_TYPE

const_assert DIM % 2u == 0u && ROT % 2u == 0u && ROT <= DIM;
const PAIRS = ROT / 2u;

var<workgroup> row: array<f32, DIM>;

/// Number i of the row after rotary: (a, b) -> (a cos - b sin, b cos + a sin) for the pair (i, i + ROT / 2).
fn rotated(t: u32, i: u32) -> f32 {
    if i >= ROT {
        return row[i];
    }
    let j = i % PAIRS;
    let cosine = rope[t * ROT + j];
    let sine = rope[t * ROT + PAIRS + j];
    if i < PAIRS {
        return row[j] * cosine - row[j + PAIRS] * sine;
    }
    return row[j + PAIRS] * cosine + row[j] * sine;
}

@compute @workgroup_size(LANES)
fn attn_prepare(thread: Thread) {
    let cell = cell_of(thread.group);
    let t = cell.y;
    let heads = params.heads;
    let kv = params.kv_heads;
    let is_q = cell.x < heads;
    let is_v = cell.x >= heads + kv;
    // Queries are followed by their gates: head h starts at 2 h D. Keys and values come after all of them.
    let block = select(heads + cell.x, 2u * cell.x, is_q);
    let first = (t * 2u * (heads + kv) + block) * DIM;

    var sum = 0.0;
    for (var i = thread.lane; i < DIM; i += LANES) {
        sum += qkv[first + i] * qkv[first + i];
    }
    let scale = select(inverseSqrt(reduce_sum(sum, thread) / f32(DIM) + params.eps), 1.0, is_v);
    for (var i = thread.lane; i < DIM; i += LANES) {
        let weight = select(select(k_norm[i], q_norm[i], is_q), 1.0, is_v);
        row[i] = qkv[first + i] * scale * weight;
    }
    workgroupBarrier();

    if is_q {
        let to = (t * heads + cell.x) * DIM;
        for (var i = thread.lane; i < DIM; i += LANES) {
            q[to + i] = rotated(t, i);
        }
        return;
    }
    // A position before this page wraps around to a large number.
    let slot = pos[t] - params.page_start;
    if slot >= params.page_len {
        return;
    }
    let head = (cell.x - heads) % kv;
    let to = (slot * kv + head) * DIM;
    for (var i = thread.lane * 2u; i < DIM; i += 2u * LANES) {
        var pair = vec2(row[i], row[i + 1u]);
        if !is_v {
            pair = vec2(rotated(t, i), rotated(t, i + 1u));
        }
        if KV_TYPE == F32 {
            if is_v {
                v_cache[to + i] = bitcast<u32>(pair.x);
                v_cache[to + i + 1u] = bitcast<u32>(pair.y);
            } else {
                k_cache[to + i] = bitcast<u32>(pair.x);
                k_cache[to + i + 1u] = bitcast<u32>(pair.y);
            }
        } else if is_v {
            v_cache[(to + i) >> 1u] = pack_pair(KV_TYPE, pair);
        } else {
            k_cache[(to + i) >> 1u] = pack_pair(KV_TYPE, pair);
        }
    }
}
