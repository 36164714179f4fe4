//! The compiled kernels: one fat binary per file of `cuda/`, with the code of every architecture and PTX for later ones.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Mutex;

use cudarc::driver::sys::{self, CUfunction, CUmodule};

use super::driver::Fault;
use super::lock;
use crate::error::{Error, Result};

/// The fat binary of `cuda/<name>.cu`.
macro_rules! compiled {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../../cuda/compiled/", $name, ".fatbin")))),*]
    };
}

/// Fat binaries by the name of their source.
static FAMILIES: &[(&str, &[u8])] = compiled![
    "attention",
    "attention_mma",
    "conv",
    "gates",
    "gdn_cut",
    "gdn_grad_chunk",
    "gdn_grad_chunk_mma",
    "gdn_grad_qk",
    "gdn_grad_qk_mma",
    "gdn_grad_scan",
    "gdn_grad_scan_mma",
    "gdn_mix_step",
    "gdn_prepare",
    "gdn_prepare_mma",
    "gdn_scan",
    "gdn_scan_mma",
    "gdn_step",
    "hopper",
    "hopper_grad",
    "hopper_matmul",
    "matmul",
    "matmul_mma",
    "matvec",
    "norms",
    "small",
];

/// The names of the files that kernels are compiled from.
pub fn families() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// The fat binaries that were loaded: each when the first of its kernels is asked for.
#[derive(Default)]
pub(super) struct Images {
    modules: Mutex<HashMap<&'static str, Module>>,
}

struct Module(CUmodule);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Module {}

impl Images {
    /// The kernel `name` of `cuda/<family>.cu`. The device's context is current.
    pub(super) fn function(&self, fault: &Fault, device: &str, family: &str, name: &str) -> Result<CUfunction> {
        let compile = |log: String| Error::Compile { kernel: name.into(), device: device.into(), log };
        let Some(&(family, image)) = FAMILIES.iter().find(|(f, _)| *f == family) else {
            return Err(compile(format!("cuda/{family}.cu is not part of this build")));
        };
        let mut modules = lock(&self.modules);
        let module = match modules.get(family) {
            Some(module) => module.0,
            None => {
                let mut module = std::ptr::null_mut();
                // SAFETY: the image is a whole fat binary, whose header says how long it is.
                let code = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
                fault.result(&format!("loading cuda/{family}.cu"), code).map_err(|e| match e {
                    Error::Device { why, .. } => compile(why),
                    other => other,
                })?;
                modules.insert(family, Module(module));
                module
            }
        };
        let symbol = CString::new(name).map_err(|e| compile(e.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module stays loaded as long as the device is open; the name is a C string.
        let code = unsafe { sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr()) };
        fault.result(&format!("kernel {name} of cuda/{family}.cu"), code).map_err(|e| match e {
            Error::Device { why, .. } => compile(why),
            other => other,
        })?;
        Ok(function)
    }

    /// Unloads everything. The device's context is current, and nothing is queued.
    pub(super) fn free(&self) {
        for (_, module) in lock(&self.modules).drain() {
            // SAFETY: no kernel of the module will be launched again.
            unsafe { sys::cuModuleUnload(module.0) };
        }
    }
}
