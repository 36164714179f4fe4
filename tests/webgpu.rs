//! The wgpu backend on a software Vulkan driver: its kernels against their formulas in float64, and what it does with requests
//! that it cannot serve.

use gatedelta::Error;
use gatedelta::backend::webgpu::{OpenOptions, WebGpu};
use gatedelta::backend::{Backend, Timing, View};
use gatedelta::kernel::gdn::{GATED_NORM, GatedNormConsts, GatedNormParams};
use gatedelta::kernel::model::{COPY, FILL, WordsConsts, WordsParams};
use gatedelta::pass::Pass;
use gatedelta::shape::Dtype;
use gatedelta::tune::Kind;

use crate::formula;
use crate::util::{Device, devices, skipped};

mod operator;

/// The software driver with its own limits and with WebGPU's defaults.
fn gpus() -> Vec<&'static Device> {
    devices().iter().filter(|d| d.backend.caps().kind == Kind::WebGpu).collect()
}

/// A buffer that is larger than its content, which is NaN where nothing was written.
fn put(gpu: &dyn Backend, bytes: &[u8], len: u64) -> View {
    let view = gpu.alloc("test", len).unwrap().view();
    gpu.write(&view, &[0xff].repeat(len as usize)).unwrap();
    gpu.write(&view, bytes).unwrap();
    view
}

fn words(gpu: &dyn Backend, x: &[u32]) -> View {
    put(gpu, bytemuck::cast_slice(x), (x.len() as u64 * 4).max(16))
}

fn floats(gpu: &dyn Backend, x: &[f32]) -> View {
    put(gpu, bytemuck::cast_slice(x), (x.len() as u64 * 4).max(16))
}

/// NaN in every word.
fn poisoned(gpu: &dyn Backend, words: usize) -> View {
    put(gpu, &[], (words as u64 * 4).max(16))
}

