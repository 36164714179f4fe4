//! Launches to submissions, each bounded in time.
//!
//! Watchdogs of desktop systems end the process whose submission keeps a GPU for about two seconds, and a screen stutters
//! from a tenth of that. So the backend predicts how long each launch takes (its work times the variant's measured rate),
//! cuts what is too long, and submits before a prediction passes [`BUDGET`]. Rates are learnt from submissions whose end
//! was observed; until then a slow guess stands.
//!
//! A cell cannot be cut, so each kernel bounds what one does, whatever the length of the text: a scan walks at most
//! [`Tile::walk`](crate::tune::Tile::walk) chunks of a sequence; attention, one split of the keys of a page for one tile of
//! queries ([`crate::tune::attend`]); a product, one tile over the depth of the weights; all else, a block of tokens or numbers. A
//! model besides reads its prompts in pieces of [`crate::tune::prefill_tokens`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::pipeline::{BASE_BYTES, Pipeline};
use super::{Shared, lock};
use crate::backend::{Timing, cut};
use crate::error::{Error, Result};
use crate::pass::Pass;
use crate::tune::Class;

/// Predicted time of a submission: the bound is 100 ms, and predictions err.
const BUDGET: Duration = Duration::from_millis(40);
/// Submissions under way at most: enough that the device never idles, few enough that a caller can still stop.
const IN_FLIGHT: usize = 3;
/// Dispatches of a submission: slots of the uniform buffer.
const SLOTS: usize = 1024;
/// A device that has not answered for so long has failed: no submission takes a hundredth of it.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Nanoseconds of work; less says more about overheads than about the rate.
const LEAST_TO_LEARN: f64 = 1e6;

/// Nanoseconds per unit of a launch's work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate(f64);

impl Rate {
    /// The guess for a variant that has not run: slower than any device of the class.
    pub(super) fn first(class: Class) -> Self {
        Rate(match class {
            Class::Discrete => 0.02,
            Class::Integrated | Class::Other => 0.1,
            Class::Cpu | Class::Software => 1.0,
        })
    }
}

/// Time of a dispatch that does nothing.
fn dispatch_ns(class: Class) -> f64 {
    match class {
        Class::Software | Class::Cpu => 20_000.0,
        _ => 3_000.0,
    }
}

/// What the queue remembers between passes.
pub(super) struct State {
    uniforms: wgpu::Buffer,
    /// What `uniforms` holds: a repeated pass uploads nothing.
    uploaded: Vec<u8>,
    in_flight: VecDeque<Submission>,
    /// End of the last finished submission, where it was observed.
    last_end: Option<Instant>,
}

/// A submission under way.
struct Submission {
    index: wgpu::SubmissionIndex,
    done: Arc<AtomicBool>,
    submitted: Instant,
    /// When it ended, where it ran inside the call that submitted it, as on some software drivers.
    ended: Option<Instant>,
    /// Nothing was under way when it was submitted.
    alone: bool,
    /// Predicted nanoseconds of its dispatches as such.
    overhead: f64,
    predicted: Vec<Predicted>,
}

/// What was predicted for the work of one variant.
struct Predicted {
    pipeline: Arc<Pipeline>,
    ns: f64,
    /// The rate that this rests on. Several submissions are predicted before the first is measured: each corrects the rate
    /// that it was predicted with, or the corrections would multiply.
    rate: f64,
}

/// One dispatch of a submission that is being put together.
struct Dispatch {
    ready: usize,
    size: [u32; 3],
}

/// What a pass needs of one launch.
struct Ready {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
}

/// Measures a pass.
pub(super) struct Timer {
    queries: Option<wgpu::QuerySet>,
    submissions: u32,
    longest: Duration,
}

/// Submissions that one timer can tell apart: WebGPU allows 4096 queries in a set.
const TIMED: u32 = 2048;

