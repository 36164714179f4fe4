// What is done at each cut of a sequence, for one head: a warm-up over as many chunks as it takes to forget, a transition, or
// the walk goes on. Threads share out the segments; where walks go on they read what the others decided.

@group(0) @binding(1) var<storage, read> ws: array<f32>; // [chunks, Hv, WS]
@group(0) @binding(2) var<storage, read> segments: array<vec4<u32>>; // [segments]: first chunk, chunks, slot, slot backward
@group(0) @binding(3) var<storage, read_write> walks: array<vec4<u32>>; // two of [segments, Hv]

const C = CHUNK;
const WS = select(2u * C * C + 4u * C, 5u * C * C + 9u * C, GRAD == 1u);

/// Segment i in the order that segments are walked in.
fn index_of(i: u32) -> u32 {
    return select(i, params.segments - 1u - i, BACK == 1u);
}

fn slot_of(segment: vec4<u32>) -> u32 {
    return select(segment.z, segment.w, BACK == 1u);
}

/// How many chunks of a segment before the cut it takes to forget, counted from the cut; 0 if there are not enough.
fn chunks_to_forget(segment: vec4<u32>, head: u32) -> u32 {
    var kept = 1.0;
    for (var n = 1u; n <= segment.y; n++) {
        let chunk = select(segment.x + segment.y - n, segment.x + n - 1u, BACK == 1u);
        let at = (chunk * params.hv + head) * WS + 2u * C * C + 3u * C; // gamma_C, contracts
        if ws[at + 1u] != 1.0 {
            return 0u;
        }
        kept *= ws[at];
        // NaN is never forgotten.
        if kept < params.forgotten {
            return n;
        }
    }
    return 0u;
}

@compute @workgroup_size(LANES)
fn gdn_cut(thread: Thread) {
    let head = cell_of(thread.group).x;
    for (var i = thread.lane; i < params.segments; i += LANES) {
        let s = index_of(i);
        let segment = segments[s];
        var walk = vec4<u32>();
        if slot_of(segment) >= params.sequences {
            let after = slot_of(segments[index_of(min(i + 1u, params.segments - 1u))]);
            var n = 0u;
            if EXACT != 2u {
                n = chunks_to_forget(segment, head);
            }
            if n > 0u {
                walk = vec4(select(segment.x + segment.y - n, segment.x, BACK == 1u), n, 0u, after);
            } else if EXACT > 0u {
                walk = vec4(segment.x, segment.y, 1u, after);
            }
        }
        walks[s * params.hv + head] = walk;
    }
    storageBarrier();
    for (var i = thread.lane; i < params.segments; i += LANES) {
        let s = index_of(i);
        let segment = segments[s];
        let slot = slot_of(segment);
        // A walk begins here unless the one before goes on.
        var begins = i == 0u;
        if i > 0u {
            let before = index_of(i - 1u);
            begins = slot_of(segments[before]) < params.sequences || walks[before * params.hv + head].y > 0u;
        }
        var walk = vec4<u32>();
        if begins {
            walk = vec4(segment.x, segment.y, slot, slot);
            var last = s;
            for (var j = i + 1u; j < params.segments; j++) {
                if slot_of(segments[last]) < params.sequences || walks[last * params.hv + head].y > 0u {
                    break;
                }
                last = index_of(j);
                let more = segments[last];
                walk.x = min(walk.x, more.x);
                walk.y += more.y;
                // Into the sequence's slot if that is its end.
                walk.w = select(slot, slot_of(more), slot_of(more) < params.sequences);
            }
        }
        walks[params.half + s * params.hv + head] = walk;
    }
}
