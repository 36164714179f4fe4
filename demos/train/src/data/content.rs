//! What files hold: accounts, times and plain items, laid out as people lay them out.

use crate::data::grammar::{Slots, forms};
use crate::data::{Side, names, notes};
use crate::draw::Draw;

forms! {
    HEADING {
        train: ["# {word}", "{word}", "{word} {year}", "# {word} {year}", "{word}:", "## {cost}", "--- {word} ---", "{cost} of {year}", "what, how much", "name;value", "list of {who}"],
        held: ["# {word} of {year}", "{cost} {year}", "{word} of {who}"],
    }
}

/// How a line is laid out, by side: one in three as most people do it, then one of these. `{n}` counts the lines; numbers and dates
/// are there to be passed over.
const ENTRIES: [&[&str]; 2] = [
    &[
        "{key} = {value}",
        "{key}, {value}",
        "{key},{value}",
        "{key};{value}",
        "{key} | {value}",
        "| {key} | {value} |",
        "{key} - {value}",
        "{key} -- {value}",
        "{key}\t{value}",
        "{key} {value}",
        "- {key}: {value}",
        "* {key}: {value}",
        "- {key}, {value}",
        "{value} {key}",
        "{value}: {key}",
        "{value}, {key}",
        "{key} ({value})",
        "\"{key}\",{value}",
        "{key}={value}",
        "{key} ... {value}",
        "{key} / {value}",
        "{n}. {key}: {value}",
        "{n}) {key} {value}",
        "{n}, {key}, {value}",
        "{day}.{month}. {key}: {value}",
        "{date},{key},{value}",
        "{key}; {date}; {value}",
        "{date}: {key} {value}",
    ],
    &["{key}; {value}", "- {key} = {value}", "{n}. {key}, {value}", "{date} {key}: {value}"],
];
const COMMON: &str = "{key}: {value}";

/// What stands around an amount, where it does not stand alone.
const AMOUNTS: [&[&str]; 2] = [
    &[
        "{value} EUR",
        "{value} dollars",
        "{value} kg",
        "EUR {value}",
        "{value} (was {other})",
        "{value} (last year: {other})",
        "{value}, before {other}",
        "{value} for {count}",
        "{value} ({word})",
        "{value}, see {word}",
    ],
    &["{value} euros", "{value} (before: {other})"],
];

/// What kind of thing the lines of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    /// `rent: 412`
    Account,
    /// `Ada: 14:35`
    Times,
    /// `blue lamp`
    Items,
}

/// One line.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it is about; an item itself.
    pub key: String,
    /// What it says about it; nothing of an item.
    pub value: String,
    /// As the file has it.
    line: String,
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Content {
    pub sort: Sort,
    heading: Option<String>,
    pub entries: Vec<Entry>,
    /// No line has a number beside its own.
    pub plain: bool,
}

impl Content {
    /// A content of `sort`.
    pub fn new(sort: Sort, side: Side, draw: &mut Draw) -> Content {
        let count = match draw.below(20) {
            0..=14 => draw.range(2, 5),
            15..=18 => draw.range(6, 8),
            _ => draw.range(9, 12),
        };
        let mut content = Content { sort, heading: None, entries: Vec::new(), plain: true };
        let layout = if draw.chance(35) { COMMON } else { *draw.pick(ENTRIES[side as usize]) };
        let bare = sort != Sort::Account || draw.chance(70);
        let amount = if bare { "{value}" } else { *draw.pick(AMOUNTS[side as usize]) };
        content.plain = !["{n}", "{day}", "{date}", "{other}", "{count}"]
            .iter()
            .any(|slot| layout.contains(slot) || amount.contains(slot));
        // One file in five has decimals.
        let decimals = if draw.chance(20) { 60 } else { 0 };
        let item = item(side, draw);
        for _ in 0..8 * count {
            let at = content.entries.len();
            if at as u64 == count {
                break;
            }
            let (key, value) = match sort {
                Sort::Account if draw.chance(decimals) => (names::cost(draw, side), names::decimal(draw, side)),
                Sort::Account => (names::cost(draw, side), names::figure(draw, side, 4).to_string()),
                Sort::Times => (names::person(draw, side), names::time(draw, side)),
                Sort::Items => (item(draw), String::new()),
            };
            // A key names one line.
            let apart = |other: &Entry| !other.line.contains(&key) && !key.contains(&other.key);
            if !content.entries.iter().all(apart) {
                continue;
            }
            let line = match sort {
                Sort::Items => key.clone(),
                _ => line(layout, amount, at + 1, &key, &value, side, draw),
            };
            content.entries.push(Entry { key, value, line });
        }
        if draw.chance(12) {
            content.heading = Some(heading(side, draw));
        }
        content
    }

