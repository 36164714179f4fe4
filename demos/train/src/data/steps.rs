//! Requests that take two tools, the second one with what the first one said.

use crate::data::calculator::{self, compute, result};
use crate::data::grammar::{Slots, forms};
use crate::data::world::{Content, File, World};
use crate::data::{Action, Side, Task, clock, files, names, notes};
use crate::draw::Draw;

forms! {
    TOTAL {
        train: [
            "add up all [the |]numbers in {file}", "what is the total of {file}", "how much is everything in {file} together", "sum up {file}", "what do all the lines of {file} make together",
            "read {file} and give me the total", "[tell|give] me the sum of all numbers in {file}", "add up {file}", "compute the total of the amounts in {file}",
        ],
        held: ["read {file} and add up all the numbers", "what is the sum of all the numbers in {file}", "tell me the total of all lines in {file}", "how much do all the amounts in {file} make"],
    }
    TWO_LINES {
        train: [
            "add the {one} and the {two} in {file}", "how much are the {one} and the {two} in {file} together", "what is {one} plus {two} in {file}", "read {file} and add the {one} to the {two}",
            "[tell|give] me the sum of the {one} and the {two} from {file}", "in {file}, what do the {one} and the {two} make together", "{file}: the {one} plus the {two}",
        ],
        held: ["what do the {one} and the {two} in {file} make together", "read {file} and tell me the {one} plus the {two}", "add up the {one} and the {two} from {file}"],
    }
    APART {
        train: [
            "how much more is the {one} than the {two} in {file}", "subtract the {two} from the {one} in {file}", "what is the {one} minus the {two} in {file}",
            "in {file}, how much is the {one} without the {two}", "read {file} and take the {two} away from the {one}", "{file}: the {one} less the {two}",
        ],
        held: ["read {file} and tell me how much more the {one} is than the {two}", "in {file}, what is the {one} minus the {two}", "take the {two} from the {one} in {file}"],
    }
    SCALED {
        train: [
            "multiply the {one} in {file} by {n}", "what is {n} times the {one} in {file}", "how much is the {one} in {file} for {n} months", "read {file} and multiply the {one} by {n}",
            "in {file} there is the {one}, how much is it times {n}", "{n} times the {one} from {file}, how much is that", "compute the {one} in {file} times {n}",
        ],
        held: ["how much is {n} times the {one} in {file}", "read {file} and tell me the {one} times {n}", "take the {one} from {file} and multiply it by {n}"],
    }
    SHARE {
        train: [
            "what is {n}% of the {one} in {file}", "how much is {n} percent of the {one} in {file}", "read {file} and take {n}% of the {one}", "compute {n}% of the {one} from {file}",
            "in {file}, what is {n} percent of the {one}", "[tell|give] me {n}% of the {one} in {file}",
        ],
        held: ["how much is {n}% of the {one} from {file}", "read {file} and tell me {n} percent of the {one}"],
    }
    ONLY_FILE {
        train: [
            "read the file in the folder {folder}", "what does the only file in {folder} say", "open the file in {folder}", "there is one file in {folder}, what is in it", "look into {folder} and read the file there",
            "find the file in the folder {folder} and read it", "show me what the file in {folder} says", "read whatever is in {folder}",
        ],
        held: ["there is a file in the folder {folder}, read it", "what does the file in {folder} say", "look into the folder {folder} and show me the file there"],
    }
    ONLY_ENDING {
        train: [
            "read the {ending} file", "what does the {ending} file say", "open the only {ending} file", "there is one {ending} file, what is in it", "find the {ending} file and read it", "show me the {ending} file here",
            "look for the {ending} file and read it to me", "what is in the {ending} file",
        ],
        held: ["there is a {ending} file, read it", "find the {ending} file and show me what is in it", "what does the only {ending} file say"],
    }
    NOTE_LINE {
        train: [
            "read {file} and note the {key}", "look up the {key} in {file} and make a note of it", "add the {key} from {file} to my notes", "find the {key} in {file} and write it down", "note down the {key} from {file}",
            "save the {key} in {file} as a note", "put the {key} from {file} into my notes",
        ],
        held: ["read {file} and write down the {key}", "find the {key} in {file} and save it as a note", "make a note of the {key} in {file}"],
    }
    DELETE_ABOUT {
        train: [
            "delete my note about {word}", "remove the note about {word}", "find the note about {word} and delete it", "I do not need the note about {word} any more", "the note about {word} can go",
            "throw away what I noted about {word}", "erase the note about {word}", "search my notes for {word} and delete what you find",
        ],
        held: ["find my note about {word} and remove it", "please throw away the note about {word}", "delete what I noted about {word}"],
    }
    DATED {
        train: [
            "make a note with today's date: {text}", "note with the date: {text}", "write this down with today's date: {text}", "add a note with the current date: {text}", "look up the date and note: {text}",
            "save this with the date of today: {text}", "new note with today's date in it: {text}",
        ],
        held: ["add a note with today's date: {text}", "write down with the current date: {text}", "save this note with the date: {text}"],
    }
    NOTE_TIMES {
        train: [
            "multiply the number in my note about {word} by {n}", "take the number in the note about {word} times {n}", "look up my note about {word} and multiply its number by {n}",
            "my note about {word} has a number, what is it times {n}", "find the note about {word} and multiply what it says by {n}", "what is {n} times the number in my note about {word}",
        ],
        held: ["find my note about {word} and take its number times {n}", "how much is the number in my note about {word} times {n}", "my note about {word} says a number, multiply it by {n}"],
    }
    NOTE_RESULT {
        train: [
            "compute {x} and note the result", "work out {x} and save the result as a note", "what is {x}? Write the result down", "calculate {x} and make a note of it", "add the result of {x} to my notes",
            "note down what {x} is", "figure out {x} and put it into my notes",
        ],
        held: ["calculate {x} and save the result as a note", "work out {x} and write it down", "compute {x} and add the result to my notes"],
    }
}

