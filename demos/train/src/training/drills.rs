//! Drills in looking back: steps of a training whose rows are made of random words, so that nothing but the row itself tells what
//! comes next.
//!
//! It takes many steps of ordinary text until a model first copies a name; of drills it takes few. Later ones keep what ordinary
//! text, with its familiar words, lets fade: that any word can follow any other.

use anyhow::{Context, Result};
use gatedelta::qwen::Tokenizer;

use super::batches::{Batch, Role};
use crate::draw::Draw;

/// Tokens of a row of the first drills.
const FIRST: usize = 256;
/// Tokens of a row of later ones: most of them short.
const LENGTHS: [usize; 6] = [256, 256, 256, 1024, 1024, 4096];

/// Makes drills for a tokenizer. The drill of a step depends on its number and on the seed alone.
pub struct Drills {
    seed: u64,
    /// Ids below this one stand for text, those from it on are markers.
    words: usize,
    digits: Vec<i64>,
    separators: Vec<Vec<i64>>,
    point: Vec<i64>,
    newline: Vec<i64>,
    /// Says that the lines follow once more.
    again: Vec<i64>,
    /// Says that all numbers follow.
    total: Vec<i64>,
    /// Says that the number of each of two keys follows.
    both: Vec<i64>,
    plus: Vec<i64>,
}

/// A row so far: ids, and which of them are the model's to write.
#[derive(Default)]
struct Row {
    ids: Vec<i64>,
    said: Vec<bool>,
}

impl Row {
    fn push(&mut self, ids: &[i64], said: bool) {
        self.ids.extend(ids);
        self.said.resize(self.ids.len(), said);
    }

    fn read(&mut self, ids: &[i64]) {
        self.push(ids, false);
    }

    fn say(&mut self, ids: &[i64]) {
        self.push(ids, true);
    }
}

/// A key and its number.
type Entry = (Vec<i64>, Vec<i64>);

/// Lines that were read.
#[derive(Clone)]
struct Table<'a> {
    entries: Vec<Entry>,
    /// What stands between key and number.
    separator: &'a [i64],
}

impl Drills {
    /// For a tokenizer whose markers come after so many words.
    ///
    /// # Errors
    /// If it cannot encode digits and marks, or splits a digit.
    pub fn new(tokenizer: &Tokenizer, words: usize, seed: u64) -> Result<Self> {
        let encode =
            |text: &str| -> Result<Vec<i64>> { Ok(tokenizer.encode(text)?.into_iter().map(i64::from).collect()) };
        let digit = |n: u32| -> Result<i64> {
            match encode(&n.to_string())?[..] {
                [id] => Ok(id),
                _ => None.with_context(|| format!("the digit {n} is no token of the tokenizer")),
            }
        };
        let separators = [": ", ": ", ": ", " = ", ", ", ",", " - ", "; ", ";", " | ", " "];
        Ok(Drills {
            seed,
            words,
            digits: (0..10).map(digit).collect::<Result<_>>()?,
            separators: separators.iter().map(|text| encode(text)).collect::<Result<_>>()?,
            point: encode(".")?,
            newline: encode("\n")?,
            again: encode(" says:\n")?,
            total: encode(" total of all: ")?,
            both: encode(" together: ")?,
            plus: encode(" + ")?,
        })
    }

    /// The drill of a step of a new model, of about so many tokens: runs of random words, then the same runs in another order. All
    /// words of a run but its first are the model's to write, since they can be told from the run's first appearance alone.
    pub fn first(&self, step: u64, tokens: usize) -> Batch {
        let mut draw = Draw::new(&[self.seed, 2, step]);
        self.batch(FIRST, tokens, |row| self.runs(row, FIRST, (2, 8), 0, &mut draw))
    }

    /// The drill of a later step: spans far apart, lines that are said once more, numbers looked up by their keys, and all the
    /// numbers of some lines.
    pub fn later(&self, step: u64, tokens: usize) -> Batch {
        let mut draw = Draw::new(&[self.seed, 3, step]);
        let length = *draw.pick(&LENGTHS);
        let length = if length > tokens { FIRST } else { length };
        self.batch(length, tokens, |row| match draw.below(8) {
            0 => self.runs(row, length, (2, 8), 0, &mut draw),
            1 => self.runs(row, length, (4, 24), length / 4, &mut draw),
            _ => self.tables(row, length, &mut draw),
        })
    }

    /// Rows of `length` tokens, cut at their end, about `tokens` of them in all.
    fn batch(&self, length: usize, tokens: usize, mut fill: impl FnMut(&mut Row)) -> Batch {
        let rows = (tokens / length).max(1);
        let size = rows * length;
        let mut batch = Batch {
            shape: [rows, length],
            ids: Vec::with_capacity(size),
            next: vec![0; size],
            role: vec![Role::Context; size],
        };
        for at in (0..size).step_by(length) {
            let mut row = Row::default();
            fill(&mut row);
            batch.ids.extend(&row.ids[..length]);
            batch.next[at..at + length - 1].copy_from_slice(&row.ids[1..length]);
            for (role, said) in batch.role[at..].iter_mut().zip(&row.said[1..length]) {
                if *said {
                    *role = Role::Answer;
                }
            }
            batch.role[at + length - 1] = Role::Padding;
        }
        batch
    }

