//! Requests for notes.

use gatedelta_agent::parse::Call;
use serde_json::json;

use crate::data::grammar::forms;
use crate::data::{Action, Side, Task, names};
use crate::draw::Draw;

forms! {
    TEXT {
        train: [
            "call {who} about the {x}", "buy {n} {x}s", "pay {n} for the {x}", "meet {who} at {time}", "bring the {x} to {who}", "{who} has the {x}", "the {x} costs {n}",
            "return the {x}", "ask {who} for the {word} papers", "{word} opens at {time}", "the {word} number is {n}", "clean the {x}", "send {n} to {who}", "look for the {x} at {word}",
        ],
        held: ["ask {who} about the {x}", "buy the {x} for {n}", "meet {who} at {word}", "the {x} is at {word}", "send the {x} to {who}", "the number of {who} is {n}"],
    }
    ADD {
        train: [
            "note: {text}", "make a note: {text}", "[write|note] down: {text}", "add a note: {text}", "save this note: {text}", "new note: {text}", "[please |]remember this: {text}", "keep a note that says: {text}",
            "put this into my notes: {text}", "write this down for me: {text}", "take a note: {text}", "add to my notes: {text}", "I must not forget this: {text}", "can you note this: {text}",
        ],
        held: ["write a note: {text}", "can you write this down: {text}", "please save this: {text}", "add this to my notes: {text}", "keep this in my notes: {text}"],
    }
    LIST {
        train: [
            "what notes do I have", "list my notes", "show me my notes", "[show|list|read me] all [my |]notes", "what is in my notes", "which notes are there", "read my notes", "do I have any notes",
            "what did I note", "give me all my notes", "what did I write down", "show everything I noted",
        ],
        held: ["which notes do I have", "tell me what is in my notes", "show me everything I wrote down", "are there any notes", "give me a list of my notes"],
    }
    SEARCH {
        train: [
            "[find|search] my notes for {word}", "do I have a note about {word}", "what did I note about {word}", "find the note about {word}", "search the notes for {word}", "which note says {word}",
            "is there a note about {word}", "look for {word} in my notes", "what do my notes say about {word}", "show me the note about {word}", "did I note something about {word}",
        ],
        held: ["which of my notes is about {word}", "search for {word} in my notes", "what did I write down about {word}", "is there something about {word} in my notes"],
    }
    DELETE {
        train: [
            "delete note {id}", "remove note {id}", "delete note number {id}", "delete the note with the number {id}", "throw away note {id}", "I do not need note {id} any more", "note {id} can go",
            "please remove number {id} from my notes", "erase note {id}", "forget note {id}", "take note {id} off the list",
        ],
        held: ["remove the note with the number {id}", "please throw note {id} away", "delete number {id} from my notes", "note number {id} can go"],
    }
}

/// A note of somebody.
pub fn text(side: Side, draw: &mut Draw) -> String {
    let (who, x, word) = (names::person(draw, side), names::thing(draw, side), names::word(draw, side));
    let (time, n) = (names::time(draw, side), names::figure(draw, side, 4).to_string());
    TEXT.text(side, &[("who", &who), ("x", &x), ("word", &word), ("time", &time), ("n", &n)], draw)
}

/// A call that adds a note.
pub fn add(text: &str) -> Call {
    let arguments = json!({"action": "add", "text": text});
    Call { name: "notes".into(), arguments: arguments.as_object().cloned().unwrap_or_default() }
}

/// A call that lists all notes.
pub fn list() -> Call {
    Call { name: "notes".into(), arguments: json!({"action": "list"}).as_object().cloned().unwrap_or_default() }
}

/// A call that searches.
pub fn search(word: &str) -> Action {
    Action::call("notes", &[("action", "search".into()), ("text", word.into())])
}

/// A call that deletes.
pub fn delete(id: u64) -> Action {
    Action::call("notes", &[("action", "delete".into()), ("id", id.into())])
}

/// The notes of a listing, `3 (2026-03-01 12:30): text` a line: numbers and texts.
pub fn listed(told: &str) -> Vec<(u64, String)> {
    told.lines()
        .filter_map(|line| {
            let (head, text) = line.split_once("): ")?;
            Some((head.split_once(" (")?.0.parse().ok()?, text.to_string()))
        })
        .collect()
}

/// The answer once a note is saved: `Saved as note 3.`
pub fn saved(told: &str) -> Action {
    let id = told.trim_start_matches("Saved as note ").trim_end_matches('.');
    Action::say(format!("Saved as note {id}."), &[id])
}

/// The answer once a note is deleted.
pub fn deleted(id: u64) -> Action {
    Action::say(format!("Note {id} is deleted."), &[id])
}

/// A word of one note and of no other, with the note's number and text.
pub fn telling<'a>(
    notes: &'a [(u64, String)],
    draw: &mut Draw,
    wanted: impl Fn(&str) -> bool,
) -> Option<(u64, &'a str, &'a str)> {
    let mut found = Vec::new();
    for (id, text) in notes.iter().filter(|(_, text)| wanted(text)) {
        for word in text.split(' ').filter(|word| word.len() >= 3 && word.bytes().all(|b| b.is_ascii_alphabetic())) {
            let lower = word.to_lowercase();
            let common = ["the", "for", "about", "call", "meet", "note", "number"].contains(&lower.as_str());
            if !common && notes.iter().all(|(other, text)| other == id || !text.to_lowercase().contains(&lower)) {
                found.push((*id, text.as_str(), word));
            }
        }
    }
    (!found.is_empty()).then(|| *draw.pick(&found))
}

/// A request to keep a note.
pub fn add_task(side: Side, draw: &mut Draw) -> Task {
    let text = text(side, draw);
    Task::single(ADD.request(side, &[("text", &text)], draw), Action::Call(add(&text)), saved)
}

/// A request for all notes.
pub fn list_task(side: Side, draw: &mut Draw) -> Task {
    Task::single(LIST.request(side, &[], draw), Action::Call(list()), |told| {
        let notes = listed(told);
        if notes.is_empty() {
            return Action::say("You have no notes.", &["no notes"]);
        }
        let lines: Vec<String> = notes.iter().map(|(id, text)| format!("{id}: {text}")).collect();
        let texts: Vec<&String> = notes.iter().map(|(_, text)| text).collect();
        Action::say(format!("Your notes:\n{}", lines.join("\n")), &texts)
    })
}

/// A request for the notes about something, which may be none.
pub fn search_task(side: Side, notes: &[(u64, String)], draw: &mut Draw) -> Task {
    let word = match telling(notes, draw, |_| true) {
        Some((.., word)) if draw.chance(80) => word.to_string(),
        _ => names::word(draw, side),
    };
    let request = SEARCH.request(side, &[("word", &word)], draw);
    Task::single(request, search(&word), move |told| match listed(told).first() {
        Some((id, text)) => Action::say(format!("Note {id} says: {text}"), &[text]),
        None => Action::say(format!("No note is about {word}."), &["No note"]),
    })
}

/// A request to delete a note by its number, which may not exist.
pub fn delete_task(side: Side, notes: &[(u64, String)], draw: &mut Draw) -> Task {
    let id = if notes.is_empty() || draw.chance(15) { draw.range(1, 60) } else { draw.pick(notes).0 };
    let request = DELETE.request(side, &[("id", &id.to_string())], draw);
    Task::single(request, delete(id), move |told| match told.starts_with("Deleted") {
        true => deleted(id),
        false => Action::say(format!("There is no note {id}."), &["no note"]),
    })
}
