//! Going on after a device was lost or has no memory left.
//!
//! A driver is reset, a laptop sleeps, another program takes the memory of the card: the device is gone, and with it the weights
//! and all that sequences have read. A [`Recovery`] knows how to open a device and keeps the checkpoint mapped. Its sessions meet an
//! error of the device by asking it for the model again:
//!
//! | what happened | what comes of it |
//! |---|---|
//! | the device is lost, or its driver failed | it is opened again, or whatever is the best device then, and the weights come from the mapped files |
//! | the same a second time | all goes on on the CPU |
//! | memory is refused | the snapshots in caches go, and the same is tried once more; then all goes on on the CPU |
//! | the CPU fails too | the error is told |
//!
//! What a sequence has read is brought back from a snapshot that is left, or from a [copy in host memory](Recovery::set_copies) that
//! follows it, and by reading again what came after. An answer under way goes on where it was: tokens that were given out are not
//! given again, and on the same kind of device the rest has the same bits. On the CPU it differs as devices' rounding does.
//!
//! ```no_run
//! # fn main() -> gatedelta::Result<()> {
//! use gatedelta::qwen::{LoadOptions, Recovery};
//! let recovery = Recovery::load("Qwen3.5-0.8B", None, &LoadOptions::default())?;
//! let mut session = recovery.session()?;      // outlives its device; Recovery::past tells what happened
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::device::{self, Account};
use crate::error::{Error, Result};
use crate::qwen::model::{LoadOptions, Model};
use crate::qwen::session::Session;
use crate::qwen::state::cache::{Cache, WeakCache};
use crate::qwen::state::mirror::Allowance;
use crate::tune::Kind;

/// After so many losses a device is not opened again.
pub const LOSSES: usize = 2;
/// Host memory for copies, where nobody says how much: forty sequences of the 0.8B shape without keys and values.
const COPIES: u64 = 1 << 30;
/// Tokens between two copies of a sequence: less than a second's worth of reading, and a copy now and then while writing.
const EVERY: u64 = 512;

/// Which device is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The one that was chosen at first, or what is best now.
    Chosen,
    /// The CPU.
    Cpu,
}

