//! Attention of many query rows on the matrix units, row by row of the kernel table: partial results against float64.

use gatedelta::backend::cuda::choose;
use gatedelta::kernel::model::{ATTEND, AttendConsts, AttendParams};
use gatedelta::shape::Dtype;

use crate::formula;
use crate::ops::{Bench, DTYPES, benches};
use crate::util::{Random, skipped};

/// The device that has these kernels: the stand-in for the driver, or a GPU.
fn bench() -> Option<Bench> {
    let found = benches().into_iter().find(|b| ["emulator", "cuda"].contains(&b.name.as_str()));
    if found.is_none() {
        skipped("emulator", "no device runs CUDA kernels");
    }
    found
}

/// One page of the caches, cut into splits; the tokens' positions.
struct Page {
    heads: u32,
    kv_heads: u32,
    dim: u32,
    start: u32,
    len: u32,
    span: u32,
    pos: Vec<u32>,
    /// Factors of q, keys and values, by place: how large numbers are, and how unlike each other.
    sizes: fn(usize) -> [f32; 3],
}

impl Page {
    /// Runs the row and compares what it leaves with the formula; its words.
    fn check(&self, b: &Bench, dtype: Dtype, bound: f64) -> Vec<u32> {
        let what = format!(
            "{} {dtype} {}/{} of {}, {} tokens, span {}",
            b.name,
            self.heads,
            self.kv_heads,
            self.dim,
            self.pos.len(),
            self.span
        );
        let mut r = Random::new((self.dim + self.heads + self.span) as u64);
        let (d, kv, heads, tokens) = (self.dim as usize, self.kv_heads as usize, self.heads as usize, self.pos.len());
        let (splits, slot0) = (self.len.div_ceil(self.span), 1);
        let slots = splits + 2;
        let seen = |pos: u32| (pos + 1).saturating_sub(self.start).min(self.len) as usize;
        let written = self.pos.iter().map(|&p| seen(p)).max().unwrap_or(0);
        let mut q = r.normals(tokens * heads * d);
        for (t, token) in q.chunks_mut(heads * d).enumerate() {
            token.iter_mut().for_each(|x| *x *= (self.sizes)(t)[0]);
        }
        // A place that no token sees holds NaN.
        let mut cache = |which: usize| -> Vec<f32> {
            let mut rows = r.normals(self.len as usize * kv * d);
            for (place, row) in rows.chunks_mut(kv * d).enumerate() {
                let factor = if place < written { (self.sizes)(place)[which] } else { f32::NAN };
                row.iter_mut().for_each(|x| *x = round(dtype, *x * factor));
            }
            rows
        };
        let (k, v) = (cache(1), cache(2));
        let scale = (self.dim as f32).powf(-0.5);
        let consts = AttendConsts { dim: self.dim, kv_type: dtype.code(), tile_q: 64, tile_k: 32, lanes: 256 };
        let params = AttendParams {
            tokens: tokens as u32,
            heads: self.heads,
            kv_heads: self.kv_heads,
            page_start: self.start,
            page_len: self.len,
            span: self.span,
            slot0,
            slots,
            scale,
        };
        let row = d + 2;
        let part = b.poisoned(tokens * heads * slots as usize * row);
        let rows = tokens as u32 * self.heads / self.kv_heads;
        let args = [&b.floats(&q), &b.stored(dtype, &k), &b.stored(dtype, &v), &b.words(&self.pos), &part];
        b.run(|pass| pass.launch(&ATTEND, consts, params, &args, [rows.div_ceil(64), self.kv_heads, splits], 1));
        let found = b.read(&part);

        // l and acc belong to the m that was found, whose own error is that of a score.
        let (mut difference, mut size, mut worst) = (0.0, 0.0, 0.0f64);
        for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let parts = &found[(t * heads + h) * slots as usize * row..][..slots as usize * row];
            assert!(
                parts[..row].iter().chain(&parts[row * (1 + splits as usize)..]).all(|x| x.is_nan()),
                "{what}: slots of others"
            );
            let parts = &parts[row..row * (1 + splits as usize)];
            let c = h / (heads / kv);
            let of = |all: &[f32], from: usize, to: usize| -> Vec<f64> {
                (from..to).flat_map(|p| all[(p * kv + c) * d..][..d].iter().map(|&x| x as f64)).collect()
            };
            let query: Vec<f64> = q[(t * heads + h) * d..][..d].iter().map(|&x| x as f64).collect();
            let end = seen(self.pos[t]);
            for (split, part) in parts.chunks(row).enumerate() {
                let from = (split as u32 * self.span) as usize;
                let to = end.min(from + self.span as usize);
                if to <= from {
                    assert!(
                        part[0] == -3e38 && part[1..].iter().all(|&x| x == 0.0),
                        "{what}: token {t} sees nothing of split {split}"
                    );
                    continue;
                }
                let (m, l, acc) = formula::attend(&query, &of(&k, from, to), &of(&v, from, to), scale as f64);
                let shift = (part[0] as f64 - m).exp();
                let pairs = part[1..].iter().zip(std::iter::once(&l).chain(&acc));
                let (mut own, mut own_size) = (0.0, 0.0);
                for (i, (&x, y)) in pairs.enumerate() {
                    let error = (x as f64 * shift - y).powi(2);
                    assert!(
                        !error.is_nan(),
                        "{what}: token {t}, head {h}, split {split}, number {i}: {x} {} for {m}",
                        part[0]
                    );
                    if i == 0 {
                        worst = worst.max(error.sqrt() / l);
                    } else {
                        own += error;
                        own_size += y * y;
                    }
                }
                worst = worst.max(if own_size > 0.0 { (own / own_size).sqrt() } else { 0.0 });
                difference += own / l.powi(2);
                size += own_size / l.powi(2);
            }
        }
        let error = (difference / size).sqrt();
        println!("{what}: {error:.1e}, worst row {worst:.1e}");
        assert!(
            error <= bound && worst <= 5.0 * bound,
            "{what}: {error:.1e}, worst row {worst:.1e}, at most {bound:.0e} expected"
        );
        found.iter().map(|x| x.to_bits()).collect()
    }
}

fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

fn page(heads: u32, kv_heads: u32, dim: u32, start: u32, len: u32, span: u32, pos: std::ops::Range<u32>) -> Page {
    Page { heads, kv_heads, dim, start, len, span, pos: pos.collect(), sizes: |_| [1.0; 3] }
}

/// Rows that fill no tile, groups that do not divide one, splits that are not seen, pages further on, places not written yet.
#[test]
fn partial_results_are_those_of_float64() {
    let Some(b) = bench() else { return };
    for dtype in DTYPES {
        page(4, 2, 256, 0, 160, 64, 0..70).check(&b, dtype, 1e-6);
        page(6, 2, 256, 64, 96, 96, 40..93).check(&b, dtype, 1e-6);
        page(5, 1, 64, 0, 128, 32, 20..51).check(&b, dtype, 1e-6);
        page(14, 2, 80, 100, 200, 96, 90..120).check(&b, dtype, 1e-6);
        page(2, 2, 16, 0, 64, 64, 0..5).check(&b, dtype, 1e-6);
        page(1, 1, 128, 7, 50, 64, 0..40).check(&b, dtype, 1e-6);
    }
    // Tokens in any order.
    let mixed = Page { pos: vec![70, 3, 90, 0, 12, 90, 64, 31], ..page(4, 1, 64, 0, 96, 32, 0..1) };
    mixed.check(&b, Dtype::F32, 1e-6);
}

/// Sharp and flat softmax, and rows that half's range does not hold.
#[test]
fn numbers_of_every_size() {
    let Some(b) = bench() else { return };
    let sizes: [fn(usize) -> [f32; 3]; 4] = [
        |_| [4.0, 1.0, 1.0],
        |_| [1e-6, 1e-4, 1e-3],
        |place| [1e-12, 1e12 * (1.0 + place as f32 % 3.0), if place % 5 == 0 { 1e20 } else { 1e18 }],
        |place| [1e15, if place % 7 == 0 { 0.0 } else { 1e-15 }, if place % 4 == 0 { 1e-25 } else { 0.0 }],
    ];
    for (i, sizes) in sizes.into_iter().enumerate() {
        for dtype in if i < 1 { &DTYPES[..] } else { &[Dtype::F32, Dtype::Bf16][..] } {
            Page { sizes, ..page(4, 1, 64, 0, 128, 128, 60..100) }.check(&b, *dtype, 3e-6);
        }
    }
}

#[test]
fn the_same_bits_again() {
    let Some(b) = bench() else { return };
    for dtype in DTYPES {
        let page = page(3, 1, 256, 0, 100, 64, 50..90);
        assert!(page.check(&b, dtype, 1e-6) == page.check(&b, dtype, 1e-6), "{dtype}: other bits");
    }
}

#[test]
fn other_tiles_are_refused() {
    let chosen = |tile, lanes| choose(&ATTEND, &[256, 0, tile, 32, lanes]).map(|c| (c.family, c.name, c.shared));
    assert_eq!(chosen(64, 256).unwrap(), ("attention_mma", "attend_mma_f32_d256".into(), 83456));
    assert_eq!(chosen(4, 64).unwrap(), ("attention", "attend_f32_q4_d256".into(), 0));
    assert!(chosen(32, 128).is_err() && chosen(64, 128).is_err());
}
