//! The wgpu backend: Vulkan, Metal and DX12 from one set of WGSL files.
//!
//! - [`WebGpu::enumerate`] lists adapters, [`WebGpu::open`] opens one, [`WebGpu::from_device`] shares a host's device.
//! - A launch becomes one dispatch or several: grids larger than the device dispatches at once, and work that would keep
//!   the device longer than its watchdog likes, are cut by cells (`submit`).
//! - Compiled kernels are kept on disk where the API allows it (`kept`), for the next start.
//! - Everything the device reports late (validation, memory, loss) is kept and returned by the next call (`fault`). A panic
//!   of wgpu, which has no other way to tell of a driver that fails while it is waited for, is a lost device too.

mod bind;
mod exchange;
mod fault;
mod kept;
mod open;
mod pipeline;
mod readback;
mod submit;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use exchange::{Exchange, HostBuffer};
pub use open::{Adapters, Found, OpenOptions};
pub use wgpu::DeviceType;

use super::{Backend, Buffer, HostBytes, Readback, Timing, View};
use crate::error::{Error, Result};
use crate::pass::Pass;
use crate::source;
use crate::tune::Caps;

/// Bytes handed to the driver at once when memory is filled from the host: what the driver keeps beside the target.
const UPLOAD: usize = 16 << 20;

/// A device that wgpu drives. Clones share it.
#[derive(Clone)]
pub struct WebGpu {
    shared: Arc<Shared>,
}

struct Shared {
    device: wgpu::Device,
    queue: wgpu::Queue,
    caps: Caps,
    limits: wgpu::Limits,
    features: source::Features,
    timestamps: bool,
    /// Nobody else uses the device.
    own: bool,
    fault: Arc<fault::Fault>,
    /// Ids of memory that went away, for the caches that still refer to it.
    dropped: Arc<Mutex<Vec<u64>>>,
    pipelines: pipeline::Pipelines,
    binds: Mutex<bind::Binds>,
    queue_state: Mutex<submit::State>,
    /// Bytes that were written since the driver last gave back what it keeps beside their targets, or more.
    staged: AtomicUsize,
    /// Tells this device's memory from another's.
    id: u64,
}

/// Device memory behind a [`Buffer`].
struct Memory {
    buffer: wgpu::Buffer,
    id: u64,
    device: u64,
    dropped: Arc<Mutex<Vec<u64>>>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Cached bind groups hold the buffer: without this the memory would stay until they are evicted.
        self.buffer.destroy();
        lock(&self.dropped).push(self.id);
    }
}

/// A number no other device or memory has.
fn fresh_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Locks; a panic elsewhere does not make the content unusable here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The device memory behind a view.
    fn memory<'a>(&self, what: &str, view: &'a View) -> Result<&'a Memory> {
        match view.buffer.handle::<Memory>() {
            Some(memory) if memory.device == self.id => Ok(memory),
            _ => {
                let expected = format!("memory of {}", self.caps.name);
                Err(Error::argument(what, "memory of another device", expected))
            }
        }
    }

    /// Runs `f` and returns what the device had against it.
    fn scoped<T>(&self, f: impl FnOnce() -> T) -> (T, Option<wgpu::Error>) {
        let scopes = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation]
            .map(|filter| self.device.push_error_scope(filter));
        let value = f();
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            error = error.or(pollster::block_on(scope.pop()));
        }
        (value, error)
    }

    /// Runs `f`; what the device had against it becomes an error of ours.
    fn guarded<T>(&self, what: &str, f: impl FnOnce() -> T) -> Result<T> {
        let (value, error) = self.scoped(f);
        match error {
            None => Ok(value),
            Some(error) => Err(self.failure(what, 0, error)),
        }
    }

    /// What the device had against a call. Where it is lost, errors about things that it no longer has only follow from that.
    fn failure(&self, what: &str, needed: u64, error: wgpu::Error) -> Error {
        let _ = self.device.poll(wgpu::PollType::Poll);
        self.fault.gone().unwrap_or_else(|| self.fault.translate(what, needed, error))
    }

    /// Runs `f`; where wgpu or the driver panics in it the device is lost, and the process goes on.
    fn caught<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(self.fault.lose(format!("its driver failed: {}", words.trim())))
        })
    }

    /// Blocks until everything submitted so far, or `until`, is done.
    fn wait(&self, until: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let timeout = Some(submit::PATIENCE);
        match self.device.poll(wgpu::PollType::Wait { submission_index: until, timeout }) {
            Ok(_) => self.fault.check(),
            Err(e) => {
                self.fault.check()?;
                // What does not answer for so long does not come back.
                Err(self.fault.lose(format!("waiting for the device: {e}")))
            }
        }
    }

    fn create(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        // Kernels read whole words, tables whole rows of 16 bytes.
        let size = bytes.checked_next_multiple_of(16).unwrap_or(u64::MAX).max(16);
        let out_of_memory = |limit: String| Error::OutOfMemory {
            device: self.caps.name.clone(),
            what: what.into(),
            needed: bytes,
            limit,
        };
        if size > self.limits.max_buffer_size {
            return Err(out_of_memory(format!("a buffer holds at most {} bytes", self.limits.max_buffer_size)));
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        match self.scoped(|| self.device.create_buffer(&descriptor)) {
            (buffer, None) => Ok(buffer),
            (_, Some(wgpu::Error::OutOfMemory { .. })) => Err(out_of_memory("the driver has no more".into())),
            (_, Some(error)) => Err(self.failure(what, bytes, error)),
        }
    }
}