/// What is told while it happens. Its `Display` is for people.
#[derive(Debug, Clone, Copy)]
pub enum Notice<'a> {
    /// The device, or what was tried in its place, failed; something else is tried now.
    Failed(&'a Error),
    /// Memory was refused; snapshots were dropped, and the same is tried again.
    Freed(&'a Error),
    /// So many bytes of so many of the weights are loaded again.
    Loading(u64, u64),
    /// It goes on.
    Recovered(&'a Recovered),
}

/// A recovery that succeeded. Its `Display` is for people.
#[derive(Debug, Clone)]
pub struct Recovered {
    /// The error that it began with.
    pub why: Error,
    /// The device that failed.
    pub from: String,
    /// The device that it goes on on.
    pub to: String,
    /// What that is.
    pub place: Place,
    /// Losses so far, this one among them.
    pub losses: usize,
    /// How long opening and loading took.
    pub took: Duration,
}

/// A device that was opened, and why that one.
pub type Opened = (Arc<dyn Backend>, Account);

/// A model that comes back when its device fails, and what knows how. Clones are the same.
#[derive(Clone)]
pub struct Recovery {
    inner: Arc<Inner>,
}

struct Inner {
    current: Mutex<Current>,
    /// Held while a device is opened and a model loaded.
    open: Mutex<Box<Open>>,
    tell: Box<Tell>,
    recovering: AtomicBool,
    /// What is dropped when there is no memory.
    caches: Mutex<Vec<WeakCache>>,
    allowance: Mutex<Option<Arc<Allowance>>>,
    line: u64,
}

type Open = dyn FnMut(Place) -> Result<Opened> + Send;
type Tell = dyn Fn(&Notice<'_>) + Send + Sync;

struct Current {
    model: Model,
    account: Account,
    place: Place,
    losses: usize,
    past: Vec<Recovered>,
}

/// Locks; a panic elsewhere does not make the content unusable here.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens the device of this name, or the best, as [`device::open`] does, and the CPU where that is wanted.
pub fn by_name(name: Option<&str>) -> impl FnMut(Place) -> Result<Opened> + Send + use<> {
    let name = name.map(str::to_string);
    move |place| match place {
        Place::Chosen => device::open(name.as_deref()),
        Place::Cpu => device::open(Some("cpu")),
    }
}

/// What came of loading.
struct Loaded {
    model: Model,
    account: Account,
    place: Place,
    losses: usize,
    /// The first failure on the way, and the device that it was on where that is known.
    failed: Option<(Error, String)>,
}

/// Loads where `open` says, on the CPU after losses or for want of memory.
fn load(
    open: &mut Open,
    tell: &Tell,
    mut place: Place,
    mut losses: usize,
    load: &mut dyn FnMut(Arc<dyn Backend>) -> Result<Model>,
) -> Result<Loaded> {
    let (mut freed, mut failed) = (false, None);
    loop {
        let (why, device) = match open(place) {
            Ok((backend, account)) => match load(backend.clone()) {
                Ok(model) => return Ok(Loaded { model, account, place, losses, failed }),
                Err(why) => {
                    backend.abandon();
                    (why, backend.caps().name.clone())
                }
            },
            Err(why) => {
                // What cannot be opened will not be there for the next try either.
                losses = losses.max(LOSSES - 1);
                (why, String::new())
            }
        };
        let opens = matches!(why, Error::NoDevice { .. } | Error::Unsupported { .. });
        if place == Place::Cpu || !(why.is_loss() || why.is_out_of_memory() || opens) {
            return Err(why);
        }
        tell(&Notice::Failed(&why));
        failed.get_or_insert((why.clone(), device));
        if why.is_out_of_memory() {
            place = if freed { Place::Cpu } else { place };
            freed = true;
        } else {
            losses += 1;
            place = if losses < LOSSES { place } else { Place::Cpu };
        }
    }
}

impl Recovery {
    /// Opens the device of this name, or the best, loads a directory as [`Model::load`] does, and tells what happens later through
    /// `log`.
    ///
    /// # Errors
    /// As [`Recovery::load_with`].
    pub fn load(dir: impl AsRef<Path>, device: Option<&str>, options: &LoadOptions) -> Result<Recovery> {
        Recovery::load_with(dir, options, by_name(device), |_| {}, &mut |_, _| {})
    }

    /// The same with the caller's own way to open a device, which is asked again after each loss; `tell` hears what happens then,
    /// on the thread that it happens on. `progress` hears of the bytes loaded now, and their total.
    ///
    /// # Errors
    /// As [`Model::load`], and what the first call of `open` gives. A device that fails while the weights are brought there is no
    /// error until the CPU has failed as well.
    pub fn load_with(
        dir: impl AsRef<Path>,
        options: &LoadOptions,
        mut open: impl FnMut(Place) -> Result<Opened> + Send + 'static,
        tell: impl Fn(&Notice<'_>) + Send + Sync + 'static,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Recovery> {
        let dir = dir.as_ref();
        // A device that is not there, and a context that does not fit it, are errors of the one who asked for them.
        let mut first = Some(open(Place::Chosen)?);
        if let Some((backend, _)) = &first {
            Model::plan(dir, backend.caps(), options)?;
        }
        let mut open = move |place| match first.take() {
            Some(opened) if place == Place::Chosen => Ok(opened),
            _ => open(place),
        };
        let tell = told(tell);
        let begin = Instant::now();
        let mut bring = |backend| Model::load_with(dir, backend, options, progress);
        let loaded = load(&mut open, &tell, Place::Chosen, 0, &mut bring)?;
        Ok(Recovery::with(loaded, begin.elapsed(), Box::new(open), Box::new(tell)))
    }

    /// For a model that is loaded already.
    pub fn new(
        model: Model,
        account: Account,
        open: impl FnMut(Place) -> Result<Opened> + Send + 'static,
        tell: impl Fn(&Notice<'_>) + Send + Sync + 'static,
    ) -> Recovery {
        let loaded = Loaded { model, account, place: Place::Chosen, losses: 0, failed: None };
        Recovery::with(loaded, Duration::ZERO, Box::new(open), Box::new(told(tell)))
    }

    fn with(loaded: Loaded, took: Duration, open: Box<Open>, tell: Box<Tell>) -> Recovery {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let Loaded { model, account, place, losses, failed } = loaded;
        let line = *model.inner.line.get_or_init(|| NEXT.fetch_add(1, Ordering::Relaxed));
        let to = model.backend().caps().name.clone();
        let past: Vec<_> = failed
            .into_iter()
            .map(|(why, from)| Recovered { why, from, to: to.clone(), place, losses, took })
            .collect();
        past.iter().for_each(|recovered| tell(&Notice::Recovered(recovered)));
        let inner = Inner {
            current: Mutex::new(Current { model, account, place, losses, past }),
            open: Mutex::new(open),
            tell,
            recovering: AtomicBool::new(false),
            caches: Mutex::default(),
            allowance: Mutex::new(None),
            line,
        };
        Recovery { inner: Arc::new(inner) }
    }

    /// Host memory for copies of what sequences have read, of all of them together, and the tokens after which a copy is brought
    /// up to date. By default 1 GiB and 512 tokens, and none on the CPU, which is not lost: a long text is then not read again from
    /// its begin. A copy takes what a snapshot does; with 0 bytes there are none, and beyond the bound texts are copied as far as it
    /// goes.
    ///
    /// # Errors
    /// [`Error::Argument`] for 0 tokens.
    pub fn set_copies(&self, bytes: u64, every: u64) -> Result<()> {
        if every == 0 {
            return Err(Error::argument("tokens between copies", 0, "at least 1"));
        }
        *lock(&self.inner.allowance) = Some(Allowance::new(bytes, every));
        Ok(())
    }

    pub(crate) fn allowance(&self) -> Arc<Allowance> {
        let mut allowance = lock(&self.inner.allowance);
        let fresh = || {
            let on_cpu = self.model().backend().caps().kind == Kind::Cpu;
            Allowance::new(if on_cpu { 0 } else { COPIES }, EVERY)
        };
        allowance.get_or_insert_with(fresh).clone()
    }

    /// Host memory that copies take now.
    pub fn copies(&self) -> u64 {
        self.allowance().used()
    }

    /// A cache whose snapshots go when memory is refused, beside that of the session concerned.
    pub fn watch(&self, cache: &Cache) {
        lock(&self.inner.caches).push(cache.weak());
    }

    /// The model as it is loaded now.
    pub fn model(&self) -> Model {
        lock(&self.inner.current).model.clone()
    }

    /// The devices as they were when the one in use was opened.
    pub fn account(&self) -> Account {
        lock(&self.inner.current).account.clone()
    }

    /// An empty sequence that comes back when its device fails.
    ///
    /// # Errors
    /// What the backend reports, where nothing is left to go on with.
    pub fn session(&self) -> Result<Session> {
        let mut freed = false;
        loop {
            let model = self.model();
            match Session::new(model.clone()) {
                Ok(session) => return Ok(session.lasting(self.clone())),
                Err(why) if why.is_out_of_memory() && !freed => {
                    freed = true;
                    self.free(&why, None);
                }
                Err(why) => drop(self.replace(&model, &why)?),
            }
        }
    }

    /// What happened so far, the first first.
    pub fn past(&self) -> Vec<Recovered> {
        lock(&self.inner.current).past.clone()
    }

    /// Losses so far, those while the model was first loaded among them.
    pub fn losses(&self) -> usize {
        lock(&self.inner.current).losses
    }

    /// Where the model is.
    pub fn place(&self) -> Place {
        lock(&self.inner.current).place
    }

    /// True while a device is opened and the model loaded again.
    pub fn is_recovering(&self) -> bool {
        self.inner.recovering.load(Ordering::Acquire)
    }

    /// True if the model is this one's, now or before a loss.
    pub(crate) fn knows(&self, model: &Model) -> bool {
        model.inner.line.get() == Some(&self.inner.line)
    }

    /// Drops snapshots, since memory was refused.
    pub(crate) fn free(&self, why: &Error, own: Option<&Cache>) {
        (self.inner.tell)(&Notice::Freed(why));
        own.into_iter().for_each(Cache::clear);
        lock(&self.inner.caches).retain(|cache| cache.upgrade().inspect(Cache::clear).is_some());
    }

    /// The model in the place of one that failed: what another session has had loaded meanwhile, else one that is loaded now.
    ///
    /// # Errors
    /// The reason itself, if it is none of the device or if the model was on the CPU already; what loading reports there.
    pub(crate) fn replace(&self, failed: &Model, why: &Error) -> Result<Model> {
        let mut open = lock(&self.inner.open);
        let (current, place, losses) = {
            let current = lock(&self.inner.current);
            (current.model.clone(), current.place, current.losses)
        };
        if !Arc::ptr_eq(&current.inner, &failed.inner) {
            return Ok(current);
        }
        let lost = why.is_loss();
        if place == Place::Cpu && !failed.is_gone() || !(lost || why.is_out_of_memory()) {
            return Err(why.clone());
        }
        let tell = self.inner.tell.as_ref();
        tell(&Notice::Failed(why));
        self.inner.recovering.store(true, Ordering::Release);
        failed.give_up();
        let begin = Instant::now();
        let losses = losses + usize::from(lost);
        let place = if lost && losses < LOSSES { Place::Chosen } else { Place::Cpu };
        let mut again = |backend| failed.again(backend, &mut |done, total| tell(&Notice::Loading(done, total)));
        let loaded = load(&mut **open, tell, place, losses, &mut again);
        self.inner.recovering.store(false, Ordering::Release);
        let Loaded { model, account, place, losses, .. } = loaded?;
        let (from, to) = (failed.backend().caps().name.clone(), model.backend().caps().name.clone());
        let recovered = Recovered { why: why.clone(), from, to, place, losses, took: begin.elapsed() };
        {
            let mut current = lock(&self.inner.current);
            (current.model, current.account) = (model.clone(), account);
            (current.place, current.losses) = (place, losses);
            current.past.push(recovered.clone());
        }
        if place == Place::Cpu {
            *lock(&self.inner.allowance) = Some(Allowance::new(0, EVERY));
        }
        tell(&Notice::Recovered(&recovered));
        Ok(model)
    }
}

/// Has the log hear as well.
fn told(tell: impl Fn(&Notice<'_>) + Send + Sync + 'static) -> impl Fn(&Notice<'_>) + Send + Sync + 'static {
    move |notice| {
        if !matches!(notice, Notice::Loading(..)) {
            log::warn!("{notice}");
        }
        tell(notice);
    }
}

impl fmt::Debug for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recovery({:?} on {:?}, {} losses)", self.model(), self.place(), self.losses())
    }
}

impl fmt::Display for Notice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::Failed(why) => write!(f, "{why}: a device is opened again"),
            Notice::Freed(why) => write!(f, "{why}: snapshots in memory are dropped"),
            Notice::Loading(done, total) => write!(f, "{done} of {total} bytes of weights are loaded again"),
            Notice::Recovered(recovered) => recovered.fmt(f),
        }
    }
}

impl fmt::Display for Recovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Recovered { why, from, to, place, losses, took } = self;
        write!(f, "{why}. ")?;
        match place {
            Place::Chosen if to == from => write!(f, "It was opened again")?,
            Place::Chosen => write!(f, "{to} took its place")?,
            Place::Cpu if why.is_out_of_memory() => write!(f, "From here on the model runs on the CPU, more slowly")?,
            Place::Cpu => write!(f, "After {losses} losses the model runs on the CPU from here on, more slowly")?,
        }
        write!(f, " ({:.1} s to load it).", took.as_secs_f64())
    }
}
