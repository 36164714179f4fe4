//! Device memory, and bytes on their way from it.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUevent, CUresult};

use super::{Shared, lock};
use crate::backend::{Buffer, Pending, Readback, View};
use crate::error::{Error, Result};

/// A read of at most so many bytes goes through memory that the device writes by itself, while the caller goes on.
const MOST_STAGED: u64 = 16 << 20;
/// Staging buffers that are kept for the next read.
const MOST_KEPT: usize = 8;

/// Device memory behind a [`Buffer`].
pub(super) struct Memory {
    pub(super) address: CUdeviceptr,
    shared: Arc<Shared>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What is queued may still use it. A failure shows at the next call.
        // SAFETY: the memory came from `cuMemAlloc`, and nothing refers to it any more.
        unsafe {
            sys::cuCtxSetCurrent(self.shared.context);
            sys::cuStreamSynchronize(self.shared.stream);
            sys::cuMemFree_v2(self.address);
        }
    }
}

/// Memory of `bytes` bytes, padded so that kernels may read whole rows of 16.
pub(super) fn alloc(shared: &Arc<Shared>, what: &str, bytes: u64) -> Result<Buffer> {
    shared.enter()?;
    let out_of_memory = |limit: String| Error::OutOfMemory {
        device: shared.caps.name.clone(),
        what: what.into(),
        needed: bytes,
        limit,
    };
    if bytes > shared.caps.max_buffer {
        return Err(out_of_memory(format!("the device has {}", shared.caps.max_buffer)));
    }
    let mut address = 0;
    // SAFETY: the driver writes to a local variable.
    let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.next_multiple_of(16).max(16) as usize) };
    if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        let (mut free, mut total) = (0, 0);
        // SAFETY: as above.
        let known = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) } == CUresult::CUDA_SUCCESS;
        return Err(out_of_memory(match known {
            true => format!("{free} of {total} are free"),
            false => "the driver has no more".into(),
        }));
    }
    shared.fault.result(what, code)?;
    Ok(Buffer::from_handle(Memory { address, shared: shared.clone() }, bytes))
}

impl Shared {
    /// The address that a view starts at, if it is of this device and inside its buffer.
    pub(super) fn address(&self, what: &str, view: &View) -> Result<CUdeviceptr> {
        let memory = match view.buffer.handle::<Memory>() {
            Some(memory) if memory.shared.id == self.id => memory,
            _ => {
                let expected = format!("memory of {}", self.caps.name);
                return Err(Error::argument(what, "memory of another device", expected));
            }
        };
        if view.offset.checked_add(view.bytes).is_none_or(|end| end > view.buffer.bytes()) {
            let found = format!("{} bytes from {}", view.bytes, view.offset);
            return Err(Error::argument(what, found, format!("inside {} bytes", view.buffer.bytes())));
        }
        Ok(memory.address + view.offset)
    }
}

/// Copies `bytes` to the start of `to`, after what is queued.
pub(super) fn write(shared: &Shared, to: &View, bytes: &[u8]) -> Result<()> {
    shared.enter()?;
    let address = shared.address("target of a write", to)?;
    if bytes.len() as u64 > to.bytes {
        return Err(Error::argument("target of a write", format!("{} bytes", to.bytes), bytes.len()));
    }
    if bytes.is_empty() {
        return Ok(());
    }
    // SAFETY: both ranges are as long as the copy; the driver has read pageable memory when the call returns.
    let code = unsafe { sys::cuMemcpyHtoDAsync_v2(address, bytes.as_ptr().cast(), bytes.len(), shared.stream) };
    shared.fault.result("upload", code)
}

/// Host memory that the device writes to.
pub(super) struct Staging {
    host: *mut u8,
    bytes: usize,
    event: CUevent,
}

// SAFETY: the memory is owned by this value alone.
unsafe impl Send for Staging {}

