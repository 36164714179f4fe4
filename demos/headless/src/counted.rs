//! Inputs that another program makes too: every number is a function of its tensor and its place in it.
//!
//! The rules are those of `compare/inputs.py`, to the bit:
//! ```text
//! word(t, i)   mix(mix(16 seed + t) + (i + 1) 0x9e3779b97f4a7c15), mix the finalizer of SplitMix64
//! count(t, i)  the sum of the four 16-bit parts of word(t, i), less 131070
//! normal       count / 37837           unit row   counts / root of the sum of their squares
//! ```
//! in float64, rounded once to f32 and from there to bf16.

use anyhow::{Result, bail};
use half::bf16;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Which tensor: its number in `word`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tensor {
    /// `[T, Hk, K]`.
    Q = 0,
    /// `[T, Hk, K]`.
    K = 1,
    /// `[T, Hv, V]`.
    V = 2,
    /// `[T, Hv]`.
    G = 3,
    /// `[T, Hv]`.
    Beta = 4,
    /// `[N, Hv, K, V]`.
    H0 = 5,
    /// `[T, Hv, V]`.
    DO = 6,
    /// `[N, Hv, K, V]`.
    Dht = 7,
    /// `[T, Hv]`, what a raw g is made from.
    A = 8,
    /// `[T, Hv]`, what a raw beta is made from.
    B = 9,
}

/// How the gates of a row are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gates {
    /// `g = logsigmoid(x) / 16`, and 0 for every fourth head.
    Table,
    /// `g = -A softplus(x / 2 + 1)`, A from 0 for the first head to 16 for the last.
    Spread,
    /// `g = -softplus(a)`, `beta = sigmoid(b)`, a and b in bf16.
    Raw,
}

impl Gates {
    /// By its name in files of rows.
    ///
    /// # Errors
    /// Any other name.
    pub fn parse(name: &str) -> Result<Gates> {
        match name {
            "table" => Ok(Gates::Table),
            "spread" => Ok(Gates::Spread),
            "raw" => Ok(Gates::Raw),
            _ => bail!("gates {name:?}: expected table, spread or raw"),
        }
    }
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The counts of one tensor.
#[derive(Clone, Copy)]
struct Counts(u64);

impl Counts {
    fn new(tensor: Tensor, seed: u64) -> Counts {
        Counts(mix(seed.wrapping_mul(16).wrapping_add(tensor as u64)))
    }

    fn at(self, i: u64) -> i64 {
        let z = mix(self.0.wrapping_add((i + 1).wrapping_mul(GOLDEN)));
        (0..4).map(|part| (z >> (16 * part) & 0xffff) as i64).sum::<i64>() - 131_070
    }

    fn normal(self, i: u64) -> f64 {
        self.at(i) as f64 / 37837.0
    }
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Numbers made on all threads: `row` fills one row of `size` numbers, given its index.
fn rows<T: Copy + Default + Send>(count: u64, size: u32, row: impl Fn(u64, &mut [T]) + Sync) -> Vec<T> {
    let size = size as usize;
    let mut all = vec![T::default(); count as usize * size];
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let each = (count as usize).div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (part, numbers) in all.chunks_mut(each * size).enumerate() {
            let row = &row;
            scope.spawn(move || {
                for (i, numbers) in numbers.chunks_mut(size).enumerate() {
                    row((part * each + i) as u64, numbers);
                }
            });
        }
    });
    all
}

/// Rows of unit length.
pub fn unit(tensor: Tensor, seed: u64, count: u64, size: u32) -> Vec<bf16> {
    let counts = Counts::new(tensor, seed);
    rows(count, size, |row, numbers: &mut [bf16]| {
        let at = row * size as u64;
        let squares: i64 = (0..size as u64).map(|i| counts.at(at + i).pow(2)).sum();
        let norm = (squares as f64).sqrt();
        for (i, x) in numbers.iter_mut().enumerate() {
            *x = bf16::from_f32((counts.at(at + i as u64) as f64 / norm) as f32);
        }
    })
}

/// Nearly normal numbers, in rows of `size`.
pub fn normal(tensor: Tensor, seed: u64, count: u64, size: u32) -> Vec<bf16> {
    let counts = Counts::new(tensor, seed);
    rows(count, size, |row, numbers: &mut [bf16]| {
        for (i, x) in numbers.iter_mut().enumerate() {
            *x = bf16::from_f32(counts.normal(row * size as u64 + i as u64) as f32);
        }
    })
}

