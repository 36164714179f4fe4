// What the gradients inside a chunk are made of, for one value head.
//
//   dP = lower(dO N^T)     dL = -strictlower(X N^T)     E = dP o P + diag(beta) R o dL
//   dv = beta o X          dbeta_i = X_i . (V - U)_i + sum_j dL_ij R_ij
//   dc_i = -dv_i . U_i + sum_j E_ij - sum_j E_ji
//
// 64 threads form an 8 x 8 grid; thread (ti, tj) holds the EDGE x EDGE block of dP and dL at row ti * EDGE, column tj * EDGE
// in registers while dO, N and X pass through workgroup memory in slices of V.

@group(0) @binding(1) var<storage, read> v: array<u32>; // [window, v_stride]
@group(0) @binding(2) var<storage, read> d_o: array<u32>; // [window, do_stride]
@group(0) @binding(3) var<storage, read_write> ws: array<f32>; // [chunks, Hv, 5 C C + 9 C]
@group(0) @binding(4) var<storage, read> saved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]
@group(0) @binding(5) var<storage, read> dsaved: array<vec4<f32>>; // [chunks, Hv, (K V + 2 C V) / 4]
@group(0) @binding(6) var<storage, read> chunks: array<vec4<u32>>; // [chunks]: first token, tokens, sequence, 0
@group(0) @binding(7) var<storage, read_write> dv: array<u32>; // [window, dv_stride]

const C = CHUNK;
const EDGE = C / 8u;
// Width of a staged slice, in vec4.
const DEPTH = 4u;
// Places of a slice that a thread stages: their rows are LANES / DEPTH apart.
const STAGED = C * DEPTH / LANES;

const_assert LANES == 64u;
const_assert C == 16u || C == 32u;
const_assert DV % 16u == 0u;

// One vec4 between blocks of rows, so that threads that read EDGE rows apart do not meet in a bank.
const SIDE = C * DEPTH + 8u;
var<workgroup> tile_o: array<vec4<f32>, SIDE>; // dO [C, DEPTH]
var<workgroup> tile_n: array<vec4<f32>, SIDE>; // N [C, DEPTH]
var<workgroup> tile_x: array<vec4<f32>, SIDE>; // X [C, DEPTH]
var<workgroup> part_v: array<vec2<f32>, C * DEPTH>; // parts of X_i . (V - U)_i and dv_i . U_i
var<workgroup> part_row: array<vec2<f32>, C * 8u>; // parts of sum_j E_ij and sum_j dL_ij R_ij
var<workgroup> part_col: array<f32, C * 8u>; // parts of sum_i E_ij

fn tile_at(row: u32) -> u32 {
    return row * DEPTH + row / EDGE;
}

fn v4(i: u32) -> vec4<f32> {
    if V_TYPE == F32 {
        return bitcast<vec4<f32>>(vec4(v[i], v[i + 1u], v[i + 2u], v[i + 3u]));
    }
    let at = i >> 1u;
    return vec4(unpack_pair(V_TYPE, v[at]), unpack_pair(V_TYPE, v[at + 1u]));
}

fn do4(i: u32) -> vec4<f32> {
    if V_TYPE == F32 {
        return bitcast<vec4<f32>>(vec4(d_o[i], d_o[i + 1u], d_o[i + 2u], d_o[i + 3u]));
    }
    let at = i >> 1u;
    return vec4(unpack_pair(V_TYPE, d_o[at]), unpack_pair(V_TYPE, d_o[at + 1u]));
}

fn store_dv4(i: u32, x: vec4<f32>) {
    if V_TYPE == F32 {
        let bits = bitcast<vec4<u32>>(x);
        dv[i] = bits.x;
        dv[i + 1u] = bits.y;
        dv[i + 2u] = bits.z;
        dv[i + 3u] = bits.w;
    } else {
        dv[i >> 1u] = pack_pair(V_TYPE, x.xy);
        dv[(i >> 1u) + 1u] = pack_pair(V_TYPE, x.zw);
    }
}

