//! Several sequences in one pass: the next token of each.

use crate::error::{Error, Result};
use crate::pass::Pass;
use crate::qwen::layer::{self, Scratch};
use crate::qwen::memory::InputLayout;
use crate::qwen::model::Model;
use crate::qwen::session::{Session, recorder, with_workspace};

/// Appends a token to each of several sessions of one model at once.
///
/// Writing a token reads all weights, whatever it is for: a pass over B tokens reads them once, where B passes read them B
/// times. The sessions may have any lengths; each keeps its own state and cache.
#[derive(Debug)]
pub struct Batch {
    model: Model,
    recorded: Option<Recorded>,
}

/// A pass, and what it is good for.
#[derive(Debug)]
struct Recorded {
    pass: Pass,
    /// Of each session, the memory that the pass names and the first position that it is not good for.
    lanes: Vec<(u64, u64)>,
}

impl Batch {
    /// For sessions of this model.
    pub fn new(model: &Model) -> Batch {
        Batch { model: model.clone(), recorded: None }
    }

    /// How many tokens one pass takes at most; more are cut into several passes.
    pub fn most(&self) -> usize {
        let inner = &self.model.inner;
        let caps = inner.backend.caps();
        if !layer::lanes_fit(caps, &inner.config) {
            return 1;
        }
        let fits = |n: &u64| InputLayout::new(caps, &inner.config, &vec![1; *n as usize]).bytes <= inner.sizes.inputs;
        let most = inner.sizes.logit_rows.min(inner.sizes.piece);
        (2..=most).take_while(fits).last().unwrap_or(1) as usize
    }

    /// Appends `ids[i]` to `sessions[i]`; the logits `[B, vocab]`.
    ///
    /// An error that names an argument leaves all sequences as they were. After one of the device those that it concerned
    /// have to be reset or restored, as after [`Session::prefill`]; a pass concerns all of its sessions.
    ///
    /// # Errors
    /// [`Error::Argument`] for other than one id a session, a session of another model, one that failed or that is full, or an
    /// id outside the vocabulary; what the backend reports.
    pub fn step(&mut self, sessions: &mut [&mut Session], ids: &[u32]) -> Result<Vec<f32>> {
        self.follow(sessions)?;
        if sessions.len() != ids.len() {
            let expected = format!("one for each of {} sessions", sessions.len());
            return Err(Error::argument("ids", format!("{} ids", ids.len()), expected));
        }
        for (i, (session, id)) in sessions.iter().zip(ids).enumerate() {
            if !std::sync::Arc::ptr_eq(&session.model().inner, &self.model.inner) {
                return Err(Error::argument(format!("sessions[{i}]"), "one of another model", "one of the batch's"));
            }
            session.check(&[*id]).map_err(|why| match why {
                Error::Argument { what, found, expected } => {
                    Error::Argument { what: format!("sessions[{i}]: {what}"), found, expected }
                }
                other => other,
            })?;
        }
        let mut out = Vec::with_capacity(ids.len() * self.model.inner.config.vocab as usize);
        let (mut at, mut freed) = (0, false);
        while at < ids.len() {
            // After a loss the rest may be on another device, which takes other numbers of them.
            self.follow(&mut sessions[at..])?;
            let end = ids.len().min(at + self.most());
            let read = match (&mut sessions[at..end], &ids[at..end]) {
                // One has a pass of its own, recorded once for all its tokens.
                ([session], ids) => session.prefill(ids, &mut |_, _| {}),
                (sessions, ids) => self.pass(sessions, ids),
            };
            match read {
                Ok(logits) => {
                    out.extend(logits);
                    at = end;
                }
                Err(why) => recover(&mut sessions[at..end], why, &mut freed)?,
            }
        }
        Ok(out)
    }

    /// Brings sessions of a [`Recovery`](crate::qwen::Recovery) to the same model, and the batch with them.
    fn follow(&mut self, sessions: &mut [&mut Session]) -> Result<()> {
        let Some(recovery) = sessions.first().and_then(|session| session.recovery()).cloned() else { return Ok(()) };
        loop {
            sessions.iter_mut().try_for_each(|session| session.follow())?;
            let model = recovery.model();
            // Moving one of them may have met with the next loss.
            if sessions.iter().all(|session| session.follows(&model)) {
                if recovery.knows(&self.model) {
                    (self.model, self.recorded) = (model, None);
                }
                return Ok(());
            }
        }
    }

    fn pass(&mut self, sessions: &mut [&mut Session], ids: &[u32]) -> Result<Vec<f32>> {
        // Memory first: without it the sequences are still what they were.
        sessions.iter_mut().try_for_each(|session| session.grow_one())?;
        sessions.iter_mut().for_each(|session| session.pass_begins());
        let inner = self.model.inner.clone();
        let backend = inner.backend.as_ref();
        let logits = with_workspace(&inner, |work| {
            let lanes: Vec<(&[u32], u64)> =
                ids.chunks(1).zip(sessions.iter()).map(|(id, session)| (id, session.ids().len() as u64)).collect();
            let inputs = layer::inputs(backend.caps(), &inner.config, &lanes);
            backend.write(&work.scratch.inputs.slice(0, inputs.len() as u64)?, &inputs)?;
            let fits = self.recorded.take().filter(|recorded| {
                let is = |(session, (mark, end)): (&&mut Session, &(u64, u64))| {
                    session.mark == *mark && (session.ids().len() as u64) < *end
                };
                recorded.lanes.len() == sessions.len() && sessions.iter().zip(&recorded.lanes).all(is)
            });
            let recorded = match fits {
                Some(recorded) => recorded,
                None => self.record(&work.scratch, sessions)?,
            };
            backend.run(&recorded.pass)?;
            self.recorded = Some(recorded);
            let bytes = ids.len() as u64 * inner.config.vocab as u64 * 4;
            backend.read(&work.scratch.logits.slice(0, bytes)?)?.wait_as::<f32>()
        })?;
        for (session, id) in sessions.iter_mut().zip(ids) {
            session.pass_done(*id);
        }
        // The tokens are read: what fails now concerns the next ones.
        sessions.iter_mut().for_each(|session| session.mirror_or_recover());
        Ok(logits)
    }

    fn record(&self, scratch: &Scratch, sessions: &[&mut Session]) -> Result<Recorded> {
        let at = |session: &&mut Session| session.ids().len() as u64;
        let marks: Vec<(u64, u64)> = sessions.iter().map(|s| (s.mark, s.step_end(at(s)))).collect();
        let lanes: Vec<_> = sessions.iter().zip(&marks).map(|(s, (_, end))| s.lane(at(s)..*end)).collect();
        let recorder = recorder(&self.model.inner, scratch, &lanes, None);
        let mut pass = Pass::new();
        recorder.trunk(&mut pass)?;
        recorder.head(&mut pass, 0..lanes.len() as u64)?;
        self.model.inner.backend.load(&pass)?;
        Ok(Recorded { pass, lanes: marks })
    }
}

/// Brings sessions back after an error in a pass over all of them.
fn recover(sessions: &mut [&mut Session], why: Error, freed: &mut bool) -> Result<()> {
    let whole = sessions.iter().all(|session| !session.has_failed());
    let before = *freed;
    for (i, session) in sessions.iter_mut().enumerate() {
        // Where none was touched, only the reason is to be seen to.
        if session.has_failed() || whole && i == 0 {
            let mut own = before;
            session.recover(why.clone(), &mut own)?;
            *freed |= own;
        }
    }
    Ok(())
}
