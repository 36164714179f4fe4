//! The kernels for Hopper (`cuda/hopper`) in the place of `gdn_prepare` and `gdn_scan`, where
//! [`super::OpenOptions::hopper`] says so.
//!
//! The rows' tables are of chunks of 32 tokens and say where states are; a small kernel makes those of the Hopper kernels from them,
//! on the device. Chunks of 64 tokens follow each other; of the places for chunks of 32 about half are left over. What
//! `prepare` leaves for `scan` does not fit the rows' scratch: the backend has its own, as large as the largest prefill so far. It is
//! two parts: rounded numbers, and what rounding leaves, which is written and read only where sums cancel (`cuda/hopper/scan.cuh`).
//!
//! Where sequences and heads are too few to fill the device, sequences are cut into segments that run at once (`cuda/hopper/carry.cuh`):
//! which heads have forgotten what lies before a segment is decided on the device, from the gates.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{self, CUdeviceptr, CUresult};

use super::launch::{Call, Variant};
use super::{Shared, lock};
use crate::error::{Error, Result};
use crate::kernel::gdn;
use crate::pass::{Launch, Pass};
use crate::shape::Dtype;

/// Bytes that `prepare` leaves per chunk and value head: IMAGE_BYTES of forward.cuh.
const IMAGE_BYTES: u64 = 2 * 5120 + 1024;
/// Where the scan makes P: KEYS_BYTES of forward.cuh.
const KEYS_BYTES: u32 = 5120 + 1040;
/// For the backward: GRAD_BYTES of forward.cuh.
pub(super) const GRAD_BYTES: u64 = 2 * PANEL as u64 + 2048;
/// Bytes that the forward leaves beside its image where sums cancel: LOW_BYTES of forward.cuh.
const LOW_BYTES: u64 = 2 * 5120;
/// Bytes of a panel `[64, 64]` of 16-bit numbers: PANEL of forward.cuh.
pub(super) const PANEL: u32 = 64 * 128;
/// Bytes of the tables' entries: Chunk, Segment and Cut of forward.cuh.
pub(super) const CHUNK_BYTES: u64 = 8;
pub(super) const SEGMENT_BYTES: u64 = 32;
pub(super) const CUT_BYTES: u64 = 16;
/// Columns of V that a block of `carry` has: CARRY_COLUMNS of carry.cuh.
pub(super) const CARRY_COLUMNS: u32 = 16;
/// A head that has decayed by e to this has forgotten, for numbers of 16 bits.
pub(super) const FORGOTTEN: f32 = -12.0;

/// Launches in the place of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Special {
    /// Launches of the pass that they replace.
    pub launches: usize,
    /// The kernel for chunks.
    pub prepare: String,
    /// Its bytes of shared memory.
    pub prepare_bytes: u32,
    /// The kernel for segments.
    pub scan: String,
    /// Its bytes of shared memory.
    pub scan_bytes: u32,
    /// Warpgroups of 64 columns of V that a block of it has, beside those that load and make.
    pub consumers: u32,
    /// Whether the kernel for segments makes P, of Q and K, which otherwise comes from that for chunks.
    pub makes: bool,
    /// Chunks of 64 tokens in a segment; 0: sequences stay whole.
    pub cut: u32,
}

/// A launch's numbers by name.
pub(super) struct Numbers<'a>(pub(super) &'a Launch);

impl Numbers<'_> {
    pub(super) fn get(&self, name: &str) -> u32 {
        let Launch { kernel, consts, params, .. } = self.0;
        let fields = kernel.consts.iter().zip(consts).chain(kernel.params.iter().zip(params));
        fields.into_iter().find(|(field, _)| field.name == name).map_or(0, |(_, value)| *value)
    }
}

