//! The rows of the model, each against its formula.

use super::*;

#[test]
fn norms() {
    let mut b = Bench::new(2);
    for (hv, dv, tokens) in [(3usize, 48usize, 5usize), (1, 128, 70), (2, 20, 3)] {
        let (o, z, w) = (b.random(tokens * hv * dv), b.random(tokens * (hv * dv + 3) + 9), b.random(dv));
        let (vo, vz, vw) = (b.f32s(&o), b.f32s(&z), b.f32s(&w));
        let y = b.poisoned(o.len(), Dtype::F32);
        let params = GatedNormParams {
            hv: hv as u32,
            tokens: tokens as u32,
            z_stride: (hv * dv + 3) as u32,
            z_off: 9,
            eps: 1e-6,
        };
        let consts = GatedNormConsts { dv: dv as u32, lanes: 1 };
        run(&b, |p| {
            p.launch(&GATED_NORM, consts, params, &[&vo, &vz, &vw, &y], [hv as u32, tokens as u32, 1], 1);
        })
        .unwrap();
        let answer: Vec<f64> = (0..tokens * hv)
            .flat_map(|i| {
                let z = &z[9 + i / hv * (hv * dv + 3) + i % hv * dv..][..dv];
                formula::gated_norm(&o[i * dv..][..dv], z, &w, 1e-6)
            })
            .collect();
        close(&b.load(&y, Dtype::F32), &answer, 1e-6, "gated_norm");
    }
    for dim in [1usize, 17, 1024] {
        let (x, w) = (b.random(6 * dim), b.random(dim));
        let (vx, vw, y) = (b.f32s(&x), b.f32s(&w), b.poisoned(4 * dim, Dtype::F32));
        let params = RmsNormParams { dim: dim as u32, row0: 2, eps: 1e-5 };
        run(&b, |p| p.launch(&RMS_NORM, RmsNormConsts { lanes: 1 }, params, &[&vx, &vw, &y], [4, 1, 1], 1)).unwrap();
        let answer: Vec<f64> = x[2 * dim..].chunks(dim).flat_map(|x| formula::rms_norm(x, &w, 1e-5)).collect();
        close(&b.load(&y, Dtype::F32), &answer, 1e-6, "rms_norm");
    }
}

#[test]
fn matmul_equals_its_formula() {
    for (m, n, k) in [(1, 1, 1), (9, 70, 33), (16, 96, 256), (33, 193, 300), (5, 7, 1030), (530, 20, 40), (64, 100, 16)]
    {
        for dtype in TYPES {
            for add in [0, 1] {
                let mut b = Bench::new(2);
                let (x, w, y0) = (b.random(m * k), b.random(n * k), b.random(m * n));
                let vx = b.f32s(&spread(&x, k, k + 2, 3));
                let (vw, y) = (b.store(&w, dtype), b.f32s(&spread(&y0, n, n + 1, 2)));
                let consts = MatmulConsts {
                    w_type: dtype.code(),
                    add,
                    tile_m: 128,
                    tile_n: 256,
                    tile_k: 16,
                    reg_m: 1,
                    reg_n: 1,
                    lanes: 1,
                    wide: 0,
                };
                let params = MatmulParams {
                    m: m as u32,
                    n: n as u32,
                    k: k as u32,
                    x_stride: k as u32 + 2,
                    x_off: 3,
                    y_stride: n as u32 + 1,
                    y_off: 2,
                };
                let grid = [n.div_ceil(256) as u32, m.div_ceil(128) as u32, 1];
                run(&b, |p| p.launch(&MATMUL, consts, params, &[&vx, &vw, &y], grid, 1 << 20)).unwrap();
                let mut answer = formula::matmul(&x, &w, k);
                if add == 1 {
                    answer.iter_mut().zip(&y0).for_each(|(a, y)| *a += y);
                }
                let found = b.load(&y, Dtype::F32);
                let rows: Vec<f32> = found[2..].chunks(n + 1).flat_map(|row| row[..n].to_vec()).collect();
                close(&rows, &answer, 1e-6, &format!("matmul {m} {n} {k} {dtype}"));
                assert!(found[2..].iter().skip(n).step_by(n + 1).all(|x| x.is_nan()), "matmul wrote past its columns");
            }
        }
    }
}

