//! The index of a store: which snapshots there are, in an embedded database that survives any crash.
//!
//! A crash it survives, but damage trips its assertions. So its file has a checksum beside it for as long as nobody has it open, and
//! one that is not as it was left is not looked into. Where a writer crashed there is none, and the database's own checks decide.

use std::fs::{self, File};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use twox_hash::XxHash3_128;

use super::blob;
use crate::error::{Error, Result};

/// Records by id.
const RECORDS: TableDefinition<u128, &[u8]> = TableDefinition::new("records");
/// By id: when it was last used, and bits: 1 it has its state, 2 it is pinned.
const MARKS: TableDefinition<u128, (u64, u8)> = TableDefinition::new("marks");
/// Hashes of large files by path, length and time of change.
const HASHES: TableDefinition<&str, u128> = TableDefinition::new("hashes");

/// What changes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marks {
    pub used: u64,
    pub has_state: bool,
    pub pinned: bool,
}

/// One change of the index; all of a transaction happen or none.
pub(super) enum Change {
    Put(u128, Vec<u8>, Marks),
    Mark(u128, Marks),
    Remove(u128),
    Hash(String, u128),
}

/// The open database.
pub(super) struct Index {
    path: PathBuf,
    /// None after a failure, until it is opened again.
    db: Option<Database>,
}

/// Why the database did not do something.
struct Failure {
    why: String,
    /// What it holds is not what it wrote, rather than something else standing against it.
    broken: bool,
}

impl From<redb::Error> for Failure {
    fn from(e: redb::Error) -> Failure {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        let broken = match &e {
            redb::Error::Io(e) => matches!(e.kind(), InvalidData | UnexpectedEof),
            redb::Error::PreviousIo | redb::Error::DatabaseAlreadyOpen => false,
            _ => true,
        };
        Failure { why: e.to_string(), broken }
    }
}

/// An entry as it lies in the database.
pub(super) type Entry = (u128, Vec<u8>, Marks);

impl Index {
    /// Opens or makes the database, with all that it holds. One that is broken is put aside, and an empty one takes its place.
    pub fn open(dir: &Path) -> Result<(Index, Vec<Entry>)> {
        let path = dir.join("index.redb");
        let mut index = Index { path, db: None };
        let as_left = index.as_left().map_err(|e| Error::load(&index.path, e))?;
        // From here on the file changes; that there is no checksum has to last before it does.
        blob::remove_file(&index.sum_path())
            .and_then(|()| blob::sync_dir(dir))
            .map_err(|e| Error::save(&index.path, e))?;
        let why = match as_left.then(|| index.all()) {
            Some(Ok(entries)) => return Ok((index, entries)),
            Some(Err(failure)) if failure.broken => failure.why,
            Some(Err(failure)) => return Err(Error::load(&index.path, failure.why)),
            None => "it is not as it was left".into(),
        };
        log::warn!("{}: {why}; it is made again", index.path.display());
        let aside = index.path.with_extension("broken");
        fs::rename(&index.path, &aside).map_err(|e| Error::save(&aside, e))?;
        let entries = index.all().map_err(|failure| Error::load(&index.path, failure.why))?;
        Ok((index, entries))
    }

    fn sum_path(&self) -> PathBuf {
        self.path.with_extension("sum")
    }

    /// False if there is a checksum and the file has another one.
    fn as_left(&self) -> io::Result<bool> {
        let missing = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
        match fs::read(self.sum_path()) {
            // One that is cut short was being written when the power went.
            Ok(sum) if sum.len() < 16 => Ok(true),
            Ok(sum) => match sum_of(&self.path) {
                Err(e) if missing(&e) => Ok(true),
                found => Ok(found?.as_slice() == sum),
            },
            Err(e) if missing(&e) => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// Does something with the database, which is opened and checked first where it is not open. Whatever goes wrong closes it.
    fn with<T>(&mut self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, Failure> {
        let (path, held) = (&self.path, self.db.take());
        // A damaged file trips assertions of the database. Where panics abort the process it ends here, and the file has to be
        // removed by hand: what it held is in the other files.
        let done = catch_unwind(AssertUnwindSafe(move || {
            let db = match held {
                Some(db) => db,
                None => {
                    let mut db = Database::create(path)?;
                    db.check_integrity()?;
                    db
                }
            };
            let out = work(&db)?;
            Ok::<_, redb::Error>((db, out))
        }));
        match done {
            Ok(Ok((db, out))) => {
                self.db = Some(db);
                Ok(out)
            }
            Ok(Err(e)) => Err(e.into()),
            Err(_) => Err(Failure { why: "the database does not hold together".into(), broken: true }),
        }
    }

    fn all(&mut self) -> Result<Vec<Entry>, Failure> {
        self.with(|db| {
            let read = db.begin_read()?;
            let (records, marks) = match (read.open_table(RECORDS), read.open_table(MARKS)) {
                // A new one: tables come with their first entry.
                (Err(TableError::TableDoesNotExist(_)), _) => return Ok(Vec::new()),
                (records, marks) => (records?, marks?),
            };
            let mut out = Vec::new();
            for item in records.iter()? {
                let (id, bytes) = item?;
                let id = id.value();
                let (used, bits) = marks.get(id)?.map_or((0, 0), |m| m.value());
                let marks = Marks { used, has_state: bits & 1 != 0, pinned: bits & 2 != 0 };
                out.push((id, bytes.value().to_vec(), marks));
            }
            Ok(out)
        })
    }

    /// Makes changes that last once this returns.
    pub fn change(&mut self, changes: &[Change]) -> Result<()> {
        let done = self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut records = write.open_table(RECORDS)?;
                let mut marks = write.open_table(MARKS)?;
                let mut hashes = write.open_table(HASHES)?;
                let bits = |m: &Marks| (m.used, u8::from(m.has_state) | u8::from(m.pinned) << 1);
                for change in changes {
                    match change {
                        Change::Put(id, bytes, m) => {
                            records.insert(id, bytes.as_slice())?;
                            marks.insert(id, bits(m))?;
                        }
                        Change::Mark(id, m) => {
                            marks.insert(id, bits(m))?;
                        }
                        Change::Remove(id) => {
                            records.remove(id)?;
                            marks.remove(id)?;
                        }
                        Change::Hash(key, hash) => {
                            hashes.insert(key.as_str(), hash)?;
                        }
                    }
                }
            }
            write.commit()?;
            Ok(())
        });
        done.map_err(|failure| Error::save(&self.path, failure.why))
    }

    /// The hash that was put under a key.
    pub fn hash(&mut self, key: &str) -> Option<u128> {
        self.with(|db| Ok(db.begin_read()?.open_table(HASHES)?.get(key)?.map(|h| h.value()))).ok().flatten()
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        // One that had failed is left to the checks of the database.
        let Some(db) = self.db.take() else { return };
        let closed = catch_unwind(AssertUnwindSafe(move || drop(db)));
        let written = || {
            // A checksum must not outlast what it is of.
            File::options().write(true).open(&self.path)?.sync_all()?;
            fs::write(self.sum_path(), sum_of(&self.path)?)
        };
        if closed.is_ok()
            && let Err(why) = written()
        {
            log::warn!("{}: {why}", self.sum_path().display());
            let _ = fs::remove_file(self.sum_path());
        }
    }
}

/// The checksum of a file.
fn sum_of(path: &Path) -> io::Result<[u8; 16]> {
    let mut file = File::open(path)?;
    let (mut sum, mut block) = (XxHash3_128::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut block)? {
            0 => return Ok(sum.finish_128().to_le_bytes()),
            n => sum.write(&block[..n]),
        }
    }
}
