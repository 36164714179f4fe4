//! An OpenAI-compatible server on a local Gated DeltaNet model.
//!
//! ```text
//! serve.rs      connections and their limits           schedule.rs  the thread that owns the model: slots, fairness, ends
//! api.rs        routes: request -> job -> response     engine.rs    what it needs of a model: sequences in slots
//! request.rs    JSON bodies, parameter by parameter    answer.rs    logits -> tokens -> text, stops, log-probabilities
//! reply.rs      answers, whole and in chunks           metrics.rs   what /metrics tells
//! ```
//!
//! The server runs no tools, opens no files or URLs for clients and stores nothing: it returns what the model wrote.

pub mod answer;
pub mod api;
pub mod engine;
pub mod error;
pub mod metrics;
pub mod options;
pub mod reply;
pub mod request;
pub mod schedule;
pub mod serve;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use gatedelta::qwen::recover::{self, Opened};
use gatedelta::qwen::{LoadOptions, MemoryPlan, Place, Recovery};
use gatedelta_agent::builtin;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};

use crate::api::{App, Limits};
use crate::engine::local::Local;
use crate::metrics::Metrics;
use crate::options::{Args, KEY};
use crate::request::Served;
use crate::schedule::Facts;
use crate::serve::Connections;

/// Slots where nobody says how many.
const SLOTS: u64 = 8;
/// Shortest API key: what is shorter can be tried out.
const KEY_BYTES: usize = 16;

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let level = if args.verbose { "info" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let key = key(args)?;
    if key.is_none() && !args.host.is_loopback() {
        log::warn!("--host {}: whoever reaches this machine can use the model; {KEY} sets an API key", args.host);
    }
    let Loaded { recovery, .. } = &load(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no threads")?;
    runtime.block_on(async {
        let (first, second) = signals()?;
        let server = Server::bind(recovery.clone(), args, key).await?;
        let context = recovery.model().memory().context;
        eprintln!("device  {}", recovery.account().summary());
        eprintln!("model   {}, context {context}, {} slots", server.app.served.name, server.slots());
        eprintln!("listen  http://{}", server.address);
        server.run(first, second).await
    })
}

/// A model on its device.
pub struct Loaded {
    /// The model, and what opens its device again when that is lost.
    pub recovery: Recovery,
    /// Where the checkpoint inside the program is unpacked: its weights may be mapped from there.
    _unpacked: Option<tempfile::TempDir>,
}

/// Opens a device and loads the checkpoint.
///
/// # Errors
/// Whatever is wrong with the device's name or the checkpoint.
pub fn load(args: &Args) -> Result<Loaded> {
    load_on(args, recover::by_name(args.device.as_deref()))
}

/// Loads the checkpoint onto the device that `open` gives, which is asked again when that is lost.
///
/// # Errors
/// Whatever is wrong with the checkpoint, and what `open` gives.
pub fn load_on(args: &Args, open: impl FnMut(Place) -> gatedelta::Result<Opened> + Send + 'static) -> Result<Loaded> {
    let unpacked = match &args.model {
        Some(_) => None,
        None => {
            let dir = tempfile::Builder::new().prefix("gatedelta-server-").tempdir();
            let dir = dir.context("there is no place for temporary files")?;
            builtin::unpack(dir.path())
                .with_context(|| format!("the built-in checkpoint cannot be put into {}", dir.path().display()))?;
            Some(dir)
        }
    };
    let dir: PathBuf = match (&args.model, &unpacked) {
        (Some(dir), _) => dir.clone(),
        (None, dir) => dir.as_ref().map(|dir| dir.path().to_path_buf()).unwrap_or_default(),
    };
    ensure!(dir.is_dir(), "--model {}: there is no such directory", dir.display());
    let snapshots = u64::from(args.cache) << 20;
    let options = LoadOptions { context: args.context, snapshots, ..LoadOptions::default() };
    // What befalls the device goes to the log, /health and /metrics.
    let recovery = Recovery::load_with(&dir, &options, open, |_| {}, &mut |_, _| {})?;
    recovery.model().tokenizer().context("this checkpoint cannot be served")?;
    Ok(Loaded { recovery, _unpacked: unpacked })
}

/// The API key, if there is one.
fn key(args: &Args) -> Result<Option<String>> {
    let (key, source) = match &args.api_key_file {
        Some(file) => {
            let key = std::fs::read_to_string(file).with_context(|| format!("--api-key-file {}", file.display()))?;
            (key, file.display().to_string())
        }
        None => match std::env::var(KEY) {
            Ok(key) => (key, KEY.to_string()),
            Err(std::env::VarError::NotPresent) => return Ok(None),
            Err(why) => bail!("{KEY}: {why}"),
        },
    };
    let key = key.trim().to_string();
    let fits = key.len() >= KEY_BYTES && key.bytes().all(|b| b.is_ascii_graphic());
    ensure!(fits, "{source}: an API key is {KEY_BYTES} or more visible ASCII characters, this has {}", key.len());
    Ok(Some(key))
}

/// How many sequences fit beside the weights and the cache, at most `most`.
fn slots(plan: &MemoryPlan, asked: Option<u16>, cache: u64, most: u64) -> Result<usize> {
    let each = plan.states + plan.tails + plan.cache;
    let rest = plan.weights + plan.scratch + cache;
    let fit = plan.available.map_or(u64::MAX, |available| available.saturating_sub(rest) / each.max(1));
    match asked.map(u64::from) {
        Some(asked) if asked > fit => {
            let (each, cache, context) = (each >> 20, cache >> 20, plan.context);
            bail!(
                "--slots {asked}: {fit} fit, each takes {each} MiB with a context of {context} beside a cache of {cache} MiB; \
                 --context and --cache make room"
            )
        }
        Some(asked) => Ok(asked as usize),
        None => Ok(fit.clamp(1, most) as usize),
    }
}

/// A server that listens.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    connections: Connections,
    thread: JoinHandle<()>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    /// Begins to listen, with a model that is loaded.
    ///
    /// # Errors
    /// If the address is taken, or if there is no memory for the slots.
    pub async fn bind(recovery: Recovery, args: &Args, key: Option<String>) -> Result<Server> {
        let model = recovery.model();
        let cache = u64::from(args.cache) << 20;
        let slots = slots(model.memory(), args.slots, cache, SLOTS)?;
        let at = SocketAddr::new(args.host, args.port);
        let listener = TcpListener::bind(at).await.with_context(|| format!("cannot listen on {at}"))?;
        let address = listener.local_addr()?;
        let metrics = Arc::new(Metrics::new()?);
        let engine = Local::new(&recovery, slots, cache)?;
        let facts = Facts {
            tokenizer: model.tokenizer()?.clone(),
            ends: model.stop_ids().to_vec(),
            context: model.memory().context,
        };
        let (desk, thread) = schedule::start(engine, facts, metrics.clone()).context("no thread for the model")?;
        let of_dir =
            args.model.as_ref().and_then(|dir| Some(dir.canonicalize().ok()?.file_name()?.to_str()?.to_string()));
        let served = Served {
            name: args.name.clone().or(of_dir).unwrap_or_else(|| "gatedelta-agent".to_string()),
            vocab: model.config().vocab,
            sampling: model.generation().sampling,
            max_tokens: args.max_tokens,
        };
        let limits = Limits {
            body: args.body_limit,
            body_time: args.network_limit,
            time: args.time_limit,
            queue: args.queue as usize,
            slots,
        };
        let places = Arc::new(Semaphore::new(limits.queue + slots));
        let app = Arc::new(App {
            recovery,
            served,
            desk,
            limits,
            metrics,
            key,
            local: args.host.is_loopback(),
            places,
            stopping: AtomicBool::new(false),
            started: SystemTime::now(),
        });
        let (most, patience, grace) = (args.connections as usize, args.network_limit, args.grace);
        Ok(Server { app, listener, connections: Connections { most, patience, grace }, thread, address })
    }

    /// How many answers it writes at the same time.
    pub fn slots(&self) -> usize {
        self.app.limits.slots
    }

    /// Serves until `stop`; then running answers may end, until `now` or their time is over.
    ///
    /// # Errors
    /// If the model's thread broke down.
    pub async fn run(self, stop: impl Future<Output = ()>, now: impl Future<Output = ()>) -> Result<()> {
        let Server { app, listener, connections, thread, .. } = self;
        serve::serve(listener, app, connections, stop, now).await?;
        match tokio::task::spawn_blocking(|| thread.join()).await? {
            Ok(()) => Ok(()),
            Err(_) => bail!("the model's thread broke down"),
        }
    }
}

/// Ctrl-C and SIGTERM.
struct Signals {
    #[cfg(unix)]
    term: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals { term: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    #[cfg(not(unix))]
    fn new() -> Result<Signals> {
        Ok(Signals {})
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The first signal and the second.
fn signals() -> Result<(impl Future<Output = ()>, impl Future<Output = ()>)> {
    let mut signals = Signals::new()?;
    let (first, second) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let waits = (first.clone(), second.clone());
    tokio::spawn(async move {
        signals.next().await;
        first.notify_one();
        signals.next().await;
        second.notify_one();
    });
    Ok((async move { waits.0.notified().await }, async move { waits.1.notified().await }))
}
