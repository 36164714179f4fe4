//! Requests that take two tools, the second one with what the first one said.

use crate::data::calculator::{self, compute, result};
use crate::data::content::{Entry, Sort};
use crate::data::grammar::{Slots, forms};
use crate::data::world::{File, World};
use crate::data::{Action, Side, Task, clock, files, names, notes};
use crate::draw::Draw;

forms! {
    TOTAL {
        train: [
            "<do>add up all [the |]numbers in {file}", "what is the total of {file}", "how much is everything in {file} together", "<do>sum up {file}", "what do all the lines of {file} make together", "<do>read {file} and give me the total", "<noun>the sum of all numbers in {file}", "<do>add up {file}",
            "<do>compute the total of the amounts in {file}", "<noun>the total of {file}", "<noun>the sum of {file}", "<do>total {file}", "<do>[sum|total] up everything in {file}", "how much is {file} in all", "<do>add all the [amounts|lines|numbers] in {file} [together|]", "in {file}, what is the total", "what do I pay for everything in {file}",
            "{file}: what is the sum", "<know>how much {file} comes to", "what does {file} add up to", "<do>open {file} and add up the numbers", "<do>look at {file} and tell me the sum", "<do>calculate the total of all lines in {file}", "the numbers in {file}, what do they make", "how much do the numbers in {file} add up to",
            "all of {file} together, how much is that", "<do>take all the numbers from {file} and add them", "sum of {file}", "total of {file}", "I need the sum of all amounts in {file}", "how much did we spend according to {file}", "<do>work out the sum of the lines in {file}", "what is the whole of {file}", "<do>read {file} and sum it up",
            "what is the total amount in {file}", "<do>find the total of the numbers in {file}",
        ],
        held: ["read {file} and add up all the numbers", "what is the sum of all the numbers in {file}", "tell me the total of all lines in {file}", "how much do all the amounts in {file} make", "look at {file} and add all the lines", "I need the total of all the numbers in the file {file}"],
    }
    TWO_LINES {
        train: [
            "<do>add the {one} and the {two} in {file}", "how much are the {one} and the {two} in {file} together", "what is {one} plus {two} in {file}", "<do>read {file} and add the {one} to the {two}", "<noun>the sum of the {one} and the {two} from {file}", "in {file}, what do the {one} and the {two} make together", "{file}: the {one} plus the {two}",
            "<noun>the total of {one} and {two} in {file}", "how much is {one} and {two} together? See {file}", "what do I pay for the {one} and the {two} in {file}", "from {file}, <do>add {one} and {two}", "<do>look into {file} and add up the {one} and the {two}", "according to {file}, how much are {one} and {two} together",
            "the {one} and the {two} in {file}, how much in all", "<know>what {one} and {two} in {file} make", "<do>open {file} and sum the {one} and the {two}", "in {file} there are the {one} and the {two}, add them", "<do>take the {one} from {file} and add the {two}", "sum of {one} and {two} in {file}", "what do {one} and {two} cost together in {file}",
            "<do>calculate {one} plus {two} from {file}", "how much is the {one} plus the {two} in {file}", "<do>put together the {one} and the {two} from {file}", "{one} + {two} in {file}",
        ],
        held: ["what do the {one} and the {two} in {file} make together", "read {file} and tell me the {one} plus the {two}", "add up the {one} and the {two} from {file}", "look into {file}: how much are the {one} and the {two} in all", "I need the sum of {one} and {two}, they are in {file}"],
    }
    APART {
        train: [
            "how much more is the {one} than the {two} in {file}", "<noun>the {one} minus the {two} in {file}", "in {file}, how much is the {one} without the {two}", "{file}: the {one} less the {two}", "in {file}, how much more is {one} than {two}", "according to {file}, how much more is the {one} than the {two}",
            "<noun>the difference between the {one} and the {two} in {file}", "by how much is the {one} in {file} more than the {two}", "<do>look into {file} and subtract: {one} minus {two}", "how much higher is the {one} than the {two}? See {file}", "what is {one} minus {two} in {file}", "{one} - {two} in {file}",
            "<do>read {file} and compute the {one} minus the {two}", "<know>how much more the {one} is than the {two} in {file}", "<do>calculate {one} less {two} from {file}", "what is left of the {one} in {file} without the {two}", "<do>open {file} and tell me the {one} minus the {two}", "the {one} and the {two} in {file}, what is the difference",
        ],
        held: ["read {file} and tell me how much more the {one} is than the {two}", "in {file}, what is the {one} minus the {two}", "what is the difference of {one} and {two} in {file}", "look into {file} and find how much more the {one} is than the {two}"],
    }
    APART_FROM {
        train: [
            "<do>subtract the {two} from the {one} in {file}", "<do>read {file} and take the {two} away from the {one}", "<do>take the {two} off the {one} in {file}", "in {file}, take the {two} [away |]from the {one}", "<do>deduct the {two} from the {one} in {file}", "{file}: subtract {two} from {one}",
            "if I take the {two} from the {one} in {file}, what is left", "from the {one} in {file} [take away|subtract] the {two}", "how much is left of the {one} in {file} when the {two} is taken away",
        ],
        held: ["take the {two} from the {one} in {file}", "read {file} and subtract the {two} from the {one}", "what is left when I take the {two} in {file} from the {one}", "in {file}, subtract the {two} from the {one}"],
    }
    SCALED {
        train: [
            "<do>multiply the {one} in {file} by {n}", "what is {n} times the {one} in {file}", "how much is the {one} in {file} for {n} [months|days|people|weeks]", "<do>read {file} and multiply the {one} by {n}", "in {file} there is the {one}, how much is it times {n}", "{n} times the {one} from {file}, how much is that",
            "<do>compute the {one} in {file} times {n}", "<noun>{n} times the {one} in {file}", "what do I pay for the {one} in {file} in {n} [months|days|weeks|years]", "<do>look into {file} and multiply the {one} by {n}", "the {one} from {file} times {n}", "{file}: {n} times the {one}", "how much do {n} of the {one} in {file} cost",
            "<know>how much {n} times the {one} in {file} is", "the {one} in {file}, {n} times", "according to {file}, what is {n} times the {one}", "<do>open {file} and take the {one} times {n}", "if I pay the {one} in {file} {n} times, how much is it", "<do>calculate {n} times the {one} from {file}", "{one} in {file} * {n}", "what is the {one} in {file} multiplied by {n}",
        ],
        held: ["how much is {n} times the {one} in {file}", "read {file} and tell me the {one} times {n}", "take the {one} from {file} and multiply it by {n}", "look into {file}: what is the {one} times {n}", "what do I get when I multiply the {one} in {file} by {n}"],
    }
    SHARE {
        train: [
            "what is {n}[%| percent] of the {one} in {file}", "how much is {n}[ percent|%] of the {one} in {file}", "<do>read {file} and take {n}[%| percent] of the {one}", "<do>compute {n}[%| percent] of the {one} from {file}", "in {file}, what is {n} percent of the {one}", "<noun>{n}[%| percent] of the {one} in {file}",
            "<do>look into {file} and take {n}[%| percent] of the {one}", "{n}[%| percent] of the {one} in {file}", "according to {file}, how much is {n}[%| percent] of the {one}", "{file}: {n}[%| percent] of {one}", "I get {n}[%| percent] of the {one} in {file}, how much is that", "<know>how much {n}[%| percent] of the {one} in {file} is",
            "<do>open {file} and calculate {n}[%| percent] of the {one}", "of the {one} in {file}, what is {n}[%| percent]", "the {one} from {file}, how much is {n} percent of it", "a tip of {n}[%| percent] on the {one} in {file}, how much is it",
        ],
        held: ["how much is {n}% of the {one} from {file}", "read {file} and tell me {n} percent of the {one}", "look into {file}: how much is {n}% of the {one}", "of the {one} in {file}, how much is {n} percent"],
    }
    PARTED {
        train: [
            "<do>divide the {one} in {file} by {n}", "<do>split the {one} in {file} [among|between] {n} people", "what is the {one} in {file} divided by {n}", "<do>read {file} and divide the {one} by {n}", "we are {n} and share the {one} in {file}, how much does each pay", "the {one} from {file} divided by {n}", "{file}: the {one} over {n}",
            "how much is the {one} in {file} for each of {n} people", "<do>look into {file} and split the {one} into {n} parts", "<noun>the {one} in {file} divided by {n}",
        ],
        held: ["how much is the {one} in {file} divided by {n}", "read {file} and tell me the {one} divided by {n}", "take the {one} from {file} and divide it by {n}", "we are {n} people and share the {one} in {file}, how much is each"],
    }
    ONLY_FILE {
        train: [
            "<do>read the file in [the folder |]{folder}", "what does the only file in {folder} say", "<do>open the file in {folder}", "there is one file in {folder}, what is in it", "<do>look into {folder} and read the file there", "<do>find the file in the folder {folder} and read it", "<do>show me what the file in {folder} says", "<do>read whatever is in {folder}",
            "what is in the file in {folder}", "what is written in the file in [the folder |]{folder}", "<do>read the only file in [the folder |]{folder}", "in {folder} there is a file, what does it say", "<do>look what file is in {folder} and read it", "<do>list {folder} and read the file in it", "the folder {folder} has one file, read it", "<do>open the folder {folder} and read the file",
            "{folder} holds one file. What does it say", "I have a file in {folder}, what is in it", "<noun>the content of the file in {folder}", "<do>read the one file that is in {folder}", "<know>what the file in {folder} says", "what does the file in the folder {folder} say", "there is just one file in {folder}, show it", "<do>find out what file is in {folder}, then read it",
            "<do>list the folder {folder}, then read its file", "I do not know what the file in {folder} is called, read it", "<do>print the file in {folder}", "in the folder {folder} is a file, read it to me",
        ],
        held: ["there is a file in the folder {folder}, read it", "what does the file in {folder} say", "look into the folder {folder} and show me the file there", "find the only file in {folder} and read it to me", "list {folder} and tell me what the file there says"],
    }
    ONLY_ENDING {
        train: [
            "<do>read the {ending} file", "what does the {ending} file say", "<do>open the only {ending} file", "there is one {ending} file, what is in it", "<do>find the {ending} file and read it", "<do>show me the {ending} file here", "<do>look for the {ending} file and read it to me", "what is in the {ending} file", "<do>open the {ending} file",
            "which file ends in .{ending}? Read it", "<do>read the file that ends in {ending}", "<do>read the file with the ending .{ending}", "<do>list the files and read the {ending} file", "I have one {ending} file, read it", "what is written in the {ending} file", "the {ending} file, what does it say", "<noun>the content of the {ending} file",
            "one of the files is a {ending} file, what is in it", "<do>print the {ending} file", "<know>what is in the {ending} file", "<do>look which file is a {ending} file and read it", "<do>read me the only {ending} file", "what does the only .{ending} file say", "here is a {ending} file, read it", "<do>find the one file that ends in .{ending} and read it",
        ],
        held: ["there is a {ending} file, read it", "find the {ending} file and show me what is in it", "what does the only {ending} file say", "look for the only {ending} file and read it", "one file here ends in .{ending}, what does it say"],
    }
    SMALLEST {
        train: [
            "<do>list my files and read the [shortest|smallest] one", "<do>read the [shortest|smallest] file", "what is in the [shortest|smallest] file", "<do>find the [shortest|smallest] file and read it", "which file is the [shortest|smallest], and what does it say", "<do>open the [shortest|smallest] file", "what does the [shortest|smallest] file say",
            "<do>look which file is the [shortest|smallest] and read it", "<do>list the files and open the [shortest|smallest]", "<do>show me the [shortest|smallest] file", "the file with the fewest bytes, what does it say",
        ],
        held: ["list the files and read the shortest one", "find the smallest file and show me what is in it", "read me the shortest of my files", "what does the file with the fewest bytes say"],
    }
    LARGEST {
        train: [
            "<do>list my files and read the [longest|largest|biggest] one", "<do>read the [longest|largest|biggest] file", "what is in the [longest|largest|biggest] file", "<do>find the [longest|largest|biggest] file and read it", "which file is the [longest|largest], and what does it say", "<do>open the [longest|largest] file",
            "what does the [longest|largest|biggest] file say", "<do>look which file is the [longest|largest] and read it", "<do>show me the [longest|biggest] file", "the file with the most bytes, what does it say",
        ],
        held: ["list the files and read the longest one", "find the largest file and show me what is in it", "read me the longest of my files", "what does the file with the most bytes say"],
    }
    NOTE_LINE {
        train: [
            "<do>read {file} and note the {key}", "<do>look up the {key} in {file} and make a note of it", "<do>add the {key} from {file} to my notes", "<do>find the {key} in {file} and write it down", "<do>note down the {key} from {file}", "<do>save the {key} in {file} as a note", "<do>put the {key} from {file} into my notes", "<do>note the {key} that is in {file}",
            "from {file}, note the {key}", "<do>open {file} and save the {key} as a note", "what is the {key} in {file}? Note it", "what is the {key} in {file}? Write it down", "<do>look into {file} and write down the {key}", "<do>take the {key} from {file} and make a note", "I need a note of the {key} in {file}", "<do>copy the {key} from {file} into my notes",
            "<do>get the {key} out of {file} and note it", "<do>read {file} and add the {key} to my notes", "{file} has the {key}, note it", "<do>check {file} for the {key} and note it down", "<do>write the {key} of {file} into my notes", "new note with the {key} from {file}", "<do>keep the {key} from {file} in my notes", "<do>make a note with the {key} from {file}",
        ],
        held: ["read {file} and write down the {key}", "find the {key} in {file} and save it as a note", "make a note of the {key} in {file}", "look into {file} and add the {key} to my notes", "open {file} and note down the {key}"],
    }
    DELETE_ABOUT {
        train: [
            "<do>delete [my|the] note about {word}", "<do>remove the note about {word}", "<do>find the note about {word} and delete it", "I do not need the note about {word} any more", "the note about {word} can go", "<do>throw away what I noted about {word}", "<do>erase the note about {word}", "<do>search my notes for {word} and delete what you find",
            "<do>delete the note that says {word}", "<do>look for the note about {word} and remove it", "<do>get rid of [my|the] note about {word}", "<do>forget the note about {word}", "the note about {word} is done, delete it", "I am done with {word}, delete the note", "<do>delete the note with {word} in it", "<do>remove my note on {word}", "delete note about {word}",
            "<do>find what I noted about {word} and throw it away", "<do>search for the note on {word} and delete it", "<do>drop the note about {word}", "the note about {word} is old, remove it", "<do>take the note about {word} off my list", "my note about {word} is not needed any more", "<do>clear the note about {word}", "<do>cross out the note about {word}",
            "there is a note about {word}, delete it", "<do>look up the note about {word} and erase it", "what I noted about {word} can be deleted", "<do>throw out my note about {word}", "<do>delete the note where I wrote about {word}",
            "[my|the] note [about|on] {word} is [done|not needed], it can go", "[my|the] note [about|on] {word} is [old|of no use now], [you can delete it|throw it away|get rid of it|away with it]", "the old note about {word} can be [deleted|removed|thrown away]", "I have no use for [my|the] note [about|on] {word}", "[my|the] note about {word} has to go",
            "{word} is done, [so |]delete [my|the] note about it", "[my|the] note that says {word} [can go|is old, delete it|is not needed any more]", "I need no note about {word} [now|any more], [remove|delete|drop] it", "<do>find and delete the note about {word}", "of my notes, delete the one about {word}", "the one about {word} can go, it is a note", "is there a note about {word}? Delete it",
        ],
        held: ["find my note about {word} and remove it", "please throw away the note about {word}", "delete what I noted about {word}", "search for the note about {word} and erase it", "my note about {word} is old, it can go", "I do not need my note on {word} any more"],
    }
    DATED {
        train: [
            "<do>make a note with today's date: {text}", "note with the date: {text}", "<do>write this down with today's date: {text}", "<do>add a note with the current date: {text}", "<do>look up the date and note: {text}", "<do>save this with the date of today: {text}", "new note with today's date in it: {text}", "<do>note with today's date: {text}",
            "<do>put the date and this into my notes: {text}", "a note with the date of today: {text}", "<do>check the date and write down: {text}", "<do>note down today's date and this: {text}", "a dated note: {text}", "<do>make a dated note: {text}", "with today's date, note: {text}", "<do>take a note with date: {text}", "for my notes, with the date: {text}",
            "<do>save a note with today's date: {text}", "<do>find out the date and save it with this: {text}", "note this and put today's date before it: {text}", "<do>add the current date and this to my notes: {text}",
        ],
        held: ["add a note with today's date: {text}", "write down with the current date: {text}", "save this note with the date: {text}", "look up today's date and write down: {text}", "I need a dated note: {text}"],
    }
    NOTE_TIMES {
        train: [
            "<do>multiply the number in my note about {word} by {n}", "<do>take the number in the note about {word} times {n}", "<do>look up my note about {word} and multiply its number by {n}", "my note about {word} has a number, what is it times {n}", "<do>find the note about {word} and multiply what it says by {n}", "what is {n} times the number in my note about {word}",
            "<noun>{n} times the number in my note about {word}", "the number in my note about {word}, times {n}", "<do>search my notes for {word} and multiply the number by {n}", "<know>how much {n} times the number in my note about {word} is", "there is a number in my note about {word}. Multiply it by {n}", "<do>read the note about {word} and take its number times {n}",
            "in my note about {word} is a number, how much is it times {n}", "what do I get when I multiply the number in the note about {word} by {n}", "<do>get the number from my note about {word} and multiply it by {n}", "{n} times what my note about {word} says", "how much is {n} times the number in the note about {word}",
        ],
        held: ["find my note about {word} and take its number times {n}", "how much is the number in my note about {word} times {n}", "my note about {word} says a number, multiply it by {n}", "search for my note about {word} and multiply its number by {n}", "look up the number in the note about {word} and take it times {n}"],
    }
    NOTE_PLUS {
        train: [
            "<do>add {n} to the number in my note about {word}", "what is the number in my note about {word} plus {n}", "<do>find the note about {word} and add {n} to its number", "my note about {word} has a number, what is it plus {n}", "<do>look up my note about {word} and add {n} to the number", "the number in my note about {word}, plus {n}",
            "how much is the number in my note about {word} and {n} together", "<do>take the number from the note about {word} and add {n}", "<do>search my notes for {word} and add {n} to the number", "<noun>the number in my note about {word} plus {n}",
        ],
        held: ["find my note about {word} and add {n} to its number", "how much is the number in my note about {word} plus {n}", "my note about {word} says a number, add {n} to it", "take the number in my note about {word} and add {n}"],
    }
    NOTE_MINUS {
        train: [
            "<do>subtract {n} from the number in my note about {word}", "what is the number in my note about {word} minus {n}", "<do>find the note about {word} and subtract {n} from its number", "my note about {word} has a number, what is it minus {n}", "<do>look up my note about {word} and take {n} away from the number",
            "the number in my note about {word}, minus {n}", "how much is the number in my note about {word} less {n}", "<do>take the number from the note about {word} and subtract {n}", "<noun>the number in my note about {word} minus {n}",
        ],
        held: ["find my note about {word} and take {n} from its number", "how much is the number in my note about {word} minus {n}", "my note about {word} says a number, subtract {n} from it", "take the number in my note about {word} less {n}"],
    }
    NOTE_RESULT {
        train: [
            "<do>compute {x} and note the result", "<do>work out {x} and save the result as a note", "what is {x}? Write the result down", "<do>calculate {x} and make a note of it", "<do>add the result of {x} to my notes", "<do>note down what {x} is", "<do>figure out {x} and put it into my notes", "<do>save the result of {x} as a note",
            "what is {x}? Note it", "how much is {x}? Make a note of it", "<do>calculate {x}, then note it [down|]", "<do>write down the result of {x}", "<do>evaluate {x} and note the result", "note the result of {x}", "<do>put the result of {x} into my notes", "<do>make a note of what {x} is", "I need a note of the result of {x}", "<do>solve {x} and write the result into my notes",
            "<do>compute {x} and keep it in my notes", "{x}, and note the result", "{x}: write down what it is", "new note with the result of {x}", "<do>find out how much {x} is and note it",
        ],
        held: ["calculate {x} and save the result as a note", "work out {x} and write it down", "compute {x} and add the result to my notes", "how much is {x}? Note the result", "make a note with the result of {x}"],
    }
}

