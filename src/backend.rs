//! The seam: a [`Backend`] holds bytes and runs a [`Pass`]. Operators never see which one it is.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "webgpu"))]
mod cut;
#[doc(hidden)]
pub mod faulty;
#[cfg(feature = "webgpu")]
pub mod webgpu;

use std::any::Any;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::pass::Pass;
use crate::tune::Caps;

/// A place that can hold bytes and run kernels.
///
/// Calls are ordered: a `read` sees every `run` and `write` before it. Errors that a device reports late come back from the
/// next call.
pub trait Backend: Send + Sync {
    /// What the device is and what it can do.
    fn caps(&self) -> &Caps;

    /// Memory of `bytes` bytes with undefined content; `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the limit that it exceeds.
    fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer>;

    /// Read-only memory with the content of `bytes`. A device that can read host memory keeps the reference and copies
    /// nothing; others copy.
    ///
    /// # Errors
    /// As [`Backend::alloc`].
    fn import(&self, what: &str, bytes: HostBytes) -> Result<Buffer>;

    /// Copies `bytes` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::Argument`] if `to` is shorter than `bytes` or belongs to another backend.
    fn write(&self, to: &View, bytes: &[u8]) -> Result<()>;

    /// Starts reading `from`.
    ///
    /// # Errors
    /// [`Error::Argument`] if the view belongs to another backend.
    fn read(&self, from: &View) -> Result<Readback>;

    /// Compiles all that the pass needs, so that [`Backend::run`] does not have to.
    ///
    /// # Errors
    /// [`Error::Compile`], [`Error::Unsupported`].
    fn load(&self, pass: &Pass) -> Result<()>;

    /// Runs the pass: queues it and returns as soon as the backend may take more work.
    ///
    /// # Errors
    /// Whatever the device reports, then or since the last call.
    fn run(&self, pass: &Pass) -> Result<()>;

    /// Waits for everything queued.
    ///
    /// # Errors
    /// Whatever the device reports.
    fn wait(&self) -> Result<()>;

    /// Runs the pass and says how long it took, on the device's own clock where it has one.
    ///
    /// # Errors
    /// As [`Backend::run`].
    fn time(&self, pass: &Pass) -> Result<Timing>;

    /// Gives the device up: nothing more will be asked of it, and its memory may go before the last handle to it does. A device
    /// that fails would otherwise hold the memory that its successor needs.
    fn abandon(&self) {}
}

/// What [`Backend::time`] measured.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Time of the whole pass.
    pub total: Duration,
    /// Longest single submission, where the backend submits in pieces.
    pub longest_submission: Duration,
    /// True if the device's clock measured it, false for the host's.
    pub device_clock: bool,
}

/// Host memory that lives as long as somebody refers to it: a mapped file, a vector.
#[derive(Clone)]
pub struct HostBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: std::ops::Range<usize>,
}

impl HostBytes {
    /// All of `owner`.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Self {
        let range = 0..(*owner).as_ref().len();
        HostBytes { owner, range }
    }

    /// A part of these bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] if the range leaves them.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Result<Self> {
        let len = self.range.len();
        if range.start > range.end || range.end > len {
            let found = format!("{}..{}", range.start, range.end);
            return Err(Error::argument("range of host bytes", found, format!("inside 0..{len}")));
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        Ok(HostBytes { owner: self.owner.clone(), range })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for HostBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostBytes({} bytes)", self.range.len())
    }
}

/// Memory of a backend. Clones refer to the same memory, which goes when the last one does.
#[derive(Clone)]
pub struct Buffer {
    inner: Arc<dyn Any + Send + Sync>,
    bytes: u64,
}

impl Buffer {
    /// Wraps a backend's own handle.
    pub fn from_handle<T: Any + Send + Sync>(handle: T, bytes: u64) -> Self {
        Buffer { inner: Arc::new(handle), bytes }
    }

    /// The backend's own handle, if it is of that backend.
    pub fn handle<T: Any + Send + Sync>(&self) -> Option<&T> {
        self.inner.downcast_ref()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Distinguishes memory: equal for clones only, as long as one of them lives.
    pub fn id(&self) -> usize {
        Arc::as_ptr(&self.inner) as *const u8 as usize
    }

    /// Tells whether the memory still exists, and does not keep it.
    pub fn watch(&self) -> Watch {
        Watch { inner: Arc::downgrade(&self.inner), bytes: self.bytes }
    }

    /// All of it.
    pub fn view(&self) -> View {
        View { buffer: self.clone(), offset: 0, bytes: self.bytes }
    }

    /// `bytes` bytes from `offset`.
    ///
    /// # Errors
    /// [`Error::Argument`] if that leaves the buffer.
    pub fn slice(&self, offset: u64, bytes: u64) -> Result<View> {
        self.view().slice(offset, bytes)
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({:x}, {} bytes)", self.id(), self.bytes)
    }
}

/// Knows of a [`Buffer`] without keeping it: for accounts of what a device holds.
#[derive(Clone)]
pub struct Watch {
    inner: Weak<dyn Any + Send + Sync>,
    bytes: u64,
}

impl Watch {
    /// Size in bytes of the memory; 0 once it has gone.
    pub fn bytes(&self) -> u64 {
        if self.inner.strong_count() > 0 { self.bytes } else { 0 }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watch({} bytes)", self.bytes())
    }
}

/// A part of a [`Buffer`]. What a kernel gets starts at a multiple of [`Caps::align`].
#[derive(Debug, Clone)]
pub struct View {
    /// The memory.
    pub buffer: Buffer,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl View {
    /// `bytes` bytes from `offset` of this view.
    ///
    /// # Errors
    /// [`Error::Argument`] if that leaves the view.
    pub fn slice(&self, offset: u64, bytes: u64) -> Result<View> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let found = format!("{bytes} bytes from {offset}");
            return Err(Error::argument("slice of device memory", found, format!("inside {} bytes", self.bytes)));
        }
        Ok(View { buffer: self.buffer.clone(), offset: self.offset + offset, bytes })
    }
}

/// Bytes on their way from a device.
pub struct Readback(Box<dyn Pending>);

/// What a backend gives for a read that may still be under way.
pub trait Pending: Send {
    /// Blocks until the bytes are there.
    ///
    /// # Errors
    /// Whatever the device reports.
    fn wait(self: Box<Self>) -> Result<Vec<u8>>;

    /// The bytes if they have arrived; never blocks.
    fn poll(&mut self) -> Option<Result<Vec<u8>>>;
}

impl Readback {
    /// Wraps a backend's pending read.
    pub fn new(pending: impl Pending + 'static) -> Self {
        Readback(Box::new(pending))
    }

    /// Blocks until the bytes are there.
    ///
    /// # Errors
    /// Whatever the device reports.
    pub fn wait(self) -> Result<Vec<u8>> {
        self.0.wait()
    }

    /// Blocks until the numbers are there.
    ///
    /// # Errors
    /// Whatever the device reports.
    pub fn wait_as<T: bytemuck::Pod>(self) -> Result<Vec<T>> {
        Ok(bytemuck::allocation::pod_collect_to_vec(&self.wait()?))
    }

    /// The bytes if they have arrived; never blocks. For places that must not block, such as a browser.
    pub fn poll(&mut self) -> Option<Result<Vec<u8>>> {
        self.0.poll()
    }
}
