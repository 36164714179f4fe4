//! Requests for files and folders.

use crate::data::content::{Entry, Sort};
use crate::data::grammar::{Slots, forms};
use crate::data::world::{File, World};
use crate::data::{Action, Task, names};
use crate::draw::Draw;

forms! {
    LIST_ALL {
        train: [
            "what files are [there|here]", "which files do you see [here|]", "<do>list the files", "<do>list all [my |the |]files", "<do>show [me |]the files", "what is in the [shared |]folder", "<noun>a list of [the|my|all] files", "which files and folders are there",
            "what can you read [here|]", "what files do I have [here|]", "are there any files [here|]", "<know>what is in this folder", "ls", "dir", "ls -l", "list files", "files", "<do>list my files", "<do>list everything in the [shared |]folder", "show files",
            "which files can you [read|see|open]", "<know>which files there are", "which files do we have [here|]", "is there anything in the folder", "<do>look into the [shared |]folder", "what do you see in the folder", "what is [here|there]", "what folders are [there|here]",
            "<noun>the names of [all |]the files", "what is in my folder", "<do>look what files are there", "<do>show me [all |]my files", "which documents do I have", "what documents are [there|here]",
        ],
        held: ["what files do you see", "list all the files and folders", "tell me which files we have", "what is in this folder", "show me what files I have", "I would like a list of what is in the folder", "can you see any files here"],
    }
    LIST_FOLDER {
        train: [
            "what files are in {folder}", "what is in the folder {folder}", "<do>list the folder {folder}", "<do>list {folder}", "<do>show [me |]the files in {folder}", "which files are there in [the folder |]{folder}", "<noun>a list of the files in {folder}",
            "what do you see in the folder {folder}", "<do>look into the folder {folder}", "what does the folder {folder} hold", "<do>open the folder {folder}", "ls {folder}", "dir {folder}", "<do>list all files in {folder}", "<know>which files are in the folder {folder}",
            "the folder {folder}: what is in it", "there is a folder called {folder}, what is in it", "what have I got in the folder {folder}", "are there any files in {folder}", "what is inside [the folder |]{folder}", "<do>list what is in {folder}", "in {folder}, what files are there",
            "which documents are in the folder {folder}", "<noun>the names of the files in {folder}", "what can I find in [the folder |]{folder}", "<do>show me what is in [the folder |]{folder}", "files in {folder}", "what files does {folder} have", "<do>list everything in {folder}",
            "in the folder {folder}, which files do you see", "<do>show the folder {folder}", "look what is in {folder}", "which files does the folder {folder} have",
        ],
        held: ["list all files in the folder {folder}", "what files do you see in {folder}", "tell me what is in the folder {folder}", "which files are in {folder}", "the folder {folder}, which files does it hold", "I need to see what files are in the folder {folder}"],
    }
    READ {
        train: [
            "what is in {file}", "what does {file} say", "<do>read {file}", "<do>read the file {file}", "<do>show me {file}", "<do>[show|give] me the file {file}", "<do>open {file}", "what is in the file {file}", "<do>print {file}", "<know>what is in {file}", "I want to see {file}",
            "what does the file {file} hold", "<do>read me {file}", "cat {file}", "{file}", "{file}, what is in it", "<noun>the content of {file}", "<noun>the text of {file}", "what have I written in {file}", "<do>open the file {file}", "<do>look into {file}", "there is a file {file}, what does it say",
            "what is inside {file}", "what stands in {file}", "<do>show what {file} says", "<do>read {file} [out |aloud |]to me", "let me see {file}", "<do>show the content of {file}", "<do>display {file}", "<do>look at {file} and tell me what it says", "in the file {file}, what is written [there|]",
            "I need what is in {file}", "read everything in {file}", "the file {file}: read it", "what did I put into {file}", "<do>tell me what {file} says", "more {file}", "what is written in {file}", "read out {file}", "the file I mean ({file}), what is in it", "my file ({file}): <do>read it", "read this file ({file})", "there is something I wrote ({file}), read it",
        ],
        held: ["what does the file {file} say", "can you show me {file}", "I want to see what is in {file}", "open the file {file} and read it", "tell me what the file {file} says", "I need the content of the file {file}", "let me see what is written in {file}"],
    }
    READ_FIRST {
        train: [
            "<do>read the first line of {file}", "<noun>the first line of {file}", "<do>show me only the first line of {file}", "what does {file} say in its first line", "the first line of {file}", "how does {file} begin", "what is the first line in {file}", "<do>read just the first line of {file}",
            "head of {file}", "how does the file {file} start", "<know>how {file} begins", "<do>give me line one of {file}", "what is on the first line of {file}", "in {file}, what is the first line", "{file}: the first line", "what comes first in {file}", "line 1 of {file}",
            "the beginning of {file}, one line only", "<do>read me the top line of {file}", "what is at the top of {file}",
        ],
        held: ["tell me the first line of the file {file}", "what does the first line of {file} say", "read only the first line of {file}", "how does the file {file} begin", "I need just the first line in {file}"],
    }
    READ_LINE {
        train: [
            "<do>read line {n} of {file}", "<noun>line {n} of {file}", "line {n} of {file}", "what does line {n} of {file} say", "what is [in|on] line {n} of {file}", "{file}, line {n}", "<do>show me only line {n} of {file}", "in {file}, what is on line {n}", "<do>print line {n} of {file}",
            "<know>what line {n} of {file} says", "<do>read just line {n} from {file}", "what stands on line {n} in {file}", "<noun>line number {n} of {file}",
        ],
        held: ["tell me what is on line {n} of {file}", "read only line {n} of {file}", "what does {file} say on line {n}", "I need line number {n} in {file}"],
    }
    READ_TOP {
        train: [
            "<do>read the first {n} lines of {file}", "<noun>the first {n} lines of {file}", "the first {n} lines of {file}", "<do>show me only the first {n} lines of {file}", "what do the first {n} lines of {file} say", "{file}, the first {n} lines", "<do>print {n} lines of {file}",
            "the top {n} lines of {file}", "in {file}, what are the first {n} lines", "head -{n} {file}", "<do>read {n} lines of {file}", "what is on the first {n} lines of {file}",
        ],
        held: ["tell me the first {n} lines of the file {file}", "what is in the first {n} lines of {file}", "read only the first {n} lines of {file}", "I need the top {n} lines of the file {file}"],
    }
    READ_LAST {
        train: [
            "<do>read the last line of {file}", "<noun>the last line of {file}", "the last line of {file}", "<do>show me only the last line of {file}", "what does {file} say in its last line", "how does {file} end", "what is the last line in {file}", "the end of {file}, one line only",
            "<know>how {file} ends", "what is on the last line of {file}", "what comes last in {file}", "in {file}, what is the last line", "{file}: the last line",
        ],
        held: ["tell me the last line of the file {file}", "what does the last line of {file} say", "read only the last line of {file}", "how does the file {file} end"],
    }
    ONE_AMOUNT {
        train: [
            "how much is the {key} in {file}", "what is the {key} in {file}", "<do>look up the {key} in {file}", "what does {file} say about the {key}", "in {file}, how much is the {key}", "<do>find the {key} in {file}", "<noun>the {key} from {file}", "how much do we pay for the {key}? It is in {file}",
            "{file} has a line for the {key}, what does it say", "what do I pay for {key} according to {file}", "according to {file}, how much is the {key}", "how much is {key} in {file}", "<know>how much the {key} in {file} is", "<noun>the number for {key} in {file}", "look into {file}: how much is the {key}",
            "{file}: {key}", "the {key} in {file}[, how much is it|]", "what number does {file} have for {key}", "<do>check {file} for the {key}", "in {file} there is the {key}, how much is it", "how much did the {key} cost? See {file}", "what is the amount for {key} in {file}", "<do>get the {key} out of {file}",
            "from {file} I need the {key}", "what does the {key} cost in {file}", "<noun>the price of the {key} in {file}", "how much does {file} say for {key}", "<do>read {file} and give me the {key}", "what amount is given for the {key} in {file}",
        ],
        held: ["how much is the {key}? Look in {file}", "what does {file} say the {key} is", "tell me how much the {key} in the file {file} is", "read {file} and tell me the {key}", "which number is given for the {key} in {file}", "look into {file} and find the {key}"],
    }
    ONE_TIME {
        train: [
            "when does {key} come? It is in {file}", "at what time is {key} in {file}", "<noun>the time for {key} in {file}", "<do>look up {key} in {file}", "what does {file} say about {key}", "<do>find the time for {key} in {file}", "in {file}, when is {key}", "when is {key} in {file}",
            "according to {file}, when does {key} come", "<know>when {key} is in {file}", "at what time does {key} come? See {file}", "what time is {key} in {file}", "what time does {file} have for {key}", "<noun>the time of {key} from {file}", "<do>check {file} for {key}", "{file}: when is {key}",
            "when do I meet {key}? It is in {file}", "from {file} I need the time for {key}", "{file} has a line for {key}, what does it say", "<do>read {file} and give me the time for {key}", "look into {file}: at what time is {key}", "which time is given for {key} in {file}",
        ],
        held: ["when is {key}? Look in {file}", "what time does {file} say for {key}", "read {file} and tell me the time for {key}", "look into {file} and find the time for {key}", "tell me at what time {key} comes, it is in {file}"],
    }
    PLACE {
        train: ["{path}", "{path}", "{path}", "{path}", "{name} in the folder {folder}", "{name} in {folder}", "{folder}/{name}", "{name} from {folder}", "{name} inside {folder}", "{name} (in the folder {folder})", "the file {name} in {folder}"],
        held: ["{name} from the folder {folder}", "{path}", "{path}"],
    }
}

