//! Repeated measurements and what to say about them.

use std::time::{Duration, Instant};

use gatedelta::backend::{Backend, View};
use gatedelta::kernel::grad::{SUM_ROWS, SumRowsConsts, SumRowsParams};
use gatedelta::pass::Pass;
use gatedelta::{Error, Result, ops, tune};

/// Times of the same work, sorted.
#[derive(Debug, Clone)]
pub struct Sample {
    seconds: Vec<f64>,
    /// True if the device's own clock measured.
    pub device_clock: bool,
    /// Longest single submission seen.
    pub longest_submission: f64,
}

impl Sample {
    /// From measured times; at least one.
    pub fn new(mut seconds: Vec<f64>, device_clock: bool, longest_submission: f64) -> Sample {
        seconds.sort_by(f64::total_cmp);
        Sample { seconds, device_clock, longest_submission }
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        let n = self.seconds.len();
        match n {
            0 => f64::NAN,
            _ => (self.seconds[(n - 1) / 2] + self.seconds[n / 2]) / 2.0,
        }
    }

    /// The fastest.
    pub fn min(&self) -> f64 {
        self.seconds.first().copied().unwrap_or(f64::NAN)
    }

    /// The slowest.
    pub fn max(&self) -> f64 {
        self.seconds.last().copied().unwrap_or(f64::NAN)
    }

    /// How many there are.
    pub fn runs(&self) -> usize {
        self.seconds.len()
    }
}

/// Times a pass that has run before: at least 3 times, then until `budget` is spent, at most 200 times.
///
/// # Errors
/// Whatever the device reports.
pub fn pass(backend: &dyn Backend, pass: &Pass, budget: Duration) -> Result<Sample> {
    let begin = Instant::now();
    let (mut seconds, mut device_clock, mut longest) = (Vec::new(), true, Duration::ZERO);
    while seconds.len() < 3 || (begin.elapsed() < budget && seconds.len() < 200) {
        let timing = backend.time(pass)?;
        seconds.push(timing.total.as_secs_f64());
        device_clock &= timing.device_clock;
        longest = longest.max(timing.longest_submission);
    }
    Ok(Sample::new(seconds, device_clock, longest.as_secs_f64()))
}

/// What [`flushed`] runs before each time: what is in the caches then is of no use, and need not be written back. 256 MiB are written, more than
/// any second-level cache has, and as many others read: of what was only written, up to a cache's size would go to memory while the pass runs
/// (about 3 us where that was measured: a decode step on an H200, in a program of its own).
///
/// # Errors
/// Whatever the device reports.
pub fn flush(backend: &dyn Backend) -> Result<Pass> {
    const BYTES: u64 = 256 << 20;
    /// Of a launch: less than a binding of any device.
    const PART: u64 = 64 << 20;
    let caps = backend.caps();
    let written = backend.alloc("what is written over the caches", BYTES)?.view();
    let read = backend.alloc("what is read into the caches", BYTES)?.view();
    let columns = 1 << 14;
    let sums = backend.alloc("its sums", columns * 4)?.view();
    // Memory that nobody has written may be read without being there.
    let fill = |view: &View, number: u32| {
        let mut pass = Pass::new();
        for at in (0..BYTES).step_by(PART as usize) {
            ops::fill(caps, &mut pass, &view.slice(at, PART)?, 0, PART / 4, number)?;
        }
        Ok::<_, Error>(pass)
    };
    backend.run(&fill(&read, 1)?)?;
    let mut pass = fill(&written, 2)?;
    let (width, lanes) = tune::sum_rows(caps);
    let consts = SumRowsConsts { columns: width, lanes };
    let rows = PART / 4 / columns;
    let params = SumRowsParams { rows: rows as u32, n: columns as u32, x_stride: columns as u32, x_off: 0 };
    for at in (0..BYTES).step_by(PART as usize) {
        let grid = [(columns as u32).div_ceil(width), 1, 1];
        pass.launch(&SUM_ROWS, consts, params, &[&read.slice(at, PART)?, &sums], grid, PART);
    }
    Ok(pass)
}

/// The same with `flush` run before every time.
///
/// # Errors
/// Whatever the device reports.
pub fn flushed(backend: &dyn Backend, pass: &Pass, flush: &Pass, budget: Duration) -> Result<Sample> {
    let begin = Instant::now();
    let (mut seconds, mut device_clock, mut longest) = (Vec::new(), true, Duration::ZERO);
    while seconds.len() < 5 || (begin.elapsed() < budget && seconds.len() < 400) {
        backend.run(flush)?;
        let timing = backend.time(pass)?;
        seconds.push(timing.total.as_secs_f64());
        device_clock &= timing.device_clock;
        longest = longest.max(timing.longest_submission);
    }
    Ok(Sample::new(seconds, device_clock, longest.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let sample = |x: &[f64]| Sample::new(x.to_vec(), false, 0.0);
        assert_eq!(sample(&[3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(sample(&[4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert_eq!((sample(&[3.0, 1.0]).min(), sample(&[3.0, 1.0]).max()), (1.0, 3.0));
        assert!(sample(&[]).median().is_nan());
    }
}