/// The same in f32, divided by `by`.
pub fn states(tensor: Tensor, seed: u64, count: u64, size: u32, by: f64) -> Vec<f32> {
    let counts = Counts::new(tensor, seed);
    rows(count, size, |row, numbers: &mut [f32]| {
        for (i, x) in numbers.iter_mut().enumerate() {
            *x = (counts.normal(row * size as u64 + i as u64) / by) as f32;
        }
    })
}

/// g and beta of `tokens` tokens.
pub fn gates(kind: Gates, seed: u64, tokens: u64, hv: u32) -> (Vec<f32>, Vec<f32>) {
    let made = |tensor: Tensor, form: &(dyn Fn(usize, f64) -> f64 + Sync)| {
        let counts = Counts::new(tensor, seed);
        rows(tokens, hv, |row, numbers: &mut [f32]| {
            for (h, x) in numbers.iter_mut().enumerate() {
                *x = form(h, counts.normal(row * hv as u64 + h as u64)) as f32;
            }
        })
    };
    let stored = |x: f64| bf16::from_f32(x as f32).to_f64();
    let beta = |_, x| sigmoid(x);
    match kind {
        Gates::Raw => (made(Tensor::A, &|_, a| -softplus(stored(a))), made(Tensor::B, &|_, b| sigmoid(stored(b)))),
        Gates::Table => {
            let g = |h: usize, x: f64| if h % 4 == 3 { 0.0 } else { -softplus(-x) / 16.0 };
            (made(Tensor::G, &g), made(Tensor::Beta, &beta))
        }
        Gates::Spread => {
            let last = hv.saturating_sub(1).max(1) as f64;
            let g = |h: usize, x: f64| -(16.0 * h as f64 / last) * softplus(x / 2.0 + 1.0);
            (made(Tensor::G, &g), made(Tensor::Beta, &beta))
        }
    }
}

/// The sum of the numbers' bits, as signed 16-bit integers.
pub fn bits(numbers: &[bf16]) -> u64 {
    numbers.iter().fold(0, |sum, x| sum.wrapping_add(x.to_bits() as i16 as i64 as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_other_program() {
        // From compare/inputs.py: 133 tokens of 2/8 heads, seed 7.
        let (q, k) = (unit(Tensor::Q, 7, 266, 128), unit(Tensor::K, 7, 266, 128));
        let v = normal(Tensor::V, 7, 133 * 8, 128);
        assert_eq!(
            q[..4].iter().map(|x| x.to_f64()).collect::<Vec<_>>(),
            [0.2412109375, -0.05224609375, -0.1552734375, 0.034423828125]
        );
        let last = &v[v.len() - 128..];
        assert_eq!(last[..4].iter().map(|x| x.to_f64()).collect::<Vec<_>>(), [0.8125, 0.67578125, -1.0, 0.8046875]);
        let sum = bits(&q).wrapping_add(bits(&k).wrapping_mul(3)).wrapping_add(bits(&v).wrapping_mul(5));
        assert_eq!(format!("{sum:016x}"), "ffffffffee8614c1");
        let h0 = states(Tensor::H0, 7, 2 * 8 * 128, 128, 1.0);
        assert_eq!(h0.last().copied(), Some(-0.779_792_25));
    }

    #[test]
    fn gates_are_those_of_the_other_program() {
        let near = |found: &[f32], wanted: &[f32]| {
            found.iter().zip(wanted).all(|(x, y)| (x - y).abs() <= 1e-6 * y.abs().max(1e-3))
        };
        let (g, beta) = gates(Gates::Table, 7, 133, 8);
        assert!(near(&g, &[-0.053_934_924, -0.092_629_656, -0.019_910_403, 0.0]), "{:?}", &g[..4]);
        assert!(g.iter().skip(3).step_by(4).all(|&g| g == 0.0) && beta.iter().all(|&b| b > 0.0 && b < 1.0));
        let (g, _) = gates(Gates::Raw, 7, 1, 8);
        assert!((g[0] + 0.6280).abs() < 1e-4 && (g[7] + 1.6380).abs() < 1e-4, "{g:?}");
        let (g, _) = gates(Gates::Spread, 7, 64, 4);
        let mean = |h: usize| g.iter().skip(h).step_by(4).sum::<f32>() / 64.0;
        assert!(mean(0) == 0.0 && mean(3) < -16.0 && mean(3) < mean(1));
    }
}
