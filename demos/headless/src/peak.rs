//! What the machine can do at most, measured: the yardstick of the benchmark's shares.

use std::time::Instant;

use gatedelta::backend::Backend;
use gatedelta::tune::{Class, Kind};

/// What the reading is measured on: larger than any last-level cache, so that it comes from memory.
pub const READ_BYTES: u64 = 512 << 20;

/// Measured peaks.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    /// f32 operations a second, a fused multiply-add counting as two.
    pub flops: f64,
    /// Bytes a second read from memory.
    pub read: f64,
}

impl Peak {
    /// The share of the peak that this work in this time amounts to, by whichever bound is nearer, and that bound's name.
    pub fn share(&self, flops: f64, bytes: f64, seconds: f64) -> (f64, &'static str) {
        let (compute, memory) = (flops / seconds / self.flops, bytes / seconds / self.read);
        if compute >= memory { (compute, "arithmetic") } else { (memory, "memory") }
    }
}

/// The peaks of the silicon behind a device, where they can be measured: the processor's for the CPU backend and for drivers
/// in software, which run on the same cores.
pub fn of(backend: &dyn Backend) -> Option<Peak> {
    let caps = backend.caps();
    (caps.kind == Kind::Cpu || caps.class == Class::Software).then(host)
}

/// The processor's peaks over all its threads, the best of a few tries.
pub fn host() -> Peak {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let data = vec![1.0f32; READ_BYTES as usize / 4];
    let part = data.len().div_ceil(threads);
    let rounds = 1 << 21;
    let mut peak = Peak { flops: 0.0, read: 0.0 };
    for _ in 0..5 {
        let begin = Instant::now();
        let flops: f64 = on_each(threads, |_| pulp::Arch::new().dispatch(MultiplyAdd { rounds })).iter().sum();
        peak.flops = peak.flops.max(flops / begin.elapsed().as_secs_f64());

        let begin = Instant::now();
        let sums = on_each(threads, |i| {
            let part = &data[(i * part).min(data.len())..((i + 1) * part).min(data.len())];
            pulp::Arch::new().dispatch(Sum { data: part })
        });
        let seconds = begin.elapsed().as_secs_f64();
        std::hint::black_box(sums);
        peak.read = peak.read.max(data.len() as f64 * 4.0 / seconds);
    }
    peak
}

fn on_each<R: Send>(threads: usize, job: impl Fn(usize) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let job = &job;
        let running: Vec<_> = (0..threads).map(|i| scope.spawn(move || job(i))).collect();
        // A thread can only fail to join by a panic of `job`, which has no way to panic.
        running.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}

/// Independent chains of multiply-adds, enough of them to hide the latency; gives the operations done.
struct MultiplyAdd {
    rounds: usize,
}

impl pulp::WithSimd for MultiplyAdd {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f64 {
        const CHAINS: usize = 12;
        let (x, y) = (simd.splat_f32s(0.999), simd.splat_f32s(std::hint::black_box(1e-3)));
        let mut sums = [simd.splat_f32s(0.0); CHAINS];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = simd.mul_add_e_f32s(*sum, x, y);
            }
        }
        for sum in sums {
            std::hint::black_box(simd.reduce_sum_f32s(sum));
        }
        (2 * CHAINS * self.rounds * S::F32_LANES) as f64
    }
}

/// The sum of numbers, in chains of its own that leave only the reading to wait for.
struct Sum<'a> {
    data: &'a [f32],
}

impl pulp::WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> f32 {
        let (body, _) = S::as_simd_f32s(self.data);
        let mut sums = [simd.splat_f32s(0.0); 8];
        for eight in body.chunks_exact(8) {
            for (sum, &x) in sums.iter_mut().zip(eight) {
                *sum = simd.add_f32s(*sum, x);
            }
        }
        sums.into_iter().map(|sum| simd.reduce_sum_f32s(sum)).sum()
    }
}