/// The amounts of an account of `told`, those of `keys` or all of them, as the file has them.
fn amounts(told: &str, keys: &[String]) -> Vec<String> {
    match keys {
        [] => told.lines().filter_map(|line| Some(line.split_once(": ")?.1.to_string())).collect(),
        keys => keys.iter().map(|key| files::value(told, key).to_string()).collect(),
    }
}

/// Read a file, then compute.
pub fn read_compute(world: &World, draw: &mut Draw) -> Option<Task> {
    let rows = |file: &File| match &file.content {
        Content::Account(lines) => lines.clone(),
        _ => Vec::new(),
    };
    let file = world.file(draw, |file| rows(file).len() >= 2)?;
    let mut keys: Vec<String> = rows(file).into_iter().map(|(key, _)| key).collect();
    draw.shuffle(&mut keys);
    keys.truncate(2);
    let (path, place) = (file.path(), files::place(world, file, draw));
    let n = names::number(draw, world.side, 2, 99).to_string();
    let what = draw.below(5);
    let form = [&TOTAL, &TWO_LINES, &APART, &SCALED, &SHARE][what];
    let slots: &Slots = &[("file", place.as_str()), ("one", &keys[0]), ("two", &keys[1]), ("n", &n)];
    let request = form.request(world.side, slots, draw);
    let second = move |told: &str| match what {
        0 => compute(&amounts(told, &[]).join(" + ")),
        1 => compute(&amounts(told, &keys).join(" + ")),
        2 => compute(&amounts(told, &keys).join(" - ")),
        3 => compute(&format!("{} * {n}", files::value(told, &keys[0]))),
        _ => compute(&format!("{n} * {} / 100", files::value(told, &keys[0]))),
    };
    Some(Task::double(request, files::open(&path), second, result))
}

/// List a folder, then read the one file that fits.
pub fn list_read(world: &World, draw: &mut Draw) -> Option<Task> {
    let in_folder = |folder: &str| world.files.iter().filter(|file| file.folder == folder).collect::<Vec<_>>();
    let single: Vec<&String> = world.folders.iter().filter(|folder| in_folder(folder).len() == 1).collect();
    let here = in_folder("");
    let endings: Vec<&str> = here
        .iter()
        .map(|file| file.ending())
        .filter(|e| here.iter().filter(|file| file.ending() == *e).count() == 1)
        .collect();
    if endings.is_empty() || draw.chance(60) {
        let folder = *draw.pick(single.get(..).filter(|list| !list.is_empty())?);
        let request = ONLY_FILE.request(world.side, &[("folder", folder)], draw);
        return Some(find_read(request, Some(folder.clone()), String::new()));
    }
    let ending = draw.pick(&endings).to_string();
    let request = ONLY_ENDING.request(world.side, &[("ending", &ending)], draw);
    Some(find_read(request, None, format!(".{ending}")))
}

