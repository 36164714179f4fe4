//! Attention through its builder on every device, against the formulas in float64: head sizes, pages, long positions.

use gatedelta::ops::{self, Attention, AttentionShape, KvPage};
use gatedelta::pass::Pass;
use gatedelta::shape::Dtype;

use crate::formula::{self, sigmoid};
use crate::ops::{Bench, DTYPES, assert_names, benches, close, wide};
use crate::util::Random;

/// Attention in float64 over tokens at positions `0..`.
struct History {
    shape: AttentionShape,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    /// `[kv][tokens, D]`
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

impl History {
    /// The output of the next token, given its row of qkv.
    fn token(&mut self, qkv: &[f32], rope: &[f32]) -> Vec<f64> {
        let s = self.shape;
        let (heads, kv, d) = (s.heads as usize, s.kv_heads as usize, s.dim as usize);
        let (q_norm, k_norm) = (wide(&self.q_norm), wide(&self.k_norm));
        let (q, k, v) = formula::attn_prepare(&wide(qkv), &q_norm, &k_norm, &wide(rope), heads, kv, s.eps.into());
        for c in 0..kv {
            self.keys[c].extend(&k[c * d..][..d]);
            self.values[c].extend(&v[c * d..][..d]);
        }
        let head = |h: usize| {
            let c = h / (heads / kv);
            let (_, sum, acc) = formula::attend(&q[h * d..][..d], &self.keys[c], &self.values[c], s.scale.into());
            let gate = &qkv[(2 * h + 1) * d..][..d];
            acc.iter().zip(gate).map(|(a, &g)| a / sum * sigmoid(g.into())).collect::<Vec<f64>>()
        };
        (0..heads).flat_map(head).collect()
    }
}

/// Sends `lens` tokens after one another through pages of `page` positions and compares each output.
fn check_attention(b: &Bench, shape: AttentionShape, lens: &[usize], page: u64) {
    let what = format!("{} {shape:?} {lens:?} pages of {page}", b.name);
    let mut r = Random::new((shape.dim + shape.heads) as u64);
    let (d, rot, total) = (shape.dim as usize, shape.rot as usize, lens.iter().sum::<usize>());
    let none = vec![Vec::new(); shape.kv_heads as usize];
    let mut history = History { shape, q_norm: r.normals(d), k_norm: r.normals(d), keys: none.clone(), values: none };
    let (q_norm, k_norm) = (b.floats(&history.q_norm), b.floats(&history.k_norm));
    let pages: Vec<KvPage> = (0..(total as u64).div_ceil(page))
        .map(|i| {
            // What was never written is NaN in every type.
            let fresh = || b.words(&vec![u32::MAX; ((page * shape.kv_row()) / 4) as usize]);
            KvPage { start: i * page, len: page, k: fresh(), v: fresh() }
        })
        .collect();
    let mut start = 0;
    for &t in lens {
        let width = shape.qkv_width() as usize;
        let qkv = r.normals(t * width);
        let rope: Vec<f32> = (start..start + t)
            .flat_map(|pos| {
                let angle = move |i: usize| pos as f64 * 1e7f64.powf(-(i as f64) * 2.0 / rot as f64);
                (0..rot / 2).map(move |i| angle(i).cos() as f32).chain((0..rot / 2).map(move |i| angle(i).sin() as f32))
            })
            .collect();
        let pos: Vec<u32> = (start as u32..(start + t) as u32).collect();
        let end = (start + t) as u64;
        let extents = pages.iter().map(|p| (p.start, p.len));
        let part = ops::attention_scratch(&b.caps, &shape, t as u64, extents, end);
        let y = b.poisoned(t * shape.heads as usize * d);
        b.run(|pass| {
            let call = Attention {
                shape,
                tokens: t as u64,
                positions: start as u64..end,
                qkv: &b.floats(&qkv),
                q_norm: &q_norm,
                k_norm: &k_norm,
                rope: &b.floats(&rope),
                pos: &b.words(&pos),
                pages: &pages,
                q: &b.poisoned(t * shape.heads as usize * d),
                part: &b.poisoned(part as usize / 4),
                y: &y,
            };
            ops::attention(&b.caps, pass, &call).unwrap();
        });
        let expected: Vec<f64> =
            (0..t).flat_map(|i| history.token(&qkv[i * width..][..width], &rope[i * rot..][..rot])).collect();
        let bound = match shape.kv_dtype {
            Dtype::F32 => 3e-6,
            Dtype::F16 => 1e-3,
            Dtype::Bf16 => 5e-3,
        };
        close(&format!("{what}: tokens {start}..{end}"), &b.read(&y), &expected, bound);
        start += t;
    }
}

fn attention_shape(heads: u32, kv_heads: u32, dim: u32, rot: u32, kv_dtype: Dtype) -> AttentionShape {
    AttentionShape { heads, kv_heads, dim, rot, kv_dtype, eps: 1e-6, scale: (dim as f32).powf(-0.5) }
}

#[test]
fn attention_of_every_head_size() {
    for b in benches() {
        for (i, dim) in (16..=256).step_by(16).enumerate() {
            check_attention(&b, attention_shape(2, 1, dim, dim / 4 / 2 * 2, DTYPES[i % 3]), &[5, 1], 64);
        }
    }
}

#[test]
fn attention_over_pages_and_pieces() {
    for b in benches() {
        for dtype in DTYPES {
            check_attention(&b, attention_shape(4, 2, 64, 16, dtype), &[70, 1, 1, 37, 1], 32);
            check_attention(&b, attention_shape(6, 1, 48, 48, dtype), &[1, 130, 3, 8], 100);
        }
        check_attention(&b, attention_shape(8, 2, 256, 64, Dtype::F16), &[40, 1, 16], 256);
        check_attention(&b, attention_shape(3, 3, 128, 32, Dtype::F32), &[33, 1], 16);
    }
}

#[test]
fn attention_far_into_a_conversation() {
    for b in benches() {
        check_attention(&b, attention_shape(2, 1, 64, 32, Dtype::F16), &[600, 600, 1, 1], 512);
    }
}

#[test]
fn attention_at_positions_behind_the_end_of_the_pass() {
    // A pass recorded for later positions too gives the same answer.
    for b in benches() {
        let shape = attention_shape(2, 2, 32, 8, Dtype::F32);
        let mut r = Random::new(3);
        let (d, t) = (32, 3);
        let qkv = r.normals(t * shape.qkv_width() as usize);
        let (qkv, norm, rope) = (b.floats(&qkv), b.floats(&r.normals(d)), b.floats(&r.normals(t * 8)));
        let pos = b.words(&[0, 1, 2]);
        let mut answers = Vec::new();
        for end in [3, 300] {
            let fresh = || b.words(&vec![u32::MAX; 512 * 2 * d]);
            let pages = [KvPage { start: 0, len: 512, k: fresh(), v: fresh() }];
            let part = ops::attention_scratch(&b.caps, &shape, t as u64, [(0, 512)], end);
            let y = b.poisoned(t * 2 * d);
            b.run(|pass| {
                let call = Attention {
                    shape,
                    tokens: t as u64,
                    positions: 0..end,
                    qkv: &qkv,
                    q_norm: &norm,
                    k_norm: &norm,
                    rope: &rope,
                    pos: &pos,
                    pages: &pages,
                    q: &b.poisoned(t * 2 * d),
                    part: &b.poisoned(part as usize / 4),
                    y: &y,
                };
                ops::attention(&b.caps, pass, &call).unwrap();
            });
            answers.push(b.read(&y));
        }
        close(&b.name, &answers[1], &wide(&answers[0]), 1e-6);
    }
}

#[test]
fn attention_that_cannot_be_is_named() {
    let b = &benches()[0];
    let shape = attention_shape(4, 2, 32, 8, Dtype::F16);
    let run =
        |shape: AttentionShape, tokens: u64, positions: std::ops::Range<u64>, pages: &[(u64, u64)], short: &str| {
            let view = |name: &str, n: u64| b.poisoned(if name == short { n - 1 } else { n } as usize);
            let pages: Vec<KvPage> = pages
                .iter()
                .map(|&(start, len)| {
                    // 16-bit numbers: half as many words.
                    let fresh = |name| view(name, len * shape.kv_row() / 4);
                    KvPage { start, len, k: fresh("k"), v: fresh("v") }
                })
                .collect();
            let (t, d, heads) = (tokens, shape.dim as u64, shape.heads as u64);
            let part =
                ops::attention_scratch(&b.caps, &shape, t, pages.iter().map(|p| (p.start, p.len)), positions.end);
            let call = Attention {
                shape,
                tokens,
                positions,
                qkv: &view("qkv", t * shape.qkv_width()),
                q_norm: &view("q_norm", d),
                k_norm: &view("k_norm", d),
                rope: &view("rope", t * shape.rot as u64),
                pos: &view("pos", t),
                pages: &pages,
                q: &view("q", t * heads * d),
                part: &view("part", part / 4),
                y: &view("y", t * heads * d),
            };
            ops::attention(&b.caps, &mut Pass::new(), &call)
        };
    let pages = [(0, 16), (16, 16)];
    run(shape, 3, 17..20, &pages, "").unwrap();
    for name in ["qkv", "q_norm", "k_norm", "rope", "pos", "q", "part", "y"] {
        assert_names(run(shape, 3, 17..20, &pages, name), name);
    }
    assert_names(run(shape, 3, 17..20, &pages, "k"), "pages[0].k");
    assert_names(run(shape, 3, 17..20, &pages, "v"), "pages[0].v");
    assert_names(run(shape, 3, 30..33, &pages, ""), "pages");
    assert_names(run(shape, 3, 17..20, &[(0, 16), (17, 16)], ""), "pages[1].start");
    assert_names(run(shape, 3, 5..5, &pages, ""), "positions");
    assert_names(run(AttentionShape { heads: 3, ..shape }, 3, 17..20, &pages, ""), "heads");
    assert_names(run(AttentionShape { kv_heads: 0, ..shape }, 3, 17..20, &pages, ""), "heads");
    assert_names(run(AttentionShape { dim: 40, ..shape }, 3, 17..20, &pages, ""), "dim");
    assert_names(run(AttentionShape { rot: 34, ..shape }, 3, 17..20, &pages, ""), "rot");
}