impl WebGpu {
    /// The wgpu device, for hosts that share it.
    pub fn device(&self) -> &wgpu::Device {
        &self.shared.device
    }

    /// The wgpu queue, for hosts that share it.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.shared.queue
    }

    /// The WGSL of every variant that `pass` needs, by kernel name: for people who look for a compiler's fault.
    ///
    /// # Errors
    /// As [`source::wgsl`].
    pub fn sources(&self, pass: &Pass) -> Result<Vec<(&'static str, String)>> {
        pass.launches
            .iter()
            .map(|l| Ok((l.kernel.name, source::wgsl(l.kernel, &l.consts, self.shared.features)?)))
            .collect()
    }
}

impl Backend for WebGpu {
    fn caps(&self) -> &Caps {
        &self.shared.caps
    }

    fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        let shared = &self.shared;
        shared.fault.check()?;
        shared.caught(|| {
            lock(&shared.binds).purge(&mut lock(&shared.dropped));
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
            let buffer = shared.create(what, bytes, usage)?;
            let memory = Memory { buffer, id: fresh_id(), device: shared.id, dropped: shared.dropped.clone() };
            Ok(Buffer::from_handle(memory, bytes))
        })
    }

    fn import(&self, what: &str, bytes: HostBytes) -> Result<Buffer> {
        let buffer = self.alloc(what, bytes.bytes().len() as u64)?;
        self.write(&buffer.view(), bytes.bytes())?;
        Ok(buffer)
    }

    fn write(&self, to: &View, bytes: &[u8]) -> Result<()> {
        self.shared.fault.check()?;
        self.shared.caught(|| self.upload(to, bytes))
    }

    fn read(&self, from: &View) -> Result<Readback> {
        self.shared.fault.check()?;
        self.shared.caught(|| readback::start(&self.shared, from))
    }

    fn load(&self, pass: &Pass) -> Result<()> {
        let shared = &self.shared;
        // What else is pending belongs to the calls that use the device: this one may come from a thread beside them.
        shared.fault.alive()?;
        shared.caught(|| {
            pass.launches.iter().try_for_each(|l| shared.pipelines.get(shared, l.kernel, &l.consts).map(drop))
        })
    }

    fn run(&self, pass: &Pass) -> Result<()> {
        self.shared.caught(|| submit::run(&self.shared, pass, None))
    }

    fn wait(&self) -> Result<()> {
        self.shared.fault.check()?;
        self.shared.caught(|| submit::drain(&self.shared))
    }

    fn time(&self, pass: &Pass) -> Result<Timing> {
        self.shared.caught(|| submit::time(&self.shared, pass))
    }

    fn abandon(&self) {
        let shared = &self.shared;
        shared.fault.lose("it was given up".into());
        if shared.own {
            // Whatever goes wrong here happens to a device that is gone.
            let _ = shared.caught(|| {
                shared.device.destroy();
                let _ = shared.device.poll(wgpu::PollType::Poll);
                Ok(())
            });
        }
    }
}

impl WebGpu {
    /// Writes through the driver's staging memory.
    fn upload(&self, to: &View, bytes: &[u8]) -> Result<()> {
        let shared = &self.shared;
        let memory = shared.memory("target of a write", to)?;
        if bytes.len() as u64 > to.bytes {
            return Err(Error::argument(
                "target of a write",
                format!("{} bytes", to.bytes),
                format!("{}", bytes.len()),
            ));
        }
        // The device copies words; a last half word is only free where nothing follows it.
        let tail = bytes.len() % 4;
        if to.offset % 4 != 0 || (tail != 0 && to.offset + bytes.len() as u64 != to.buffer.bytes()) {
            let found = format!("{} bytes at {}", bytes.len(), to.offset);
            return Err(Error::argument("target of a write", found, "multiples of 4, or up to the buffer's end"));
        }
        let (whole, rest) = bytes.split_at(bytes.len() - tail);
        for (i, part) in whole.chunks(UPLOAD).enumerate() {
            let staged = shared.staged.fetch_add(part.len(), Ordering::Relaxed);
            if staged > 0 && staged + part.len() > UPLOAD {
                // The staging memory of what came before is free again before more is taken.
                shared.staged.store(part.len(), Ordering::Relaxed);
                shared.guarded("upload", || shared.queue.submit([]))?;
                shared.wait(None)?;
            }
            let at = to.offset + (i * UPLOAD) as u64;
            shared.guarded("upload", || shared.queue.write_buffer(&memory.buffer, at, part))?;
        }
        if tail != 0 {
            let mut word = [0; 4];
            word[..tail].copy_from_slice(rest);
            let at = to.offset + whole.len() as u64;
            shared.guarded("upload", || shared.queue.write_buffer(&memory.buffer, at, &word))?;
        }
        shared.fault.check()
    }
}

impl std::fmt::Debug for WebGpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WebGpu({}, {})", self.shared.caps.name, self.shared.caps.driver)
    }
}
