//! Capabilities of a device, and every size that is chosen from them. All magic numbers are here, each with its reason.

use crate::shape::{Dtype, Heads};

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
    /// Chunks of one sequence that a piece has at most, however few heads share its scratch: a scan cell walks all of them, and
    /// no backend can cut a cell, so this bounds how long a submission takes.
    pub walk: u64,
    /// Columns of the state's gradient that one `gdn_grad_scan` cell carries; divides V.
    pub dv_grad: u32,
    /// Threads of a `gdn_grad_scan` workgroup.
    pub grad_lanes: u32,
    /// Bytes that the backward scan of one piece may save.
    pub grad_scratch: u64,
    /// Bytes that the forward scans of a backward pass may save before the pieces that they were for are walked back.
    pub grad_states: u64,
    /// When sequences are cut into segments that run at the same time; never if none.
    pub cut: Option<Cut>,
}

/// When sequences are cut into segments that run at the same time, see [`crate::plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cut {
    /// Cells of a scan that occupy the device. Pieces with more than half as many are left whole, or with more than a third
    /// as many if heads are to be cut exactly.
    pub cells: u32,
    /// Chunks that a segment has at least, but for the last of a sequence.
    pub least: u32,
    /// Whether a head is also cut where it has not forgotten what lies before; else it is left whole there.
    pub exact: bool,
}

impl Cut {
    /// Segments of at most this many chunks, however well the device is occupied: for tests and measurements.
    pub const fn every(chunks: u32) -> Cut {
        Cut { cells: u32::MAX, least: chunks, exact: true }
    }

    /// Chunks that a segment has at least, never 0.
    pub fn least(&self) -> u64 {
        self.least.max(1) as u64
    }

    /// Chunks of a segment at most, for `chunks` chunks of which `longest` are of one sequence, when each segment is walked by
    /// `cells` cells.
    pub fn span(&self, chunks: u64, longest: u64, cells: u64) -> u64 {
        let work = chunks.saturating_mul(cells);
        // A segment costs a warm-up more than its own walk, or with a transition 1.4 times as much more.
        let worth = if self.exact { 3 } else { 2 };
        // As the sequences are: the longest one is the time of all, the others fill the device beside it.
        if work / longest.max(1) * worth > self.cells as u64 {
            return u64::MAX;
        }
        work.div_ceil(self.cells.max(1) as u64).max(self.least())
    }
}

