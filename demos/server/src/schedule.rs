//! The thread that owns the model: which request gets a slot, and who computes next.
//!
//! Each turn reads one piece of one prompt, the prompts taking turns, and writes one token of every answer under way: a long
//! prompt delays the others by one piece a token and no more. What nobody listens to any more is dropped between two turns.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use gatedelta::qwen::Tokenizer;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::answer::{Drawn, End, Likely, Writer};
use crate::engine::Engine;
use crate::metrics::Metrics;
use crate::request::Settings;

/// A request on its way to a slot.
pub struct Job {
    /// What the answer goes on from: at least one token, and fewer than the context.
    pub prompt: Vec<u32>,
    /// How it is drawn.
    pub settings: Settings,
    /// Beginnings of which it has to take one; none where it is free.
    pub forced: Vec<Vec<u32>>,
    /// Where it goes; a closed channel ends it.
    pub updates: mpsc::Sender<Update>,
    /// When it ends at the latest.
    pub deadline: Instant,
    /// Its place among those that run or wait.
    pub permit: OwnedSemaphorePermit,
}

/// What becomes of a job.
#[derive(Debug, Clone)]
pub enum Update {
    /// It has a slot; so many tokens of its prompt need no reading.
    Begun {
        /// Tokens that were in memory.
        cached: usize,
    },
    /// The next piece of text, and its token's log-probabilities if they were asked for.
    Wrote {
        /// The text; may be empty.
        text: String,
        /// Of the token and of the likeliest.
        logprobs: Option<(Likely, Vec<Likely>)>,
    },
    /// The end.
    Done {
        /// Why.
        end: End,
        /// Tokens written.
        tokens: u64,
    },
    /// The end, without an answer.
    Failed(Failure),
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Its time was over before it had a slot.
    Waited,
    /// The server stops.
    Shutdown,
    /// The model or the device failed.
    Model(String),
}

/// What the thread is told.
enum Order {
    Answer(Box<Job>),
    /// No waiting request gets a slot any more.
    Drain,
    /// Whatever still runs ends.
    Stop,
}

/// The way to the thread.
#[derive(Clone)]
pub struct Desk {
    orders: Sender<Order>,
    /// Held by the thread while it lives.
    alive: Weak<()>,
}

impl Desk {
    /// Hands in a job; false if the thread is gone, and the job with it.
    pub fn submit(&self, job: Job) -> bool {
        self.orders.send(Order::Answer(Box::new(job))).is_ok()
    }

    /// True until the thread is gone.
    pub fn alive(&self) -> bool {
        self.alive.strong_count() > 0
    }

    /// Ends what waits; what runs goes on.
    pub fn drain(&self) {
        let _ = self.orders.send(Order::Drain);
    }

    /// Ends what runs, and the thread when the last desk is gone.
    pub fn stop(&self) {
        let _ = self.orders.send(Order::Stop);
    }
}

/// Starts the thread.
///
/// # Errors
/// If the system has none.
pub fn start(
    engine: impl Engine + Send + 'static,
    model: Facts,
    metrics: Arc<Metrics>,
) -> std::io::Result<(Desk, std::thread::JoinHandle<()>)> {
    let (orders, inbox) = channel();
    let worker = Worker {
        running: (0..engine.slots()).map(|_| None).collect(),
        engine,
        model,
        metrics,
        inbox,
        waiting: VecDeque::new(),
        turn: 0,
        draining: false,
        stopping: false,
        gone: false,
    };
    let life = Arc::new(());
    let alive = Arc::downgrade(&life);
    let thread = std::thread::Builder::new().name("model".into()).spawn(move || {
        worker.run();
        drop(life);
    })?;
    Ok((Desk { orders, alive }, thread))
}

/// What the scheduler knows of the model.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Ids to text.
    pub tokenizer: Tokenizer,
    /// Ids that end an answer.
    pub ends: Vec<u32>,
    /// Positions of a sequence.
    pub context: u64,
}

struct Worker<E> {
    engine: E,
    model: Facts,
    metrics: Arc<Metrics>,
    inbox: Receiver<Order>,
    waiting: VecDeque<Box<Job>>,
    /// By slot.
    running: Vec<Option<Running>>,
    /// The slot whose prompt was read last.
    turn: usize,
    draining: bool,
    stopping: bool,
    /// Nobody can send orders any more.
    gone: bool,
}

