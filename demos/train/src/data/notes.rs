//! Requests for notes.

use gatedelta_agent::parse::Call;
use serde_json::json;

use crate::data::grammar::{Form, Slots, forms};
use crate::data::memory::Fact;
use crate::data::{Action, Side, Task, names};
use crate::draw::Draw;

forms! {
    TODO {
        train: [
            "call {who} about the {x}", "buy {n} {x}s", "pay {n} for the {x}", "meet {who} at {time}", "bring the {x} to {who}", "return the {x}", "ask {who} for the {word} papers", "clean the {x}", "send {n} to {who}", "look for the {x} at {word}",
            "buy {food} and {other}", "buy {food}, {other} and a {x}", "get {food} from {word}", "water the plants", "pick up {who} at {time}", "repair the {x}", "write to {who}", "pay the {food} bill", "book a table at {word} for {n} people", "call the doctor at {time}", "take the {x} to {city}",
            "order {n} {x}s", "visit {who} on [Monday|Tuesday|Wednesday|Thursday]", "wash the {x}", "buy {food}", "order {food} for {who}", "give {who} the {x}", "find a {x} for {who}", "ask {who} about {city}", "go to {city} on [Friday|Saturday|Sunday]", "bake a cake with {food}", "phone {word} before {time}", "read about {word}",
            "pack the {x} for {city}", "tell {who} about {word}", "sell the {x} for {n}", "pay {who} {n}", "buy a {x} for {who}", "send {food} to {city}", "send a {x} to {word}", "send {who} the {x}", "send the {x} [back|home|away]", "lend the {x} to {who}", "bring the {x} and {food} to {who}",
            "take {food} to {who} at {time}", "get the {x} and the {food} for {who}",
        ],
        held: ["ask {who} about the {x}", "buy the {x} for {n}", "meet {who} at {word}", "send the {x} to {who}", "bring {food} to {who}", "buy a {x} and {food}", "call {who} at {time}", "pick up the {x} at {word}"],
    }
    STATE {
        train: [
            "{who} has the {x}", "the {x} costs {n}", "{word} opens at {time}", "the {word} number is {n}", "{who} comes at {time}", "the {x} belongs to {who}", "{who} owes me {n}", "the key of the {x} is in {word}", "my {x} is at {word}", "the train to {city} leaves at {time}", "{who} likes {food}",
            "{who} lives in {city}", "the code for the {x} is {n}", "the {food} is in the {x}", "the meeting with {who} is at {time}", "{word} closes at {time}", "the bus number is {n}", "{who} needs {n} {x}s", "room {n} is for {who}", "the password of {word} is {other}", "the {x} is broken", "the rent is {n}",
            "{who} paid {n} for the {x}", "we are out of {food}", "the {x} is from {city}", "{who} does not eat {food}", "the price of the {x} is {n}", "the birthday of {who} is on [Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday]",
        ],
        held: ["the {x} is at {word}", "the number of {who} is {n}", "{who} has {n} {x}s", "the {x} of {who} is in {city}", "{who} comes to {word} at {time}", "the {food} costs {n}"],
    }
    ADD {
        train: [
            "note: {text}", "<do>make a note: {text}", "<do>[write|note] down: {text}", "<do>add a note: {text}", "<do>save this note: {text}", "new note: {text}", "<do>keep a note that says: {text}", "<do>put this into my notes: {text}", "<do>write this down for me: {text}", "<do>take a note: {text}",
            "<do>add to my notes: {text}", "<do>note this: {text}", "another note: {text}", "I want to note something: {text}", "[one|a] note [please|for me|more]: {text}", "<do>note the following: {text}", "<do>write into my notes: {text}", "for my notes: {text}", "this goes into my notes: {text}",
            "<do>save as a note: {text}", "notes: add {text}", "add note: {text}", "<do>make a new note with this text: {text}", "<do>make a note of this: {text}", "<do>save for later as a note: {text}", "here is something for my notes: {text}", "<do>add a new note: {text}", "<do>create a note: {text}", "todo: {text}",
            "note to self: {text}", "my next note: {text}", "<do>jot down: {text}", "<do>jot this down: {text}", "add \"{text}\" to my notes", "<do>note \"{text}\"", "<do>write \"{text}\" into my notes", "save the note \"{text}\"",
        ],
        held: [
            "write a note: {text}", "can you write this down: {text}", "please save this as a note: {text}", "add this to my notes: {text}", "keep this in my notes: {text}", "I have something to note: {text}", "a new note for me: {text}", "put \"{text}\" into my notes",
        ],
    }
    ADD_TODO {
        train: [
            "<do>make a note to {text}", "remember to {text}", "<do>remember that I have to {text}", "note to {text}", "I [have|need] to {text}, note it [down|]", "<do>add a note to {text}", "<do>note that I [have|need|want] to {text}", "I must {text}, make a note of it", "<do>put {text} on my list", "I have to {text}. Write that down", "<do>write down that I have to {text}",
            "do not let me forget to {text}", "I must not forget to {text}", "<do>note down that I must {text}", "<do>help me remember to {text}", "I [need|want] to {text}. [Save that|Keep it in my notes|Make a note of that]", "I must {text}. Note it", "I still [have|need] to {text}, put it into my notes",
            "{text}: I must not forget that, note it", "I will {text}. Write it down", "I [should|must] {text}. Please note it", "<do>remember: I need to {text}", "<do>write into my notes that I must {text}",
        ],
        held: ["write down that I need to {text}", "make a note that I have to {text}", "I need to {text}. Note that down", "please remember that I must {text}"],
    }
    ADD_THAT {
        train: [
            "<do>make a note that {text}", "<do>note that {text}", "<do>write down that {text}", "<do>add a note that {text}", "<do>save a note that {text}", "{text}, note that [down|]", "<do>note down that {text}", "<do>put into my notes that {text}", "{text}. Make a note of it", "{text}. Write that down",
            "<do>keep a note that {text}", "<do>add to my notes that {text}", "I want to note that {text}", "note for later that {text}", "<do>jot down that {text}", "{text}. [Please note it|Note it|Keep that as a note|Put that into my notes]", "{text}. Save [that|it] [as a note|in my notes|]", "{text}: note it",
            "{text}, write it down", "{text}, keep that in mind as a note", "you should know that {text}. Add it to my notes", "I heard that {text}. Note this",
        ],
        held: ["write a note that {text}", "write into my notes that {text}", "{text}. Note that down", "save it as a note that {text}", "I need a note that {text}"],
    }
    LIST {
        train: [
            "what notes do I have", "<do>list my notes", "<do>show me my notes", "<do>[show|list|read me] all [my |]notes", "what is in my notes", "which notes are there", "<do>read my notes", "do I have any notes", "what did I note", "<do>give me all my notes", "what did I write down", "<do>show everything I noted",
            "notes", "my notes", "all notes", "my notes, please", "what have I noted [so far|]", "what have I written down", "<noun>a list of [all |]my notes", "<do>list every note", "<know>what notes I have", "what notes are there", "<do>read out my notes", "<do>read me what I noted", "<do>go through my notes", "open my notes",
            "let me see my notes", "what is on my list of notes", "show notes", "list notes", "what do my notes say", "<noun>all the notes that I have", "is there anything in my notes", "what is noted", "<do>look at my notes", "<do>print my notes", "what did I ask you to note",
        ],
        held: ["which notes do I have", "tell me what is in my notes", "show me everything I wrote down", "are there any notes", "give me a list of my notes", "let me see all the notes", "what have I got in my notes"],
    }
    SEARCH {
        train: [
            "<do>[find|search] my notes for {word}", "do I have a note about {word}", "what did I note about {word}", "<do>find the note about {word}", "<do>search the notes for {word}", "which note says {word}", "is there a note about {word}", "<do>look for {word} in my notes", "what do my notes say about {word}",
            "<do>show me the note about {word}", "did I note something about {word}", "<do>read me the note about {word}", "do my notes say anything about {word}", "what have I noted about {word}", "<do>look in my notes for {word}", "<do>find my note about {word}", "<do>look up {word} in my notes", "my note about {word}", "note about {word}",
            "<do>search notes: {word}", "<noun>the note about {word}", "<noun>my note on {word}", "which notes have {word} in them", "are there notes about {word}", "what does my note about {word} say", "<do>find {word} in [the|my] notes", "is {word} in my notes", "have I written [something|anything] down about {word}", "what was my note about {word}",
            "where in my notes is {word}", "one of my notes ({word}), what does it say", "a word ({word}): is it in my notes", "search for this in my notes ({word})", "search for a note with {word}", "look for the word {word} in my notes", "search my notes, I look for {word}", "any notes on {word}", "<do>check my notes for {word}", "in my notes, what is there about {word}", "which note is about {word}", "is there anything in my notes about {word}", "do I have notes with {word}", "which [of the |]notes say {word}", "do any of my notes say {word}", "[is there|do I have] a note that says {word}", "which note has the word {word}", "does [any|a] note say {word}", "<do>show me notes that say {word}", "{word}: is there a note about it", "is there any note with {word} in it", "<do>find notes with {word}", "what notes do I have about {word}", "<do>show me what I noted about {word}", "<do>search for notes about {word}", "what was it I noted about {word}", "search for {word} [among|inside|through] my notes", "search for {word}, it is in one of my notes", "<do>search for the word {word} in my notes", "<do>search for {word} in [all|the] notes", "<do>look for the note on {word}", "I need [to see|to find] the note about {word}",
            "<do>find out what I noted on {word}", "I need my note about {word}", "in which note did I write about {word}",
        ],
        held: ["which of my notes is about {word}", "search for {word} in my notes", "what did I write down about {word}", "is there something about {word} in my notes", "I need the note on {word}", "are there any notes that say {word}", "read what my notes say about {word}"],
    }
    DELETE {
        train: [
            "<do>delete note {id}", "<do>remove note {id}", "<do>delete note number {id}", "<do>delete the note with the number {id}", "<do>throw away note {id}", "I do not need note {id} any more", "note {id} can go", "<do>remove number {id} from my notes", "<do>erase note {id}", "<do>forget note {id}", "<do>take note {id} off the list",
            "delete {id} from my notes", "note {id} is done, delete it", "<do>remove note number {id}", "I have done note {id}, remove it", "<do>drop note {id}", "note {id} is old, throw it away", "<do>get rid of note {id}", "<do>clear note {id}", "<do>delete my note {id}", "<do>strike note {id}", "note {id}: delete", "remove {id} from the notes",
            "<do>delete note no. {id}", "I am done with note {id}, [delete|remove] it", "the note with the number {id} can be deleted", "<do>throw out note {id}", "no more need for note {id}", "<do>cross out note {id}", "delete the note {id}", "note {id} is not needed any more",
        ],
        held: ["remove the note with the number {id}", "please throw note {id} away", "delete number {id} from my notes", "note number {id} can go", "I am done with note number {id}, it can go", "the note {id} is old, delete it"],
    }
}