/// The tile for these heads on this device.
pub fn tile(caps: &Caps, heads: &Heads) -> Tile {
    match caps.kind {
        Kind::Cpu => Tile {
            // 32 x 128 f32 of q or k is half of a 32 KB first-level cache; 64 needs 8 % more arithmetic and spills it.
            chunk: 32,
            // A cell converts q and k once for all of its columns; cut where there are too few heads for the threads.
            dv_tile: divisor(heads.v, if heads.hv >= 2 * caps.threads { 128 } else { 32 }),
            // Whole rows of the state are one stream of memory.
            dv_step: divisor(heads.v, if heads.hv >= 2 * caps.threads { 128 } else { 32 }),
            prepare_lanes: 1,
            scan_lanes: 1,
            step_lanes: 1,
            // Written by prepare and read by scan soon after: with the q and k of the same tokens, which take eight times as
            // much with 16 heads, it should stay in the last-level cache.
            scratch: 2 << 20,
            walk: u64::MAX,
            dv_grad: divisor(heads.v, if heads.hv >= 2 * caps.threads { 128 } else { 32 }),
            grad_lanes: 1,
            // What one row leaves for the next stays in the last-level cache.
            grad_scratch: 12 << 20,
            // The forward pass is walked twice but for what fits here: 2700 tokens of 16 heads of 128. With all else it stays
            // below 200 MB.
            grad_states: 128 << 20,
            // A cell keeps a thread busy by itself. Few heads of one sequence leave threads idle only where there are more of
            // them than the heads have tiles: one head on two cores takes 14 ms whole and 28 ms cut, and backward the same
            // either way. 32 chunks are 1024 tokens: what comes with a segment is a few percent of it.
            cut: Some(Cut { cells: caps.threads, least: 32, exact: true }),
        },
        // Threads are lanes of vector registers: two columns a thread, all in registers and the stack, no exchange.
        Kind::WebGpu if caps.class == Class::Software => Tile {
            // Four groups of four tokens: their sums are what the stack holds well.
            chunk: 16,
            dv_tile: divisor(heads.v, 128),
            dv_step: divisor(heads.v, 128),
            prepare_lanes: 16,
            scan_lanes: divisor(heads.v, 128) / 2,
            step_lanes: divisor(heads.v, 128) / 2,
            // A scan cell cannot be cut: with 16 heads this is some hundred tokens, tens of milliseconds.
            scratch: 1 << 20,
            // 16 tokens of 128 columns take about 0.1 ms of one core forward, five times that backward.
            walk: 128,
            dv_grad: divisor(heads.v, 128),
            grad_lanes: divisor(heads.v, 128) / 2,
            grad_scratch: 16 << 20,
            grad_states: 64 << 20,
            // Two heads on two cores take 38 ms whole and 86 ms cut, one head 32 and 51.
            cut: None,
        },
        Kind::Cuda => {
            // The columns that kernels are compiled for: four a thread in 16 groups of rows, whatever K is.
            let dv_tile = divisor(heads.v, 32);
            let lanes = 4 * dv_tile;
            // A step is a stream of memory: with rows of 64 columns it is as fast as a copy of the state in place, with rows of 32
            // it takes 3 to 4 % longer (H200, batches of 32 and 128, a program of its own).
            let (dv_step, step_lanes) = match heads.v.is_multiple_of(64) && heads.k <= 128 {
                true => (64, 128),
                false => (dv_tile, lanes),
            };
            Tile {
                chunk: 32,
                dv_tile,
                dv_step,
                prepare_lanes: 64,
                scan_lanes: lanes,
                step_lanes,
                // No watchdog bounds a launch, and pieces come one after the other: several sequences that could run at once do not
                // where they are cut into pieces. On an H200 four sequences of 8192 tokens, 16/32, took 0.85 ms by pieces of 7680
                // tokens, and 0.46 ms at once. What a piece leaves takes 8.7 KB a token there.
                scratch: (caps.max_buffer / 128).clamp(64 << 20, 1 << 30),
                walk: u64::MAX,
                dv_grad: dv_tile,
                grad_lanes: lanes,
                grad_scratch: 64 << 20,
                grad_states: 96 << 20,
                // A backward pass of 4096 tokens of 16 heads in segments takes more than 200 MB; for prefills see [`prefill_tile`].
                cut: None,
            }
        }
        Kind::WebGpu => {
            // A thread takes 4 columns, and 4 rows or a multiple: up to 16 row groups keep the registers of S below 64 for
            // every K.
            let row_groups = row_groups(heads.k, 16);
            // Slices of K and Q, and S or W, for 32 tokens and 32 columns: 12 KiB of WebGPU's default 16.
            let dv_tile = divisor(heads.v, 32);
            let lanes = dv_tile / 4 * row_groups;
            Tile {
                chunk: 32,
                dv_tile,
                dv_step: dv_tile,
                prepare_lanes: 64,
                scan_lanes: lanes,
                step_lanes: lanes,
                // One scan cell walks a whole piece and cannot be cut: this bounds how long that takes.
                scratch: match caps.class {
                    Class::Discrete => 64 << 20,
                    _ => 16 << 20,
                },
                // As many as 16 heads have; an H100 takes 27 us for each.
                walk: match caps.class {
                    Class::Discrete => 512,
                    _ => 128,
                },
                dv_grad: dv_tile,
                grad_lanes: lanes,
                // Cells of a piece should occupy the device; its longest, a scan's, bounds the time of a submission.
                grad_scratch: match caps.class {
                    Class::Discrete => 64 << 20,
                    _ => 16 << 20,
                },
                grad_states: 96 << 20,
                // Not yet measured on a GPU, so only where it is asked for. 128 cells of 16/32 take hardly longer than 64 of 16/16
                // on an H100 (31.2 and 27.8 ms): up to there more cells should cost next to nothing.
                cut: None,
            }
        }
    }
}

