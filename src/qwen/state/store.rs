//! Snapshots on disk: they survive the process, and nothing that happens to it or to the disk makes a wrong one of them.
//!
//! ```text
//! <store>/v1/lock          held while a process has the store open: a second one may look, and write nothing
//! <store>/v1/index.redb    which snapshots there are, when they were used, what is pinned
//! <store>/v1/index.sum     the checksum of the index while nobody has it open
//! <store>/v1/<id>.rows     the record of a snapshot; its keys and values from its parent's end on
//! <store>/v1/<id>.state    its states and tails
//! ```
//!
//! A snapshot that goes on from a stored one holds the keys and values of its own tokens only; the others are those of its
//! parent. Both files are written and made to last before the index names them, so that a crash or a full disk at any moment
//! loses the snapshot that was being written and no other. A snapshot is read whole or not at all: every length is computed
//! from the model and compared, every byte is under a checksum, and one that fails is forgotten together with what rests on
//! it. The index is made again from the files if it is lost or damaged.
//!
//! One process writes. Others may have a view ([`Store::view`]), which reads the files alone: those never change under their names,
//! so that a writer beside it takes snapshots away from it or gives it more, and never half of one.
//!
//! Snapshots are those of one model: of its shape, its weights, its type of cache, and this version of the format. One that was
//! taken on another device is found too, after those of the own one. What goes on from that has bits that neither device would
//! have given alone: it shares nothing with other snapshots.
//!
//! Where the budget is passed, states go in the order in which a [`Cache`](crate::qwen::Cache) drops snapshots, and keys and
//! values when nothing rests on them.

mod blob;
mod catalog;
mod index;
mod record;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use self::catalog::{Catalog, Trouble};
use crate::error::{Error, Result};
use crate::qwen::model::Model;
use crate::qwen::state::cache::Usage;
use crate::qwen::state::snapshot::Snapshot;

/// A directory of snapshots, open for writing in this process alone, or a view of one. See the [module](self).
pub struct Store {
    dir: PathBuf,
    catalog: Mutex<Catalog>,
    /// Goes last; a view has none.
    _lock: Option<Lock>,
}

/// The lock of a store. It is given back and not only closed: a process that this one is about to start holds the file too.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(why) = self.0.unlock() {
            log::warn!("a store stays locked until the process ends: {why}");
        }
    }
}

/// What saving took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Tokens of the snapshot.
    pub tokens: u64,
    /// Bytes written; 0 if it was there.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

impl Store {
    /// Opens a store, or makes one, that may take `budget` bytes of disk. What a crash left half-written is removed.
    ///
    /// # Errors
    /// [`Error::Load`] if another process has it open, of which there may be a [`Store::view`]; [`Error::Load`] or
    /// [`Error::Save`] if the directory cannot be used.
    pub fn open(dir: impl AsRef<Path>, budget: u64) -> Result<Store> {
        let dir = dir.as_ref().join("v1");
        fs::create_dir_all(&dir).map_err(|e| Error::save(&dir, e))?;
        let path = dir.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| Error::save(&path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::load(
                    &dir,
                    "another process has this store open; it can be read meanwhile, not written",
                ));
            }
            Err(TryLockError::Error(e)) => return Err(Error::load(&path, e)),
        }
        let lock = Lock(lock);
        let catalog = Mutex::new(Catalog::open(&dir, budget)?);
        Ok(Store { dir, catalog, _lock: Some(lock) })
    }

    /// A view of a store, whoever has it open: finds and loads the snapshots that are there at the time, and changes nothing,
    /// neither what is there nor the order in which it goes. Several processes may have one.
    ///
    /// # Errors
    /// [`Error::Load`] if there is no store, or if its directory cannot be read.
    pub fn view(dir: impl AsRef<Path>) -> Result<Store> {
        let dir = dir.as_ref().join("v1");
        let catalog = Mutex::new(Catalog::view(&dir)?);
        Ok(Store { dir, catalog, _lock: None })
    }

    /// True for a view: nothing can be written.
    pub fn is_view(&self) -> bool {
        self._lock.is_none()
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a snapshot. When this returns it is there for good, unless the budget sends it off.
    ///
    /// # Errors
    /// [`Error::Save`] for a view, or if it cannot be written, of which no trace stays; [`Error::Load`] if the model's weights
    /// cannot be read for their hash; what the backend reports.
    pub fn save(&self, snapshot: &Snapshot) -> Result<Saved> {
        let begin = Instant::now();
        let bytes = self.writable()?.save(snapshot)?;
        Ok(Saved { tokens: snapshot.position(), bytes, took: begin.elapsed() })
    }

    /// The number of tokens of the longest beginning of `ids` that [`Store::load`] would try first.
    ///
    /// # Errors
    /// [`Error::Load`] if the model's weights cannot be read for their hash, or a view its directory.
    pub fn longest(&self, model: &Model, ids: &[u32]) -> Result<u64> {
        let mut catalog = self.lock();
        let found = catalog.candidates(model, ids)?;
        Ok(found.first().and_then(|id| catalog.tokens(*id)).unwrap_or(0))
    }

    /// The snapshot with the longest beginning of `ids`, on the model's device. One that is not whole is forgotten, and the next
    /// longest is taken.
    ///
    /// # Errors
    /// As [`Store::longest`]; what the backend reports.
    pub fn load(&self, model: &Model, ids: &[u32]) -> Result<Option<Snapshot>> {
        let mut catalog = self.lock();
        for id in catalog.candidates(model, ids)? {
            // An earlier one may have taken it along.
            if catalog.tokens(id).is_none() {
                continue;
            }
            match catalog.load(model, id) {
                Ok(snapshot) => {
                    catalog.touch(id)?;
                    return Ok(Some(snapshot));
                }
                Err(Trouble::Broken(broken, kind, why)) => {
                    log::warn!("{}: {why}; it is forgotten", blob::path(&self.dir, broken, kind).display());
                    catalog.forget(broken, kind)?;
                }
                Err(Trouble::Failed(why)) => return Err(why),
            }
        }
        Ok(None)
    }

    /// Keeps a snapshot whatever the budget is, or no longer; false if it is not stored.
    ///
    /// # Errors
    /// [`Error::Save`] for a view, or if that cannot be noted.
    pub fn pin(&self, snapshot: &Snapshot, pinned: bool) -> Result<bool> {
        self.writable()?.pin(snapshot, pinned)
    }

    /// Forgets everything that is not pinned.
    ///
    /// # Errors
    /// [`Error::Save`] for a view, or if that cannot be noted.
    pub fn clear(&self) -> Result<()> {
        self.writable()?.clear()
    }

    /// What it takes of the disk; a view has no budget.
    pub fn usage(&self) -> Usage {
        let (snapshots, bytes, budget) = self.lock().usage();
        Usage { snapshots, bytes, budget }
    }

    fn lock(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn writable(&self) -> Result<MutexGuard<'_, Catalog>> {
        if self.is_view() {
            return Err(Error::save(&self.dir, "this is a view of a store: it can be read, not written"));
        }
        Ok(self.lock())
    }
}

/// What is read of the front of a file of rows, written again; none where it is refused. Not a part of the API: for those who
/// feed it with bytes that nobody wrote.
#[doc(hidden)]
pub fn reread(file: &[u8]) -> Option<Vec<u8>> {
    let mut record = blob::front(file, file.len() as u64)?;
    let answer = record::get_answer(&record.answer, record.end())?;
    record.answer = record::put_answer(answer.as_ref());
    Some(blob::head(&record, blob::Kind::Rows))
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({}, {})", self.dir.display(), self.usage())
    }
}
