//! Copies between a host's own buffers and memory of the backend, for hosts that share their device.

use super::WebGpu;
use crate::backend::View;
use crate::error::{Error, Result};

/// Bytes of a buffer that the host of a shared device made, with the usages `COPY_SRC` and `COPY_DST`.
#[derive(Debug, Clone, Copy)]
pub struct HostBuffer<'a> {
    /// The buffer.
    pub buffer: &'a wgpu::Buffer,
    /// The first byte; a multiple of 4.
    pub offset: u64,
}

/// A copy that fills all of a view, or takes all of it; its length is a multiple of 4 bytes.
#[derive(Debug, Clone, Copy)]
pub enum Exchange<'a> {
    /// From the host's buffer into memory of the backend.
    In(HostBuffer<'a>, &'a View),
    /// From memory of the backend into the host's buffer.
    Out(&'a View, HostBuffer<'a>),
}

impl WebGpu {
    /// Queues the copies in one submission: they see everything submitted before, by the host too, and what is submitted
    /// later sees them.
    ///
    /// # Errors
    /// [`Error::Argument`] for a view of another backend or offsets and lengths that are no multiples of 4; what the device
    /// reports, a buffer that is too short among it.
    pub fn exchange(&self, copies: &[Exchange<'_>]) -> Result<()> {
        self.shared.fault.check()?;
        self.shared.caught(|| self.queue_copies(copies))
    }

    fn queue_copies(&self, copies: &[Exchange<'_>]) -> Result<()> {
        let shared = &self.shared;
        let mut ready = Vec::with_capacity(copies.len());
        for copy in copies {
            let (Exchange::In(host, view) | Exchange::Out(view, host)) = *copy;
            let memory = shared.memory("view of an exchange", view)?;
            if [host.offset, view.offset, view.bytes].iter().any(|n| n % 4 != 0) {
                let found = format!("{} bytes at {} and {}", view.bytes, view.offset, host.offset);
                return Err(Error::argument("exchange", found, "multiples of 4"));
            }
            ready.push((copy, host, view, memory));
        }
        shared.guarded("exchange", || {
            let mut encoder = shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            for (copy, host, view, memory) in ready {
                let (ours, theirs) = ((&memory.buffer, view.offset), (host.buffer, host.offset));
                let ((from, at), (to, into)) = match copy {
                    Exchange::In(..) => (theirs, ours),
                    Exchange::Out(..) => (ours, theirs),
                };
                encoder.copy_buffer_to_buffer(from, at, to, into, view.bytes);
            }
            shared.queue.submit([encoder.finish()]);
        })
    }
}
