//! The CUDA backend, for NVIDIA GPUs of architecture sm_80 and later.
//!
//! ```text
//! driver.rs   calls and failures       memory.rs   device memory, reads and writes
//! open.rs     devices                  launch.rs   launch -> checked arguments of a compiled kernel
//! choose.rs   row -> compiled kernel   graph.rs    a repeated pass as one CUDA graph
//! image.rs    the compiled kernels      hopper.rs, hopper_grad.rs, hopper_matmul.rs   kernels of sm_90a in the place of rows
//! ```
//!
//! - Neither a toolkit nor a compiler is needed on the user's machine: `cuda/*.cu` are compiled beforehand (`cuda/build.sh`) and
//!   the result is part of this crate. The driver is looked for when devices are listed; a program starts without it.
//! - Everything goes through one stream, so that calls are ordered. A pass that comes again is replayed as a graph, in which calls that need
//!   nothing of each other may run at once.
//! - A failure that the driver reports late comes back from the next call; one that it cannot recover from loses the device.

mod choose;
mod driver;
mod graph;
mod hopper;
mod hopper_grad;
mod hopper_matmul;
mod image;
mod launch;
mod memory;
mod open;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUevent, CUstream};

pub use choose::{Choice, choose};
pub use hopper::{Special, special};
pub use hopper_grad::{Half, SpecialGrad, special_grad};
pub use hopper_matmul::{Product, product};
pub use image::families;
pub use open::{Devices, Found, OpenOptions};

use super::{Backend, Buffer, HostBytes, Readback, Timing, View};
use crate::error::Result;
use crate::pass::Pass;
use crate::tune::Caps;

/// An NVIDIA GPU. Clones share it.
#[derive(Clone)]
pub struct Cuda {
    shared: Arc<Shared>,
}

struct Shared {
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    caps: Caps,
    arch: u32,
    multiprocessors: u32,
    fault: driver::Fault,
    images: image::Images,
    variants: launch::Variants,
    graphs: Mutex<graph::Graphs>,
    hopper: hopper::Hopper,
    /// Staging memory of reads, kept for the next one.
    staging: Mutex<Vec<memory::Staging>>,
    /// Tells this device's memory from another's.
    id: u64,
}

// SAFETY: handles of the driver may be used from any thread, and everything that changes is behind a lock.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A number no other device has.
fn fresh_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Locks; a panic elsewhere does not make the content unusable here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Makes the device this thread's, for the calls that follow.
    fn enter(&self) -> Result<()> {
        self.fault.check()?;
        // SAFETY: the context lives as long as this.
        self.fault.result("context", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Waits for everything queued.
    fn wait(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as this.
        self.fault.result("waiting for the device", unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: nothing refers to what is given back: memory and reads hold the device themselves.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            lock(&self.graphs).free();
            for staging in lock(&self.staging).drain(..) {
                staging.free();
            }
            self.hopper.free();
            self.images.free();
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl Backend for Cuda {
    fn caps(&self) -> &Caps {
        &self.shared.caps
    }

    fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        memory::alloc(&self.shared, what, bytes)
    }

    fn import(&self, what: &str, bytes: HostBytes) -> Result<Buffer> {
        let buffer = self.alloc(what, bytes.bytes().len() as u64)?;
        self.write(&buffer.view(), bytes.bytes())?;
        Ok(buffer)
    }

    fn write(&self, to: &View, bytes: &[u8]) -> Result<()> {
        memory::write(&self.shared, to, bytes)
    }

    fn read(&self, from: &View) -> Result<Readback> {
        memory::read(&self.shared, from)
    }

    fn load(&self, pass: &Pass) -> Result<()> {
        self.shared.enter()?;
        for launch in &pass.launches {
            self.shared.variants.get(&self.shared, launch)?;
        }
        Ok(())
    }

    fn run(&self, pass: &Pass) -> Result<()> {
        launch::run(&self.shared, pass)
    }

    fn wait(&self) -> Result<()> {
        self.shared.wait()
    }

    fn time(&self, pass: &Pass) -> Result<Timing> {
        let shared = &self.shared;
        self.load(pass)?;
        // Not waited for before: behind work that is still queued, no launch is part of the time.
        let events = [Event::new(shared)?, Event::new(shared)?];
        events[0].record()?;
        launch::run(shared, pass)?;
        events[1].record()?;
        shared.wait()?;
        let mut ms = 0.0;
        // SAFETY: both events were recorded, and have come.
        shared.fault.result("time", unsafe { sys::cuEventElapsedTime(&mut ms, events[0].event, events[1].event) })?;
        let total = Duration::from_secs_f64(f64::from(ms.max(0.0)) * 1e-3);
        // A launch is never cut for its time: these GPUs have no watchdog, or one that waits for seconds.
        Ok(Timing { total, longest_submission: total, device_clock: true })
    }
}

/// A time on the device's clock.
struct Event<'a> {
    shared: &'a Shared,
    event: CUevent,
}

impl<'a> Event<'a> {
    fn new(shared: &'a Shared) -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the driver writes to a local variable.
        shared.fault.result("event", unsafe { sys::cuEventCreate(&mut event, 0) })?;
        Ok(Event { shared, event })
    }

    fn record(&self) -> Result<()> {
        // SAFETY: the event and the stream are alive.
        self.shared.fault.result("event", unsafe { sys::cuEventRecord(self.event, self.shared.stream) })
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the event any more.
        unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({}, sm_{})", self.shared.caps.name, self.shared.arch)
    }
}
