//! The runtime of this repository as the agent's engine: one session that keeps what it has read, with snapshots to go back to.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use gatedelta::device::Account;
use gatedelta::qwen::recover::{self, Opened};
use gatedelta::qwen::{
    Cache, Event, Finish, GenerateOptions, LoadOptions, MemoryPlan, Notice, Place, Reason, Recovery, Restored,
    Sampling, Session, Store,
};
use serde_json::{Value, json};

use super::{Answer, End, Engine, Step};
use crate::event::Start;
use crate::options::Args;
use crate::{builtin, ui};

/// See the [module](self).
pub struct Local {
    recovery: Recovery,
    session: Session,
    notices: Notices,
    options: GenerateOptions,
    /// Ends an answer from within.
    cancel: Arc<AtomicBool>,
    cache: Cache,
    store: Option<Arc<Store>>,
    /// What the session has read and written, as text.
    said: Option<Said>,
    /// Tokens that were not read again.
    reused: u64,
    /// Tokens that were read, and the time that took.
    read: (u64, Duration),
    name: String,
    unpacked: Option<tempfile::TempDir>,
}

/// The text of all that was read and written.
struct Said {
    text: String,
    /// The tokens of it; the session may not have read the last.
    ids: Vec<u32>,
}

/// What befell the device and has not been told yet.
#[derive(Clone, Default)]
struct Notices(Arc<Mutex<Vec<String>>>);