impl State {
    pub(super) fn new(device: &wgpu::Device) -> Self {
        let slot = slot_bytes(&device.limits());
        let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: (SLOTS * slot) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        State { uniforms, uploaded: vec![0; SLOTS * slot], in_flight: VecDeque::new(), last_end: None }
    }

    /// Waits for the oldest submission and learns from it; None if none is under way.
    fn finish_oldest(&mut self, shared: &Shared) -> Result<Option<Duration>> {
        let Some(submission) = self.in_flight.pop_front() else { return Ok(None) };
        // A failed poll shows in the wait below.
        let _ = shared.device.poll(wgpu::PollType::Poll);
        // When it ended is known if this thread saw it end: here, or inside the submission itself.
        let was_done = submission.ended.is_none() && submission.done.load(Ordering::Acquire);
        if !was_done && submission.ended.is_none() {
            shared.wait(Some(submission.index))?;
        }
        let end = submission.ended.unwrap_or_else(Instant::now);
        let start = match self.last_end {
            // The end before may have been seen late: where both are bounds, only the time since the submission is one too.
            Some(last) if !was_done => Some(last.max(submission.submitted)),
            Some(_) => Some(submission.submitted),
            None if submission.alone || was_done => Some(submission.submitted),
            None => None,
        };
        self.last_end = (!was_done).then_some(end);
        let Some(took) = start.map(|start| end - start) else { return Ok(None) };
        let predicted: f64 = submission.predicted.iter().map(|p| p.ns).sum();
        let measured = (took.as_nanos() as f64 - submission.overhead).max(0.05 * predicted);
        // The end of a submission that was done before is only known to be no later than now.
        if predicted > 0.0 && measured.max(predicted) > LEAST_TO_LEARN && (!was_done || measured < predicted) {
            let ratio = (measured / predicted).clamp(0.05, 20.0);
            for Predicted { pipeline, ns, rate } in &submission.predicted {
                // A variant answers for the share that was predicted for it.
                lock(&pipeline.rate).0 = rate * ratio.powf(ns / predicted);
            }
        }
        Ok((!was_done).then_some(took))
    }
}

/// Bytes between params of two dispatches.
fn slot_bytes(limits: &wgpu::Limits) -> usize {
    (limits.min_uniform_buffer_offset_alignment as usize).max(256)
}

/// Queues a pass.
pub(super) fn run(shared: &Shared, pass: &Pass, timer: Option<&mut Timer>) -> Result<()> {
    shared.fault.check()?;
    let mut state = lock(&shared.queue_state);
    let ready = prepare(shared, pass, &state.uniforms)?;
    let mut batch = Batch::new(shared, timer);
    let budget = BUDGET.as_nanos() as f64;
    for (i, launch) in pass.launches.iter().enumerate() {
        let rate = lock(&ready[i].pipeline.rate).0;
        let per_cell = launch.work as f64 * rate / launch.cells().max(1) as f64;
        let most_cells = (budget / per_cell.max(1e-3)) as u64;
        for block in cut::blocks(launch.grid, shared.limits.max_compute_workgroups_per_dimension, most_cells) {
            let ns = per_cell * block.size.iter().map(|&n| n as f64).product::<f64>();
            if batch.is_full(ns) {
                batch.submit(&mut state, &ready)?;
            }
            batch.push(&ready, i, block, &launch.params, ns, rate);
        }
    }
    batch.submit(&mut state, &ready)
}

/// Compiles and binds everything before anything is queued: a pass runs whole or not at all.
fn prepare(shared: &Shared, pass: &Pass, uniforms: &wgpu::Buffer) -> Result<Vec<Ready>> {
    let mut binds = lock(&shared.binds);
    binds.purge(&mut lock(&shared.dropped));
    let mut ready = Vec::with_capacity(pass.launches.len());
    for launch in &pass.launches {
        let pipeline = shared.pipelines.get(shared, launch.kernel, &launch.consts)?;
        let group = binds.get(shared, &pipeline, launch, uniforms)?;
        ready.push(Ready { pipeline, group });
    }
    Ok(ready)
}

