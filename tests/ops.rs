//! The builders of the model on every device, against the formulas in float64.

use std::sync::Arc;

use gatedelta::backend::{Backend, Buffer, HostBytes, View};
use gatedelta::ops::{self, Norm, Weight};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::Dtype;
use gatedelta::tune::{Caps, Class, Kind};

use crate::formula::{self, error};
use crate::util::{Random, devices};

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// A device with the capabilities that the builders are to believe in.
pub struct Bench {
    pub name: String,
    pub backend: Arc<dyn Backend>,
    pub caps: Caps,
}

/// Every device; software drivers also with the kernels and tiles of a real GPU.
pub fn benches() -> Vec<Bench> {
    let mut all = Vec::new();
    for d in devices() {
        let caps = d.backend.caps().clone();
        if caps.kind == Kind::WebGpu && caps.class == Class::Software {
            let caps = Caps { class: Class::Discrete, ..caps.clone() };
            all.push(Bench { name: format!("{} as a GPU", d.name), backend: d.backend.clone(), caps });
        }
        all.push(Bench { name: d.name.to_string(), backend: d.backend.clone(), caps });
    }
    all
}

impl Bench {
    pub fn bytes(&self, bytes: Vec<u8>) -> Buffer {
        self.backend.import("test", HostBytes::new(Arc::new(bytes))).unwrap()
    }

    pub fn floats(&self, x: &[f32]) -> View {
        let buffer = self.backend.alloc("test", x.len() as u64 * 4).unwrap();
        self.backend.write(&buffer.view(), bytemuck::cast_slice(x)).unwrap();
        buffer.view()
    }

    pub fn words(&self, x: &[u32]) -> View {
        self.floats(bytemuck::cast_slice(x))
    }

    pub fn poisoned(&self, n: usize) -> View {
        self.floats(&vec![f32::NAN; n])
    }

    pub fn stored(&self, dtype: Dtype, x: &[f32]) -> View {
        self.bytes(stored(dtype, x)).view()
    }

    pub fn run(&self, build: impl FnOnce(&mut Pass)) {
        let mut pass = Pass::new();
        build(&mut pass);
        self.backend.run(&pass).unwrap_or_else(|e| panic!("{}: {e}", self.name));
    }

    pub fn read(&self, view: &View) -> Vec<f32> {
        self.backend.read(view).unwrap().wait_as().unwrap()
    }

    pub fn read_words(&self, view: &View) -> Vec<u32> {
        self.backend.read(view).unwrap().wait_as().unwrap()
    }
}