impl Notices {
    fn put(&self, notice: &Notice<'_>) {
        // What failed on the way is a part of what came of it.
        if let Notice::Freed(_) | Notice::Recovered(_) = notice {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(notice.to_string());
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells them; false if there should be no more of the answer.
    fn tell(&self, each: &mut dyn FnMut(Step<'_>) -> Result<bool>) -> Result<bool> {
        let mut goes_on = true;
        for text in &self.take() {
            goes_on &= each(Step::Notice { text })?;
        }
        Ok(goes_on)
    }
}
/// What may follow such text without its tokens becoming others: markers, which no token reaches across, and what the agent ends
/// reasoning with, which a model never sees otherwise than behind what it wrote.
const BEGINS: [&str; 3] = ["<|", "</think>", "\n</think>"];

/// Disk that the snapshots of one folder may take.
const DISK: u64 = 4 << 30;

impl Local {
    /// Opens a device and loads the checkpoint, with a bar where that takes a while.
    ///
    /// # Errors
    /// Whatever is wrong with the device's name, the checkpoint or the sampling options.
    pub fn load(args: &Args) -> Result<Self> {
        let mut by_name = recover::by_name(args.device.as_deref());
        // Later the line belongs to an answer.
        let mut busy = Some(ui::spinner("looking for devices"));
        let open = move |place| {
            let opened = by_name(place);
            if let Some(busy) = busy.take() {
                busy.finish_and_clear();
            }
            opened
        };
        let bar = ui::progress(0, "loading {bar:30} {bytes}/{total_bytes}, {eta} left");
        let local = Self::load_on(args, open, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        if let Ok(local) = &local {
            let bar = ui::progress(0, "compiling {bar:30} {pos}/{len} kernels");
            local.ready(&mut |done, total| {
                bar.set_length(total);
                bar.set_position(done);
            });
            bar.finish_and_clear();
        }
        local
    }

    /// Loads the checkpoint onto the device that `open` gives, which is asked again when that is lost; `progress` hears of bytes
    /// loaded and bytes in all.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint or the sampling options, and what `open` gives.
    pub fn load_on(
        args: &Args,
        open: impl FnMut(Place) -> gatedelta::Result<Opened> + Send + 'static,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let unpacked = match &args.model {
            Some(_) => None,
            None => {
                let dir = tempfile::Builder::new().prefix("gatedelta-agent-").tempdir();
                let dir = dir.context("there is no place for temporary files")?;
                builtin::unpack(dir.path())
                    .with_context(|| format!("the built-in checkpoint cannot be put into {}", dir.path().display()))?;
                Some(dir)
            }
        };
        let (dir, name) = match (&args.model, &unpacked) {
            (Some(dir), _) => (dir.clone(), dir.display().to_string()),
            (None, Some(dir)) => (dir.path().to_path_buf(), "the one inside the program".to_string()),
            (None, None) => (PathBuf::new(), String::new()),
        };
        if !dir.is_dir() {
            bail!("--model {}: there is no such directory", dir.display());
        }
        let snapshots = (args.snapshots as u64) << 20;
        let context = args.context.map(|n| n as u64);
        let options = LoadOptions { context, snapshots, ..LoadOptions::default() };
        let notices = Notices::default();
        let heard = notices.clone();
        let tell = move |notice: &Notice<'_>| heard.put(notice);
        let recovery = Recovery::load_with(&dir, &options, open, tell, &mut |done, total| progress(done, total))?;
        let model = recovery.model();
        let tokenizer = model.tokenizer().map(|_| ());
        tokenizer.and_then(|()| model.chat_template().map(|_| ())).context("this checkpoint cannot chat")?;

        let cancel = Arc::new(AtomicBool::new(false));
        let mut options = GenerateOptions::of(&model);
        options.sampling = sampling(args, options.sampling);
        options.sampling.check()?;
        options.seed = args.seed.unwrap_or_else(clock_seed);
        options.cancel = Some(cancel.clone());
        let mut session = recovery.session()?;
        let cache = Cache::new(snapshots);
        session.set_cache(Some(cache.clone()));
        Ok(Local {
            recovery,
            session,
            notices,
            options,
            cancel,
            cache,
            store: None,
            said: None,
            reused: 0,
            read: (0, Duration::ZERO),
            name,
            unpacked,
        })
    }

    /// Keeps snapshots in a folder from here on, and finds those that are there.
    ///
    /// # Errors
    /// If the folder cannot be used, or another process does.
    pub fn keep_in(&mut self, folder: &Path) -> Result<()> {
        let store = Arc::new(Store::open(folder, DISK)?);
        self.cache = self.cache.clone().with_store(store.clone());
        self.session.set_cache(Some(self.cache.clone()));
        self.store = Some(store);
        Ok(())
    }

    /// Finds the snapshots in a folder that another process keeps its own in, and keeps none.
    ///
    /// # Errors
    /// If there are none, or they cannot be read.
    pub fn find_in(&mut self, folder: &Path) -> Result<()> {
        self.cache = self.cache.clone().with_store(Arc::new(Store::view(folder)?));
        self.session.set_cache(Some(self.cache.clone()));
        Ok(())
    }

    /// Which devices there are and why this one was chosen.
    pub fn account(&self) -> Account {
        self.recovery.account()
    }

    /// Waits until the kernels that the model needs are compiled; `progress` hears of those that are, and their number.
    pub fn ready(&self, progress: &mut dyn FnMut(u64, u64)) {
        self.session.model().ready(progress);
    }

    /// What opens the device again when it is lost.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// What befell the device and has not been told yet.
    pub fn notices(&self) -> Vec<String> {
        self.notices.take()
    }

    /// The snapshots to go back to.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// All tokens that were read and written for the last answer.
    pub fn held(&self) -> &[u32] {
        self.session.ids()
    }

    /// What the model and its session take on the device.
    pub fn memory(&self) -> &MemoryPlan {
        self.session.model().memory()
    }

    /// What to tell the user at the start; the tools are filled in by others.
    pub fn start(&self) -> Start {
        let model = self.session.model();
        let (config, memory, sampling) = (model.config(), model.memory(), self.options.sampling);
        let account = self.account();
        let chosen = account.chosen.and_then(|at| account.candidates.get(at));
        Start {
            device: chosen.map_or_else(String::new, |device| format!("{} ({})", device.name, device.driver)),
            why: account.why.clone(),
            model: self.name.clone(),
            shape: format!(
                "{} parameters, {} layers; {} with a context of {} tokens",
                ui::count(config.parameters()),
                config.layers.len(),
                indicatif::BinaryBytes(memory.total() - memory.snapshots),
                memory.context,
            ),
            try_it: self.unpacked.is_some().then_some((builtin::WHAT, builtin::TRY)),
            tools: Vec::new(),
            folder: None,
            context: memory.context as usize,
            sampling: if sampling.is_greedy() {
                json!({"greedy": true})
            } else {
                json!({
                    "temperature": decimal(sampling.temperature),
                    "top_k": sampling.top_k,
                    "top_p": decimal(sampling.top_p),
                    "min_p": decimal(sampling.min_p),
                    "presence_penalty": decimal(sampling.presence_penalty),
                    "seed": self.options.seed,
                })
            },
        }
    }

    /// The ids of a prompt. Where it goes on from what the session holds, those it holds are kept as they are: a model does not
    /// always write what it says in the tokens that a tokenizer would choose.
    fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let tokenizer = self.session.model().tokenizer()?;
        let held = self.session.ids();
        let fits = |said: &&Said| said.ids.starts_with(held) && said.ids.len() - held.len() <= 1;
        let said = self.said.as_ref().filter(fits);
        let more = said.and_then(|said| Some((said, prompt.strip_prefix(&said.text)?)));
        Ok(match more.filter(|(_, more)| BEGINS.iter().any(|begin| more.starts_with(begin))) {
            Some((said, more)) => [&said.ids[..], &tokenizer.encode(more)?].concat(),
            None => tokenizer.encode(prompt)?,
        })
    }
}

impl Engine for Local {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        let messages = Value::from(messages);
        let tools = (!tools.is_empty()).then(|| Value::from(tools));
        Ok(self.session.model().chat_template()?.render(&messages, tools.as_ref(), true, thinking)?)
    }

    fn generate(
        &mut self,
        prompt: &str,
        budget: usize,
        each: &mut dyn FnMut(Step<'_>) -> Result<bool>,
    ) -> Result<Answer> {
        let mut ids = self.ids(prompt)?;
        let context = Local::memory(self).context;
        if ids.len() as u64 >= context {
            bail!(
                "the conversation has {} tokens and the context holds {context}: /clear forgets it, --context makes room",
                ids.len()
            );
        }
        let total = ids.len();
        let held = self.session.ids();
        let common = held.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        let restored = self.session.reuse(&ids)?;
        log::info!("{restored}");
        let reused = restored.tokens as usize;
        let reread = common.saturating_sub(reused);
        self.reused += restored.tokens;
        self.said = None;
        let mut text_so_far = prompt.to_string();
        let mut answer = Answer {
            end: End::Cancelled,
            prompt: total,
            reused,
            read: 0,
            reread,
            wrote: 0,
            decoded: 0,
            reading: Duration::ZERO,
            writing: Duration::ZERO,
        };
        self.cancel.store(false, Ordering::Relaxed);
        let notices = self.notices.clone();
        if !notices.tell(each)? || !each(Step::Read { done: reused, total, reused })? {
            return Ok(answer);
        }
        self.options.max_tokens = Some(budget as u64);
        // Rounds of one conversation must not draw the same numbers.
        self.options.seed = self.options.seed.wrapping_add(1);
        for event in self.session.generate(&ids[reused..], &self.options)? {
            let told = notices.tell(each)?;
            let goes_on = match event {
                Event::Prompt { done, .. } => each(Step::Read { done: reused + done as usize, total, reused })?,
                Event::Token { id, text } => {
                    answer.wrote += 1;
                    ids.push(id);
                    text_so_far += &text;
                    each(Step::Wrote { id, text: &text })?
                }
                Event::Done { text, finish, timings } => {
                    if !text.is_empty() {
                        text_so_far += &text;
                        each(Step::Rest { text: &text })?;
                    }
                    answer.read = timings.prompt_tokens as usize;
                    answer.decoded = timings.decoded_tokens as usize;
                    answer.reading = timings.prompt;
                    answer.writing = timings.decode;
                    answer.end = match finish {
                        Finish::Stop(_) => End::Stop,
                        Finish::Length => End::Budget,
                        Finish::Context => End::Context,
                        Finish::Cancelled => End::Cancelled,
                        Finish::Failed(why) => return Err(why.into()),
                    };
                    true
                }
            };
            if !(told && goes_on) {
                self.cancel.store(true, Ordering::Relaxed);
            }
        }
        self.read.0 += answer.read as u64;
        self.read.1 += answer.reading;
        if matches!(answer.end, End::Stop | End::Cancelled) {
            self.said = Some(Said { text: text_so_far, ids });
        }
        Ok(answer)
    }

    fn prepare(&mut self, text: &str) -> Result<Option<Restored>> {
        let ids = self.ids(text)?;
        if ids.is_empty() || ids.len() as u64 > Local::memory(self).context {
            return Ok(None);
        }
        let restored = self.session.reuse(&ids)?;
        log::info!("{restored}");
        Ok(Some(restored))
    }

    fn save(&mut self) -> Result<()> {
        let Some(store) = self.store.clone() else { return Ok(()) };
        if self.session.ids().is_empty() {
            return Ok(());
        }
        let cache = self.cache.clone();
        let saved = self.session.insist(|session| {
            let held = session.ids();
            // Other conversations begin with the system part; this one goes on from its last question where the template writes
            // the answer otherwise than the model did.
            let kept = cache.kept();
            let nearest = |reason: Reason| {
                let of_it = kept.iter().filter(|k| k.reason == reason && held.starts_with(k.snapshot.ids()));
                of_it.max_by_key(|k| k.snapshot.position())
            };
            for at in [Reason::System, Reason::User].into_iter().filter_map(nearest) {
                store.save(&at.snapshot)?;
                if at.reason == Reason::System {
                    store.pin(&at.snapshot, true)?;
                }
            }
            store.save(&session.snapshot()?)
        })?;
        log::info!("{} tokens saved in {:.0} ms, {} bytes", saved.tokens, saved.took.as_secs_f64() * 1e3, saved.bytes);
        Ok(())
    }

    fn memory(&self) -> String {
        let plan = Local::memory(self);
        let held = self.session.ids().len() as u64;
        let rows = plan.cache / plan.context.max(1) * held;
        let size = indicatif::BinaryBytes;
        let mut lines = vec![
            format!("model      {} of weights and scratch", size(plan.weights + plan.scratch)),
            format!(
                "session    {held} of {} tokens: {} of states, {} of keys and values",
                plan.context,
                size(plan.states + plan.tails),
                size(rows)
            ),
            format!("snapshots  {}", self.cache.usage()),
        ];
        if let Some(store) = &self.store {
            lines.push(format!("on disk    {}, in {}", store.usage(), store.dir().display()));
        }
        lines.extend(self.recovery.past().last().map(|recovered| format!("losses     {recovered}")));
        let (read, took) = self.read;
        let saved = took.as_secs_f64() * self.reused as f64 / read.max(1) as f64;
        lines.push(format!("saved      {} tokens were not read again: about {saved:.1} s", self.reused));
        lines.join("\n")
    }
}

/// The checkpoint's own choice with the user's in its place where there is one.
fn sampling(args: &Args, own: Sampling) -> Sampling {
    if args.greedy {
        return Sampling { presence_penalty: args.presence_penalty.unwrap_or(0.0), ..Sampling::GREEDY };
    }
    Sampling {
        temperature: args.temperature.unwrap_or(own.temperature),
        top_k: args.top_k.unwrap_or(own.top_k),
        top_p: args.top_p.unwrap_or(own.top_p),
        min_p: args.min_p.unwrap_or(own.min_p),
        presence_penalty: args.presence_penalty.unwrap_or(own.presence_penalty),
    }
}

/// 0.7 as the user wrote it, not as the nearest f32 reads in f64.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn local() -> Local {
        Local::load(&Args::parse_from(["agent", "--device", "cpu", "--greedy"])).unwrap()
    }