/// A submission that is being put together.
struct Batch<'a> {
    shared: &'a Shared,
    timer: Option<&'a mut Timer>,
    slot: usize,
    dispatches: Vec<Dispatch>,
    params: Vec<u8>,
    overhead: f64,
    predicted: Vec<Predicted>,
    total: f64,
}

impl<'a> Batch<'a> {
    fn new(shared: &'a Shared, timer: Option<&'a mut Timer>) -> Self {
        Batch {
            shared,
            timer,
            slot: slot_bytes(&shared.limits),
            dispatches: Vec::new(),
            params: Vec::new(),
            overhead: 0.0,
            predicted: Vec::new(),
            total: 0.0,
        }
    }

    /// No room for another dispatch of `ns`.
    fn is_full(&self, ns: f64) -> bool {
        !self.dispatches.is_empty() && (self.dispatches.len() == SLOTS || self.total + ns > BUDGET.as_nanos() as f64)
    }

    fn push(&mut self, ready: &[Ready], i: usize, block: cut::Block, params: &[u32], ns: f64, rate: f64) {
        let start = self.params.len();
        self.params.extend_from_slice(bytemuck::cast_slice(&block.base));
        debug_assert_eq!(self.params.len() - start, BASE_BYTES);
        self.params.extend_from_slice(bytemuck::cast_slice(params));
        self.params.resize(start + self.slot, 0);
        self.dispatches.push(Dispatch { ready: i, size: block.size });
        let overhead = dispatch_ns(self.shared.caps.class);
        self.overhead += overhead;
        self.total += overhead + ns;
        let same = |p: &&mut Predicted| Arc::ptr_eq(&p.pipeline, &ready[i].pipeline) && p.rate == rate;
        match self.predicted.iter_mut().find(same) {
            Some(p) => p.ns += ns,
            None => self.predicted.push(Predicted { pipeline: ready[i].pipeline.clone(), ns, rate }),
        }
    }

    fn submit(&mut self, state: &mut State, ready: &[Ready]) -> Result<()> {
        if self.dispatches.is_empty() {
            return Ok(());
        }
        let shared = self.shared;
        while state.in_flight.len() >= IN_FLIGHT {
            self.note(state.finish_oldest(shared)?);
        }
        let alone = state.in_flight.is_empty();
        let dispatches = std::mem::take(&mut self.dispatches);
        let submitted = Instant::now();
        let index = shared.guarded("submission", || {
            if state.uploaded[..self.params.len()] != self.params[..] {
                shared.queue.write_buffer(&state.uniforms, 0, &self.params);
                state.uploaded[..self.params.len()].copy_from_slice(&self.params);
            }
            let mut encoder = shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let timestamp_writes = self.timer.as_mut().and_then(|t| t.next());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
            let mut bound = usize::MAX;
            for (i, dispatch) in dispatches.iter().enumerate() {
                let of = &ready[dispatch.ready];
                if bound != dispatch.ready {
                    pass.set_pipeline(&of.pipeline.pipeline);
                    bound = dispatch.ready;
                }
                pass.set_bind_group(0, &of.group, &[(i * self.slot) as u32]);
                let [x, y, z] = dispatch.size;
                pass.dispatch_workgroups(x, y, z);
            }
            drop(pass);
            shared.queue.submit([encoder.finish()])
        })?;
        let done = Arc::new(AtomicBool::new(false));
        let flag = done.clone();
        shared.queue.on_submitted_work_done(move || flag.store(true, Ordering::Release));
        let _ = shared.device.poll(wgpu::PollType::Poll);
        let ended = done.load(Ordering::Acquire).then(Instant::now);
        state.in_flight.push_back(Submission {
            index,
            done,
            submitted,
            ended,
            alone,
            overhead: std::mem::take(&mut self.overhead),
            predicted: std::mem::take(&mut self.predicted),
        });
        if alone {
            state.last_end = None;
        }
        self.params.clear();
        self.total = 0.0;
        shared.fault.check()
    }

