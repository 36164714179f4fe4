//! Kernel row, consts and features to WGSL text.
//!
//! Variants come from constants and from the choice of files, never from text substitution. The text of a kernel is, in
//! this order:
//!
//! 1. one constant per const of the row, upper-cased: `const CHUNK = 32u;`. `LANES` is always there: the row's `lanes`, or
//!    [`tune::CELL_THREADS`] for a row without; `SUBGROUP` is the smallest subgroup's size, or 0;
//! 2. `struct Params`, generated from the row: `base: vec3<u32>` and the params of the row, at group 0, binding 0, as
//!    `params`;
//! 3. `shaders/common.wgsl`: the cell's index, conversion of stored numbers, activations;
//! 4. `shaders/reduce_shared.wgsl` or `shaders/reduce_subgroup.wgsl`: `struct Thread` and reductions over a workgroup,
//!    the same names in both;
//! 5. `shaders/<name>.wgsl`: the kernel; for software drivers `shaders/<name>_columns.wgsl` where there is one.
//!
//! # How a shader file is written
//!
//! - The entry point has the name of the row, takes one `thread: Thread` and declares `@workgroup_size` from constants.
//!   `thread.lane` is the index in the workgroup. A cell's index is `cell_of(thread.group)`, never the workgroup's own
//!   index: a launch may be cut into several dispatches.
//! - Argument i of the row is `@group(0) @binding(i + 1) var<storage, read | read_write> <its name>`. The file chooses the
//!   element type: `array<f32>` for f32, `array<vec4<u32>>` for tables, `array<u32>` for numbers of a stored type.
//! - Stored types: `const QK_TYPE` is one of `F32`, `F16`, `BF16`. Element i of `q` is
//!   `number(QK_TYPE, q[word_of(QK_TYPE, i)], i)`; two or four neighbours are cheaper through `unpack_pair`. Strides and
//!   offsets of 16-bit numbers are even (the builder of a pass refuses odd ones), so a row starts at a word, and a thread
//!   stores whole words through `pack_pair`. Branches on constants cost nothing: every driver folds them.
//! - Preconditions on constants are `const_assert`s.
//! - Workgroup memory is not zeroed before the kernel: it is written before it is read.
//! - Indices that come from tables are checked against `arrayLength` or the table's own bounds where that is cheap; reads
//!   outside a buffer give an undefined number and never another buffer's memory.
//! - Grids have a cell for every index the row names, no more; the last cell of a dimension may be partial.

use crate::error::{Error, Result};
use crate::kernel::{Field, Kernel, Scalar};
use crate::tune::{self, Caps, Class};

/// What a variant may use beyond WebGPU's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Features {
    /// Threads of the smallest subgroup where subgroup operations may be used, else 0.
    pub subgroup: u32,
    /// Threads are lanes of a processor's vector registers, as in software drivers: kernels that have a file
    /// `shaders/<name>_columns.wgsl` use it.
    pub columns: bool,
}

impl Features {
    /// What the kernels use on this device.
    pub fn of(caps: &Caps) -> Self {
        Features { subgroup: caps.subgroup.map_or(0, |(least, _)| least), columns: caps.class == Class::Software }
    }
}

const COMMON: &str = include_str!("../shaders/common.wgsl");
const REDUCE_SHARED: &str = include_str!("../shaders/reduce_shared.wgsl");
const REDUCE_SUBGROUP: &str = include_str!("../shaders/reduce_subgroup.wgsl");