    /// The lines of the file.
    pub fn lines(&self) -> Vec<String> {
        self.heading.iter().chain(self.entries.iter().map(|entry| &entry.line)).cloned().collect()
    }

    /// The values of these keys, in their order; all of them where there are no keys.
    pub fn values(&self, keys: &[String]) -> Vec<String> {
        let value = |key: &String| self.entries.iter().find(|entry| entry.key == *key).map(|entry| entry.value.clone());
        match keys {
            [] => self.entries.iter().map(|entry| entry.value.clone()).collect(),
            keys => keys.iter().filter_map(value).collect(),
        }
    }
}

/// A maker of items, all of one kind.
fn item(side: Side, draw: &mut Draw) -> impl Fn(&mut Draw) -> String + use<> {
    let which = draw.below(10);
    move |draw: &mut Draw| match which {
        0..=3 => names::thing(draw, side),
        4 | 5 => notes::text(side, draw),
        6 => names::food(draw, side),
        7 => names::code(draw, side),
        8 => names::person(draw, side),
        _ => names::word(draw, side),
    }
}

fn line(layout: &str, amount: &str, at: usize, key: &str, value: &str, side: Side, draw: &mut Draw) -> String {
    let (day, month, year) = (draw.range(1, 28), draw.range(1, 12), draw.range(2018, 2029));
    let date = format!("{year}-{month:02}-{day:02}");
    let [n, day, month, count] = [at as u64, day, month, draw.range(2, 9)].map(|n| n.to_string());
    let other = names::figure(draw, side, 4).to_string();
    let word = names::word(draw, side);
    // A bar is a bar here: these are no templates of wording.
    let fill = |text: &str, slots: &Slots| {
        slots.iter().fold(text.to_string(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
    };
    let value = fill(amount, &[("value", value), ("other", &other), ("count", &count), ("word", &word)]);
    fill(layout, &[("key", key), ("value", &value), ("n", &n), ("day", &day), ("month", &month), ("date", &date)])
}

fn heading(side: Side, draw: &mut Draw) -> String {
    let (word, cost, who) = (names::word(draw, side), names::cost(draw, side), names::person(draw, side));
    let year = draw.range(1990, 2039).to_string();
    HEADING.text(side, &[("word", &word), ("cost", &cost), ("who", &who), ("year", &year)], draw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_and_value_is_on_its_line() {
        let mut draw = Draw::new(&[8]);
        let (mut longest, mut layouts) = (0, std::collections::HashSet::new());
        for at in 0..600 {
            let side = if at % 2 == 0 { Side::Train } else { Side::HeldOut };
            let sort = [Sort::Account, Sort::Times, Sort::Items][at / 2 % 3];
            let content = Content::new(sort, side, &mut draw);
            let lines = content.lines();
            longest = longest.max(lines.len());
            assert!(content.entries.len() >= 2, "{lines:?}");
            for (entry, line) in content.entries.iter().zip(&lines[lines.len() - content.entries.len()..]) {
                assert!(line.contains(&entry.key) && line.contains(&entry.value), "{entry:?} {line}");
                assert!(!line.contains(['{', '}', '\n']) && !line.starts_with('['), "{line}");
                layouts.insert(line.replace(&entry.key, "").replace(&entry.value, ""));
            }
            let keys = [content.entries[1].key.clone(), content.entries[0].key.clone()];
            assert_eq!(
                content.values(&keys),
                [&content.entries[1].value, &content.entries[0].value].map(String::clone)
            );
            assert_eq!(content.values(&[]).len(), content.entries.len());
        }
        assert!(longest >= 9 && layouts.len() > 40, "{longest} {}", layouts.len());
    }
}