/// Read a file, then compute.
pub fn read_compute(world: &World, draw: &mut Draw) -> Option<Task> {
    let file = world.file(draw, |file| file.content.sort == Sort::Account)?;
    let mut keys: Vec<String> = file.content.entries.iter().map(|entry| entry.key.clone()).collect();
    draw.shuffle(&mut keys);
    keys.truncate(2);
    let (path, place) = (file.path(), files::place(world, file, draw));
    let n = names::figure(draw, world.side, 3).to_string();
    // What a number beside the amounts is to a total is for nobody to say.
    let totals = if file.content.plain { 0 } else { 2 };
    let what = [0, 0, 1, 1, 2, 3, 4, 5, 6][totals + draw.below(9 - totals)];
    let form = [&TOTAL, &TWO_LINES, &APART, &APART_FROM, &SCALED, &SHARE, &PARTED][what];
    let slots: &Slots = &[("file", place.as_str()), ("one", &keys[0]), ("two", &keys[1]), ("n", &n)];
    let request = form.request(world.side, slots, draw);
    let values = file.content.values(if what == 0 { &[] } else { &keys });
    let one = &values[0];
    let expression = match what {
        0 | 1 => values.join(" + "),
        2 | 3 => values.join(" - "),
        4 => format!("{one} * {n}"),
        6 => format!("{one} / {n}"),
        _ => format!("{n} * {one} / 100"),
    };
    let second = match what {
        0 => compute(&expression),
        _ => {
            let used = if what <= 3 { 2 } else { 1 };
            let found: Vec<String> = keys.iter().zip(&values).map(|(key, value)| format!("{key}: {value}")).collect();
            compute(&expression).after(format!("{}.", found[..used].join(", ")))
        }
    };
    Some(Task::double(request, files::open(&path), move |_| second.clone(), result))
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
    let bytes = |file: &File| file.content.lines().iter().map(|line| line.len() + 1).sum::<usize>();
    let mut sizes: Vec<usize> = here.iter().map(|file| bytes(file)).collect();
    sizes.sort();
    // Sizes that tell at a glance which file is meant: a quarter apart.
    let clear = |small: Option<&usize>, large: Option<&usize>| small.zip(large).is_some_and(|(s, l)| 5 * s <= 4 * l);
    match draw.below(12) {
        0..=4 | 10 if !single.is_empty() => {
            let folder = *draw.pick(&single);
            let request = ONLY_FILE.request(world.side, &[("folder", folder)], draw);
            Some(find_read(request, Some(folder.clone()), Which::Only))
        }
        0..=7 | 11 if !endings.is_empty() => {
            let ending = draw.pick(&endings).to_string();
            let request = ONLY_ENDING.request(world.side, &[("ending", &ending)], draw);
            Some(find_read(request, None, Which::Ending(format!(".{ending}"))))
        }
        8 if clear(sizes.first(), sizes.get(1)) => {
            Some(find_read(SMALLEST.request(world.side, &[], draw), None, Which::Smallest))
        }
        9 if clear(sizes.iter().nth_back(1), sizes.last()) => {
            Some(find_read(LARGEST.request(world.side, &[], draw), None, Which::Largest))
        }
        _ => None,
    }
}