    fn words(&self, count: u64, draw: &mut Draw) -> Vec<i64> {
        (0..count).map(|_| draw.below(self.words) as i64).collect()
    }

    /// Runs of `from` to `to` words, `apart` words that mean nothing, then the runs over and over in other orders.
    fn runs(&self, row: &mut Row, length: usize, (from, to): (u64, u64), apart: usize, draw: &mut Draw) {
        let mut runs: Vec<Vec<i64>> = Vec::new();
        while runs.iter().map(Vec::len).sum::<usize>() < (length - apart) / 2 {
            let count = draw.range(from, to);
            runs.push(self.words(count, draw));
        }
        runs.iter().for_each(|run| row.read(run));
        row.read(&self.words(apart as u64, draw));
        while row.ids.len() < length {
            draw.shuffle(&mut runs);
            for run in &runs {
                row.read(&run[..1]);
                row.say(&run[1..]);
            }
        }
    }

    /// A number of one to five digits, now and then with decimals.
    fn number(&self, draw: &mut Draw) -> Vec<i64> {
        let mut digits = |count: u64| -> Vec<i64> { (0..count).map(|_| *draw.pick(&self.digits)).collect() };
        let (whole, parts) = (digits(5), digits(2));
        let mut number = whole[..draw.range(1, 5) as usize].to_vec();
        if draw.chance(15) {
            number.extend(&self.point);
            number.extend(&parts[..draw.range(1, 2) as usize]);
        }
        number
    }

    /// Tables, each asked for at once, but for the first one, which is asked for at the end of the row.
    fn tables(&self, row: &mut Row, length: usize, draw: &mut Draw) {
        let kept = self.table(row, draw.range(2, (length / 48).clamp(3, 24) as u64), draw);
        // To ask for it takes about as much as to read it.
        let until = length - row.ids.len().min(length / 2);
        while row.ids.len() < until {
            let table = self.table(row, draw.range(2, 9), draw);
            match draw.below(4) {
                0 => self.lines(row, &table),
                1 => self.totals(row, &table),
                2 => self.lookups(row, table, draw),
                _ => self.pairs(row, table, draw),
            }
        }
        while row.ids.len() < length {
            self.lookups(row, kept.clone(), draw);
            self.pairs(row, kept.clone(), draw);
        }
    }

