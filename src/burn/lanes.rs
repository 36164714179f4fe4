//! Operations over memory of the device that is kept ready per shape: batches of training come in a few shapes, in any order.

use std::sync::{Mutex, PoisonError};

use crate::backend::{Backend, View};
use crate::error::Result;
use crate::pass::Pass;

/// Shapes that are kept ready at a time.
pub(super) const SHAPES: usize = 12;

/// An operation of one shape.
pub(super) trait Work: Clone + PartialEq {
    /// What both directions share.
    type Memory;

    /// Memory, and the way forward over it.
    fn forward(&self, backend: &dyn Backend) -> Result<(Self::Memory, Way)>;

    /// The way back over the same memory.
    fn backward(&self, backend: &dyn Backend, memory: &Self::Memory) -> Result<Way>;
}

/// A pass, what is copied in before it, and what is copied out after it.
pub(super) struct Way {
    pub inputs: Vec<Part>,
    pub outputs: Vec<Part>,
    pub pass: Pass,
}

/// Numbers of an argument or a result, f32, from `at` on, and the memory of the device that they fill.
pub(super) struct Part {
    pub tensor: usize,
    pub at: u64,
    pub view: View,
}

/// All of the n-th argument or result.
pub(super) fn whole(tensor: usize, view: &View) -> Part {
    Part { tensor, at: 0, view: view.clone() }
}

/// Memory for so many f32 numbers, in a buffer of its own: what is written may not lie beside what is read.
pub(super) fn room(backend: &dyn Backend, what: &str, numbers: u64) -> Result<View> {
    backend.alloc(what, (numbers * 4).max(16))?.slice(0, numbers * 4)
}

struct Lane<W: Work> {
    work: W,
    memory: W::Memory,
    forward: Way,
    /// Made by the first backward pass.
    backward: Option<Way>,
}

/// The shapes that are ready. All layers use the same: their calls follow each other.
pub(super) struct Lanes<W: Work> {
    /// The last one is the one used last. Locked from a call's first copy to its last.
    lanes: Mutex<Vec<Lane<W>>>,
    most: usize,
}

impl<W: Work> Lanes<W> {
    /// Keeps `most` shapes at a time.
    pub fn new(most: usize) -> Self {
        Lanes { lanes: Mutex::default(), most }
    }

    /// Runs `call` on the way forward.
    pub fn forward<R>(&self, backend: &dyn Backend, work: &W, call: impl FnOnce(&Way) -> Result<R>) -> Result<R> {
        self.with(backend, work, |lane| call(&lane.forward))
    }

    /// Runs `call` on the way back.
    pub fn backward<R>(&self, backend: &dyn Backend, work: &W, call: impl FnOnce(&Way) -> Result<R>) -> Result<R> {
        self.with(backend, work, |lane| match &lane.backward {
            Some(way) => call(way),
            None => call(lane.backward.insert(lane.work.backward(backend, &lane.memory)?)),
        })
    }

    fn with<R>(&self, backend: &dyn Backend, work: &W, f: impl FnOnce(&mut Lane<W>) -> Result<R>) -> Result<R> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = match lanes.iter().position(|lane| lane.work == *work) {
            Some(at) => lanes.remove(at),
            None => {
                // Before the new one takes its memory.
                let spare = lanes.len().saturating_sub(self.most - 1);
                lanes.drain(..spare);
                let (memory, forward) = work.forward(backend)?;
                Lane { work: work.clone(), memory, forward, backward: None }
            }
        };
        let at = lanes.len();
        lanes.push(lane);
        f(&mut lanes[at])
    }
}

/// A call from the host: fills the inputs, runs, gives `results` many results.
pub(super) fn call(backend: &dyn Backend, way: &Way, inputs: &[&[f32]], results: usize) -> Result<Vec<Vec<f32>>> {
    for Part { tensor, at, view } in &way.inputs {
        let numbers = &inputs[*tensor][*at as usize..][..(view.bytes / 4) as usize];
        backend.write(view, bytemuck::cast_slice(numbers))?;
    }
    backend.run(&way.pass)?;
    let pending = way.outputs.iter().map(|part| backend.read(&part.view)).collect::<Result<Vec<_>>>()?;
    let mut out = vec![Vec::new(); results];
    for (Part { tensor, at, .. }, pending) in way.outputs.iter().zip(pending) {
        let numbers: Vec<f32> = pending.wait_as()?;
        let result: &mut Vec<f32> = &mut out[*tensor];
        if result.is_empty() {
            *result = numbers;
        } else {
            // Parts of a result come in its order.
            debug_assert_eq!(result.len() as u64, *at);
            result.extend(numbers);
        }
    }
    Ok(out)
}