/// Which file of a folder is meant.
#[derive(Clone)]
enum Which {
    Only,
    Ending(String),
    Smallest,
    Largest,
}

impl Which {
    /// Its name, out of names and bytes, and what is said on the way to it: file after file up to the one that fits.
    fn find(&self, files: &[(&str, u64)]) -> (String, Option<String>) {
        let name = |file: Option<&(&str, u64)>| file.map_or_else(String::new, |(name, _)| name.to_string());
        let sizes = || files.iter().map(|(name, bytes)| format!("{name}: {bytes}")).collect::<Vec<_>>().join(", ");
        match self {
            Which::Only => (name(files.first()), None),
            Which::Ending(ending) => {
                let at = files.iter().position(|(name, _)| name.ends_with(ending)).unwrap_or_default();
                let passed = files[..at].iter().map(|(name, _)| format!("{name}: no. ")).collect::<String>();
                let found = name(files.get(at));
                // Behind a letter the ending is cut into the same tokens as in a name: to be equal is to be the same.
                (found.clone(), Some(format!("A name like x{ending}? {passed}{found}: yes.")))
            }
            Which::Smallest => {
                let found = name(files.iter().min_by_key(|(_, bytes)| *bytes));
                (found.clone(), Some(format!("{}. The shortest is {found}.", sizes())))
            }
            Which::Largest => {
                let found = name(files.iter().max_by_key(|(_, bytes)| *bytes));
                (found.clone(), Some(format!("{}. The longest is {found}.", sizes())))
            }
        }
    }
}

