// The states before the segments of one sequence and head, one after the other, for DV_TILE columns: S <- M S + E.
//
// A thread takes 4 x 4 numbers of the next state at a time; the last state is read where it was left.

@group(0) @binding(1) var<storage, read> walks: array<vec4<u32>>; // [segments, Hv]: first chunk, chunks, transition, slot of E
@group(0) @binding(2) var<storage, read> m: array<vec4<f32>>; // [slots, Hv, K, K / 4]
@group(0) @binding(3) var<storage, read> sequences: array<vec4<u32>>; // [sequences]: first segment, segments, 0, 0
@group(0) @binding(4) var<storage, read> segments: array<vec4<u32>>; // [segments]: first chunk, chunks, slot, slot backward
@group(0) @binding(5) var<storage, read> state: array<vec4<f32>>; // [sequences, Hv, K, V / 4]
@group(0) @binding(6) var<storage, read_write> carried: array<vec4<f32>>; // [slots, Hv, K, V / 4]

const QUADS = DV_TILE / 4u;
const BLOCKS = DK / 4u * QUADS;
const_assert DK % 4u == 0u;

fn slot_of(segment: u32) -> u32 {
    let row = segments[min(segment, arrayLength(&segments) - 1u)];
    return select(row.z, row.w, BACK == 1u);
}

/// Rows of M, or of M^T, as columns: M[4 i .. 4 i + 4, 4 j .. 4 j + 4] such that `block * s` are products with 4 rows of S.
fn block_of(m0: u32, i: u32, j: u32) -> mat4x4<f32> {
    if BACK == 1u {
        let at = m0 + 4u * j * (DK / 4u) + i;
        return transpose(mat4x4<f32>(m[at], m[at + DK / 4u], m[at + DK / 2u], m[at + 3u * (DK / 4u)]));
    }
    let at = m0 + 4u * i * (DK / 4u) + j;
    return mat4x4<f32>(m[at], m[at + DK / 4u], m[at + DK / 2u], m[at + 3u * (DK / 4u)]);
}

@compute @workgroup_size(LANES)
fn gdn_carry(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.y;
    let row = params.dv / 4u;
    let first = cell.z * QUADS;
    let sequence = sequences[cell.x];
    let count = sequence.y;

    // The first state goes where the walk of the first segment starts from; a sequence without keeps it.
    let begin = select(sequence.x, sequence.x + max(count, 1u) - 1u, BACK == 1u);
    let start = select(cell.x, slot_of(begin), count > 0u);
    for (var e = thread.lane; e < DK * QUADS; e += LANES) {
        let at = e / QUADS * row + first + e % QUADS;
        carried[(start * params.hv + head) * DK * row + at] = state[(cell.x * params.hv + head) * DK * row + at];
    }
    for (var n = 1u; n < count; n++) {
        storageBarrier();
        let here = select(sequence.x + n - 1u, sequence.x + count - n, BACK == 1u);
        let after = select(here + 1u, here - 1u, BACK == 1u);
        let walk = walks[here * params.hv + head];
        if walk.y > 0u && walk.z == 1u {
            let m0 = (walk.w * params.hv + head) * DK * (DK / 4u);
            let before = (slot_of(here) * params.hv + head) * DK * row + first;
            let to = (slot_of(after) * params.hv + head) * DK * row + first;
            for (var e = thread.lane; e < BLOCKS; e += LANES) {
                let i = e / QUADS;
                let quad = e % QUADS;
                let at = to + 4u * i * row + quad;
                // Columns are rows of S: sum[r] = E[4 i + r] + sum over j of M[4 i + r, j] S[j].
                var sum = mat4x4<f32>(carried[at], carried[at + row], carried[at + 2u * row], carried[at + 3u * row]);
                for (var j = 0u; j < DK / 4u; j++) {
                    let s0 = before + 4u * j * row + quad;
                    let s = mat4x4<f32>(carried[s0], carried[s0 + row], carried[s0 + 2u * row], carried[s0 + 3u * row]);
                    sum += s * block_of(m0, i, j);
                }
                carried[at] = sum[0];
                carried[at + row] = sum[1];
                carried[at + 2u * row] = sum[2];
                carried[at + 3u * row] = sum[3];
            }
        }
    }
}