/// The launches that replace those from `at` on, if there are any: those of a prefill with 16-bit q, k and v, K and V of 64 or 128,
/// and rows that start at multiples of 16 bytes. `multiprocessors` are those of the device; `cut` is how long segments shall be
/// instead of what is best there.
pub fn special(pass: &Pass, at: usize, multiprocessors: u32, cut: Option<u32>) -> Option<Special> {
    let launches = &pass.launches;
    let [prepare, scan, ..] = launches.get(at..)? else { return None };
    if *prepare.kernel != gdn::PREPARE || *scan.kernel != gdn::SCAN {
        return None;
    }
    let (p, s) = (Numbers(prepare), Numbers(scan));
    let name = match Dtype::from_code(p.get("qk_type"))? {
        Dtype::F32 => return None,
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
    };
    let (k, v) = (p.get("dk"), s.get("dv"));
    let fits = [p.get("grad"), s.get("grad"), s.get("save"), s.get("walk")] == [0; 4]
        && s.get("v_type") == p.get("qk_type")
        && p.get("chunk") == 32;
    if !fits || ![64, 128].contains(&k) || ![64, 128].contains(&v) {
        return None;
    }
    // Both work on the same tokens, and what lies between them is seen by nobody else.
    let same = |a: usize, b: usize| {
        let (a, b) = (&prepare.args[a], &scan.args[b]);
        a.buffer.id() == b.buffer.id() && a.offset == b.offset && a.bytes == b.bytes
    };
    let ws = prepare.args[5].buffer.id();
    let only_scratch = launches.iter().all(|l| {
        let own = [(gdn::PREPARE.name, 5), (gdn::SCAN.name, 3)];
        l.args.iter().enumerate().all(|(i, a)| a.buffer.id() != ws || own.contains(&(l.kernel.name, i)))
    });
    if !(same(0, 0) && same(1, 1) && same(4, 4) && same(5, 3) && only_scratch) {
        return None;
    }
    let aligned = ["q_stride", "q_off", "k_stride", "k_off", "v_stride", "v_off", "o_stride", "o_off"];
    if aligned.iter().any(|name| s.get(name) % 8 != 0) {
        return None;
    }
    let group = p.get("group");
    let (sequences, chunks) = (scan.grid[0] as u64, prepare.grid[0] as u64 / 2);
    // Of a head: blocks with two consumers.
    let heads = scan.grid[1] as u64 * (v as u64).div_ceil(128);
    let cut =
        cut.unwrap_or_else(|| FORWARD.best_cut(longest(pass, sequences, chunks), chunks * heads, multiprocessors));
    let segments = segments(sequences, chunks, cut);
    // Two consumers share the loads of a block; with few blocks, one each fills the device better.
    let consumers = if v % 128 != 0 || 3 * segments * heads < 2 * multiprocessors as u64 { 1 } else { 2 };
    // With a key head for each value head, P made once per key head saves no product, and where blocks fill the device memory is the bound: the scan
    // then makes it (H200: 4096x8 16/16 0.235 ms for 0.283, 8/8 0.131 for 0.150; 1x8192 whole, 32 blocks, 0.176 for 0.160).
    let one = (group, k) == (1, 128);
    let makes = one && 3 * segments * scan.grid[1] as u64 * v as u64 / 64 >= 2 * multiprocessors as u64;
    let prepares = match (makes, one) {
        (true, _) => "keys_",
        (false, true) => "one_",
        (false, false) => "",
    };
    Some(Special {
        launches: 2,
        prepare: format!("hopper_prepare_{prepares}{name}_k{k}"),
        prepare_bytes: prepare_bytes(if makes { Prepare::Keys } else { Prepare::Forward }, k, group),
        scan: format!("hopper_scan_{}{name}_k{k}_w{consumers}", making(makes)),
        scan_bytes: scan_bytes(k, consumers, true, makes),
        consumers,
        makes,
        cut,
    })
}

/// What segments cost, in chunks: the time in which a scan with one consumer, alone, goes over a chunk. Measured on an H200 with 4 to
/// 64 heads and 1 to 8 sequences of 32768 and of 8192 tokens in all, a quarter of the heads without decay (`cuda/hopper/NOTES.md`).
pub(super) struct Costs {
    /// The passes before the scans, however short: their launches, and the gates.
    begin: f64,
    /// The states of a segment, per chunk of it, where the device is not full of them.
    serial: f64,
    /// Blocks that begin, in chunks of each segment.
    block: f64,
    /// Where the device is full: the states of heads that do not forget, as a part of the scans' work.
    joined: f64,
    /// And those of heads that do, per segment, in chunks.
    warm: f64,
    /// From one segment to the next, where a head does not forget.
    join: f64,
}

/// Of the forward: 0.95 us a chunk.
pub(super) const FORWARD: Costs = Costs { begin: 10.0, serial: 1.0, block: 4.0, joined: 0.25, warm: 12.0, join: 1.0 };

/// Of the backward, both scans at once: 1.75 us a chunk.
pub(super) const BACKWARD: Costs = Costs { begin: 7.0, serial: 0.7, block: 2.0, joined: 0.32, warm: 1.6, join: 0.6 };

