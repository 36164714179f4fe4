//! A session that outlives its device: what it has read comes back on the model in the place of the one that failed.
//!
//! Tokens, the pieces in which they were read, and what the answer is drawn with are in host memory, and change only once a pass
//! has succeeded. So a sequence can always be made again, with the same bits on the same kind of device: from the longest of the
//! snapshots in its cache and the copy in host memory, and from there on by reading its tokens again.

use std::sync::Arc;

use super::{Got, Session, Want};
use crate::error::{Error, Result};
use crate::qwen::generate::Answer;
use crate::qwen::model::Model;
use crate::qwen::recover::Recovery;
use crate::qwen::state::State;
use crate::qwen::state::history::History;
use crate::qwen::state::mirror::Mirror;
use crate::qwen::state::snapshot::Snapshot;

impl Session {
    /// The same with something that opens its device again.
    pub(crate) fn lasting(mut self, recovery: Recovery) -> Session {
        self.recovery = Some(recovery);
        self
    }

    /// What brings it back when its device fails; none in a session of a [`Model`] alone.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.recovery.as_ref()
    }

    /// Does what cannot come back by itself, such as [`Session::snapshot`], and where the device fails in it comes back and does it
    /// again.
    ///
    /// # Errors
    /// What it gives, if that is no error of the device or if nothing is left to go on with.
    pub fn insist<T>(&mut self, what: impl Fn(&Session) -> Result<T>) -> Result<T> {
        let mut freed = false;
        loop {
            match what(self) {
                Ok(done) => return Ok(done),
                Err(why) => self.recover(why, &mut freed)?,
            }
        }
    }

    /// Runs one piece, whose ids have been checked, whatever becomes of the device meanwhile.
    pub(crate) fn append(&mut self, ids: &[u32], want: Want) -> Result<Got> {
        self.follow()?;
        let (mut rest, mut freed) = (ids, false);
        loop {
            let (piece, after) = self.piece(rest);
            match self.append_once(piece, if after.is_empty() { want } else { Want::State }) {
                Ok(got) if after.is_empty() => {
                    if let Err(why) = self.mirror() {
                        self.recover(why, &mut freed)?;
                    }
                    return Ok(got);
                }
                Ok(_) => rest = after,
                Err(why) => self.recover(why, &mut freed)?,
            }
        }
    }

    /// The same for the logits of all ids.
    pub(super) fn append_all(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.follow()?;
        let (mut rest, mut freed, mut out) = (ids, false, Vec::new());
        while !rest.is_empty() {
            let before = self.state.position();
            let (piece, after) = self.piece(rest);
            match self.append_logits(piece) {
                Ok(logits) => {
                    out.extend(logits);
                    rest = after;
                }
                Err(why) => {
                    // The piece may have been read without its logits having arrived.
                    if self.state.position() > before {
                        self.state.history = self.state.history.truncated(before);
                    }
                    self.recover(why, &mut freed)?;
                }
            }
        }
        Ok(out)
    }

    /// The next piece of ids and the rest: what takes the place of a lost device may take smaller ones.
    fn piece<'a>(&self, ids: &'a [u32]) -> (&'a [u32], &'a [u32]) {
        ids.split_at(ids.len().min(self.most()))
    }

    fn most(&self) -> usize {
        (self.model.inner.sizes.piece as usize).max(1)
    }

    /// Becomes a sequence of these tokens: by `how`, or where the device fails in it by reading them again.
    pub(super) fn become_what(
        &mut self,
        target: &History,
        answer: Option<&Answer>,
        how: impl FnOnce(&mut Session) -> Result<()>,
    ) -> Result<()> {
        // What it was is of no use any more.
        self.follow_as(&History::default())?;
        let Err(why) = how(self) else { return Ok(()) };
        let Some(recovery) = self.recovery.clone() else { return Err(why) };
        let mut freed = false;
        let model = match why {
            // A snapshot of a device that is gone.
            Error::Argument { .. } => self.model.clone(),
            why => self.successor(&recovery, &self.model, &why, &mut freed)?,
        };
        self.rebuild(&recovery, model, target, freed)?;
        self.answer = answer.cloned();
        self.failed = false;
        Ok(())
    }

    /// True for a snapshot of a model whose place this session's has taken.
    pub(super) fn outlives(&self, snapshot: &Snapshot) -> bool {
        self.recovery.as_ref().is_some_and(|recovery| recovery.knows(snapshot.model()))
    }

    /// Moves to the model that has taken the place of its own, if one has.
    pub(crate) fn follow(&mut self) -> Result<()> {
        self.follow_as(&self.state.history.clone())
    }

    fn follow_as(&mut self, target: &History) -> Result<()> {
        let Some(recovery) = self.recovery.clone() else { return Ok(()) };
        let model = recovery.model();
        if Arc::ptr_eq(&model.inner, &self.model.inner) {
            return Ok(());
        }
        // What had failed before for another reason is no better there.
        let failed = self.failed;
        self.rebuild(&recovery, model, target, false)?;
        self.failed = failed;
        Ok(())
    }

    /// Comes back after an error in a pass, as the sequence was before it: what was to be read is to be read again. `freed`
    /// tells whether memory was freed for this pass before.
    pub(crate) fn recover(&mut self, why: Error, freed: &mut bool) -> Result<()> {
        let Some(recovery) = self.recovery.clone() else { return Err(why) };
        let model = self.successor(&recovery, &self.model, &why, freed)?;
        if self.failed || !Arc::ptr_eq(&model.inner, &self.model.inner) {
            let target = self.state.history.clone();
            self.rebuild(&recovery, model, &target, *freed)?;
            self.failed = false;
        }
        Ok(())
    }

    /// True if it is of the same family as `model`, on whose place it would go on, and there already; or of another family.
    pub(crate) fn follows(&self, model: &Model) -> bool {
        let of_it = self.recovery.as_ref().is_some_and(|recovery| recovery.knows(model));
        !of_it || Arc::ptr_eq(&self.model.inner, &model.inner)
    }

    /// As [`Session::mirror`], after a pass that has succeeded whatever comes of it.
    pub(crate) fn mirror_or_recover(&mut self) {
        if let Err(why) = self.mirror()
            && let Err(why) = self.recover(why, &mut false)
        {
            log::error!("{} tokens are lost: {why}", self.state.position());
        }
    }

    /// True if a pass over it failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }

    /// What to go on with after an error on `model`: the same once where memory can be freed, else what takes its place.
    fn successor(&self, recovery: &Recovery, model: &Model, why: &Error, freed: &mut bool) -> Result<Model> {
        if why.is_out_of_memory() && !*freed && !model.is_gone() {
            *freed = true;
            recovery.free(why, self.cache.as_ref());
            return Ok(model.clone());
        }
        recovery.replace(model, why)
    }

    /// Makes the sequence anew on `model`, or on what takes its place where that fails too.
    fn rebuild(&mut self, recovery: &Recovery, mut model: Model, target: &History, mut freed: bool) -> Result<()> {
        loop {
            let Err(why) = self.rebuild_once(&model, target) else { return Ok(()) };
            match self.successor(recovery, &model, &why, &mut freed) {
                Ok(next) => model = next,
                Err(why) => {
                    // The tokens are still known, and a device may come back.
                    self.state = self.state.nowhere();
                    self.state.history = target.clone();
                    return Err(why);
                }
            }
        }
    }

    fn rebuild_once(&mut self, model: &Model, target: &History) -> Result<()> {
        self.failed = true;
        self.moved();
        // What is left of the old memory goes before the new is asked for.
        self.state = self.state.nowhere();
        self.model = model.clone();
        self.seat()?;
        let cached = self.cache.as_ref().and_then(|cache| cache.exact(model, target));
        let reach = |snapshot: &Option<Snapshot>| snapshot.as_ref().map_or(0, Snapshot::position);
        let mirrored = if self.mirror.position() > reach(&cached) { self.mirror.place(model, target)? } else { None };
        let nearest = if reach(&mirrored) > reach(&cached) { mirrored } else { cached };
        if let Some(snapshot) = nearest {
            snapshot.put(&mut self.state)?;
        }
        let from = self.state.position();
        for piece in target.pieces(from..target.len()) {
            for part in target.ids()[piece].chunks(self.most()) {
                self.append_once(part, Want::State)?;
            }
        }
        if target.len() > 0 {
            let name = &model.backend().caps().name;
            log::info!("{} tokens are back on {name}, {} of them read again", target.len(), target.len() - from);
        }
        Ok(())
    }

    /// Takes memory for an empty sequence, where it has none.
    pub(super) fn seat(&mut self) -> Result<()> {
        let inner = &self.model.inner;
        self.state = State::new(&inner.config, inner.backend.as_ref(), inner.plan.context, inner.plan.kv)?;
        Ok(())
    }

    /// Brings the copy in host memory up to date where that is due.
    pub(crate) fn mirror(&mut self) -> Result<()> {
        let Some(allowance) = self.recovery.as_ref().map(Recovery::allowance) else { return Ok(()) };
        if allowance.most == 0 {
            self.mirror = Mirror::default();
            return Ok(());
        }
        if !self.mirror.is_due(&self.state.history, &allowance) {
            return Ok(());
        }
        match self.mirror.update(&self.model, &self.state, &allowance) {
            Err(why) if why.is_out_of_memory() => {
                log::warn!("no copy of {} tokens in host memory: {why}", self.state.position());
                Ok(())
            }
            other => other,
        }
    }
}
