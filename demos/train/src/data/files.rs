//! Requests for files and folders.

use crate::data::grammar::forms;
use crate::data::world::{Content, File, World};
use crate::data::{Action, Task, names};
use crate::draw::Draw;

forms! {
    LIST_ALL {
        train: [
            "what files are there", "which files do you see", "list the files", "list all files", "show me the files", "what is in the folder", "[give|show] me a list of the files",
            "which files and folders are there", "what can you read", "what files do I have", "are there any files", "tell me what is in this folder", "ls", "dir",
        ],
        held: ["what files do you see", "list all the files and folders", "tell me which files are there", "what is in this folder", "show me what files I have"],
    }
    LIST_FOLDER {
        train: [
            "what files are in {folder}", "what is in the folder {folder}", "list the folder {folder}", "list {folder}", "show me the files in {folder}", "which files are there in {folder}",
            "[give|show] me a list of the files in {folder}", "what do you see in the folder {folder}", "look into the folder {folder}", "what does the folder {folder} hold", "open the folder {folder}",
        ],
        held: ["list all files in the folder {folder}", "what files do you see in {folder}", "tell me what is in the folder {folder}", "which files are in {folder}"],
    }
    READ {
        train: [
            "what is in {file}", "what does {file} say", "read {file}", "read the file {file}", "show me {file}", "[show|give] me the file {file}", "open {file}", "what is in the file {file}",
            "can you read {file}", "print {file}", "tell me what is in {file}", "I want to see {file}", "what does the file {file} hold", "read me {file}", "cat {file}",
        ],
        held: ["what does the file {file} say", "can you show me {file}", "I want to see what is in {file}", "open the file {file} and read it", "tell me what the file {file} says"],
    }
    READ_FIRST {
        train: [
            "read the first line of {file}", "what is the first line of {file}", "show me only the first line of {file}", "what does {file} say in its first line", "the first line of {file}",
            "how does {file} begin",
        ],
        held: ["tell me the first line of {file}", "what does the first line of {file} say", "read only the first line of {file}"],
    }
    ONE_AMOUNT {
        train: [
            "how much is the {key} in {file}", "what is the {key} in {file}", "look up the {key} in {file}", "what does {file} say about the {key}", "in {file}, how much is the {key}",
            "find the {key} in {file}", "tell me the {key} from {file}", "how much do we pay for the {key}? It is in {file}", "{file} has a line for the {key}, what does it say",
        ],
        held: ["how much is the {key}? Look in {file}", "what does {file} say the {key} is", "tell me how much the {key} in {file} is", "read {file} and tell me the {key}"],
    }
    ONE_TIME {
        train: [
            "when does {key} come? It is in {file}", "at what time is {key} in {file}", "what is the time for {key} in {file}", "look up {key} in {file}", "what does {file} say about {key}",
            "find the time for {key} in {file}", "in {file}, when is {key}",
        ],
        held: ["when is {key}? Look in {file}", "what time does {file} say for {key}", "read {file} and tell me the time for {key}"],
    }
    PLACE {
        train: ["{path}", "{path}", "{path}", "{name} in the folder {folder}", "{name} in {folder}", "{folder}/{name}"],
        held: ["{name} from the folder {folder}", "{path}"],
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
    let lines: Vec<&str> = told.lines().filter(|line| !line.starts_with('[')).collect();
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

/// A request to read a file, or one line of it.
pub fn read(world: &World, draw: &mut Draw) -> Option<Task> {
    let file = world.file(draw, |_| true)?;
    let (path, place) = (file.path(), place(world, file, draw));
    if draw.chance(50) {
        let request = READ.request(world.side, &[("file", &place)], draw);
        return Some(Task::single(request, open(&path.clone()), move |told| show(&path, told)));
    }
    let (form, key) = match &file.content {
        Content::Account(lines) => (&ONE_AMOUNT, draw.pick(lines).0.clone()),
        Content::Times(lines) => (&ONE_TIME, draw.pick(lines).0.clone()),
        Content::Items(_) => {
            let request = READ_FIRST.request(world.side, &[("file", &place)], draw);
            let first = Action::call(
                "read_file",
                &[("path", path.as_str().into()), ("start_line", 1.into()), ("lines", 1.into())],
            );
            return Some(Task::single(request, first, move |told| {
                let line = told.lines().next().unwrap_or_default();
                Action::say(format!("The first line is: {line}"), &[line])
            }));
        }
    };
    let request = form.request(world.side, &[("file", &place), ("key", &key)], draw);
    Some(Task::single(request, open(&path), move |told| {
        let value = value(told, &key);
        Action::say(format!("{key}: {value}"), &[value])
    }))
}

/// What a line says after `key` and a colon.
pub fn value<'a>(told: &'a str, key: &str) -> &'a str {
    told.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": ")).unwrap_or_default()
}

/// A request for a file that is not there.
pub fn missing(world: &World, draw: &mut Draw) -> Task {
    let mut name = names::file(draw, world.side);
    while world.files.iter().any(|file| file.name == name) {
        name.insert(0, 'x');
    }
    let request = READ.request(world.side, &[("file", &name)], draw);
    let answer = Action::say(format!("There is no {name} in the folder."), &["no", &name]);
    Task::single(request, open(&name), move |_| answer.clone())
}