impl Costs {
    /// Chunks in a segment; 0: sequences stay whole. `longest` are the chunks of the longest sequence, `work` those of all heads and scans, in
    /// blocks with two consumers. A full device takes twice the time of its share of them, as then memory is the bound. Lengths are powers of two, as
    /// heads mostly are: segments then make a whole round of blocks, where 96 chunks at 16/32 make one and a half (0.67 ms, 0.53 with 128).
    pub(super) fn best_cut(&self, longest: u64, work: u64, multiprocessors: u32) -> u32 {
        let (longest, full) = (longest as f64, 2.1 * work as f64 / f64::from(multiprocessors));
        let time = |length: u32| {
            let length = f64::from(length);
            let filled = full * (1.0 + self.block / length);
            let states = (self.serial * length).max((self.joined + self.warm / length) * filled);
            self.begin + states + self.join * longest / length + filled.max(length)
        };
        let best = [16, 32, 64, 128, 256].into_iter().min_by(|&a, &b| time(a).total_cmp(&time(b)));
        best.filter(|&length| f64::from(length) < longest && time(length) < 0.95 * full.max(longest)).unwrap_or(0)
    }
}

/// Chunks of 64 tokens of the longest sequence of so many with so many chunks in all; where nobody says, they are equal.
pub(super) fn longest(pass: &Pass, sequences: u64, chunks: u64) -> u64 {
    match pass.longest {
        0 => chunks.div_ceil(sequences.max(1)),
        tokens => tokens.div_ceil(64).min(chunks),
    }
}

/// About how many segments so many sequences with so many chunks of 64 tokens have: each but one ends, in the mean, in the middle of one.
fn segments(sequences: u64, chunks: u64, cut: u32) -> u64 {
    let cut = u64::from(cut);
    if cut == 0 { sequences } else { (chunks + sequences.saturating_sub(1) * cut / 2).div_ceil(cut).max(sequences) }
}

/// Segments at most of so many sequences that have so many chunks of 32 tokens.
pub(super) fn places(sequences: u64, chunks: u64, cut: u32) -> u64 {
    // A sequence of n chunks of 32 has at most (n + 1) / 2 of 64.
    if cut == 0 { sequences } else { sequences + (chunks + sequences).div_ceil(2 * cut as u64) }
}

/// What `prepare` works on: keys alone, as the scan makes P; keys and queries; those for a backward pass.
#[derive(Clone, Copy)]
pub(super) enum Prepare {
    Keys,
    Forward,
    Backward,
}

/// PrepareSmem::bytes of prepare.cuh.
pub(super) fn prepare_bytes(what: Prepare, k: u32, group: u32) -> u32 {
    // Tiles [64, K]; how often it keeps the blocks D apart; the image.
    let (tiles, blocks, image) = match what {
        Prepare::Keys => (1, 1, KEYS_BYTES),
        Prepare::Forward => (2, 1, IMAGE_BYTES as u32),
        Prepare::Backward => (2, 2, GRAD_BYTES as u32),
    };
    let inverse = 64 * 72 * 4 + blocks * 4 * (16 * 24 + 16) * 4;
    let before = (tiles * 64 * k * 2).max(inverse).next_multiple_of(1024);
    before + image + 768 + 32 + 16 + group * 512
}

/// Bytes of the vectors in a stage of a scan.
fn vectors(makes: bool) -> u32 {
    if makes { 2048 } else { 1024 }
}

/// ScanSmem::BYTES of scan.cuh, with 3 stages.
fn scan_bytes(k: u32, consumers: u32, outputs: bool, makes: bool) -> u32 {
    let (tiles, triangles) = if outputs { (2, 2) } else { (1, 1) };
    let stage = tiles * (k / 64) * PANEL + consumers * PANEL + triangles * PANEL + vectors(makes);
    3 * stage + if outputs { consumers * PANEL } else { 0 } + 128 + 1024
}

/// ScanSmem::BYTES of scan.cuh for the careful scan, with 2 stages.
fn careful_bytes(k: u32, makes: bool) -> u32 {
    2 * ((2 * (k / 64) + 1 + 4) * PANEL + vectors(makes)) + PANEL + 128 + 1024
}

/// In the names of scans that make P.
fn making(makes: bool) -> &'static str {
    if makes { "making_" } else { "" }
}

/// scan_threads of scan.cuh.
fn scan_threads(consumers: u32, makes: bool) -> u32 {
    128 * (consumers + 1 + u32::from(makes))
}

