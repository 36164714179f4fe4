//! A [`Pass`]: kernel launches as plain data, built once and run as often as wanted.

use crate::backend::View;
use crate::kernel::{Fields, Kernel};

/// One kernel, its numbers, its memory, and how many cells it runs over.
///
/// A *cell* is a workgroup on a GPU and a task on the CPU. Cells of one launch do not depend on each other, so a backend
/// may run them in any order and may cut a launch into several submissions. Launches of a pass run in order.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The row of the kernel table.
    pub kernel: &'static Kernel,
    /// Values that select the compiled variant, in the order of `kernel.consts`.
    pub consts: Vec<u32>,
    /// Values that the compiled kernel reads at run time, in the order of `kernel.params`; f32 as bits.
    pub params: Vec<u32>,
    /// Memory, in the order of `kernel.args`.
    pub args: Vec<View>,
    /// Cells along x, y, z. Any number may exceed what a device can dispatch at once: the backend cuts.
    pub grid: [u32; 3],
    /// Floating-point operations and bytes moved, added up: how the backend judges the time of a submission.
    pub work: u64,
}

impl Launch {
    /// Total cells.
    pub fn cells(&self) -> u64 {
        self.grid.iter().map(|&n| n as u64).product()
    }
}

/// Launches in order.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// The launches.
    pub launches: Vec<Launch>,
    /// No backend may leave out what a head has forgotten: [`crate::gdn::Options::exact`].
    pub exact: bool,
    /// Tokens of the longest sequence that a launch walks, by which a backend may judge whether to cut sequences; 0: nobody said.
    pub longest: u64,
}

impl Pass {
    /// An empty pass.
    pub fn new() -> Self {
        Pass::default()
    }

    /// Appends a launch; one over no cells is dropped.
    pub fn launch<C: Fields, P: Fields>(
        &mut self,
        kernel: &'static Kernel,
        consts: C,
        params: P,
        args: &[&View],
        grid: [u32; 3],
        work: u64,
    ) {
        debug_assert_eq!(C::FIELDS, kernel.consts, "consts of {}", kernel.name);
        debug_assert_eq!(P::FIELDS, kernel.params, "params of {}", kernel.name);
        debug_assert_eq!(args.len(), kernel.args.len(), "args of {}", kernel.name);
        if grid.contains(&0) {
            return;
        }
        self.launches.push(Launch {
            kernel,
            consts: bytemuck::cast_slice(std::slice::from_ref(&consts)).to_vec(),
            params: bytemuck::cast_slice(std::slice::from_ref(&params)).to_vec(),
            args: args.iter().map(|&v| v.clone()).collect(),
            grid,
            work,
        });
    }

    /// Appends the launches of another pass.
    pub fn extend(&mut self, other: Pass) {
        self.launches.extend(other.launches);
        self.exact |= other.exact;
        self.longest = self.longest.max(other.longest);
    }
}

/// A matrix of tokens by numbers inside a view: row t starts at number `off + t * stride`.
///
/// Offsets and strides count numbers of the stored type, so that several tensors can share the rows of one buffer.
#[derive(Debug, Clone)]
pub struct Rows {
    /// The memory.
    pub view: View,
    /// Number where row 0 starts.
    pub off: u64,
    /// Numbers from one row to the next.
    pub stride: u64,
}

impl Rows {
    /// Rows of `stride` numbers that fill the view from its start.
    pub fn packed(view: View, stride: u64) -> Self {
        Rows { view, off: 0, stride }
    }

    /// The same rows from `numbers` further right: another tensor in them.
    pub fn at(&self, numbers: u64) -> Self {
        Rows { view: self.view.clone(), off: self.off + numbers, stride: self.stride }
    }

    /// The numbers that `rows` rows of `width` numbers reach to, counted from the start of the view.
    pub fn reach(&self, rows: u64, width: u64) -> u64 {
        if rows == 0 { 0 } else { self.off + (rows - 1) * self.stride + width }
    }
}
