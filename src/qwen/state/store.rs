//! Snapshots on disk: they survive the process, and nothing that happens to it or to the disk makes a wrong one of them.
//!
//! ```text
//! <store>/v1/lock          held while a process has the store open: a second one is refused
//! <store>/v1/index.redb    which snapshots there are, when they were used, what is pinned
//! <store>/v1/<id>.rows     the record of a snapshot; its keys and values from its parent's end on
//! <store>/v1/<id>.state    its states and tails
//! ```
//!
//! A snapshot that goes on from a stored one holds the keys and values of its own tokens only; the others are those of its
//! parent. Both files are written and made to last before the index names them, so that a crash or a full disk at any moment
//! loses the snapshot that was being written and no other. A snapshot is read whole or not at all: every length is computed
//! from the model and compared, every byte is under a checksum, and one that fails is forgotten together with what rests on
//! it. The index is made again from the files if it is lost.
//!
//! Snapshots are those of one model: of its shape, its weights, its type of cache, and this version of the format. One that was
//! taken on another device is found too, after those of the own one. What goes on from that has bits that neither device would
//! have given alone: it shares nothing with other snapshots.
//!
//! Where the budget is passed, states go in the order in which a [`Cache`](crate::qwen::Cache) drops snapshots, and keys and
//! values when nothing rests on them.

mod blob;
mod index;
mod record;

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant, UNIX_EPOCH};

use rayon::prelude::*;
use twox_hash::XxHash3_128;

use self::blob::Kind;
use self::index::{Change, Index, Marks};
use self::record::{Record, Sum, hash};
use crate::error::{Error, Result};
use crate::qwen::files;
use crate::qwen::model::Model;
use crate::qwen::state::cache::Usage;
use crate::qwen::state::history::History;
use crate::qwen::state::host;
use crate::qwen::state::snapshot::{self, Snapshot};
use crate::qwen::state::tree::Tree;

/// A directory of snapshots, open in this process alone. See the [module](self).
pub struct Store {
    dir: PathBuf,
    inner: Mutex<Inner>,
    /// Goes last.
    _lock: Lock,
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

struct Inner {
    dir: PathBuf,
    index: Index,
    nodes: HashMap<u128, Node>,
    /// Those that have their state.
    tree: Tree<u128>,
    budget: u64,
    clock: u64,
}

struct Node {
    record: Record,
    history: History,
    marks: Marks,
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

/// Files from this size on are hashed once and then known by path, length and time of change.
const LARGE: u64 = 64 << 20;

impl Store {
    /// Opens a store, or makes one, that may take `budget` bytes of disk. What a crash left half-written is removed.
    ///
    /// # Errors
    /// [`Error::Load`] if another process has it open; [`Error::Load`] or [`Error::Save`] if the directory cannot be used.
    pub fn open(dir: impl AsRef<Path>, budget: u64) -> Result<Store> {
        let dir = dir.as_ref().join("v1");
        fs::create_dir_all(&dir).map_err(|e| Error::save(&dir, e))?;
        let path = dir.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| Error::save(&path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::load(&dir, "another process has this store open")),
            Err(TryLockError::Error(e)) => return Err(Error::load(&path, e)),
        }
        let (index, entries) = Index::open(&dir)?;
        let inner = Inner { dir: dir.clone(), index, nodes: HashMap::new(), tree: Tree::default(), budget, clock: 1 };
        let store = Store { dir, inner: Mutex::new(inner), _lock: Lock(lock) };
        let mut inner = store.lock();
        inner.gather(entries)?;
        inner.evict(None)?;
        drop(inner);
        Ok(store)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a snapshot. When this returns it is there for good, unless the budget sends it off.
    ///
    /// # Errors
    /// [`Error::Save`] if it cannot be written, of which no trace stays; [`Error::Load`] if the model's weights cannot be read
    /// for their hash; what the backend reports.
    pub fn save(&self, snapshot: &Snapshot) -> Result<Saved> {
        let begin = Instant::now();
        let mut inner = self.lock();
        let bytes = inner.save(snapshot)?;
        Ok(Saved { tokens: snapshot.position(), bytes, took: begin.elapsed() })
    }