/// The tile of a backward pass over so many tokens.
pub fn grad_tile(caps: &Caps, heads: &Heads, tokens: u64) -> Tile {
    let tile = tile(caps, heads);
    if caps.kind != Kind::Cuda {
        return tile;
    }
    // No watchdog bounds a launch, and pieces come one after the other: of 32,768 tokens of 32 heads, 64 MiB are pieces of 680. So what 4096
    // tokens of 16 heads may take is given to each 4096 of 16, up to a sixteenth of a large device's memory in all. All at once takes 7 GB there;
    // neither the pieces nor this growth have been timed.
    let (work, unit, most) = (tokens.saturating_mul(heads.hv as u64), 4096 * 16, caps.max_buffer / 40);
    let grow = |bytes: u64| (bytes.saturating_mul(work) / unit).min(most).max(bytes);
    Tile { grad_scratch: grow(tile.grad_scratch), grad_states: grow(tile.grad_states), ..tile }
}

/// The tile of a prefill of numbers stored as `store`.
pub fn prefill_tile(caps: &Caps, heads: &Heads, store: Dtype) -> Tile {
    let tile = tile(caps, heads);
    let cut = match (caps.kind, store) {
        // On an H200, 4096 tokens: 16 heads (64 cells) take 1.90 ms whole, 1.09 in segments of 8 chunks, 1.34 of 16; 32 heads 1.94, and 1.80,
        // 1.72 and 2.33 in segments of 8, 16 and 32. What has more cells than those stays whole.
        (Kind::Cuda, Dtype::F32) => Some(Cut { cells: 767, least: 8, exact: true }),
        // The kernels for Hopper replace rows that are whole, and cut them themselves; whether it pays for the others has not been measured.
        (Kind::Cuda, _) => None,
        _ => tile.cut,
    };
    Tile { cut, ..tile }
}

/// The most groups that the rows of a `[K, V]` state fall into, `most` at most, each a multiple of 4 rows.
fn row_groups(k: u32, most: u32) -> u32 {
    (1..=most).rev().find(|groups| k % (4 * groups) == 0).unwrap_or(1)
}

/// The largest multiple of 16 that divides `n` and is at most `most`.
fn divisor(n: u32, most: u32) -> u32 {
    (1..=most / 16).rev().map(|i| i * 16).find(|d| n % d == 0).unwrap_or(16)
}

/// How [`crate::kernel::model::MATMUL`] is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatmulTile {
    /// Rows of x in a cell.
    pub tile_m: u32,
    /// Rows of w in a cell.
    pub tile_n: u32,
    /// Depth of one staged slice; 0: nothing is staged.
    pub tile_k: u32,
    /// Rows of x in a thread; divides `tile_m`.
    pub reg_m: u32,
    /// Rows of w in a thread; divides `tile_n`.
    pub reg_n: u32,
}

impl MatmulTile {
    /// Threads of a workgroup.
    pub const fn lanes(&self) -> u32 {
        self.tile_m / self.reg_m * (self.tile_n / self.reg_n)
    }
}

/// The tile of a product `[m, k] x [n, k]^T`.
pub fn matmul(caps: &Caps, m: u64, n: u64, k: u64, dtype: Dtype) -> MatmulTile {
    let _ = (k, dtype);
    match (caps.kind, caps.class) {
        // Registers and caches are the business of the CPU kernel itself; a cell is what one thread takes at a time.
        (Kind::Cpu, _) => MatmulTile { tile_m: 128, tile_n: 256, tile_k: 256, reg_m: 1, reg_n: 1 },
        // The one tile that kernels are compiled for.
        (Kind::Cuda, _) => MatmulTile { tile_m: 64, tile_n: 64, tile_k: 32, reg_m: 4, reg_n: 4 },
        // Threads become lanes of one vector register, and every load is taken lane by lane at some ten times the price of a
        // product: 8 x 8 sums a thread pay 16 loads for 64 products of vectors. A workgroup of more than one register
        // costs another pass over memory for all that its threads keep.
        (_, Class::Software) => {
            let rows = m.clamp(1, 8).next_power_of_two() as u32;
            MatmulTile { tile_m: rows, tile_n: 64, tile_k: 0, reg_m: rows, reg_n: 8 }
        }
        _ => {
            let cells = |tile: u64| m.div_ceil(tile) * n.div_ceil(tile);
            // Slices of 32 KiB, 8 x 8 sums a thread: 28 TFLOP/s on an H200, 26 with the next. Large tiles that are too few
            // to occupy a GPU lose more than they win: 8 against 19 at 1024 columns. 64 x 64 takes all of the 16 KiB that
            // WebGPU guarantees.
            let (tile, reg) = match () {
                _ if cells(128) >= 128 && caps.workgroup_memory >= 32 << 10 => (128, 8),
                _ if cells(64) >= 48 => (64, 4),
                _ => (32, 4),
            };
            MatmulTile { tile_m: tile, tile_n: tile, tile_k: 32, reg_m: reg, reg_n: reg }
        }
    }
}

