//! The operator's rows on the matrix units: 16-bit q, k and v, heads of 64 and 128, against the recurrence in float64.

use gatedelta::backend::cuda::choose;
use gatedelta::gdn::{Gradients, Outputs};
use gatedelta::kernel::{Kernel, gdn, gdn_grad};
use gatedelta::shape::{Dtype, HeadMap, Heads};

use crate::cut::{HOWS, How, assert_close, backward, bits, forward, minds, named};
use crate::naive::{recurrence, recurrence_grad};
use crate::util::{Batch, Device, Random, bound, devices, skipped};

const HALVES: [Dtype; 2] = [Dtype::F16, Dtype::Bf16];

/// The device that has these kernels: the stand-in for the driver, or a GPU.
fn device() -> Option<&'static Device> {
    let found = devices().iter().find(|d| ["emulator", "cuda"].contains(&d.name));
    if found.is_none() {
        skipped("emulator", "no device runs CUDA kernels");
    }
    found
}

/// A batch with everything that it takes to judge it.
struct Judged {
    batch: Batch,
    d_o: Vec<f32>,
    dht: Vec<f32>,
    out: (Vec<f64>, Vec<f64>),
    grads: crate::naive::Grads,
}

impl Judged {
    fn new(batch: Batch) -> Self {
        let mut r = Random::new(5);
        let states = batch.shape.sequences() * batch.shape.heads.state_len() as usize;
        let (d_o, dht) = (r.normals(batch.v.len()), r.normals(states));
        let out = recurrence(&batch.inputs(), |_| u64::MAX);
        let grads = recurrence_grad(&batch.inputs(), &d_o, Some(&dht));
        Judged { batch, d_o, dht, out, grads }
    }

    /// Outputs and every gradient in this storage, within its bound.
    fn check(&mut self, what: &str, device: &Device, store: Dtype, how: How) -> (Outputs, Gradients) {
        self.batch.options.store = store;
        let (out, _) = forward(&*device.backend, &self.batch, how);
        let (grads, _) = backward(&*device.backend, &self.batch, &self.d_o, &self.dht, how);
        let outputs = [("o", &out.o[..], &self.out.0[..]), ("ht", &out.ht, &self.out.1)];
        let expected = self.grads.named();
        let of_grads = named(&grads).into_iter().zip(expected).map(|((name, found), (_, e))| (name, found, e));
        let mut line = format!("{} {what} {store}:", device.name);
        let all: Vec<_> = outputs.into_iter().chain(of_grads).collect();
        all.iter().for_each(|(name, found, e)| line += &format!(" {name} {:.1e}", crate::util::error(found, e)));
        println!("{line}");
        all.iter().for_each(|(name, found, e)| assert_close(&format!("{what} {store} {name}"), found, e, bound(store)));
        (out, grads)
    }
}

/// Heads that never forget, forget at once and change their mind; groups; ragged lengths; states before; rows whose copies are of
/// 16 bytes and of 4.
#[test]
fn outputs_and_gradients_of_16_bits() {
    let Some(device) = device() else { return };
    for (i, (k, v)) in [(64, 64), (128, 128), (64, 128), (128, 64)].into_iter().enumerate() {
        let map = [HeadMap::Div, HeadMap::Mod][i % 2];
        let mut judged = Judged::new(minds(Heads::new(2, 6, k, v, map).unwrap(), &[37, 0, 1, 70], i as u64));
        for (store, gap) in HALVES.into_iter().zip([[0, 2], [8, 0], [2, 0], [0, 6]][i]) {
            judged.check(&format!("{k} x {v} {map:?} gap {gap}"), device, store, How { gap, ..How::whole() });
        }
    }
}

