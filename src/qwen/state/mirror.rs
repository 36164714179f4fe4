//! A copy of a sequence in host memory that follows it, for the case that its device is lost.
//!
//! Keys and values are written once and never change, so a copy only adds the rows that came since the last one; states and
//! tails are copied anew. What was read after the last copy is read again: a few hundred tokens, however long the text is.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::qwen::model::Model;
use crate::qwen::state::history::History;
use crate::qwen::state::snapshot::{Snapshot, device};
use crate::qwen::state::{State, host};

/// Host memory that all copies of a process, or of a part of it, may take together.
#[derive(Debug)]
pub(crate) struct Allowance {
    /// Bytes at most.
    pub most: u64,
    /// Tokens between two copies of a sequence.
    pub every: u64,
    used: AtomicU64,
}

impl Allowance {
    pub fn new(most: u64, every: u64) -> Arc<Allowance> {
        Arc::new(Allowance { most, every, used: AtomicU64::new(0) })
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

/// Bytes taken from an [`Allowance`], given back when dropped.
#[derive(Debug)]
struct Claim {
    of: Arc<Allowance>,
    bytes: u64,
}

impl Claim {
    fn take(of: &Arc<Allowance>, bytes: u64) -> Option<Claim> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= of.most);
        of.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Claim { of: of.clone(), bytes })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.of.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The copy.
#[derive(Debug, Default)]
pub(crate) struct Mirror {
    history: History,
    /// Where it was taken, and whether that had come from elsewhere.
    device: String,
    moved: bool,
    fixed: Option<(Vec<u8>, Claim)>,
    /// Rows of ranges of positions that follow one another.
    rows: Vec<(Range<u64>, Vec<u8>, Claim)>,
}

impl Mirror {
    /// Its tokens.
    pub fn position(&self) -> u64 {
        self.history.len()
    }

    /// True if a copy of this sequence is due.
    pub fn is_due(&self, history: &History, allowance: &Allowance) -> bool {
        let held = if self.history.begins(history) { self.position() } else { 0 };
        history.len() - held >= allowance.every
    }

    /// Copies what is new. Where the allowance is used up the copy stays what it was, if that is still of this sequence.
    ///
    /// # Errors
    /// What the backend reports; the copy then stays what it was.
    pub fn update(&mut self, model: &Model, state: &State, allowance: &Arc<Allowance>) -> Result<()> {
        let history = &state.history;
        if !self.history.begins(history) {
            // Rows of the beginning that both have are still good; the state behind them is not.
            let common = |end: u64| self.history.truncated(end).begins(history);
            let kept =
                self.rows.iter().take_while(|(range, ..)| range.end <= history.len() && common(range.end)).count();
            self.rows.truncate(kept);
            (self.history, self.fixed) = (History::default(), None);
        }
        let (from, end) = (self.rows.last().map_or(0, |(range, ..)| range.end), state.position());
        let claim = |bytes| Claim::take(allowance, bytes);
        let own = if self.fixed.is_some() { 0 } else { host::fixed_bytes(model) };
        let (Some(own), Some(more)) = (claim(own), claim((end - from) * host::row_bytes(model))) else {
            return Ok(());
        };
        let snapshot = Snapshot::take(model, state, None)?;
        let (fixed, rows) = (host::fixed(&snapshot)?, host::rows(&snapshot, from..end)?);
        if end > from {
            self.rows.push((from..end, rows, more));
        }
        // States and tails take the place, and the claim, of those before.
        let own = self.fixed.take().map_or(own, |(_, before)| before);
        self.fixed = Some((fixed, own));
        (self.history, self.device, self.moved) = (state.history.clone(), device(model), state.moved);
        Ok(())
    }

    /// The copy on a model's device, if it is of a beginning of `target`.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn place(&self, model: &Model, target: &History) -> Result<Option<Snapshot>> {
        let Some((fixed, _)) = self.fixed.as_ref().filter(|_| self.history.begins(target)) else { return Ok(None) };
        let parts: Vec<(Range<u64>, &[u8])> =
            self.rows.iter().map(|(range, bytes, _)| (range.clone(), bytes.as_slice())).collect();
        let moved = self.moved || self.device != device(model);
        host::place(model, self.history.clone(), None, moved, fixed, &parts).map(Some)
    }
}
