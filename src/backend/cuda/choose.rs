//! Which compiled kernel runs a row: its file, its name and its threads.
//!
//! A kernel is compiled for a type of stored numbers and for a few sizes that its registers depend on; every other const is a
//! number that it reads. K is padded: a kernel for 128 serves every K up to it, with rows of zeros.

use crate::error::{Error, Result};
use crate::kernel::{Kernel, Scalar};
use crate::shape::Dtype;
use crate::tune;

/// A compiled kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Choice {
    /// The file of `cuda/` that it is in, without extension.
    pub family: &'static str,
    /// Its name there.
    pub name: String,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory that its launch asks for, beside those that it declares.
    pub shared: u32,
    /// Whether its grid is the row's from behind: blocks start along x first, and a row's columns come last.
    pub columns_first: bool,
}

/// Tokens of a chunk: the only number of them that the chunked kernels are compiled for.
const CHUNK: u32 = 32;

/// The consts of a row, by name.
struct Consts<'a> {
    kernel: &'static Kernel,
    values: &'a [u32],
}

impl Consts<'_> {
    fn get(&self, name: &str) -> Result<u32> {
        let at = self.kernel.consts.iter().position(|f| f.name == name && f.ty == Scalar::U32);
        at.map(|i| self.values[i]).ok_or_else(|| self.refuse(name, "none", "a const of the row"))
    }

    fn refuse(&self, name: &str, found: impl std::fmt::Display, why: &str) -> Error {
        Error::Unsupported {
            what: format!("kernel {} with {name} = {found}", self.kernel.name),
            by: "the CUDA backend".into(),
            why: format!("it needs {why}"),
        }
    }

    /// The const, which must be one of these.
    fn one_of(&self, name: &str, allowed: &[u32]) -> Result<u32> {
        let value = self.get(name)?;
        match allowed.contains(&value) {
            true => Ok(value),
            false => Err(self.refuse(name, value, &format!("one of {allowed:?}"))),
        }
    }

    /// The type of stored numbers, as kernels' names say it.
    fn dtype(&self, name: &str) -> Result<Dtype> {
        let code = self.get(name)?;
        Dtype::from_code(code).ok_or_else(|| self.refuse(name, code, "the code of f32, f16 or bf16"))
    }

    /// The type of q, k and v, which must be the same.
    fn one_dtype(&self) -> Result<Dtype> {
        let (qk, v) = (self.dtype("qk_type")?, self.dtype("v_type")?);
        if qk != v {
            return Err(self.refuse("v_type", v, &format!("{qk}, the type of q and k")));
        }
        Ok(qk)
    }

    /// The type and size of heads that a kernel on the matrix units is compiled for, if there is one: 16 bits, and 64 or 128.
    /// Every architecture that the backend opens (sm_80 and later) has what these kernels use.
    fn matrix_units(&self, dtype: Dtype) -> Result<Option<(Dtype, u32)>> {
        let dk = self.get("dk")?;
        Ok((dtype != Dtype::F32 && [64, 128].contains(&dk)).then_some((dtype, dk)))
    }

    /// The least of `sizes` that the const fits in; it must be a multiple of `unit`.
    fn padded(&self, name: &str, unit: u32, sizes: &[u32]) -> Result<u32> {
        let value = self.get(name)?;
        let fits = |&&size: &&u32| value > 0 && value <= size && value % unit == 0;
        let most = sizes.last().copied().unwrap_or(0);
        let why = || format!("a multiple of {unit} up to {most}");
        sizes.iter().find(fits).copied().ok_or_else(|| self.refuse(name, value, &why()))
    }

    /// Threads that the row says, a multiple of a warp.
    fn lanes(&self, most: u32) -> Result<u32> {
        let lanes = self.get("lanes")?;
        if lanes == 0 || lanes % 32 != 0 || lanes > most {
            return Err(self.refuse("lanes", lanes, &format!("a multiple of 32 up to {most}")));
        }
        Ok(lanes)
    }

    /// Threads that the kernel is compiled for, which the row must say too.
    fn exactly(&self, threads: u32) -> Result<u32> {
        self.one_of("lanes", &[threads])
    }
}