@compute @workgroup_size(LANES)
fn gdn_grad_chunk(thread: Thread) {
    let cell = cell_of(thread.group);
    let lane = thread.lane;
    let ti = lane / 8u;
    let tj = lane % 8u;
    let chunk = chunks[cell.x];
    let head = cell.y;
    let len = min(chunk.y, C);
    let v0 = params.v_off + chunk.x * params.v_stride + head * DV;
    let do0 = params.do_off + chunk.x * params.do_stride + head * DV;
    let dv0 = params.dv_off + chunk.x * params.dv_stride + head * DV;
    let cell0 = cell.x * params.hv + head;
    let p0 = cell0 * (5u * C * C + 9u * C) + C * C; // P [C, C]
    let g0 = p0 + 2u * C * C + 4u * C; // G, R [C, C]
    let r0 = g0 + C * C;
    let k0 = r0 + C * C; // rk, rq, beta, dc, dbeta [C] each
    let u0 = (cell0 * (DK + 2u * C) + DK) * (DV / 4u); // U, N [C, V / 4] of saved, X [C, V / 4] of dsaved
    let n0 = u0 + C * (DV / 4u);

    // dP, dL before the triangles are cut [EDGE, EDGE]
    var dp: array<f32, EDGE * EDGE>;
    var dl: array<f32, EDGE * EDGE>;
    for (var e = 0u; e < EDGE * EDGE; e++) {
        dp[e] = 0.0;
        dl[e] = 0.0;
    }
    var dots: array<vec2<f32>, STAGED>;
    for (var e = 0u; e < STAGED; e++) {
        dots[e] = vec2<f32>();
    }
    for (var slice = 0u; slice < DV / 4u; slice += DEPTH) {
        workgroupBarrier();
        for (var e = 0u; e < STAGED; e++) {
            let place = lane + e * LANES;
            let row = place / DEPTH;
            let col = slice + place % DEPTH;
            var vo = vec4<f32>();
            var vn = vec4<f32>();
            var vx = vec4<f32>();
            if row < len {
                vo = do4(do0 + row * params.do_stride + 4u * col);
                vn = saved[n0 + row * (DV / 4u) + col];
                vx = dsaved[u0 + row * (DV / 4u) + col];
                let u = saved[u0 + row * (DV / 4u) + col];
                let own = ws[k0 + 2u * C + row] * vx;
                dots[e] += vec2(dot(vx, v4(v0 + row * params.v_stride + 4u * col) - u), dot(own, u));
                store_dv4(dv0 + row * params.dv_stride + 4u * col, own);
            }
            let at = tile_at(row) + place % DEPTH;
            tile_o[at] = vo;
            tile_n[at] = vn;
            tile_x[at] = vx;
        }
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            for (var b = 0u; b < EDGE; b++) {
                let right = tile_n[tile_at(tj * EDGE + b) + d];
                for (var a = 0u; a < EDGE; a++) {
                    let left = tile_at(ti * EDGE + a) + d;
                    dp[a * EDGE + b] += dot(tile_o[left], right);
                    dl[a * EDGE + b] -= dot(tile_x[left], right);
                }
            }
        }
    }
    for (var e = 0u; e < STAGED; e++) {
        part_v[lane + e * LANES] = dots[e];
    }

    // Every E_ij is one number, whichever sum it goes into: where a gate forgets fast the two sums cancel.
    var column: array<f32, EDGE>;
    for (var b = 0u; b < EDGE; b++) {
        column[b] = 0.0;
    }
    for (var a = 0u; a < EDGE; a++) {
        let i = ti * EDGE + a;
        let rk_i = ws[k0 + i];
        let rq_i = ws[k0 + C + i];
        let beta_i = ws[k0 + 2u * C + i];
        var row = vec2<f32>();
        for (var b = 0u; b < EDGE; b++) {
            let j = tj * EDGE + b;
            let at = i * C + j;
            if j > i {
                continue;
            }
            // P becomes s rq_i rk_j G_ij dP_ij, R becomes D + D^T with D_ij = beta_i rk_i rk_j G_ij dL_ij
            let gate = ws[g0 + at] * ws[k0 + j];
            let dp_ij = dp[a * EDGE + b];
            var e = dp_ij * ws[p0 + at];
            ws[p0 + at] = params.scale * rq_i * gate * dp_ij;
            if j < i {
                let r_dl = ws[r0 + at] * dl[a * EDGE + b];
                e += beta_i * r_dl;
                row.y += r_dl;
                let both = beta_i * rk_i * gate * dl[a * EDGE + b];
                ws[r0 + at] = both;
                ws[r0 + j * C + i] = both;
            }
            row.x += e;
            column[b] += e;
        }
        part_row[i * 8u + tj] = row;
    }
    for (var b = 0u; b < EDGE; b++) {
        part_col[(tj * EDGE + b) * 8u + ti] = column[b];
    }
    workgroupBarrier();
    if lane < C {
        var sums = vec2<f32>();
        var rows = vec2<f32>();
        var columns = 0.0;
        for (var e = 0u; e < DEPTH; e++) {
            sums += part_v[lane * DEPTH + e];
        }
        for (var e = 0u; e < 8u; e++) {
            rows += part_row[lane * 8u + e];
            columns += part_col[lane * 8u + e];
        }
        ws[k0 + 3u * C + lane] = rows.x - columns - sums.y;
        ws[k0 + 4u * C + lane] = sums.x + rows.y;
    }
}