fn stored(dtype: Dtype, x: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice(x).to_vec(),
        Dtype::F16 => x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

#[track_caller]
pub fn close(what: &str, found: &[f32], expected: &[f64], bound: f64) {
    let e = error(found, expected);
    assert!(e <= bound, "{what}: relative error {e:.2e}, at most {bound:.0e} expected");
}

fn normed(x: &[f32], w: &[f32], eps: f64) -> Vec<f64> {
    x.chunks(w.len()).flat_map(|x| formula::rms_norm(&wide(x), &wide(w), eps)).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

#[test]
fn embed_takes_rows_of_every_part() {
    for b in benches() {
        for dtype in DTYPES {
            for (vocabulary, dim) in [(50, 96), (33, 7), (7, 1030)] {
                let table = Random::new(dim as u64).normals(vocabulary * dim);
                let ids = [0, vocabulary as u32 - 1, 3, 3, 5, vocabulary as u32, u32::MAX];
                let view = b.stored(dtype, &table);
                // A third of the table at a time where its rows can be cut.
                let small = Caps { max_binding: view.bytes / 3 + 64, ..b.caps.clone() };
                for caps in [&b.caps, &small] {
                    let Ok(weight) = Weight::new(caps, dtype, vocabulary as u64, dim as u64, &view) else { continue };
                    let x = b.floats(&vec![7.0; ids.len() * dim]);
                    let ids_view = b.words(&ids);
                    // The table alone is to be cut.
                    b.run(|pass| ops::embed(&b.caps, pass, &ids_view, &weight, &x, ids.len() as u64).unwrap());
                    let expected: Vec<f32> = ids
                        .iter()
                        .flat_map(|&id| match table.chunks(dim).nth(id as usize) {
                            Some(row) => row.to_vec(),
                            None => vec![7.0; dim],
                        })
                        .collect();
                    assert_eq!(b.read(&x), expected, "{} {dtype} [{vocabulary}, {dim}]", b.name);
                }
            }
        }
    }
}

#[test]
fn rms_norm_of_some_rows() {
    for b in benches() {
        for (rows, row0, dim) in [(1, 0, 96), (3, 2, 1000), (2, 1, 5), (1, 7, 4096), (300, 0, 64)] {
            let mut r = Random::new(dim as u64);
            let (x, w) = (r.normals((row0 + rows) * dim), r.normals(dim));
            let (xv, wv, y) = (b.floats(&x), b.floats(&w), b.poisoned(rows * dim));
            b.run(|pass| {
                ops::rms_norm(&b.caps, pass, &xv, row0 as u64, &wv, &y, rows as u64, dim as u64, 1e-6).unwrap()
            });
            let expected = normed(&x[row0 * dim..], &w, 1e-6);
            close(&format!("{} {rows} {row0} {dim}", b.name), &b.read(&y), &expected, 1e-6);
        }
    }
}

/// One product with everything that can vary.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    dtype: Dtype,
    add: bool,
    /// Unused numbers before and between the rows of x and y.
    gap: usize,
    /// Parts that w is cut into, about.
    parts: u64,
}

fn check_product(b: &Bench, p: &Product) {
    let &Product { m, n, k, dtype, add, gap, parts } = p;
    let what = format!("{} [{m}, {k}] x [{n}, {k}] {dtype} add {add} gap {gap} parts {parts}", b.name);
    let mut r = Random::new((m * 31 + n * 7 + k) as u64);
    let (x, w, y0) = (r.normals(m * k), r.normals(n * k), r.normals(m * n));
    let spread = |x: &[f32], width: usize| -> Vec<f32> {
        let row = |row: &[f32]| std::iter::repeat_n(f32::NAN, gap).chain(row.iter().copied()).collect::<Vec<_>>();
        x.chunks(width).flat_map(row).collect()
    };
    let rows = |view: View, width: usize| Rows { view, off: gap as u64, stride: (width + gap) as u64 };
    let xv = rows(b.floats(&spread(&x, k)), k);
    let start = if add { spread(&y0, n) } else { vec![f32::NAN; m * (n + gap)] };
    let yv = rows(b.floats(&start), n);
    let view = b.stored(dtype, &w);
    let small = Caps { max_binding: view.bytes / parts + 512, ..b.caps.clone() };
    let Ok(weight) = Weight::new(if parts > 1 { &small } else { &b.caps }, dtype, n as u64, k as u64, &view) else {
        return;
    };
    b.run(|pass| ops::linear(&b.caps, pass, &xv, &weight, &yv, m as u64, add).unwrap());
    let mut expected = formula::matmul(&wide(&x), &wide(&w), k);
    if add {
        expected.iter_mut().zip(&y0).for_each(|(e, &y)| *e += f64::from(y));
    }
    let found = b.read(&yv.view);
    let kept: Vec<f32> = found.chunks(n + gap).flat_map(|row| row[gap..].to_vec()).collect();
    close(&what, &kept, &expected, 2e-6);
    assert!(found.chunks(n + gap).all(|row| row[..gap].iter().all(|x| x.is_nan())), "{what}: wrote between rows");
}

#[test]
fn products_of_every_type_and_size() {
    for b in benches() {
        for dtype in DTYPES {
            for (m, n, k) in [
                (1, 1, 8),
                (1, 65, 256),
                (2, 96, 96),
                (3, 33, 1000),
                (5, 130, 72),
                (8, 17, 520),
                (9, 64, 64),
                (17, 100, 40),
                (33, 129, 136),
                (130, 200, 264),
            ] {
                check_product(&b, &Product { m, n, k, dtype, add: m % 2 == 1, gap: 0, parts: 1 });
            }
        }
    }
}

#[test]
fn products_with_rows_that_start_anywhere() {
    for b in benches() {
        for dtype in DTYPES {
            for (m, n, k) in [(1, 5, 1), (1, 70, 33), (3, 33, 7), (4, 40, 130), (20, 67, 31), (40, 35, 66)] {
                for gap in [0, 3, 4] {
                    check_product(&b, &Product { m, n, k, dtype, add: false, gap, parts: 1 });
                }
            }
        }
    }
}

#[test]
fn products_with_weights_in_parts() {
    for b in benches() {
        for dtype in DTYPES {
            for (m, n, k) in [(1, 999, 64), (6, 300, 96), (40, 517, 64), (2, 5000, 3)] {
                for add in [false, true] {
                    check_product(&b, &Product { m, n, k, dtype, add, gap: 0, parts: 3 });
                }
            }
        }
    }
}

#[test]
fn large_tiles_of_a_product() {
    for b in benches() {
        // Enough tiles of 128 x 128 that the builder takes them, with ragged edges.
        check_product(&b, &Product { m: 1030, n: 1940, k: 40, dtype: Dtype::Bf16, add: false, gap: 0, parts: 1 });
        check_product(&b, &Product { m: 530, n: 900, k: 24, dtype: Dtype::F32, add: true, gap: 0, parts: 1 });
    }
}

#[test]
fn products_are_the_same_bits_each_time() {
    for b in benches() {
        for m in [1, 40] {
            let mut r = Random::new(9);
            let (x, w) = (b.floats(&r.normals(m * 512)), b.stored(Dtype::Bf16, &r.normals(300 * 512)));
            let weight = Weight::new(&b.caps, Dtype::Bf16, 300, 512, &w).unwrap();
            let run = || {
                let y = Rows::packed(b.poisoned(m * 300), 300);
                b.run(|pass| {
                    ops::linear(&b.caps, pass, &Rows::packed(x.clone(), 512), &weight, &y, m as u64, false).unwrap()
                });
                b.read(&y.view).iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
            };
            assert_eq!(run(), run(), "{} m = {m}", b.name);
        }
    }
}

#[test]
fn norm_and_swiglu_around_products() {
    for b in benches() {
        for dtype in DTYPES {
            for (m, dim, k) in [(1, 160, 96), (3, 37, 200), (8, 66, 31), (1, 1000, 1024), (50, 160, 96)] {
                let what = format!("{} m = {m}, dim = {dim}, k = {k}, {dtype}", b.name);
                let mut r = Random::new((m + dim + k) as u64);
                let (x, nw, gate, up) = (r.normals(m * k), r.normals(k), r.normals(dim * k), r.normals(dim * k));
                let scale = |w: Vec<f32>| w.iter().map(|w| w / 16.0).collect::<Vec<f32>>();
                let (gate, up) = (scale(gate), scale(up));
                let (xv, nv, scratch) = (b.floats(&x), b.floats(&nw), b.poisoned(m * k));
                let norm = Norm { weight: &nv, eps: 1e-6, scratch: &scratch };
                let weight =
                    |w: &[f32]| Weight::new(&b.caps, dtype, dim as u64, k as u64, &b.stored(dtype, w)).unwrap();
                let (gate_w, up_w) = (weight(&gate), weight(&up));
                let with_norm = (&wide(&nw)[..], 1e-6);

                let y = Rows::packed(b.poisoned(m * dim), dim as u64);
                b.run(|pass| ops::norm_linear(&b.caps, pass, &xv, norm, &gate_w, &y, m as u64).unwrap());
                let expected = formula::matvec(&wide(&x), Some(with_norm), &wide(&gate), None, k);
                close(&what, &b.read(&y.view), &expected, 2e-6);

                let (both, y) = (b.poisoned(m * 2 * dim), b.poisoned(m * dim));
                b.run(|pass| ops::swiglu_up(&b.caps, pass, &xv, norm, &gate_w, &up_w, &both, &y, m as u64).unwrap());
                let expected = formula::matvec(&wide(&x), Some(with_norm), &wide(&gate), Some(&wide(&up)), k);
                close(&what, &b.read(&y), &expected, 5e-6);
            }
        }
    }
}

#[test]
fn swiglu_saturates_quietly() {
    for b in benches() {
        let gate_up = [-200.0, -1e4, 200.0, 0.0, 1.0, 2.0, 3.0, 4.0];
        let (view, y) = (b.floats(&gate_up), b.poisoned(4));
        b.run(|pass| ops::swiglu(&b.caps, pass, &view, &y, 1, 4).unwrap());
        close(&b.name, &b.read(&y), &[0.0, 0.0, 600.0, 0.0], 1e-6);
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_no_nan() {
    for b in benches() {
        let n = 5000;
        let mut r = Random::new(4);
        let mut x = r.normals(n * 6);
        let at = |row: usize, i: usize| row * n + i;
        x[at(0, 4999)] = 50.0;
        (x[at(1, 300)], x[at(1, 44)], x[at(1, 4000)]) = (50.0, 50.0, 50.0);
        (x[at(2, 0)], x[at(2, 77)], x[at(2, 255)]) = (f32::NAN, 50.0, f32::NAN);
        x[at(3, 0)..at(4, 0)].fill(f32::NEG_INFINITY);
        x[at(3, 0)] = f32::NAN;
        x[at(4, 0)..at(5, 0)].fill(f32::NAN);
        x[at(4, 1234)] = -3.0;
        x[at(5, 0)..at(6, 0)].fill(f32::NAN);
        let (view, ids) = (b.floats(&x), b.poisoned(6));
        b.run(|pass| ops::argmax(&b.caps, pass, &view, &ids, 6, n as u64).unwrap());
        assert_eq!(b.read_words(&ids), [4999, 44, 77, 1, 1234, u32::MAX], "{}", b.name);

        let (view, ids) = (b.floats(&x[..3]), b.poisoned(3));
        b.run(|pass| ops::argmax(&b.caps, pass, &view, &ids, 3, 1).unwrap());
        assert_eq!(b.read_words(&ids), [0, 0, 0], "{}", b.name);
    }
}

#[test]
fn copy_and_fill_move_words() {
    for b in benches() {
        let from: Vec<u32> = (0..5000).collect();
        let (fv, to) = (b.words(&from), b.words(&[9; 5000]));
        b.run(|pass| {
            ops::fill(&b.caps, pass, &to, 10, 4000, 1).unwrap();
            ops::copy(&b.caps, pass, &fv, 2000, &to, 100, 2500).unwrap();
            ops::copy(&b.caps, pass, &fv, 0, &to, 0, 0).unwrap();
        });
        let expected: Vec<u32> = (0..5000)
            .map(|i| match i {
                100..2600 => i + 1900,
                10..4010 => 1,
                _ => 9,
            })
            .collect();
        assert_eq!(b.read_words(&to), expected, "{}", b.name);
    }
}

pub fn assert_names<T: std::fmt::Debug>(result: gatedelta::Result<T>, what: &str) {
    let message = result.expect_err(what).to_string();
    assert!(message.contains(what), "{message:?} does not name {what:?}");
}

#[test]
fn views_that_are_too_small_are_named() {
    let b = &benches()[0];
    let (caps, pass) = (&b.caps, &mut Pass::new());
    let at = |n: usize| b.poisoned(n);
    let weight = |n: u64, k: u64| Weight::new(caps, Dtype::F32, n, k, &at((n * k) as usize)).unwrap();
    let rows = |n: usize, stride: u64| Rows::packed(at(n), stride);

    assert_names(ops::embed(caps, pass, &at(2), &weight(5, 8), &at(24), 3), "ids");
    assert_names(ops::embed(caps, pass, &at(3), &weight(5, 8), &at(23), 3), "x");
    assert_names(ops::rms_norm(caps, pass, &at(15), 1, &at(8), &at(8), 1, 8, 1e-6), "x");
    assert_names(ops::rms_norm(caps, pass, &at(16), 1, &at(7), &at(8), 1, 8, 1e-6), "w");
    assert_names(ops::rms_norm(caps, pass, &at(16), 1, &at(8), &at(7), 1, 8, 1e-6), "y");
    assert_names(ops::rms_norm(caps, pass, &at(16), 0, &at(8), &at(8), 1, 0, 1e-6), "dim");
    assert_names(Weight::new(caps, Dtype::F16, 4, 8, &at(15)), "weight");
    for m in [1, 40] {
        let (x, y) = (m as usize * 8, m as usize * 5);
        assert_names(ops::linear(caps, pass, &rows(x - 1, 8), &weight(5, 8), &rows(y, 5), m, false), "x");
        assert_names(ops::linear(caps, pass, &rows(x, 8), &weight(5, 8), &rows(y - 1, 5), m, false), "y");
    }
    let mut short = weight(5, 8);
    short.parts[0].view = at(39);
    assert_names(ops::linear(caps, pass, &rows(8, 8), &short, &rows(5, 5), 1, false), "w");
    let mut gap = weight(5, 8);
    gap.parts[0].row0 = 1;
    assert_names(ops::linear(caps, pass, &rows(8, 8), &gap, &rows(5, 5), 1, false), "first row of a part");
    assert_names(ops::linear(caps, pass, &rows(16, 7), &weight(5, 8), &rows(10, 5), 2, false), "x: stride");
    assert_names(ops::linear(caps, pass, &rows(8, u64::MAX), &weight(5, 8), &rows(5, 5), 2, false), "x: stride");
    let (gate, up) = (weight(5, 8), weight(4, 8));
    let norm = Norm { weight: &at(8), eps: 1e-6, scratch: &at(8) };
    assert_names(ops::swiglu_up(caps, pass, &at(8), norm, &gate, &up, &at(10), &at(5), 1), "up");
    assert_names(ops::swiglu(caps, pass, &at(9), &at(5), 1, 5), "gate_up");
    assert_names(ops::argmax(caps, pass, &at(9), &at(1), 2, 5), "x");
    assert_names(ops::argmax(caps, pass, &at(10), &at(1), 2, 5), "ids");
    assert_names(ops::fill(caps, pass, &at(9), 5, 5, 0), "to");
    assert_names(ops::copy(caps, pass, &at(9), 0, &at(9), u64::MAX, 5), "to");
    let same = at(9);
    assert_names(ops::copy(caps, pass, &same, 0, &same, 5, 2), "to");
    assert!(pass.launches.iter().all(|l| l.cells() > 0));
}

#[test]
fn what_a_device_cannot_bind_is_refused_with_numbers() {
    let b = &benches()[0];
    let caps = Caps { max_binding: 4096, align: 64, ..b.caps.clone() };
    let pass = &mut Pass::new();
    let x = b.poisoned(4096);
    let err = ops::swiglu(&caps, pass, &x, &b.poisoned(2048), 1, 2048).unwrap_err().to_string();
    assert!(err.contains("16384") && err.contains("4096"), "{err}");
    let off = x.slice(32, 64).unwrap();
    assert_names(ops::swiglu(&caps, pass, &off, &b.poisoned(8), 1, 8), "gate_up: first byte");
}

#[test]
fn weights_are_cut_where_a_device_can_see_them() {
    let b = &benches()[0];
    for (n, k, align) in [(1000u64, 96u64, 256u64), (77, 31, 64), (5, 1 << 20, 256), (4096, 1, 256), (0, 8, 16)] {
        for max_binding in [2 << 20, 70_000, 8192] {
            let caps = Caps { max_binding, align, ..b.caps.clone() };
            match Weight::split(&caps, Dtype::Bf16, n, k) {
                Ok(parts) => {
                    assert_eq!(parts.first().map_or(0, |r| r.start), 0);
                    assert_eq!(parts.last().map_or(0, |r| r.end), n);
                    assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
                    for r in parts {
                        assert!((r.end - r.start) * k * 2 <= max_binding && !r.is_empty());
                        assert_eq!(r.start * k * 2 % align, 0);
                    }
                }
                Err(e) => assert!(k * 2 * align > max_binding, "[{n}, {k}] in {max_binding}: {e}"),
            }
        }
    }
}

#[test]
fn stacked_weights_act_as_one() {
    for b in benches() {
        let mut r = Random::new(8);
        let (w1, w2, x) = (r.normals(7 * 64), r.normals(30 * 64), r.normals(64));
        let weight =
            |w: &[f32]| Weight::new(&b.caps, Dtype::Bf16, w.len() as u64 / 64, 64, &b.stored(Dtype::Bf16, w)).unwrap();
        let both = Weight::stack(&[weight(&w1), weight(&w2)]).unwrap();
        assert_eq!((both.n, both.bytes()), (37, 37 * 128));
        let (xv, y) = (Rows::packed(b.floats(&x), 64), Rows::packed(b.poisoned(37), 37));
        b.run(|pass| ops::linear(&b.caps, pass, &xv, &both, &y, 1, false).unwrap());
        close(&b.name, &b.read(&y.view), &formula::matmul(&wide(&x), &wide(&[w1, w2].concat()), 64), 2e-6);
    }
    assert_names(Weight::stack(&[]), "stack");
}
