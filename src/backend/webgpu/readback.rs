//! Bytes back to the host, through mapped staging buffers.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Shared, lock, submit};
use crate::backend::{Pending, Readback, View};
use crate::error::{Error, Result};

/// Bytes of one staging buffer at most; a longer read takes several.
const PART: u64 = 64 << 20;

type Mapped = Arc<Mutex<Option<Result<(), wgpu::BufferAsyncError>>>>;

struct Part {
    staging: wgpu::Buffer,
    mapped: Mapped,
}

struct Reading {
    shared: Arc<Shared>,
    parts: Vec<Part>,
    /// Bytes of the first word that lie before the view.
    skip: usize,
    bytes: usize,
}

/// Queues the copies and asks for the mappings.
pub(super) fn start(shared: &Arc<Shared>, from: &View) -> Result<Readback> {
    let memory = shared.memory("source of a read", from)?;
    if from.offset.checked_add(from.bytes).is_none_or(|end| end > from.buffer.bytes()) {
        let found = format!("{} bytes from {}", from.bytes, from.offset);
        return Err(Error::argument("source of a read", found, format!("inside {} bytes", from.buffer.bytes())));
    }
    let skip = if from.bytes == 0 { 0 } else { from.offset % 4 };
    let (begin, end) = (from.offset - skip, (from.offset + from.bytes).next_multiple_of(4));
    let part = PART.min(shared.limits.max_buffer_size / 16 * 16).max(16);
    let mut parts = Vec::new();
    let mut at = if from.bytes == 0 { end } else { begin };
    while at < end {
        let bytes = part.min(end - at);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = shared.create("staging of a read", bytes, usage)?;
        let mapped = Mapped::default();
        shared.guarded("read", || {
            let mut encoder = shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&memory.buffer, at, &staging, 0, bytes);
            shared.queue.submit([encoder.finish()]);
            let slot = mapped.clone();
            staging.map_async(wgpu::MapMode::Read, 0..bytes, move |result| *lock(&slot) = Some(result));
        })?;
        parts.push(Part { staging, mapped });
        at += bytes;
    }
    Ok(Readback::new(Reading { shared: shared.clone(), parts, skip: skip as usize, bytes: from.bytes as usize }))
}

impl Reading {
    /// All parts' bytes if they are mapped; None if one is still under way.
    fn collect(&self) -> Option<Result<Vec<u8>>> {
        for part in &self.parts {
            match lock(&part.mapped).as_ref()? {
                Ok(()) => {}
                Err(e) => return Some(Err(self.failure(e))),
            }
        }
        let mut bytes = Vec::with_capacity(self.skip + self.bytes + 4);
        for part in &self.parts {
            // The buffer may be padded; only what was asked for is mapped.
            let asked = (self.skip + self.bytes).next_multiple_of(4) - bytes.len();
            let here = part.staging.size().min(asked as u64);
            match part.staging.get_mapped_range(0..here) {
                Ok(view) => bytes.extend_from_slice(&view),
                Err(e) => return Some(Err(self.failure(&e))),
            }
        }
        bytes.drain(..self.skip);
        bytes.truncate(self.bytes);
        Some(Ok(bytes))
    }

    fn failure(&self, why: &dyn std::fmt::Display) -> Error {
        let device = self.shared.caps.name.clone();
        self.shared.fault.check().err().unwrap_or(Error::Device { device, why: format!("read: {why}") })
    }
}

impl Pending for Reading {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        self.shared.clone().caught(|| self.block())
    }

    fn poll(&mut self) -> Option<Result<Vec<u8>>> {
        let shared = self.shared.clone();
        shared.caught(|| self.look().transpose()).transpose()
    }
}

impl Reading {
    fn block(&self) -> Result<Vec<u8>> {
        if let Some(done) = self.collect() {
            return done;
        }
        let end = Instant::now() + submit::PATIENCE;
        loop {
            submit::drain(&self.shared)?;
            if let Some(done) = self.collect() {
                return done;
            }
            // Another thread that waits may have taken this mapping's callback along, and not have called it yet.
            if Instant::now() > end {
                return Err(self.failure(&"the device never mapped the bytes"));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn look(&self) -> Option<Result<Vec<u8>>> {
        if let Some(done) = self.collect() {
            return Some(done);
        }
        // A failure of the poll itself shows as a failure of the device.
        let _ = self.shared.device.poll(wgpu::PollType::Poll);
        match self.shared.fault.check() {
            Err(e) => Some(Err(e)),
            Ok(()) => self.collect(),
        }
    }
}