/// The kernel for a row and its consts.
///
/// # Errors
/// [`Error::Unsupported`] for consts that no kernel is compiled for, [`Error::Argument`] if their number is wrong.
pub fn choose(kernel: &'static Kernel, consts: &[u32]) -> Result<Choice> {
    if consts.len() != kernel.consts.len() {
        let expected = format!("{} numbers", kernel.consts.len());
        return Err(Error::argument(format!("consts of {}", kernel.name), consts.len(), expected));
    }
    let c = Consts { kernel, values: consts };
    let name = kernel.name;
    match name {
        // around the operator
        "conv" | "conv_grad" | "conv_tail_grad" => {
            let taps = c.one_of("taps", &[2, 3, 4, 5, 6, 7, 8])?;
            choice("conv", format!("{name}_{}", if taps == 4 { "four" } else { "any" }), tune::CELL_THREADS)
        }
        "conv_tail" => choice("conv", name.into(), tune::CELL_THREADS),
        "gate" => choice("gates", name.into(), 256),
        "gate_grad" => choice("gates", name.into(), c.lanes(256)?),
        "gated_norm" | "gated_norm_grad" => {
            c.padded("dv", 16, &[256])?;
            choice("norms", name.into(), c.lanes(256)?)
        }
        "rms_norm" => choice("norms", name.into(), c.lanes(256)?),
        // the operator
        "gdn_prepare" => {
            c.one_of("chunk", &[CHUNK])?;
            c.padded("dk", 16, &[256])?;
            let (dtype, threads) = (c.dtype("qk_type")?, c.exactly(64)?);
            match c.matrix_units(dtype)? {
                Some((dtype, dk)) => choice("gdn_prepare_mma", format!("gdn_prepare_mma_{dtype}_k{dk}"), threads),
                None => choice("gdn_prepare", format!("{name}_{dtype}"), threads),
            }
        }
        "gdn_scan" => scan(&c, "gdn_scan_mma"),
        "gdn_grad_scan" => scan(&c, "gdn_grad_scan_mma"),
        "gdn_cut" => choice("gdn_cut", name.into(), tune::CELL_THREADS),
        "gdn_carry" => {
            c.padded("dk", 16, &[256])?;
            c.padded("dv_tile", 16, &[256])?;
            let lanes = c.get("lanes")?;
            match (1..=256).contains(&lanes) {
                true => choice("gdn_cut", name.into(), lanes),
                false => Err(c.refuse("lanes", lanes, "1 to 256")),
            }
        }
        "gdn_step" => Ok(Choice { columns_first: true, ..step(&c)? }),
        "gdn_mix_step" => {
            c.padded("dk", 16, &[256])?;
            c.padded("dv", 16, &[256])?;
            let (quads, lanes) = (c.get("dv")? / 4, c.lanes(256)?);
            match quads <= lanes {
                true => choice("gdn_mix_step", name.into(), lanes),
                false => Err(c.refuse("lanes", lanes, "a quarter of dv")),
            }
        }
        "gdn_grad_chunk" => {
            c.one_of("chunk", &[CHUNK])?;
            c.padded("dk", 16, &[256])?;
            c.padded("dv", 16, &[256])?;
            let threads = c.exactly(64)?;
            match c.dtype("v_type")? {
                Dtype::F32 => choice("gdn_grad_chunk", format!("{name}_f32"), threads),
                dtype => choice("gdn_grad_chunk_mma", format!("gdn_grad_chunk_mma_{dtype}"), threads),
            }
        }
        "gdn_grad_gates" => {
            c.one_of("chunk", &[CHUNK])?;
            choice("gdn_grad_chunk", name.into(), tune::CELL_THREADS)
        }
        "gdn_grad_qk" => grad_qk(&c),
        // the rest of the model
        "matmul" => matmul(&c),
        "matvec" => {
            c.one_of("rows", &[4])?;
            let dtype = c.dtype("w_type")?;
            let batch = match (dtype, c.one_of("batch", &[1, 2, 4, 8])?) {
                (Dtype::F32, 2 | 4) => 8,
                (_, batch) => batch,
            };
            let glu = if c.one_of("glu", &[0, 1])? == 1 { "_glu" } else { "" };
            choice("matvec", format!("{name}_{dtype}_b{batch}{glu}"), c.lanes(128)?)
        }
        "attn_prepare" => {
            c.padded("dim", 16, &[256])?;
            choice("attention", format!("{name}_{}", c.dtype("kv_type")?), c.lanes(256)?)
        }
        "attend" => {
            let (dim, dtype) = (c.padded("dim", 16, &[64, 256])?, c.dtype("kv_type")?);
            c.one_of("tile_k", &[32])?;
            if c.one_of("tile_q", &[4, 64])? == 4 {
                return choice("attention", format!("{name}_{dtype}_q4_d{dim}"), c.exactly(64)?);
            }
            // What attention_mma.cu calls Shared: 32 rows of K and of V in 16-bit parts with a factor each, scores of 8 warps, 20
            // bytes for each of 64 query rows. At most 81 KB, where every architecture has 99.
            let (kind, parts) = if dtype == Dtype::F32 { ("f32", 2) } else { ("half", 1) };
            let shared = 2 * 32 * (2 * dim * parts + 4) + 8 * 2048 + 20 * 64;
            Ok(Choice { shared, ..choice("attention_mma", format!("attend_mma_{kind}_d{dim}"), c.exactly(256)?)? })
        }
        "attend_merge" => choice("attention", name.into(), c.lanes(256)?),
        "copy" | "fill" | "swiglu" => choice("small", name.into(), 256),
        "embed" => choice("small", format!("embed_{}", c.dtype("w_type")?), 256),
        "argmax" => choice("small", name.into(), c.lanes(1024)?),
        "sum_rows" => {
            let (columns, lanes) = (c.get("columns")?, c.lanes(256)?);
            if columns == 0 || lanes % columns != 0 {
                return Err(c.refuse("columns", columns, "a divisor of lanes"));
            }
            choice("small", name.into(), lanes)
        }
        _ => Err(Error::Unsupported {
            what: format!("kernel {name}"),
            by: "the CUDA backend".into(),
            why: "no file of cuda/ has it".into(),
        }),
    }
}