/// How a request names the file.
pub fn place(world: &World, file: &File, draw: &mut Draw) -> String {
    if file.folder.is_empty() {
        return file.name.clone();
    }
    PLACE.text(world.side, &[("path", &file.path()), ("name", &file.name), ("folder", &file.folder)], draw)
}

/// A call that reads a file.
pub fn open(path: &str) -> Action {
    Action::call("read_file", &[("path", path.into())])
}

/// A call that lists a folder.
pub fn look(folder: Option<&str>) -> Action {
    match folder {
        Some(folder) => Action::call("list_files", &[("path", folder.into())]),
        None => Action::call("list_files", &[]),
    }
}

/// The answer that shows what a file holds.
pub fn show(path: &str, told: &str) -> Action {
    let lines = lines(told);
    Action::say(format!("{path} says:\n{}", lines.join("\n")), &lines)
}

/// The names in a listing: `plan.txt (12 bytes)` is `plan.txt`.
pub fn listed(told: &str) -> Vec<&str> {
    told.lines().map(|line| line.split_once(" (").map_or(line, |(name, _)| name)).collect()
}

/// A request to list a folder.
pub fn list(world: &World, draw: &mut Draw) -> Task {
    let (request, folder) = if draw.chance(40) {
        (LIST_ALL.request(world.side, &[], draw), None)
    } else {
        let folder = draw.pick(&world.folders);
        (LIST_FOLDER.request(world.side, &[("folder", folder)], draw), Some(folder.as_str()))
    };
    Task::single(request, look(folder), |told| {
        let names = listed(told);
        Action::say(format!("There are: {}.", names.join(", ")), &names)
    })
}

