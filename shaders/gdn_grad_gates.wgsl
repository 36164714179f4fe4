// dg_t = sum of dc_i over i >= t in the chunk, and dbeta. A thread has one value head.

@group(0) @binding(1) var<storage, read> ws: array<f32>; // [chunks, Hv, 5 C C + 9 C]
@group(0) @binding(2) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(3) var<storage, read_write> dg: array<f32>; // [window, Hv]
@group(0) @binding(4) var<storage, read_write> dbeta: array<f32>; // [window, Hv]

const C = CHUNK;

@compute @workgroup_size(LANES)
fn gdn_grad_gates(thread: Thread) {
    let cell = cell_of(thread.group);
    let head = cell.y * LANES + thread.lane;
    if head >= params.hv {
        return;
    }
    let chunk = chunks[cell.x];
    let len = min(chunk.y, C);
    let dc0 = (cell.x * params.hv + head) * (5u * C * C + 9u * C) + 5u * C * C + 7u * C; // dc, dbeta [C] each
    let out0 = params.g_off + chunk.x * params.hv + head;
    var sum = 0.0;
    for (var i = len; i > 0u; i--) {
        sum += ws[dc0 + i - 1u];
        dg[out0 + (i - 1u) * params.hv] = sum;
        dbeta[out0 + (i - 1u) * params.hv] = ws[dc0 + C + i - 1u];
    }
}