/// How [`crate::kernel::model::MATVEC`] is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatvecTile {
    /// Rows of w in a cell.
    pub rows: u32,
    /// Threads of a workgroup.
    pub lanes: u32,
}

/// Rows of x up to which a product goes through [`crate::kernel::model::MATVEC`]; at most 8.
pub fn matvec_most(caps: &Caps) -> u64 {
    match (caps.kind, caps.class) {
        (Kind::Cpu, _) => 8,
        // The unstaged tile of MATMUL serves few rows as well.
        (_, Class::Software) => 0,
        // From here on a tile of MATMUL is filled well enough to beat reading x for each row of w.
        _ => 8,
    }
}

/// Whether the norm before a product of few rows and the activation after it run inside [`crate::kernel::model::MATVEC`].
pub fn fuse(caps: &Caps) -> bool {
    match (caps.kind, caps.class) {
        // A launch costs less than repeating the norm in every cell.
        (Kind::Cpu, _) | (_, Class::Software) => false,
        // A launch costs some microseconds, of which a small model has hundreds a token.
        _ => true,
    }
}

/// The tile of a product of a few rows of x with `[n, k]`.
pub fn matvec(caps: &Caps, n: u64, k: u64, dtype: Dtype) -> MatvecTile {
    let _ = n;
    match caps.kind {
        Kind::Cpu => MatvecTile { rows: 64, lanes: 1 },
        // Four rows share each load of x and one reduction of a vec4; many small workgroups hide the latency of memory. Each
        // thread takes about four loads of 16 bytes from each row.
        Kind::WebGpu | Kind::Cuda => {
            let loads = k * dtype.size() / 16;
            MatvecTile { rows: 4, lanes: (loads / 4).clamp(32, 128).next_power_of_two() as u32 }
        }
    }
}

/// How [`crate::kernel::model::ATTEND`] is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttendTile {
    /// Query rows of a key head in a cell.
    pub tile_q: u32,
    /// Keys of one staged slice.
    pub tile_k: u32,
    /// Threads of a workgroup.
    pub lanes: u32,
    /// Keys in a split, a multiple of `tile_k`.
    pub span: u32,
    /// Splits that fewer keys are cut into at most.
    pub most: u32,
}

/// The tile of attention for `rows` query rows (tokens times query heads per key head) of each of `kv_heads` key heads over
/// `keys` keys of a page, when each split of it costs `slot` bytes of scratch.
pub fn attend(caps: &Caps, rows: u64, kv_heads: u32, keys: u64, slot: u64) -> AttendTile {
    // 32 keys a slice: the scores of 32 query rows and the slices of q and k take 12 KiB together.
    let tile_k = 32;
    // One decoded token of a group of heads fills the smallest; a tile of 32 rows reads keys and values 32 times less often
    // than it uses them, at 32 sums of the output a thread for the largest head. 64 rows take 22 KiB.
    let large = caps.workgroup_memory >= 32 << 10 && caps.workgroup_threads >= 256;
    let (tile_q, lanes) = match (caps.kind, rows) {
        (Kind::Cpu, _) => (32, 1),
        (_, ..=4) => (4, 64),
        // What the kernel on the matrix units is made for: 16 rows and half of D a warp, as much as registers hold.
        (Kind::Cuda, _) => (64, 256),
        (_, ..=8) => (8, 64),
        (_, ..=16) => (16, 64),
        (_, 512..) if large && caps.class == Class::Discrete => (64, 256),
        _ => (32, 128),
    };
    // Cells in all when each key head is split this often: a large GPU wants some hundred, a CPU a few per thread.
    let wanted = match (caps.kind, caps.class) {
        // Registers leave a multiprocessor one such cell, and large GPUs have 108 to 148 multiprocessors: what is more comes after them. On an H200
        // 256 take 30 % longer with 512 tokens, as long with 2048.
        (Kind::Cuda, _) if tile_q == 64 => 128,
        (Kind::Cpu, _) | (_, Class::Software) => 4 * caps.threads.max(2) as u64,
        (_, Class::Discrete) => 512,
        _ => 128,
    };
    let cells = rows.div_ceil(tile_q as u64).max(1).saturating_mul(kv_heads as u64);
    // At most 64 splits and 16 MiB of scratch a page: all pages of a context together fit WebGPU's 128 MiB. No fewer than 64
    // keys, so that a split outweighs its merge.
    let splits = (wanted / cells.max(1)).min((16 << 20) / slot.max(1)).clamp(1, 64);
    let span = keys.div_ceil(splits).max(64).next_multiple_of(tile_k as u64);
    let most = splits.min(keys.div_ceil(64)) as u32;
    AttendTile { tile_q, tile_k, lanes, span: span.min(1 << 31) as u32, most }
}

