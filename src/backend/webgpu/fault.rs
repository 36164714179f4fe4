//! What the device reports late, kept for the next call.

use std::sync::Mutex;

use super::lock;
use crate::error::{Error, Result};

/// The first unreported failure of a device, and whether it is lost for good.
pub(super) struct Fault {
    device: String,
    pending: Mutex<Option<Error>>,
    lost: Mutex<Option<String>>,
}

impl Fault {
    pub(super) fn new(device: String) -> Self {
        Fault { device, pending: Mutex::new(None), lost: Mutex::new(None) }
    }

    /// wgpu's error as ours. `needed` bytes were asked for, where that is known.
    pub(super) fn translate(&self, what: &str, needed: u64, error: wgpu::Error) -> Error {
        match error {
            wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory {
                device: self.device.clone(),
                what: what.into(),
                needed,
                limit: "the driver has no more".into(),
            },
            wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
                Error::Device { device: self.device.clone(), why: format!("{what}: {description}") }
            }
        }
    }

    /// Keeps an error for the next call; the first one explains the rest.
    pub(super) fn keep(&self, error: Error) {
        lock(&self.pending).get_or_insert(error);
    }

    /// The device is gone; the error that says so, with the first reason that was given.
    pub(super) fn lose(&self, why: String) -> Error {
        let why = lock(&self.lost).get_or_insert(why).clone();
        Error::DeviceLost { device: self.device.clone(), why }
    }

    /// The loss of the device, if it is lost.
    pub(super) fn gone(&self) -> Option<Error> {
        let why = lock(&self.lost).clone()?;
        Some(Error::DeviceLost { device: self.device.clone(), why })
    }

    /// The loss of the device alone.
    pub(super) fn alive(&self) -> Result<()> {
        self.gone().map_or(Ok(()), Err)
    }

    /// What was kept, once; the loss of the device, for ever.
    pub(super) fn check(&self) -> Result<()> {
        self.alive()?;
        lock(&self.pending).take().map_or(Ok(()), Err)
    }
}