/// A call that reads some lines of a file.
fn open_lines(path: &str, first: u64, count: u64) -> Action {
    let arguments = [("path", path.into()), ("start_line", first.into()), ("lines", count.into())];
    Action::call("read_file", &arguments)
}

/// The lines of a file as the tool tells them, without its own remarks.
fn lines(told: &str) -> Vec<&str> {
    told.lines().filter(|line| !line.starts_with('[') && !line.is_empty()).collect()
}

/// A request to read a file, or one line of it.
pub fn read(world: &World, draw: &mut Draw) -> Option<Task> {
    let file = world.file(draw, |_| true)?;
    let (path, place) = (file.path(), place(world, file, draw));
    if draw.chance(40) {
        let request = READ.request(world.side, &[("file", &place)], draw);
        return Some(Task::single(request, open(&path.clone()), move |told| show(&path, told)));
    }
    if draw.chance(40) {
        return Some(some_lines(world, file, &place, draw));
    }
    let form = match file.content.sort {
        Sort::Account => &ONE_AMOUNT,
        Sort::Times => &ONE_TIME,
        Sort::Items => return Some(some_lines(world, file, &place, draw)),
    };
    let Entry { key, value, .. } = draw.pick(&file.content.entries).clone();
    let request = form.request(world.side, &[("file", &place), ("key", &key)], draw);
    let answer = Action::say(format!("{key}: {value}"), &[value]);
    Some(Task::single(request, open(&path), move |_| answer.clone()))
}

/// A request for the first line of a file, the last one, the first ones, or one by its number.
fn some_lines(world: &World, file: &File, place: &str, draw: &mut Draw) -> Task {
    let (path, count) = (file.path(), file.content.lines().len() as u64);
    let n = draw.range(2, count.max(2));
    let number = n.to_string();
    let slots: &Slots = &[("file", place), ("n", &number)];
    let one = |which: String| {
        move |told: &str| match lines(told).first() {
            Some(line) => Action::say(format!("{which} is: {line}"), &[*line]),
            None => Action::say("There is no such line.", &["no such line"]),
        }
    };
    match draw.below(4) {
        0 => {
            let request = READ_FIRST.request(world.side, slots, draw);
            Task::single(request, open_lines(&file.path(), 1, 1), one("The first line".to_string()))
        }
        1 => {
            let request = READ_LINE.request(world.side, slots, draw);
            Task::single(request, open_lines(&file.path(), n, 1), one(format!("Line {n}")))
        }
        2 => {
            let request = READ_TOP.request(world.side, slots, draw);
            Task::single(request, open_lines(&path, 1, n), move |told| {
                let lines = lines(told);
                Action::say(format!("The first {n} lines are:\n{}", lines.join("\n")), &lines)
            })
        }
        _ => {
            let request = READ_LAST.request(world.side, slots, draw);
            Task::single(request, open(&path), |told| {
                let line = lines(told).last().copied().unwrap_or_default();
                Action::say(format!("The last line is: {line}"), &[line])
            })
        }
    }
}

/// A request for a file or a folder that is not there.
pub fn missing(world: &World, draw: &mut Draw) -> Task {
    if draw.chance(25) {
        let mut name = names::folder(draw, world.side);
        while world.folders.contains(&name) {
            name.insert(0, 'x');
        }
        let request = LIST_FOLDER.request(world.side, &[("folder", &name)], draw);
        let answer = Action::say(format!("There is no folder {name}."), &["no", &name]);
        return Task::single(request, look(Some(&name)), move |_| answer.clone());
    }
    let mut name = names::file(draw, world.side);
    while world.files.iter().any(|file| file.name == name) {
        name.insert(0, 'x');
    }
    let request = READ.request(world.side, &[("file", &name)], draw);
    let answer = Action::say(format!("There is no {name} in the folder."), &["no", &name]);
    Task::single(request, open(&name), move |_| answer.clone())
}
