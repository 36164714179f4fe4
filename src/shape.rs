//! What one call of the operator is asked to do: lengths, heads, head sizes. All checks of them are here.

use crate::error::{Error, Result};

/// How a number is stored. Arithmetic, gates and states are f32 everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum Dtype {
    /// IEEE binary32.
    #[default]
    F32 = 0,
    /// IEEE binary16.
    F16 = 1,
    /// The upper half of a binary32.
    Bf16 = 2,
}

impl Dtype {
    /// Bytes of one number.
    pub const fn size(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// The number kernels know it by.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The inverse of [`Dtype::code`].
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Dtype::F32),
            1 => Some(Dtype::F16),
            2 => Some(Dtype::Bf16),
            _ => None,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// Which q/k head a value head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum HeadMap {
    /// `h div (Hv / Hk)`: neighbours share a key head. Safetensors checkpoints.
    #[default]
    Div = 0,
    /// `h mod Hk`. GGUF files.
    Mod = 1,
}

/// Heads and head sizes: what stays the same from call to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Heads {
    /// q and k heads.
    pub hk: u32,
    /// v, g, beta and output heads; a multiple of `hk`.
    pub hv: u32,
    /// K: size of a q or k head; a multiple of 16 from 16 to 256.
    pub k: u32,
    /// V: size of a v head; a multiple of 16 from 16 to 256.
    pub v: u32,
    /// Which key head a value head reads.
    pub map: HeadMap,
}

impl Heads {
    /// Checks the head counts and sizes.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first field that is out of range.
    pub fn new(hk: u32, hv: u32, k: u32, v: u32, map: HeadMap) -> Result<Self> {
        if hk == 0 {
            return Err(Error::argument("Hk (q/k heads)", hk, "at least 1"));
        }
        if hv == 0 || hv % hk != 0 {
            return Err(Error::argument("Hv (value heads)", hv, format!("a multiple of Hk = {hk}")));
        }
        for (what, n) in [("K (q/k head size)", k), ("V (value head size)", v)] {
            if !(16..=256).contains(&n) || n % 16 != 0 {
                return Err(Error::argument(what, n, "a multiple of 16 from 16 to 256"));
            }
        }
        // Element offsets of one token row are u32 in the kernels.
        for (what, n) in [("Hk * K", hk as u64 * k as u64), ("Hv * V", hv as u64 * v as u64)] {
            if n > 1 << 24 {
                return Err(Error::argument(what, n, "at most 2^24 numbers in one token's row"));
            }
        }
        Ok(Heads { hk, hv, k, v, map })
    }

    /// Value heads per key head.
    pub const fn group(&self) -> u32 {
        self.hv / self.hk
    }

    /// The key head that value head `h` reads.
    pub const fn key_head(&self, h: u32) -> u32 {
        match self.map {
            HeadMap::Div => h / self.group(),
            HeadMap::Mod => h % self.hk,
        }
    }

    /// f32 numbers in the state of one sequence: `[Hv, K, V]`.
    pub const fn state_len(&self) -> u64 {
        self.hv as u64 * self.k as u64 * self.v as u64
    }
}

/// One ragged batch: sequence `n` is the tokens `cu_seqlens[n] .. cu_seqlens[n + 1]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Heads and head sizes.
    pub heads: Heads,
    cu_seqlens: Vec<u64>,
}

impl Shape {
    /// `cu_seqlens` starts at 0, never falls, and ends at the number of tokens. Empty sequences are legal, and so is a
    /// batch of none.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the entry that breaks the rule.
    pub fn new(heads: Heads, cu_seqlens: Vec<u64>) -> Result<Self> {
        match cu_seqlens.first() {
            None => return Err(Error::argument("cu_seqlens", "no entries", "[0, ..., T]")),
            Some(&0) => {}
            Some(&n) => return Err(Error::argument("cu_seqlens[0]", n, 0)),
        }
        for (i, w) in cu_seqlens.windows(2).enumerate() {
            if w[1] < w[0] {
                let what = format!("cu_seqlens[{}]", i + 1);
                return Err(Error::argument(what, w[1], format!("at least cu_seqlens[{i}] = {}", w[0])));
            }
        }
        if cu_seqlens.len() - 1 > u32::MAX as usize / 4 {
            return Err(Error::argument(
                "cu_seqlens",
                format!("{} sequences", cu_seqlens.len() - 1),
                "fewer than 2^30",
            ));
        }
        Ok(Shape { heads, cu_seqlens })
    }

    /// One sequence of `tokens` tokens.
    pub fn one(heads: Heads, tokens: u64) -> Self {
        Shape { heads, cu_seqlens: vec![0, tokens] }
    }

    /// Number of sequences, N.
    pub fn sequences(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// Number of tokens over all sequences, T.
    pub fn tokens(&self) -> u64 {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> u64 {
        self.cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    /// The offsets, N + 1 of them.
    pub fn cu_seqlens(&self) -> &[u64] {
        &self.cu_seqlens
    }
}
