//! One sequence on a device: tokens in, logits out.

use crate::error::{Error, Result};
use crate::gdn;
use crate::pass::Pass;
use crate::qwen::config::LayerKind;
use crate::qwen::generate::{GenerateOptions, Generation};
use crate::qwen::layer::{self, Recorder, Scratch};
use crate::qwen::memory::InputLayout;
use crate::qwen::model::Model;
use crate::qwen::state::{self, State};

/// A sequence of a [`Model`]: what it has read so far, and the memory to read more.
///
/// An error that names an argument leaves the sequence as it was. After one of the device it has to be [reset](Session::reset).
#[derive(Debug)]
pub struct Session {
    model: Model,
    state: State,
    scratch: Scratch,
    /// The recurrence over whole pieces.
    piece: Option<gdn::Prefill>,
    /// The pass of one token, with the first position that it was not recorded for.
    step: Option<(Step, u64)>,
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

impl Session {
    pub(crate) fn new(model: Model) -> Result<Session> {
        let inner = &model.inner;
        let backend = inner.backend.as_ref();
        let state = State::new(&inner.config, backend, inner.plan.context, inner.plan.kv)?;
        let scratch = Scratch::new(backend, &inner.sizes)?;
        Ok(Session { state, scratch, piece: None, step: None, failed: false, model: model.clone() })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The ids that the sequence consists of so far.
    pub fn ids(&self) -> &[u32] {
        &self.state.ids
    }

    /// Forgets everything; keeps the memory.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn reset(&mut self) -> Result<()> {
        self.failed = true;
        self.state.clear(self.model.inner.backend.as_ref())?;
        self.failed = false;
        Ok(())
    }

