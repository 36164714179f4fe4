//! The short run of a target, in a plain test: what its own writers make, then the same with damage. Every run is the same.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// A target and what it is fed.
pub struct Brief {
    /// As it is called in `fuzz_targets`.
    pub name: &'static str,
    /// Takes any bytes and panics only where something is wrong.
    pub target: fn(&[u8]),
    /// Whole inputs.
    pub seeds: Vec<Vec<u8>>,
    /// Words of the format.
    pub words: &'static [&'static str],
    /// Damaged inputs.
    pub rounds: usize,
    /// Bytes that a call may hold at a time, beside `each` for every byte of its input.
    pub base: usize,
    pub each: usize,
}

impl Brief {
    /// Feeds the target; where the variable GATEDELTA_FUZZ_SEEDS names a folder, only writes the seeds there.
    pub fn run(self) {
        if let Some(dir) = std::env::var_os("GATEDELTA_FUZZ_SEEDS") {
            let dir = Path::new(&dir).join(self.name);
            std::fs::create_dir_all(&dir).unwrap();
            for (i, seed) in self.seeds.iter().enumerate() {
                std::fs::write(dir.join(format!("seed-{i}")), seed).unwrap();
            }
            return;
        }
        for seed in &self.seeds {
            // Twice: what is made once and kept is not the input's.
            (self.target)(seed);
            self.feed(seed);
        }
        self.feed(&[]);
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        for _ in 0..self.rounds {
            let mut bytes = random.pick(&self.seeds).clone();
            for _ in 0..1 + random.below(6) {
                self.damage(&mut bytes, &mut random);
            }
            self.feed(&bytes);
        }
    }

    fn feed(&self, bytes: &[u8]) {
        let before = HELD.get();
        PEAK.set(before);
        let done = catch_unwind(AssertUnwindSafe(|| (self.target)(bytes)));
        let (held, most) = ((PEAK.get() - before).max(0) as usize, self.base + self.each * bytes.len());
        if done.is_ok() && held <= most {
            return;
        }
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", self.name));
        std::fs::write(&path, bytes).unwrap();
        eprintln!("{}: {} bytes in {}", self.name, bytes.len(), path.display());
        match done {
            Ok(()) => panic!("it held {held} bytes for an input of {}; {most} are expected at most", bytes.len()),
            Err(why) => resume_unwind(why),
        }
    }

    fn damage(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        let at = random.below(bytes.len() + 1);
        let to = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(10) {
            0 | 1 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..to)),
            4 => {
                let again = bytes[at..to].to_vec();
                drop(bytes.splice(at..at, again));
            }
            // The front of one and the back of another.
            5 => {
                let other = random.pick(&self.seeds);
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            // What may be a length.
            6 | 7 => {
                let width = [1, 2, 4, 8][random.below(4)];
                let at = if random.below(2) == 0 { at / width * width } else { at };
                if let Some(field) = bytes.get_mut(at..at + width) {
                    let mut value = [0; 8];
                    value[..width].copy_from_slice(field);
                    let value = u64::from_le_bytes(value);
                    let lies = [
                        0,
                        value.wrapping_add(1),
                        value.wrapping_sub(1),
                        value << 1,
                        u64::MAX,
                        1 << 31,
                        1 << 62,
                        i64::MAX as u64,
                    ];
                    field.copy_from_slice(&random.pick(&lies).to_le_bytes()[..width]);
                }
            }
            // A number in a text.
            8 => {
                let Some(begin) = bytes[at..].iter().position(u8::is_ascii_digit).map(|n| at + n) else { return };
                let end = bytes[begin..].iter().position(|b| !b.is_ascii_digit()).map_or(bytes.len(), |n| begin + n);
                let lies = [
                    "0",
                    "1",
                    "-1",
                    "255",
                    "65536",
                    "16777216",
                    "4294967295",
                    "4294967296",
                    "18446744073709551615",
                    "1e400",
                ];
                drop(bytes.splice(begin..end, random.pick(&lies).bytes()));
            }
            _ if self.words.is_empty() => bytes.insert(at, random.below(256) as u8),
            _ => {
                let to = if random.below(2) == 0 { at } else { to };
                drop(bytes.splice(at..to, random.pick(self.words).bytes()));
            }
        }
    }
}

/// xorshift64*, of Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled" (2016).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n.max(1)
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

thread_local! {
    /// Bytes that this thread holds, less those that it freed for others.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is the system's, with its own arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
}