#[test]
fn matvec_equals_its_formula_with_norm_and_glu() {
    for (m, n, k) in [(1, 1, 1), (1, 70, 33), (2, 40, 256), (3, 129, 65), (7, 5, 1030), (8, 64, 1024)] {
        for dtype in TYPES {
            for (add, norm, glu) in [(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)] {
                let mut b = Bench::new(2);
                let (x, w, up) = (b.random(m * k), b.random(n * k), b.random(n * k));
                let (y0, weight) = (b.random(m * n), b.random(k));
                let (vx, vn) = (b.f32s(&spread(&x, k, k + 2, 3)), b.f32s(&weight));
                let (vw, vu, y) = (b.store(&w, dtype), b.store(&up, dtype), b.f32s(&y0));
                let consts =
                    MatvecConsts { w_type: dtype.code(), add, norm, glu, rows: 64, batch: 8, lanes: 1, wide: 0 };
                let params = MatvecParams {
                    m: m as u32,
                    n: n as u32,
                    k: k as u32,
                    x_stride: k as u32 + 2,
                    x_off: 3,
                    y_stride: n as u32,
                    y_off: 0,
                    eps: 1e-6,
                };
                let args = [&vx, &vn, &vw, &vu, &y];
                run(&b, |p| p.launch(&MATVEC, consts, params, &args, [n.div_ceil(64) as u32, 1, 1], 1 << 20)).unwrap();
                let norm = (norm == 1).then_some((&weight[..], 1e-6));
                let mut answer = formula::matvec(&x, norm, &w, (glu == 1).then_some(&up[..]), k);
                if add == 1 {
                    answer.iter_mut().zip(&y0).for_each(|(a, y)| *a += y);
                }
                close(&b.load(&y, Dtype::F32), &answer, 2e-6, &format!("matvec {m} {n} {k} {dtype}"));
            }
        }
    }
}

#[test]
fn weights_may_start_at_any_byte() {
    let mut b = Bench::new(2);
    let (n, k) = (37, 100);
    let (x, w) = (b.random(k), b.random(n * k));
    let answer = formula::matmul(&x, &w, k);
    let vx = b.f32s(&x);
    for dtype in TYPES {
        for odd in [0, 1, 2, 3] {
            let bytes = [vec![0xff; odd], encode(&w, dtype)].concat();
            let host = HostBytes::new(Arc::new(bytes));
            let host = host.slice(odd..host.bytes().len()).unwrap();
            let start = host.bytes().as_ptr();
            let vw = b.cpu.import("w", host.clone()).unwrap().view();
            assert_eq!(start, host.bytes().as_ptr());
            let y = b.poisoned(n, Dtype::F32);
            let consts =
                MatvecConsts { w_type: dtype.code(), add: 0, norm: 0, glu: 0, rows: 8, batch: 1, lanes: 1, wide: 0 };
            let params = MatvecParams {
                m: 1,
                n: n as u32,
                k: k as u32,
                x_stride: k as u32,
                x_off: 0,
                y_stride: n as u32,
                y_off: 0,
                eps: 0.0,
            };
            run(&b, |p| p.launch(&MATVEC, consts, params, &[&vx, &vx, &vw, &vw, &y], [5, 1, 1], 1)).unwrap();
            close(&b.load(&y, Dtype::F32), &answer, 1e-6, &format!("{dtype} from byte {odd}"));
            if dtype == Dtype::F32 {
                // As a small f32 argument, it is copied to where it can be read.
                let y = b.poisoned(n, Dtype::F32);
                let params = RmsNormParams { dim: n as u32, row0: 0, eps: 1e-6 };
                run(&b, |p| p.launch(&RMS_NORM, RmsNormConsts { lanes: 1 }, params, &[&vw, &vw, &y], [1, 1, 1], 1))
                    .unwrap();
                close(&b.load(&y, Dtype::F32), &formula::rms_norm(&w[..n], &w[..n], 1e-6), 1e-6, "unaligned norm");
            }
        }
    }
}

