// Thread and reductions over a workgroup of LANES threads, through subgroup operations where the device has them. The
// same functions as reduce_shared.wgsl; exactly one of the two files is linked.

struct Thread {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
}

var<workgroup> reduce_part: array<vec4<f32>, LANES>;

fn reduce_sum4(x: vec4<f32>, thread: Thread) -> vec4<f32> {
    let own = subgroupAdd(x);
    workgroupBarrier();
    if thread.subgroup_lane == 0u {
        reduce_part[thread.subgroup] = own;
    }
    workgroupBarrier();
    var sum = reduce_part[0];
    for (var i = 1u; i < thread.subgroups; i++) {
        sum += reduce_part[i];
    }
    return sum;
}

fn reduce_max(x: f32, thread: Thread) -> f32 {
    let own = subgroupMax(x);
    workgroupBarrier();
    if thread.subgroup_lane == 0u {
        reduce_part[thread.subgroup].x = own;
    }
    workgroupBarrier();
    var most = reduce_part[0].x;
    for (var i = 1u; i < thread.subgroups; i++) {
        most = max(most, reduce_part[i].x);
    }
    return most;
}

fn reduce_sum(x: f32, thread: Thread) -> f32 {
    return reduce_sum4(vec4(x, 0.0, 0.0, 0.0), thread).x;
}

// Eight numbers at two places of four, each loaded by one thread of eight and handed to all: for kernels in which all
// threads read the same numbers, on drivers where a load costs as much for one thread as a subgroup has threads.
const SHARED_LOADS = SUBGROUP >= 8u;

/// The index that this thread loads of a .. a + 4 and b .. b + 4.
fn pair_at(a: u32, b: u32, thread: Thread) -> u32 {
    let lane = thread.subgroup_lane % 8u;
    return select(a, b, lane >= 4u) + lane % 4u;
}

/// What eight threads loaded.
fn pair_of(x: f32) -> mat2x4<f32> {
    return mat2x4<f32>(
        subgroupBroadcast(x, 0u),
        subgroupBroadcast(x, 1u),
        subgroupBroadcast(x, 2u),
        subgroupBroadcast(x, 3u),
        subgroupBroadcast(x, 4u),
        subgroupBroadcast(x, 5u),
        subgroupBroadcast(x, 6u),
        subgroupBroadcast(x, 7u),
    );
}