/// The task that lists `folder` and reads the file in it that is meant.
fn find_read(request: String, folder: Option<String>, which: Which) -> Task {
    let place = folder.clone();
    let found = move |told: &str| {
        let sized = |line: &'_ str| -> Option<(usize, u64)> {
            let (name, size) = line.split_once(" (")?;
            Some((name.len(), size.strip_suffix(" bytes)")?.parse().ok()?))
        };
        let files: Vec<(&str, u64)> =
            told.lines().filter_map(|line| sized(line).map(|(end, bytes)| (&line[..end], bytes))).collect();
        let (name, said) = which.find(&files);
        (place.as_ref().map_or_else(|| name.clone(), |folder| format!("{folder}/{name}")), said)
    };
    let second = {
        let found = found.clone();
        move |told: &str| match found(told) {
            (path, Some(said)) => files::open(&path).after(said),
            (path, None) => files::open(&path),
        }
    };
    let answer = move |results: &[String]| match results {
        [listing, content] => files::show(&found(listing).0, content),
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
    let file = world.file(draw, |file| file.content.sort != Sort::Items)?;
    let Entry { key, value, .. } = draw.pick(&file.content.entries).clone();
    let asked = if file.content.sort == Sort::Times { format!("time for {key}") } else { key.clone() };
    let place = files::place(world, file, draw);
    let request = NOTE_LINE.request(world.side, &[("file", &place), ("key", &asked)], draw);
    let second = Action::Call(notes::add(&format!("{key}: {value}")));
    Some(Task::double(request, files::open(&file.path()), move |_| second.clone(), notes::saved))
}