/// The task that lists `folder` and reads the first file in it whose name ends so.
fn find_read(request: String, folder: Option<String>, ending: String) -> Task {
    let path = {
        let folder = folder.clone();
        move |told: &str| {
            let name = files::listed(told).into_iter().find(|name| name.ends_with(&ending) && !name.ends_with('/'));
            let name = name.unwrap_or_default();
            folder.as_ref().map_or_else(|| name.to_string(), |folder| format!("{folder}/{name}"))
        }
    };
    let second = {
        let path = path.clone();
        move |told: &str| files::open(&path(told))
    };
    let answer = move |results: &[String]| match results {
        [listing, content] => files::show(&path(listing), content),
        _ => Action::say("", &[""]),
    };
    let mut task = Task::double(request, files::look(folder.as_deref()), second, result);
    // The answer needs both results.
    task.acts.pop();
    task.acts.push(Box::new(answer));
    task
}

/// Read a file, then note a line of it.
pub fn read_note(world: &World, draw: &mut Draw) -> Option<Task> {
    let file = world.file(draw, |file| !matches!(file.content, Content::Items(_)))?;
    let keys: Vec<String> = match &file.content {
        Content::Account(lines) => lines.iter().map(|(key, _)| key.clone()).collect(),
        Content::Times(lines) => lines.iter().map(|(key, _)| format!("time for {key}")).collect(),
        Content::Items(_) => Vec::new(),
    };
    let asked = draw.pick(&keys).clone();
    let place = files::place(world, file, draw);
    let request = NOTE_LINE.request(world.side, &[("file", &place), ("key", &asked)], draw);
    let key = asked.trim_start_matches("time for ").to_string();
    let second = move |told: &str| Action::Call(notes::add(&format!("{key}: {}", files::value(told, &key))));
    Some(Task::double(request, files::open(&file.path()), second, notes::saved))
}

/// Find a note, then delete it.
pub fn search_delete(side: Side, all: &[(u64, String)], draw: &mut Draw) -> Option<Task> {
    let (id, _, word) = notes::telling(all, draw, |_| true)?;
    let request = DELETE_ABOUT.request(side, &[("word", word)], draw);
    let second = |told: &str| notes::delete(notes::listed(told).first().map_or(0, |(id, _)| *id));
    Some(Task::double(request, notes::search(word), second, move |_| notes::deleted(id)))
}

/// Ask the clock, then note something with the date.
pub fn date_note(side: Side, draw: &mut Draw) -> Task {
    let text = notes::text(side, draw);
    let request = DATED.request(side, &[("text", &text)], draw);
    let second = move |told: &str| Action::Call(notes::add(&format!("{}: {text}", clock::parts(told)[1])));
    Task::double(request, clock::ask(None), second, notes::saved)
}

/// The number that a note ends with or holds as a word.
fn number(text: &str) -> Option<&str> {
    text.split(' ').find(|word| word.bytes().all(|b| b.is_ascii_digit()))
}

/// Find a note, then compute with its number.
pub fn note_compute(side: Side, all: &[(u64, String)], draw: &mut Draw) -> Option<Task> {
    let (.., word) = notes::telling(all, draw, |text| number(text).is_some())?;
    let n = names::number(draw, side, 2, 99).to_string();
    let request = NOTE_TIMES.request(side, &[("word", word), ("n", &n)], draw);
    let second = move |told: &str| {
        let text = notes::listed(told).first().map_or_else(String::new, |(_, text)| text.clone());
        compute(&format!("{} * {n}", number(&text).unwrap_or_default()))
    };
    Some(Task::double(request, notes::search(word), second, result))
}

/// Compute, then note the result.
pub fn compute_note(side: Side, draw: &mut Draw) -> Task {
    let x = calculator::written(side, draw);
    let request = NOTE_RESULT.request(side, &[("x", &x)], draw);
    let first = compute(&x);
    let second = move |told: &str| Action::Call(notes::add(&format!("{x} = {told}")));
    Task::double(request, first, second, notes::saved)
}
