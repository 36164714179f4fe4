//! The thread that runs the model. The window sends commands and reads updates; neither ever waits for the other.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use gatedelta::backend::webgpu::WebGpu;
use gatedelta::device::{self, Account};
use gatedelta::qwen::recover::Opened;
use gatedelta::qwen::{MemoryPlan, Place};
use gatedelta_agent::agent::{self, Agent};
use gatedelta_agent::engine::local::Local;
use gatedelta_agent::engine::{Answer, Engine, Step};
use gatedelta_agent::event::{Event, Reason, Sink, Start, Summary};
use gatedelta_agent::options::{Args, TOKENS};
use gatedelta_agent::parse::Call;
use gatedelta_agent::tools::{self, TIME_LIMIT, Toolbox};
use serde_json::{Map, Value};

use crate::conversation::{Figures, Outcome};

/// Which model runs where.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    /// A checkpoint's directory; the model inside the program if none.
    pub model: Option<PathBuf>,
    /// A device's name; the best that works if none.
    pub device: Option<String>,
}

/// What the window wants.
enum Command {
    Load(Choice),
    Test,
    Ask { turn: u64, history: Vec<Value>, question: String },
}

/// What the window should know.
#[derive(Debug)]
pub enum Update {
    /// A model is being loaded: so many bytes of so many.
    Loading(u64, u64),
    /// So many kernels of so many are compiled, where loading did not leave the time for all.
    Compiling(u64, u64),
    /// A model is ready.
    Loaded(Box<Loaded>),
    /// A model or a device cannot be used; whether another one is there instead is said by what comes next.
    Refused(String),
    /// Every device was tried.
    Tested(Account),
    /// So many tokens of so many are read.
    Reading(usize, usize),
    /// The next piece of reasoning.
    Reasoning(String),
    /// The next piece of the answer.
    Text(String),
    /// A call of this tool is being written.
    Opening(String),
    /// A tool runs.
    Called(String, Map<String, Value>),
    /// It has run.
    Returned(Outcome),
    /// A call that cannot be made; why.
    Broken(String),
    /// Something befell the device, and it goes on.
    Notice(String),
    /// Which turns the model can go back to, and what that takes.
    Held(Vec<Held>),
    /// The answer is complete, or failed; the model's view of the turn comes with it.
    Answered(u64, std::result::Result<(Figures, Vec<Value>), String>),
}

/// What is held of a turn that this model has answered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Held {
    /// The turn.
    pub turn: u64,
    /// Tokens of the conversation up to its end.
    pub tokens: u64,
    /// Of these, how many would be read again on going back there: all but those of the nearest snapshot.
    pub again: u64,
    /// Device memory of that snapshot.
    pub bytes: u64,
}

/// A model that is ready.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What was asked for.
    pub choice: Choice,
    /// What it is.
    pub start: Start,
    /// The devices, and why this one.
    pub account: Account,
    /// What it takes on the device.
    pub memory: MemoryPlan,
    /// Whether it computes on the device that draws the window.
    pub shared: bool,
    /// How long it took.
    pub time: Duration,
}

