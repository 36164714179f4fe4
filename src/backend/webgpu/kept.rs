//! Compiled kernels on disk, in the driver's own form, so that the next start of a program need not compile them again.
//!
//! ```text
//! magic, sum of the adapter's and the driver's names and this crate's version (u128), sum of what follows (u128), the driver's bytes
//! ```
//!
//! What is in the file decides nothing but time: one that cannot be read, is damaged, or is of another driver or version is
//! ignored and replaced, and one that cannot be written is done without. The driver gets the very bytes that it gave.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use twox_hash::XxHash3_128;

use super::{fresh_id, lock};

/// The environment variable that names the folder; an empty one keeps nothing.
const VARIABLE: &str = "GATEDELTA_CACHE";

const MAGIC: &[u8; 8] = b"GDPIPE\x001";
const HEAD: usize = 8 + 16 + 16;

/// A file that is larger was not written here.
const MOST: u64 = 256 << 20;

/// While kernels are compiled the file is written so often, for the case that the program is killed.
const EVERY: Duration = Duration::from_secs(2);

/// The kernels of one device.
pub(super) struct Kept {
    pub(super) cache: wgpu::PipelineCache,
    file: PathBuf,
    /// Of adapter, driver and version.
    of: u128,
    /// Compiled since it was written last, and when that was.
    unsaved: Mutex<(usize, Instant)>,
}

impl Kept {
    /// What a folder holds for this device; none where the API knows no such thing, or where nothing is to be kept.
    pub(super) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, folder: Option<&Path>) -> Option<Kept> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let folder = match folder {
            Some(folder) => folder.to_path_buf(),
            None => match std::env::var_os(VARIABLE) {
                Some(folder) => folder.into(),
                None => dirs::cache_dir()?.join("gatedelta"),
            },
        };
        if folder.as_os_str().is_empty() {
            return None;
        }
        let file = folder.join(wgpu::util::pipeline_cache_key(info)?);
        let names = [&info.name, &info.driver, &info.driver_info, env!("CARGO_PKG_VERSION")].join("\0");
        let of = XxHash3_128::oneshot(names.as_bytes());
        let data = read(&file, of);
        log::debug!("{}: {} bytes of compiled kernels", file.display(), data.as_ref().map_or(0, Vec::len));
        // SAFETY: the bytes are those that `get_data` gave for this adapter and driver: the file says so, and their sum is right.
        let cache = unsafe {
            device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                label: Some("gatedelta"),
                data: data.as_deref(),
                fallback: true,
            })
        };
        Some(Kept { cache, file, of, unsaved: Mutex::new((0, Instant::now())) })
    }

    /// A kernel was compiled.
    pub(super) fn compiled(&self) {
        let mut unsaved = lock(&self.unsaved);
        unsaved.0 += 1;
        if unsaved.1.elapsed() >= EVERY {
            self.save();
            *unsaved = (0, Instant::now());
        }
    }

    fn save(&self) {
        let Some(data) = self.cache.get_data() else { return };
        match write(&self.file, self.of, &data) {
            Ok(()) => log::debug!("{}: {} bytes of compiled kernels kept", self.file.display(), data.len()),
            Err(why) => log::info!("compiled kernels are not kept in {}: {why}", self.file.display()),
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if lock(&self.unsaved).0 > 0 {
            self.save();
        }
    }
}

/// The driver's bytes, if the file is whole and of this device.
fn read(path: &Path, of: u128) -> Option<Vec<u8>> {
    let file = fs::File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    if !(HEAD as u64..=MOST).contains(&len) {
        return None;
    }
    let mut bytes = Vec::with_capacity(len as usize);
    (&file).take(MOST).read_to_end(&mut bytes).ok()?;
    let word = |at: usize| Some(u128::from_le_bytes(bytes.get(at..at + 16)?.try_into().ok()?));
    if !bytes.starts_with(MAGIC) || word(8)? != of || word(24)? != XxHash3_128::oneshot(&bytes[HEAD..]) {
        return None;
    }
    Some(bytes.split_off(HEAD))
}

/// Replaces the file in one step: whoever reads it sees the old one or the new one.
fn write(path: &Path, of: u128, data: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let partial = path.with_extension(format!("{}-{}.tmp", process::id(), fresh_id()));
    let written = (|| {
        let mut file = fs::File::create(&partial)?;
        for part in [&MAGIC[..], &of.to_le_bytes(), &XxHash3_128::oneshot(data).to_le_bytes(), data] {
            file.write_all(part)?;
        }
        drop(file);
        fs::rename(&partial, path)
    })();
    if written.is_err() {
        // What stands in the way of one file stands in the way of removing it, or there is nothing to remove.
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_whole_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/file");
        assert_eq!(read(&path, 7), None);
        write(&path, 7, b"kernels").unwrap();
        assert_eq!(read(&path, 7).unwrap(), b"kernels");
        assert_eq!(read(&path, 8), None, "another driver's");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(read(&path, 7), None, "{len}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            assert_eq!(read(&path, 7), None, "{at}");
        }
        fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
        assert_eq!(read(&path, 7), None);
        write(&path, 7, b"").unwrap();
        assert_eq!(read(&path, 7).unwrap(), b"");
        write(folder.path(), 7, b"").unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left of one that could not be written");
    }
}