struct Running {
    job: Box<Job>,
    writer: Writer,
    phase: Phase,
    /// Tokens that the slot holds.
    held: u64,
    began: Instant,
}

#[derive(Clone, Copy)]
enum Phase {
    /// So many tokens of the prompt are read.
    Reading(usize),
    /// This token was given out and not read yet.
    Next(u32),
}

/// Places in a channel that the last token and the end of an answer may take.
const ROOM: usize = 3;
/// How long a turn waits where all answers wait for their readers.
const PATIENCE: Duration = Duration::from_millis(5);
/// How often an idle thread looks after those who wait.
const IDLE: Duration = Duration::from_millis(250);

impl<E: Engine> Worker<E> {
    fn run(mut self) {
        loop {
            self.take_orders();
            if (self.gone || self.stopping) && self.waiting.is_empty() && self.running.iter().all(Option::is_none) {
                return;
            }
            self.sweep();
            self.admit();
            // Before anybody hears of its first token.
            self.tell();
            let read = self.read_one();
            let wrote = self.write_all();
            self.tell();
            if !read && !wrote {
                let idle = self.running.iter().all(Option::is_none);
                self.wait(if idle { IDLE } else { PATIENCE });
            }
        }
    }

    fn tell(&self) {
        self.metrics.slots(self.running.iter().flatten().count(), self.waiting.len());
    }

    fn take_orders(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(order) => self.order(order),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }

