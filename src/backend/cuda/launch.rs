//! Launches: arguments checked and packed as `cuda/rows.cuh` declares them, grids cut to what the device takes at once.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{self, CUfunction, CUresult};

use super::{Shared, choose, hopper, hopper_grad, hopper_matmul, lock};
use crate::backend::cut;
use crate::error::{Error, Result};
use crate::kernel::Access;
use crate::pass::{Launch, Pass};

/// Blocks along y and z of a grid, the driver's limit. Along x there could be more, which no launch of ours gains from.
const MOST_SIDE: u32 = 65535;

/// A compiled kernel.
pub(super) struct Variant {
    pub(super) function: CUfunction,
    pub(super) threads: u32,
    /// Bytes of shared memory beside those that the kernel declares.
    pub(super) shared_bytes: u32,
    /// See [`choose::Choice`].
    columns_first: bool,
}

impl Variant {
    /// A loaded kernel whose blocks share so many bytes; others of its variants share `most`. The device's context is current.
    pub(super) fn new(
        shared: &Shared,
        name: &str,
        function: CUfunction,
        threads: u32,
        shared_bytes: u32,
        most: u32,
    ) -> Result<Self> {
        if shared_bytes > most {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let code = unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) };
            shared.fault.result(&format!("shared memory of {name}"), code)?;
        }
        Ok(Variant { function, threads, shared_bytes, columns_first: false })
    }
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Variant {}
// SAFETY: as above.
unsafe impl Sync for Variant {}

/// The kernels of a row, by its consts.
type Row = HashMap<Vec<u32>, Arc<Variant>>;

/// The kernels that were asked for, by row and consts.
#[derive(Default)]
pub(super) struct Variants {
    rows: Mutex<HashMap<&'static str, Row>>,
}

impl Variants {
    /// The kernel of a launch; loads it first where that has not happened. The device's context is current.
    pub(super) fn get(&self, shared: &Shared, launch: &Launch) -> Result<Arc<Variant>> {
        let mut rows = lock(&self.rows);
        let row = rows.entry(launch.kernel.name).or_default();
        if let Some(found) = row.get(&launch.consts) {
            return Ok(found.clone());
        }
        let choice = choose(launch.kernel, &launch.consts)?;
        let device = &shared.caps.name;
        let function = shared.images.function(&shared.fault, device, choice.family, &choice.name)?;
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the driver writes to local variables.
        let code = unsafe { sys::cuFuncGetParamInfo(function, 0, &mut offset, &mut bytes) };
        shared.fault.result(&format!("parameters of {}", choice.name), code)?;
        if bytes != 8 * packed_words(launch) {
            let log =
                format!("it takes {bytes} bytes, the row {} has {}", launch.kernel.name, 8 * packed_words(launch));
            return Err(Error::Compile { kernel: choice.name, device: device.clone(), log });
        }
        let variant = Variant::new(shared, &choice.name, function, choice.threads, choice.shared, 0)?;
        let variant = Arc::new(Variant { columns_first: choice.columns_first, ..variant });
        row.insert(launch.consts.clone(), variant.clone());
        Ok(variant)
    }
}

/// A launch of the driver: everything in it is a number.
pub(super) struct Call {
    pub(super) kernel: &'static str,
    pub(super) variant: Arc<Variant>,
    pub(super) grid: [u32; 3],
    /// The kernel's parameters, one after the other: of a row its `Launch`.
    pub(super) launch: Vec<u64>,
    /// Word of `launch` where the second parameter starts, for a kernel that has one.
    pub(super) second: Option<usize>,
    /// Whether it may run at the same time as the call before it: then it waits for what that one waits for.
    pub(super) beside: bool,
}

impl Call {
    /// A call that waits for those before it.
    pub(super) fn new(
        kernel: &'static str,
        variant: Arc<Variant>,
        grid: [u32; 3],
        launch: Vec<u64>,
        second: Option<usize>,
    ) -> Self {
        Call { kernel, variant, grid, launch, second, beside: false }
    }

    /// Where the parameters are, as the driver wants to know it. Valid as long as the call is.
    pub(super) fn parameters(&self) -> [*mut c_void; 2] {
        let first = self.launch.as_ptr();
        let second = self.second.map_or(std::ptr::null(), |at| self.launch[at..].as_ptr());
        [first.cast_mut().cast(), second.cast_mut().cast()]
    }
}

/// Words of 64 bits that a row's `Launch` takes: an address and a length for each argument, then numbers of 32 bits.
fn packed_words(launch: &Launch) -> usize {
    2 * launch.kernel.args.len() + (3 + launch.kernel.consts.len() + launch.kernel.params.len()).div_ceil(2)
}