/// The shader files, by name of the row.
static FILES: &[(&str, &str)] = &[
    // around the operator
    ("conv", include_str!("../shaders/conv.wgsl")),
    ("conv_tail", include_str!("../shaders/conv_tail.wgsl")),
    ("gate", include_str!("../shaders/gate.wgsl")),
    // the operator
    ("gdn_prepare", include_str!("../shaders/gdn_prepare.wgsl")),
    ("gdn_cut", include_str!("../shaders/gdn_cut.wgsl")),
    ("gdn_carry", include_str!("../shaders/gdn_carry.wgsl")),
    ("gdn_scan", include_str!("../shaders/gdn_scan.wgsl")),
    ("gdn_step", include_str!("../shaders/gdn_step.wgsl")),
    ("gated_norm", include_str!("../shaders/gated_norm.wgsl")),
    ("gdn_mix_step", include_str!("../shaders/gdn_mix_step.wgsl")),
    // its backward pass
    ("gdn_grad_scan", include_str!("../shaders/gdn_grad_scan.wgsl")),
    ("gdn_grad_chunk", include_str!("../shaders/gdn_grad_chunk.wgsl")),
    ("gdn_grad_qk", include_str!("../shaders/gdn_grad_qk.wgsl")),
    ("gdn_grad_gates", include_str!("../shaders/gdn_grad_gates.wgsl")),
    // gradients around the operator
    ("conv_grad", include_str!("../shaders/conv_grad.wgsl")),
    ("conv_tail_grad", include_str!("../shaders/conv_tail_grad.wgsl")),
    ("gate_grad", include_str!("../shaders/gate_grad.wgsl")),
    ("gated_norm_grad", include_str!("../shaders/gated_norm_grad.wgsl")),
    ("sum_rows", include_str!("../shaders/sum_rows.wgsl")),
    // the rest of the model
    ("embed", include_str!("../shaders/embed.wgsl")),
    ("rms_norm", include_str!("../shaders/rms_norm.wgsl")),
    ("matmul", include_str!("../shaders/matmul.wgsl")),
    ("matvec", include_str!("../shaders/matvec.wgsl")),
    ("attn_prepare", include_str!("../shaders/attn_prepare.wgsl")),
    ("attend", include_str!("../shaders/attend.wgsl")),
    ("attend_merge", include_str!("../shaders/attend_merge.wgsl")),
    ("swiglu", include_str!("../shaders/swiglu.wgsl")),
    ("argmax", include_str!("../shaders/argmax.wgsl")),
    ("copy", include_str!("../shaders/copy.wgsl")),
    ("fill", include_str!("../shaders/fill.wgsl")),
];

/// The files that replace those of the same row under [`Features::columns`].
static COLUMNS: &[(&str, &str)] = &[
    ("gdn_prepare", include_str!("../shaders/gdn_prepare_columns.wgsl")),
    ("gdn_scan", include_str!("../shaders/gdn_scan_columns.wgsl")),
    ("gdn_step", include_str!("../shaders/gdn_step_columns.wgsl")),
    ("gdn_grad_scan", include_str!("../shaders/gdn_grad_scan_columns.wgsl")),
    ("gdn_grad_qk", include_str!("../shaders/gdn_grad_qk_columns.wgsl")),
];

/// The WGSL text of a kernel for these consts (in the order of the row).
///
/// # Errors
/// [`Error::Unsupported`] if the row has no shader file; [`Error::Argument`] if the number of consts is wrong.
pub fn wgsl(kernel: &Kernel, consts: &[u32], features: Features) -> Result<String> {
    let columns = COLUMNS.iter().filter(|_| features.columns);
    let Some((_, file)) = columns.chain(FILES).find(|(name, _)| *name == kernel.name) else {
        return Err(Error::Unsupported {
            what: format!("kernel {}", kernel.name),
            by: "the WGSL backend".into(),
            why: format!("there is no shaders/{}.wgsl", kernel.name),
        });
    };
    if consts.len() != kernel.consts.len() {
        let what = format!("consts of {}", kernel.name);
        return Err(Error::argument(what, consts.len(), format!("{} numbers", kernel.consts.len())));
    }
    let reduce = if features.subgroup > 0 { REDUCE_SUBGROUP } else { REDUCE_SHARED };
    let parts = [&constants(kernel, consts, features), &params(kernel.params), COMMON, reduce, file];
    Ok(parts.join("\n"))
}

/// `const NAME = value;` for each const of the row.
fn constants(kernel: &Kernel, consts: &[u32], features: Features) -> String {
    let mut text = format!("const SUBGROUP = {}u;\n", features.subgroup);
    for (field, &bits) in kernel.consts.iter().zip(consts) {
        let name = field.name.to_uppercase();
        text += &match field.ty {
            Scalar::U32 => format!("const {name} = {bits}u;\n"),
            Scalar::F32 => format!("const {name} = bitcast<f32>({bits}u);\n"),
        };
    }
    if !kernel.consts.iter().any(|f| f.name == "lanes") {
        text += &format!("const LANES = {}u;\n", tune::CELL_THREADS);
    }
    text
}

/// The uniform that every dispatch brings: where its cells start in the grid, and the params of the row.
fn params(fields: &[Field]) -> String {
    let mut text = String::from("struct Params {\n    base: vec3<u32>,\n");
    for field in fields {
        let ty = match field.ty {
            Scalar::U32 => "u32",
            Scalar::F32 => "f32",
        };
        text += &format!("    {}: {ty},\n", field.name);
    }
    text + "}\n@group(0) @binding(0) var<uniform> params: Params;\n"
}
