// Linked before every kernel. `params` and the constants of the row are declared by source.rs.

// Type codes of stored numbers: Dtype::code.
const F32 = 0u;
const F16 = 1u;
const BF16 = 2u;

/// The cell that this workgroup computes. A launch may reach the device in several dispatches, each with its own base.
fn cell_of(group: vec3<u32>) -> vec3<u32> {
    return group + params.base;
}

/// What a scan walks: chunks from a first one on, from the state in a slot, which it leaves in another.
struct Walk {
    first: u32,
    chunks: u32,
    slot: u32,
    to: u32,
}

/// The walk that a row of the table of segments (kind 0) or of walks means; one that is not taken has no chunks.
fn walk_of(kind: u32, row: vec4<u32>) -> Walk {
    let chunks = select(row.y, 0u, kind == 3u && row.z != 1u);
    return Walk(row.x, chunks, row.z, select(row.w, row.z, kind == 0u));
}

/// Word of a buffer that holds element i.
fn word_of(ty: u32, i: u32) -> u32 {
    if ty == F32 {
        return i;
    }
    return i >> 1u;
}

/// Element i, given its word.
fn number(ty: u32, word: u32, i: u32) -> f32 {
    if ty == F32 {
        return bitcast<f32>(word);
    }
    let half = word >> ((i & 1u) << 4u);
    if ty == F16 {
        return unpack2x16float(half & 0xffffu).x;
    }
    return bitcast<f32>(half << 16u);
}

/// Two neighbouring 16-bit numbers from the word that holds them; the first in the low half.
fn unpack_pair(ty: u32, word: u32) -> vec2<f32> {
    if ty == F16 {
        return unpack2x16float(word);
    }
    return vec2(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

/// The upper half of x rounded to nearest even, in the low 16 bits. NaN stays NaN.
fn to_bf16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 64u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

/// The word that holds two neighbouring 16-bit numbers. Threads store whole words: an element of 16 bits has no address.
fn pack_pair(ty: u32, x: vec2<f32>) -> u32 {
    if ty == F16 {
        return pack2x16float(x);
    }
    return to_bf16(x.x) | (to_bf16(x.y) << 16u);
}

fn sigmoid(x: f32) -> f32 {
    return 1.0 / (1.0 + exp(-x));
}

fn silu(x: f32) -> f32 {
    return x / (1.0 + exp(-x));
}

/// The derivative of silu.
fn silu_slope(x: f32) -> f32 {
    let e = exp(-x);
    let s = 1.0 / (1.0 + e);
    // 1 - s loses the digits of a small difference.
    return s * (1.0 + x * select(1.0 - s, e * s, x > 0.0));
}

/// log(1 + e^x), the identity above 20.
fn softplus(x: f32) -> f32 {
    if x > 20.0 {
        return x;
    }
    let e = exp(x);
    // log(1 + e) loses the digits of a small e.
    if e < 1e-3 {
        return e * (1.0 - e * (0.5 - e / 3.0));
    }
    return log(1.0 + e);
}