    /// The number of tokens of the longest beginning of `ids` that [`Store::load`] would try first.
    ///
    /// # Errors
    /// [`Error::Load`] if the model's weights cannot be read for their hash.
    pub fn longest(&self, model: &Model, ids: &[u32]) -> Result<u64> {
        let mut inner = self.lock();
        let found = inner.candidates(model, ids)?;
        Ok(found.first().map_or(0, |id| inner.nodes[id].record.end()))
    }

    /// The snapshot with the longest beginning of `ids`, on the model's device. One that is not whole is forgotten, and the next
    /// longest is taken.
    ///
    /// # Errors
    /// As [`Store::longest`]; what the backend reports.
    pub fn load(&self, model: &Model, ids: &[u32]) -> Result<Option<Snapshot>> {
        let mut inner = self.lock();
        for id in inner.candidates(model, ids)? {
            // An earlier one may have taken it along.
            if !inner.nodes.get(&id).is_some_and(|n| n.marks.has_state) {
                continue;
            }
            match inner.load(model, id) {
                Ok(snapshot) => {
                    inner.touch(id)?;
                    return Ok(Some(snapshot));
                }
                Err(Trouble::Broken(broken, kind, why)) => {
                    log::warn!("{}: {why}; it is forgotten", blob::path(&self.dir, broken, kind).display());
                    inner.forget(broken, kind)?;
                }
                Err(Trouble::Failed(why)) => return Err(why),
            }
        }
        Ok(None)
    }

    /// Keeps a snapshot whatever the budget is, or no longer; false if it is not stored.
    ///
    /// # Errors
    /// [`Error::Save`] if that cannot be noted.
    pub fn pin(&self, snapshot: &Snapshot, pinned: bool) -> Result<bool> {
        let mut inner = self.lock();
        let id = inner.id(snapshot)?;
        let Some(node) = inner.nodes.get_mut(&id).filter(|n| n.marks.has_state) else { return Ok(false) };
        node.marks.pinned = pinned;
        let change = Change::Mark(id, node.marks);
        inner.index.change(&[change])?;
        Ok(true)
    }

    /// Forgets everything that is not pinned.
    ///
    /// # Errors
    /// [`Error::Save`] if that cannot be noted.
    pub fn clear(&self) -> Result<()> {
        let mut inner = self.lock();
        let budget = std::mem::replace(&mut inner.budget, 0);
        let done = inner.evict(None);
        inner.budget = budget;
        done
    }

