//! Compiles the kernels of a model while its weights are on their way.
//!
//! Which variants those are follows from the passes, so the passes are recorded as they will be later: by a session of the same
//! shape on a [`Stage`], which looks like the device and holds no memory. What they launch is then compiled on the device, by
//! threads of its own. A device that has its kernels compiled already has nothing to rehearse.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::backend::{Backend, Buffer, HostBytes, Pending, Readback, Timing, View};
use crate::error::{Error, Result};
use crate::pass::{Launch, Pass};
use crate::qwen::config::Config;
use crate::qwen::memory::{MemoryPlan, Sizes};
use crate::qwen::model::{Inner, Model};
use crate::qwen::session::Want;
use crate::qwen::weights::{Source, Weights};
use crate::tune::{Caps, Kind};

/// Tokens of the pieces that are rehearsed beside whole ones, in this order: lengths of questions and results of tools. Others
/// may choose variants that these do not.
const PIECES: [u64; 4] = [64, 16, 4, 256];

/// Compilers at work beside the thread that loads.
const MOST_THREADS: usize = 4;

/// Kernels that are being compiled. It ends with the value: after what is under way.
pub(crate) struct Rehearsal {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    done: u64,
    total: u64,
    /// How long it took, once it is over.
    over: Option<Duration>,
}

impl Rehearsal {
    /// Begins, where there is anything to compile. What fails here is left to the pass that needs it.
    pub fn begin(
        config: &Config,
        source: &dyn Source,
        backend: &Arc<dyn Backend>,
        plan: &MemoryPlan,
        sizes: &Sizes,
    ) -> Option<Rehearsal> {
        // The CPU's kernels are compiled with the program, CUDA's before.
        if backend.caps().kind != Kind::WebGpu {
            return None;
        }
        let weights = Weights::sketch(config, source, backend.caps()).ok()?;
        let stage = Arc::new(Stage { caps: backend.caps().clone(), seen: Mutex::default() });
        let model = Inner::from_parts(config.clone(), weights, stage.clone(), plan.clone(), sizes.clone());
        let shared = Arc::new(Shared::default());
        let (backend, of_thread) = (backend.clone(), shared.clone());
        let work = move || {
            let over = Over(&of_thread, Instant::now());
            if let Err(why) = play(model) {
                log::debug!("not all kernels are compiled ahead: {why}");
            }
            compile(backend.as_ref(), &stage.take(), over.0);
        };
        let thread = thread::Builder::new().name("gatedelta-kernels".into()).spawn(work).ok()?;
        Some(Rehearsal { shared, thread: Some(thread) })
    }

    /// Waits for the end; how long all of it took. `progress` gets the kernels that are compiled, and their number once it is known.
    pub fn wait(&self, progress: &mut dyn FnMut(u64, u64)) -> Duration {
        let mut counts = self.shared.counts();
        loop {
            let now = *counts;
            if now.total > 0 {
                drop(counts);
                progress(now.done, now.total);
                counts = self.shared.counts();
            }
            if let Some(took) = now.over {
                return took;
            }
            if (counts.done, counts.over) == (now.done, now.over) {
                let woken = self.shared.changed.wait_timeout(counts, Duration::from_millis(100));
                counts = woken.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed, and is no reason for another one here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts());
        self.changed.notify_all();
    }
}

/// Says that what began then is over, however it ends.
struct Over<'a>(&'a Shared, Instant);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.change(|counts| counts.over = Some(self.1.elapsed()));
    }
}

/// Goes through what a session does, the first prompt first.
fn play(model: Inner) -> Result<()> {
    let piece = model.sizes.piece;
    let model = Model { inner: Arc::new(model) };
    let context = model.memory().context;
    let mut session = model.session()?;
    let mut read = |tokens: u64, want: Want| {
        if tokens > context {
            return Ok(());
        }
        session.reset()?;
        session.append(&vec![0; tokens as usize], want).map(|_| ())
    };
    let wants = [Want::Logits, Want::Argmax];
    let pieces = PIECES.into_iter().filter(|tokens| *tokens < piece).chain([piece]);
    let (first, rest): (Vec<u64>, Vec<u64>) = pieces.partition(|tokens| *tokens == PIECES[0]);
    for tokens in first.into_iter().chain([1]).chain(rest) {
        for want in wants {
            read(tokens, want)?;
        }
    }
    session.snapshot().map(|_| ())
}

/// Compiles what the launches need.
fn compile(backend: &dyn Backend, launches: &[Launch], shared: &Shared) {
    shared.change(|counts| counts.total = launches.len() as u64);
    let next = AtomicUsize::new(0);
    let work = || {
        while !shared.stop.load(Ordering::Relaxed)
            && let Some(launch) = launches.get(next.fetch_add(1, Ordering::Relaxed))
        {
            if let Err(why) = backend.load(&Pass { launches: vec![launch.clone()], ..Pass::new() }) {
                log::debug!("{why}");
            }
            shared.change(|counts| counts.done += 1);
        }
    };
    let threads = thread::available_parallelism().map_or(1, |n| n.get() / 2).clamp(1, MOST_THREADS);
    thread::scope(|scope| {
        for i in 1..threads {
            // Without it the others do the work.
            let _ = thread::Builder::new().name(format!("gatedelta-kernels-{i}")).spawn_scoped(scope, work);
        }
        work();
    });
}