/// The thread, as the window sees it.
pub struct Worker {
    commands: Sender<Command>,
    updates: Receiver<Update>,
    stop: Arc<AtomicBool>,
    tokens: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts the thread. `args` are what the agent is given beside model and device; `host` is the device that draws the window;
    /// `state` is the folder where the model's state outlives the program; `wake` is called after each update.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(
        args: Args,
        host: Option<WebGpu>,
        state: Option<PathBuf>,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        Worker::start_on(args, host, state, Box::new(devices), wake)
    }

    /// The same with other devices: for tests of what befalls them.
    #[doc(hidden)]
    pub fn start_on(
        args: Args,
        host: Option<WebGpu>,
        state: Option<PathBuf>,
        devices: Devices,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (commands, orders) = channel();
        let (sender, updates) = channel();
        let (stop, tokens) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut desk = Desk {
            args,
            host,
            devices,
            state,
            news: News { sender, wake: Box::new(wake) },
            stop: stop.clone(),
            tokens: tokens.clone(),
            agent: None,
            loaded: None,
            recoveries: 0,
            ends: HashMap::new(),
        };
        let thread = std::thread::Builder::new().name("model".into()).spawn(move || {
            while let Ok(order) = orders.recv() {
                desk.obey(order);
            }
        });
        let thread = thread.context("the thread of the model cannot be started")?;
        Ok(Worker { commands, updates, stop, tokens, thread })
    }

    fn send(&self, command: Command) {
        // A thread that has ended shows in the next call of `next`.
        let _ = self.commands.send(command);
    }

    /// Loads a model, in the place of the one that is loaded. If that fails the one before comes back.
    pub fn load(&self, choice: Choice) {
        self.send(Command::Load(choice));
    }

    /// Opens and tests every device there is.
    pub fn test_devices(&self) {
        self.send(Command::Test);
    }

    /// Asks a question; `history` is what the model is told of the turns before, and `turn` comes back with the answer.
    pub fn ask(&self, turn: u64, history: Vec<Value>, question: String) {
        self.stop.store(false, Ordering::Relaxed);
        self.send(Command::Ask { turn, history, question });
    }

    /// Ends the answer that is under way.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The next update if there is one.
    ///
    /// # Errors
    /// If the thread has ended, which only a fault of the program makes it do.
    pub fn next(&self) -> Result<Option<Update>> {
        match self.updates.try_recv() {
            Ok(update) => Ok(Some(update)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => {
                anyhow::bail!("the thread of the model has ended: a fault of this program. Load a model to go on.")
            }
        }
    }

    /// Waits for the next update.
    pub fn wait(&self, at_most: Duration) -> Option<Update> {
        self.updates.recv_timeout(at_most).ok()
    }

    /// Tokens written since the thread began.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// Ends the thread: an answer under way within a few tokens. Waits for it no longer than `patience`.
    pub fn end(self, patience: Duration) {
        let Worker { commands, stop, thread, .. } = self;
        stop.store(true, Ordering::Relaxed);
        drop(commands);
        let begin = Instant::now();
        while !thread.is_finished() && begin.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.is_finished() {
            // A panic was reported where it happened.
            let _ = thread.join();
        }
    }
}

/// How devices are opened: by the name that was chosen, and the window's own.
pub type Devices = Box<dyn Fn(Option<String>, Option<WebGpu>) -> Open + Send>;
/// Opens one, and again after each loss.
pub type Open = Box<dyn FnMut(Place) -> gatedelta::Result<Opened> + Send>;

/// Those of this machine. The window's device serves once: when it is lost the model gets one of its own.
fn devices(name: Option<String>, host: Option<WebGpu>) -> Open {
    let mut host = host.filter(|host| !host.is_lost());
    Box::new(move |place| match (place, host.take()) {
        (Place::Cpu, _) => device::open(Some("cpu")),
        (Place::Chosen, Some(host)) => device::open_beside(&host, name.as_deref()),
        (Place::Chosen, None) => device::open(name.as_deref()),
    })
}

/// Takes updates to the window.
struct News {
    sender: Sender<Update>,
    wake: Box<dyn Fn() + Send>,
}

impl News {
    fn tell(&self, update: Update) {
        // A window that has closed needs no news.
        let _ = self.sender.send(update);
        (self.wake)();
    }
}

/// The thread's own side.
struct Desk {
    args: Args,
    host: Option<WebGpu>,
    devices: Devices,
    state: Option<PathBuf>,
    news: News,
    stop: Arc<AtomicBool>,
    tokens: Arc<AtomicU64>,
    agent: Option<Agent<Counted>>,
    /// What is loaded.
    loaded: Option<Box<Loaded>>,
    /// Recoveries of it that the window knows of.
    recoveries: usize,
    /// The tokens of the conversation up to the end of each turn that was answered since.
    ends: HashMap<u64, Vec<u32>>,
}

impl Desk {
    fn obey(&mut self, command: Command) {
        match command {
            Command::Load(choice) => self.load(choice),
            Command::Test => self.news.tell(Update::Tested(device::list())),
            Command::Ask { turn, history, question } => {
                let answer = self.answer(turn, history, &question).map_err(|why| format!("{why:#}"));
                let answered = answer.is_ok();
                self.tell_device();
                self.news.tell(Update::Answered(turn, answer));
                if answered {
                    self.remember();
                }
            }
        }
    }

