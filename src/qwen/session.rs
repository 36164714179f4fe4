//! One sequence on a device: tokens in, logits out.

mod revive;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::gdn;
use crate::pass::Pass;
use crate::qwen::config::LayerKind;
use crate::qwen::generate::{Answer, GenerateOptions, Generation};
use crate::qwen::layer::{self, Lane, Recorder, Scratch, Workspace};
use crate::qwen::model::{Inner, Model};
use crate::qwen::recover::Recovery;
use crate::qwen::state::State;
use crate::qwen::state::cache::{Cache, Origin, Reason, Restored};
use crate::qwen::state::history::History;
use crate::qwen::state::mirror::Mirror;
use crate::qwen::state::snapshot::Snapshot;
use crate::qwen::turns::Ended;

/// A sequence of a [`Model`]: what it has read so far, and the memory to read more.
///
/// An error that names an argument leaves the sequence as it was. After one of the device it has to be [reset](Session::reset)
/// or [restored](Session::restore).
///
/// # Going back
/// [`Session::snapshot`] takes what the sequence is as a value, [`Session::restore`] makes it that again, bit by bit, and
/// [`Session::fork`] makes another session of it. [`Session::rewind`] goes to any earlier token: to a snapshot before it that
/// its [cache](Session::set_cache) holds, from where the tokens up to it are read again in the pieces in which they were read
/// first, so that what follows has the same bits.
///
/// Prompts are cut at multiples of a fixed length, counted from the first token, and where snapshots are due; the cuts depend on
/// the text alone, so that a prompt which begins in the cache gives the bits of one that is read whole.
///
/// # Losing the device
/// A session of a [`Recovery`] goes on after its device has failed: reading, answering, resetting, restoring, reusing and
/// rewinding, also in a [`Batch`](crate::qwen::Batch), end as if nothing had happened, on the model that then takes the place of
/// the old one. Only [`Session::snapshot`] and [`Session::fork`], which change nothing, report the error, unless
/// [`Session::insist`] calls them.
#[derive(Debug)]
pub struct Session {
    model: Model,
    state: State,
    /// The pass of one token, with the first position that it was not recorded for.
    step: Option<(Step, u64)>,
    /// Changes with the memory that a recorded pass names; no two sessions have the same.
    pub(crate) mark: u64,
    /// The answer under way, or the last one where it can go on.
    pub(crate) answer: Option<Answer>,
    cache: Option<Cache>,
    recovery: Option<Recovery>,
    mirror: Mirror,
    failed: bool,
}

/// What a pass leaves behind besides the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// Nothing: more tokens follow.
    State,
    /// The logits of the last token.
    Logits,
    /// The index of its largest logit.
    Argmax,
}

#[derive(Debug)]
struct Step {
    want: Want,
    pass: Pass,
}

/// What came back.
pub(crate) enum Got {
    Nothing,
    Logits(Vec<f32>),
    Argmax(u32),
}

/// Positions that the pass of one token covers before it is recorded again: attention walks all of them.
const STEP_POSITIONS: u64 = 512;

/// Of the user's last turns, so many get a snapshot where they end.
const USER_TURNS: usize = 2;

impl Session {
    pub(crate) fn new(model: Model) -> Result<Session> {
        let inner = &model.inner;
        let backend = inner.backend.as_ref();
        let state = State::new(&inner.config, backend, inner.plan.context, inner.plan.kv)?;
        with_workspace(inner, |_| Ok(()))?;
        let (step, answer, cache, recovery) = (None, None, None, None);
        let mirror = Mirror::default();
        Ok(Session { state, step, mark: mark(), answer, cache, recovery, mirror, failed: false, model })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The ids that the sequence consists of so far.
    pub fn ids(&self) -> &[u32] {
        self.state.history.ids()
    }

    /// Where snapshots go while the session reads and writes, and where it looks for beginnings; none by default.
    pub fn set_cache(&mut self, cache: Option<Cache>) {
        self.cache = cache;
    }

    /// The cache that it uses.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()
    }

