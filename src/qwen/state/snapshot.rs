//! A sequence at one moment.

use std::sync::Arc;

use crate::backend::View;
use crate::error::{Error, Result};
use crate::pass::Pass;
use crate::qwen::generate::Answer;
use crate::qwen::model::Model;
use crate::qwen::state::history::History;
use crate::qwen::state::pages::{Page, Pages};
use crate::qwen::state::{self, State};

/// All that a sequence was at one moment: states, convolution tails, keys and values, tokens, and the answer under way with its
/// sampler. It never changes, clones are the same snapshot, and there is none that holds only a part.
///
/// States and tails are a copy; keys and values are shared with the sequence and with other snapshots of it until one of them
/// writes something else.
#[derive(Debug, Clone)]
pub struct Snapshot {
    inner: Arc<Taken>,
}

#[derive(Debug)]
struct Taken {
    model: Model,
    history: History,
    /// State and tail of every Gated DeltaNet layer.
    fixed: Vec<View>,
    /// Up to the last token; rows beyond it belong to others.
    pages: Pages,
    answer: Option<Answer>,
    /// See [`State::moved`].
    moved: bool,
}

impl Snapshot {
    /// Copies what changes and shares what does not.
    pub(crate) fn take(model: &Model, state: &State, answer: Option<&Answer>) -> Result<Snapshot> {
        let backend = model.backend().as_ref();
        let fixed = state::alloc_fixed(model.config(), backend)?;
        let mut pass = Pass::new();
        state::copy_fixed(backend.caps(), &mut pass, &state.fixed(), &fixed)?;
        backend.load(&pass)?;
        backend.run(&pass)?;
        let pages = state.pages.until(state.position());
        // One that has not begun or is over has nothing to go on with.
        let answer = answer.filter(|a| a.next.is_some()).cloned();
        Ok(Snapshot::from_parts(model, state.history.clone(), fixed, pages, answer, state.moved))
    }

    pub(crate) fn from_parts(
        model: &Model,
        history: History,
        fixed: Vec<View>,
        pages: Pages,
        answer: Option<Answer>,
        moved: bool,
    ) -> Snapshot {
        Snapshot { inner: Arc::new(Taken { model: model.clone(), history, fixed, pages, answer, moved }) }
    }

    /// Makes `state` what it was.
    ///
    /// # Errors
    /// What the backend reports; the state is then neither and has to be cleared.
    pub(crate) fn put(&self, state: &mut State) -> Result<()> {
        let backend = self.inner.model.backend().as_ref();
        let mut pass = Pass::new();
        state::copy_fixed(backend.caps(), &mut pass, &self.inner.fixed, &state.fixed())?;
        backend.load(&pass)?;
        backend.run(&pass)?;
        state.pages = self.inner.pages.clone();
        state.history = self.inner.history.clone();
        state.moved = self.inner.moved;
        Ok(())
    }

    /// Checks that it is of this very model, on this device.
    pub(crate) fn check(&self, model: &Model) -> Result<()> {
        if Arc::ptr_eq(&self.inner.model.inner, &model.inner) {
            return Ok(());
        }
        let found = format!("one on {}, of another model or another loading of it", self.model().backend().caps().name);
        Err(Error::argument("snapshot", found, "one of this session's model: Snapshot::to_host moves it"))
    }

    /// The model that it belongs to.
    pub fn model(&self) -> &Model {
        &self.inner.model
    }

    /// The ids that the sequence consisted of.
    pub fn ids(&self) -> &[u32] {
        self.inner.history.ids()
    }

    /// The number of tokens.
    pub fn position(&self) -> u64 {
        self.inner.history.len()
    }

    /// True if an answer was under way: [`Session::resume`](crate::qwen::Session::resume) goes on with it.
    pub fn has_answer(&self) -> bool {
        self.answer().is_some()
    }

    /// Device memory that is its own: states and tails.
    pub fn own_bytes(&self) -> u64 {
        self.inner.fixed.iter().map(|v| v.bytes).sum()
    }

    pub(crate) fn moved(&self) -> bool {
        self.inner.moved
    }

    pub(crate) fn history(&self) -> &History {
        &self.inner.history
    }

    pub(crate) fn answer(&self) -> Option<&Answer> {
        self.inner.answer.as_ref()
    }

    pub(crate) fn fixed(&self) -> &[View] {
        &self.inner.fixed
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = &Arc<Page>> {
        self.inner.pages.iter()
    }

    pub(crate) fn is(&self, other: &Snapshot) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

/// The device of a model by name, driver and all that decides which kernels it runs: where these are the same, the bits are.
pub(crate) fn device(model: &Model) -> String {
    let caps = model.backend().caps();
    let sizes = (caps.max_binding, caps.max_buffer, caps.align, caps.workgroup_memory, caps.workgroup_threads);
    format!("{} ({}), {:?} {sizes:?} {:?} {}", caps.name, caps.driver, caps.class, caps.subgroup, caps.f16)
}