impl Staging {
    /// One that was kept, or a new one.
    fn take(shared: &Shared, bytes: usize) -> Result<Self> {
        let mut kept = lock(&shared.staging);
        if let Some(i) = kept.iter().position(|s| s.bytes >= bytes) {
            return Ok(kept.swap_remove(i));
        }
        drop(kept);
        let bytes = bytes.next_power_of_two().max(4096);
        let (mut host, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the driver writes to local variables.
        unsafe {
            shared.fault.result("memory for a read", sys::cuMemHostAlloc(&mut host, bytes, 0))?;
            let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            if let Err(error) = shared.fault.result("event of a read", sys::cuEventCreate(&mut event, untimed)) {
                sys::cuMemFreeHost(host);
                return Err(error);
            }
        }
        Ok(Staging { host: host.cast(), bytes, event })
    }

    /// Gives it back to the driver. The device's context is current.
    pub(super) fn free(self) {
        // SAFETY: both came from the driver, and the device no longer writes: reads end before their staging is let go.
        unsafe {
            sys::cuEventDestroy_v2(self.event);
            sys::cuMemFreeHost(self.host.cast());
        }
    }
}

struct Reading {
    shared: Arc<Shared>,
    /// None once the bytes were taken.
    staging: Option<Staging>,
    bytes: usize,
}

impl Reading {
    fn take(&mut self) -> Result<Vec<u8>> {
        let Some(staging) = self.staging.take() else {
            return Err(Error::argument("read", "one whose bytes were taken", "one that is under way"));
        };
        // SAFETY: the device has written `bytes` bytes: the event after the copy has come.
        let bytes = unsafe { std::slice::from_raw_parts(staging.host, self.bytes) }.to_vec();
        self.keep(staging);
        Ok(bytes)
    }

    fn keep(&self, staging: Staging) {
        let mut kept = lock(&self.shared.staging);
        if kept.len() < MOST_KEPT {
            kept.push(staging);
        } else {
            staging.free();
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let Some(staging) = self.staging.take() else { return };
        // SAFETY: the event is this read's. Nothing may use the memory before the device is done with it.
        unsafe {
            sys::cuCtxSetCurrent(self.shared.context);
            sys::cuEventSynchronize(staging.event);
        }
        self.keep(staging);
    }
}

impl Pending for Reading {
    fn wait(mut self: Box<Self>) -> Result<Vec<u8>> {
        self.shared.enter()?;
        if let Some(staging) = &self.staging {
            // SAFETY: the event is this read's.
            self.shared.fault.result("read", unsafe { sys::cuEventSynchronize(staging.event) })?;
        }
        self.take()
    }

    fn poll(&mut self) -> Option<Result<Vec<u8>>> {
        if let Err(error) = self.shared.enter() {
            return Some(Err(error));
        }
        if let Some(staging) = &self.staging {
            // SAFETY: the event is this read's.
            match unsafe { sys::cuEventQuery(staging.event) } {
                CUresult::CUDA_ERROR_NOT_READY => return None,
                code => {
                    if let Err(error) = self.shared.fault.result("read", code) {
                        return Some(Err(error));
                    }
                }
            }
        }
        Some(self.take())
    }
}

/// Bytes that are there already.
struct Done(Option<Vec<u8>>);

impl Pending for Done {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(self.0.unwrap_or_default())
    }

    fn poll(&mut self) -> Option<Result<Vec<u8>>> {
        Some(Ok(self.0.take().unwrap_or_default()))
    }
}

/// Starts reading `from`, after what is queued.
pub(super) fn read(shared: &Arc<Shared>, from: &View) -> Result<Readback> {
    shared.enter()?;
    let address = shared.address("source of a read", from)?;
    let bytes = from.bytes as usize;
    if bytes == 0 {
        return Ok(Readback::new(Done(Some(Vec::new()))));
    }
    if from.bytes > MOST_STAGED {
        let mut all = vec![0u8; bytes];
        // SAFETY: both ranges are as long as the copy, which is over when the stream is.
        unsafe {
            let code = sys::cuMemcpyDtoHAsync_v2(all.as_mut_ptr().cast(), address, bytes, shared.stream);
            let waited = sys::cuStreamSynchronize(shared.stream);
            shared.fault.result("read", code)?;
            shared.fault.result("read", waited)?;
        }
        return Ok(Readback::new(Done(Some(all))));
    }
    let staging = Staging::take(shared, bytes)?;
    // SAFETY: the staging memory is as long as the copy and is kept until the event has come.
    let started = unsafe {
        let code = sys::cuMemcpyDtoHAsync_v2(staging.host.cast(), address, bytes, shared.stream);
        shared
            .fault
            .result("read", code)
            .and_then(|()| shared.fault.result("event of a read", sys::cuEventRecord(staging.event, shared.stream)))
    };
    let reading = Reading { shared: shared.clone(), staging: Some(staging), bytes };
    started.map(|()| Readback::new(reading))
}