    /// Lines of a key and a number each, written down.
    fn table(&self, row: &mut Row, count: u64, draw: &mut Draw) -> Table<'_> {
        let separator = draw.pick::<Vec<i64>>(&self.separators);
        let mut entries = Vec::new();
        for _ in 0..count {
            let words = draw.range(1, 4);
            let entry = (self.words(words, draw), self.number(draw));
            [&entry.0, separator, &entry.1, &self.newline].iter().for_each(|part| row.read(part));
            entries.push(entry);
        }
        Table { entries, separator }
    }

    /// The same lines once more.
    fn lines(&self, row: &mut Row, table: &Table) {
        row.read(&self.again);
        for (key, number) in &table.entries {
            [key, table.separator, number, &self.newline].iter().for_each(|part| row.say(part));
        }
    }

    /// Their numbers with a plus between.
    fn totals(&self, row: &mut Row, table: &Table) {
        row.read(&self.total);
        self.sum(row, &table.entries);
    }

    fn sum(&self, row: &mut Row, entries: &[Entry]) {
        for (at, (_, number)) in entries.iter().enumerate() {
            if at > 0 {
                row.say(&self.plus);
            }
            row.say(number);
        }
        row.say(&self.newline);
    }

    /// Their keys in another order, each to be answered with its number.
    fn lookups(&self, row: &mut Row, mut table: Table, draw: &mut Draw) {
        draw.shuffle(&mut table.entries);
        for (key, number) in &table.entries {
            row.read(key);
            row.read(table.separator);
            row.say(number);
            row.say(&self.newline);
        }
    }

    /// Two keys at a time, to be answered with both numbers and a plus between.
    fn pairs(&self, row: &mut Row, mut table: Table, draw: &mut Draw) {
        draw.shuffle(&mut table.entries);
        for two in table.entries.chunks_exact(2) {
            row.read(&two[0].0);
            row.read(table.separator);
            row.read(&two[1].0);
            row.read(&self.both);
            self.sum(row, two);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::tokenizer;

    /// For a tokenizer of bytes and markers alone.
    fn drills(seed: u64) -> Drills {
        let dir = tempfile::tempdir().unwrap();
        tokenizer::write(&tokenizer::train(&[], 300).unwrap(), dir.path()).unwrap();
        Drills::new(&tokenizer::read(dir.path()).unwrap(), 256, seed).unwrap()
    }

    #[test]
    fn the_first_ones_ask_for_what_was_there() {
        let drills = drills(1);
        let batch = drills.first(2, 1024);
        assert_eq!((batch.shape, batch.ids.len()), ([4, 256], 1024));
        assert!(drills.first(3, 1024) != batch && drills.first(2, 1024) == batch);
        for row in 0..4 {
            let ids = &batch.ids[row * 256..(row + 1) * 256];
            let mut asked = 0;
            for i in 0..255 {
                assert_eq!(batch.next[row * 256 + i], ids[i + 1]);
                if batch.role[row * 256 + i] == Role::Answer {
                    asked += 1;
                    assert!(ids[..i].windows(2).any(|two| two == &ids[i..i + 2]), "{row} {i}");
                }
            }
            assert!(asked > 60, "{asked}");
            assert_eq!(batch.role[row * 256 + 255], Role::Padding);
        }
    }

    #[test]
    fn later_ones_are_of_every_length_and_have_much_to_say() {
        let drills = drills(1);
        let mut lengths = HashSet::new();
        for step in 0..60 {
            let batch = drills.later(step, 8192);
            let [rows, length] = batch.shape;
            lengths.insert(length);
            assert_eq!((rows * length, batch.ids.len(), batch.role.len()), (8192, 8192, 8192));
            assert!(batch.ids.iter().all(|id| (0..256).contains(id)));
            assert!(batch.count(Role::Answer) > 800, "{step}: {}", batch.count(Role::Answer));
            assert!(batch.ids[1..length] == batch.next[..length - 1]);
            assert!(drills.later(step, 8192) == batch && drills.first(step, 8192) != batch);
        }
        assert_eq!(lengths, LENGTHS.into_iter().collect());
        assert!(drills.later(1, 300).shape[1] == FIRST && self::drills(2).later(1, 300) != drills.later(1, 300));
    }

    /// The text of a form.
    fn text(fill: impl Fn(&Drills, &mut Row, &mut Draw)) -> (String, Vec<(String, bool)>) {
        let dir = tempfile::tempdir().unwrap();
        tokenizer::write(&tokenizer::train(&[], 300).unwrap(), dir.path()).unwrap();
        let read = tokenizer::read(dir.path()).unwrap();
        let mut drills = Drills::new(&read, 256, 1).unwrap();
        // Keys are of one word, which no separator has.
        let plain = read.encode("x").unwrap()[0];
        drills.words = plain as usize + 1;
        let mut row = Row::default();
        fill(&drills, &mut row, &mut Draw::new(&[4]));
        let decode = |ids: &[i64]| read.decode(&ids.iter().map(|id| *id as u32).collect::<Vec<_>>(), true).unwrap();
        let mut parts: Vec<(Vec<i64>, bool)> = Vec::new();
        for (&id, &said) in row.ids.iter().zip(&row.said) {
            match parts.last_mut() {
                Some((ids, last)) if *last == said => ids.push(id),
                _ => parts.push((vec![id], said)),
            }
        }
        (decode(&row.ids), parts.iter().map(|(ids, said)| (decode(ids), *said)).collect())
    }

    #[test]
    fn totals_are_those_of_the_lines() {
        let (_, parts) = text(|drills, row, draw| {
            let table = drills.table(row, 5, draw);
            drills.totals(row, &table);
        });
        let [(read, false), (said, true)] = &parts[..] else { panic!("{parts:?}") };
        let numbers: Vec<&str> = said.trim_end().split(" + ").collect();
        let lines = read.strip_suffix(" total of all: ").unwrap();
        // Every number stands before the end of a line, in this order.
        let mut rest = lines;
        for number in &numbers {
            let at = rest.find(&format!("{number}\n")).unwrap_or_else(|| panic!("{number} {rest:?}"));
            rest = &rest[at + number.len() + 1..];
        }
        assert_eq!(rest, "");
        assert_eq!(numbers.len(), 5);
    }

    #[test]
    fn lines_are_said_as_they_were_read() {
        let (_, parts) = text(|drills, row, draw| {
            let table = drills.table(row, 5, draw);
            drills.lines(row, &table);
        });
        let [(read, false), (said, true)] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!(read.strip_suffix(" says:\n").unwrap(), said);
    }

    #[test]
    fn looked_up_is_what_stands_there() {
        for pairs in [false, true] {
            let (all, parts) = text(|drills, row, draw| {
                let table = drills.table(row, 5, draw);
                match pairs {
                    false => drills.lookups(row, table, draw),
                    true => drills.pairs(row, table, draw),
                }
            });
            let said: Vec<&String> = parts.iter().filter(|(_, said)| *said).map(|(text, _)| text).collect();
            assert!(!said.is_empty(), "{all:?}");
            for number in said.iter().flat_map(|said| said.trim_end().split(" + ")) {
                assert!(parts[0].0.contains(&format!("{number}\n")), "{number} {all:?}");
            }
        }
    }
}
