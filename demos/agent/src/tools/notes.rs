//! Notes that outlive the program, in one JSON file that is replaced in a single step.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::{Map, Value, json};

use super::clock::Time;
use super::{Spec, Tool};

const NOTE_LIMIT: usize = 4 << 10;
const COUNT_LIMIT: usize = 1000;

/// Adds, lists, searches and deletes notes.
pub struct Notes {
    path: PathBuf,
    time: Time,
    /// Two calls must not read, change and write at once.
    turn: Mutex<()>,
}

struct Note {
    id: u64,
    time: String,
    text: String,
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}): {}", self.id, self.time, self.text)
    }
}

impl Notes {
    /// Notes in the file at `path`, which is made with the first note; `time` dates them.
    pub fn new(path: PathBuf, time: Time) -> Self {
        Notes { path, time, turn: Mutex::new(()) }
    }

    /// Where notes go unless the user names a file.
    pub fn default_path() -> Option<PathBuf> {
        Some(dirs::data_dir()?.join("gatedelta-agent").join("notes.json"))
    }

    /// All notes and the number that the next one gets. Numbers are not used twice.
    fn load(&self) -> Result<(Vec<Note>, u64), String> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), 1)),
            Err(why) => return Err(format!("the notes in {} cannot be read: {why}", self.path.display())),
        };
        let parsed = serde_json::from_slice::<Value>(&bytes).map_err(|why| why.to_string()).and_then(|file| {
            let notes = file["notes"].as_array().ok_or("no list \"notes\"")?;
            let note = |note: &Value| {
                let text = |key: &str| Some(note[key].as_str()?.to_string());
                Some(Note { id: note["id"].as_u64()?, time: text("time")?, text: text("text")? })
            };
            let notes: Option<Vec<Note>> = notes.iter().map(note).collect();
            Ok((notes.ok_or("a note without id, time and text")?, file["next"].as_u64().unwrap_or(1)))
        });
        let (notes, next) = parsed.map_err(|why| {
            format!("the notes file {} is malformed and was left as it is: {why}", self.path.display())
        })?;
        let next = notes.iter().map(|note| note.id.saturating_add(1)).max().unwrap_or(1).max(next);
        Ok((notes, next))
    }

    fn store(&self, notes: &[Note], next: u64) -> Result<(), String> {
        let notes: Vec<Value> =
            notes.iter().map(|note| json!({"id": note.id, "time": note.time, "text": note.text})).collect();
        let text = format!("{:#}\n", json!({"next": next, "notes": notes}));
        replace(&self.path, text.as_bytes())
            .map_err(|why| format!("the notes in {} cannot be written: {why}", self.path.display()))
    }

    fn add(&self, text: &str) -> Result<String, String> {
        let (mut notes, next) = self.load()?;
        if text.len() > NOTE_LIMIT {
            return Err(format!("the note has {} bytes; the limit is {NOTE_LIMIT}", text.len()));
        }
        if notes.len() >= COUNT_LIMIT {
            return Err(format!("there are {} notes, no more are taken; delete some first", notes.len()));
        }
        notes.push(Note {
            id: next,
            time: self.time.now().strftime("%Y-%m-%d %H:%M").to_string(),
            text: text.to_string(),
        });
        self.store(&notes, next.saturating_add(1))?;
        Ok(format!("Saved as note {next}."))
    }

    fn find(&self, query: Option<&str>) -> Result<String, String> {
        let words = query.unwrap_or_default().to_lowercase();
        let (notes, _) = self.load()?;
        let found: Vec<String> = notes
            .iter()
            .filter(|note| {
                let text = note.text.to_lowercase();
                words.split_whitespace().all(|word| text.contains(word))
            })
            .map(Note::to_string)
            .collect();
        Ok(match (found.is_empty(), query) {
            (false, _) => found.join("\n"),
            (true, Some(query)) => format!("None of the {} notes contains {query:?}.", notes.len()),
            (true, None) => "There are no notes.".into(),
        })
    }

    fn delete(&self, id: u64) -> Result<String, String> {
        let (mut notes, next) = self.load()?;
        let Some(at) = notes.iter().position(|note| note.id == id) else {
            let ids: Vec<String> = notes.iter().map(|note| note.id.to_string()).collect();
            return Err(format!(
                "there is no note {id}; there are: {}",
                if ids.is_empty() { "none".into() } else { ids.join(", ") }
            ));
        };
        let note = notes.remove(at);
        self.store(&notes, next)?;
        Ok(format!("Deleted note {note}"))
    }
}

