//! Passes that come again: what differs from the time before reaches the device, whatever way the pass is launched.

use gatedelta::backend::{Backend, Buffer};
use gatedelta::ops;
use gatedelta::pass::Pass;

use crate::util::{devices, skipped};

const BLOCKS: u64 = 12;
const WORDS: u64 = 64;

/// Fills block i of `to` with `first + i`, one launch a block; every other pass with half of the words.
fn fills(backend: &dyn Backend, to: &Buffer, first: u32, words: u64) -> Pass {
    let mut pass = Pass::new();
    for i in 0..BLOCKS {
        ops::fill(backend.caps(), &mut pass, &to.view(), i * WORDS, words, first + i as u32).unwrap();
    }
    pass
}

fn words(backend: &dyn Backend, of: &Buffer) -> Vec<u32> {
    backend.read(&of.view()).unwrap().wait_as().unwrap()
}

#[test]
fn what_differs_reaches_the_device() {
    let Some(device) = devices().iter().find(|d| d.name == "emulator" || d.name == "cuda") else {
        return skipped("emulator", "no CUDA device is under test");
    };
    let backend = &*device.backend;
    let memory = || {
        let buffer = backend.alloc("blocks", BLOCKS * WORDS * 4).unwrap();
        backend.write(&buffer.view(), &vec![0xff; (BLOCKS * WORDS * 4) as usize]).unwrap();
        buffer
    };
    // Launch by launch, as a new graph, as a graph that is changed in its numbers, its memory, and not at all.
    let (one, two) = (memory(), memory());
    for (to, first, n) in
        [(&one, 0, 64), (&one, 100, 64), (&one, 200, 64), (&two, 300, 64), (&two, 300, 64), (&one, 400, 32)]
    {
        backend.run(&fills(backend, to, first, n)).unwrap();
        let found = words(backend, to);
        for (i, block) in found.chunks(WORDS as usize).enumerate() {
            assert!(block[..n as usize].iter().all(|&w| w == first + i as u32), "{first} {i}: {block:?}");
        }
    }
    // The other half of each block is from the pass before.
    assert_eq!(words(backend, &one)[WORDS as usize - 1], 200);
    // Memory that went away is in no graph.
    drop(one);
    let three = memory();
    backend.run(&fills(backend, &three, 500, 64)).unwrap();
    assert_eq!(words(backend, &three)[0], 500);
    assert_eq!(words(backend, &two)[0], 300);

    let timing = backend.time(&fills(backend, &three, 600, 64)).unwrap();
    assert!(timing.device_clock && timing.total >= timing.longest_submission);
    assert_eq!(words(backend, &three)[0], 600);
}

#[test]
fn reads_are_ordered_and_can_be_dropped_or_polled() {
    let Some(device) = devices().iter().find(|d| d.name == "emulator" || d.name == "cuda") else {
        return skipped("emulator", "no CUDA device is under test");
    };
    let backend = &*device.backend;
    let buffer = backend.alloc("numbers", 4096).unwrap();
    let mut reads = Vec::new();
    for i in 0..20u32 {
        backend.write(&buffer.view(), bytemuck::cast_slice(&[i; 1024])).unwrap();
        reads.push(backend.read(&buffer.slice(256, 8).unwrap()).unwrap());
    }
    for (i, mut read) in reads.into_iter().enumerate() {
        match i % 3 {
            0 => assert_eq!(read.wait_as::<u32>().unwrap(), [i as u32; 2]),
            1 => drop(read),
            _ => {
                let bytes = loop {
                    if let Some(done) = read.poll() {
                        break done.unwrap();
                    }
                };
                assert_eq!(bytes[..4], (i as u32).to_le_bytes());
            }
        }
    }
    assert!(backend.read(&buffer.slice(0, 0).unwrap()).unwrap().wait().unwrap().is_empty());
    // Longer than what goes through staging memory.
    let long = backend.alloc("long", 20 << 20).unwrap();
    let bytes: Vec<u8> = (0..20 << 20).map(|i: u32| i as u8).collect();
    backend.write(&long.view(), &bytes).unwrap();
    assert!(backend.read(&long.view()).unwrap().wait().unwrap() == bytes);
}
