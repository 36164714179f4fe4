//! Snapshots within a budget, found by the longest prefix.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::qwen::memory::size;
use crate::qwen::model::Model;
use crate::qwen::state::history::History;
use crate::qwen::state::snapshot::Snapshot;
#[cfg(feature = "store")]
use crate::qwen::state::store::Store;
use crate::qwen::state::tree::{Found, Tree};

/// Snapshots of any number of sequences, in a prefix tree over their tokens. Clones are the same cache.
///
/// A [`Session`](crate::qwen::Session) that has one puts snapshots into it as it reads and writes: where the system and tools
/// part ends, where the last user turns end, before and after each answer, and every so many tokens. A prompt that begins like
/// any of them is then read from there on only.
///
/// Where the budget is passed, snapshots go in the order of their worth: the tokens that would have to be read again without
/// it, from the next snapshot above it, divided by how long it has not been used. So of a recent text many are kept, of an old
/// one few and far apart, and what is costly to read goes last. Pinned ones stay.
#[derive(Debug, Clone)]
pub struct Cache {
    inner: Arc<Mutex<Inner>>,
}

/// A cache that goes when nobody else has it.
#[derive(Debug)]
pub(crate) struct WeakCache(Weak<Mutex<Inner>>);

impl WeakCache {
    pub fn upgrade(&self) -> Option<Cache> {
        self.0.upgrade().map(|inner| Cache { inner })
    }
}

#[derive(Debug)]
struct Inner {
    tree: Tree<Entry>,
    held: Held,
    budget: u64,
    every: u64,
    /// Counts what is put in and what is found.
    clock: u64,
    #[cfg(feature = "store")]
    store: Option<Arc<Store>>,
}

/// The device memory of all snapshots together, kept as they come and go.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    bytes: u64,
    /// Holders of each page, by its address: what several share counts once.
    pages: HashMap<usize, u64>,
}

impl Held {
    fn come(&mut self, snapshot: &Snapshot) {
        self.bytes += snapshot.own_bytes();
        for page in snapshot.pages() {
            let holders = self.pages.entry(Arc::as_ptr(page).addr()).or_insert(0);
            self.bytes += if *holders == 0 { page.bytes() } else { 0 };
            *holders += 1;
        }
    }

    fn go(&mut self, snapshot: &Snapshot) {
        self.bytes -= snapshot.own_bytes();
        for page in snapshot.pages() {
            let at = Arc::as_ptr(page).addr();
            match self.pages.get_mut(&at) {
                Some(holders) if *holders > 1 => *holders -= 1,
                _ => {
                    self.pages.remove(&at);
                    self.bytes -= page.bytes();
                }
            }
        }
    }
}

#[derive(Debug)]
struct Entry {
    snapshot: Snapshot,
    reason: Reason,
    pinned: Cell<bool>,
    used: Cell<u64>,
}

/// Why a snapshot was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The system and tools part ends there.
    System,
    /// A turn of the user, or a tool's result, ends there.
    User,
    /// An answer begins there.
    Prompt,
    /// An answer ended there.
    Answer,
    /// So many tokens had passed.
    Every,
    /// Somebody asked for it.
    Asked,
    /// It came from a store.
    Stored,
}

/// What a cache holds of one snapshot.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Why it was taken.
    pub reason: Reason,
    /// It stays whatever the budget is.
    pub pinned: bool,
    /// Tokens from the next snapshot above it: what would be read again without it.
    pub gap: u64,
}

/// A snapshot that had to go, and what spoke for its going first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evicted {
    /// Its tokens.
    pub position: u64,
    /// Tokens from the next snapshot above it.
    pub gap: u64,
    /// Snapshots put in and found since it was last used.
    pub idle: u64,
}

/// What a cache or a store takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Snapshots.
    pub snapshots: u64,
    /// Device memory, or disk, of all of them together; what several share counts once.
    pub bytes: u64,
    /// What they may take.
    pub budget: u64,
}

/// What did not have to be read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Tokens that the sequence has now.
    pub tokens: u64,
    /// Tokens that were asked for.
    pub total: u64,
    /// Of those that it has now, how many were read again.
    pub replayed: u64,
    /// Where the rest came from.
    pub origin: Origin,
    /// How long that took.
    pub took: Duration,
}

/// Where a beginning was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: reading begins at the first token.
    Nothing,
    /// The session was there already.
    Session,
    /// A snapshot in the cache.
    Cache,
    /// A snapshot on disk.
    Store,
}

/// Tokens between two snapshots of a long text.
const EVERY: u64 = 2048;

