//! What `/metrics` tells, in Prometheus' text format.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use crate::answer::End;

/// Counters, gauges and histograms of a server.
pub struct Metrics {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    connections: IntGauge,
    requests: IntCounterVec,
    answers: IntCounterVec,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    read_tokens: IntCounter,
    written_tokens: IntCounter,
    read_seconds: Histogram,
    step_seconds: Histogram,
    step_answers: Histogram,
    first_token_seconds: Histogram,
    answer_seconds: Histogram,
    losses: IntCounter,
    recoveries: IntCounter,
    on_cpu: IntGauge,
    /// Losses and recoveries that are counted.
    counted: [AtomicU64; 2],
    /// Moving average of an answer's time, in milliseconds.
    typical: AtomicU64,
}

const SHORT: [f64; 10] = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const LONG: [f64; 10] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0];
const ANSWERS: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// If two had the same name.
    pub fn new() -> prometheus::Result<Metrics> {
        let registry = Registry::new_custom(Some("gatedelta".into()), None)?;
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            prometheus::Result::Ok(counter)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            prometheus::Result::Ok(counters)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            prometheus::Result::Ok(histogram)
        };
        Ok(Metrics {
            running: gauge("requests_running", "Requests that have a slot")?,
            waiting: gauge("requests_waiting", "Requests that wait for a slot")?,
            connections: gauge("connections", "Open connections")?,
            requests: counters("http_requests_total", "Responses by path and status", &["path", "status"])?,
            answers: counters("answers_total", "Answers by how they ended", &["end"])?,
            prompt_tokens: counter("prompt_tokens_total", "Tokens of prompts")?,
            cached_tokens: counter("cached_tokens_total", "Tokens of prompts that were in memory")?,
            read_tokens: counter("read_tokens_total", "Tokens of prompts that were read")?,
            written_tokens: counter("written_tokens_total", "Tokens of answers after their first")?,
            read_seconds: histogram("read_seconds", "Time of reading one piece of a prompt", &SHORT)?,
            step_seconds: histogram("step_seconds", "Time of writing a token of each answer under way", &SHORT)?,
            step_answers: histogram("step_answers", "Answers under way when tokens are written", &ANSWERS)?,
            first_token_seconds: histogram("first_token_seconds", "Time from a slot to the first token", &LONG)?,
            answer_seconds: histogram("answer_seconds", "Time from a slot to the end of the answer", &LONG)?,
            losses: counter("device_losses_total", "Times that the device or its driver failed")?,
            recoveries: counter("device_recoveries_total", "Times that the model was loaded again and went on")?,
            on_cpu: gauge("device_on_cpu", "1 once the model runs on the CPU because its device failed")?,
            counted: Default::default(),
            typical: AtomicU64::new(0),
            registry,
        })
    }

    /// Everything as text.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// How long a request that finds `ahead` others for `slots` slots may have to wait, in seconds.
    pub fn wait(&self, ahead: usize, slots: usize) -> u64 {
        let rounds = ahead.div_ceil(slots.max(1)) as u64;
        (self.typical.load(Ordering::Relaxed) * rounds).div_ceil(1000).clamp(1, 60)
    }

    pub(crate) fn slots(&self, running: usize, waiting: usize) {
        self.running.set(running as i64);
        self.waiting.set(waiting as i64);
    }

    pub(crate) fn device(&self, losses: usize, recoveries: usize, on_cpu: bool) {
        for (i, (counter, n)) in [(&self.losses, losses), (&self.recoveries, recoveries)].into_iter().enumerate() {
            let before = self.counted[i].fetch_max(n as u64, Ordering::Relaxed);
            counter.inc_by((n as u64).saturating_sub(before));
        }
        self.on_cpu.set(i64::from(on_cpu));
    }

    pub(crate) fn connection(&self, more: i64) {
        self.connections.add(more);
    }

    pub(crate) fn response(&self, path: &str, status: u16) {
        self.requests.with_label_values(&[path, &status.to_string()]).inc();
    }

    pub(crate) fn prompt(&self, tokens: usize, cached: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.cached_tokens.inc_by(cached as u64);
    }

    pub(crate) fn read(&self, tokens: usize, time: Duration) {
        self.read_tokens.inc_by(tokens as u64);
        self.read_seconds.observe(time.as_secs_f64());
    }

    pub(crate) fn wrote(&self, answers: usize, time: Duration) {
        self.written_tokens.inc_by(answers as u64);
        self.step_answers.observe(answers as f64);
        self.step_seconds.observe(time.as_secs_f64());
    }

    pub(crate) fn first_token(&self, time: Duration) {
        self.first_token_seconds.observe(time.as_secs_f64());
    }

    pub(crate) fn finished(&self, end: &End, time: Duration) {
        let word = match end {
            End::Model => "model",
            End::Stop(_) => "stop",
            other => other.detail().unwrap_or_default(),
        };
        self.answers.with_label_values(&[word]).inc();
        self.answer_seconds.observe(time.as_secs_f64());
        let (new, old) = (time.as_millis() as u64, self.typical.load(Ordering::Relaxed));
        self.typical.store(if old == 0 { new } else { (3 * old + new) / 4 }, Ordering::Relaxed);
    }

    pub(crate) fn cancelled(&self) {
        self.answers.with_label_values(&["cancelled"]).inc();
    }

    pub(crate) fn failed(&self) {
        self.answers.with_label_values(&["failed"]).inc();
    }
}
