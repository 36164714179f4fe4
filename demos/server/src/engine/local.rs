//! The runtime of this repository: a session in each slot, one pass for the next tokens of all, and snapshots of what was read.

use gatedelta::qwen::{Batch, Cache, Model, Reason, Recovery, Session};
use gatedelta::tune::{Class, Kind};
use gatedelta::{Error, Result};

use super::Engine;

/// See the [module](self).
pub struct Local {
    recovery: Recovery,
    slots: Vec<Slot>,
    batch: Batch,
    cache: Cache,
    /// `<|im_start|>`: turns of a chat begin with it.
    turn: Option<u32>,
    /// Counts answers.
    clock: u64,
}

struct Slot {
    session: Session,
    /// When it was used last.
    used: u64,
    /// What it holds is not to be trusted.
    failed: bool,
    /// Tokens of its prompt after which snapshots are due, and why.
    marks: Vec<(usize, Reason)>,
}

/// Tokens that a slow device reads at a time: others wait so long for their next token.
const SLOW_PIECE: u64 = 64;

impl Local {
    /// Empty slots for `slots` sequences, and a cache of `budget` bytes.
    ///
    /// # Errors
    /// What the device reports.
    pub fn new(recovery: &Recovery, slots: usize, budget: u64) -> Result<Local> {
        let slot = |_| Ok(Slot { session: recovery.session()?, used: 0, failed: false, marks: Vec::new() });
        let cache = Cache::new(budget);
        recovery.watch(&cache);
        let model = recovery.model();
        Ok(Local {
            recovery: recovery.clone(),
            slots: (0..slots).map(slot).collect::<Result<_>>()?,
            batch: Batch::new(&model),
            cache,
            turn: model.tokenizer()?.id("<|im_start|>"),
            clock: 0,
        })
    }

    /// Where the instructions end and where the last answer begins: other prompts go on from there.
    fn marks(&self, ids: &[u32]) -> Vec<(usize, Reason)> {
        let turns: Vec<usize> = (1..ids.len()).filter(|at| Some(ids[*at]) == self.turn).collect();
        match turns.as_slice() {
            [] => Vec::new(),
            [only] => vec![(*only, Reason::User)],
            [first, .., last] => vec![(*first, Reason::System), (*last, Reason::User)],
        }
    }

    fn append(&mut self, slot: usize, ids: &[u32]) -> Result<Vec<f32>> {
        let slot = &mut self.slots[slot];
        let logits = slot.session.prefill(ids, &mut |_, _| {});
        slot.failed |= logits.is_err();
        logits
    }

    /// Puts a snapshot of a slot into the cache. What stands against it is no reason to fail.
    fn keep(&self, slot: usize, reason: Reason) {
        match self.slots[slot].session.snapshot() {
            Ok(snapshot) => drop(self.cache.insert(snapshot, reason)),
            Err(why) => {
                log::warn!("no snapshot: {why}");
                if matches!(why, Error::OutOfMemory { .. }) {
                    self.cache.clear();
                }
            }
        }
    }
}

/// Tokens that are read at a time, counted from the first: where a prompt is cut depends on the prompt and the device alone.
fn piece(model: &Model) -> usize {
    let caps = model.backend().caps();
    let slow = caps.kind == Kind::Cpu || caps.class == Class::Software;
    let own = model.memory().piece;
    (if slow { own.min(SLOW_PIECE) } else { own }).max(1) as usize
}

impl Slot {
    /// How many tokens of `ids` it holds. A recurrent state cannot be cut: it is all of them or none.
    fn holds(&self, ids: &[u32]) -> usize {
        let held = self.session.ids();
        if !self.failed && held.len() < ids.len() && ids.starts_with(held) { held.len() } else { 0 }
    }
}

impl Engine for Local {
    fn slots(&self) -> usize {
        self.slots.len()
    }

    fn begin(&mut self, free: &[usize], ids: &[u32]) -> Result<(usize, usize)> {
        self.clock += 1;
        let missing =
            |what: &str| Error::Argument { what: what.into(), found: "none".into(), expected: "at least one".into() };
        let Some((_, before)) = ids.split_last() else { return Err(missing("ids")) };
        // A slot that holds the longest beginning; of those that hold none, what has been idle for longest.
        let worth = |at: &usize| (self.slots[*at].holds(ids), std::cmp::Reverse(self.slots[*at].used));
        let mut at = free.iter().copied().max_by_key(worth).ok_or_else(|| missing("free slots"))?;
        let held = self.slots[at].holds(ids);
        let snapshot = self.cache.longest(&self.recovery.model(), before).filter(|s| s.position() > held as u64);
        if snapshot.is_some() {
            let idle = free.iter().copied().min_by_key(|at| self.slots[*at].used);
            at = idle.unwrap_or(at);
        }
        let marks = self.marks(ids);
        let slot = &mut self.slots[at];
        (slot.used, slot.marks) = (self.clock, marks);
        slot.failed = true;
        match snapshot {
            Some(snapshot) => slot.session.restore(&snapshot)?,
            None if held == 0 => slot.session.reset()?,
            None => {}
        }
        slot.failed = false;
        Ok((at, slot.session.ids().len()))
    }

    fn read(&mut self, slot: usize, prompt: &[u32], done: usize) -> Result<(usize, Vec<f32>)> {
        let piece = piece(self.slots[slot].session.model());
        let next = prompt.len().min((done / piece + 1) * piece);
        let mark = self.slots[slot].marks.iter().copied().find(|(at, _)| (done + 1..=next).contains(at));
        let end = mark.map_or(next, |(at, _)| at);
        let logits = self.append(slot, &prompt[done..end])?;
        if let Some((_, reason)) = mark {
            self.keep(slot, reason);
        }
        Ok((end, logits))
    }

    fn step(&mut self, tokens: &[(usize, u32)]) -> Vec<Result<Vec<f32>>> {
        let of = |at: usize| tokens.iter().position(|(slot, _)| *slot == at);
        let mut order = Vec::with_capacity(tokens.len());
        let mut sessions = Vec::with_capacity(tokens.len());
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if let Some(i) = of(at) {
                order.push(i);
                sessions.push((&mut slot.session, &mut slot.failed));
            }
        }
        let (mut sessions, failed): (Vec<_>, Vec<_>) = sessions.into_iter().unzip();
        let ids: Vec<u32> = order.iter().map(|i| tokens[*i].1).collect();
        match self.batch.step(&mut sessions, &ids) {
            Ok(logits) => {
                let vocab = self.recovery.model().config().vocab as usize;
                let mut out: Vec<Result<Vec<f32>>> = (0..tokens.len()).map(|_| Ok(Vec::new())).collect();
                for (i, row) in order.into_iter().zip(logits.chunks_exact(vocab)) {
                    out[i] = Ok(row.to_vec());
                }
                out
            }
            Err(why) => {
                failed.into_iter().for_each(|failed| *failed = true);
                tokens.iter().map(|_| Err(why.clone())).collect()
            }
        }
    }

    fn end(&mut self, slot: usize) {
        if !self.slots[slot].failed && !self.slots[slot].session.ids().is_empty() {
            self.keep(slot, Reason::Answer);
        }
    }
}
