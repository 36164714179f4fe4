//! The conversation on disk, in one JSON file that is replaced in a single step. What the model made of it lies beside it, in a
//! store of snapshots: without that the conversation is there all the same, and is read again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::tools::notes::replace;

/// A conversation and how far one has gone back in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// What the model sees, without the system text.
    pub messages: Vec<Value>,
    /// What came after, before the user went back.
    pub later: Vec<Value>,
}

/// Where a conversation is kept.
#[derive(Debug)]
pub struct Kept(PathBuf);

impl Kept {
    /// The conversation of a folder.
    pub fn new(folder: &Path) -> Self {
        Kept(folder.join("conversation.json"))
    }

    /// Where conversations go unless the user names a folder.
    pub fn default_folder() -> Option<PathBuf> {
        Some(dirs::data_dir()?.join("gatedelta-agent").join("session"))
    }

    /// The conversation that was kept last; an empty one if there is none.
    ///
    /// # Errors
    /// If the file cannot be read or is no conversation; it stays as it is.
    pub fn load(&self) -> Result<Conversation> {
        let name = self.0.display();
        let bytes = match fs::read(&self.0) {
            Ok(bytes) => bytes,
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Ok(Conversation::default()),
            Err(why) => return Err(why).with_context(|| format!("the conversation in {name} cannot be read")),
        };
        let malformed = || format!("the conversation in {name} is malformed and was left as it is");
        let file: Value = serde_json::from_slice(&bytes).with_context(malformed)?;
        let list = |key: &str| {
            let list = file[key].as_array().with_context(|| format!("no list {key:?}")).with_context(malformed)?;
            for message in list {
                if !message["role"].is_string() {
                    bail!("{}: a message without a role", malformed());
                }
            }
            Ok(list.clone())
        };
        Ok(Conversation { messages: list("messages")?, later: list("later")? })
    }

    /// Keeps a conversation in place of the last one.
    ///
    /// # Errors
    /// If it cannot be written; the last one is then still there.
    pub fn save(&self, conversation: &Conversation) -> Result<()> {
        let file = json!({"messages": conversation.messages, "later": conversation.later});
        replace(&self.0, format!("{file:#}\n").as_bytes())
            .with_context(|| format!("the conversation in {} cannot be written", self.0.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_and_a_malformed_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let kept = Kept::new(&folder.path().join("new"));
        assert_eq!(kept.load().unwrap(), Conversation::default());
        let message = |text: &str| json!({"role": "user", "content": text});
        let conversation = Conversation { messages: vec![message("a"), message("ö")], later: vec![message("b")] };
        kept.save(&conversation).unwrap();
        assert_eq!(kept.load().unwrap(), conversation);
        for (text, word) in [
            ("{", "malformed"),
            ("{\"messages\": []}", "later"),
            ("{\"messages\": [{}], \"later\": []}", "without a role"),
        ] {
            fs::write(&kept.0, text).unwrap();
            let why = format!("{:#}", kept.load().unwrap_err());
            assert!(why.contains(word) && why.contains("left as it is"), "{why}");
            assert_eq!(fs::read_to_string(&kept.0).unwrap(), text);
        }
    }
}
