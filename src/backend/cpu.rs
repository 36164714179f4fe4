//! The native CPU backend: every row of the kernel table as vector code on all cores.
//!
//! ```text
//! memory.rs   where bytes live            bind.rs     launch -> typed, checked memory
//! engine.rs   threads, launches, cells    table.rs    checks of tables, which are data
//! simd.rs     vectors, exp, conversions   product.rs  the register-blocked product
//! weights.rs  stored types as vectors     the rest    one file per row, or per few small ones
//! ```
//!
//! All of the crate's unsafe code that is not forced by a driver is in this folder.

mod attend;
mod attention;
mod bind;
mod conv;
mod conv_grad;
mod engine;
mod gate;
mod gate_grad;
mod gated_norm;
mod gated_norm_grad;
mod gdn_cut;
mod gdn_grad_chunk;
mod gdn_grad_qk;
mod gdn_grad_scan;
mod gdn_mix_step;
mod gdn_prepare;
mod gdn_scan;
mod gdn_step;
mod matmul;
mod matvec;
mod memory;
mod product;
mod simd;
mod simple;
mod sum_rows;
mod table;
mod weights;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use self::bind::Bind;
use self::engine::{Job, Shared, Task};
use self::memory::{Memory, Scratch};
use self::simd::Level;
use super::{Backend, Buffer, HostBytes, Pending, Readback, Timing, View};
use crate::error::{Error, Result};
use crate::kernel::{gdn, gdn_cut as cut_rows, gdn_grad, grad, model};
use crate::pass::{Launch, Pass};
use crate::tune::{Caps, Class, Kind};

/// The host's processor.
pub struct Cpu {
    caps: Caps,
    /// Distinguishes the memory of this backend.
    id: u64,
    level: Level,
    /// The threads beside the one that calls.
    helpers: Option<rayon::ThreadPool>,
    /// Held by everything that touches memory, so that calls are ordered.
    lock: Mutex<Scratches>,
}

/// Memory that passes work in and leave for the next.
struct Scratches {
    /// One per thread.
    threads: Vec<Mutex<Scratch>>,
    shared: Scratch,
}

/// Work below which waking the other threads takes longer than doing it alone: about 10 us of one thread.
const ALONE: u64 = 200_000;

impl Cpu {
    /// The processor with this many threads, by default as many as it runs at the same time.
    ///
    /// # Errors
    /// [`Error::Argument`] for no threads or more than 1024, [`Error::Device`] if the system refuses to start them.
    pub fn new(threads: Option<usize>) -> Result<Cpu> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        if threads == 0 || threads > 1024 {
            return Err(Error::argument("threads", threads, "1 to 1024"));
        }
        let level = Level::detect();
        let helpers = match threads {
            1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads - 1)
                    .thread_name(|i| format!("gatedelta-{i}"))
                    .build()
                    .map_err(|e| Error::Device { device: "cpu".into(), why: e.to_string() })?,
            ),
        };
        let caps = Caps {
            name: processor_name().unwrap_or_else(|| std::env::consts::ARCH.into()),
            driver: format!("native, {}, {threads} threads", level.name()),
            kind: Kind::Cpu,
            class: Class::Cpu,
            max_binding: isize::MAX as u64,
            max_buffer: isize::MAX as u64,
            align: 4,
            workgroup_memory: 0,
            workgroup_threads: 1,
            subgroup: None,
            f16: false,
            threads: threads as u32,
            memory: physical_memory(),
        };
        let scratches =
            Scratches { threads: (0..threads).map(|_| Mutex::default()).collect(), shared: Scratch::default() };
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Cpu { caps, id, level, helpers, lock: Mutex::new(scratches) })
    }

    fn lock(&self) -> MutexGuard<'_, Scratches> {
        self.lock.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The bytes of a view, or why they cannot be had.
    fn memory<'v>(&self, view: &'v View) -> Result<&'v Memory> {
        let memory = match view.buffer.handle::<Memory>() {
            Some(memory) if memory.owner == self.id => memory,
            _ => return Err(Error::argument("view", "memory of another backend", "memory of this CPU backend")),
        };
        if view.offset.checked_add(view.bytes).is_none_or(|end| end > view.buffer.bytes()) {
            let found = format!("{} bytes from {}", view.bytes, view.offset);
            return Err(Error::argument("view", found, format!("inside {} bytes", view.buffer.bytes())));
        }
        Ok(memory)
    }

    fn bind<'p>(&self, pass: &'p Pass) -> Result<Vec<(&'static str, Box<dyn Task + 'p>)>> {
        pass.launches
            .iter()
            .filter(|l| l.cells() > 0)
            .map(|l| Ok((l.kernel.name, bind(&Bind::new(l, self.id)?, l)?)))
            .collect()
    }
}

