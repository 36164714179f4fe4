//! The kernel table: one row per kernel with its arguments, its numbers and their order.
//!
//! A row is the contract between the code that builds a [`crate::pass::Pass`], the CPU function, the WGSL file
//! `shaders/<name>.wgsl` and the CUDA file `cuda/<name>.cu` of the same name. `tests/contract.rs` reflects every shader
//! against its row.

pub mod gdn;
pub mod gdn_cut;
pub mod gdn_grad;
pub mod grad;
pub mod model;

/// The kernels of the operator and of the model, in pipeline order.
pub static ALL: &[&Kernel] = &[
    // around the operator
    &gdn::CONV,
    &gdn::CONV_TAIL,
    &gdn::GATE,
    // the operator
    &gdn::PREPARE,
    &gdn_cut::CUT,
    &gdn_cut::CARRY,
    &gdn::SCAN,
    &gdn::STEP,
    &gdn::GATED_NORM,
    &gdn::MIX_STEP,
    // its backward pass
    &gdn_grad::GRAD_SCAN,
    &gdn_grad::GRAD_CHUNK,
    &gdn_grad::GRAD_QK,
    &gdn_grad::GRAD_GATES,
    // gradients around the operator
    &grad::CONV_GRAD,
    &grad::CONV_TAIL_GRAD,
    &grad::GATE_GRAD,
    &grad::GATED_NORM_GRAD,
    &grad::SUM_ROWS,
    // the rest of the model
    &model::EMBED,
    &model::RMS_NORM,
    &model::MATMUL,
    &model::MATVEC,
    &model::ATTN_PREPARE,
    &model::ATTEND,
    &model::ATTEND_MERGE,
    &model::SWIGLU,
    &model::ARGMAX,
    &model::COPY,
    &model::FILL,
];

/// A row of the table.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Name of the row, the shader file, its entry point and the CPU function.
    pub name: &'static str,
    /// Storage arguments in binding order; at most 8, WebGPU's default limit.
    pub args: &'static [Arg],
    /// Numbers that select a compiled variant.
    pub consts: &'static [Field],
    /// Numbers read at run time.
    pub params: &'static [Field],
}

/// A storage argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arg {
    /// Its name in the shader.
    pub name: &'static str,
    /// What the kernel does with it.
    pub access: Access,
}

/// What a kernel does with an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only reads.
    Read,
    /// Writes (shaders declare `read_write`: WebGPU has no write-only storage buffer).
    Write,
    /// Reads and writes.
    Update,
}

/// A read-only argument.
pub const fn read(name: &'static str) -> Arg {
    Arg { name, access: Access::Read }
}

/// An argument that is only written.
pub const fn write(name: &'static str) -> Arg {
    Arg { name, access: Access::Write }
}

/// An argument that is read and written.
pub const fn update(name: &'static str) -> Arg {
    Arg { name, access: Access::Update }
}

/// One number of a kernel's consts or params.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Its name in the shader (consts are upper-cased there).
    pub name: &'static str,
    /// Its type.
    pub ty: Scalar,
}

/// The type of a [`Field`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// 32-bit unsigned.
    U32,
    /// 32-bit float.
    F32,
}

/// A struct of u32 and f32 fields whose names and order the kernel table knows.
pub trait Fields: bytemuck::Pod {
    /// Names and types in memory order.
    const FIELDS: &'static [Field];
}

/// Declares a struct of 32-bit numbers and its [`Fields`]: the one place where a kernel's numbers are listed.
macro_rules! fields {
    ($(#[$m:meta])* $name:ident { $($(#[$fm:meta])* $f:ident: $t:ident),* $(,)? }) => {
        $(#[$m])*
        #[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub struct $name { $($(#[$fm])* pub $f: $t),* }
        impl $crate::kernel::Fields for $name {
            const FIELDS: &'static [$crate::kernel::Field] =
                &[$($crate::kernel::Field { name: stringify!($f), ty: fields!(@ $t) }),*];
        }
    };
    (@ u32) => { $crate::kernel::Scalar::U32 };
    (@ f32) => { $crate::kernel::Scalar::F32 };
}
pub(crate) use fields;