impl Cache {
    /// An empty cache that may take `budget` bytes of device memory, which a
    /// [`MemoryPlan`](crate::qwen::MemoryPlan) counts as what [`LoadOptions::snapshots`](crate::qwen::LoadOptions) says.
    pub fn new(budget: u64) -> Cache {
        let inner = Inner {
            tree: Tree::default(),
            held: Held::default(),
            budget,
            every: EVERY,
            clock: 0,
            #[cfg(feature = "store")]
            store: None,
        };
        Cache { inner: Arc::new(Mutex::new(inner)) }
    }

    /// The same with a snapshot every `tokens` tokens instead of 2048.
    ///
    /// # Errors
    /// [`Error::Argument`] for 0.
    pub fn every(self, tokens: u64) -> Result<Cache> {
        if tokens == 0 {
            return Err(Error::argument("tokens between snapshots", 0, "at least 1"));
        }
        self.lock().every = tokens;
        Ok(self)
    }

    /// The same with a store, where it looks for what it does not hold. Nothing goes there by itself: see [`Store::save`].
    #[cfg(feature = "store")]
    pub fn with_store(self, store: Arc<Store>) -> Cache {
        self.lock().store = Some(store);
        self
    }

    /// The snapshot with the longest beginning of `ids` that is longer than `held`, here or in the store. A store that fails
    /// is one that holds nothing: reading again is always right.
    pub(crate) fn best(&self, model: &Model, ids: &[u32], held: u64) -> Option<(Snapshot, Origin)> {
        let found = self.longest(model, ids).filter(|s| s.position() > held);
        #[cfg(feature = "store")]
        {
            let held = found.as_ref().map_or(held, Snapshot::position);
            let store = self.lock().store.clone();
            let look = |store: &Store| match store.longest(model, ids)? > held {
                true => store.load(model, ids),
                false => Ok(None),
            };
            match store.as_deref().map_or(Ok(None), look) {
                Ok(Some(stored)) if stored.position() > held => {
                    self.insert(stored.clone(), Reason::Stored);
                    return Some((stored, Origin::Store));
                }
                Ok(_) => {}
                Err(why) => log::warn!("{why}"),
            }
        }
        Some((found?, Origin::Cache))
    }

    pub(crate) fn weak(&self) -> WeakCache {
        WeakCache(Arc::downgrade(&self.inner))
    }

    pub(crate) fn interval(&self) -> u64 {
        self.lock().every
    }

    /// Keeps a snapshot; those that had to go for it, itself among them if it does not fit at all. One that is there with the
    /// same tokens is replaced.
    pub fn insert(&self, snapshot: Snapshot, reason: Reason) -> Vec<Evicted> {
        let mut inner = self.lock();
        inner.forget_gone();
        inner.clock += 1;
        if snapshot.model().is_gone() {
            return Vec::new();
        }
        let ids = snapshot.ids().to_vec();
        let of_same = |e: &Entry| e.snapshot.check(snapshot.model()).is_ok();
        let old = inner.remove(&ids, of_same);
        let pinned = Cell::new(old.iter().any(|e| e.pinned.get()));
        let used = Cell::new(inner.clock);
        inner.held.come(&snapshot);
        inner.tree.insert(&ids, Entry { snapshot: snapshot.clone(), reason, pinned, used });
        inner.evict(Some(&snapshot))
    }

    /// The snapshot with the longest beginning of `ids`.
    pub fn longest(&self, model: &Model, ids: &[u32]) -> Option<Snapshot> {
        self.find(model, ids, |_| true)
    }

    /// The longest one whose tokens were read in the pieces of `history`.
    pub(crate) fn exact(&self, model: &Model, history: &History) -> Option<Snapshot> {
        self.find(model, history.ids(), |s| s.history().begins(history))
    }

    fn find(&self, model: &Model, ids: &[u32], fits: impl Fn(&Snapshot) -> bool) -> Option<Snapshot> {
        let mut inner = self.lock();
        inner.forget_gone();
        inner.clock += 1;
        let found = inner.tree.along(ids);
        let entry =
            found.iter().rev().map(|f| f.value).find(|e| e.snapshot.check(model).is_ok() && fits(&e.snapshot))?;
        entry.used.set(inner.clock);
        Some(entry.snapshot.clone())
    }

    /// Keeps a snapshot whatever the budget is, or no longer; false if the cache does not hold it.
    pub fn pin(&self, snapshot: &Snapshot, pinned: bool) -> bool {
        let inner = self.lock();
        let found = inner.tree.along(snapshot.ids());
        let entry = found.iter().find(|f| f.value.snapshot.is(snapshot));
        entry.inspect(|f| f.value.pinned.set(pinned)).is_some()
    }

