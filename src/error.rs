//! What can go wrong, said with the numbers in it.

use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every error names the thing it is about, what was found and what was expected.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument that cannot be used: a shape, an offset table, a value out of range.
    #[error("{what}: found {found}, expected {expected}")]
    Argument {
        /// The argument, by its name in the API, with the index where that helps.
        what: String,
        /// What it held.
        found: String,
        /// What would have been accepted.
        expected: String,
    },
    /// A valid request that this device or build cannot serve.
    #[error("{what} is not supported by {by}: {why}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// The device or component that refused.
        by: String,
        /// The limit or the missing feature.
        why: String,
    },
    /// A kernel that the device's compiler refused.
    #[error("kernel {kernel} does not compile on {device}: {log}")]
    Compile {
        /// The kernel's name in [`crate::kernel::ALL`].
        kernel: String,
        /// The device.
        device: String,
        /// The compiler's own words.
        log: String,
    },
    /// Memory that is not there.
    #[error("{device}: {what} needs {needed} bytes; {limit}")]
    OutOfMemory {
        /// The device.
        device: String,
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        needed: u64,
        /// What stands against it, in words with the number: a limit or what is free.
        limit: String,
    },
    /// The device went away (driver reset, unplugged); everything on it is gone.
    #[error("{device} was lost: {why}")]
    DeviceLost {
        /// The device.
        device: String,
        /// The driver's reason.
        why: String,
    },
    /// Any other failure that the device or its driver reported.
    #[error("{device}: {why}")]
    Device {
        /// The device.
        device: String,
        /// The driver's words.
        why: String,
    },
    /// No device fits what was asked for.
    #[error("no device for {wanted:?}: {why}")]
    NoDevice {
        /// The name that was asked for.
        wanted: String,
        /// What there is instead, and why each was refused.
        why: String,
    },
    /// A file that cannot be read or does not hold what it should.
    #[error("{}: {why}", path.display())]
    Load {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file that cannot be written.
    #[error("{}: {why}", path.display())]
    Save {
        /// The file or directory.
        path: PathBuf,
        /// What stands against it.
        why: String,
    },
}

impl Error {
    /// True if the device or its driver failed: opened anew it may work again.
    pub fn is_loss(&self) -> bool {
        matches!(self, Error::DeviceLost { .. } | Error::Device { .. } | Error::Compile { .. })
    }

    /// True if there was not enough memory: with less in use, or elsewhere, it may work.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::OutOfMemory { .. })
    }

    /// An [`Error::Argument`] from anything printable.
    pub fn argument(what: impl Into<String>, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Self {
        Error::Argument { what: what.into(), found: found.to_string(), expected: expected.to_string() }
    }

    /// An [`Error::Save`].
    pub fn save(path: impl Into<PathBuf>, why: impl std::fmt::Display) -> Self {
        Error::Save { path: path.into(), why: why.to_string() }
    }

    /// An [`Error::Load`].
    pub fn load(path: impl Into<PathBuf>, why: impl std::fmt::Display) -> Self {
        Error::Load { path: path.into(), why: why.to_string() }
    }
}
