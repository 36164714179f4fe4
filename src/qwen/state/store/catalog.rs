//! What a store holds, and the one who changes it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use twox_hash::XxHash3_128;

use super::blob::{self, Kind};
use super::index::{Change, Entry, Index, Marks};
use super::record::{self, Record, Sum, hash};
use crate::error::{Error, Result};
use crate::qwen::files;
use crate::qwen::model::Model;
use crate::qwen::state::history::History;
use crate::qwen::state::host::{self, Arrival};
use crate::qwen::state::snapshot::{self, Snapshot};
use crate::qwen::state::tree::Tree;

/// The snapshots of a directory.
pub(super) struct Catalog {
    dir: PathBuf,
    /// None for a view: it changes nothing on disk.
    index: Option<Index>,
    nodes: HashMap<u128, Node>,
    /// Those that have their state.
    tree: Tree<u128>,
    /// Bytes on disk of all nodes.
    bytes: u64,
    budget: u64,
    clock: u64,
    /// The files as a view saw them last.
    seen: Vec<(PathBuf, u128, Kind)>,
}

struct Node {
    record: Record,
    history: History,
    marks: Marks,
}

/// Why a snapshot cannot be had.
pub(super) enum Trouble {
    /// A file is not what it should be: whose, which, and why.
    Broken(u128, Kind, String),
    /// Something else stands against it; the files may be whole.
    Failed(Error),
}

/// Files from this size on are hashed once and then known by path, length and time of change.
const LARGE: u64 = 64 << 20;

impl Catalog {
    /// What a directory holds, to read and to write.
    pub fn open(dir: &Path, budget: u64) -> Result<Catalog> {
        let (index, entries) = Index::open(dir)?;
        let mut catalog = Catalog::new(dir, Some(index), budget);
        let files = blob::list(dir)?;
        catalog.gather(entries, &files)?;
        catalog.tidy(files)?;
        catalog.evict(None)?;
        Ok(catalog)
    }

    /// What the files of a directory say, to read only.
    pub fn view(dir: &Path) -> Result<Catalog> {
        let mut catalog = Catalog::new(dir, None, 0);
        catalog.look()?;
        Ok(catalog)
    }

    fn new(dir: &Path, index: Option<Index>, budget: u64) -> Catalog {
        let (nodes, tree) = (HashMap::new(), Tree::default());
        Catalog { dir: dir.to_path_buf(), index, nodes, tree, bytes: 0, budget, clock: 1, seen: Vec::new() }
    }

    pub fn is_view(&self) -> bool {
        self.index.is_none()
    }

    /// The number of snapshots, their bytes on disk, and how many those may be.
    pub fn usage(&self) -> (u64, u64, u64) {
        debug_assert_eq!(self.bytes, self.nodes.values().map(Node::bytes).sum::<u64>());
        (self.nodes.values().filter(|n| n.marks.has_state).count() as u64, self.bytes, self.budget)
    }

    /// Tokens of a snapshot that is there.
    pub fn tokens(&self, id: u128) -> Option<u64> {
        Some(self.nodes.get(&id).filter(|n| n.marks.has_state)?.record.end())
    }

    /// Takes up what has changed since a view looked last. Files never change under their name: names are all there is to see.
    fn look(&mut self) -> Result<()> {
        let files = blob::list(&self.dir)?;
        if files != self.seen {
            self.nodes.clear();
            self.tree = Tree::default();
            self.bytes = 0;
            self.gather(Vec::new(), &files)?;
            self.seen = files;
        }
        Ok(())
    }

    fn tick(&mut self) {
        self.clock = self.clock.saturating_add(1);
    }

    fn note(&mut self, changes: &[Change]) -> Result<()> {
        match &mut self.index {
            Some(index) if !changes.is_empty() => index.change(changes),
            _ => Ok(()),
        }
    }

    fn remove_file(&self, id: u128, kind: Kind) {
        if !self.is_view() {
            blob::remove(&self.dir, id, kind);
        }
    }

    /// Takes up what the index and the files say, as far as they agree.
    fn gather(&mut self, entries: Vec<Entry>, files: &[(PathBuf, u128, Kind)]) -> Result<()> {
        let mut changes = Vec::new();
        let mut found: HashMap<u128, (Record, Marks)> = HashMap::new();
        for (id, bytes, marks) in entries {
            match Record::decode(&bytes).filter(|r| r.id == id) {
                Some(record) => drop(found.insert(id, (record, marks))),
                None => changes.push(Change::Remove(id)),
            }
        }
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
        self.clock = found.values().map(|(_, m)| m.used).max().unwrap_or(0).saturating_add(1);

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
        self.note(&changes)
    }

    /// Removes what nothing needs: nodes without state on which nothing rests, and files of no node.
    fn tidy(&mut self, files: Vec<(PathBuf, u128, Kind)>) -> Result<()> {
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
        let fits = before.len() as u64 == record.begin && Some(length) == blob::bytes(record, false);
        fits.then(|| History::from_parts([before, &record.ids].concat(), record.runs.clone())).flatten()
    }

    fn adopt(&mut self, record: Record, history: History, mut marks: Marks, changes: &mut Vec<Change>) {
        let id = record.id;
        let length = fs::metadata(blob::path(&self.dir, id, Kind::State)).map(|m| m.len());
        let expected = blob::bytes(&record, true).zip(blob::bytes(&record, false)).map(|(all, rows)| all - rows);
        if marks.has_state && (expected.is_none() || length.ok() != expected) {
            marks.has_state = false;
            changes.push(Change::Mark(id, marks));
        }
        self.put(id, Node { record, history, marks });
    }

