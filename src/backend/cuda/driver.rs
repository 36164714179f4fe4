//! Calls of the driver, and what it reports in our words.

use std::ffi::CStr;
use std::sync::Mutex;

use cudarc::driver::sys::{self, CUresult};

use super::lock;
use crate::error::{Error, Result};

/// Whether there is a driver. Nothing else of `sys` may be called where there is none.
pub(super) fn present() -> bool {
    // SAFETY: loads a library and lets it go; drivers do nothing when they are loaded.
    unsafe { sys::is_culib_present() }
}

/// The driver's name of a result, with its explanation.
pub(super) fn explain(code: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver writes the address of a string that it keeps for ever, or leaves the null.
        unsafe {
            let known = get(code, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("error {}", code as u32));
    match text(sys::cuGetErrorString) {
        Some(why) => format!("{name}: {why}"),
        None => name,
    }
}

/// A device's failures: the name for errors, and the loss of the device, which is for ever.
pub(super) struct Fault {
    device: String,
    lost: Mutex<Option<String>>,
}

impl Fault {
    pub(super) fn new(device: String) -> Self {
        Fault { device, lost: Mutex::new(None) }
    }

    /// Fails if the device was lost before.
    pub(super) fn check(&self) -> Result<()> {
        match &*lock(&self.lost) {
            Some(why) => Err(Error::DeviceLost { device: self.device.clone(), why: why.clone() }),
            None => Ok(()),
        }
    }

    /// What a call returned, as an error of ours. `what` was being done.
    pub(super) fn result(&self, what: &str, code: CUresult) -> Result<()> {
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        let why = format!("{what}: {}", explain(code));
        if is_fatal(code) {
            let why = lock(&self.lost).get_or_insert(why).clone();
            return Err(Error::DeviceLost { device: self.device.clone(), why });
        }
        Err(Error::Device { device: self.device.clone(), why })
    }
}

/// Whether every later call in the same process will fail too.
fn is_fatal(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
    )
}
