//! Sequences cut into segments: the same answers as whole ones, whatever the heads forget, forward and backward.

use gatedelta::backend::{Backend, Buffer, View};
use gatedelta::gdn::{Backward, GradIo, Gradients, Io, Outputs, Prefill};
use gatedelta::kernel::gdn_cut::{CUT, CutConsts, CutParams};
use gatedelta::pass::{Pass, Rows};
use gatedelta::shape::{Dtype, HeadMap, Heads};
use gatedelta::tune::{self, Cut, Tile};

use crate::naive::{recurrence, recurrence_grad};
use crate::util::{Batch, Random, bound, devices, error, heads};

/// How a call is to be cut.
#[derive(Debug, Clone, Copy)]
pub struct How {
    pub cut: Option<Cut>,
    /// [`Options::exact`](gatedelta::gdn::Options::exact).
    pub exact: bool,
    /// Bytes of scratch: few make many pieces.
    pub scratch: u64,
    /// Numbers before each row of q, k, v, o and their gradients.
    pub gap: usize,
}

impl How {
    fn every(chunks: u32) -> Self {
        How { cut: Some(Cut::every(chunks)), exact: false, scratch: 1 << 30, gap: 0 }
    }

    fn exact(self) -> Self {
        How { exact: true, ..self }
    }

    /// Heads that do not forget are left whole.
    fn or_whole(self) -> Self {
        How { cut: self.cut.map(|cut| Cut { exact: false, ..cut }), ..self }
    }

    pub fn whole() -> Self {
        How { cut: None, ..How::every(1) }
    }

    fn tile(&self, backend: &dyn Backend, heads: &Heads) -> Tile {
        let tile = tune::tile(backend.caps(), heads);
        Tile { cut: self.cut, scratch: self.scratch, grad_scratch: self.scratch, grad_states: 4 * self.scratch, ..tile }
    }
}

fn put(backend: &dyn Backend, bytes: &[u8]) -> Buffer {
    let buffer = backend.alloc("test", bytes.len().max(16) as u64).unwrap();
    backend.write(&buffer.view(), bytes).unwrap();
    buffer
}

