//! Capabilities of a device, and every size that is chosen from them. All magic numbers are here, each with its reason.

use crate::shape::Heads;

/// Threads of a GPU workgroup where a kernel row has no `lanes`: a multiple of every subgroup size in use (4 to 64).
pub const CELL_THREADS: u32 = 64;

/// The kind of backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The native CPU backend.
    Cpu,
    /// A GPU or software driver through wgpu.
    WebGpu,
    /// CUDA.
    Cuda,
}

/// How a device compares with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the host's memory.
    Integrated,
    /// A virtual or unnamed GPU.
    Other,
    /// The host's processor, natively.
    Cpu,
    /// A GPU driver in software.
    Software,
}

/// What a device is and what it can do. Sizes in bytes unless said otherwise.
#[derive(Debug, Clone)]
pub struct Caps {
    /// The device's own name.
    pub name: String,
    /// Driver, API and version, for people.
    pub driver: String,
    /// Which backend.
    pub kind: Kind,
    /// How it compares.
    pub class: Class,
    /// Largest part of a buffer that a kernel can see through one argument.
    pub max_binding: u64,
    /// Largest buffer.
    pub max_buffer: u64,
    /// A view given to a kernel starts at a multiple of this.
    pub align: u64,
    /// Memory that the threads of a workgroup share.
    pub workgroup_memory: u32,
    /// Threads of a workgroup at most.
    pub workgroup_threads: u32,
    /// Threads of a subgroup, smallest and largest, where kernels may use subgroup operations.
    pub subgroup: Option<(u32, u32)>,
    /// f16 arithmetic in kernels.
    pub f16: bool,
    /// Threads that run cells at the same time on a CPU; 0 where unknown.
    pub threads: u32,
    /// Device memory, where it is known.
    pub memory: Option<u64>,
}

/// How one call of the operator is cut up. The same for every backend; only the numbers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// C: tokens per chunk.
    pub chunk: u32,
    /// Columns of the state that one scan cell carries; divides V.
    pub dv_tile: u32,
    /// Columns of the state that one step cell carries; divides V.
    pub dv_step: u32,
    /// Threads of a `gdn_prepare` workgroup.
    pub prepare_lanes: u32,
    /// Threads of a `gdn_scan` workgroup.
    pub scan_lanes: u32,
    /// Threads of a `gdn_step` workgroup.
    pub step_lanes: u32,
    /// Bytes of scratch that one piece of a prefill may take.
    pub scratch: u64,
}

/// The tile for these heads on this device.
pub fn tile(caps: &Caps, heads: &Heads) -> Tile {
    match caps.kind {
        Kind::Cpu => Tile {
            // 32 x 128 f32 of q or k is half of a 32 KB first-level cache; 64 needs 8 % more arithmetic and spills it.
            chunk: 32,
            dv_tile: divisor(heads.v, 64),
            dv_step: divisor(heads.v, 64),
            prepare_lanes: 1,
            scan_lanes: 1,
            step_lanes: 1,
            // Written by prepare and read by scan soon after: it should stay in the last-level cache.
            scratch: 8 << 20,
        },
        Kind::WebGpu | Kind::Cuda => Tile {
            // Two 16 x 128 f32 tiles are 16 KiB, WebGPU's default workgroup memory.
            chunk: 16,
            dv_tile: divisor(heads.v, 32),
            dv_step: divisor(heads.v, 32),
            prepare_lanes: 64,
            scan_lanes: 64,
            step_lanes: 64,
            scratch: 32 << 20,
        },
    }
}

/// The largest multiple of 16 that divides `n` and is at most `most`.
fn divisor(n: u32, most: u32) -> u32 {
    (1..=most / 16).rev().map(|i| i * 16).find(|d| n % d == 0).unwrap_or(16)
}
