//! Snapshots in host memory: what moves between devices, and what a store writes.
//!
//! Every backend keeps states, tails and cache rows in the same layout, so their bytes are what moves. Keys and values travel
//! by positions, for each full-attention layer its keys and then its values, whatever pages a device keeps them in.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::{Readback, View};
use crate::error::{Error, Result};
use crate::qwen::config::Config;
use crate::qwen::generate::Answer;
use crate::qwen::model::Model;
use crate::qwen::state::history::History;
use crate::qwen::state::pages::{Page, Pages};
use crate::qwen::state::snapshot::{Snapshot, device};
use crate::qwen::state::{self, page_layout};
use crate::shape::Dtype;

/// A [`Snapshot`] without a device: it outlives a device that is lost, and goes to another one.
#[derive(Debug, Clone)]
pub struct HostSnapshot {
    config: Config,
    kv: Dtype,
    /// Where the model's weights came from.
    source: String,
    history: History,
    answer: Option<Answer>,
    /// Where it was, and whether it had come from elsewhere.
    device: String,
    moved: bool,
    fixed: Vec<u8>,
    rows: Vec<u8>,
}

impl HostSnapshot {
    /// The ids that the sequence consists of.
    pub fn ids(&self) -> &[u32] {
        self.history.ids()
    }

    /// Host memory that it takes.
    pub fn bytes(&self) -> u64 {
        (self.fixed.len() + self.rows.len() + 4 * self.ids().len()) as u64
    }
}

impl Snapshot {
    /// Copies the snapshot to the host.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn to_host(&self) -> Result<HostSnapshot> {
        let inner = &self.model().inner;
        Ok(HostSnapshot {
            config: inner.config.clone(),
            kv: inner.plan.kv,
            source: inner.source(),
            history: self.history().clone(),
            answer: self.answer().cloned(),
            device: device(self.model()),
            moved: self.moved(),
            fixed: fixed(self)?,
            rows: rows(self, 0..self.position())?,
        })
    }
}

impl Model {
    /// Brings a snapshot from the host to this model's device. On the kind of device where it was taken what follows has the
    /// same bits, elsewhere it differs as the devices' rounding does.
    ///
    /// # Errors
    /// [`Error::Argument`] if it was taken of a model of another shape, other weights or another type of cache, or if it is
    /// longer than the context; what the backend reports.
    pub fn bring(&self, snapshot: &HostSnapshot) -> Result<Snapshot> {
        let inner = &self.inner;
        let refuse = |found: String, expected: String| Err(Error::argument("snapshot", found, expected));
        if snapshot.config != inner.config {
            return refuse("one of a model of another shape".into(), "one of this model's shape".into());
        }
        if snapshot.source != inner.source() {
            return refuse(format!("one of the weights {}", snapshot.source), format!("of {}", inner.source()));
        }
        if snapshot.kv != inner.plan.kv {
            return refuse(format!("a cache in {}", snapshot.kv), format!("one in {}", inner.plan.kv));
        }
        let (history, answer) = (snapshot.history.clone(), snapshot.answer.clone());
        let moved = snapshot.moved || snapshot.device != device(self);
        place(self, history, answer, moved, &snapshot.fixed, &[(0..snapshot.history.len(), &snapshot.rows)])
    }
}

/// Bytes of all states and tails of a model.
pub(crate) fn fixed_bytes(model: &Model) -> u64 {
    state::fixed_bytes(model.config()).sum()
}

/// Bytes of keys and values of one position in all layers.
pub(crate) fn row_bytes(model: &Model) -> u64 {
    let plan = model.memory();
    let layout = page_layout(model.config(), model.backend().caps(), plan.context, plan.kv);
    2 * layout.row * layout.layers as u64
}

/// States and tails of a snapshot, layer by layer.
pub(crate) fn fixed(snapshot: &Snapshot) -> Result<Vec<u8>> {
    let backend = snapshot.model().backend();
    let reads = snapshot.fixed().iter().map(|view| backend.read(view)).collect::<Result<Vec<_>>>()?;
    let mut out = Vec::with_capacity(snapshot.own_bytes() as usize);
    for read in reads {
        out.extend(read.wait()?);
    }
    Ok(out)
}

/// Keys and values of some positions of a snapshot.
pub(crate) fn rows(snapshot: &Snapshot, range: Range<u64>) -> Result<Vec<u8>> {
    let model = snapshot.model();
    let pages: Vec<Arc<Page>> = snapshot.pages().cloned().collect();
    let mut out = vec![0; ((range.end - range.start) * row_bytes(model)) as usize];
    let backend = model.backend();
    // Reads under way, and their bytes: waiting for each alone would take longer than the copies do.
    let (mut reads, mut staged) = (Vec::new(), 0);
    walk(model, &pages, range, |view, at| {
        reads.push((at, backend.read(&view)?));
        staged += view.bytes;
        if staged >= STAGED { collect(&mut out, &mut reads, &mut staged) } else { Ok(()) }
    })?;
    collect(&mut out, &mut reads, &mut staged)?;
    Ok(out)
}

/// Bytes of reads under way at most, but for the last of them.
const STAGED: u64 = 64 << 20;

