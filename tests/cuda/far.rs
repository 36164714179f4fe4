//! Rows so far apart that the last of them lie beyond 2^31 numbers, and beyond 2^32: prefill, step and backward pass. On the stand-in, where large allocations are sparse, in
//! processes of their own; on this machine's device where `GATEDELTA_TEST_DEVICE` asks for that.

use gatedelta::backend::Backend;
use gatedelta::backend::cuda::{Cuda, OpenOptions};
use gatedelta::gdn::{Commit, Io, Options, Step};
use gatedelta::pass::Pass;
use gatedelta::shape::Dtype;

use crate::cut::{How, Spread, backward, forward, loaded, named, numbers};
use crate::naive::{recurrence, recurrence_grad};
use crate::util::{Batch, Random, bound, error, heads};

/// Numbers before each row: the 96th is beyond 2^31, the 192nd beyond 2^32.
const GAP: usize = 22_500_000;
/// Of prefill and backward: the last sequence goes on beyond, in a whole chunk and one that is not.
const LENS: [u64; 3] = [128, 0, 70];
const _: () = assert!(191 * GAP as u64 > 1 << 32 && 96 * GAP as u64 > 1 << 31);

fn batch(lens: &[u64], store: Dtype, seed: u64) -> Batch {
    let options = Options { store, qk_l2norm: true, ..Options::default() };
    Batch { options, ..Batch::random(heads(1, 2, 128, 128), lens, true, seed) }
}

fn check(what: &str, store: Dtype, found: &[f32], expected: &[f64]) {
    let error = error(found, expected);
    println!("{what} {store}: {error:.1e}");
    assert!(error <= bound(store), "{what} {store}: {error:.1e}");
}

fn prefill(backend: &dyn Backend, store: Dtype) {
    let batch = batch(&LENS, store, 31);
    let (o, ht) = recurrence(&batch.inputs(), |_| u64::MAX);
    let (found, segments) = forward(backend, &batch, How { gap: GAP, ..How::whole() });
    assert!(segments <= LENS.len(), "{segments} segments: several pieces, whose views start further on");
    check("prefill: o", store, &found.o, &o);
    check("prefill: ht", store, &found.ht, &ht);
}

fn gradients(backend: &dyn Backend, store: Dtype) {
    let batch = batch(&LENS, store, 32);
    let mut random = Random::new(33);
    let d_o = random.normals(batch.v.len());
    let dht = random.normals(batch.h0.as_ref().expect("states to begin with").len());
    let expected = recurrence_grad(&batch.inputs(), &d_o, Some(&dht));
    let (found, segments) = backward(backend, &batch, &d_o, &dht, How { gap: GAP, ..How::whole() });
    assert!(segments <= LENS.len(), "{segments} segments: several pieces, whose views start further on");
    for ((name, found), (_, expected)) in named(&found).into_iter().zip(expected.named()) {
        check(&format!("backward: {name}"), store, found, expected);
    }
}

/// Four tokens of each of 48 sequences, and one of each of the last four.
fn step(backend: &dyn Backend, store: Dtype) {
    let counts: Vec<u32> = (0..52).map(|n| if n < 48 { 4 } else { 1 }).collect();
    let batch = batch(&counts.iter().map(|&n| n.into()).collect::<Vec<_>>(), store, 34);
    let (o, ht) = recurrence(&batch.inputs(), |_| u64::MAX);
    let spread = |x: &[f32], width: u64| Spread::new(backend, x, width, GAP, store);
    let (q, k, v) = (spread(&batch.q, 128), spread(&batch.k, 128), spread(&batch.v, 256));
    let out = spread(&vec![f32::NAN; batch.v.len()], 256);
    let h0 = batch.h0.as_ref().expect("states to begin with");
    let [g, beta, state] = [&batch.g, &batch.beta, h0].map(|x| numbers(backend, x, Dtype::F32).view());
    let io = Io { q: q.rows(), k: k.rows(), v: v.rows(), g, beta, state, o: out.rows() };
    let step = Step::new(backend, &batch.shape, &counts, &batch.options, io.v.stride).unwrap();
    let mut pass = Pass::new();
    step.record(&mut pass, &io, Commit::Store).unwrap();
    backend.run(&pass).unwrap();
    check("step: o", store, &out.loaded(batch.v.len()), &o);
    check("step: ht", store, &loaded(backend, &io.state, h0.len(), Dtype::F32), &ht);
}

fn all(backend: &dyn Backend, store: Dtype) {
    prefill(backend, store);
    step(backend, store);
    gradients(backend, store);
}

/// Run by the test below: numbers stored as `GATEDELTA_TEST_STORE` says.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn apart() {
    let store = super::hopper::asked_store();
    let found = &Cuda::enumerate().found[0];
    all(&Cuda::open(found, &OpenOptions::default()).unwrap(), store);
    // Segments of one chunk, of a kernel that has those.
    let cuda = Cuda::open(found, &OpenOptions { hopper_cut: Some(1), ..OpenOptions::default() }).unwrap();
    prefill(&cuda, store);
}

#[test]
fn rows_beyond_two_to_the_32_numbers() {
    if std::env::var("GATEDELTA_TEST_DEVICE").as_deref() == Ok("cuda") {
        let device = super::device("cuda").unwrap();
        for store in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            // The tensors of a backward pass, and what else there is.
            let needed = 7 * 200 * GAP as u64 * store.size() + (2 << 30);
            if device.backend.caps().max_buffer < needed {
                crate::util::skipped("memory", &format!("rows of {store} that far apart take {needed} bytes"));
                continue;
            }
            all(&*device.backend, store);
        }
        return;
    }
    let kernels: [(&str, &str, &[&str]); 5] = [
        ("80", "f32", &["gdn_prepare_f32", "gdn_scan_f32", "gdn_step_f32", "gdn_grad_scan_f32", "gdn_grad_qk_f32"]),
        ("80", "f16", &["gdn_prepare_mma_f16", "gdn_scan_mma_f16", "gdn_grad_scan_mma_f16", "gdn_grad_qk_mma_f16"]),
        ("80", "bf16", &["gdn_prepare_mma_bf16", "gdn_scan_mma_bf16", "gdn_step_bf16", "gdn_grad_qk_mma_bf16"]),
        ("90", "f16", &["hopper_prepare_f16", "hopper_scan_f16", "hopper_state_f16"]),
        ("90", "bf16", &["hopper_scan_bf16", "hopper_state_bf16", "hopper_keep_bf16", "hopper_gradients_bf16"]),
    ];
    for (arch, store, expected) in kernels {
        let like = format!("arch={arch},memory=200000000000,tell=1");
        let Some(text) = super::child("far::apart", &like, &[("GATEDELTA_TEST_STORE", store)]) else { return };
        for kernel in expected {
            assert!(text.contains(&format!("kernel {kernel}")), "{arch} {store}: {kernel} was not used: {text}");
        }
    }
}