#[test]
fn attention_over_pages_equals_its_formula() {
    // (tokens, heads, kv, D, rot, positions before, page, span, tile_q)
    let cases = [
        (1usize, 8usize, 2usize, 64usize, 16usize, 100usize, 64usize, 32usize, 32usize),
        (37, 4, 2, 32, 32, 0, 64, 64, 16),
        (9, 3, 3, 48, 8, 130, 70, 35, 4),
        (70, 8, 2, 256, 64, 3, 1000, 1000, 32),
    ];
    for (t, heads, kv, d, rot, before, page, span, tile_q) in cases {
        for dtype in TYPES {
            let mut b = Bench::new(2);
            let (group, width, total) = (heads / kv, (2 * heads + 2 * kv) * d, before + t);
            let (qkv, q_norm, k_norm) = (b.random(total * width), b.random(d), b.random(d));
            let angles = b.random(total * rot / 2);
            let rope: Vec<f64> = angles
                .chunks(rot / 2)
                .flat_map(|a| a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())).collect::<Vec<_>>())
                .map(|x| x as f32 as f64)
                .collect();
            let (vn, vk) = (b.f32s(&q_norm), b.f32s(&k_norm));
            let pages: Vec<[View; 2]> = (0..total.div_ceil(page))
                .map(|_| [b.poisoned(page * kv * d, dtype), b.poisoned(page * kv * d, dtype)])
                .collect();
            // Earlier positions first, then the tokens that are asked about.
            let mut q = None;
            for (from, n) in [(0, before), (before, t)] {
                let vx = b.f32s(&qkv[from * width..][..n * width]);
                let vr = b.f32s(&rope[from * rot..][..n * rot]);
                let pos = b.words(&(from as u32..(from + n) as u32).collect::<Vec<_>>());
                let vq = b.poisoned(n * heads * d, Dtype::F32);
                run(&b, |p| {
                    for (i, [k, v]) in pages.iter().enumerate() {
                        let consts =
                            AttnPrepareConsts { dim: d as u32, rot: rot as u32, kv_type: dtype.code(), lanes: 1 };
                        let params = AttnPrepareParams {
                            heads: heads as u32,
                            kv_heads: kv as u32,
                            page_start: (i * page) as u32,
                            page_len: page as u32,
                            eps: 1e-6,
                        };
                        let args = [&vx, &vn, &vk, &vr, &pos, &vq, k, v];
                        p.launch(&ATTN_PREPARE, consts, params, &args, [(heads + 2 * kv) as u32, n as u32, 1], 1 << 20);
                    }
                })
                .unwrap();
                q = Some((vq, pos, vx));
            }
            let (vq, pos, vx) = q.unwrap();
            let rows: Vec<_> = (0..total)
                .map(|i| {
                    let (x, r) = (&qkv[i * width..][..width], &rope[i * rot..][..rot]);
                    formula::attn_prepare(x, &q_norm, &k_norm, r, heads, kv, 1e-6)
                })
                .collect();
            let answer_q: Vec<f64> = rows[before..].iter().flat_map(|r| r.0.clone()).collect();
            close(&b.load(&vq, Dtype::F32), &answer_q, 1e-6, "q");
            let cache = |which: usize| -> Vec<f64> {
                pages.iter().flat_map(|p| wide(&b.load(&p[which], dtype))).take(total * kv * d).collect()
            };
            let (k, v) = (cache(0), cache(1));
            let answer_k: Vec<f64> = rows.iter().flat_map(|r| r.1.clone()).collect();
            let answer_v: Vec<f64> = rows.iter().flat_map(|r| r.2.clone()).collect();
            let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
            close(&narrow(&k), &answer_k, bound(dtype), "k cache");
            close(&narrow(&v), &answer_v, bound(dtype), "v cache");

            let splits = page.div_ceil(span);
            let slots = splits * pages.len();
            let part = b.poisoned(t * heads * slots * (d + 2), Dtype::F32);
            let y = b.poisoned(t * heads * d, Dtype::F32);
            let scale = 1.0 / (d as f32).sqrt();
            run(&b, |p| {
                for (i, [k, v]) in pages.iter().enumerate() {
                    let consts = AttendConsts {
                        dim: d as u32,
                        kv_type: dtype.code(),
                        tile_q: tile_q as u32,
                        tile_k: 16,
                        lanes: 1,
                    };
                    let params = AttendParams {
                        tokens: t as u32,
                        heads: heads as u32,
                        kv_heads: kv as u32,
                        page_start: (i * page) as u32,
                        page_len: page as u32,
                        span: span as u32,
                        slot0: (i * splits) as u32,
                        slots: slots as u32,
                        scale,
                    };
                    let grid = [(t * group).div_ceil(tile_q) as u32, kv as u32, splits as u32];
                    p.launch(&ATTEND, consts, params, &[&vq, k, v, &pos, &part], grid, 1 << 20);
                }
                let params = AttendMergeParams { heads: heads as u32, slots: slots as u32, qkv_stride: width as u32 };
                let consts = AttendMergeConsts { dim: d as u32, lanes: 1 };
                p.launch(&ATTEND_MERGE, consts, params, &[&part, &vx, &y], [heads as u32, t as u32, 1], 1 << 20);
            })
            .unwrap();

            let q = wide(&b.load(&vq, Dtype::F32));
            let mut answer = Vec::new();
            for i in 0..t {
                for h in 0..heads {
                    let of_head = |x: &[f64]| -> Vec<f64> {
                        (0..=before + i).flat_map(|n| x[(n * kv + h / group) * d..][..d].to_vec()).collect()
                    };
                    let q = &q[(i * heads + h) * d..][..d];
                    let (m, l, acc) = formula::attend(q, &of_head(&k), &of_head(&v), scale as f64);
                    let whole: Vec<f64> = [m, l].into_iter().chain(acc).collect();
                    let gate = &qkv[(before + i) * width + (2 * h + 1) * d..][..d];
                    answer.extend(formula::attend_merge(&whole, gate));
                }
            }
            close(&b.load(&y, Dtype::F32), &answer, 2e-6, &format!("attention of {t} over {total} {dtype}"));
        }
    }
}

