//! Which devices there are, which one is used, and why.
//!
//! In order of preference: CUDA, a discrete GPU, an integrated one, any other GPU, the CPU. A GPU driver in software is never
//! chosen by itself: the native CPU backend is faster than any of them. A device must pass a small self-test with known answers
//! before it is trusted; one that does not is passed over, and the [`Account`] says so.
//!
//! A name overrides the order: an argument of the program, else the environment variable `GATEDELTA_DEVICE`. Names are `cpu`,
//! `cuda` and `cuda:1` for the first and the second CUDA device, `lavapipe`, `swiftshader`, or any part of the name that an adapter
//! has in wgpu, in any case.

mod selftest;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use crate::tune::{Caps, Class, Kind};

#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, Cuda};
#[cfg(feature = "webgpu")]
use crate::backend::webgpu::{self, OpenOptions, WebGpu};

/// The environment variable that names a device where the program was given none.
pub const VARIABLE: &str = "GATEDELTA_DEVICE";

/// A device that was looked at, or a backend that has none.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The device's own name, `cpu` for the CPU backend.
    pub name: String,
    /// Driver, API and version; or why there is nothing.
    pub driver: String,
    /// Which backend runs it.
    pub kind: Kind,
    /// How it compares.
    pub class: Class,
    /// Its limits, once it was opened.
    pub caps: Option<Caps>,
    /// What came of it.
    pub verdict: Verdict,
}

/// What came of a candidate.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// Opened, and passed its self-test in this time.
    Works(Duration),
    /// Not opened; why that was not needed.
    NotTried(String),
    /// Cannot be used; why.
    Refused(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Works(time) => write!(f, "passed its self-test in {} ms", time.as_millis()),
            Verdict::NotTried(why) => write!(f, "not tried: {why}"),
            Verdict::Refused(why) => write!(f, "refused: {why}"),
        }
    }
}

/// What was found, what was refused, what was chosen, and why. Its `Display` is for people.
#[derive(Debug, Clone, Default)]
pub struct Account {
    /// All candidates in order of preference.
    pub candidates: Vec<Candidate>,
    /// Index of the chosen one.
    pub chosen: Option<usize>,
    /// Why that one.
    pub why: String,
}

impl Account {
    /// The chosen device, and why, in one line.
    pub fn summary(&self) -> String {
        match self.chosen.map(|i| &self.candidates[i]) {
            Some(c) => format!("{} ({}): {}", c.name, c.driver, self.why),
            None => format!("no device: {}", self.why),
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, c) in self.candidates.iter().enumerate() {
            let mark = if self.chosen == Some(i) { '*' } else { ' ' };
            writeln!(f, "{mark} {} [{}, {}] {}", c.name, class_name(c.class), c.driver, c.verdict)?;
        }
        write!(f, "  {}", self.summary())
    }
}

/// The class in a word or two.
pub fn class_name(class: Class) -> &'static str {
    match class {
        Class::Discrete => "discrete GPU",
        Class::Integrated => "integrated GPU",
        Class::Other => "GPU",
        Class::Cpu => "CPU",
        Class::Software => "software driver",
    }
}

/// A candidate and how to open it.
struct Entry {
    candidate: Candidate,
    source: Source,
}

enum Source {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::Found>),
    #[cfg(feature = "webgpu")]
    WebGpu(Box<webgpu::Found>),
    /// The host application has it open already.
    #[cfg(feature = "webgpu")]
    Shared(WebGpu),
    Nothing,
}

impl Entry {
    /// A backend without a device: the reason stands where its driver would.
    fn absent(name: &str, kind: Kind, why: &str) -> Self {
        let verdict = Verdict::Refused(why.into());
        let candidate =
            Candidate { name: name.into(), driver: "absent".into(), kind, class: Class::Other, caps: None, verdict };
        Entry { candidate, source: Source::Nothing }
    }

    /// Opens the device and runs its self-test; the verdict goes into the candidate.
    fn open(&mut self) -> Result<Arc<dyn Backend>> {
        let tried = (|| -> Result<(Arc<dyn Backend>, Duration)> {
            let backend: Arc<dyn Backend> = match &self.source {
                Source::Cpu => Arc::new(Cpu::new(None)?),
                #[cfg(feature = "cuda")]
                Source::Cuda(found) => Arc::new(Cuda::open(found, &cuda::OpenOptions::default())?),
                #[cfg(feature = "webgpu")]
                Source::WebGpu(found) => Arc::new(WebGpu::open(found, &OpenOptions::default())?),
                #[cfg(feature = "webgpu")]
                Source::Shared(gpu) => Arc::new(gpu.clone()),
                Source::Nothing => {
                    let why = self.candidate.verdict.to_string();
                    return Err(Error::NoDevice { wanted: self.candidate.name.clone(), why });
                }
            };
            let time = selftest::run(&*backend)?;
            Ok((backend, time))
        })();
        match tried {
            Ok((backend, time)) => {
                self.candidate.caps = Some(backend.caps().clone());
                self.candidate.verdict = Verdict::Works(time);
                Ok(backend)
            }
            Err(error) => {
                if !matches!(self.source, Source::Nothing) {
                    self.candidate.verdict = Verdict::Refused(error.to_string());
                }
                Err(error)
            }
        }
    }