/// Waits for reads and puts each where it belongs.
fn collect(out: &mut [u8], reads: &mut Vec<(usize, Readback)>, staged: &mut u64) -> Result<()> {
    for (at, read) in reads.drain(..) {
        let bytes = read.wait()?;
        out[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    *staged = 0;
    Ok(())
}

/// A snapshot on the model's device from bytes whose lengths are checked here: `parts` are the rows of ranges of positions that
/// follow one another from 0 to the end.
pub(crate) fn place(
    model: &Model,
    history: History,
    answer: Option<Answer>,
    moved: bool,
    fixed: &[u8],
    parts: &[(Range<u64>, &[u8])],
) -> Result<Snapshot> {
    let (end, plan) = (history.len(), model.memory());
    if end > plan.context {
        let found = format!("one of {end} tokens");
        return Err(Error::argument("snapshot", found, format!("at most the context's {}", plan.context)));
    }
    let length = |what: &str, found: u64, expected: u64| match found == expected {
        true => Ok(()),
        false => Err(Error::argument(what, format!("{found} bytes"), format!("{expected} bytes"))),
    };
    length("states of a snapshot", fixed.len() as u64, fixed_bytes(model))?;
    let mut next = 0;
    for (range, bytes) in parts {
        if range.start != next || range.end < range.start {
            return Err(Error::argument("rows of a snapshot", format!("{range:?}"), format!("rows from {next}")));
        }
        next = range.end;
        length("rows of a snapshot", bytes.len() as u64, (range.end - range.start) * row_bytes(model))?;
    }
    if next != end {
        return Err(Error::argument("rows of a snapshot", next, format!("those of {end} positions")));
    }

    let arrival = Arrival::new(model, end)?;
    arrival.write(&arrival.fixed(), 0, fixed)?;
    for (range, bytes) in parts {
        arrival.write(&arrival.stretches(range.clone())?, 0, bytes)?;
    }
    Ok(arrival.whole(history, answer, moved))
}

/// A snapshot that comes to a device in pieces, of which several threads may bring some.
pub(crate) struct Arrival<'a> {
    model: &'a Model,
    fixed: Vec<View>,
    pages: Pages,
}

/// Device memory that takes a run of bytes: each stretch with the byte where it begins, ascending and without gaps.
pub(crate) type Stretches = Vec<(usize, View)>;

impl<'a> Arrival<'a> {
    /// Room for a snapshot of `end` tokens, of undefined content.
    pub fn new(model: &'a Model, end: u64) -> Result<Arrival<'a>> {
        let (backend, plan) = (model.backend().as_ref(), model.memory());
        let fixed = state::alloc_fixed(model.config(), backend)?;
        let layout = page_layout(model.config(), backend.caps(), plan.context, plan.kv);
        let mut pages = Pages::default();
        pages.take(&layout, backend, 0, end)?;
        Ok(Arrival { model, fixed, pages })
    }

    /// Where states and tails go.
    pub fn fixed(&self) -> Stretches {
        let mut end = 0;
        let at = |view: &View| {
            let begin = end;
            end += view.bytes as usize;
            begin
        };
        self.fixed.iter().map(at).zip(self.fixed.iter().cloned()).collect()
    }

    /// Where the rows of a range of positions go.
    pub fn stretches(&self, range: Range<u64>) -> Result<Stretches> {
        let held: Vec<Arc<Page>> = self.pages.iter().cloned().collect();
        let mut out = Vec::new();
        walk(self.model, &held, range, |view, at| {
            out.push((at, view));
            Ok(())
        })?;
        out.sort_by_key(|(at, _)| *at);
        Ok(out)
    }

    /// Writes those of the bytes of some stretches that begin at byte `at`.
    pub fn write(&self, to: &Stretches, at: u64, mut bytes: &[u8]) -> Result<()> {
        let mut at = at as usize;
        let first = to.partition_point(|(begin, view)| begin + view.bytes as usize <= at);
        for (begin, view) in &to[first..] {
            if bytes.is_empty() {
                break;
            }
            let skip = (at - begin) as u64;
            let (own, rest) = bytes.split_at(bytes.len().min((view.bytes - skip) as usize));
            self.model.backend().write(&view.slice(skip, own.len() as u64)?, own)?;
            (at, bytes) = (at + own.len(), rest);
        }
        Ok(())
    }

    /// The snapshot, once all of it has been written.
    pub fn whole(self, history: History, answer: Option<Answer>, moved: bool) -> Snapshot {
        Snapshot::from_parts(self.model, history, self.fixed, self.pages, answer, moved)
    }
}

/// Visits the rows of a range of positions: each stretch of them on the device, with the byte where it begins among the rows of
/// the range.
fn walk(
    model: &Model,
    pages: &[Arc<Page>],
    range: Range<u64>,
    mut visit: impl FnMut(View, usize) -> Result<()>,
) -> Result<()> {
    let layout = page_layout(model.config(), model.backend().caps(), model.memory().context, model.memory().kv);
    let tensor = (range.end - range.start) * layout.row;
    for page in pages {
        let (from, to) = (range.start.max(page.start), range.end.min(page.start + page.len));
        if from >= to {
            continue;
        }
        for (i, view) in page.rows(layout.row, from - page.start, to - page.start)?.into_iter().enumerate() {
            visit(view, (i as u64 * tensor + (from - range.start) * layout.row) as usize)?;
        }
    }
    Ok(())
}