#[test]
fn embed_takes_only_the_ids_of_its_part() {
    let mut b = Bench::new(2);
    let (dim, rows) = (19, 10);
    let table = b.random(rows * dim);
    for dtype in TYPES {
        let (vt, ids) = (b.store(&table, dtype), b.words(&[103, 5, 109, 110, 100]));
        let x = b.f32s(&vec![0.5; 5 * dim]);
        let params = EmbedParams { dim: dim as u32, row0: 100, rows: rows as u32 };
        run(&b, |p| p.launch(&EMBED, EmbedConsts { w_type: dtype.code() }, params, &[&ids, &vt, &x], [5, 1, 1], 1))
            .unwrap();
        let row = |i: usize| table[i * dim..][..dim].to_vec();
        let answer = [row(3), vec![0.5; dim], row(9), vec![0.5; dim], row(0)].concat();
        close(&b.load(&x, Dtype::F32), &answer, 0.0, "embed");
    }
}

#[test]
fn swiglu_argmax_copy_and_fill() {
    let mut b = Bench::new(2);
    for (rows, dim) in [(1, 1), (3, 77), (2, 9000)] {
        let gate_up = b.random(rows * 2 * dim).iter().map(|x| x * 9.0).collect::<Vec<_>>();
        let (x, y) = (b.f32s(&gate_up), b.poisoned(rows * dim, Dtype::F32));
        let grid = [(rows * dim).div_ceil(64) as u32, 1, 1];
        let params = SwigluParams { rows: rows as u32, dim: dim as u32 };
        run(&b, |p| p.launch(&SWIGLU, SwigluConsts { block: 64 }, params, &[&x, &y], grid, 1 << 20)).unwrap();
        close(&b.load(&y, Dtype::F32), &formula::swiglu(&gate_up, dim), 1e-6, "swiglu");
    }
    let nan = f64::NAN;
    let rows = [
        vec![nan, 1.0, 3.0, -2.0, 3.0, nan, 0.0],
        vec![nan; 7],
        vec![f64::NEG_INFINITY; 7],
        vec![-5.0, -4.0, -3.0, -9.0, f64::NEG_INFINITY, -3.0, -3.5],
    ];
    let (x, ids) = (b.f32s(&rows.concat()), b.words(&[99; 4]));
    run(&b, |p| p.launch(&ARGMAX, ArgmaxConsts { lanes: 1 }, ArgmaxParams { n: 7 }, &[&x, &ids], [4, 1, 1], 1))
        .unwrap();
    assert_eq!(b.cpu.read(&ids).unwrap().wait_as::<u32>().unwrap(), [2, u32::MAX, 0, 2]);
    let long = b.random(40_001);
    let (x, ids) = (b.f32s(&long), b.words(&[0]));
    run(&b, |p| p.launch(&ARGMAX, ArgmaxConsts { lanes: 1 }, ArgmaxParams { n: 40_001 }, &[&x, &ids], [1, 1, 1], 1))
        .unwrap();
    assert_eq!(b.cpu.read(&ids).unwrap().wait_as::<u32>().unwrap()[0] as usize, formula::argmax(&long));

    let src: Vec<u32> = (0..10_000).collect();
    let (vs, vd) = (b.words(&src), b.words(&vec![7; 10_000]));
    run(&b, |p| {
        let params = WordsParams { n: 9000, src_off: 500, dst_off: 900, word: 0 };
        p.launch(&COPY, WordsConsts { block: 1000 }, params, &[&vs, &vd], [9, 1, 1], 1 << 20);
        let params = WordsParams { n: 3, src_off: 0, dst_off: 1000, word: 42 };
        p.launch(&FILL, WordsConsts { block: 1000 }, params, &[&vd], [1, 1, 1], 1 << 20);
    })
    .unwrap();
    let mut answer = vec![7; 10_000];
    answer[900..9900].copy_from_slice(&src[500..9500]);
    answer[1000..1003].fill(42);
    assert_eq!(b.cpu.read(&vd).unwrap().wait_as::<u32>().unwrap(), answer);
}