/// What a note says: something to do, or how something is.
fn said(form: &Form, side: Side, draw: &mut Draw) -> String {
    let (who, x, word) = (names::person(draw, side), names::thing(draw, side), names::word(draw, side));
    let (time, n) = (names::time(draw, side), names::figure(draw, side, 5).to_string());
    let (food, other, (_, city)) = (names::food(draw, side), names::food(draw, side), names::zone(draw, side));
    let city = city.replace('_', " ");
    let slots: &Slots = &[
        ("who", who.as_str()),
        ("x", &x),
        ("word", &word),
        ("time", &time),
        ("n", &n),
        ("food", &food),
        ("other", &other),
        ("city", &city),
    ];
    form.text(side, slots, draw)
}

/// A note of somebody.
pub fn text(side: Side, draw: &mut Draw) -> String {
    let form = if draw.chance(60) { &TODO } else { &STATE };
    said(form, side, draw)
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

/// Words that no one searches for.
const COMMON: &str = "the for about call meet note number and buy pay bring has costs return ask papers opens clean send look at get from \
    water plants pick up repair write bill book table people doctor take order visit wash give find go on bake cake with phone before \
    read pack tell sell comes belongs owes key is in my train leaves likes lives code meeting closes bus needs room password broken \
    rent paid are out does not eat price birthday time day";

/// A word of one note and of no other, or two that stand together, with the note's number and text.
pub fn telling<'a>(
    notes: &'a [(u64, String)],
    draw: &mut Draw,
    wanted: impl Fn(&str) -> bool,
) -> Option<(u64, &'a str, String)> {
    let plain = |word: &str| {
        let lower = word.to_lowercase();
        word.len() >= 3
            && word.bytes().all(|b| b.is_ascii_alphabetic())
            && !COMMON.split_whitespace().any(|common| common == lower)
    };
    let mut found = Vec::new();
    for (id, text) in notes.iter().filter(|(_, text)| wanted(text)) {
        let words: Vec<&str> = text.split(' ').collect();
        for (at, word) in words.iter().enumerate().filter(|(_, word)| plain(word)) {
            let lower = word.to_lowercase();
            if notes.iter().all(|(other, text)| other == id || !text.to_lowercase().contains(&lower)) {
                found.push((*id, text.as_str(), word.to_string()));
                if let Some(next) = words.get(at + 1).filter(|next| plain(next)) {
                    found.push((*id, text.as_str(), format!("{word} {next}")));
                }
            }
        }
    }
    (!found.is_empty()).then(|| draw.pick(&found).clone())
}