fn stored_bytes(x: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice(x).to_vec(),
        Dtype::F16 => x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

fn stored(gpu: &dyn Backend, x: &[f32], dtype: Dtype) -> View {
    let bytes = stored_bytes(x, dtype);
    put(gpu, &bytes, (bytes.len() as u64).max(16))
}

fn get(gpu: &dyn Backend, view: &View, dtype: Dtype) -> Vec<f32> {
    let bytes = gpu.read(view).unwrap().wait().unwrap();
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F32 => bytemuck::allocation::pod_collect_to_vec(&bytes),
        Dtype::F16 => halves().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::Bf16 => halves().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
fn close(what: &str, found: &[f32], answer: &[f64], most: f64) {
    let error = formula::error(found, answer);
    assert!(error <= most, "{what}: error {error:.2e}, at most {most:.0e}");
}

/// A launch of [`FILL`] over all of `to`.
fn fill(pass: &mut Pass, to: &View, n: u32, block: u32, word: u32) {
    let params = WordsParams { n, src_off: 0, dst_off: 0, word };
    pass.launch(&FILL, WordsConsts { block }, params, &[to], [n.div_ceil(block), 1, 1], n as u64);
}

#[test]
fn copy_and_fill_over_more_cells_than_a_dispatch_holds() {
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        // One word a cell: 70 001 workgroups, more than WebGPU's 65 535.
        let n = 70_001u32;
        let (a, b) = (poisoned(gpu, n as usize), poisoned(gpu, n as usize + 10));
        let mut pass = Pass::new();
        fill(&mut pass, &a, n, 1, 12345);
        let params = WordsParams { n: n - 5, src_off: 5, dst_off: 7, word: 0 };
        let grid = [(n - 5).div_ceil(1000), 1, 1];
        pass.launch(&COPY, WordsConsts { block: 1000 }, params, &[&a, &b], grid, n as u64);
        gpu.run(&pass).unwrap();
        let a: Vec<u32> = gpu.read(&a).unwrap().wait_as().unwrap();
        assert!(a.iter().all(|&x| x == 12345), "{name} fill");
        let b: Vec<u32> = gpu.read(&b).unwrap().wait_as().unwrap();
        let expected: Vec<u32> =
            (0..n + 10).map(|i| if (7..7 + n - 5).contains(&i) { 12345 } else { u32::MAX }).collect();
        assert!(b == expected, "{name} copy");
    }
}

#[test]
fn a_long_launch_is_cut_into_short_submissions() {
    for Device { name, backend } in gpus() {
        let gpu = backend.as_ref();
        let n = 1 << 22;
        let a = poisoned(gpu, n as usize);
        let mut pass = Pass::new();
        for i in 0..24 {
            fill(&mut pass, &a, n, 256, i);
        }
        // The first run teaches the rate; what else the processor does stretches all of a run, so that short is short beside the whole.
        gpu.run(&pass).unwrap();
        let timings: Vec<_> = (0..8).map(|_| gpu.time(&pass).unwrap()).collect();
        assert!(timings.iter().all(|t| t.longest_submission <= t.total), "{name}: {timings:?}");
        let short = |t: &Timing| t.longest_submission.as_millis() <= 100 || 2 * t.longest_submission <= t.total;
        assert!(timings.iter().any(short), "{name}: {timings:?}");
        let a: Vec<u32> = gpu.read(&a).unwrap().wait_as().unwrap();
        assert!(a.iter().all(|&x| x == 23), "{name}");
    }
}

#[test]
fn requests_that_cannot_be_served_are_errors() {
    for Device { backend, .. } in gpus() {
        let gpu = backend.as_ref();
        let caps = gpu.caps();
        let too_large = caps.max_buffer + caps.align;
        match gpu.alloc("a tensor", too_large) {
            Err(Error::OutOfMemory { needed, limit, what, .. }) => {
                assert_eq!((needed, what.as_str()), (too_large, "a tensor"));
                assert!(limit.contains("at most"), "{limit}");
            }
            other => panic!("{other:?}"),
        }
        let a = gpu.alloc("a", 4096).unwrap();
        let run = |view: &View, n: u32| {
            let mut pass = Pass::new();
            fill(&mut pass, view, n, 256, 1);
            gpu.run(&pass)
        };
        // A view that starts between two aligned bytes.
        match run(&a.slice(4, 1024).unwrap(), 10) {
            Err(Error::Argument { what, expected, .. }) => {
                assert!(what.contains("dst") && what.contains("fill"), "{what}");
                assert!(expected.contains(&caps.align.to_string()), "{expected}");
            }
            other => panic!("{other:?}"),
        }
        // A view of nothing, and a view that claims more than there is.
        run(&a.slice(4096, 0).unwrap(), 10).unwrap();
        let mut beyond = a.view();
        beyond.bytes += 4096;
        assert!(matches!(run(&beyond, 10), Err(Error::Argument { .. })));
        // The same memory read and written.
        let mut pass = Pass::new();
        let params = WordsParams { n: 8, src_off: 0, dst_off: 512, word: 0 };
        pass.launch(&COPY, WordsConsts { block: 256 }, params, &[&a.view(), &a.view()], [1, 1, 1], 8);
        assert!(matches!(gpu.run(&pass), Err(Error::Argument { .. })));
        // A write beyond the end in the kernel: stopped by the driver, and nothing else is touched.
        let b = floats(gpu, &[1.5; 64]);
        run(&a.slice(0, 256).unwrap(), 1 << 16).unwrap();
        assert_eq!(get(gpu, &b, Dtype::F32), vec![1.5; 64]);
        // Bad consts of a row.
        let mut pass = Pass::new();
        pass.launch(
            &GATED_NORM,
            GatedNormConsts { dv: 16, lanes: 1 << 20 },
            GatedNormParams { hv: 1, tokens: 1, z_stride: 16, z_off: 0, eps: 0.0 },
            &[&a.view(), &a.view(), &a.view(), &b],
            [1, 1, 1],
            1,
        );
        match gpu.load(&pass) {
            Err(Error::Compile { kernel, log, .. }) => assert!(kernel.contains("gated_norm") && !log.is_empty()),
            other => panic!("{other:?}"),
        }
        // Writes and reads that do not fit.
        assert!(gpu.write(&a.view(), &[0; 5000]).is_err());
        assert!(gpu.write(&a.slice(2, 100).unwrap(), &[0; 4]).is_err());
        assert!(gpu.write(&a.slice(0, 100).unwrap(), &[0; 3]).is_err());
        assert!(gpu.read(&beyond).is_err());
        // And all is well afterwards.
        run(&a.view(), 1024).unwrap();
        assert_eq!(gpu.read(&a.view()).unwrap().wait_as::<u32>().unwrap(), vec![1; 1024]);
    }
}

#[test]
fn a_binding_larger_than_the_limit_is_an_error_with_the_numbers() {
    for Device { backend, .. } in gpus() {
        let gpu = backend.as_ref();
        let caps = gpu.caps();
        let bytes = caps.max_binding + caps.align;
        if bytes > caps.max_buffer {
            continue;
        }
        let a = gpu.alloc("a", bytes).unwrap();
        let mut pass = Pass::new();
        fill(&mut pass, &a.view(), 16, 256, 1);
        match gpu.run(&pass) {
            Err(Error::Unsupported { what, why, .. }) => {
                assert!(
                    what.contains(&bytes.to_string()) && why.contains(&caps.max_binding.to_string()),
                    "{what} {why}"
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn memory_of_another_device_is_refused() {
    let gpus = gpus();
    let [first, second] = &gpus[..] else { return };
    let a = first.backend.alloc("a", 64).unwrap();
    assert!(matches!(second.backend.read(&a.view()), Err(Error::Argument { .. })));
    assert!(matches!(second.backend.write(&a.view(), &[0; 4]), Err(Error::Argument { .. })));
    let mut pass = Pass::new();
    fill(&mut pass, &a.view(), 16, 256, 1);
    assert!(matches!(second.backend.run(&pass), Err(Error::Argument { .. })));
}

#[test]
fn reads_of_any_range_and_without_waiting() {
    for Device { backend, .. } in gpus() {
        let gpu = backend.as_ref();
        let bytes: Vec<u8> = (0..=255).collect();
        let a = gpu.alloc("a", 256).unwrap();
        gpu.write(&a.view(), &bytes).unwrap();
        for (offset, len) in [(0, 256), (1, 2), (3, 6), (6, 0), (255, 1), (256, 0)] {
            let found = gpu.read(&a.slice(offset, len).unwrap()).unwrap().wait().unwrap();
            assert_eq!(found, bytes[offset as usize..(offset + len) as usize]);
        }
        let mut pending = gpu.read(&a.view()).unwrap();
        let found = loop {
            match pending.poll() {
                Some(found) => break found.unwrap(),
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(found, bytes);
    }
}

#[test]
fn a_lost_device_says_so_from_then_on() {
    let adapters = WebGpu::enumerate();
    let Some(found) = adapters.found.iter().find(|f| f.caps.name.contains("llvmpipe")) else {
        return skipped("lavapipe", &adapters.why_none);
    };
    let gpu = WebGpu::open(found, &OpenOptions::default()).unwrap();
    let a = gpu.alloc("a", 64).unwrap();
    gpu.lost("unplugged");
    for result in [gpu.alloc("b", 64).map(drop), gpu.read(&a.view()).map(drop), gpu.run(&Pass::new()), gpu.wait()] {
        match result {
            Err(Error::DeviceLost { why, .. }) => assert_eq!(why, "unplugged"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_host_shares_its_device() {
    let Some(first) = gpus().first().map(|d| d.backend.caps().name.clone()) else { return };
    let adapters = WebGpu::enumerate();
    let found = adapters.found.iter().find(|f| f.caps.name == first).unwrap();
    let host = WebGpu::open(found, &OpenOptions::default()).unwrap();
    let guest = WebGpu::from_device(host.device().clone(), host.queue().clone(), found.info.clone()).unwrap();
    let a = guest.alloc("a", 64).unwrap();
    let mut pass = Pass::new();
    fill(&mut pass, &a.view(), 16, 256, 5);
    guest.run(&pass).unwrap();
    assert_eq!(guest.read(&a.view()).unwrap().wait_as::<u32>().unwrap(), vec![5; 16]);
    // Memory belongs to the one that allocated it, though the device is the same.
    assert!(host.read(&a.view()).is_err());
    // Where the choice falls on the host's adapter, the host's device is what runs.
    let (chosen, account) = gatedelta::device::open_beside(&guest, Some(&first)).unwrap();
    assert_eq!(chosen.read(&a.view()).unwrap().wait_as::<u32>().unwrap(), vec![5; 16]);
    assert_eq!(account.chosen.map(|at| account.candidates[at].name.clone()), Some(first));
    let (other, _) = gatedelta::device::open_beside(&guest, Some("cpu")).unwrap();
    assert!(other.read(&a.view()).is_err());
}

#[test]
fn adapters_are_listed_or_their_absence_is_explained() {
    let adapters = WebGpu::enumerate();
    assert_eq!(adapters.found.is_empty(), !adapters.why_none.is_empty());
    for found in &adapters.found {
        assert!(!found.caps.name.is_empty() && found.caps.max_binding >= 128 << 20, "{found:?}");
    }
}

#[test]
fn compiled_kernels_are_kept_and_a_damaged_file_is_no_obstacle() {
    let adapters = WebGpu::enumerate();
    let Some(found) = adapters.found.iter().find(|f| f.caps.name.to_lowercase().contains("llvmpipe")) else {
        return skipped("lavapipe", &adapters.why_none);
    };
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("deep/er");
    let files = || -> Vec<std::path::PathBuf> {
        std::fs::read_dir(&cache).map_or(Vec::new(), |list| list.map(|entry| entry.unwrap().path()).collect())
    };
    let fills = |cache: std::path::PathBuf| {
        let gpu = WebGpu::open(found, &OpenOptions { cache: Some(cache), ..OpenOptions::default() }).unwrap();
        let a = poisoned(&gpu, 1000);
        let mut pass = Pass::new();
        fill(&mut pass, &a, 1000, 256, 7);
        gpu.load(&pass).unwrap();
        gpu.run(&pass).unwrap();
        let a: Vec<u32> = gpu.read(&a).unwrap().wait_as().unwrap();
        assert!(a.iter().all(|&x| x == 7));
    };
    fills(cache.clone());
    let [file] = &files()[..] else { panic!("one file for one device: {:?}", files()) };
    let whole = std::fs::read(file).unwrap();
    fills(cache.clone());
    assert_eq!(std::fs::read(file).unwrap(), whole);
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [
        &[][..],
        &whole[..20],
        &whole[..whole.len() - 1],
        &flipped,
        b"another program's file altogether, of some length",
    ] {
        std::fs::write(file, damaged).unwrap();
        fills(cache.clone());
        assert_eq!(std::fs::read(file).unwrap(), whole, "it is replaced");
    }
    assert_eq!(files().len(), 1);
    // Where nothing can be kept, nothing is: a file in the place of the folder, and no folder at all.
    fills(file.clone());
    fills(std::path::PathBuf::new());
    assert_eq!((files().len(), std::fs::read_dir(folder.path()).unwrap().count()), (1, 1));
}