/// The kernel row as a task.
fn bind<'p>(b: &Bind<'p>, launch: &Launch) -> Result<Box<dyn Task + 'p>> {
    Ok(match launch.kernel {
        k if *k == gdn::CONV => Box::new(conv::Conv::bind(b)?),
        k if *k == gdn::CONV_TAIL => Box::new(conv::ConvTail::bind(b)?),
        k if *k == gdn::GATE => Box::new(gate::Gate::bind(b)?),
        k if *k == gdn::PREPARE => Box::new(gdn_prepare::Prepare::bind(b)?),
        k if *k == cut_rows::CUT => Box::new(gdn_cut::Cut::bind(b)?),
        k if *k == cut_rows::CARRY => Box::new(gdn_cut::Carry::bind(b)?),
        k if *k == gdn::SCAN => Box::new(gdn_scan::Scan::bind(b)?),
        k if *k == gdn::STEP => Box::new(gdn_step::Step::bind(b)?),
        k if *k == gdn::GATED_NORM => Box::new(gated_norm::GatedNorm::bind(b)?),
        k if *k == gdn::MIX_STEP => Box::new(gdn_mix_step::MixStep::bind(b)?),
        k if *k == gdn_grad::GRAD_SCAN => Box::new(gdn_grad_scan::GradScan::bind(b)?),
        k if *k == gdn_grad::GRAD_CHUNK => Box::new(gdn_grad_chunk::GradChunk::bind(b)?),
        k if *k == gdn_grad::GRAD_QK => Box::new(gdn_grad_qk::GradQk::bind(b)?),
        k if *k == gdn_grad::GRAD_GATES => Box::new(gdn_grad_chunk::GradGates::bind(b)?),
        k if *k == grad::CONV_GRAD => Box::new(conv_grad::ConvGrad::bind(b)?),
        k if *k == grad::CONV_TAIL_GRAD => Box::new(conv_grad::ConvTailGrad::bind(b)?),
        k if *k == grad::GATE_GRAD => Box::new(gate_grad::GateGrad::bind(b)?),
        k if *k == grad::GATED_NORM_GRAD => Box::new(gated_norm_grad::GatedNormGrad::bind(b)?),
        k if *k == grad::SUM_ROWS => Box::new(sum_rows::SumRows::bind(b)?),
        k if *k == model::EMBED => Box::new(simple::Embed::bind(b)?),
        k if *k == model::RMS_NORM => Box::new(gated_norm::RmsNorm::bind(b)?),
        k if *k == model::MATMUL => Box::new(matmul::Matmul::bind(b)?),
        k if *k == model::MATVEC => Box::new(matvec::Matvec::bind(b)?),
        k if *k == model::ATTN_PREPARE => Box::new(attention::AttnPrepare::bind(b)?),
        k if *k == model::ATTEND => Box::new(attend::Attend::bind(b)?),
        k if *k == model::ATTEND_MERGE => Box::new(attention::AttendMerge::bind(b)?),
        k if *k == model::SWIGLU => Box::new(simple::Swiglu::bind(b)?),
        k if *k == model::ARGMAX => Box::new(simple::Argmax::bind(b)?),
        k if *k == model::COPY => Box::new(simple::Words::bind(b, true)?),
        k if *k == model::FILL => Box::new(simple::Words::bind(b, false)?),
        k => {
            return Err(Error::Unsupported {
                what: format!("kernel {}", k.name),
                by: "the CPU backend".into(),
                why: "it has no function of that name".into(),
            });
        }
    })
}