    /// Drops what is not pinned.
    pub fn clear(&self) {
        let mut inner = self.lock();
        let gone = |f: &Found<'_, Entry>| (!f.value.pinned.get()).then(|| f.value.snapshot.clone());
        let gone: Vec<Snapshot> = inner.tree.all().iter().filter_map(gone).collect();
        inner.drop_all(&gone);
    }

    /// Changes the budget, in bytes; what had to go.
    pub fn set_budget(&self, budget: u64) -> Vec<Evicted> {
        let mut inner = self.lock();
        inner.budget = budget;
        inner.evict(None)
    }

    /// All snapshots, each after those above it.
    pub fn kept(&self) -> Vec<Kept> {
        let kept = |f: &Found<'_, Entry>| Kept {
            snapshot: f.value.snapshot.clone(),
            reason: f.value.reason,
            pinned: f.value.pinned.get(),
            gap: f.depth - f.above,
        };
        let mut inner = self.lock();
        inner.forget_gone();
        inner.tree.all().iter().map(kept).collect()
    }

    /// What it takes.
    pub fn usage(&self) -> Usage {
        let mut inner = self.lock();
        inner.forget_gone();
        let all = inner.tree.all();
        debug_assert_eq!(
            inner.held,
            all.iter().fold(Held::default(), |mut held, f| {
                held.come(&f.value.snapshot);
                held
            })
        );
        Usage { snapshots: all.len() as u64, bytes: inner.held.bytes, budget: inner.budget }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Inner {
    fn remove(&mut self, ids: &[u32], gone: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let out = self.tree.remove(ids, gone);
        out.iter().for_each(|e| self.held.go(&e.snapshot));
        out
    }

    fn drop_all(&mut self, gone: &[Snapshot]) {
        for snapshot in gone {
            self.remove(snapshot.ids(), |e| e.snapshot.is(snapshot));
        }
    }

    /// Drops snapshots whose device was given up, pinned ones too.
    fn forget_gone(&mut self) {
        let gone = |f: &Found<'_, Entry>| f.value.snapshot.model().is_gone().then(|| f.value.snapshot.clone());
        let gone: Vec<Snapshot> = self.tree.all().iter().filter_map(gone).collect();
        self.drop_all(&gone);
    }

    /// Drops the snapshots of least worth until the budget is kept; `newest` goes last.
    fn evict(&mut self, newest: Option<&Snapshot>) -> Vec<Evicted> {
        let mut out = Vec::new();
        while self.held.bytes > self.budget {
            let all = self.tree.all();
            let idle = |e: &Entry| self.clock - e.used.get();
            let is_newest = |e: &Entry| newest.is_some_and(|n| e.snapshot.is(n));
            let worth = |f: &Found<'_, Entry>| (f.depth - f.above) as f64 / (1 + idle(f.value)) as f64;
            let order = |a: &&Found<'_, Entry>, b: &&Found<'_, Entry>| {
                is_newest(a.value).cmp(&is_newest(b.value)).then(worth(a).total_cmp(&worth(b)))
            };
            let Some(least) = all.iter().filter(|f| !f.value.pinned.get()).min_by(order) else { break };
            let gone = least.value.snapshot.clone();
            let gap = least.depth - least.above;
            let evicted = Evicted { position: gone.position(), gap, idle: idle(least.value) };
            log::debug!("{evicted}");
            out.push(evicted);
            self.remove(gone.ids(), |e| e.snapshot.is(&gone));
        }
        out
    }
}

impl fmt::Display for Evicted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (position, gap) = (thousands(self.position), thousands(self.gap));
        write!(f, "the snapshot at {position} went: {gap} tokens to read again, unused for {} others", self.idle)
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} snapshots, {} of {}", self.snapshots, size(self.bytes), size(self.budget))
    }
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tokens, total) = (thousands(self.tokens), thousands(self.total));
        write!(f, "{tokens} of {total} tokens restored in {}", milliseconds(self.took))?;
        if self.replayed > 0 {
            write!(f, ", {} of them read again", thousands(self.replayed))?;
        }
        Ok(())
    }
}

fn milliseconds(took: Duration) -> String {
    let ms = took.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

/// 4812 as 4,812.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        let took = Duration::from_micros(8_600);
        let restored = Restored { tokens: 4812, total: 4870, replayed: 0, origin: Origin::Cache, took };
        assert_eq!(restored.to_string(), "4,812 of 4,870 tokens restored in 8.6 ms");
        let restored = Restored { replayed: 12, took: Duration::from_millis(90), ..restored };
        assert_eq!(restored.to_string(), "4,812 of 4,870 tokens restored in 90 ms, 12 of them read again");
        assert_eq!([0, 12, 123, 1234, 1_234_567].map(thousands), ["0", "12", "123", "1,234", "1,234,567"]);
    }
}
