// Thread and reductions over a workgroup of LANES threads, through workgroup memory. LANES is a power of two.
// Every thread of the workgroup must call a reduction, and every thread gets the result.

struct Thread {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
}

var<workgroup> reduce_part: array<vec4<f32>, LANES>;

fn reduce_sum4(x: vec4<f32>, thread: Thread) -> vec4<f32> {
    workgroupBarrier();
    reduce_part[thread.lane] = x;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if thread.lane < half {
            reduce_part[thread.lane] += reduce_part[thread.lane + half];
        }
        workgroupBarrier();
    }
    return reduce_part[0];
}

fn reduce_max(x: f32, thread: Thread) -> f32 {
    workgroupBarrier();
    reduce_part[thread.lane].x = x;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if thread.lane < half {
            reduce_part[thread.lane].x = max(reduce_part[thread.lane].x, reduce_part[thread.lane + half].x);
        }
        workgroupBarrier();
    }
    return reduce_part[0].x;
}

fn reduce_sum(x: f32, thread: Thread) -> f32 {
    return reduce_sum4(vec4(x, 0.0, 0.0, 0.0), thread).x;
}

// Without subgroup operations every thread loads for itself what all threads read; see reduce_subgroup.wgsl.
const SHARED_LOADS = false;

fn pair_at(a: u32, b: u32, thread: Thread) -> u32 {
    return a;
}

fn pair_of(x: f32) -> mat2x4<f32> {
    return mat2x4<f32>();
}