/// Positions in a page of the cache of keys and values whose positions take `kv_row` bytes each.
pub fn kv_page(caps: &Caps, kv_row: u64) -> u64 {
    // 2 MiB of keys: little enough to grow a short conversation by, or to copy where two part; enough that 32k positions are
    // a few launches, as each page is as long as all before it.
    let most = caps.max_binding.min(caps.max_buffer) / kv_row.max(1);
    ((2 << 20) / kv_row.max(1)).next_power_of_two().clamp(256, 1 << 20).min(most.max(1))
}

/// Numbers that one cell of an elementwise kernel covers.
pub fn block(caps: &Caps) -> u32 {
    match caps.kind {
        // A task should outweigh its scheduling: some microseconds.
        Kind::Cpu => 16384,
        // 256 threads with 4 numbers each.
        Kind::WebGpu | Kind::Cuda => 1024,
    }
}

/// Tokens that one cell of the convolution covers.
pub fn conv_block(caps: &Caps) -> u32 {
    match caps.kind {
        Kind::Cpu => 128,
        // taps - 1 rows are read again at each border: 3 in 64 is 5 %.
        Kind::WebGpu | Kind::Cuda => 64,
    }
}

/// Threads that work on one row of `dim` numbers.
pub fn row_lanes(caps: &Caps, dim: u64) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        Kind::WebGpu | Kind::Cuda => {
            let most = caps.workgroup_threads.clamp(32, 256);
            (dim.min(256) as u32).next_power_of_two().clamp(32, most)
        }
    }
}

/// Threads that look for the largest number of a row.
pub fn argmax_lanes(caps: &Caps) -> u32 {
    match (caps.kind, caps.class) {
        (Kind::Cpu, _) => 1,
        (_, Class::Software) => 64,
        // One workgroup reads a row of some hundred thousand logits: the more threads, the more loads under way.
        _ => 1 << caps.workgroup_threads.clamp(64, 1024).ilog2(),
    }
}

/// Threads that work on one head of `dim` numbers.
pub fn head_lanes(caps: &Caps, dim: u32) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        Kind::WebGpu | Kind::Cuda => (dim / 2).next_power_of_two().clamp(32, 128),
    }
}

/// Threads of a `gdn_grad_chunk` workgroup.
pub fn grad_chunk_lanes(caps: &Caps) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        // 8 x 8 threads with a block of both `[C, C]` products each.
        Kind::WebGpu | Kind::Cuda => 64,
    }
}

/// Threads of a `gdn_grad_qk` workgroup for K columns and chunks of `chunk` tokens.
pub fn grad_qk_lanes(caps: &Caps, k: u32, chunk: u32) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        // Two columns a thread.
        _ if caps.class == Class::Software => k / 2,
        // Kernels are compiled for 2, 4 and 8 rows a thread.
        Kind::Cuda => k / 4 * (1 << (256 / (k / 4)).ilog2()).min(chunk / 2),
        // A thread has 4 columns of both `[C, K]` sums, and a share of the rows that is a power of two: 4 rows for 32 tokens
        // and K = 128.
        Kind::WebGpu => k / 4 * (1 << (256 / (k / 4)).ilog2()).min(chunk),
    }
}

/// Threads of a `gdn_carry` workgroup for `columns` columns of the state.
pub fn carry_lanes(caps: &Caps, heads: &Heads, columns: u32) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        // A thread takes 4 x 4 numbers of the state at a time.
        Kind::WebGpu | Kind::Cuda => (heads.k / 4 * (columns / 4)).clamp(16, 256),
    }
}