/// The driver's launches of a pass: checked and packed before anything is queued, so that a pass runs whole or not at all.
fn calls(shared: &Shared, pass: &Pass) -> Result<Vec<Call>> {
    let mut calls = Vec::with_capacity(pass.launches.len());
    // Launches that others stand in for.
    let mut done = 0;
    if shared.hopper.is_on() || shared.hopper.grad_is_on() {
        shared.hopper.begin(shared)?;
    }
    for (i, launch) in pass.launches.iter().enumerate() {
        if i < done {
            continue;
        }
        let kernel = launch.kernel;
        if launch.args.len() != kernel.args.len()
            || launch.params.len() != kernel.params.len()
            || launch.consts.len() != kernel.consts.len()
        {
            let count = |a: usize, c: usize, p: usize| format!("{a} arguments, {c} consts, {p} params");
            let found = count(launch.args.len(), launch.consts.len(), launch.params.len());
            let expected = count(kernel.args.len(), kernel.consts.len(), kernel.params.len());
            return Err(Error::argument(format!("launch of {}", kernel.name), found, expected));
        }
        let addresses = addresses(shared, launch)?;
        if shared.hopper.is_on()
            && let Some(special) = hopper::special(pass, i, shared.multiprocessors, shared.hopper.cut)
        {
            let after = self::addresses(shared, &pass.launches[i + 1])?;
            let own = &pass.launches[i..];
            if shared.hopper.calls(shared, &special, own, pass.exact, &addresses, &after, &mut calls)? {
                done = i + special.launches;
                continue;
            }
        }
        if shared.hopper.grad_is_on()
            && let Some(special) = hopper_grad::special_grad(pass, i, shared.multiprocessors, shared.hopper.cut)
        {
            let own = &pass.launches[i..i + special.launches];
            let addresses = own.iter().map(|launch| self::addresses(shared, launch)).collect::<Result<Vec<_>>>()?;
            shared.hopper.grad_calls(shared, &special, own, pass.exact, &addresses, &mut calls)?;
            done = i + special.launches;
            continue;
        }
        if shared.hopper.matmul
            && let Some(product) = hopper_matmul::product(launch, shared.multiprocessors)
        {
            calls.push(hopper_matmul::call(shared, &product, launch, &addresses)?);
            continue;
        }
        let variant = shared.variants.get(shared, launch)?;
        let in_order = |mut xyz: [u32; 3]| {
            if variant.columns_first {
                xyz.reverse();
            }
            xyz
        };
        for block in cut::blocks(in_order(launch.grid), MOST_SIDE, u64::MAX) {
            let base = in_order(block.base);
            let mut packed = Vec::with_capacity(packed_words(launch));
            packed.extend_from_slice(&addresses);
            packed.extend(launch.args.iter().map(|view| view.bytes));
            let numbers = || base.iter().chain(&launch.consts).chain(&launch.params).copied();
            let mut words = numbers();
            while let Some(low) = words.next() {
                packed.push(u64::from(low) | u64::from(words.next().unwrap_or(0)) << 32);
            }
            let (variant, grid) = (variant.clone(), block.size);
            calls.push(Call::new(kernel.name, variant, grid, packed, None));
        }
    }
    Ok(calls)
}

/// Where the arguments start, checked.
fn addresses(shared: &Shared, launch: &Launch) -> Result<Vec<u64>> {
    let what = |i: usize| format!("argument {} of {}", launch.kernel.args[i].name, launch.kernel.name);
    let mut addresses = Vec::with_capacity(launch.args.len());
    for (i, view) in launch.args.iter().enumerate() {
        let address = shared.address(launch.kernel.args[i].name, view)?;
        if view.offset % shared.caps.align != 0 {
            let found = format!("a view that starts at byte {}", view.offset);
            return Err(Error::argument(what(i), found, format!("a multiple of {}", shared.caps.align)));
        }
        addresses.push(address);
    }
    // Memory that is written may not be seen through another argument: the order would be open.
    for (i, arg) in launch.kernel.args.iter().enumerate() {
        let (view, written) = (&launch.args[i], arg.access != Access::Read);
        for (other_arg, other) in launch.kernel.args.iter().zip(&launch.args) {
            let reads = other_arg.access == Access::Read && other.bytes > 0;
            if written && view.bytes > 0 && reads && view.buffer.id() == other.buffer.id() {
                let found = format!("the memory that {} reads", other_arg.name);
                return Err(Error::argument(what(i), found, "a buffer of its own: it is written"));
            }
        }
    }
    Ok(addresses)
}

/// Queues a pass.
pub(super) fn run(shared: &Shared, pass: &Pass) -> Result<()> {
    shared.enter()?;
    let calls = calls(shared, pass)?;
    if lock(&shared.graphs).replay(shared, &calls)? {
        return Ok(());
    }
    calls.iter().try_for_each(|call| queue(shared, call))
}

fn queue(shared: &Shared, call: &Call) -> Result<()> {
    let [x, y, z] = call.grid;
    let mut args = call.parameters();
    // SAFETY: the kernel takes structs by value, of the sizes that were compared when it was loaded; the addresses in them were
    // checked, and what kernels reach from them is the contract of the row, which the builder of the pass keeps.
    let code = unsafe {
        let (function, threads, bytes) = (call.variant.function, call.variant.threads, call.variant.shared_bytes);
        let none = std::ptr::null_mut();
        sys::cuLaunchKernel(function, x, y, z, threads, 1, 1, bytes, shared.stream, args.as_mut_ptr(), none)
    };
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    shared.fault.result(&format!("launch of {}", call.kernel), code)
}