    /// Loads what was chosen, else what was there before, else the model inside the program on the best device.
    fn load(&mut self, choice: Choice) {
        self.news.tell(Update::Loading(0, 0));
        let before = self.loaded.as_ref().map(|loaded| loaded.choice.clone()).unwrap_or_default();
        // Two models at once may be one too many, but a directory that is none needs no memory to be refused.
        if let Some(dir) = choice.model.as_ref().filter(|dir| !dir.join("config.json").is_file()) {
            let what = if dir.is_dir() { "has no config.json" } else { "is not there" };
            let why = "expected the directory of a checkpoint: config.json, safetensors, tokenizer.json";
            self.news.tell(Update::Refused(format!("The model {} cannot be used: it {what}; {why}.", dir.display())));
            if let Some(loaded) = &self.loaded {
                return self.news.tell(Update::Loaded(loaded.clone()));
            }
        } else {
            (self.agent, self.loaded) = (None, None);
            self.ends.clear();
            match self.open(&choice) {
                Ok(()) => return,
                Err(why) => self.news.tell(Update::Refused(format!("{why:#}"))),
            }
        }
        if before != choice
            && let Err(why) = self.open(&before)
        {
            self.news.tell(Update::Refused(format!("What was there before cannot be loaded either: {why:#}")));
        }
    }

    fn open(&mut self, choice: &Choice) -> Result<()> {
        let begin = Instant::now();
        let args = Args { model: choice.model.clone(), device: choice.device.clone(), ..self.args.clone() };
        let (tools, folder) = gatedelta_agent::tools(&args)?;
        let open = (self.devices)(args.device.clone(), self.host.clone());
        let mut local = Local::load_on(&args, open, &mut |done, total| self.news.tell(Update::Loading(done, total)))?;
        local.ready(&mut |done, total| self.news.tell(Update::Compiling(done, total)));
        if let Some(folder) = &self.state
            && let Err(why) = local.keep_in(folder)
        {
            log::warn!("the model's state is not kept: {why:#}");
        }
        let toolbox = Toolbox::new(tools, TIME_LIMIT);
        let start = Start {
            tools: toolbox.specs().into_iter().map(|spec| spec.name).collect(),
            folder: folder.map(|folder| folder.path().display().to_string()),
            ..local.start()
        };
        let account = local.account();
        let shared = self.shares(&account);
        let notices = local.notices();
        let loaded = Loaded {
            choice: choice.clone(),
            start,
            account,
            memory: local.memory().clone(),
            shared,
            time: begin.elapsed(),
        };
        let options = agent::Options {
            system: args.system.clone().filter(|text| !text.trim().is_empty()),
            thinking: args.thinking(),
            think_budget: args.think_budget,
            max_tokens: args.max_tokens.unwrap_or(TOKENS),
        };
        self.recoveries = local.recovery().past().len();
        self.agent = Some(Agent::new(Counted { local, tokens: self.tokens.clone() }, toolbox, options));
        let loaded = Box::new(loaded);
        self.loaded = Some(loaded.clone());
        self.news.tell(Update::Loaded(loaded));
        notices.into_iter().for_each(|text| self.news.tell(Update::Notice(text)));
        Ok(())
    }

    /// True if the model's device is the window's.
    fn shares(&self, account: &Account) -> bool {
        let chosen = account.chosen.and_then(|at| account.candidates.get(at));
        self.host.as_ref().filter(|host| !host.is_lost()).zip(chosen).is_some_and(|(host, chosen)| {
            let caps = gatedelta::backend::Backend::caps(host);
            caps.name == chosen.name && caps.driver == chosen.driver
        })
    }

    /// Tells on which device the model is, where that has changed.
    fn tell_device(&mut self) {
        let Some(agent) = &self.agent else { return };
        let local = &agent.engine().local;
        let past = local.recovery().past().len();
        if past == self.recoveries {
            return;
        }
        self.recoveries = past;
        let (account, memory, now) = (local.account(), local.memory().clone(), local.start());
        let shared = false;
        if let Some(loaded) = &mut self.loaded {
            let start = Start { device: now.device, why: now.why, shape: now.shape, ..loaded.start.clone() };
            **loaded = Loaded { start, account, memory, shared, ..(**loaded).clone() };
            self.news.tell(Update::Loaded(loaded.clone()));
        }
    }