    fn wait(&mut self, time: Duration) {
        match self.inbox.recv_timeout(time) {
            Ok(order) => self.order(order),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                self.gone = true;
                // Nothing wakes the thread any more, and readers may still be slow.
                std::thread::sleep(time.min(PATIENCE));
            }
        }
    }

    fn order(&mut self, order: Order) {
        match order {
            Order::Answer(job) => self.waiting.push_back(job),
            Order::Drain => self.draining = true,
            Order::Stop => (self.draining, self.stopping) = (true, true),
        }
    }

    /// Ends what nobody waits for, what has no time left and what shall not go on.
    fn sweep(&mut self) {
        let now = Instant::now();
        let draining = self.draining;
        let metrics = &self.metrics;
        self.waiting.retain(|job| {
            let failure = if draining {
                Failure::Shutdown
            } else if now >= job.deadline {
                Failure::Waited
            } else {
                if job.updates.is_closed() {
                    metrics.cancelled();
                }
                return !job.updates.is_closed();
            };
            metrics.failed();
            let _ = job.updates.try_send(Update::Failed(failure));
            false
        });
        for slot in 0..self.running.len() {
            let Some(running) = &mut self.running[slot] else { continue };
            if running.job.updates.is_closed() {
                self.metrics.cancelled();
                self.running[slot] = None;
            } else if self.stopping || now >= running.job.deadline {
                let end = if self.stopping { End::Shutdown } else { End::Time };
                let text = running.writer.finish();
                self.finish(slot, text, end);
            }
        }
    }

    /// Gives free slots to those who have waited longest.
    fn admit(&mut self) {
        while !self.waiting.is_empty() {
            let free: Vec<usize> = (0..self.running.len()).filter(|slot| self.running[*slot].is_none()).collect();
            if free.is_empty() {
                return;
            }
            let Some(job) = self.waiting.pop_front() else { return };
            let began = Instant::now();
            let writer =
                Writer::new(&self.model.tokenizer, job.settings.clone(), self.model.ends.clone(), job.forced.clone());
            let begun = writer.and_then(|writer| Ok((writer, self.engine.begin(&free, &job.prompt)?)));
            match begun {
                Ok((writer, (slot, cached))) => {
                    self.metrics.prompt(job.prompt.len(), cached);
                    // The channel has room: this is the first that goes into it.
                    let _ = job.updates.try_send(Update::Begun { cached });
                    let phase = Phase::Reading(cached);
                    self.running[slot] = Some(Running { job, writer, phase, held: cached as u64, began });
                }
                Err(why) => {
                    log::error!("no slot: {why}");
                    self.metrics.failed();
                    let _ = job.updates.try_send(Update::Failed(Failure::Model(why.to_string())));
                }
            }
        }
    }

    /// Reads a piece of the next prompt that is not read whole; true if there was one.
    fn read_one(&mut self) -> bool {
        let slots = self.running.len();
        let reading = |slot: &usize| {
            let running = self.running[*slot].as_ref()?;
            match running.phase {
                Phase::Reading(done) => Some((*slot, done)),
                Phase::Next(_) => None,
            }
        };
        let Some((slot, done)) = (1..=slots).map(|i| (self.turn + i) % slots).find_map(|slot| reading(&slot)) else {
            return false;
        };
        self.turn = slot;
        let Some(running) = &mut self.running[slot] else { return false };
        let begin = Instant::now();
        match self.engine.read(slot, &running.job.prompt, done) {
            Err(why) => self.fail(slot, &why.to_string()),
            Ok((end, logits)) => {
                self.metrics.read(end - done, begin.elapsed());
                running.held = end as u64;
                running.phase = Phase::Reading(end);
                if end == running.job.prompt.len() {
                    self.metrics.first_token(running.began.elapsed());
                    self.draw(slot, logits);
                }
            }
        }
        true
    }

    /// Writes a token of every answer whose reader has room for it; true if there was one.
    fn write_all(&mut self) -> bool {
        let next = |(slot, running): (usize, &Option<Running>)| match running {
            Some(Running { phase: Phase::Next(id), job, .. }) if job.updates.capacity() > ROOM => Some((slot, *id)),
            _ => None,
        };
        let tokens: Vec<(usize, u32)> = self.running.iter().enumerate().filter_map(next).collect();
        if tokens.is_empty() {
            return false;
        }
        let begin = Instant::now();
        let results = self.engine.step(&tokens);
        self.metrics.wrote(tokens.len(), begin.elapsed());
        for ((slot, _), result) in tokens.iter().zip(results) {
            match result {
                Ok(logits) => {
                    if let Some(running) = &mut self.running[*slot] {
                        running.held += 1;
                    }
                    self.draw(*slot, logits);
                }
                Err(why) => self.fail(*slot, &why.to_string()),
            }
        }
        true
    }

    /// Draws the next token of a slot.
    fn draw(&mut self, slot: usize, logits: Vec<f32>) {
        let context = self.model.context;
        let Some(running) = &mut self.running[slot] else { return };
        let Drawn { token, mut text, logprobs, mut end } = match running.writer.draw(logits) {
            Ok(drawn) => drawn,
            Err(why) => return self.fail(slot, &why.to_string()),
        };
        if end.is_none() && running.held >= context {
            text += &running.writer.finish();
            end = Some(End::Context);
        }
        if let Some(id) = token {
            running.phase = Phase::Next(id);
        }
        match end {
            None if text.is_empty() && logprobs.is_none() => {}
            // A place is kept free for the end. A reader that has gone is noticed in the next turn.
            None => drop(running.job.updates.try_send(Update::Wrote { text, logprobs })),
            Some(end) => {
                if logprobs.is_some() {
                    let _ = running.job.updates.try_send(Update::Wrote { text: String::new(), logprobs });
                }
                self.finish(slot, text, end);
            }
        }
    }

    /// Ends an answer, with what is left of its text.
    fn finish(&mut self, slot: usize, text: String, end: End) {
        let Some(running) = &mut self.running[slot] else { return };
        let tokens = running.writer.given();
        let updates = &running.job.updates;
        self.metrics.finished(&end, running.began.elapsed());
        // Where a reader took nothing for so long that there is no room, its answer is over anyhow.
        if !text.is_empty() {
            let _ = updates.try_send(Update::Wrote { text, logprobs: None });
        }
        let _ = updates.try_send(Update::Done { end, tokens });
        self.engine.end(slot);
        self.running[slot] = None;
    }

    fn fail(&mut self, slot: usize, why: &str) {
        log::error!("slot {slot}: {why}");
        if let Some(running) = &self.running[slot] {
            self.metrics.failed();
            let _ = running.job.updates.try_send(Update::Failed(Failure::Model(why.to_string())));
        }
        self.running[slot] = None;
    }
}