fn choice(family: &'static str, name: String, threads: u32) -> Result<Choice> {
    Ok(Choice { family, name, threads, shared: 0, columns_first: false })
}

/// A scan: on the matrix units, in the family `mma`, or with a slice of the state.
fn scan(c: &Consts, mma: &'static str) -> Result<Choice> {
    c.one_of("chunk", &[CHUNK])?;
    let dtype = c.one_dtype()?;
    match c.matrix_units(dtype)? {
        // 4 warps with 16 of 32 columns and half of K each.
        Some((dtype, dk)) if c.get("dv_tile")? == 32 => choice(mma, format!("{mma}_{dtype}_k{dk}"), c.exactly(128)?),
        _ => state(c, if dtype == Dtype::F32 { &[64, 128, 256] } else { &[128, 256] }),
    }
}

/// A kernel that holds a slice of the state in registers: 16 groups of rows, four columns a thread; compiled for K up to `sizes`.
fn state(c: &Consts, sizes: &[u32]) -> Result<Choice> {
    let name = c.kernel.name;
    let (dk, columns) = (c.padded("dk", 16, sizes)?, c.one_of("dv_tile", &[16, 32])?);
    let dk = if columns == 16 { 256 } else { dk };
    choice(name, format!("{name}_{}_k{dk}_v{columns}", c.one_dtype()?), c.exactly(4 * columns)?)
}

/// Decode: 64 columns of a K up to 128, 8 groups of rows; else as a scan of the largest K.
fn step(c: &Consts) -> Result<Choice> {
    match c.one_of("dv_tile", &[16, 32, 64])? {
        64 => {
            let (dk, dtype) = (c.padded("dk", 16, &[64, 128])?, c.one_dtype()?);
            choice("gdn_step", format!("gdn_step_{dtype}_k{dk}_v64"), c.exactly(128)?)
        }
        _ => state(c, &[256]),
    }
}

/// A thread of the gradients of q and k has four columns and a share of the rows that it is compiled for.
fn grad_qk(c: &Consts) -> Result<Choice> {
    let (name, chunk) = (c.kernel.name, c.one_of("chunk", &[CHUNK])?);
    c.padded("dk", 16, &[256])?;
    c.padded("dv", 16, &[256])?;
    let dtype = c.dtype("qk_type")?;
    if let Some((dtype, dk)) = c.matrix_units(dtype)? {
        return choice("gdn_grad_qk_mma", format!("gdn_grad_qk_mma_{dtype}_k{dk}"), c.exactly(256)?);
    }
    let (quads, lanes) = (c.get("dk")? / 4, c.get("lanes")?);
    let rows = chunk * quads / lanes.max(1);
    // Up to 32 quads the kernel has room for 4 rows a thread, beyond for 8.
    let most = if quads <= 32 { 4 } else { 8 };
    if lanes > 256 || lanes < chunk || lanes * rows != chunk * quads || ![2, 4, 8].contains(&rows) || rows > most {
        return Err(c.refuse("lanes", lanes, "K / 4 times 16, 8 or 4, 32 to 256"));
    }
    choice("gdn_grad_qk", format!("{name}_{dtype}_r{rows}"), lanes)
}

/// 16-bit weights go to the matrix units where their rows are whole words of 16 bytes.
fn matmul(c: &Consts) -> Result<Choice> {
    let dtype = c.dtype("w_type")?;
    c.one_of("tile_m", &[64])?;
    c.one_of("tile_n", &[64])?;
    match dtype != Dtype::F32 && c.one_of("wide", &[0, 1])? == 1 {
        true => choice("matmul_mma", format!("matmul_mma_{dtype}"), 128),
        false => choice("matmul", format!("matmul_{dtype}"), 256),
    }
}
