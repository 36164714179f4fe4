//! Runs bound launches: the threads walk them together and share out their cells.
//!
//! There is no barrier that every thread has to reach. A launch is over when all of its cells are done, whoever did them,
//! and the thread that finishes the last one opens the next launch. A thread that the system has put aside holds up
//! nothing but the cells it has taken.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use pulp::{Simd, WithSimd};

use super::memory::Scratch;
use super::simd::Level;
use crate::error::{Error, Result};

/// A bound launch, written once for all vector widths.
///
/// It runs as one or more phases, each of independent cells. The cells are the backend's own: they cover what the cells of
/// the launch cover, cut in whatever way suits a CPU. What a cell computes must not depend on which thread runs it.
pub(super) trait Row: Sync {
    /// Checks data that earlier launches may have written.
    fn begin(&self) -> Result<()> {
        Ok(())
    }

    /// Cells of each phase.
    fn phases(&self) -> Vec<usize>;

    /// Numbers of memory that the phases share.
    fn shared(&self) -> usize {
        0
    }

    /// Runs one cell.
    fn cell<S: Simd>(&self, simd: S, phase: usize, cell: usize, local: &mut Local) -> Result<()>;
}

/// What a thread gives its cells.
pub(super) struct Local<'a> {
    /// Memory of the thread.
    pub scratch: &'a mut Scratch,
    /// Memory of the launch, of the size it asked for.
    pub shared: Shared<'a>,
}

/// Memory that the phases of a launch share.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    ptr: *mut f32,
    len: usize,
    life: std::marker::PhantomData<&'a f32>,
}

// SAFETY: plain numbers; `part` leaves to its caller that parts do not overlap.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// All of `numbers`.
    pub fn new(numbers: &'a mut [f32]) -> Self {
        Shared { ptr: numbers.as_mut_ptr(), len: numbers.len(), life: std::marker::PhantomData }
    }

    /// `len` numbers from `start`.
    ///
    /// # Safety
    /// No reference into these numbers is alive in another cell, save that many cells may read what they share.
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start <= self.len && len <= self.len - start, "{len} numbers from {start} of {}", self.len);
        // SAFETY: in bounds as just asserted; unaliased as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}

/// A [`Row`] behind a pointer.
pub(super) trait Task: Sync {
    fn begin(&self) -> Result<()>;
    fn phases(&self) -> Vec<usize>;
    fn shared(&self) -> usize;
    fn cells(&self, level: Level, phase: usize, cells: Range<usize>, local: &mut Local) -> Result<()>;
}

impl<R: Row> Task for R {
    fn begin(&self) -> Result<()> {
        Row::begin(self)
    }

    fn phases(&self) -> Vec<usize> {
        Row::phases(self)
    }

    fn shared(&self) -> usize {
        Row::shared(self)
    }

    fn cells(&self, level: Level, phase: usize, cells: Range<usize>, local: &mut Local) -> Result<()> {
        level.dispatch(Cells { row: self, phase, cells, local })
    }
}

struct Cells<'a, 'b, R> {
    row: &'a R,
    phase: usize,
    cells: Range<usize>,
    local: &'a mut Local<'b>,
}

impl<R: Row> WithSimd for Cells<'_, '_, R> {
    type Output = Result<()>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        for cell in self.cells {
            self.row.cell(simd, self.phase, cell, self.local)?;
        }
        Ok(())
    }
}

/// One phase of one launch.
#[repr(align(64))]
struct Stage {
    /// First cell that nobody has taken.
    next: AtomicU64,
    /// Cells that are done.
    done: AtomicU64,
    cells: u64,
    /// Cells that a thread takes at once.
    grain: u64,
    task: usize,
    phase: usize,
}