/// Writes a file beside `path`, then puts it in its place: a reader sees the old or the new content, never a part.
pub fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    // A link stays a link: the file it names is replaced.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}

impl Tool for Notes {
    fn spec(&self) -> Spec {
        let action = json!({"type": "string", "enum": ["add", "list", "search", "delete"]});
        let text = json!({"type": "string", "description": "the note to add, or the words to search for"});
        let id = json!({"type": "integer", "description": "the number of the note to delete"});
        let what = "The user's notes, kept between conversations: add one, list all, search, delete one.";
        Spec::new("notes", what, &[("action", action, true), ("text", text, false), ("id", id, false)])
    }

    fn call(&self, arguments: &Map<String, Value>) -> Result<String, String> {
        let _turn = self.turn.lock().map_err(|_| "the notes are out of order since a failed call".to_string())?;
        let action = arguments.get("action").and_then(Value::as_str).unwrap_or_default();
        let text = arguments.get("text").and_then(Value::as_str).map(str::trim).filter(|text| !text.is_empty());
        match (action, text, arguments.get("id").and_then(Value::as_u64)) {
            ("add", Some(text), _) => self.add(text),
            ("list", ..) => self.find(None),
            ("search", Some(words), _) => self.find(Some(words)),
            ("delete", _, Some(id)) => self.delete(id),
            ("delete", ..) => Err("delete needs the parameter \"id\", the number of a note".into()),
            _ => Err(format!("{action} needs the parameter \"text\"")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(notes: &Notes, arguments: Value) -> Result<String, String> {
        let arguments = arguments.as_object().unwrap().clone();
        notes.call(&arguments)
    }

    #[test]
    fn kept_between_programs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/folder/notes.json");
        let notes = Notes::new(path.clone(), Time::System);
        assert_eq!(call(&notes, json!({"action": "list"})).unwrap(), "There are no notes.");
        assert_eq!(call(&notes, json!({"action": "add", "text": "Buy <milk> & Käse"})).unwrap(), "Saved as note 1.");
        assert_eq!(call(&notes, json!({"action": "add", "text": "Call Ann"})).unwrap(), "Saved as note 2.");
        let notes = Notes::new(path.clone(), Time::System);
        let all = call(&notes, json!({"action": "list"})).unwrap();
        assert!(
            all.starts_with("1 (") && all.contains("): Buy <milk> & Käse\n2 (") && all.ends_with("): Call Ann"),
            "{all}"
        );
        assert!(call(&notes, json!({"action": "search", "text": "MILK buy"})).unwrap().starts_with("1 ("));
        assert_eq!(
            call(&notes, json!({"action": "search", "text": "bread"})).unwrap(),
            "None of the 2 notes contains \"bread\"."
        );
        assert!(call(&notes, json!({"action": "delete", "id": 2})).unwrap().starts_with("Deleted note 2 ("));
        assert_eq!(call(&notes, json!({"action": "delete", "id": 2})).unwrap_err(), "there is no note 2; there are: 1");
        assert_eq!(call(&notes, json!({"action": "add", "text": "third"})).unwrap(), "Saved as note 3.");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "only the notes file is left");
    }

    #[test]
    fn a_malformed_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.json");
        for content in
            ["", "{", "[]", "{\"notes\": [1]}", "{\"notes\": [{\"id\": -1, \"time\": \"\", \"text\": \"\"}]}", "\u{0}"]
        {
            fs::write(&path, content).unwrap();
            let notes = Notes::new(path.clone(), Time::System);
            for action in
                [json!({"action": "add", "text": "x"}), json!({"action": "list"}), json!({"action": "delete", "id": 1})]
            {
                assert!(call(&notes, action).unwrap_err().contains("malformed"), "{content}");
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn bad_calls_and_places() {
        let folder = tempfile::tempdir().unwrap();
        let notes = Notes::new(folder.path().join("notes.json"), Time::System);
        for (arguments, expected) in [
            (json!({"action": "add"}), "add needs the parameter \"text\""),
            (json!({"action": "add", "text": "  "}), "needs"),
            (json!({"action": "search"}), "search needs"),
            (json!({"action": "delete"}), "needs the parameter \"id\""),
            (json!({"action": "add", "text": "x".repeat(5000)}), "limit is 4096"),
        ] {
            assert!(call(&notes, arguments).unwrap_err().contains(expected));
        }
        let notes = Notes::new(folder.path().to_path_buf(), Time::System);
        assert!(call(&notes, json!({"action": "list"})).unwrap_err().contains("cannot be read"));
    }
}