    fn answer(&mut self, turn: u64, history: Vec<Value>, question: &str) -> Result<(Figures, Vec<Value>)> {
        let agent = self.agent.as_mut().context("no model is loaded")?;
        agent.clear();
        let mut messages = agent.messages().to_vec();
        messages.extend(history);
        let before = messages.len();
        agent.restore(messages);
        let mut teller = Teller { news: &self.news, call: None };
        let stop = &self.stop;
        let summary = agent.answer(question, &|| stop.load(Ordering::Relaxed), &mut teller)?;
        let told = agent.messages().get(before..).unwrap_or_default().to_vec();
        self.ends.insert(turn, agent.engine().local.held().to_vec());
        Ok((figures(&summary), told))
    }

    /// Tells what is held of each turn, and has the last one outlive the program.
    fn remember(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let kept = agent.engine().local.cache().kept();
        let held = |(&turn, ids): (&u64, &Vec<u32>)| {
            let below = kept.iter().map(|kept| &kept.snapshot).filter(|snapshot| ids.starts_with(snapshot.ids()));
            let nearest = below.max_by_key(|snapshot| snapshot.position());
            let tokens = ids.len() as u64;
            Held {
                turn,
                tokens,
                again: tokens - nearest.map_or(0, |snapshot| snapshot.position()),
                bytes: nearest.map_or(0, |snapshot| snapshot.own_bytes()),
            }
        };
        self.news.tell(Update::Held(self.ends.iter().map(held).collect()));
        if let Err(why) = agent.engine_mut().local.save() {
            // The conversation itself is kept all the same: it would be read again.
            log::warn!("the model's state is not kept: {why:#}");
        }
    }
}

fn figures(summary: &Summary) -> Figures {
    let note = match summary.reason {
        Reason::Stop => None,
        Reason::Length => Some(format!("Cut: {} tokens are the most for one question.", summary.generated_tokens)),
        Reason::Context => {
            Some("Cut: the conversation fills the context. Go back to an earlier turn, or begin anew.".into())
        }
        Reason::Interrupted => Some("Stopped.".into()),
        Reason::Repetition => Some("Cut: the model repeated itself.".into()),
        Reason::ToolLimit => Some("Stopped: the model kept calling tools without answering.".into()),
    };
    Figures {
        note,
        wrote: summary.generated_tokens as u64,
        rate: summary.rate(),
        read: summary.read_tokens as u64,
        reused: summary.reused_tokens as u64,
        reading: summary.prefill.as_secs_f64(),
    }
}

/// The engine, with a count of what it writes that others can read.
struct Counted {
    local: Local,
    tokens: Arc<AtomicU64>,
}

impl Engine for Counted {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        self.local.render(messages, tools, thinking)
    }

    fn generate(
        &mut self,
        prompt: &str,
        budget: usize,
        each: &mut dyn FnMut(Step<'_>) -> Result<bool>,
    ) -> Result<Answer> {
        let tokens = &self.tokens;
        self.local.generate(prompt, budget, &mut |step| {
            if let Step::Wrote { .. } = step {
                tokens.fetch_add(1, Ordering::Relaxed);
            }
            each(step)
        })
    }
}

/// Makes updates of the agent's events.
struct Teller<'a> {
    news: &'a News,
    /// When the tool that runs was called.
    call: Option<Instant>,
}

impl Sink for Teller<'_> {
    fn event(&mut self, event: Event<'_>) -> std::io::Result<()> {
        let update = match event {
            Event::Prefill { done, total, .. } => Update::Reading(done, total),
            Event::Reasoning(text) => Update::Reasoning(text.into()),
            Event::ReasoningCut(tokens) => {
                Update::Reasoning(format!("\n[ended after {tokens} tokens, see --think-budget]"))
            }
            Event::Token(text) => Update::Text(text.into()),
            Event::Opening(name) => Update::Opening(name.into()),
            Event::ToolCall(Call { name, arguments }) => {
                self.call = Some(Instant::now());
                Update::Called(name.clone(), arguments.clone())
            }
            Event::ToolResult(_, tools::Outcome { ok, text }) => {
                let seconds = self.call.take().map_or(0.0, |begin| begin.elapsed().as_secs_f64());
                Update::Returned(Outcome { ok: *ok, text: text.clone(), seconds })
            }
            Event::BrokenCall(broken) => Update::Broken(broken.why.clone()),
            Event::Notice(text) => Update::Notice(text.into()),
            // The window makes these from what `answer` returns.
            Event::Start(_) | Event::Restored(..) | Event::Done(_) | Event::Error(_) => return Ok(()),
        };
        self.news.tell(update);
        Ok(())
    }
}