    fn ids(local: &mut Local, prompt: &str, budget: usize) -> (Vec<u32>, Answer) {
        let mut ids = Vec::new();
        let answer = local.generate(prompt, budget, &mut |step| {
            if let Step::Wrote { id, .. } = step {
                ids.push(id);
            }
            Ok(true)
        });
        (ids, answer.unwrap())
    }

    const BEGIN: &str = "<|im_start|>user\nhello there<|im_end|>\n";

    #[test]
    fn what_is_in_memory_is_not_read_again() {
        let longer = format!("{BEGIN}<|im_start|>assistant\n");
        let (expected, fresh) = ids(&mut local(), &longer, 12);
        assert_eq!((fresh.reused, fresh.reread), (0, 0));
        let mut local = local();
        let (_, first) = ids(&mut local, BEGIN, 1);
        let (found, second) = ids(&mut local, &longer, 12);
        assert_eq!((second.reused, second.reread, second.prompt), (first.prompt, 0, fresh.prompt));
        assert_eq!(found, expected, "the same as without reuse");
        let (_, back) = ids(&mut local, BEGIN, 1);
        assert_eq!((back.reused, back.reread), (0, first.prompt));
        let (found, _) = ids(&mut local, &longer, 12);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_conversation_that_departs_is_read_from_where_it_does() {
        let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
        let begin = turn("system", "be brief") + &turn("user", "hello there");
        let prompt = |rest: &str| format!("{begin}{rest}<|im_start|>assistant\n");
        let mut local = local();
        let (_, first) = ids(&mut local, &prompt(""), 12);
        // The template writes the answer otherwise than the model did.
        let other = prompt(&(turn("assistant", "Something else.") + &turn("user", "and now?")));
        let (expected, _) = ids(&mut self::local(), &other, 12);
        let (found, second) = ids(&mut local, &other, 12);
        assert_eq!(found, expected);
        assert!(second.reused >= first.prompt - 4 && second.reread <= 8, "{second:?}");
        assert_eq!(second.read, second.prompt - second.reused);
        // And back.
        let (_, back) = ids(&mut local, &prompt(""), 12);
        assert!(back.reused >= first.prompt - 4, "{back:?}");
        let told = Engine::memory(&local);
        assert!(told.contains("tokens were not read again"), "{told}");
    }

    #[test]
    fn what_the_model_wrote_is_not_tokenized_again() {
        let mut local = local();
        let prompt = format!("{BEGIN}<|im_start|>assistant\n");
        let mut text = prompt.clone();
        let answer = local.generate(&prompt, 200, &mut |step| {
            if let Step::Wrote { text: more, .. } | Step::Rest { text: more } = step {
                text += more;
            }
            Ok(true)
        });
        let answer = answer.unwrap();
        assert_eq!(answer.end, End::Stop);
        let held = local.session.ids().to_vec();
        let more = "<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n";
        let (_, next) = ids(&mut local, &format!("{text}{more}"), 1);
        let new = local.session.model().tokenizer().unwrap().encode(more).unwrap().len();
        assert_eq!((next.reused, next.read, next.reread), (held.len(), new, 0), "only what is new");
    }

    #[test]
    fn reasoning_that_is_ended_is_not_read_again() {
        let mut local = local();
        let prompt = format!("{BEGIN}<|im_start|>assistant\n<think>\n");
        let mut text = prompt.clone();
        let mut seen = 0;
        let answer = local.generate(&prompt, 100, &mut |step| {
            if let Step::Wrote { text: more, .. } | Step::Rest { text: more } = step {
                seen += 1;
                text += more;
            }
            Ok(seen < 3)
        });
        assert_eq!(answer.unwrap().end, End::Cancelled);
        let held = local.session.ids().to_vec();
        let more = "\n</think>\n\n";
        let (_, next) = ids(&mut local, &format!("{text}{more}"), 4);
        // The last token that was written had not been read yet.
        let new = local.session.model().tokenizer().unwrap().encode(more).unwrap().len() + 1;
        assert_eq!((next.reused, next.read, next.reread), (held.len(), new, 0));
        assert!(local.session.ids().starts_with(&held));
    }

    #[test]
    fn what_was_kept_is_found_by_the_next_program() {
        let folder = tempfile::tempdir().unwrap();
        let prompt = format!("{}{BEGIN}<|im_start|>assistant\n", "<|im_start|>system\nbe brief<|im_end|>\n");
        let mut first = local();
        first.keep_in(folder.path()).unwrap();
        let (expected, answer) = ids(&mut first, &prompt, 12);
        first.save().unwrap();
        let mut second = local();
        let why = format!("{:#}", second.keep_in(folder.path()).unwrap_err());
        assert!(why.contains("another process"), "{why}");
        // It reads along.
        let mut beside = local();
        beside.find_in(folder.path()).unwrap();
        let restored = beside.prepare(&prompt).unwrap().unwrap();
        assert!(restored.tokens as usize >= answer.prompt - 4, "{restored}");
        assert_eq!(ids(&mut beside, &prompt, 12).0, expected);
        beside.save().unwrap();
        drop(first);
        second.keep_in(folder.path()).unwrap();
        let restored = second.prepare(&prompt).unwrap().unwrap();
        assert!(restored.tokens as usize >= answer.prompt - 4, "{restored}");
        let (found, again) = ids(&mut second, &prompt, 12);
        assert_eq!(found, expected);
        assert!(again.reused >= answer.prompt - 4, "{again:?}");
    }

    #[test]
    fn an_answer_ends_where_the_caller_says() {
        let mut local = local();
        let mut seen = 0;
        let answer = local.generate(BEGIN, 1000, &mut |step| {
            seen += usize::from(matches!(step, Step::Wrote { .. }));
            Ok(seen < 3)
        });
        assert_eq!((seen, answer.unwrap().end), (3, End::Cancelled));
        let failed = local.generate(BEGIN, 10, &mut |_| bail!("no reader"));
        assert_eq!(failed.unwrap_err().to_string(), "no reader");
        let (_, answer) = ids(&mut local, BEGIN, 2);
        assert_eq!(answer.end, End::Budget);
    }

    #[test]
    fn rounds_of_tools_extend_the_prompt() {
        let local = local();
        let mut messages = vec![json!({"role": "system", "content": "s"}), json!({"role": "user", "content": "time?"})];
        let tools = [json!({"type": "function", "function": {"name": "clock"}})];
        let before = local.render(&messages, &tools, None).unwrap();
        let call = json!({"type": "function", "function": {"name": "clock", "arguments": {"time_zone": "UTC"}}});
        messages.push(json!({"role": "assistant", "content": "Let me see.", "tool_calls": [call]}));
        messages.push(json!({"role": "tool", "content": "noon"}));
        let after = local.render(&messages, &tools, None).unwrap();
        let wrote = "Let me see.\n\n<tool_call>\n<function=clock>\n<parameter=time_zone>\nUTC\n</parameter>\n</function>\n</tool_call>";
        assert!(after.starts_with(&format!("{before}{wrote}<|im_end|>\n")), "{after}");
    }
}
