//! The files of a store. Each is complete from the moment that it has its name.
//!
//! ```text
//! <id>.rows    magic, length of the record (u32), record, keys and values
//! <id>.state   magic, id (u128), sum of what follows (u128), states and tails
//! ```
//!
//! The record in a file of rows is the one that the index holds: an index that is lost is made again from these.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use twox_hash::XxHash3_128;

use super::catalog::Trouble;
use super::record::{BLOCK, Record, Sum};
use crate::error::{Error, Result};

const ROWS: &[u8; 8] = b"GDROWS\x001";
const STATE: &[u8; 8] = b"GDSTAT\x001";
/// Begin of the names of files that are being written.
const PARTIAL: &str = ".tmp-";
const STATE_HEAD: u64 = 8 + 16 + 16;
/// Bytes that a thread reads at a time: they are summed up and handed on while a core's cache holds them.
const PIECE: usize = 256 << 10;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Rows,
    State,
    /// One that was being written when its writer ended.
    Partial,
}

pub(super) fn path(dir: &Path, id: u128, kind: Kind) -> PathBuf {
    let end = if kind == Kind::Rows { "rows" } else { "state" };
    dir.join(format!("{id:032x}.{end}"))
}

/// The files of a store among those of its directory; others are none of its business.
pub(super) fn list(dir: &Path) -> Result<Vec<(PathBuf, u128, Kind)>> {
    let failed = |e: io::Error| Error::load(dir, e);
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with(PARTIAL) {
            out.push((path, 0, Kind::Partial));
            continue;
        }
        let (stem, end) = name.split_once('.').unwrap_or_default();
        let kind = match end {
            "rows" => Kind::Rows,
            "state" => Kind::State,
            _ => continue,
        };
        if let (32, Ok(id)) = (stem.len(), u128::from_str_radix(stem, 16)) {
            out.push((path, id, kind));
        }
    }
    out.sort();
    Ok(out)
}

/// Writes both files of a snapshot and makes them last.
pub(super) fn write(dir: &Path, record: &Record, rows: &[u8], state: &[u8]) -> Result<()> {
    put(dir, record.id, Kind::Rows, &[&head(record, Kind::Rows), rows])?;
    put(dir, record.id, Kind::State, &[&head(record, Kind::State), state])?;
    sync_dir(dir).map_err(|e| Error::save(dir, e))
}

fn put(dir: &Path, id: u128, kind: Kind, parts: &[&[u8]]) -> Result<()> {
    let to = path(dir, id, kind);
    let name = to.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let partial = dir.join(format!("{PARTIAL}{name}"));
    let written = (|| {
        let mut file = File::create(&partial)?;
        parts.iter().try_for_each(|part| file.write_all(part))?;
        file.sync_all()?;
        fs::rename(&partial, &to)
    })();
    written.map_err(|e| {
        // What is left of it takes the room that was missing.
        let _ = fs::remove_file(&partial);
        Error::save(&to, e)
    })
}

/// Makes new names last, where the system has a way to.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(dir).and_then(|d| d.sync_all())?;
    let _ = dir;
    Ok(())
}

/// What stands before the numbers of a file.
pub(super) fn head(record: &Record, kind: Kind) -> Vec<u8> {
    let bytes = record.encode();
    match kind {
        Kind::Rows => [ROWS.as_slice(), &(bytes.len() as u32).to_le_bytes(), &bytes].concat(),
        _ => [STATE.as_slice(), &record.id.to_le_bytes(), &record.state.hash.to_le_bytes()].concat(),
    }
}

/// Gives the numbers in a file of a record to `put`, from several threads: pieces, each with the byte where it begins. They are
/// those of the record only if this returns well.
pub(super) fn read(
    dir: &Path,
    record: &Record,
    kind: Kind,
    put: impl Fn(u64, &[u8]) -> Result<()> + Sync,
) -> Result<(), Trouble> {
    let path = path(dir, record.id, kind);
    let broken = |why: String| Trouble::Broken(record.id, kind, why);
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => broken(e.to_string()),
        _ => Trouble::Failed(Error::load(&path, e)),
    };
    let (head, sum) = (head(record, kind), if kind == Kind::Rows { record.rows } else { record.state });
    let mut file = File::open(&path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.len();
    if found.checked_sub(head.len() as u64) != Some(sum.bytes) {
        return Err(broken(format!("it has {found} bytes, not {} and {}", head.len(), sum.bytes)));
    }
    let mut front = vec![0; head.len()];
    file.read_exact(&mut front).map_err(failed)?;
    if front != head {
        return Err(broken("it begins as another one".into()));
    }
    let block = |piece: &mut Vec<u8>, i: u64| {
        let (begin, end) = (i * BLOCK, sum.bytes.min((i + 1) * BLOCK));
        let mut file = File::open(&path).map_err(failed)?;
        file.seek(io::SeekFrom::Start(head.len() as u64 + begin)).map_err(failed)?;
        let mut hash = XxHash3_128::new();
        for at in (begin..end).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min((end - at) as usize)];
            file.read_exact(piece).map_err(failed)?;
            hash.write(piece);
            put(at, piece).map_err(Trouble::Failed)?;
        }
        Ok(hash.finish_128())
    };
    let blocks = (0..sum.bytes.div_ceil(BLOCK)).into_par_iter().map_init(|| vec![0; PIECE], block);
    let blocks = blocks.collect::<Result<Vec<u128>, Trouble>>()?;
    if Sum::of_blocks(sum.bytes, &blocks) != sum {
        return Err(broken("its checksum is wrong".into()));
    }
    Ok(())
}

/// The record at the front of a file of rows, if the file is as long as it says.
pub(super) fn record(file: &Path) -> Option<Record> {
    let open = File::open(file).ok()?;
    let length = open.metadata().ok()?.len();
    front(open, length)
}

/// The record at the front of `length` bytes of rows.
pub(super) fn front(mut file: impl Read, length: u64) -> Option<Record> {
    let mut head = [0; 12];
    file.read_exact(&mut head).ok()?;
    let (magic, n) = head.split_at(8);
    let n = u64::from(u32::from_le_bytes(n.try_into().ok()?));
    let rest = length.checked_sub(12)?.checked_sub(n)?;
    if magic != ROWS {
        return None;
    }
    let mut bytes = vec![0; n as usize];
    file.read_exact(&mut bytes).ok()?;
    Record::decode(&bytes).filter(|record| record.rows.bytes == rest)
}

/// Bytes that a record takes on disk, with its state or without; none if it claims more than there can be.
pub(super) fn bytes(record: &Record, with_state: bool) -> Option<u64> {
    let rows = record.rows.bytes.checked_add(12 + record.encoded())?;
    if with_state { rows.checked_add(STATE_HEAD)?.checked_add(record.state.bytes) } else { Some(rows) }
}

/// Removes the file of a snapshot.
pub(super) fn remove(dir: &Path, id: u128, kind: Kind) {
    // One that stays for now is found when the store is opened next.
    let _ = fs::remove_file(path(dir, id, kind));
}

/// Removes a file that may not be there.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