/// A device in all but memory: what is loaded there is noted.
struct Stage {
    caps: Caps,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    variants: HashSet<(&'static str, Vec<u32>)>,
    /// One of each, in the order in which they were first needed.
    launches: Vec<Launch>,
}

impl Stage {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<Launch> {
        std::mem::take(&mut self.seen().launches)
    }
}

impl Backend for Stage {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, _: &str, bytes: u64) -> Result<Buffer> {
        Ok(Buffer::from_handle((), bytes))
    }

    fn import(&self, _: &str, bytes: HostBytes) -> Result<Buffer> {
        Ok(Buffer::from_handle((), bytes.bytes().len() as u64))
    }

    fn write(&self, _: &View, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read(&self, from: &View) -> Result<Readback> {
        Ok(Readback::new(Zeros(from.bytes as usize)))
    }

    fn load(&self, pass: &Pass) -> Result<()> {
        let mut seen = self.seen();
        for launch in &pass.launches {
            if seen.variants.insert((launch.kernel.name, launch.consts.clone())) {
                seen.launches.push(launch.clone());
            }
        }
        Ok(())
    }

    fn run(&self, pass: &Pass) -> Result<()> {
        self.load(pass)
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn time(&self, _: &Pass) -> Result<Timing> {
        Err(Error::Unsupported { what: "timing".into(), by: self.caps.name.clone(), why: "nothing runs here".into() })
    }
}

/// What is read from memory that does not exist.
struct Zeros(usize);

impl Pending for Zeros {
    fn wait(self: Box<Self>) -> Result<Vec<u8>> {
        Ok(vec![0; self.0])
    }

    fn poll(&mut self) -> Option<Result<Vec<u8>>> {
        Some(Ok(vec![0; self.0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qwen::model::LoadOptions;
    use crate::qwen::random::RandomSource;
    use crate::shape::Dtype;
    use crate::tune::Class;

    /// A model on a stage that looks like a GPU of this class.
    fn staged(class: Class) -> (Inner, Arc<Stage>) {
        let mut config = Config::preset("0.8b").unwrap();
        config.layers.truncate(8);
        config.vocab = 32_000;
        config.eos.clear();
        let caps = Caps {
            name: "stage".into(),
            driver: "none".into(),
            kind: Kind::WebGpu,
            class,
            max_binding: 1 << 30,
            max_buffer: 1 << 30,
            align: 256,
            workgroup_memory: 32 << 10,
            workgroup_threads: 1024,
            subgroup: Some((32, 32)),
            f16: false,
            threads: 0,
            memory: None,
        };
        let source = RandomSource { seed: 1, dtype: Dtype::Bf16 };
        let weights = Weights::sketch(&config, &source, &caps).unwrap();
        let options = LoadOptions { context: Some(4096), ..LoadOptions::default() };
        let plan = MemoryPlan::new(&config, &caps, 0, &options).unwrap();
        let sizes = Sizes::new(&config, &caps, 4096, Dtype::F32).unwrap();
        let stage = Arc::new(Stage { caps, seen: Mutex::default() });
        (Inner::from_parts(config, weights, stage.clone(), plan, sizes), stage)
    }

    #[test]
    fn what_a_conversation_needs_has_been_rehearsed() {
        for class in [Class::Software, Class::Integrated, Class::Discrete] {
            let (model, stage) = staged(class);
            play(model).unwrap();
            let rehearsed = std::mem::take(&mut stage.seen().variants);
            let names: HashSet<&str> = rehearsed.iter().map(|(name, _)| *name).collect();
            for name in ["embed", "matmul", "conv", "gdn_prepare", "gdn_scan", "attend", "argmax", "copy"] {
                assert!(names.contains(name), "{name} is not among {names:?}");
            }
            assert_eq!(stage.take().len(), rehearsed.len(), "one launch of each");

            let (model, stage) = staged(class);
            let mut session = Model { inner: Arc::new(model) }.session().unwrap();
            for tokens in [64, 1, 24, 512, 300, 10, 1, 1] {
                session.prefill(&vec![0; tokens], &mut |_, _| {}).unwrap();
            }
            let missing: Vec<_> = stage.seen().variants.difference(&rehearsed).cloned().collect();
            assert_eq!(missing, [], "{class:?}");
        }
    }

    #[test]
    fn it_ends_with_the_model() {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let thread = thread::spawn(move || {
            let over = Over(&of_thread, Instant::now());
            over.0.change(|counts| counts.total = 3);
            while !over.0.stop.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            over.0.change(|counts| counts.done = 1);
        });
        let rehearsal = Rehearsal { shared: shared.clone(), thread: Some(thread) };
        drop(rehearsal);
        let told = *shared.counts();
        assert!(told.done == 1 && told.total == 3 && told.over.is_some());
    }

    #[test]
    fn whoever_waits_hears_of_the_end() {
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        let thread = thread::spawn(move || {
            let over = Over(&of_thread, Instant::now());
            over.0.change(|counts| counts.total = 2);
            over.0.change(|counts| counts.done = 2);
        });
        let rehearsal = Rehearsal { shared, thread: Some(thread) };
        let mut heard = Vec::new();
        rehearsal.wait(&mut |done, total| heard.push((done, total)));
        assert_eq!(heard.last(), Some(&(2, 2)), "{heard:?}");
    }
}