    /// Forgets everything; keeps the memory.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn reset(&mut self) -> Result<()> {
        self.become_what(&History::default(), None, |session| session.clear())
    }

    fn clear(&mut self) -> Result<()> {
        self.failed = true;
        self.answer = None;
        if self.state.is_nowhere() {
            self.seat()?;
        } else {
            self.state.clear(self.model.inner.backend.as_ref())?;
        }
        self.failed = false;
        Ok(())
    }

    /// What the sequence is now. Costs a copy of states and tails on the device and no other memory: keys and values are
    /// shared.
    ///
    /// # Errors
    /// [`Error::Argument`] if the session failed; what the backend reports.
    pub fn snapshot(&self) -> Result<Snapshot> {
        self.usable()?;
        Snapshot::take(&self.model, &self.state, self.answer.as_ref())
    }

    /// Becomes what a snapshot holds, whatever the session was, a failed one too. In a session of a [`Recovery`] a snapshot
    /// of a device that is lost is as good as any: its tokens are read again.
    ///
    /// # Errors
    /// [`Error::Argument`] for a snapshot of another model or another loading of it; what the backend reports.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        if !self.outlives(snapshot) {
            snapshot.check(&self.model)?;
        }
        self.become_what(snapshot.history(), snapshot.answer(), |session| session.put(snapshot))
    }

    fn put(&mut self, snapshot: &Snapshot) -> Result<()> {
        snapshot.check(&self.model)?;
        self.failed = true;
        if self.state.is_nowhere() {
            self.seat()?;
        }
        // Recorded passes name the pages of what the session was.
        self.moved();
        snapshot.put(&mut self.state)?;
        self.answer = snapshot.answer().cloned();
        self.failed = false;
        Ok(())
    }

    /// Another session that goes on from here, with the same cache. Both share keys and values up to here, without a copy
    /// until one writes over what the other has.
    ///
    /// # Errors
    /// As [`Session::snapshot`].
    pub fn fork(&self) -> Result<Session> {
        let snapshot = self.snapshot()?;
        let mut fork = Session::new(self.model.clone())?;
        (fork.cache, fork.recovery) = (self.cache.clone(), self.recovery.clone());
        fork.restore(&snapshot)?;
        Ok(fork)
    }

    /// Goes back to the first `tokens` tokens: to the nearest snapshot in the cache, or to the begin, and on from there by
    /// reading again what lies between, in the pieces in which it was read. Where `tokens` lies inside such a piece, it is cut
    /// there. What an answer was drawn with is forgotten unless the snapshot is of that very token.
    ///
    /// # Errors
    /// [`Error::Argument`] for more tokens than there are, or if the session failed; what the backend reports.
    pub fn rewind(&mut self, tokens: u64) -> Result<Restored> {
        self.follow()?;
        self.usable()?;
        let begin = Instant::now();
        let position = self.state.position();
        if tokens > position {
            return Err(Error::argument("tokens to rewind to", tokens, format!("at most the {position} there are")));
        }
        let mut restored =
            Restored { tokens, total: tokens, replayed: 0, origin: Origin::Session, took: Duration::ZERO };
        if tokens < position {
            let target = self.state.history.truncated(tokens);
            restored.origin = match self.cache.as_ref().and_then(|cache| cache.exact(&self.model, &target)) {
                Some(snapshot) => {
                    self.restore(&snapshot)?;
                    Origin::Cache
                }
                None => {
                    self.reset()?;
                    Origin::Nothing
                }
            };
            let from = self.state.position();
            restored.replayed = tokens - from;
            for piece in target.pieces(from..tokens) {
                self.append(&target.ids()[piece], Want::State)?;
                self.answer = None;
            }
        }
        restored.took = begin.elapsed();
        Ok(restored)
    }

    /// Becomes the longest known beginning of `ids`, short of their last: what the session holds already, or a snapshot in its
    /// cache or in the store behind that. The rest, `ids[restored.tokens..]`, is to be read.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ids; what the backend reports.
    pub fn reuse(&mut self, ids: &[u32]) -> Result<Restored> {
        let begin = Instant::now();
        self.follow()?;
        let Some((_, before)) = ids.split_last() else {
            return Err(Error::argument("ids", "none", "at least one"));
        };
        let held = if !self.failed && before.starts_with(self.ids()) { self.state.position() } else { 0 };
        let origin = match self.cache.as_ref().and_then(|cache| cache.best(&self.model, before, held)) {
            Some((snapshot, origin)) => {
                self.restore(&snapshot)?;
                origin
            }
            None if held > 0 => Origin::Session,
            None => {
                self.reset()?;
                Origin::Nothing
            }
        };
        let (tokens, total) = (self.state.position(), ids.len() as u64);
        Ok(Restored { tokens, total, replayed: 0, origin, took: begin.elapsed() })
    }

    /// Appends tokens; the logits `[vocab]` of the last. `progress` gets the tokens done and their number after each piece.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ids, an id outside the vocabulary or more than the context holds; what the backend reports.
    pub fn prefill(&mut self, ids: &[u32], progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<f32>> {
        self.check(ids)?;
        self.answer = None;
        let total = ids.len();
        let mut done = 0;
        for (end, reason) in self.cuts(ids) {
            let want = if end == total { Want::Logits } else { Want::State };
            let got = self.append(&ids[done..end], want)?;
            done = end;
            self.keep(reason);
            progress(done as u64, total as u64);
            if let Got::Logits(logits) = got {
                return Ok(logits);
            }
        }
        Ok(Vec::new())
    }

    /// Appends tokens; the logits `[T, vocab]` of all of them.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(ids)?;
        self.answer = None;
        let mut out = Vec::with_capacity(ids.len() * self.model.inner.config.vocab as usize);
        let mut done = 0;
        for (end, reason) in self.cuts(ids) {
            out.extend(self.append_all(&ids[done..end])?);
            done = end;
            self.keep(reason);
        }
        Ok(out)
    }

    /// Appends a piece; the logits of all of it.
    fn append_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let inner = self.model.inner.clone();
        let (vocab, backend) = (inner.config.vocab as u64, inner.backend.as_ref());
        with_workspace(&inner, |work| {
            self.append_in(work, ids, Want::State)?;
            self.failed = true;
            let mut out = Vec::with_capacity(ids.len() * vocab as usize);
            let (step, rows) = (inner.sizes.logit_rows, ids.len() as u64);
            for first in (0..rows).step_by(step as usize) {
                let block = first..rows.min(first + step);
                let n = block.end - block.start;
                let mut pass = Pass::new();
                recorder(&inner, &work.scratch, &[], None).head(&mut pass, block)?;
                backend.load(&pass)?;
                backend.run(&pass)?;
                out.extend(backend.read(&work.scratch.logits.slice(0, n * vocab * 4)?)?.wait_as::<f32>()?);
            }
            self.failed = false;
            Ok(out)
        })
    }

    /// Appends tokens and answers: an iterator over what happens. Nothing is computed before its first item is asked for.
    ///
    /// # Errors
    /// As [`Session::prefill`] for the ids; [`Error::Argument`] for options out of range.
    pub fn generate(&mut self, ids: &[u32], options: &GenerateOptions) -> Result<Generation<'_>> {
        self.check(ids)?;
        Generation::new(self, ids, options)
    }

    /// Goes on with the answer that was under way in the snapshot restored last, or in this session when it was stopped: with
    /// the sampler as it was, so that what follows is what would have followed. Of `options` the sampling and the seed do not
    /// count, and `max_tokens` counts the whole answer.
    ///
    /// # Errors
    /// [`Error::Argument`] if no answer was under way, or if the session failed.
    pub fn resume(&mut self, options: &GenerateOptions) -> Result<Generation<'_>> {
        self.usable()?;
        Generation::resume(self, options)
    }

    /// Where reading `ids` is cut: the end of each piece, and why a snapshot is due there.
    pub(crate) fn cuts(&self, ids: &[u32]) -> Vec<(usize, Option<Reason>)> {
        let (piece, start) = (self.model.inner.sizes.piece as usize, self.ids().len());
        let total = start + ids.len();
        let mut ends: BTreeMap<usize, Option<Reason>> = BTreeMap::new();
        ends.extend((start / piece + 1..=total / piece).map(|i| (i * piece, None)));
        ends.insert(total, None);
        if let Some(cache) = &self.cache {
            let every = cache.interval() as usize;
            ends.extend((start / every + 1..=total / every).map(|i| (i * every, Some(Reason::Every))));
            let all = [self.ids(), ids].concat();
            let turns = self.model.inner.turns.as_ref().map(|t| t.ends(&all)).unwrap_or_default();
            let users = turns.iter().rev().filter(|(_, ended)| *ended == Ended::User).take(USER_TURNS);
            ends.extend(users.map(|(at, _)| (*at, Some(Reason::User))));
            ends.extend(turns.iter().take(1).filter(|t| t.1 == Ended::System).map(|t| (t.0, Some(Reason::System))));
        }
        ends.into_iter().filter(|(end, _)| *end > start).map(|(end, reason)| (end - start, reason)).collect()
    }

    /// Puts a snapshot into the cache, if there is one and a reason. What stands against it is no reason to fail.
    pub(crate) fn keep(&self, reason: Option<Reason>) {
        if let (Some(cache), Some(reason)) = (&self.cache, reason) {
            match self.snapshot() {
                Ok(snapshot) => drop(cache.insert(snapshot, reason)),
                Err(why) => {
                    log::warn!("no snapshot of {} tokens: {why}", self.ids().len());
                    if matches!(why, Error::OutOfMemory { .. }) {
                        cache.set_budget(cache.usage().bytes / 2);
                    }
                }
            }
        }
    }

    /// True if a snapshot is due after this many tokens, wherever they came from.
    pub(crate) fn is_due(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| self.state.position().is_multiple_of(cache.interval()))
    }

    /// True if the context has no room for another token.
    pub(crate) fn is_full(&self) -> bool {
        self.state.position() >= self.model.inner.plan.context
    }

    fn usable(&self) -> Result<()> {
        if self.failed {
            return Err(Error::argument("session", "one whose last pass failed", "one that was reset or restored"));
        }
        Ok(())
    }

    pub(crate) fn check(&self, ids: &[u32]) -> Result<()> {
        self.usable()?;
        if ids.is_empty() {
            return Err(Error::argument("ids", "none", "at least one"));
        }
        let vocab = self.model.inner.config.vocab;
        if let Some(i) = ids.iter().position(|id| *id >= vocab) {
            return Err(Error::argument(format!("ids[{i}]"), ids[i], format!("below the vocabulary's {vocab}")));
        }
        let (position, context) = (self.state.position(), self.model.inner.plan.context);
        if ids.len() as u64 > context - position.min(context) {
            let found = format!("{} more after {position}", ids.len());
            return Err(Error::argument("ids", found, format!("at most the context's {context} in all")));
        }
        Ok(())
    }

    /// Runs one piece, whose ids have been checked, on the device as it is now.
    fn append_once(&mut self, ids: &[u32], want: Want) -> Result<Got> {
        with_workspace(&self.model.inner.clone(), |work| self.append_in(work, ids, want))
    }

    fn append_in(&mut self, work: &mut Workspace, ids: &[u32], want: Want) -> Result<Got> {
        let inner = self.model.inner.clone();
        let (config, backend) = (&inner.config, inner.backend.as_ref());
        let (start, tokens) = (self.state.position(), ids.len() as u64);
        // Memory first: without it the sequence is still what it was.
        self.grow(start + tokens)?;
        self.failed = true;
        backend.write(&work.scratch.inputs.view(), &layer::inputs(backend.caps(), config, &[(ids, start)]))?;
        if tokens == 1 {
            self.record_step(&work.scratch, start, want)?;
            if let Some((step, _)) = &self.step {
                backend.run(&step.pass)?;
            }
        } else {
            let own;
            let prefill = if tokens == inner.sizes.piece {
                if work.piece.is_none() {
                    work.piece = layer::prefill(backend, config, tokens)?;
                }
                work.piece.as_ref()
            } else {
                own = layer::prefill(backend, config, tokens)?;
                own.as_ref()
            };
            let pass = self.record(&work.scratch, tokens, start..start + tokens, prefill, want)?;
            backend.load(&pass)?;
            backend.run(&pass)?;
        }
        let got = self.read(&work.scratch, want)?;
        self.state.history.push(ids);
        self.failed = false;
        Ok(got)
    }

    /// Makes room for one token more, which another's pass is going to append.
    pub(crate) fn grow_one(&mut self) -> Result<()> {
        self.grow(self.state.position() + 1)
    }

    /// A pass that appends to the sequence begins: until it is [done](Session::pass_done), the sequence is in between.
    pub(crate) fn pass_begins(&mut self) {
        (self.failed, self.answer) = (true, None);
    }

    /// The pass has appended this token.
    pub(crate) fn pass_done(&mut self, id: u32) {
        self.state.history.push(&[id]);
        self.failed = false;
        if self.is_due() {
            self.keep(Some(Reason::Every));
        }
    }

    /// The sequence as a lane of a pass over one token, at one of these positions.
    pub(crate) fn lane(&self, positions: Range<u64>) -> Lane<'_> {
        Lane { state: &self.state, tokens: 1, positions }
    }

    /// Makes room for the positions up to `end`, if need be in place of what the cache holds.
    fn grow(&mut self, end: u64) -> Result<()> {
        let inner = self.model.inner.clone();
        let moved = match (self.state.grow(inner.backend.as_ref(), end), &self.cache) {
            (Err(why @ Error::OutOfMemory { .. }), Some(cache)) => {
                log::warn!("the cache is cleared: {why}");
                cache.clear();
                self.state.grow(inner.backend.as_ref(), end).map(|_| true)
            }
            (grown, _) => grown,
        }?;
        if moved {
            self.moved();
        }
        Ok(())
    }

    /// The memory of the sequence is elsewhere now.
    fn moved(&mut self) {
        self.step = None;
        self.mark = mark();
    }

    fn read(&self, scratch: &Scratch, want: Want) -> Result<Got> {
        let backend = self.model.inner.backend.as_ref();
        Ok(match want {
            Want::State => {
                backend.wait()?;
                Got::Nothing
            }
            Want::Logits => {
                let bytes = self.model.inner.config.vocab as u64 * 4;
                Got::Logits(backend.read(&scratch.logits.slice(0, bytes)?)?.wait_as()?)
            }
            Want::Argmax => {
                let ids: Vec<u32> = backend.read(&scratch.next.slice(0, 4)?)?.wait_as()?;
                match ids.first() {
                    Some(id) if *id < self.model.inner.config.vocab => Got::Argmax(*id),
                    _ => return Err(Error::argument("logits", "NaN only", "numbers")),
                }
            }
        })
    }

    /// Makes the pass of one token ready for position `at`.
    fn record_step(&mut self, scratch: &Scratch, at: u64, want: Want) -> Result<()> {
        if self.step.as_ref().is_some_and(|(step, end)| step.want == want && at < *end) {
            return Ok(());
        }
        let end = self.step_end(at);
        let pass = self.record(scratch, 1, at..end, None, want)?;
        self.model.inner.backend.load(&pass)?;
        self.step = Some((Step { want, pass }, end));
        Ok(())
    }

    /// The first position that a pass of one token, recorded for position `at`, is not good for.
    pub(crate) fn step_end(&self, at: u64) -> u64 {
        // Without full attention nothing in the pass depends on the position.
        let full = self.model.inner.config.count(LayerKind::Full) > 0;
        if full { self.state.page_end(at).min((at / STEP_POSITIONS + 1) * STEP_POSITIONS) } else { u64::MAX }
    }

    fn record(
        &self,
        scratch: &Scratch,
        tokens: u64,
        positions: Range<u64>,
        prefill: Option<&gdn::Prefill>,
        want: Want,
    ) -> Result<Pass> {
        let lanes = [Lane { state: &self.state, tokens, positions }];
        let recorder = recorder(&self.model.inner, scratch, &lanes, prefill);
        let mut pass = Pass::new();
        recorder.trunk(&mut pass)?;
        if want != Want::State {
            recorder.head(&mut pass, tokens - 1..tokens)?;
        }
        if want == Want::Argmax {
            recorder.argmax(&mut pass)?;
        }
        Ok(pass)
    }
}

/// What passes of a model are recorded with.
pub(crate) fn recorder<'a>(
    inner: &'a Inner,
    scratch: &'a Scratch,
    lanes: &'a [Lane<'a>],
    prefill: Option<&'a gdn::Prefill>,
) -> Recorder<'a> {
    Recorder {
        config: &inner.config,
        weights: &inner.weights,
        caps: inner.backend.caps(),
        scratch,
        kv: inner.plan.kv,
        lanes,
        prefill,
    }
}

/// A number that no session has yet.
fn mark() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Does something in the model's workspace, while no other session does.
pub(crate) fn with_workspace<T>(inner: &Inner, work: impl FnOnce(&mut Workspace) -> Result<T>) -> Result<T> {
    let mut guard = inner.workspace.lock().unwrap_or_else(|e| e.into_inner());
    let workspace = match &mut *guard {
        Some(workspace) => workspace,
        slot => slot.insert(Workspace::new(inner.backend.as_ref(), &inner.sizes)?),
    };
    work(workspace)
}