/// Appends the call that makes the tables: beside one that puts states in their place, which has nothing to do with them.
pub(super) fn push_tables(calls: &mut Vec<Call>, call: Call) {
    let beside = calls.last().is_some_and(|last| last.kernel == "copy" && !last.beside);
    calls.push(Call { beside, ..call });
}

/// Bytes of the transition over a segment: `[K, transition_stride]` of forward.cuh.
pub(super) fn transition_bytes(k: u64) -> u64 {
    4 * k * (k + 4)
}

/// CarrySmem::BYTES of carry.cuh.
pub(super) fn carry_bytes(k: u32) -> u32 {
    3 * transition_bytes(k.into()) as u32 + 4 * (k / 2 * (2 * CARRY_COLUMNS + 8)) + 64
}

/// What the Hopper kernels need beside a launch.
pub(super) struct Hopper {
    on: bool,
    grad: bool,
    /// Whether products with weights go to its kernels, see [`super::hopper_matmul`].
    pub(super) matmul: bool,
    /// See [`special`].
    pub(super) cut: Option<u32>,
    /// By name and bytes of shared memory.
    functions: Mutex<HashMap<(String, u32), Arc<Variant>>>,
    scratch: Mutex<Scratch>,
}

#[derive(Default)]
struct Scratch {
    address: CUdeviceptr,
    bytes: u64,
    /// Smaller ones from before, which calls may still name: freed when the next pass begins.
    old: Vec<CUdeviceptr>,
}

impl Hopper {
    pub(super) fn new(on: bool, grad: bool, matmul: bool, cut: Option<u32>) -> Self {
        Hopper { on, grad, matmul, cut, functions: Mutex::default(), scratch: Mutex::default() }
    }

    /// Whether the kernels are used where they apply, for a prefill.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// The same for a backward pass.
    pub(super) fn grad_is_on(&self) -> bool {
        self.grad
    }

    /// Gives the scratch back. The device's context is current, and nothing is queued.
    pub(super) fn free(&self) {
        let mut scratch = lock(&self.scratch);
        let Scratch { address, bytes, old } = std::mem::take(&mut *scratch);
        for address in old.into_iter().chain((bytes > 0).then_some(address)) {
            // SAFETY: nothing refers to it any more.
            unsafe { sys::cuMemFree_v2(address) };
        }
    }

    /// A pass begins: the calls of those before have been queued.
    pub(super) fn begin(&self, shared: &Shared) -> Result<()> {
        let mut scratch = lock(&self.scratch);
        if !scratch.old.is_empty() {
            shared.wait()?;
            for address in std::mem::take(&mut scratch.old) {
                // SAFETY: nothing that is queued refers to it any more, and no later call does.
                unsafe { sys::cuMemFree_v2(address) };
            }
        }
        Ok(())
    }

    /// At least `bytes` bytes, 256-aligned; None if the device has no more.
    pub(super) fn scratch(&self, shared: &Shared, bytes: u64) -> Result<Option<CUdeviceptr>> {
        let mut scratch = lock(&self.scratch);
        if scratch.bytes < bytes {
            let mut address = 0;
            // SAFETY: the driver writes to a local variable.
            match unsafe { sys::cuMemAlloc_v2(&mut address, bytes as usize) } {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
                code => shared.fault.result("scratch of the Hopper kernels", code)?,
            }
            if scratch.bytes > 0 {
                let old = scratch.address;
                scratch.old.push(old);
            }
            (scratch.address, scratch.bytes) = (address, bytes);
        }
        Ok(Some(scratch.address))
    }

    /// A kernel whose parameters have these sizes.
    pub(super) fn function(
        &self,
        shared: &Shared,
        name: &str,
        threads: u32,
        bytes: u32,
        sizes: &[usize],
    ) -> Result<Arc<Variant>> {
        let mut functions = lock(&self.functions);
        // How much a block shares may depend on more than the kernel: on the heads that it takes.
        let key = (name.to_string(), bytes);
        if let Some(found) = functions.get(&key) {
            return Ok(found.clone());
        }
        let most = functions.keys().filter(|(other, _)| other == name).map(|(_, bytes)| *bytes).max();
        let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
        let family = match () {
            _ if starts(&["hopper_grad", "hopper_keep", "hopper_reverse"]) => "hopper_grad",
            _ if starts(&["hopper_matmul"]) => "hopper_matmul",
            _ => "hopper",
        };
        let function = shared.images.function(&shared.fault, &shared.caps.name, family, name)?;
        for (i, expected) in sizes.iter().enumerate() {
            let (mut offset, mut found) = (0, 0);
            // SAFETY: the driver writes to local variables.
            let code = unsafe { sys::cuFuncGetParamInfo(function, i, &mut offset, &mut found) };
            shared.fault.result(&format!("parameters of {name}"), code)?;
            if found != *expected {
                let log = format!("parameter {i} has {found} bytes, the backend writes {expected}");
                return Err(Error::Compile { kernel: name.into(), device: shared.caps.name.clone(), log });
            }
        }
        let variant = Arc::new(Variant::new(shared, name, function, threads, bytes, most.unwrap_or(0))?);
        functions.insert(key, variant.clone());
        Ok(variant)
    }

