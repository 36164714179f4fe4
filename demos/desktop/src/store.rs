//! What is kept on disk: the conversation and the settings, each in a file that is replaced in one step. A crash at any moment
//! leaves the old file or the new one, never a part.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use gatedelta_agent::tools::notes::replace;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::conversation::{Conversation, Turn};

/// The format of the conversation's file.
const VERSION: u64 = 1;

/// The user's choices.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Dark, light, or as the system has it.
    pub theme: Theme,
    /// The checkpoint; the one inside the program if none.
    pub model: Option<PathBuf>,
    /// The device's name; the best that works if none.
    pub device: Option<String>,
    /// Checkpoints that were loaded before, the last one first.
    pub recent: Vec<PathBuf>,
}

/// Which colours are used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Theme {
    /// As the system has it.
    #[default]
    System,
    /// Light.
    Light,
    /// Dark.
    Dark,
}

/// A folder that one window at a time writes to.
pub struct Store {
    /// Where changes go; none where another window has the folder.
    writer: Option<Writer>,
    folder: PathBuf,
    trouble: Arc<Mutex<Option<String>>>,
}

struct Writer {
    changes: Sender<Change>,
    thread: JoinHandle<()>,
    /// Held until the end.
    _lock: File,
}

enum Change {
    Conversation(Conversation),
    Settings(Settings),
    Flush(Sender<()>),
}

/// What was found in a folder.
#[derive(Debug, Default)]
pub struct Kept {
    /// The conversation.
    pub conversation: Conversation,
    /// The settings.
    pub settings: Settings,
    /// What the user should know: a file that could not be read, another window that has the folder.
    pub notices: Vec<String>,
}

impl Store {
    /// Opens a folder, which is made if it is not there. A file that cannot be read is put aside, not overwritten.
    ///
    /// # Errors
    /// If the folder cannot be made or written to.
    pub fn open(folder: &Path) -> Result<(Self, Kept)> {
        let told = || format!("the conversation cannot be kept in {}", folder.display());
        fs::create_dir_all(folder).with_context(told)?;
        let lock = File::options().create(true).write(true).truncate(false).open(folder.join("lock"));
        let lock = lock.with_context(told)?;
        let mut kept = Kept::default();
        let mut ours = match lock.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => {
                kept.notices.push(
                    "Another window keeps its conversation here. This one shows a copy, and what is added to it is not kept."
                        .into(),
                );
                false
            }
            Err(TryLockError::Error(why)) => return Err(why).with_context(told),
        };
        if let Some(found) = read(&folder.join("conversation.json"), parse, &mut ours, &mut kept.notices) {
            kept.conversation = found;
        }
        let settings = |bytes: &[u8]| Ok(serde_json::from_slice(bytes)?);
        if let Some(found) = read(&folder.join("settings.json"), settings, &mut ours, &mut kept.notices) {
            kept.settings = found;
        }
        let trouble: Arc<Mutex<Option<String>>> = Arc::default();
        let writer = if ours {
            let (changes, arriving) = channel();
            let (folder, trouble) = (folder.to_path_buf(), trouble.clone());
            let thread = std::thread::Builder::new().name("store".into());
            let thread = thread.spawn(move || write(&folder, &arriving, &trouble)).with_context(told)?;
            Some(Writer { changes, thread, _lock: lock })
        } else {
            None
        };
        Ok((Store { writer, folder: folder.to_path_buf(), trouble }, kept))
    }

    /// Whether what is given to it is kept.
    pub fn writes(&self) -> bool {
        self.writer.is_some()
    }

    /// Where everything is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Keeps the conversation as it is now. Returns at once: a thread of its own writes, and of several that wait only the last.
    pub fn keep(&self, conversation: &Conversation) {
        self.send(Change::Conversation(conversation.clone()));
    }

    /// Keeps the settings.
    pub fn keep_settings(&self, settings: &Settings) {
        self.send(Change::Settings(settings.clone()));
    }

    fn send(&self, change: Change) {
        if let Some(writer) = &self.writer {
            // The thread ends only with this value.
            let _ = writer.changes.send(change);
        }
    }

    /// Waits until everything is on disk.
    pub fn flush(&self) {
        let (done, arrives) = channel();
        self.send(Change::Flush(done));
        // An error means that there is nothing to wait for.
        let _ = arrives.recv();
    }

    /// What went wrong since this was last asked.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(Writer { changes, thread, .. }) = self.writer.take() {
            drop(changes);
            // A panic there was reported where it happened.
            let _ = thread.join();
        }
    }
}

/// Writes what arrives until nobody is left to send.
fn write(folder: &Path, arriving: &Receiver<Change>, trouble: &Mutex<Option<String>>) {
    while let Ok(first) = arriving.recv() {
        let (mut conversation, mut settings, mut waiting) = (None, None, Vec::new());
        for change in std::iter::once(first).chain(arriving.try_iter()) {
            match change {
                Change::Conversation(latest) => conversation = Some(latest),
                Change::Settings(latest) => settings = Some(latest),
                Change::Flush(done) => waiting.push(done),
            }
        }
        let store = |name: &str, content: Value| {
            let path = folder.join(name);
            if let Err(why) = replace(&path, content.to_string().as_bytes()) {
                let why = format!("{} cannot be written: {why}", path.display());
                *trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
            }
        };
        if let Some(conversation) = conversation {
            let turns: Vec<&Turn> = conversation.turns().iter().map(|turn| &**turn).collect();
            let file = json!({"version": VERSION, "current": conversation.current(), "turns": turns});
            store("conversation.json", file);
        }
        if let Some(settings) = settings {
            store("settings.json", json!(settings));
        }
        for done in waiting {
            // Whoever waited may have given up.
            let _ = done.send(());
        }
    }
}

