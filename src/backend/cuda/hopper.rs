//! The kernels for Hopper (`cuda/hopper`) in the place of `gdn_prepare` and `gdn_scan`. Not yet run from here: see
//! [`super::OpenOptions::hopper`].
//!
//! The rows' tables are of chunks of 32 tokens and say where states are; a small kernel makes those of the Hopper kernels from them,
//! on the device. Chunk i of 64 tokens of a segment takes the place of chunk i of 32; the places that are left over are empty. What
//! `prepare` leaves for `scan` does not fit the rows' scratch: the backend has its own, as large as the largest prefill so far.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{self, CUdeviceptr, CUresult};

use super::launch::{Call, Variant};
use super::{Shared, lock};
use crate::error::{Error, Result};
use crate::kernel::gdn;
use crate::pass::Launch;
use crate::shape::Dtype;

/// Bytes that `prepare` leaves per chunk and value head: IMAGE_BYTES of forward.cuh.
const IMAGE_BYTES: u64 = 2 * 5120 + 1024;
/// Bytes of a panel `[64, 64]` of 16-bit numbers: PANEL of forward.cuh.
const PANEL: u32 = 64 * 128;
/// Bytes of the tables' entries: Chunk and Segment of forward.cuh.
const CHUNK_BYTES: u64 = 8;
const SEGMENT_BYTES: u64 = 32;

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
    /// Warpgroups of 64 columns of V that a block of it has, beside the one that loads.
    pub consumers: u32,
}

/// A launch's numbers by name.
struct Numbers<'a>(&'a Launch);

impl Numbers<'_> {
    fn get(&self, name: &str) -> u32 {
        let Launch { kernel, consts, params, .. } = self.0;
        let fields = kernel.consts.iter().zip(consts).chain(kernel.params.iter().zip(params));
        fields.into_iter().find(|(field, _)| field.name == name).map_or(0, |(_, value)| *value)
    }
}

/// The launches that replace those from `at` on, if there are any: those of a prefill with 16-bit q, k and v, K and V of 64 or 128,
/// and rows that start at multiples of 16 bytes. `multiprocessors` are those of the device.
pub fn special(launches: &[Launch], at: usize, multiprocessors: u32) -> Option<Special> {
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
    // Two consumers share the loads of a block; with few blocks, one each fills the device better.
    let blocks = scan.grid[0] as u64 * scan.grid[1] as u64 * (v / 128) as u64;
    let consumers = if v % 128 != 0 || 3 * blocks < 2 * multiprocessors as u64 { 1 } else { 2 };
    Some(Special {
        launches: 2,
        prepare: format!("hopper_prepare_{name}_k{k}"),
        prepare_bytes: prepare_bytes(k, group),
        scan: format!("hopper_scan_{name}_k{k}_w{consumers}"),
        scan_bytes: scan_bytes(k, consumers),
        consumers,
    })
}

/// PrepareSmem::bytes of prepare.cuh.
fn prepare_bytes(k: u32, group: u32) -> u32 {
    let inverse = 64 * 72 * 4 + 4 * (16 * 24 + 16) * 4;
    let tiles = 2 * 64 * k * 2;
    let image = tiles.max(inverse).div_ceil(1024) * 1024;
    image + IMAGE_BYTES as u32 + 768 + group * 512 + 1024
}

/// ScanSmem::BYTES of scan.cuh, with 3 stages and outputs.
fn scan_bytes(k: u32, consumers: u32) -> u32 {
    let stage = 2 * (k / 64) * PANEL + consumers * PANEL + 2 * PANEL + 1024;
    3 * stage + consumers * PANEL + 3 * 16 + 1024
}

/// What the Hopper kernels need beside a launch.
pub(super) struct Hopper {
    on: bool,
    functions: Mutex<HashMap<String, Arc<Variant>>>,
    scratch: Mutex<Scratch>,
}

#[derive(Default)]
struct Scratch {
    address: CUdeviceptr,
    bytes: u64,
}

impl Hopper {
    pub(super) fn new(on: bool) -> Self {
        Hopper { on, functions: Mutex::default(), scratch: Mutex::default() }
    }

    /// Whether the kernels are used where they apply.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// Gives the scratch back. The device's context is current, and nothing is queued.
    pub(super) fn free(&self) {
        let mut scratch = lock(&self.scratch);
        if scratch.bytes > 0 {
            // SAFETY: nothing refers to it any more.
            unsafe { sys::cuMemFree_v2(scratch.address) };
            *scratch = Scratch::default();
        }
    }

    /// At least `bytes` bytes, 256-aligned; None if the device has no more.
    fn scratch(&self, shared: &Shared, bytes: u64) -> Result<Option<CUdeviceptr>> {
        let mut scratch = lock(&self.scratch);
        if scratch.bytes < bytes {
            // What is queued may still use the old one.
            shared.wait()?;
            // SAFETY: the memory is this struct's; the driver writes to a local variable.
            unsafe {
                if scratch.bytes > 0 {
                    sys::cuMemFree_v2(scratch.address);
                    *scratch = Scratch::default();
                }
                let mut address = 0;
                match sys::cuMemAlloc_v2(&mut address, bytes as usize) {
                    CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
                    code => shared.fault.result("scratch of the Hopper kernels", code)?,
                }
                *scratch = Scratch { address, bytes };
            }
        }
        Ok(Some(scratch.address))
    }

