//! A backend around another one that tells what the work of a model consists of: the time of its kinds of layers, the longest
//! submission, the memory that is in use.
//!
//! Weights come to a device under their tensors' names, so it is known which memory belongs to which layer. A launch belongs to
//! the layer whose weights it or the last launch before it reads; embedding, head and copies belong to none.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gatedelta::Result;
use gatedelta::backend::{Backend, Buffer, HostBytes, Readback, Timing, View, Watch};
use gatedelta::pass::{Launch, Pass};
use gatedelta::qwen::LayerKind;
use gatedelta::tune::Caps;

/// What to look at while passes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing: passes run as they would without.
    Away,
    /// Each pass as a whole, waiting for its end.
    Passes,
    /// The layers of each pass one after the other, waiting for the end of each.
    Layers,
}

/// Time by the kind of layer, projections and MLP included, and what was longest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Layers with Gated DeltaNet.
    pub linear: Duration,
    /// Layers with full attention.
    pub full: Duration,
    /// Embedding, head, copies.
    pub around: Duration,
    /// The longest single submission.
    pub longest: Duration,
}

/// Bytes in use, by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages of keys and values.
    pub kv: u64,
    /// States and convolution tails, of sequences and of snapshots.
    pub fixed: u64,
    /// Weights and scratch.
    pub other: u64,
}

/// See the [module](self).
pub struct Observed {
    inner: Arc<dyn Backend>,
    /// The kind of each layer.
    layers: Vec<LayerKind>,
    notes: Mutex<Notes>,
}

struct Notes {
    look: Look,
    times: Times,
    /// By the id of memory that was imported, which lives as long as the model: its layer, or none.
    places: HashMap<usize, Option<usize>>,
    memory: Vec<(&'static str, Watch)>,
}

/// What the runtime calls the memory that depends on sequences; the rest is [`Held::other`].
const NAMES: [&str; 4] = ["page of keys", "page of values", "state", "convolution tail"];

impl Observed {
    /// A backend for a model with these layers.
    pub fn new(inner: Arc<dyn Backend>, layers: &[LayerKind]) -> Arc<Observed> {
        let notes = Notes { look: Look::Away, times: Times::default(), places: HashMap::new(), memory: Vec::new() };
        Arc::new(Observed { inner, layers: layers.to_vec(), notes: Mutex::new(notes) })
    }

    /// Changes what is looked at and begins anew with the times; those so far.
    pub fn look(&self, look: Look) -> Times {
        let mut notes = self.notes();
        notes.look = look;
        std::mem::take(&mut notes.times)
    }

    /// The memory in use now.
    pub fn held(&self) -> Held {
        let mut notes = self.notes();
        notes.memory.retain(|(_, watch)| watch.bytes() > 0);
        let mut held = Held::default();
        for (name, watch) in &notes.memory {
            let sum = match NAMES.iter().position(|n| n == name) {
                Some(0 | 1) => &mut held.kv,
                Some(_) => &mut held.fixed,
                None => &mut held.other,
            };
            *sum += watch.bytes();
        }
        held
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, name: &str, buffer: &Buffer) {
        let name = NAMES.into_iter().find(|n| *n == name).unwrap_or_default();
        let mut notes = self.notes();
        // What has gone is forgotten now and then, not at each of the many short-lived pieces.
        if notes.memory.len() == notes.memory.capacity() {
            notes.memory.retain(|(_, watch)| watch.bytes() > 0);
        }
        notes.memory.push((name, buffer.watch()));
    }

    /// Neighbouring launches of one kind of layer, in order.
    fn parts(&self, pass: &Pass) -> Vec<(Option<LayerKind>, Pass)> {
        let notes = self.notes();
        let mut place = None;
        let mut parts: Vec<(Option<usize>, Pass)> = Vec::new();
        for launch in &pass.launches {
            place = named(&notes.places, launch).unwrap_or(place);
            match parts.last_mut() {
                Some((last, part)) if *last == place => part.launches.push(launch.clone()),
                _ => parts
                    .push((place, Pass { launches: vec![launch.clone()], exact: pass.exact, longest: pass.longest })),
            }
        }
        let kind = |place: Option<usize>| self.layers.get(place?).copied();
        parts.into_iter().map(|(place, part)| (kind(place), part)).collect()
    }
}

/// The layer whose weights a launch reads, none for those of no layer; nothing if it reads no weights.
fn named(places: &HashMap<usize, Option<usize>>, launch: &Launch) -> Option<Option<usize>> {
    launch.args.iter().find_map(|view| places.get(&view.buffer.id()).copied())
}

/// The layer in a tensor's name: `model.layers.3.mlp.up_proj.weight`.
fn layer(tensor: &str) -> Option<usize> {
    let (_, rest) = tensor.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

impl Backend for Observed {
    fn caps(&self) -> &Caps {
        self.inner.caps()
    }

    fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        let buffer = self.inner.alloc(what, bytes)?;
        self.note(what, &buffer);
        Ok(buffer)
    }

    fn import(&self, what: &str, bytes: HostBytes) -> Result<Buffer> {
        let buffer = self.inner.import(what, bytes)?;
        self.note("", &buffer);
        // Tables of a prefill are written, not imported: what is imported are weights.
        self.notes().places.insert(buffer.id(), layer(what));
        Ok(buffer)
    }

    fn write(&self, to: &View, bytes: &[u8]) -> Result<()> {
        self.inner.write(to, bytes)
    }

    fn read(&self, from: &View) -> Result<Readback> {
        self.inner.read(from)
    }

    fn load(&self, pass: &Pass) -> Result<()> {
        self.inner.load(pass)
    }

    fn run(&self, pass: &Pass) -> Result<()> {
        let parts = match self.notes().look {
            Look::Away => None,
            Look::Passes => Some(false),
            Look::Layers => Some(true),
        };
        let parts = match parts {
            None => return self.inner.run(pass),
            Some(false) => vec![(None, pass.clone())],
            Some(true) => self.parts(pass),
        };
        for (kind, part) in parts {
            let timing = self.inner.time(&part)?;
            let times = &mut self.notes().times;
            let sum = match kind {
                Some(LayerKind::Linear) => &mut times.linear,
                Some(LayerKind::Full) => &mut times.full,
                None => &mut times.around,
            };
            *sum += timing.total;
            times.longest = times.longest.max(timing.longest_submission);
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        self.inner.wait()
    }

    fn time(&self, pass: &Pass) -> Result<Timing> {
        self.inner.time(pass)
    }
}