/// The content of a file; none if there is no file, or none that can be read: that one is put aside if the folder is
/// `ours`, which it no longer is where that fails: nothing is overwritten.
fn read<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T>,
    ours: &mut bool,
    notices: &mut Vec<String>,
) -> Option<T> {
    let bytes = match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(why) if why.kind() == io::ErrorKind::NotFound => return None,
        Err(why) => Err(why.into()),
    };
    match bytes.and_then(|bytes| parse(&bytes)) {
        Ok(found) => Some(found),
        Err(why) => {
            let mut notice = format!("{} cannot be read: {why:#}.", path.display());
            if *ours {
                let aside = free_name(path);
                match fs::rename(path, &aside) {
                    Ok(()) => notice += &format!(" It was put aside as {}.", aside.display()),
                    Err(why) => {
                        *ours = false;
                        notice += &format!(" It cannot be put aside either ({why}): nothing will be kept.");
                    }
                }
            }
            notices.push(notice);
            None
        }
    }
}

/// A name beside `path` that is not taken.
fn free_name(path: &Path) -> PathBuf {
    let name = |n: u64| path.with_extension(format!("unreadable-{n}.json"));
    (1..).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(0))
}

fn parse(bytes: &[u8]) -> Result<Conversation> {
    #[derive(Deserialize)]
    struct Head {
        version: u64,
    }
    #[derive(Deserialize)]
    struct Body {
        current: Option<u64>,
        turns: Vec<Turn>,
    }
    let Head { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        bail!("it has format {version}, and this program reads format {VERSION}");
    }
    let Body { current, turns } = serde_json::from_slice(bytes)?;
    Conversation::new(turns, current)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Conversation {
        let mut conversation = Conversation::default();
        for question in ["a", "b"] {
            let id = conversation.ask(question);
            conversation.turn_mut(id).unwrap().push(false, "é\u{0}\"");
        }
        conversation.go(Some(0));
        conversation
    }

    #[test]
    fn what_is_kept_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new/folder");
        let (store, kept) = Store::open(&folder).unwrap();
        assert_eq!((kept.conversation, kept.notices.len()), (Conversation::default(), 0));
        let settings = Settings { theme: Theme::Light, recent: vec!["x".into()], ..Settings::default() };
        store.keep_settings(&settings);
        for _ in 0..100 {
            store.keep(&some());
        }
        drop(store);
        let (store, kept) = Store::open(&folder).unwrap();
        assert_eq!((kept.conversation, kept.settings, kept.notices.len()), (some(), settings, 0));
        assert_eq!(store.trouble(), None);
    }

    #[test]
    fn a_second_window_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (first, _) = Store::open(dir.path()).unwrap();
        first.keep(&some());
        first.flush();
        let (second, kept) = Store::open(dir.path()).unwrap();
        assert_eq!(kept.conversation, some());
        assert!(kept.notices[0].contains("Another window"), "{:?}", kept.notices);
        second.keep(&Conversation::default());
        second.flush();
        drop((first, second));
        assert_eq!(Store::open(dir.path()).unwrap().1.conversation, some());
    }

    #[test]
    fn what_cannot_be_read_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conversation.json");
        let whole = {
            let (store, _) = Store::open(dir.path()).unwrap();
            store.keep(&some());
            drop(store);
            fs::read(&path).unwrap()
        };
        // No beginning of the file is taken for a whole one.
        for end in 0..whole.len() {
            assert!(parse(&whole[..end]).is_err(), "{end}");
        }
        for (n, (content, expected)) in [
            (&whole[..whole.len() / 2], "EOF"),
            (b"{\"version\":2}", "it has format 2, and this program reads format 1"),
            (br#"{"version":1,"current":5,"turns":[]}"#, "stands at turn 5"),
            (b"\xff", "expected value"),
        ]
        .into_iter()
        .enumerate()
        {
            fs::write(&path, content).unwrap();
            let (store, kept) = Store::open(dir.path()).unwrap();
            assert!(kept.notices[0].contains(expected), "{:?}", kept.notices);
            store.keep(&some());
            drop(store);
            assert_eq!(fs::read(dir.path().join(format!("conversation.unreadable-{}.json", n + 1))).unwrap(), content);
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn what_cannot_be_written_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("folder");
        let (store, _) = Store::open(&folder).unwrap();
        // A folder of that name cannot be replaced by a file.
        fs::create_dir(folder.join("conversation.json")).unwrap();
        store.keep(&some());
        store.flush();
        assert!(store.trouble().unwrap().contains("conversation.json cannot be written"));
        assert_eq!(store.trouble(), None);
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Store::open(&file.join("folder")).is_err());
    }
}
