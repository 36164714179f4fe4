//! Finding devices and opening them.

use std::ffi::CStr;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::driver::{self, Fault};
use super::{Cuda, Shared, fresh_id, graph, hopper, image, launch};
use crate::error::{Error, Result};
use crate::tune::{Caps, Class, Kind};

/// The driver that the compiled kernels need: they are made by the compiler of CUDA 13.0.
const LEAST_VERSION: i32 = 13_000;
/// The oldest architecture that there are kernels for.
const LEAST_ARCH: u32 = 80;
/// A view given to a kernel starts at a multiple of this: whole segments of memory, and more than any vector load asks for.
const ALIGN: u64 = 256;

/// The CUDA devices of this machine.
#[derive(Debug)]
pub struct Devices {
    /// In the driver's order.
    pub found: Vec<Found>,
    /// Why there are none; empty if there are some.
    pub why_none: String,
}

/// How to open a device.
#[derive(Debug, Clone, Copy)]
pub struct OpenOptions {
    /// Use the kernels for Hopper in the place of a prefill's rows, where they apply: sm_90, q, k and v of 16 bits and heads of 64 or 128. On
    /// unless the environment variable `GATEDELTA_HOPPER` is 0.
    pub hopper: bool,
    /// The same of a backward pass: bf16 and a K of 128. On unless `GATEDELTA_HOPPER` is 0.
    pub hopper_grad: bool,
    /// Chunks of 64 tokens in the segments that they cut sequences into, 0 for never; none: as is best for the device. The
    /// environment variable `GATEDELTA_HOPPER_CUT`.
    pub hopper_cut: Option<u32>,
    /// Use the matrix product for Hopper where it applies: sm_90, bf16 weights. It splits x as the general kernel does and is as exact. On unless
    /// the environment variable `GATEDELTA_HOPPER_MATMUL` is 0.
    pub hopper_matmul: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        let hopper = std::env::var("GATEDELTA_HOPPER");
        OpenOptions {
            hopper: hopper.as_deref() != Ok("0"),
            hopper_grad: hopper.as_deref() != Ok("0"),
            hopper_cut: std::env::var("GATEDELTA_HOPPER_CUT").ok().and_then(|v| v.parse().ok()),
            hopper_matmul: std::env::var_os("GATEDELTA_HOPPER_MATMUL").is_none_or(|v| v != "0"),
        }
    }
}

/// A device that the driver lists.
#[derive(Debug, Clone)]
pub struct Found {
    /// What it is and can do.
    pub caps: Caps,
    /// Its architecture: 90 for sm_90.
    pub arch: u32,
    /// The driver's version: 13000 for CUDA 13.0.
    pub version: i32,
    multiprocessors: u32,
    ordinal: i32,
}