    fn put(&mut self, id: u128, node: Node) {
        if node.marks.has_state {
            self.tree.insert(node.history.ids(), id);
        }
        self.bytes += node.bytes();
        if let Some(old) = self.nodes.insert(id, node) {
            self.bytes -= old.bytes();
        }
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
        if let Some(index) = self.index.as_mut().filter(|_| large)
            && let Some(known) = index.hash(&key)
        {
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
        if large && let Err(why) = self.note(&[Change::Hash(key, sum)]) {
            log::warn!("{why}");
        }
        Ok(sum)
    }

    /// The name of a snapshot in a store.
    pub fn id(&mut self, snapshot: &Snapshot) -> Result<u128> {
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

    /// Writes a snapshot; the bytes of it, 0 if it was there.
    pub fn save(&mut self, snapshot: &Snapshot) -> Result<u64> {
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
        self.tick();
        let marks = Marks { used: self.clock, has_state: true, pinned: false };
        let put = Change::Put(id, record.encode(), marks);
        let done = blob::write(&self.dir, &record, &rows, &state).and_then(|()| self.note(&[put]));
        if let Err(why) = done {
            self.remove_file(id, Kind::State);
            if fresh {
                self.remove_file(id, Kind::Rows);
            }
            return Err(why);
        }
        let node = Node { record, history: history.clone(), marks };
        let written = node.bytes();
        self.put(id, node);
        self.evict(Some(id))?;
        Ok(written)
    }

    /// Ids of the snapshots of a model that begin `ids`: longest first, of those the ones of the model's own device first.
    pub fn candidates(&mut self, model: &Model, ids: &[u32]) -> Result<Vec<u128>> {
        if self.is_view() {
            self.look()?;
        }
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

    /// Reads a snapshot and all that it rests on: each piece goes to the device as soon as it is read and summed up, and the
    /// whole is a snapshot only if all sums were right.
    pub fn load(&self, model: &Model, id: u128) -> std::result::Result<Snapshot, Trouble> {
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
        let Some(answer) = record::get_answer(&last.record.answer, last.record.end()) else {
            return broken(id, Kind::State, "its answer does not hold together".into());
        };
        let arrival = Arrival::new(model, last.record.end()).map_err(Trouble::Failed)?;
        let rows = |node: &&Node| {
            let record = &node.record;
            let stretches = arrival.stretches(record.begin..record.end()).map_err(Trouble::Failed)?;
            blob::read(&self.dir, record, Kind::Rows, |at, bytes| arrival.write(&stretches, at, bytes))
        };
        let states = arrival.fixed();
        let state = || blob::read(&self.dir, &last.record, Kind::State, |at, bytes| arrival.write(&states, at, bytes));
        let (state, rows) = rayon::join(state, || chain.par_iter().try_for_each(rows));
        rows.and(state)?;
        let moved = last.record.device != hash(snapshot::device(model).as_bytes());
        Ok(arrival.whole(last.history.clone(), answer, moved))
    }

    /// Notes that a snapshot was used.
    pub fn touch(&mut self, id: u128) -> Result<()> {
        self.tick();
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        node.marks.used = self.clock;
        let change = Change::Mark(id, node.marks);
        self.note(&[change])
    }

    /// Keeps a snapshot whatever the budget is, or no longer; false if it is not there.
    pub fn pin(&mut self, snapshot: &Snapshot, pinned: bool) -> Result<bool> {
        let id = self.id(snapshot)?;
        let Some(node) = self.nodes.get_mut(&id).filter(|n| n.marks.has_state) else { return Ok(false) };
        node.marks.pinned = pinned;
        let change = Change::Mark(id, node.marks);
        self.note(&[change])?;
        Ok(true)
    }

    /// Forgets all that is not pinned.
    pub fn clear(&mut self) -> Result<()> {
        let budget = std::mem::replace(&mut self.budget, 0);
        let done = self.evict(None);
        self.budget = budget;
        done
    }

    /// Drops a snapshot for a broken file: of states this one, of rows all that rest on it.
    pub fn forget(&mut self, id: u128, kind: Kind) -> Result<()> {
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
        let before = node.bytes();
        node.marks.has_state = false;
        self.bytes -= before - node.bytes();
        let change = Change::Mark(id, node.marks);
        self.tree.remove(node.history.ids(), |value| *value == id);
        self.note(&[change])?;
        self.remove_file(id, Kind::State);
        Ok(())
    }

    fn remove(&mut self, ids: &[u128]) -> Result<()> {
        for id in ids {
            if let Some(node) = self.nodes.remove(id) {
                self.bytes -= node.bytes();
                self.tree.remove(node.history.ids(), |value| value == id);
            }
        }
        self.note(&ids.iter().map(|id| Change::Remove(*id)).collect::<Vec<_>>())?;
        for id in ids {
            self.remove_file(*id, Kind::State);
            self.remove_file(*id, Kind::Rows);
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

    /// Drops the states of least worth until the budget is kept; `newest` goes last.
    fn evict(&mut self, newest: Option<u128>) -> Result<()> {
        while self.bytes > self.budget {
            let all = self.tree.all();
            let least = all
                .iter()
                .filter_map(|f| Some((f, self.nodes.get(f.value).filter(|n| !n.marks.pinned)?)))
                .map(|(f, n)| {
                    let idle = self.clock.saturating_sub(n.marks.used) as f64;
                    let worth = (f.depth - f.above) as f64 / (1.0 + idle);
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

impl Node {
    /// What it takes on disk. The files are there, so the sum is no more than a disk holds.
    fn bytes(&self) -> u64 {
        blob::bytes(&self.record, self.marks.has_state).unwrap_or(0)
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