/// A request to keep a note.
pub fn add_task(side: Side, draw: &mut Draw) -> Task {
    // Of ten: what is to be done, how something is, what is told of oneself. The rest has a colon, which is easier: training has less of it.
    let (todo, that, fact) = if side == Side::Train { (3, 2, 1) } else { (2, 1, 1) };
    let (form, text) = match draw.below(10) {
        at if at < todo => (&ADD_TODO, said(&TODO, side, draw)),
        at if at < todo + that => (&ADD_THAT, said(&STATE, side, draw)),
        at if at < todo + that + fact => (&ADD_THAT, Fact::new(side, draw).sentence()),
        _ => (&ADD, text(side, draw)),
    };
    Task::single(form.request(side, &[("text", &text)], draw), Action::Call(add(&text)), saved)
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

/// A request for the notes about something: one, several or none.
pub fn search_task(side: Side, notes: &[(u64, String)], draw: &mut Draw) -> Task {
    let word = match telling(notes, draw, |_| true) {
        Some((.., word)) if draw.chance(70) => word,
        _ => names::word(draw, side),
    };
    let request = SEARCH.request(side, &[("word", &word)], draw);
    Task::single(request, search(&word), move |told| match &listed(told)[..] {
        [] => Action::say(format!("No note is about {word}."), &["No note"]),
        [(id, text)] => Action::say(format!("Note {id} says: {text}"), &[text]),
        several => {
            let lines: Vec<String> = several.iter().map(|(id, text)| format!("{id}: {text}")).collect();
            let texts: Vec<&String> = several.iter().map(|(_, text)| text).collect();
            Action::say(format!("These notes:\n{}", lines.join("\n")), &texts)
        }
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
