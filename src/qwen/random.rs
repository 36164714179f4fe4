//! Random weights of any shape, made in memory: for benchmarks and tests that need a model and no answers.

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::HostBytes;
use crate::error::Result;
use crate::qwen::sample::SplitMix64;
use crate::qwen::weights::{Owned, Source};
use crate::shape::Dtype;

/// Tensors drawn from a seed; each depends on the seed and its name alone.
pub(crate) struct RandomSource {
    pub seed: u64,
    pub dtype: Dtype,
}

/// Numbers that one task draws.
const BLOCK: usize = 1 << 16;

impl RandomSource {
    fn stream(&self, name: &str) -> SplitMix64 {
        // FNV-1a of the name: tensors get streams of their own.
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01B3));
        SplitMix64::new(SplitMix64::new(self.seed ^ hash).bits())
    }
}

/// Fills `out` from 16 bits a number, uniform in plus or minus `bound`.
fn fill<T: Copy + Send>(stream: &SplitMix64, bound: f32, out: &mut [T], convert: impl Fn(f32) -> T + Sync) {
    out.par_chunks_mut(BLOCK).enumerate().for_each(|(i, block)| {
        let mut stream = stream.skip((i * BLOCK / 4) as u64);
        for four in block.chunks_mut(4) {
            let bits = stream.bits();
            for (j, slot) in four.iter_mut().enumerate() {
                let unit = (bits >> (16 * j)) as u16 as f32 / 32767.5 - 1.0;
                *slot = convert(unit * bound);
            }
        }
    });
}

impl Source for RandomSource {
    fn dtype(&self, _: &str, _: u64, _: u64) -> Result<Dtype> {
        Ok(self.dtype)
    }

    /// Uniform with variance `1 / k`: a product with it keeps the size of its input.
    fn matrix(&self, name: &str, n: u64, k: u64) -> Result<HostBytes> {
        let len = (n * k) as usize;
        let bound = (3.0 / k as f32).sqrt();
        let stream = self.stream(name);
        Ok(match self.dtype {
            Dtype::F32 => {
                let mut out = vec![0f32; len];
                fill(&stream, bound, &mut out, |x| x);
                HostBytes::new(Arc::new(Owned(out)))
            }
            Dtype::F16 => {
                let mut out = vec![0u16; len];
                fill(&stream, bound, &mut out, |x| half::f16::from_f32(x).to_bits());
                HostBytes::new(Arc::new(Owned(out)))
            }
            Dtype::Bf16 => {
                let mut out = vec![0u16; len];
                fill(&stream, bound, &mut out, |x| half::bf16::from_f32(x).to_bits());
                HostBytes::new(Arc::new(Owned(out)))
            }
        })
    }

    /// Ranges that trained models have: decays from slow to fast, norms about 1.
    fn vector(&self, name: &str, shape: &[u64]) -> Result<Vec<f32>> {
        let (centre, bound) = match name {
            n if n.ends_with("A_log") => (0.0, 2.0),
            n if n.ends_with("dt_bias") => (-3.0, 2.0),
            n if n.ends_with("conv1d.weight") => (0.0, 0.8),
            n if n.ends_with("linear_attn.norm.weight") => (1.0, 0.3),
            _ => (0.0, 0.3),
        };
        let mut out = vec![0f32; shape.iter().product::<u64>() as usize];
        fill(&self.stream(name), bound, &mut out, |x| centre + x);
        Ok(out)
    }

    fn prefix(&self) -> &str {
        "model."
    }
}