    /// Appends the calls for a `gdn_prepare` and the `gdn_scan` after it, whose arguments start at `before` and `after`; false if
    /// there is no memory for their scratch. `exact`: no head may leave out what it has forgotten.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn calls(
        &self,
        shared: &Shared,
        special: &Special,
        launches: &[Launch],
        exact: bool,
        before: &[u64],
        after: &[u64],
        calls: &mut Vec<Call>,
    ) -> Result<bool> {
        let (p, s) = (Numbers(&launches[0]), Numbers(&launches[1]));
        let (chunks, sequences) = (launches[0].grid[0] as u64, launches[1].grid[0] as u64);
        let (hk, hv, k, v) = (p.get("hk"), p.get("hv"), p.get("dk"), s.get("dv"));
        let places = places(sequences, chunks, special.cut);
        // A state or a transition before each segment and head, where there are segments.
        let rows = if special.cut == 0 { 0 } else { places * hv as u64 };
        let cuts = if special.cut == 0 { 0 } else { sequences };
        // Chunks of 64 tokens at most: the last one of a sequence may have a place of 32 to itself.
        let (f16, hv_64) = (p.get("qk_type") == Dtype::F16.code(), u64::from(hv));
        let whole = (chunks + sequences).div_ceil(2).min(chunks);
        let sizes = [
            whole * hv_64 * IMAGE_BYTES,
            chunks * CHUNK_BYTES,
            places * SEGMENT_BYTES,
            if special.cut == 0 { 0 } else { places * SEGMENT_BYTES },
            cuts * CUT_BYTES,
            4 * rows,
            4 * rows * k as u64 * v as u64,
            rows * transition_bytes(k.into()),
            (1 + whole * hv_64) * LOW_BYTES,
            whole * hv_64,
        ];
        let mut offsets = [0; 10];
        let mut end = 0;
        for (offset, size) in offsets.iter_mut().zip(sizes) {
            *offset = end;
            end += size.next_multiple_of(256);
        }
        let Some(scratch) = self.scratch(shared, end)? else { return Ok(false) };
        let [images, chunk_table, segment_table, ordered, cut_table, warm, starts, transitions, lows, cancels] =
            offsets.map(|offset| scratch + offset);
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;

        // TablesArgs of tables.cuh.
        let variant = self.function(shared, "hopper_tables", 128, 0, &[64])?;
        let to_ordered = if special.cut == 0 { 0 } else { ordered };
        let numbers = pair(special.cut, places as u32);
        let launch = vec![after[4], after[5], chunk_table, segment_table, to_ordered, cut_table, 0, numbers];
        let grid = [sequences as u32, 1, 1];
        push_tables(calls, Call::new("hopper_tables", variant, grid, launch, None));

        let at16 = |address: u64, name: &str| address + 2 * u64::from(s.get(name));
        let gates = 4 * u64::from(p.get("g_off"));
        let mut maps = Vec::with_capacity(64);
        for (i, name, width) in [(0, "q", hk * k), (1, "k", hk * k), (2, "v", hv * v), (7, "o", hv * v)] {
            maps.extend(map_of(shared, &launches[1], i, name, after[i], width, f16)?);
        }
        // PrepareArgs, then PrepareMaps of forward.cuh.
        let args = [
            before[2] + gates,
            before[3] + gates,
            chunk_table,
            images,
            pair(p.get("scale"), hk),
            pair(hv, p.get("head_map")),
            pair(p.get("l2norm"), whole as u32),
            lows,
            cancels,
        ];
        let launch = [&args[..], &maps[..32]].concat();
        let variant = self.function(shared, &special.prepare, 128, special.prepare_bytes, &[72, 256])?;
        let grid = [whole as u32 * hk, 1, 1];
        calls.push(Call::new("hopper_prepare", variant, grid, launch, Some(9)));

        let norms = [pair(whole as u32, p.get("l2norm")), p.get("scale").into()];
        let shape = [&[pair(hk, hv), pair(p.get("head_map"), v), 0, lows, cancels], &norms[..]].concat();

        let store = if f16 { "f16" } else { "bf16" };
        if special.cut > 0 {
            let (jobs, parts) = (places as u32 * hv, v / 64 + k / 64);
            // CarryArgs of forward.cuh.
            let threshold = if exact { f32::NEG_INFINITY } else { FORGOTTEN };
            let numbers = [pair(threshold.to_bits(), hv), v.into()];
            let carry = [&[ordered, cut_table, images, warm, after[6], starts, transitions][..], &numbers].concat();
            let variant = self.function(shared, "hopper_warm", 128, 0, &[72])?;
            calls.push(Call::new("hopper_warm", variant, [jobs, 1, 1], carry.clone(), None));

            // ScanArgs, then ScanMaps: no outputs, states from zero.
            let args = [ordered, images, 0, starts, transitions, warm, 0, 0];
            let launch = [&args[..], &shape, &maps].concat();
            let name = format!("hopper_state_{store}_k{k}");
            let variant = self.function(shared, &name, 256, scan_bytes(k, 1, false, false), &[120, 512])?;
            let grid = [jobs * parts, 1, 1];
            calls.push(Call::new("hopper_state", variant, grid, launch, Some(15)));

            let name = format!("hopper_carry_k{k}");
            let variant = self.function(shared, &name, k, carry_bytes(k), &[72])?;
            let grid = [sequences as u32 * hv, v / CARRY_COLUMNS, 1];
            calls.push(Call::new("hopper_carry", variant, grid, carry, None));
        }

        // ScanArgs, then ScanMaps. Without segments states are read and written in place.
        let from = if special.cut == 0 { after[6] } else { starts };
        let args = [segment_table, images, from, after[6], 0, 0, at16(after[7], "o_off"), s.get("o_stride").into()];
        let launch = [&args[..], &shape, &maps].concat();
        let threads = scan_threads(special.consumers, special.makes);
        let variant = self.function(shared, &special.scan, threads, special.scan_bytes, &[120, 512])?;
        let grid = [places as u32 * hv * (v / 64 / special.consumers), 1, 1];
        calls.push(Call::new("hopper_scan", variant, grid, launch.clone(), Some(15)));
        // Beside it, for the segments that it leaves alone: behind it in line for multiprocessors, as mostly there are none.
        let name = format!("hopper_scan_{}careful_{store}_k{k}", making(special.makes));
        let (threads, bytes) = (scan_threads(1, special.makes), careful_bytes(k, special.makes));
        let variant = self.function(shared, &name, threads, bytes, &[120, 512])?;
        let grid = [places as u32 * hv * (v / 64), 1, 1];
        let call = Call::new("hopper_scan_careful", variant, grid, launch, Some(15));
        calls.push(Call { beside: true, ..call });
        Ok(true)
    }
}