    /// A kernel whose parameters have these sizes.
    fn function(&self, shared: &Shared, name: &str, threads: u32, bytes: u32, sizes: &[usize]) -> Result<Arc<Variant>> {
        let mut functions = lock(&self.functions);
        if let Some(found) = functions.get(name) {
            return Ok(found.clone());
        }
        let function = shared.images.function(&shared.fault, &shared.caps.name, "hopper", name)?;
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
        if bytes > 0 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let code = unsafe { sys::cuFuncSetAttribute(function, attribute, bytes as i32) };
            shared.fault.result(&format!("shared memory of {name}"), code)?;
        }
        let variant = Arc::new(Variant { function, threads, shared_bytes: bytes });
        functions.insert(name.into(), variant.clone());
        Ok(variant)
    }

    /// Appends the calls for a `gdn_prepare` and the `gdn_scan` after it, whose arguments start at `before` and `after`; false if
    /// there is no memory for their scratch.
    pub(super) fn calls(
        &self,
        shared: &Shared,
        special: &Special,
        launches: &[Launch],
        before: &[u64],
        after: &[u64],
        calls: &mut Vec<Call>,
    ) -> Result<bool> {
        let (p, s) = (Numbers(&launches[0]), Numbers(&launches[1]));
        let (chunks, segments) = (launches[0].grid[0] as u64, launches[1].grid[0] as u64);
        let (hk, hv, k, v) = (p.get("hk"), p.get("hv"), p.get("dk"), s.get("dv"));
        let images_bytes = chunks * hv as u64 * IMAGE_BYTES;
        let tables_bytes = (chunks * CHUNK_BYTES).next_multiple_of(256);
        let Some(images) = self.scratch(shared, images_bytes + tables_bytes + segments * SEGMENT_BYTES)? else {
            return Ok(false);
        };
        let (chunk_table, segment_table) = (images + images_bytes, images + images_bytes + tables_bytes);

        let variant = self.function(shared, "hopper_tables", 128, 0, &[32])?;
        let launch = vec![after[4], after[5], chunk_table, segment_table];
        calls.push(Call { kernel: "hopper_tables", variant, grid: [segments as u32, 1, 1], launch, second: None });

        // PrepareArgs of forward.cuh.
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let at16 = |address: u64, name: &str| address + 2 * u64::from(s.get(name));
        let gates = 4 * u64::from(p.get("g_off"));
        let launch = vec![
            at16(after[0], "q_off"),
            at16(after[1], "k_off"),
            before[2] + gates,
            before[3] + gates,
            chunk_table,
            images,
            s.get("q_stride").into(),
            s.get("k_stride").into(),
            pair(p.get("scale"), hk),
            pair(hv, p.get("head_map")),
            pair(p.get("l2norm"), 0),
        ];
        let variant = self.function(shared, &special.prepare, 128, special.prepare_bytes, &[88])?;
        let grid = [launches[0].grid[0] * hk, 1, 1];
        calls.push(Call { kernel: "hopper_prepare", variant, grid, launch, second: None });

        // ScanArgs, then ScanMaps. States are read and written in place.
        let mut launch = vec![
            segment_table,
            images,
            after[6],
            after[6],
            0,
            0,
            at16(after[7], "o_off"),
            s.get("o_stride").into(),
            pair(hk, hv),
            pair(p.get("head_map"), v),
            0,
        ];
        let second = launch.len();
        let f16 = p.get("qk_type") == Dtype::F16.code();
        for (i, name, width) in [(0, "q", hk * k), (1, "k", hk * k), (2, "v", hv * v)] {
            let (off, stride) = (s.get(&format!("{name}_off")), s.get(&format!("{name}_stride")));
            let numbers = launches[1].args[i].bytes / 2;
            // The last row may be cut off behind its numbers.
            let rows = (numbers.saturating_sub(u64::from(off) + u64::from(width))) / u64::from(stride.max(1)) + 1;
            let map =
                tensor_map(shared, at16(after[i], &format!("{name}_off")), rows, width.into(), stride.into(), f16)?;
            launch.extend_from_slice(&map.opaque);
        }
        let threads = (special.consumers + 1) * 128;
        let variant = self.function(shared, &special.scan, threads, special.scan_bytes, &[88, 384])?;
        let grid = [launches[1].grid[0] * hv * (v / 64 / special.consumers), 1, 1];
        calls.push(Call { kernel: "hopper_scan", variant, grid, launch, second: Some(second) });
        Ok(true)
    }
}

/// Rows of 16-bit numbers, `stride` from one to the next, as the copy engine takes them: in boxes of `[64, 64]`, swizzled.
fn tensor_map(
    shared: &Shared,
    address: u64,
    rows: u64,
    width: u64,
    stride: u64,
    f16: bool,
) -> Result<sys::CUtensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let dtype = match f16 {
        true => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        false => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let (sizes, strides, side, steps) = ([width, rows], [2 * stride], [64, 64], [1, 1]);
    // SAFETY: the driver reads as many numbers as there are dimensions, and writes the map.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            dtype,
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