    /// Whether a name means this device.
    fn answers_to(&self, wanted: &str) -> bool {
        let name = self.candidate.name.to_lowercase();
        match wanted.to_lowercase().as_str() {
            "cpu" => self.candidate.kind == Kind::Cpu,
            // The first, or the absence of any.
            "cuda" => self.candidate.kind == Kind::Cuda && (name == "cuda" || name.starts_with("cuda:0 ")),
            part if part.starts_with("cuda:") => self.candidate.kind == Kind::Cuda && name.starts_with(part),
            "lavapipe" => self.candidate.kind == Kind::WebGpu && name.contains("llvmpipe"),
            part => self.candidate.kind == Kind::WebGpu && name.contains(part),
        }
    }
}

/// The CUDA devices.
#[cfg(feature = "cuda")]
fn cuda_entries(wanted: Option<&str>, not_tried: impl Fn(Class) -> Verdict) -> Vec<Entry> {
    if wanted.is_some_and(|w| w.eq_ignore_ascii_case("cpu")) {
        return vec![Entry::absent("cuda", Kind::Cuda, "not looked for: the CPU was asked for")];
    }
    let devices = Cuda::enumerate();
    if devices.found.is_empty() {
        return vec![Entry::absent("cuda", Kind::Cuda, &devices.why_none)];
    }
    let entry = |found: cuda::Found| {
        let Caps { name, driver, class, .. } = found.caps.clone();
        let candidate = Candidate { name, driver, kind: Kind::Cuda, class, caps: None, verdict: not_tried(class) };
        Entry { candidate, source: Source::Cuda(Box::new(found)) }
    };
    devices.found.into_iter().map(entry).collect()
}

#[cfg(not(feature = "cuda"))]
fn cuda_entries(_: Option<&str>, _: impl Fn(Class) -> Verdict) -> Vec<Entry> {
    vec![Entry::absent("cuda", Kind::Cuda, "built without the feature cuda")]
}

/// Everything that could be opened, in order of preference. Asking for adapters loads every graphics driver of the machine,
/// which is left out where only the CPU is wanted: it must work beside the worst of drivers.
fn entries(wanted: Option<&str>) -> Vec<Entry> {
    let not_tried = |class: Class| {
        Verdict::NotTried(match (wanted, class) {
            (Some(_), _) => "another was asked for".into(),
            (None, Class::Software) => "a driver in software is never chosen by itself".into(),
            (None, _) => "something better works".into(),
        })
    };
    let mut entries = cuda_entries(wanted, not_tried);
    #[cfg(feature = "webgpu")]
    if wanted.is_some_and(|w| w.eq_ignore_ascii_case("cpu")) {
        entries.push(Entry::absent("wgpu", Kind::WebGpu, "not looked for: the CPU was asked for"));
    } else {
        let adapters = WebGpu::enumerate();
        if adapters.found.is_empty() {
            entries.push(Entry::absent("wgpu", Kind::WebGpu, &adapters.why_none));
        }
        entries.extend(adapters.found.into_iter().map(|found| {
            let Caps { name, driver, class, .. } = found.caps.clone();
            let verdict = not_tried(class);
            let candidate = Candidate { name, driver, kind: Kind::WebGpu, class, caps: None, verdict };
            Entry { candidate, source: Source::WebGpu(Box::new(found)) }
        }));
    }
    #[cfg(not(feature = "webgpu"))]
    entries.push(Entry::absent("wgpu", Kind::WebGpu, "built without the feature webgpu"));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let candidate = Candidate {
        name: "cpu".into(),
        driver: format!("native, {threads} threads"),
        kind: Kind::Cpu,
        class: Class::Cpu,
        caps: None,
        verdict: not_tried(Class::Cpu),
    };
    entries.push(Entry { candidate, source: Source::Cpu });
    entries.sort_by_key(|e| match (e.candidate.kind, e.candidate.class) {
        (Kind::Cuda, _) => 0,
        (_, Class::Discrete) => 1,
        (_, Class::Integrated) => 2,
        (_, Class::Other) => 3,
        (_, Class::Cpu) => 4,
        (_, Class::Software) => 5,
    });
    entries
}

/// Opens and tests every device there is, chooses none of them, and says which one [`open`] would choose.
pub fn list() -> Account {
    let mut entries = entries(None);
    for entry in &mut entries {
        // The verdict keeps the reason of a failure.
        let _ = entry.open();
    }
    let works = |e: &Entry| matches!(e.candidate.verdict, Verdict::Works(_));
    let chosen = entries.iter().position(|e| works(e) && e.candidate.class != Class::Software);
    let why = chosen.map_or("nothing works".into(), |i| reason(&entries, i));
    Account { candidates: entries.into_iter().map(|e| e.candidate).collect(), chosen, why }
}

