//! What goes wrong, said in errors: no driver, drivers and devices that are too old or fail, memory, launches. The stand-in for the
//! driver plays the broken ones, each in a process of its own.

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::backend::cuda::{Cuda, OpenOptions, choose};
use gatedelta::device;
use gatedelta::kernel;
use gatedelta::pass::Pass;

use crate::util::{devices, skipped};

/// The stand-in of this process, if it is one of the devices under test.
fn subject() -> Option<&'static dyn Backend> {
    let found = devices().iter().find(|d| d.name == "emulator" || d.name == "cuda");
    if found.is_none() {
        skipped("emulator", "no CUDA device is under test");
    }
    found.map(|d| &*d.backend)
}

/// Runs the ignored test `name` of this file in a process whose driver is the stand-in, told to be like `like`; what it printed.
fn child(name: &str, like: &str) -> Option<String> {
    crate::cuda::child(&format!("bad::{name}"), like, &[])
}

/// Run by [`child`]: opens the device and uses it, and prints what came of each.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn opens_and_computes() {
    match device::open(Some("cuda")) {
        Ok((backend, _)) => println!("open: {}", backend.caps().name),
        Err(error) => println!("open: {error}"),
    }
    let devices = Cuda::enumerate();
    println!("none: {}", devices.why_none);
    let Some(found) = devices.found.first() else { return };
    let cuda = match Cuda::open(found, &OpenOptions::default()) {
        Ok(cuda) => cuda,
        Err(error) => return println!("opened: {error}"),
    };
    let report = |what: &str, result: Result<(), Error>| match result {
        Ok(()) => println!("{what}: fine"),
        Err(error) => println!("{what}: {error}"),
    };
    report("large", cuda.alloc("weights", 1 << 20).map(drop));
    let memory = cuda.alloc("memory", 4096).unwrap();
    let mut pass = Pass::new();
    gatedelta::ops::fill(cuda.caps(), &mut pass, &memory.view(), 0, 1024, 7).unwrap();
    report("run", cuda.run(&pass));
    report("after", cuda.wait());
}

#[test]
fn a_driver_without_devices_is_absent() {
    for (like, why) in [
        ("devices=0", "the NVIDIA driver has no device"),
        ("init=100", "the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE"),
    ] {
        let Some(text) = child("opens_and_computes", like) else { return };
        assert!(text.contains(&format!("none: {why}")), "{text}");
        assert!(text.contains("open: no device for \"cuda\""), "{text}");
    }
}

#[test]
fn what_is_too_old_is_named() {
    let Some(text) = child("opens_and_computes", "version=12040") else { return };
    assert!(text.contains("its driver is for CUDA 12.4, the kernels need 13.0"), "{text}");
    let Some(text) = child("opens_and_computes", "arch=75") else { return };
    assert!(text.contains("architecture sm_75 is not supported by cuda:0 CUDA emulator"), "{text}");
}

#[test]
fn memory_that_is_not_there_is_named() {
    // Less than the device has, more than is free; and more than it has.
    let Some(text) = child("opens_and_computes", "memory=1048576") else { return };
    assert!(text.contains("large: fine"), "{text}");
    let Some(text) = child("opens_and_computes", "memory=1000000") else { return };
    assert!(text.contains("large: cuda:0 CUDA emulator: weights needs 1048576 bytes; the device has 999936"), "{text}");
}

#[test]
fn a_failed_launch_loses_the_device() {
    let Some(text) = child("opens_and_computes", "launch=719") else { return };
    assert!(text.contains("open: cuda:0 CUDA emulator was lost: launch of "), "{text}");
    assert!(text.contains("run: cuda:0 CUDA emulator was lost: launch of fill: CUDA_ERROR_LAUNCH_FAILED"), "{text}");
    assert!(text.contains("after: cuda:0 CUDA emulator was lost"), "{text}");
}

#[test]
fn a_failed_launch_that_can_be_recovered_from_does_not() {
    let Some(text) = child("opens_and_computes", "launch=1") else { return };
    assert!(text.contains("run: cuda:0 CUDA emulator: launch of fill: CUDA_ERROR_INVALID_VALUE"), "{text}");
    assert!(text.contains("after: fine"), "{text}");
}

#[test]
fn full_memory_is_told_with_what_is_free() {
    let Some(cuda) = subject() else { return };
    let all = cuda.caps().memory.unwrap();
    let _some = cuda.alloc("some", 1 << 20).unwrap();
    match cuda.alloc("all", all / 256 * 256) {
        Err(Error::OutOfMemory { what, needed, limit, .. }) => {
            assert_eq!((what.as_str(), needed), ("all", all / 256 * 256));
            assert!(limit.ends_with("are free"), "{limit}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn memory_of_another_device_is_refused() {
    let Some(cuda) = subject() else { return };
    let cpu = &*devices()[0].backend;
    let foreign = cpu.alloc("foreign", 64).unwrap();
    let own = cuda.alloc("own", 64).unwrap();
    let is_argument = |result: Result<(), Error>, what: &str| match result {
        Err(Error::Argument { what: found, .. }) => assert_eq!(found, what),
        other => panic!("{other:?}"),
    };
    is_argument(cuda.write(&foreign.view(), &[0; 4]), "target of a write");
    is_argument(cuda.read(&foreign.view()).map(drop), "source of a read");
    is_argument(cpu.read(&own.view()).map(drop), "view");
    is_argument(cuda.write(&own.view(), &[0; 65]), "target of a write");
    let past = gatedelta::backend::View { buffer: own.clone(), offset: 60, bytes: 8 };
    is_argument(cuda.read(&past).map(drop), "source of a read");
    let mut pass = Pass::new();
    gatedelta::ops::fill(cuda.caps(), &mut pass, &foreign.view(), 0, 16, 0).unwrap();
    is_argument(cuda.run(&pass), "dst");
}

#[test]
fn consts_without_a_kernel_are_named() {
    let refused = |kernel, consts: &[u32], what: &str| match choose(kernel, consts) {
        Err(Error::Unsupported { what: found, .. }) => assert_eq!(found, what),
        other => panic!("{other:?}"),
    };
    refused(&kernel::gdn::PREPARE, &[16, 32, 1, 0, 1, 0, 64], "kernel gdn_prepare with chunk = 16");
    refused(&kernel::gdn::PREPARE, &[32, 24, 1, 0, 1, 0, 64], "kernel gdn_prepare with dk = 24");
    refused(&kernel::gdn::PREPARE, &[32, 32, 1, 3, 1, 0, 64], "kernel gdn_prepare with qk_type = 3");
    refused(&kernel::gdn::SCAN, &[32, 272, 32, 0, 0, 0, 0, 0, 128], "kernel gdn_scan with dk = 272");
    refused(&kernel::gdn::SCAN, &[32, 64, 32, 0, 1, 0, 0, 0, 128], "kernel gdn_scan with v_type = f16");
    refused(&kernel::gdn::SCAN, &[32, 64, 32, 0, 0, 0, 0, 0, 64], "kernel gdn_scan with lanes = 64");
    refused(&kernel::gdn::CONV, &[9, 1, 1], "kernel conv with taps = 9");
    assert!(matches!(choose(&kernel::gdn::CONV, &[4]), Err(Error::Argument { .. })));
}