    /// What it takes of the disk.
    pub fn usage(&self) -> Usage {
        let inner = self.lock();
        let snapshots = inner.nodes.values().filter(|n| n.marks.has_state).count() as u64;
        Usage { snapshots, bytes: inner.bytes(), budget: inner.budget }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Why a snapshot cannot be had.
enum Trouble {
    /// A file is not what it should be: whose, which, and why.
    Broken(u128, Kind, String),
    /// Something else stands against it; the files may be whole.
    Failed(Error),
}

impl Inner {
    /// Takes up what the index and the files say, as far as they agree.
    fn gather(&mut self, entries: Vec<index::Entry>) -> Result<()> {
        let mut changes = Vec::new();
        let mut found: HashMap<u128, (Record, Marks)> = HashMap::new();
        for (id, bytes, marks) in entries {
            match Record::decode(&bytes).filter(|r| r.id == id) {
                Some(record) => drop(found.insert(id, (record, marks))),
                None => changes.push(Change::Remove(id)),
            }
        }
        let files = blob::list(&self.dir)?;
        let has = |id: u128, kind: Kind| files.binary_search(&(blob::path(&self.dir, id, kind), id, kind)).is_ok();
        for (path, id, _) in files.iter().filter(|f| f.2 == Kind::Rows) {
            // Written, and the index does not know: it was lost, or the writer ended in between.
            let unknown = !found.contains_key(id);
            if let Some(record) = blob::record(path).filter(|r| unknown && r.id == *id) {
                let marks = Marks { used: 0, has_state: has(*id, Kind::State), pinned: false };
                changes.push(Change::Put(*id, record.encode(), marks));
                found.insert(*id, (record, marks));
            }
        }
        self.clock = found.values().map(|(_, m)| m.used).max().unwrap_or(0) + 1;

        // Parents before those that rest on them, until no more come.
        let mut open: Vec<(Record, Marks)> = found.into_values().collect();
        open.sort_by_key(|(r, _)| (r.end(), r.begin, r.id));
        loop {
            let before = open.len();
            let mut later = Vec::new();
            for (record, marks) in open {
                let parent = self.nodes.get(&record.parent).map(|n| &n.history);
                match self.whole(&record, parent) {
                    Some(history) => self.adopt(record, history, marks, &mut changes),
                    None => later.push((record, marks)),
                }
            }
            open = later;
            if open.len() == before {
                break;
            }
        }
        changes.extend(open.iter().map(|(record, _)| Change::Remove(record.id)));
        if !changes.is_empty() {
            self.index.change(&changes)?;
        }
        let without = |node: &Node| !node.marks.has_state;
        let bare: Vec<u128> = self.nodes.iter().filter(|(_, n)| without(n)).map(|(id, _)| *id).collect();
        bare.into_iter().try_for_each(|id| self.prune(id))?;
        for (path, id, kind) in files {
            let keep = match (kind, self.nodes.get(&id)) {
                (Kind::Rows, Some(_)) => true,
                (Kind::State, Some(node)) => node.marks.has_state,
                _ => false,
            };
            if !keep {
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// The history of a record if its parent and its file of rows are there.
    fn whole(&self, record: &Record, parent: Option<&History>) -> Option<History> {
        let before = match (record.parent, parent) {
            (0, _) => &[],
            (_, Some(parent)) => parent.ids(),
            (_, None) => return None,
        };
        let length = fs::metadata(blob::path(&self.dir, record.id, Kind::Rows)).ok()?.len();
        let fits = before.len() as u64 == record.begin && length == blob::bytes(record, false);
        fits.then(|| History::from_parts([before, &record.ids].concat(), record.runs.clone())).flatten()
    }

    fn adopt(&mut self, record: Record, history: History, mut marks: Marks, changes: &mut Vec<Change>) {
        let id = record.id;
        let length = fs::metadata(blob::path(&self.dir, id, Kind::State)).map(|m| m.len());
        let expected = blob::bytes(&record, true) - blob::bytes(&record, false);
        if marks.has_state && length.ok() != Some(expected) {
            marks.has_state = false;
            changes.push(Change::Mark(id, marks));
        }
        if marks.has_state {
            self.tree.insert(history.ids(), id);
        }
        self.nodes.insert(id, Node { record, history, marks });
    }

    /// Of the model's shape, weights, type of cache, and the format.
    fn model_key(&mut self, model: &Model) -> Result<u128> {
        let inner = &model.inner;
        if let Some(key) = inner.key.get() {
            return Ok(*key);
        }
        let mut all = format!("gatedelta snapshots 1\n{:?}\n{}\n", inner.config, inner.plan.kv).into_bytes();
        if inner.random.is_some() {
            all.extend(inner.source().into_bytes());
        } else {
            for path in files::shards(&inner.dir)? {
                all.extend(self.file_hash(&path).map_err(|e| Error::load(&path, e))?.to_le_bytes());
            }
        }
        Ok(*inner.key.get_or_init(|| hash(&all)))
    }

    fn file_hash(&mut self, path: &Path) -> std::io::Result<u128> {
        let mut file = File::open(path)?;
        let about = file.metadata()?;
        let changed = about.modified()?.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
        let key = format!("{}\n{}\n{changed}", path.canonicalize()?.display(), about.len());
        let large = about.len() >= LARGE;
        if let Some(known) = if large { self.index.hash(&key) } else { None } {
            return Ok(known);
        }
        let mut sum = XxHash3_128::new();
        let mut block = vec![0; 4 << 20];
        loop {
            match file.read(&mut block)? {
                0 => break,
                n => sum.write(&block[..n]),
            }
        }
        let sum = sum.finish_128();
        if large && let Err(why) = self.index.change(&[Change::Hash(key, sum)]) {
            log::warn!("{why}");
        }
        Ok(sum)
    }

    fn id(&mut self, snapshot: &Snapshot) -> Result<u128> {
        let model = self.model_key(snapshot.model())?;
        let device = device_key(snapshot)?;
        let history = snapshot.history();
        let mut all = [model.to_le_bytes(), device.to_le_bytes()].concat();
        all.extend((history.len()).to_le_bytes());
        history.ids().iter().for_each(|id| all.extend(id.to_le_bytes()));
        history.runs().iter().for_each(|r| all.extend([r.tokens.to_le_bytes(), r.pieces.to_le_bytes()].concat()));
        all.extend(record::put_answer(snapshot.answer()));
        // 0 stands for no parent.
        Ok(hash(&all).max(1))
    }

    fn save(&mut self, snapshot: &Snapshot) -> Result<u64> {
        let id = self.id(snapshot)?;
        if self.nodes.get(&id).is_some_and(|n| n.marks.has_state) {
            self.touch(id)?;
            return Ok(0);
        }
        let (model, device) = (self.model_key(snapshot.model())?, device_key(snapshot)?);
        let history = snapshot.history();
        let (parent, begin) = match self.nodes.get(&id) {
            // Its state had gone; its rows stay where they hang.
            Some(node) => (node.record.parent, node.record.begin),
            None => {
                let fits = |n: &&Node| {
                    let r = &n.record;
                    let before = r.end() < history.len() || r.end() == history.len() && r.begin < r.end();
                    r.model == model && r.device == device && before && n.history.begins(history)
                };
                let nearest = self.nodes.values().filter(fits).max_by_key(|n| (n.record.end(), n.record.id));
                nearest.map_or((0, 0), |n| (n.record.id, n.record.end()))
            }
        };
        let rows = host::rows(snapshot, begin..history.len())?;
        let state = host::fixed(snapshot)?;
        let record = Record {
            id,
            model,
            device,
            parent,
            begin,
            ids: history.ids()[begin as usize..].to_vec(),
            runs: history.runs().to_vec(),
            rows: Sum::of(&rows),
            state: Sum::of(&state),
            answer: record::put_answer(snapshot.answer()),
        };
        let fresh = !self.nodes.contains_key(&id);
        self.clock += 1;
        let marks = Marks { used: self.clock, has_state: true, pinned: false };
        let put = Change::Put(id, record.encode(), marks);
        let done = blob::write(&self.dir, &record, &rows, &state).and_then(|()| self.index.change(&[put]));
        if let Err(why) = done {
            blob::remove(&self.dir, id, Kind::State);
            if fresh {
                blob::remove(&self.dir, id, Kind::Rows);
            }
            return Err(why);
        }
        let written = blob::bytes(&record, true);
        self.tree.insert(history.ids(), id);
        self.nodes.insert(id, Node { record, history: history.clone(), marks });
        self.evict(Some(id))?;
        Ok(written)
    }

    /// Ids of the snapshots of a model that begin `ids`: longest first, of those the ones of the model's own device first.
    fn candidates(&mut self, model: &Model, ids: &[u32]) -> Result<Vec<u128>> {
        let key = self.model_key(model)?;
        let device = hash(snapshot::device(model).as_bytes());
        let found = self.tree.along(ids);
        let node = |id: &u128| self.nodes.get(id);
        let mut out: Vec<u128> = found.iter().map(|f| *f.value).collect();
        out.retain(|id| node(id).is_some_and(|n| n.record.model == key && n.record.end() <= model.memory().context));
        out.sort_by_key(|id| node(id).map(|n| (n.record.end(), n.record.device == device, n.marks.used)));
        out.reverse();
        Ok(out)
    }

    /// Reads a snapshot and all that it rests on.
    fn load(&self, model: &Model, id: u128) -> std::result::Result<Snapshot, Trouble> {
        let mut chain = Vec::new();
        let mut at = id;
        while let Some(node) = self.nodes.get(&at) {
            chain.push(node);
            at = node.record.parent;
        }
        chain.reverse();
        let broken = |id, kind, why| Err(Trouble::Broken(id, kind, why));
        let Some(last) = chain.last() else { return broken(id, Kind::State, "it is not there".into()) };
        // Lengths follow from the model alone.
        let (fixed_bytes, row_bytes) = (host::fixed_bytes(model), host::row_bytes(model));
        if last.record.state.bytes != fixed_bytes {
            let why = format!("it claims {} bytes of state and the model has {fixed_bytes}", last.record.state.bytes);
            return broken(id, Kind::State, why);
        }
        for Node { record, .. } in &chain {
            if Some(record.rows.bytes) != (record.ids.len() as u64).checked_mul(row_bytes) {
                let why = format!("it claims {} bytes for {} tokens", record.rows.bytes, record.ids.len());
                return broken(record.id, Kind::Rows, why);
            }
        }
        let read = |record: &Record, kind| blob::body(&self.dir, record, kind);
        let (state, rows) = rayon::join(
            || read(&last.record, Kind::State),
            || chain.par_iter().map(|n| read(&n.record, Kind::Rows)).collect::<std::result::Result<Vec<_>, Trouble>>(),
        );
        let (state, rows) = (state?, rows?);
        let Some(answer) = record::get_answer(&last.record.answer, last.record.end()) else {
            return broken(id, Kind::State, "its answer does not hold together".into());
        };
        let ranges = chain.iter().map(|n| n.record.begin..n.record.end());
        let parts: Vec<_> = ranges.zip(rows.iter().map(Vec::as_slice)).collect();
        let moved = last.record.device != hash(snapshot::device(model).as_bytes());
        host::place(model, last.history.clone(), answer, moved, &state, &parts).map_err(Trouble::Failed)
    }

    fn touch(&mut self, id: u128) -> Result<()> {
        self.clock += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.marks.used = self.clock;
            let change = Change::Mark(id, node.marks);
            self.index.change(&[change])?;
        }
        Ok(())
    }

    /// Drops a snapshot for a broken file: of states this one, of rows all that rest on it.
    fn forget(&mut self, id: u128, kind: Kind) -> Result<()> {
        if kind == Kind::State {
            self.drop_state(id)?;
            return self.prune(id);
        }
        let mut gone = vec![id];
        let mut at = 0;
        while let Some(parent) = gone.get(at).copied() {
            gone.extend(self.nodes.values().filter(|n| n.record.parent == parent).map(|n| n.record.id));
            at += 1;
        }
        let parent = self.nodes.get(&id).map(|n| n.record.parent);
        self.remove(&gone)?;
        parent.map_or(Ok(()), |parent| self.prune(parent))
    }

    fn drop_state(&mut self, id: u128) -> Result<()> {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        node.marks.has_state = false;
        let change = Change::Mark(id, node.marks);
        self.tree.remove(node.history.ids(), |value| *value == id);
        self.index.change(&[change])?;
        blob::remove(&self.dir, id, Kind::State);
        Ok(())
    }

    fn remove(&mut self, ids: &[u128]) -> Result<()> {
        for id in ids {
            if let Some(node) = self.nodes.remove(id) {
                self.tree.remove(node.history.ids(), |value| value == id);
            }
        }
        self.index.change(&ids.iter().map(|id| Change::Remove(*id)).collect::<Vec<_>>())?;
        for id in ids {
            blob::remove(&self.dir, *id, Kind::State);
            blob::remove(&self.dir, *id, Kind::Rows);
        }
        Ok(())
    }

    /// Removes a node without state on which nothing rests, and then its parent if the same is true of it.
    fn prune(&mut self, id: u128) -> Result<()> {
        let mut at = id;
        while let Some(node) = self.nodes.get(&at) {
            if node.marks.has_state || self.nodes.values().any(|n| n.record.parent == at) {
                break;
            }
            let parent = node.record.parent;
            self.remove(&[at])?;
            at = parent;
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.nodes.values().map(|n| blob::bytes(&n.record, n.marks.has_state)).sum()
    }

    /// Drops the states of least worth until the budget is kept; `newest` goes last.
    fn evict(&mut self, newest: Option<u128>) -> Result<()> {
        while self.bytes() > self.budget {
            let all = self.tree.all();
            let least = all
                .iter()
                .filter_map(|f| Some((f, self.nodes.get(f.value).filter(|n| !n.marks.pinned)?)))
                .map(|(f, n)| {
                    let worth = (f.depth - f.above) as f64 / (1 + self.clock.saturating_sub(n.marks.used)) as f64;
                    (newest == Some(*f.value), worth, *f.value)
                })
                .min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
            let Some((_, _, id)) = least else { break };
            self.drop_state(id)?;
            self.prune(id)?;
        }
        Ok(())
    }
}

/// Of the device whose rounding is in the numbers; of the numbers themselves where that is of several.
fn device_key(snapshot: &Snapshot) -> Result<u128> {
    let device = hash(snapshot::device(snapshot.model()).as_bytes());
    if !snapshot.moved() {
        return Ok(device);
    }
    let numbers = hash(&host::fixed(snapshot)?);
    Ok(hash(&[device.to_le_bytes(), numbers.to_le_bytes()].concat()))
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({}, {})", self.dir.display(), self.usage())
    }
}