/// As they are stored.
fn bytes_of(x: &[f32], store: Dtype) -> Vec<u8> {
    match store {
        Dtype::F32 => bytemuck::cast_slice(x).to_vec(),
        Dtype::F16 => x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

pub fn numbers(backend: &dyn Backend, x: &[f32], store: Dtype) -> Buffer {
    put(backend, &bytes_of(x, store))
}

pub fn loaded(backend: &dyn Backend, view: &View, n: usize, store: Dtype) -> Vec<f32> {
    let bytes = backend.read(view).unwrap().wait().unwrap();
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    let mut x: Vec<f32> = match store {
        Dtype::F32 => bytemuck::pod_collect_to_vec(&bytes),
        Dtype::F16 => halves().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => halves().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
    };
    x.truncate(n);
    x
}

/// Numbers before a row that are NaN, and must stay so.
const GUARD: usize = 64;

/// Rows of `width` numbers with a gap before each: of NaN, at its end if it is long.
pub struct Spread<'a> {
    backend: &'a dyn Backend,
    buffer: Buffer,
    width: usize,
    gap: usize,
    store: Dtype,
}

impl<'a> Spread<'a> {
    pub fn new(backend: &'a dyn Backend, x: &[f32], width: u64, gap: usize, store: Dtype) -> Self {
        let width = width as usize;
        let guarded = |row| std::iter::repeat_n(&f32::NAN, gap.min(GUARD)).chain(row).copied();
        let rows = x.chunks_exact(width);
        let buffer = if gap <= GUARD {
            numbers(backend, &rows.flat_map(guarded).collect::<Vec<_>>(), store)
        } else {
            // Row by row: what lies between them is not touched, so that a driver may leave it without memory.
            let bytes = rows.len() as u64 * (width + gap) as u64 * store.size();
            let buffer = backend.alloc("test", bytes).unwrap();
            for (t, row) in rows.enumerate() {
                let bytes = bytes_of(&guarded(row).collect::<Vec<_>>(), store);
                backend.write(&guarded_row(&buffer, t, width, gap, store), &bytes).unwrap();
            }
            buffer
        };
        Spread { backend, buffer, width, gap, store }
    }

    pub fn rows(&self) -> Rows {
        Rows { view: self.buffer.view(), off: self.gap as u64, stride: (self.width + self.gap) as u64 }
    }

    /// The first `n` numbers without the gaps, in which nothing may have been written.
    pub fn loaded(&self, n: usize) -> Vec<f32> {
        let (rows, guard) = (n / self.width, self.gap.min(GUARD));
        let load = |view: &View, rows: usize| loaded(self.backend, view, rows * (guard + self.width), self.store);
        let x = if self.gap <= GUARD {
            load(&self.buffer.view(), rows)
        } else {
            let row = |t| guarded_row(&self.buffer, t, self.width, self.gap, self.store);
            (0..rows).flat_map(|t| load(&row(t), 1)).collect()
        };
        let rows = || x.chunks_exact(guard + self.width);
        assert!(rows().all(|row| row[..guard].iter().all(|x| x.is_nan())), "written before a row");
        rows().flat_map(|row| &row[guard..]).copied().collect()
    }
}

/// Row `t` and the numbers right before it.
fn guarded_row(buffer: &Buffer, t: usize, width: usize, gap: usize, store: Dtype) -> View {
    let end = (t + 1) as u64 * (width + gap) as u64;
    let numbers = (width + GUARD) as u64;
    buffer.slice((end - numbers) * store.size(), numbers * store.size()).unwrap()
}

/// o and ht, and the number of segments.
pub fn forward(backend: &dyn Backend, batch: &Batch, how: How) -> (Outputs, usize) {
    let (h, store) = (batch.shape.heads, batch.options.store);
    let (qk, vo) = ((h.hk * h.k) as u64, (h.hv * h.v) as u64);
    let states = batch.shape.sequences() * h.state_len() as usize;
    let h0 = batch.h0.clone().unwrap_or_else(|| vec![0.0; states]);
    let spread = |x: &[f32], width: u64| Spread::new(backend, x, width, how.gap, store);
    let (q, k, v) = (spread(&batch.q, qk), spread(&batch.k, qk), spread(&batch.v, vo));
    let [g, beta, state] = [&batch.g, &batch.beta, &h0].map(|x| numbers(backend, x, Dtype::F32));
    let o = spread(&vec![f32::NAN; batch.v.len()], vo);
    let io =
        Io { q: q.rows(), k: k.rows(), v: v.rows(), g: g.view(), beta: beta.view(), state: state.view(), o: o.rows() };
    let options = gatedelta::gdn::Options { exact: how.exact, ..batch.options };
    let prefill =
        Prefill::with_tile(backend, &batch.shape, &options, qk.max(vo) + how.gap as u64, how.tile(backend, &h))
            .unwrap();
    let mut pass = Pass::new();
    prefill.record(&mut pass, &io).unwrap();
    backend.run(&pass).unwrap();
    let segments = prefill.plan().pieces.iter().map(|p| p.segments.len()).sum();
    let (o, ht) = (o.loaded(batch.v.len()), loaded(backend, &state.view(), states, Dtype::F32));
    (Outputs { o, ht }, segments)
}

/// Gates of each head by token, for a batch with keys of length 1.
fn with_gates(mut batch: Batch, gate: impl Fn(usize, usize) -> f32) -> Batch {
    let hv = batch.shape.heads.hv as usize;
    batch.g.iter_mut().enumerate().for_each(|(i, g)| *g = gate(i / hv, i % hv));
    batch
}

/// Heads that never forget, forget at once, change their mind halfway in either direction, and cliffs of minus infinity.
pub fn minds(heads: Heads, lens: &[u64], seed: u64) -> Batch {
    let batch = Batch::random(heads, lens, true, seed);
    let mut r = Random::new(seed + 1);
    let noise: Vec<f32> = (0..batch.g.len()).map(|_| r.unit() as f32 + 0.5).collect();
    let half = batch.shape.tokens() as usize / 2;
    let hv = heads.hv as usize;
    with_gates(batch, |t, h| {
        let x = noise[t * hv + h];
        match h % 6 {
            0 => 0.0,
            1 => -30.0 * x,
            2 => {
                if t < half {
                    -1e-3 * x
                } else {
                    -1.5 * x
                }
            }
            3 => {
                if t < half {
                    -1.5 * x
                } else {
                    -1e-3 * x
                }
            }
            4 if t % 37 == 5 => f32::NEG_INFINITY,
            4 => -1e-2 * x,
            _ => -0.6 * x,
        }
    })
}

pub fn assert_close(what: &str, found: &[f32], expected: &[f64], bound: f64) {
    let e = error(found, expected);
    assert!(e <= bound, "{what}: relative error {e:.2e}, at most {bound:.0e} expected");
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub const HOWS: [fn(u32) -> How; 3] = [|n| How::every(n), |n| How::every(n).exact(), |n| How::every(n).or_whole()];

#[test]
fn heads_of_every_mind_and_ragged_batches() {
    let shapes: [(Heads, &[u64]); 4] = [
        (heads(1, 6, 32, 48), &[290]),
        (heads(6, 6, 48, 16), &[0, 100, 1, 0, 190, 33, 0]),
        (Heads::new(2, 6, 16, 64, HeadMap::Mod).unwrap(), &[64, 200]),
        (heads(1, 6, 128, 128), &[260]),
    ];
    for (i, (heads, lens)) in shapes.into_iter().enumerate() {
        let batch = minds(heads, lens, 20 + i as u64);
        let (o, ht) = recurrence(&batch.inputs(), |_| u64::MAX);
        for device in devices() {
            let (_, whole) = forward(&*device.backend, &batch, How::whole());
            for chunks in [1, 2, 3] {
                for how in HOWS {
                    let how = how(chunks);
                    let (out, segments) = forward(&*device.backend, &batch, how);
                    let what = format!("{} {heads:?} {lens:?} {how:?}", device.name);
                    assert!(segments > whole, "{what}: {segments} segments");
                    assert_close(&format!("{what} o"), &out.o, &o, bound(Dtype::F32));
                    assert_close(&format!("{what} ht"), &out.ht, &ht, bound(Dtype::F32));
                }
            }
        }
    }
}

#[test]
fn transitions_equal_the_whole_to_rounding() {
    let batch = with_gates(Batch::random(heads(1, 2, 64, 64), &[320, 90], true, 31), |_, h| [-0.01, 0.0][h]);
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    for device in devices() {
        let (whole, _) = forward(&*device.backend, &batch, How::whole());
        let (cut, _) = forward(&*device.backend, &batch, How::every(2).exact());
        assert_close(&format!("{} o", device.name), &cut.o, &wide(&whole.o), 2e-6);
        assert_close(&format!("{} ht", device.name), &cut.ht, &wide(&whole.ht), 2e-6);
    }
}

/// A head that is left whole over every cut computes exactly what a whole sequence does.
#[test]
fn a_head_left_whole_gives_the_same_bits() {
    let batch = with_gates(Batch::random(heads(1, 2, 32, 32), &[200, 0, 40], true, 32), |_, _| 0.0);
    for device in devices() {
        let (whole, _) = forward(&*device.backend, &batch, How::whole());
        let (cut, _) = forward(&*device.backend, &batch, How::every(1).or_whole());
        assert!(bits(&whole.o) == bits(&cut.o) && bits(&whole.ht) == bits(&cut.ht), "{}", device.name);
    }
}

/// Keys so long that a warm-up would be wrong, although the gates forget: the device must see it.
#[test]
fn long_keys_and_large_betas_take_the_exact_path() {
    // Just enough for 64 tokens: what a warm-up leaves out shows in the last bits.
    let forgetful = |_: usize, _: usize| -0.27f32;
    let mut long = with_gates(Batch::random(heads(1, 1, 32, 32), &[256], true, 33), forgetful);
    long.options.qk_l2norm = false;
    // |k| about 2.1, so that a step makes what lies along k up to 3.4 times as long.
    long.k.iter_mut().for_each(|k| *k *= 0.37);
    long.q.iter_mut().for_each(|q| *q *= 0.2);
    long.beta.fill(1.0);
    let mut large = with_gates(Batch::random(heads(1, 1, 32, 32), &[256], true, 34), forgetful);
    large.beta.iter_mut().for_each(|b| *b = 2.5);
    let mut negative = with_gates(Batch::random(heads(1, 1, 32, 32), &[256], true, 35), forgetful);
    negative.beta.iter_mut().for_each(|b| *b = -0.5);
    for (what, batch) in [("long keys", long), ("beta 2.5", large), ("beta -0.5", negative)] {
        for device in devices() {
            let (exact, _) = forward(&*device.backend, &batch, How::every(4).exact());
            let (found, _) = forward(&*device.backend, &batch, How::every(4));
            // The very arithmetic of the exact path, not something near it.
            assert!(bits(&exact.o) == bits(&found.o), "{} {what}", device.name);
            let (whole, _) = forward(&*device.backend, &batch, How::whole());
            let (found, _) = forward(&*device.backend, &batch, How::every(4).or_whole());
            assert!(bits(&whole.o) == bits(&found.o), "{} {what}, whole", device.name);
        }
    }
    // And short ones do not.
    let batch = with_gates(Batch::random(heads(1, 1, 32, 32), &[256], true, 36), forgetful);
    for device in devices() {
        let (exact, _) = forward(&*device.backend, &batch, How::every(4).exact());
        let (found, _) = forward(&*device.backend, &batch, How::every(4));
        assert!(bits(&exact.o) != bits(&found.o), "{}: nothing was warmed up", device.name);
    }
}

#[test]
fn every_storage_pieces_and_the_same_bits_again() {
    let small = |how: How| How { scratch: 60_000, ..how };
    for store in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let mut batch = minds(heads(2, 4, 32, 48), &[170, 3, 0, 120], 40);
        batch.options.store = store;
        let (o, ht) = recurrence(&batch.inputs(), |_| u64::MAX);
        for device in devices() {
            for how in HOWS {
                let how = small(how(2));
                let (out, _) = forward(&*device.backend, &batch, how);
                let what = format!("{} {store} {how:?}", device.name);
                assert_close(&format!("{what} o"), &out.o, &o, bound(store));
                assert_close(&format!("{what} ht"), &out.ht, &ht, bound(store));
                let (again, _) = forward(&*device.backend, &batch, how);
                assert!(bits(&out.o) == bits(&again.o) && bits(&out.ht) == bits(&again.ht), "{what}: other bits");
            }
        }
    }
}

#[test]
fn nan_is_carried_over_every_cut_by_the_exact_path() {
    for device in devices() {
        let mut batch = with_gates(Batch::random(heads(1, 2, 32, 32), &[200], true, 41), |_, _| -1.0);
        batch.v[(10 * 2 + 1) * 32 + 5] = f32::NAN;
        let (out, _) = forward(&*device.backend, &batch, How::every(1).exact());
        assert!(out.o[(199 * 2 + 1) * 32 + 5].is_nan(), "{}: NaN was lost", device.name);
        assert!(out.o.chunks(64).all(|o| o[..32].iter().all(|x| x.is_finite())), "{}: head 0", device.name);
    }
}

/// The walks that a device decides on, `[segments, Hv]` between segments and of them, for chunks of these gammas, negative where
/// a chunk does not contract.
fn walks(
    backend: &dyn Backend,
    gammas: &[[f32; 2]],
    segments: &[[u32; 4]],
    back: u32,
    exact: u32,
) -> [Vec<[u32; 4]>; 2] {
    let (chunk, hv, n) = (16usize, 2u32, segments.len() as u32);
    let size = 2 * chunk * chunk + 4 * chunk;
    let mut ws = vec![f32::NAN; gammas.len() * 2 * size];
    for (i, gamma) in gammas.iter().flatten().enumerate() {
        let at = i * size + 2 * chunk * chunk + 3 * chunk;
        (ws[at], ws[at + 1]) = (gamma.abs(), if *gamma < 0.0 { 0.0 } else { 1.0 });
    }
    let half = n * hv + 3;
    let table = put(backend, bytemuck::cast_slice(&vec![u32::MAX; 4 * (half + n * hv) as usize]));
    let args = [
        &numbers(backend, &ws, Dtype::F32).view(),
        &put(backend, bytemuck::cast_slice(segments)).view(),
        &table.view(),
    ];
    let consts = CutConsts { chunk: chunk as u32, grad: 0, back, exact };
    let params = CutParams { hv, segments: n, sequences: 3, half, forgotten: 0.01 };
    let mut pass = Pass::new();
    pass.launch(&CUT, consts, params, &args, [hv, 1, 1], 1000);
    backend.run(&pass).unwrap();
    let rows: Vec<[u32; 4]> = backend.read(&table.view()).unwrap().wait_as().unwrap();
    let table = (n * hv) as usize;
    assert!(rows[table..half as usize].iter().flatten().all(|&x| x == u32::MAX), "rows between the tables");
    [rows[..table].to_vec(), rows[half as usize..].to_vec()]
}

#[test]
fn the_device_decides_what_to_do_at_each_cut() {
    // Sequence 0 has segments of 3, 3 and 1 chunks, sequence 1 none, sequence 2 one of 2 and one of 1.
    let segments = [[0, 3, 3, 0], [3, 3, 4, 3], [6, 1, 0, 4], [7, 2, 5, 2], [9, 1, 2, 5]];
    // Head 0 forgets by two chunks, but for one where it does not contract; head 1 not within sequence 0.
    let gammas = [
        [0.05, 1.0],
        [0.05, 0.9],
        [0.05, 1.0],
        [0.05, 0.5],
        [-0.05, 0.5],
        [0.0, 1.0],
        [1.0, 1.0],
        [0.5, 0.0],
        [0.5, 1.0],
        [1.0, 1.0],
    ];
    let none = [0; 4];
    for device in devices() {
        let run = |back, exact| walks(&*device.backend, &gammas, &segments, back, exact);
        let what = |rows: [Vec<[u32; 4]>; 2], head: usize| {
            rows.map(|t| t.into_iter().skip(head).step_by(2).collect::<Vec<_>>())
        };
        // Forward: the last chunks of a segment. One chunk of gamma 0 is enough, whatever the next one is.
        let whole_segments = vec![[0, 3, 3, 3], [3, 3, 4, 4], [6, 1, 0, 0], [7, 2, 5, 5], [9, 1, 2, 2]];
        let expected = [vec![[1, 2, 0, 4], [5, 1, 0, 0], none, [7, 2, 1, 2], none], whole_segments.clone()];
        assert_eq!(what(run(0, 1), 0), expected, "{}", device.name);
        let expected = [vec![[0, 3, 1, 4], [3, 3, 1, 0], none, [7, 2, 0, 2], none], whole_segments.clone()];
        assert_eq!(what(run(0, 1), 1), expected, "{}", device.name);
        let always = vec![[0, 3, 1, 4], [3, 3, 1, 0], none, [7, 2, 1, 2], none];
        assert_eq!(what(run(0, 2), 0), [always, whole_segments], "{}", device.name);
        // Without transitions a walk goes on, and ends in the sequence's slot.
        let expected = [
            vec![[1, 2, 0, 4], [5, 1, 0, 0], none, none, none],
            vec![[0, 3, 3, 3], [3, 3, 4, 4], [6, 1, 0, 0], [7, 3, 5, 2], none],
        ];
        assert_eq!(what(run(0, 0), 0), expected, "{}", device.name);
        let expected =
            [vec![none, none, none, [7, 2, 0, 2], none], vec![[0, 7, 3, 0], none, none, [7, 2, 5, 5], [9, 1, 2, 2]]];
        assert_eq!(what(run(0, 0), 1), expected, "{}", device.name);
        // Backward: the first chunks of a segment, for the one before it.
        let expected = [
            vec![none, [3, 3, 1, 0], [6, 1, 1, 3], none, [9, 1, 1, 2]],
            vec![[0, 3, 0, 0], [3, 3, 3, 3], [6, 1, 4, 4], [7, 2, 2, 2], [9, 1, 5, 5]],
        ];
        assert_eq!(what(run(1, 1), 0), expected, "{}", device.name);
        let expected = [vec![none; 5], vec![none, none, [0, 7, 4, 0], none, [7, 3, 5, 2]]];
        assert_eq!(what(run(1, 0), 0), expected, "{}", device.name);
    }
}

#[test]
fn tables_that_the_cpu_refuses() {
    let cpu = &devices()[0];
    let refused = |segments: &[[u32; 4]], half: u32, word: &str| {
        let ws = numbers(&*cpu.backend, &vec![0.0; 2 * (2 * 256 + 64)], Dtype::F32);
        let (table, walks) = (put(&*cpu.backend, bytemuck::cast_slice(segments)), put(&*cpu.backend, &[0; 256]));
        let params = CutParams { hv: 1, segments: segments.len() as u32, sequences: 1, half, forgotten: 0.1 };
        let consts = CutConsts { chunk: 16, grad: 0, back: 0, exact: 1 };
        let mut pass = Pass::new();
        pass.launch(&CUT, consts, params, &[&ws.view(), &table.view(), &walks.view()], [1, 1, 1], 1);
        let text = cpu.backend.run(&pass).unwrap_err().to_string();
        assert!(text.contains("gdn_cut") && text.contains(word), "{text} lacks {word:?}");
    };
    refused(&[[0, 3, 0, 0]], 1, "segments[0]");
    refused(&[[0, 1, 1, 0], [1, 1, 1, 1]], 2, "below 1 for the last of a sequence");
    refused(&[[0, 1, 1, 0], [1, 1, 0, 1]], 1, "half");
    refused(&[[0, 1, 1, 0], [1, 1, 0, 1]], 20, "walks");
}

/// The gradients, and the number of segments.
pub fn backward(backend: &dyn Backend, batch: &Batch, d_o: &[f32], dht: &[f32], how: How) -> (Gradients, usize) {
    let (h, store) = (batch.shape.heads, batch.options.store);
    let (qk, vo) = ((h.hk * h.k) as u64, (h.hv * h.v) as u64);
    let spread = |x: &[f32], width: u64| Spread::new(backend, x, width, how.gap, store);
    let (q, k, v, d_o) = (spread(&batch.q, qk), spread(&batch.k, qk), spread(&batch.v, vo), spread(d_o, vo));
    let [g, beta, dstate] = [&batch.g[..], &batch.beta, dht].map(|x| numbers(backend, x, Dtype::F32));
    let nan = |x: &[f32]| vec![f32::NAN; x.len()];
    let (dq, dk, dv) = (spread(&nan(&batch.q), qk), spread(&nan(&batch.k), qk), spread(&nan(&batch.v), vo));
    let [dg, dbeta] = [&batch.g, &batch.beta].map(|x| numbers(backend, &nan(x), Dtype::F32));
    let h0 = batch.h0.as_ref().map(|h0| numbers(backend, h0, Dtype::F32).view());
    let io = GradIo {
        q: q.rows(),
        k: k.rows(),
        v: v.rows(),
        g: g.view(),
        beta: beta.view(),
        h0,
        d_o: d_o.rows(),
        dq: dq.rows(),
        dk: dk.rows(),
        dv: dv.rows(),
        dg: dg.view(),
        dbeta: dbeta.view(),
        dstate: dstate.view(),
    };
    let options = gatedelta::gdn::Options { exact: how.exact, ..batch.options };
    let plan = Backward::with_tile(backend, &batch.shape, &options, qk.max(vo) + how.gap as u64, how.tile(backend, &h))
        .unwrap();
    let mut pass = Pass::new();
    plan.record(&mut pass, &io).unwrap();
    // What a backend that chooses cuts of its own goes by.
    let longest = batch.shape.cu_seqlens().windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(pass.launches.is_empty() || (pass.exact, pass.longest) == (how.exact, longest));
    backend.run(&pass).unwrap();
    let get = |x: &Buffer, n: usize| loaded(backend, &x.view(), n, Dtype::F32);
    let found = Gradients {
        dq: dq.loaded(batch.q.len()),
        dk: dk.loaded(batch.k.len()),
        dv: dv.loaded(batch.v.len()),
        dg: get(&dg, batch.g.len()),
        dbeta: get(&dbeta, batch.g.len()),
        dh0: get(&dstate, dht.len()),
    };
    (found, plan.plan().pieces.iter().map(|p| p.segments.len()).sum())
}

pub fn named(g: &Gradients) -> [(&'static str, &[f32]); 6] {
    [("dq", &g.dq), ("dk", &g.dk), ("dv", &g.dv), ("dg", &g.dg), ("dbeta", &g.dbeta), ("dh0", &g.dh0)]
}

#[test]
fn gradients_of_heads_of_every_mind() {
    let shapes: [(Heads, &[u64], u64, Dtype); 4] = [
        (heads(1, 6, 32, 48), &[230], 1 << 30, Dtype::F32),
        (heads(6, 6, 48, 16), &[0, 70, 1, 0, 120, 33, 0], 1 << 30, Dtype::F32),
        // Few bytes: many pieces, in several blocks.
        (Heads::new(2, 6, 16, 32, HeadMap::Mod).unwrap(), &[64, 150], 400_000, Dtype::F32),
        (heads(2, 4, 32, 32), &[170], 1 << 30, Dtype::Bf16),
    ];
    for (i, (heads, lens, scratch, store)) in shapes.into_iter().enumerate() {
        let mut batch = minds(heads, lens, 50 + i as u64);
        batch.options.store = store;
        let mut r = Random::new(60 + i as u64);
        let (d_o, dht) = (r.normals(batch.v.len()), r.normals(lens.len() * heads.state_len() as usize));
        let expected = recurrence_grad(&batch.inputs(), &d_o, Some(&dht));
        let most = if store == Dtype::F32 { 1e-5 } else { 5e-3 };
        for device in devices() {
            for how in HOWS {
                let how = How { scratch, ..how(2) };
                let (_, whole) = backward(&*device.backend, &batch, &d_o, &dht, How { cut: None, ..how });
                let (found, segments) = backward(&*device.backend, &batch, &d_o, &dht, how);
                let what = format!("{} {heads:?} {lens:?} {how:?}", device.name);
                assert!(segments > whole, "{what}: {segments} segments");
                for ((name, found), (_, expected)) in named(&found).into_iter().zip(expected.named()) {
                    assert_close(&format!("{what} {name}"), found, expected, most);
                }
                let (again, _) = backward(&*device.backend, &batch, &d_o, &dht, how);
                assert!(
                    named(&found).iter().zip(named(&again)).all(|(a, b)| bits(a.1) == bits(b.1)),
                    "{what}: other bits"
                );
            }
        }
    }
}

#[test]
fn gradients_through_transitions_equal_the_whole_to_rounding() {
    let batch = with_gates(Batch::random(heads(1, 2, 64, 64), &[320, 90], true, 71), |_, h| [-0.01, 0.0][h]);
    let mut r = Random::new(72);
    let (d_o, dht) = (r.normals(batch.v.len()), r.normals(2 * batch.shape.heads.state_len() as usize));
    for device in devices() {
        let (whole, _) = backward(&*device.backend, &batch, &d_o, &dht, How::whole());
        let (cut, _) = backward(&*device.backend, &batch, &d_o, &dht, How::every(2).exact());
        let (walked, _) = backward(&*device.backend, &batch, &d_o, &dht, How::every(1).or_whole());
        for (((name, whole), (_, cut)), (_, walked)) in named(&whole).into_iter().zip(named(&cut)).zip(named(&walked)) {
            let wide: Vec<f64> = whole.iter().map(|&x| f64::from(x)).collect();
            assert_close(&format!("{} {name}", device.name), cut, &wide, 3e-6);
            // Head 1 forgets nothing, and head 0 nothing within a chunk.
            assert!(bits(whole) == bits(walked), "{} {name}: a head left whole has other bits", device.name);
        }
    }
}