/// A pass that is being run.
pub(super) struct Job<'p> {
    level: Level,
    names: Vec<&'static str>,
    tasks: Vec<Box<dyn Task + 'p>>,
    stages: Vec<Stage>,
    /// Stages before this one may run.
    open: AtomicUsize,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl<'p> Job<'p> {
    /// Tasks in order, each with the name that errors call it by.
    pub fn new(level: Level, threads: usize, tasks: Vec<(&'static str, Box<dyn Task + 'p>)>) -> Self {
        let (names, tasks): (Vec<_>, Vec<_>) = tasks.into_iter().unzip();
        let mut stages = Vec::with_capacity(tasks.len());
        for (i, task) in tasks.iter().enumerate() {
            for (phase, cells) in task.phases().into_iter().enumerate() {
                // Every thread comes back about 16 times, so that the last cells are shared out evenly.
                let grain = if threads == 1 { cells } else { (cells / (threads * 16)).max(1) } as u64;
                let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
                if cells > 0 {
                    stages.push(Stage { next, done, cells: cells as u64, grain, task: i, phase });
                }
            }
        }
        let (open, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        Job { level, names, tasks, stages, open, stop, error: Mutex::new(None) }
    }

    /// Numbers of memory that [`Job::walk`] wants as `shared`.
    pub fn shared(&self) -> usize {
        self.tasks.iter().map(|t| t.shared()).max().unwrap_or(0)
    }

    /// Opens the first stage; before any thread walks.
    pub fn start(&self) {
        self.open_stage(0);
    }

    /// Takes part until the pass is over. Any number of threads may.
    pub fn walk(&self, scratch: &mut Scratch, shared: Shared) {
        let mut local = Local { scratch, shared };
        for (i, stage) in self.stages.iter().enumerate() {
            if !self.wait_for(i) {
                return;
            }
            loop {
                let first = stage.next.fetch_add(stage.grain, Ordering::Relaxed);
                if first >= stage.cells {
                    break;
                }
                let end = (first + stage.grain).min(stage.cells);
                let task = &self.tasks[stage.task];
                let cells = first as usize..end as usize;
                self.guard(stage.task, || task.cells(self.level, stage.phase, cells, &mut local));
                if stage.done.fetch_add(end - first, Ordering::AcqRel) + (end - first) == stage.cells {
                    self.open_stage(i + 1);
                }
            }
        }
    }

    /// The error that stopped the pass.
    pub fn finish(self) -> Result<()> {
        match self.error.into_inner() {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(error),
            Err(poisoned) => poisoned.into_inner().map_or(Ok(()), Err),
        }
    }

    /// Lets all threads into stage `i`, whose inputs are complete.
    fn open_stage(&self, i: usize) {
        if let Some(stage) = self.stages.get(i).filter(|stage| stage.phase == 0) {
            self.guard(stage.task, || self.tasks[stage.task].begin());
        }
        self.open.store(i + 1, Ordering::Release);
    }

    /// Spins, then yields, until stage `i` is open; false if the pass has stopped.
    fn wait_for(&self, i: usize) -> bool {
        let mut spins = 0u32;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
            if self.open.load(Ordering::Acquire) > i {
                return true;
            }
            // A launch of a decode pass lasts some microseconds; who waits longer gives way to others.
            if spins < 200 {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Runs `f`; its error or panic stops the pass. The first one is kept.
    fn guard(&self, task: usize, f: impl FnOnce() -> Result<()>) {
        let error = match catch_unwind(AssertUnwindSafe(f)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => Error::Device {
                device: "cpu".into(),
                why: format!("{} panicked: {}", self.names[task], message(&*panic)),
            },
        };
        let mut first = self.error.lock().unwrap_or_else(|e| e.into_inner());
        first.get_or_insert(error);
        self.stop.store(true, Ordering::Release);
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cells that fail in the way and at the place told.
    struct Faulty {
        cells: usize,
        panics: Option<usize>,
        errs: Option<usize>,
        ran: AtomicUsize,
    }

    impl Row for Faulty {
        fn phases(&self) -> Vec<usize> {
            vec![self.cells, 0, self.cells]
        }

        fn cell<S: Simd>(&self, _: S, phase: usize, cell: usize, _: &mut Local) -> Result<()> {
            self.ran.fetch_add(1, Ordering::Relaxed);
            if phase == 2 && self.panics == Some(cell) {
                panic!("cell {cell} is out of order");
            }
            if self.errs == Some(cell) {
                return Err(Error::argument("cell", cell, "another"));
            }
            Ok(())
        }
    }

    fn run(threads: usize, panics: Option<usize>, errs: Option<usize>) -> (Result<()>, usize) {
        let rows: Vec<Faulty> = (0..20)
            .map(|i| {
                let (panics, errs) = if i == 7 { (panics, errs) } else { (None, None) };
                Faulty { cells: 100, panics, errs, ran: AtomicUsize::new(0) }
            })
            .collect();
        let tasks = rows.iter().map(|r| ("faulty", Box::new(Borrowed(r)) as Box<dyn Task>)).collect();
        let job = Job::new(Level::detect(), threads, tasks);
        job.start();
        std::thread::scope(|s| {
            for _ in 0..threads {
                s.spawn(|| job.walk(&mut Scratch::default(), Shared::new(&mut [])));
            }
        });
        let result = job.finish();
        (result, rows.iter().map(|r| r.ran.load(Ordering::Relaxed)).sum())
    }

    struct Borrowed<'a>(&'a Faulty);

    impl Row for Borrowed<'_> {
        fn phases(&self) -> Vec<usize> {
            Row::phases(self.0)
        }

        fn cell<S: Simd>(&self, simd: S, phase: usize, cell: usize, local: &mut Local) -> Result<()> {
            self.0.cell(simd, phase, cell, local)
        }
    }

    #[test]
    fn every_cell_runs_once() {
        for threads in [1, 2, 3, 8] {
            let (result, ran) = run(threads, None, None);
            assert!(result.is_ok());
            assert_eq!(ran, 20 * 200);
        }
    }

    #[test]
    fn a_panic_or_error_stops_the_pass_without_hanging() {
        for threads in [1, 2, 3, 8] {
            let (result, ran) = run(threads, Some(42), None);
            let text = result.unwrap_err().to_string();
            assert!(text.contains("faulty panicked: cell 42"), "{text}");
            assert!(ran <= 8 * 200, "{ran} cells ran after the panic");
            let (result, _) = run(threads, None, Some(0));
            assert!(matches!(result, Err(Error::Argument { .. })));
        }
    }
}