    fn note(&mut self, took: Option<Duration>) {
        if let (Some(timer), Some(took)) = (&mut self.timer, took) {
            timer.longest = timer.longest.max(took);
        }
    }
}

/// Waits for everything queued.
pub(super) fn drain(shared: &Shared) -> Result<()> {
    let mut state = lock(&shared.queue_state);
    drain_state(shared, &mut state, None)
}

fn drain_state(shared: &Shared, state: &mut State, mut timer: Option<&mut Timer>) -> Result<()> {
    while !state.in_flight.is_empty() {
        let took = state.finish_oldest(shared)?;
        if let (Some(timer), Some(took)) = (&mut timer, took) {
            timer.longest = timer.longest.max(took);
        }
    }
    shared.wait(None)
}

impl Timer {
    /// Where the next submission writes its times.
    fn next(&mut self) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let i = self.submissions;
        self.submissions += 1;
        let query_set = self.queries.as_ref()?;
        (i < TIMED).then(|| wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: Some(2 * i),
            end_of_pass_write_index: Some(2 * i + 1),
        })
    }
}

/// Runs a pass alone and measures it.
pub(super) fn time(shared: &Arc<Shared>, pass: &Pass) -> Result<Timing> {
    shared.fault.check()?;
    for launch in &pass.launches {
        shared.pipelines.get(shared, launch.kernel, &launch.consts)?;
    }
    drain(shared)?;
    let queries = match shared.timestamps {
        true => Some(shared.guarded("timestamps", || {
            shared.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count: 2 * TIMED,
            })
        })?),
        false => None,
    };
    let mut timer = Timer { queries, submissions: 0, longest: Duration::ZERO };
    let start = Instant::now();
    run(shared, pass, Some(&mut timer))?;
    drain_state(shared, &mut lock(&shared.queue_state), Some(&mut timer))?;
    let host = Timing { total: start.elapsed(), longest_submission: timer.longest, device_clock: false };
    match &timer.queries {
        Some(queries) if (1..=TIMED).contains(&timer.submissions) => {
            Ok(device_times(shared, queries, timer.submissions)?.unwrap_or(host))
        }
        _ => Ok(host),
    }
}

/// The submissions' times on the device's clock; None if the clock does not tell (some drivers write zeros).
fn device_times(shared: &Arc<Shared>, queries: &wgpu::QuerySet, submissions: u32) -> Result<Option<Timing>> {
    let count = 2 * submissions;
    let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
    let resolved = shared.create("timestamps", 8 * count as u64, usage)?;
    let staging =
        shared.create("timestamps", 8 * count as u64, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?;
    shared.guarded("timestamps", || {
        let mut encoder = shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.resolve_query_set(queries, 0..count, &resolved, 0);
        encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, 8 * count as u64);
        shared.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
    })?;
    shared.wait(None)?;
    let bytes = staging
        .get_mapped_range(0..8 * count as u64)
        .map_err(|e| Error::Device { device: shared.caps.name.clone(), why: format!("timestamps: {e}") })?;
    let ticks: Vec<u64> = bytemuck::allocation::pod_collect_to_vec(&bytes);
    let period = shared.queue.get_timestamp_period() as f64;
    let span = |a: u64, b: u64| Duration::from_nanos((b.saturating_sub(a) as f64 * period) as u64);
    let total = span(ticks[0], ticks[ticks.len() - 1]);
    let longest_submission = ticks.chunks_exact(2).map(|t| span(t[0], t[1])).max().unwrap_or_default();
    Ok((ticks[0] != 0 && !total.is_zero()).then_some(Timing { total, longest_submission, device_clock: true }))
}