/// The map of argument `i` of a launch, which starts at `address`; its params call it `name`.
pub(super) fn map_of(
    shared: &Shared,
    launch: &Launch,
    i: usize,
    name: &str,
    address: u64,
    width: u32,
    f16: bool,
) -> Result<[u64; 16]> {
    let get = |what: &str| u64::from(Numbers(launch).get(&format!("{name}_{what}")));
    let (off, stride) = (get("off"), get("stride"));
    // The last row may be cut off behind its numbers.
    let rows = (launch.args[i].bytes / 2).saturating_sub(off + u64::from(width)) / stride.max(1) + 1;
    let dtype = if f16 { Dtype::F16 } else { Dtype::Bf16 };
    Ok(tensor_map(shared, address + 2 * off, [rows, width.into()], stride, dtype, [64, 64])?.opaque)
}

/// `[rows, width]` numbers, `stride` from one row to the next, as the copy engine takes them: in boxes of so many rows of 128 bytes, swizzled.
pub(super) fn tensor_map(
    shared: &Shared,
    address: u64,
    [rows, width]: [u64; 2],
    stride: u64,
    dtype: Dtype,
    [box_rows, box_width]: [u32; 2],
) -> Result<sys::CUtensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let code = match dtype {
        Dtype::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let (sizes, strides, side, steps) = ([width, rows], [dtype.size() * stride], [box_width, box_rows], [1, 1]);
    // SAFETY: the driver reads as many numbers as there are dimensions, and writes the map.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            code,
            2,
            address as *mut std::ffi::c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            side.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    shared.fault.result("describing a tensor to the copy engine", code)?;
    Ok(map)
}