    /// Appends tokens; the logits `[vocab]` of the last. `progress` gets the tokens done and their number after each piece.
    ///
    /// # Errors
    /// [`Error::Argument`] for no ids, an id outside the vocabulary or more than the context holds; what the backend reports.
    pub fn prefill(&mut self, ids: &[u32], progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<f32>> {
        self.check(ids)?;
        let total = ids.len() as u64;
        let mut done = 0;
        for piece in ids.chunks(self.piece_tokens()) {
            done += piece.len() as u64;
            let want = if done == total { Want::Logits } else { Want::State };
            let got = self.append(piece, want)?;
            progress(done, total);
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
        let vocab = self.model.inner.config.vocab as u64;
        let mut out = Vec::with_capacity(ids.len() * vocab as usize);
        for piece in ids.chunks(self.piece_tokens()) {
            self.append(piece, Want::State)?;
            self.failed = true;
            let backend = self.model.inner.backend.as_ref();
            let rows = piece.len() as u64;
            let step = self.model.inner.sizes.logit_rows;
            for first in (0..rows).step_by(step as usize) {
                let block = first..rows.min(first + step);
                let n = block.end - block.start;
                let mut pass = Pass::new();
                self.recorder(rows, 0..1, None).head(&mut pass, block)?;
                backend.load(&pass)?;
                backend.run(&pass)?;
                out.extend(backend.read(&self.scratch.logits.slice(0, n * vocab * 4)?)?.wait_as::<f32>()?);
            }
            self.failed = false;
        }
        Ok(out)
    }

    /// Appends tokens and answers: an iterator over what happens. Nothing is computed before its first item is asked for.
    ///
    /// # Errors
    /// As [`Session::prefill`] for the ids; [`Error::Argument`] for options out of range.
    pub fn generate(&mut self, ids: &[u32], options: &GenerateOptions) -> Result<Generation<'_>> {
        self.check(ids)?;
        Generation::new(self, ids, options)
    }

    /// Tokens that are computed at a time.
    pub(crate) fn piece_tokens(&self) -> usize {
        self.model.inner.sizes.piece as usize
    }

    /// True if the context has no room for another token.
    pub(crate) fn is_full(&self) -> bool {
        self.state.position() >= self.model.inner.plan.context
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        if self.failed {
            return Err(Error::argument("session", "one whose last pass failed", "one that was reset"));
        }
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

    /// Runs one piece, whose ids have been checked.
    pub(crate) fn append(&mut self, ids: &[u32], want: Want) -> Result<Got> {
        let inner = self.model.inner.clone();
        let (config, backend) = (&inner.config, inner.backend.as_ref());
        let (start, tokens) = (self.state.position(), ids.len() as u64);
        // Memory first: without it the sequence is still what it was.
        if self.state.grow(config, backend, inner.plan.kv, start + tokens)? {
            self.step = None;
        }
        self.failed = true;
        backend.write(&self.scratch.inputs.view(), &self.inputs(ids, start))?;
        if tokens == 1 {
            self.record_step(start, want)?;
            if let Some((step, _)) = &self.step {
                backend.run(&step.pass)?;
            }
        } else {
            let own;
            let prefill = if tokens == inner.sizes.piece {
                if self.piece.is_none() {
                    self.piece = layer::prefill(backend, config, tokens)?;
                }
                self.piece.as_ref()
            } else {
                own = layer::prefill(backend, config, tokens)?;
                own.as_ref()
            };
            let pass = self.record(tokens, start..start + tokens, prefill, want)?;
            backend.load(&pass)?;
            backend.run(&pass)?;
        }
        let got = self.read(want)?;
        self.state.ids.extend_from_slice(ids);
        self.failed = false;
        Ok(got)
    }

    fn read(&self, want: Want) -> Result<Got> {
        let backend = self.model.inner.backend.as_ref();
        Ok(match want {
            Want::State => {
                backend.wait()?;
                Got::Nothing
            }
            Want::Logits => {
                let bytes = self.model.inner.config.vocab as u64 * 4;
                Got::Logits(backend.read(&self.scratch.logits.slice(0, bytes)?)?.wait_as()?)
            }
            Want::Argmax => {
                let ids: Vec<u32> = backend.read(&self.scratch.next.slice(0, 4)?)?.wait_as()?;
                match ids.first() {
                    Some(id) if *id < self.model.inner.config.vocab => Got::Argmax(*id),
                    _ => return Err(Error::argument("logits", "NaN only", "numbers")),
                }
            }
        })
    }

    /// Makes the pass of one token ready for position `at`.
    fn record_step(&mut self, at: u64, want: Want) -> Result<()> {
        if self.step.as_ref().is_some_and(|(step, end)| step.want == want && at < *end) {
            return Ok(());
        }
        // Without full attention nothing in the pass depends on the position.
        let full = self.model.inner.config.count(LayerKind::Full) > 0;
        let end = if full { self.state.page_end(at).min((at / STEP_POSITIONS + 1) * STEP_POSITIONS) } else { u64::MAX };
        let pass = self.record(1, at..end, None, want)?;
        self.model.inner.backend.load(&pass)?;
        self.step = Some((Step { want, pass }, end));
        Ok(())
    }

    fn record(
        &self,
        tokens: u64,
        positions: std::ops::Range<u64>,
        prefill: Option<&gdn::Prefill>,
        want: Want,
    ) -> Result<Pass> {
        let recorder = self.recorder(tokens, positions, prefill);
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

    fn recorder<'a>(
        &'a self,
        tokens: u64,
        positions: std::ops::Range<u64>,
        prefill: Option<&'a gdn::Prefill>,
    ) -> Recorder<'a> {
        let inner = &self.model.inner;
        Recorder {
            config: &inner.config,
            weights: &inner.weights,
            caps: inner.backend.caps(),
            scratch: &self.scratch,
            state: &self.state,
            kv: inner.plan.kv,
            prefill,
            tokens,
            positions,
        }
    }

    /// What the host writes for a piece, laid out as [`InputLayout`] says.
    fn inputs(&self, ids: &[u32], start: u64) -> Vec<u8> {
        let config = &self.model.inner.config;
        let tokens = ids.len() as u64;
        let layout = InputLayout::new(self.model.inner.backend.caps(), config, tokens);
        let mut bytes = vec![0u8; layout.bytes as usize];
        let mut put = |at: u64, data: &[u8]| bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
        let positions: Vec<u32> = (start..start + tokens).map(|p| p as u32).collect();
        put(layout.ids, bytemuck::cast_slice(ids));
        put(layout.pos, bytemuck::cast_slice(&positions));
        put(layout.rope, bytemuck::cast_slice(&state::rope(config, start, tokens)));
        put(layout.seqs, bytemuck::cast_slice(&[0, tokens as u32, 0, 0]));
        bytes
    }
}