/// No norms inside, no states before, one head without decay at all.
#[test]
fn the_plain_delta_rule() {
    let Some(device) = device() else { return };
    for k in [64, 128] {
        let mut batch = Batch::random(crate::util::heads(1, 1, k, 64), &[101], false, 3);
        batch.options.qk_l2norm = false;
        // Keys of length 1 or less, exact in every storage.
        let factor = if k == 64 { 0.125 } else { 0.0625 };
        batch.k.iter_mut().chain(&mut batch.q).for_each(|x| *x *= factor);
        batch.g.fill(0.0);
        let mut judged = Judged::new(batch);
        for store in HALVES {
            judged.check(&format!("plain {k}"), device, store, How::whole());
        }
    }
}

/// Walks of each head, warm-ups and transitions, in many pieces, twice.
#[test]
fn segments_and_the_same_bits_again() {
    let Some(device) = device() else { return };
    for (k, store) in [(64, Dtype::Bf16), (128, Dtype::F16)] {
        let mut judged = Judged::new(minds(Heads::new(1, 4, k, 64, HeadMap::Div).unwrap(), &[170, 3], 9));
        for how in HOWS {
            let how = How { scratch: 2_000_000, ..how(2) };
            let (out, grads) = judged.check(&format!("{k} {how:?}"), device, store, how);
            let (again, grads_again) = judged.check("again", device, store, how);
            assert!(bits(&out.o) == bits(&again.o) && bits(&out.ht) == bits(&again.ht), "{how:?}: other bits");
            let same = named(&grads).iter().zip(named(&grads_again)).all(|(a, b)| bits(a.1) == bits(b.1));
            assert!(same, "{how:?}: other bits of a gradient");
        }
    }
}

/// Keys that are nearly the same and gates that hardly forget: what is added to the state cancels.
#[test]
fn keys_alike() {
    let Some(device) = device() else { return };
    let mut batch = Batch::random(crate::util::heads(1, 2, 128, 64), &[128], false, 4);
    let alike: Vec<f32> = batch.k[..128].iter().map(|x| x * 4.0).collect();
    batch.k.chunks_exact_mut(128).flat_map(|k| k.iter_mut().zip(&alike)).for_each(|(k, a)| {
        *k = half::bf16::from_f32(*k + a).to_f32();
    });
    batch.g.iter_mut().for_each(|g| *g = -0.01);
    Judged::new(batch).check("keys alike", device, Dtype::Bf16, How::whole());
}

/// Which kernel a row gets: by type and size of heads.
#[test]
fn rows_of_16_bits_and_heads_of_64_and_128_go_to_the_matrix_units() {
    let family = |kernel: &'static Kernel, consts: &[u32]| choose(kernel, consts).unwrap().family;
    for k in (1..=16u32).map(|i| 16 * i) {
        for store in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let ty = store.code();
            let mma = store != Dtype::F32 && [64, 128].contains(&k);
            let of = |general: &'static str, mma_name: &'static str| if mma { mma_name } else { general };
            let qk_lanes = k / 4 * (1 << (256 / (k / 4)).ilog2()).min(16);
            assert_eq!(family(&gdn::PREPARE, &[32, k, 2, ty, 1, 0, 64]), of("gdn_prepare", "gdn_prepare_mma"));
            assert_eq!(family(&gdn::SCAN, &[32, k, 32, ty, ty, 0, 0, 0, 128]), of("gdn_scan", "gdn_scan_mma"));
            // A V that 32 does not divide.
            assert_eq!(family(&gdn::SCAN, &[32, k, 16, ty, ty, 0, 0, 0, 64]), "gdn_scan");
            let scan = family(&gdn_grad::GRAD_SCAN, &[32, k, 32, ty, ty, 0, 128]);
            assert_eq!(scan, of("gdn_grad_scan", "gdn_grad_scan_mma"));
            let qk = family(&gdn_grad::GRAD_QK, &[32, k, 64, 2, ty, 1, qk_lanes]);
            assert_eq!(qk, of("gdn_grad_qk", "gdn_grad_qk_mma"));
            let chunk = family(&gdn_grad::GRAD_CHUNK, &[32, k, 64, ty, 64]);
            assert_eq!(chunk, if store == Dtype::F32 { "gdn_grad_chunk" } else { "gdn_grad_chunk_mma" });
        }
    }
}