impl Cuda {
    /// Looks for devices. Works, and says why there is none, on a machine without NVIDIA software.
    pub fn enumerate() -> Devices {
        match enumerate() {
            Ok(found) => Devices { found, why_none: String::new() },
            Err(why_none) => Devices { found: Vec::new(), why_none },
        }
    }

    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a driver or an architecture that is too old, [`Error::Device`] if the driver refuses.
    pub fn open(found: &Found, options: &OpenOptions) -> Result<Cuda> {
        let unsupported = |what: String, why: String| Error::Unsupported { what, by: found.caps.name.clone(), why };
        if found.version < LEAST_VERSION {
            let why = format!(
                "its driver is for CUDA {}, the kernels need {}",
                version(found.version),
                version(LEAST_VERSION)
            );
            return Err(unsupported("opening the device".into(), why));
        }
        if found.arch < LEAST_ARCH {
            let why = format!("the kernels are compiled for sm_{LEAST_ARCH} and later");
            return Err(unsupported(format!("architecture sm_{}", found.arch), why));
        }
        let fault = Fault::new(found.caps.name.clone());
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        let mut stream = std::ptr::null_mut();
        // SAFETY: the driver is there, or the device would not have been found; it writes to local variables.
        unsafe {
            fault.result("opening the device", sys::cuDeviceGet(&mut device, found.ordinal))?;
            fault.result("opening the device", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            let made = fault.result("opening the device", sys::cuCtxSetCurrent(context)).and_then(|()| {
                let own = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                fault.result("creating a stream", sys::cuStreamCreate(&mut stream, own))
            });
            if let Err(error) = made {
                sys::cuDevicePrimaryCtxRelease_v2(device);
                return Err(error);
            }
        }
        let shared = Shared {
            device,
            context,
            stream,
            caps: found.caps.clone(),
            arch: found.arch,
            multiprocessors: found.multiprocessors,
            fault,
            images: image::Images::default(),
            variants: launch::Variants::default(),
            graphs: Mutex::new(graph::Graphs::default()),
            hopper: hopper::Hopper::new(
                options.hopper && found.arch == 90,
                options.hopper_grad && found.arch == 90,
                options.hopper_matmul && found.arch == 90,
                options.hopper_cut,
            ),
            staging: Mutex::default(),
            id: fresh_id(),
        };
        Ok(Cuda { shared: Arc::new(shared) })
    }
}

fn enumerate() -> std::result::Result<Vec<Found>, String> {
    if !driver::present() {
        return Err("there is no NVIDIA driver (libcuda.so.1, on Windows nvcuda.dll)".into());
    }
    let call = |what: &str, code: CUresult| match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(format!("{what}: {}", driver::explain(code))),
    };
    let (mut count, mut version) = (0, 0);
    // SAFETY: the driver is there; it writes to local variables.
    unsafe {
        call("the NVIDIA driver does not start", sys::cuInit(0))?;
        call("version of the driver", sys::cuDriverGetVersion(&mut version))?;
        call("number of devices", sys::cuDeviceGetCount(&mut count))?;
    }
    if count == 0 {
        return Err("the NVIDIA driver has no device".into());
    }
    (0..count).map(|ordinal| describe(ordinal, version)).collect()
}

/// A version as people write it.
fn version(v: i32) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

/// What a device is and can do.
fn describe(ordinal: i32, driver_version: i32) -> std::result::Result<Found, String> {
    let call = |what: &str, code: CUresult| match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(format!("{what} of device {ordinal}: {}", driver::explain(code))),
    };
    let (mut device, mut memory, mut text) = (0, 0usize, [0u8; 256]);
    // SAFETY: the driver writes to local variables, of the name at most as many bytes as it is told.
    unsafe {
        call("handle", sys::cuDeviceGet(&mut device, ordinal))?;
        call("name", sys::cuDeviceGetName(text.as_mut_ptr().cast(), text.len() as i32, device))?;
        call("memory", sys::cuDeviceTotalMem_v2(&mut memory, device))?;
    }
    let number = |what: &str, attribute: Attribute| {
        let mut value = 0;
        // SAFETY: as above.
        call(what, unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) }).map(|()| value.max(0) as u32)
    };
    let major = number("architecture", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = number("architecture", Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let integrated = number("kind", Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
    let name = CStr::from_bytes_until_nul(&text).map_or("NVIDIA GPU".into(), |s| s.to_string_lossy().into_owned());
    let arch = 10 * major + minor;
    let memory = memory as u64;
    let caps = Caps {
        // The same GPU is an adapter of wgpu under its own name.
        name: format!("cuda:{ordinal} {name}"),
        driver: format!("CUDA {}, sm_{arch}", version(driver_version)),
        kind: Kind::Cuda,
        class: if integrated { Class::Integrated } else { Class::Discrete },
        // Kernels count bytes in 64 bits; only the memory bounds what they see.
        max_binding: memory / ALIGN * ALIGN,
        max_buffer: memory / ALIGN * ALIGN,
        align: ALIGN,
        workgroup_memory: number("shared memory", Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK)?,
        workgroup_threads: number("threads of a block", Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        subgroup: Some((32, 32)),
        f16: true,
        threads: 0,
        memory: Some(memory),
    };
    let multiprocessors = number("multiprocessors", Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(Found { caps, arch, version: driver_version, multiprocessors, ordinal })
}