/// Find a note, then delete it.
pub fn search_delete(side: Side, all: &[(u64, String)], draw: &mut Draw) -> Option<Task> {
    let (id, _, word) = notes::telling(all, draw, |_| true)?;
    let request = DELETE_ABOUT.request(side, &[("word", &word)], draw);
    let second = |told: &str| notes::delete(notes::listed(told).first().map_or(0, |(id, _)| *id));
    Some(Task::double(request, notes::search(&word), second, move |_| notes::deleted(id)))
}

/// Ask the clock, then note something with the date.
pub fn date_note(side: Side, draw: &mut Draw) -> Task {
    let text = notes::text(side, draw);
    let request = DATED.request(side, &[("text", &text)], draw);
    let second = move |told: &str| Action::Call(notes::add(&format!("{}: {text}", clock::parts(told)[1])));
    Task::double(request, clock::ask(None), second, notes::saved)
}

/// The number that a note holds as a word, if it is the only one.
fn number(text: &str) -> Option<&str> {
    let mut numbers = text.split(' ').filter(|word| word.bytes().all(|b| b.is_ascii_digit()));
    let number = numbers.next()?;
    let others = text.bytes().filter(u8::is_ascii_digit).count() - number.len();
    (others == 0).then_some(number)
}

/// Find a note, then compute with its number.
pub fn note_compute(side: Side, all: &[(u64, String)], draw: &mut Draw) -> Option<Task> {
    let (.., word) = notes::telling(all, draw, |text| number(text).is_some())?;
    let n = names::figure(draw, side, 3).to_string();
    let (form, sign) = *draw.pick(&[(&NOTE_TIMES, "*"), (&NOTE_TIMES, "*"), (&NOTE_PLUS, "+"), (&NOTE_MINUS, "-")]);
    let request = form.request(side, &[("word", &word), ("n", &n)], draw);
    let second = move |told: &str| {
        let text = notes::listed(told).first().map_or_else(String::new, |(_, text)| text.clone());
        compute(&format!("{} {sign} {n}", number(&text).unwrap_or_default()))
    };
    Some(Task::double(request, notes::search(&word), second, result))
}

/// Compute, then note the result.
pub fn compute_note(side: Side, draw: &mut Draw) -> Task {
    let x = calculator::written(side, draw);
    let request = NOTE_RESULT.request(side, &[("x", &x)], draw);
    let first = compute(&x);
    let second = move |told: &str| Action::Call(notes::add(&format!("{x} = {told}")));
    Task::double(request, first, second, notes::saved)
}