impl Backend for Cpu {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        let memory = Memory::new(self.id, bytes).ok_or_else(|| Error::OutOfMemory {
            device: self.caps.name.clone(),
            what: what.into(),
            needed: bytes,
            limit: match self.caps.memory {
                Some(n) => format!("the machine has {n}"),
                None => "the system has no more to give".into(),
            },
        })?;
        Ok(Buffer::from_handle(memory, bytes))
    }

    fn import(&self, _what: &str, bytes: HostBytes) -> Result<Buffer> {
        let len = bytes.bytes().len() as u64;
        Ok(Buffer::from_handle(Memory::host(self.id, bytes), len))
    }

    fn write(&self, to: &View, bytes: &[u8]) -> Result<()> {
        let memory = self.memory(to)?;
        if to.bytes < bytes.len() as u64 {
            return Err(Error::argument(
                "view to write",
                format!("{} bytes", to.bytes),
                format!("{} bytes", bytes.len()),
            ));
        }
        let Some(start) = memory.ptr_mut() else {
            return Err(Error::argument("view to write", "imported host bytes", "memory that can be written"));
        };
        let _order = self.lock();
        // SAFETY: the range is inside the memory; the lock keeps everyone else away from it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(to.offset as usize), bytes.len()) }
        Ok(())
    }

    fn read(&self, from: &View) -> Result<Readback> {
        let memory = self.memory(from)?;
        let _order = self.lock();
        // SAFETY: the range is inside the memory; the lock keeps writers away from it.
        let bytes = unsafe { std::slice::from_raw_parts(memory.ptr().add(from.offset as usize), from.bytes as usize) };
        Ok(Readback::new(Ready(Some(bytes.to_vec()))))
    }

    fn load(&self, pass: &Pass) -> Result<()> {
        self.bind(pass).map(|_| ())
    }

    fn run(&self, pass: &Pass) -> Result<()> {
        let tasks = self.bind(pass)?;
        let work = pass.launches.iter().fold(0u64, |sum, l| sum.saturating_add(l.work));
        let helpers = self.helpers.as_ref().filter(|_| work >= ALONE);
        let job = Job::new(self.level, helpers.map_or(0, |pool| pool.current_num_threads()) + 1, tasks);
        let mut scratches = self.lock();
        let Scratches { threads: locals, shared } = &mut *scratches;
        let (locals, shared) = (&*locals, Shared::new(shared.floats(job.shared())));
        job.start();
        let walk = |i: usize| {
            if let Some(scratch) = locals.get(i) {
                job.walk(&mut scratch.lock().unwrap_or_else(|e| e.into_inner()), shared);
            }
        };
        match helpers {
            None => walk(0),
            // The caller begins at once; the helpers join in when the system has woken them.
            Some(pool) => pool.in_place_scope(|scope| {
                scope.spawn_broadcast(|_, context| walk(context.index() + 1));
                walk(0);
            }),
        }
        job.finish()
    }

    fn wait(&self) -> Result<()> {
        let _order = self.lock();
        Ok(())
    }

    fn time(&self, pass: &Pass) -> Result<Timing> {
        let start = Instant::now();
        self.run(pass)?;
        let total = start.elapsed();
        Ok(Timing { total, longest_submission: total, device_clock: false })
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cpu({}, {})", self.caps.name, self.caps.driver)
    }
}

/// Bytes that are there at once.
struct Ready(Option<Vec<u8>>);

impl Ready {
    fn take(&mut self) -> Result<Vec<u8>> {
        self.0.take().ok_or_else(|| Error::argument("readback", "taken before", "taken once"))
    }
}

impl Pending for Ready {
    fn wait(mut self: Box<Self>) -> Result<Vec<u8>> {
        self.take()
    }

    fn poll(&mut self) -> Option<Result<Vec<u8>>> {
        Some(self.take())
    }
}

/// The processor's own name, where the system tells it in a file.
fn processor_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = info.lines().find_map(|l| l.strip_prefix("model name"))?;
    Some(name.trim_start_matches([' ', '\t', ':']).trim().to_string())
}

/// Bytes of memory of the machine, where the system tells it in a file.
pub(crate) fn physical_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