/// Threads of a `gdn_mix_step` workgroup.
pub fn mix_lanes(caps: &Caps, heads: &Heads) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        // Two threads a column of the state: each holds as much of it in registers as it may, so that all of it is on its way at once.
        Kind::Cuda => (2 * heads.v).next_power_of_two().clamp(32, 256),
        // One thread a column of the state.
        Kind::WebGpu => heads.v.next_power_of_two().clamp(32, 256),
    }
}

/// Cells that share out `blocks` blocks of tokens or heads, at least 1, where each leaves a row of `row` f32 to be added up.
/// The same for any number of threads: it decides the order of the sums.
pub fn grad_cells(caps: &Caps, blocks: u64, row: u64) -> u64 {
    let (most, scratch) = match caps.kind {
        // A few cells a thread on any processor, whose rows stay in the second-level cache.
        Kind::Cpu => (256, 1 << 20),
        // Some workgroups for each of a large GPU's hundred processors; the scratch of 128 blocks of the widest convolution.
        Kind::WebGpu | Kind::Cuda => (4096, 16 << 20),
    };
    blocks.min(most).min(scratch / row.saturating_mul(4).max(1)).max(1)
}

/// Tokens that one cell of the gradient of the gates covers at least.
pub fn gate_grad_block(caps: &Caps) -> u64 {
    match caps.kind {
        // 16 heads take about 40 us.
        Kind::Cpu => 64,
        // One thread a head walks them: few, so that there are many threads.
        Kind::WebGpu | Kind::Cuda => 16,
    }
}

/// Threads, one a value head, of a `gate_grad` workgroup.
pub fn gate_grad_lanes(caps: &Caps, hv: u32) -> u32 {
    match caps.kind {
        Kind::Cpu => 1,
        // The models have 16 to 64 heads.
        Kind::WebGpu | Kind::Cuda => hv.clamp(1, CELL_THREADS).next_power_of_two().max(32),
    }
}

/// Tokens x heads that one cell of the gradient of the gated norm covers at least.
pub fn norm_grad_block(caps: &Caps) -> u64 {
    let _ = caps;
    // Adding up a row for each 64 heads costs little beside the five that are read and written for each of them.
    64
}

/// Threads of a `gated_norm_grad` workgroup for heads of `dim` numbers.
pub fn norm_grad_lanes(caps: &Caps, dim: u32) -> u32 {
    match (caps.kind, caps.class) {
        // One or two vector registers: a barrier costs a switch of context for each more. A quarter of the time of 64.
        (Kind::WebGpu, Class::Software) => 16,
        _ => head_lanes(caps, dim),
    }
}

/// Columns of a cell and threads of a workgroup of [`crate::kernel::grad::SUM_ROWS`].
pub fn sum_rows(caps: &Caps) -> (u32, u32) {
    match (caps.kind, caps.class) {
        (Kind::Cpu, _) => (256, 1),
        // Sixteen columns are 64 bytes, what memory delivers at once. The gradient of a norm has some thousand rows of 128:
        // many threads a column.
        (_, Class::Software) => (16, 64),
        _ => (16, 256),
    }
}

/// Tokens of a prompt that a model computes at a time.
pub fn prefill_tokens(caps: &Caps) -> u64 {
    match (caps.kind, caps.class) {
        // Each piece reads all weights once: 512 tokens make that a small share of the arithmetic.
        (Kind::Cpu, _) => 512,
        // A software driver takes seconds for a piece; progress and cancellation come between pieces.
        (_, Class::Software) => 128,
        // 512 rows of x are 4 tiles of 128: with 1024 rows of w 32 blocks, where an H200 has 132 multiprocessors. 2048 rows make 128, and 4096
        // fill seven rounds of 132 with 3584 rows of w where 2048 leave a sixth of four empty; each piece also has some hundred launches. A
        // token takes about 150 KB of activations and scratch in the 0.8B model and 450 in the 27B one: 2 GB of 4096, a few percent of the device.
        (Kind::Cuda, _) => match caps.memory.unwrap_or(0) >> 30 {
            64.. => 4096,
            // What is sold as 16 or 24 GB says a little less.
            15.. => 2048,
            _ => 512,
        },
        _ => 512,
    }
}