/// Why the entry is the best choice.
fn reason(entries: &[Entry], chosen: usize) -> String {
    let class = class_name(entries[chosen].candidate.class);
    if entries[chosen].candidate.kind != Kind::Cpu {
        return format!("the first {class} that works, in the order CUDA, discrete, integrated, other GPU, CPU");
    }
    let broken = entries.iter().filter(|e| !matches!(e.source, Source::Nothing | Source::Cpu));
    let broken = broken.filter(|e| e.candidate.class != Class::Software).count();
    let software = entries.iter().any(|e| e.candidate.class == Class::Software);
    match (broken, software) {
        (0, false) => "no GPU was found".into(),
        (0, true) => "no GPU was found, and a driver in software is slower than the CPU itself".into(),
        (n, _) => format!("{n} GPU(s) found, and none of them works"),
    }
}

/// Opens a device: the named one, else the one that [`VARIABLE`] names, else the best that works.
///
/// # Errors
/// [`Error::NoDevice`] with the choices if the name fits none or several; what opening or the self-test of a named device
/// reported. Without a name there is always the CPU.
pub fn open(name: Option<&str>) -> Result<(Arc<dyn Backend>, Account)> {
    choose(name, |_| {})
}

/// Opens a device as [`open`] does, in a host application that has one open for itself, to draw its window for instance. Where
/// the choice falls on the host's adapter, its device is used and no second one is opened: the two then share memory and queue.
///
/// # Errors
/// As [`open`].
#[cfg(feature = "webgpu")]
pub fn open_beside(host: &WebGpu, name: Option<&str>) -> Result<(Arc<dyn Backend>, Account)> {
    let caps = host.caps();
    choose(name, |entries| {
        let same = |e: &&mut Entry| e.candidate.name == caps.name && e.candidate.driver == caps.driver;
        if let Some(entry) = entries.iter_mut().find(same) {
            entry.source = Source::Shared(host.clone());
        }
    })
}

fn choose(name: Option<&str>, adapt: impl FnOnce(&mut [Entry])) -> Result<(Arc<dyn Backend>, Account)> {
    let from_environment = std::env::var(VARIABLE).ok().filter(|v| !v.is_empty());
    let wanted = name.or(from_environment.as_deref());
    let mut entries = entries(wanted);
    adapt(&mut entries);
    let (backend, chosen, why) = match (wanted, name) {
        (Some(wanted), Some(_)) => open_named(&mut entries, wanted, "asked for by name")?,
        (Some(wanted), None) => open_named(&mut entries, wanted, &format!("asked for by {VARIABLE}"))?,
        (None, _) => open_best(&mut entries)?,
    };
    let account = Account { candidates: entries.into_iter().map(|e| e.candidate).collect(), chosen: Some(chosen), why };
    log::info!("{}", account.summary());
    Ok((backend, account))
}

type Opened = (Arc<dyn Backend>, usize, String);

fn open_named(entries: &mut [Entry], wanted: &str, why: &str) -> Result<Opened> {
    let choices = |entries: &[Entry]| {
        let names: Vec<String> = entries
            .iter()
            .filter(|e| !matches!(e.source, Source::Nothing))
            .map(|e| format!("{:?}", e.candidate.name))
            .collect();
        names.join(", ")
    };
    let mut fit: Vec<usize> =
        (0..entries.len()).filter(|&i| !wanted.is_empty() && entries[i].answers_to(wanted)).collect();
    // A whole name is not ambiguous because another one contains it.
    if let Some(&exact) = fit.iter().find(|&&i| entries[i].candidate.name.eq_ignore_ascii_case(wanted)) {
        fit = vec![exact];
    }
    // One GPU may be reachable through several APIs; the first listed is as good as any.
    let same = |&i: &usize| entries[i].candidate.name == entries[fit[0]].candidate.name;
    let no_device = |why: String| Error::NoDevice { wanted: wanted.into(), why };
    match fit.as_slice() {
        [] => Err(no_device(format!("there is no such device; there are {}", choices(entries)))),
        [first, ..] if fit.iter().all(same) => {
            let first = *first;
            let backend = entries[first].open()?;
            Ok((backend, first, why.into()))
        }
        several => {
            let names: Vec<String> = several.iter().map(|&i| format!("{:?}", entries[i].candidate.name)).collect();
            Err(no_device(format!("the name fits {}", names.join(" and "))))
        }
    }
}

fn open_best(entries: &mut [Entry]) -> Result<Opened> {
    for i in 0..entries.len() {
        if entries[i].candidate.class == Class::Software {
            continue;
        }
        match entries[i].open() {
            Ok(backend) => {
                let why = reason(entries, i);
                return Ok((backend, i, why));
            }
            Err(error) => log::info!("{} is passed over: {error}", entries[i].candidate.name),
        }
    }
    Err(Error::NoDevice { wanted: "any".into(), why: "not even the CPU backend works".into() })
}
