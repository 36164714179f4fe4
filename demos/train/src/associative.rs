//! Multi-query associative recall (Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023):
//! pairs of a key and a value, then every key once more, in another order, each to be answered with its value.
//!
//! ```text
//! tokens   k3 v7 k1 v2 k9 v4 | k1 k9 k3
//! targets                    | v2 v4 v7
//! ```
//!
//! With rewrites, keys are told again with another value, and the last one counts:
//!
//! ```text
//! tokens   k3 v7 k1 v2 k3 v5 k9 v4 k1 v8 | k1 k9 k3
//! targets                                | v8 v4 v5
//! ```
//!
//! Keys and values are drawn anew for every sequence, so that nothing but the sequence itself can tell the answer: whoever knew
//! all training sequences by heart would be right on a held-out one as often as by chance.

use anyhow::{Result, bail};

use crate::data::Side;
use crate::draw::Draw;

/// The size of the task.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Shape {
    /// Different keys: tokens from 0 on
    #[arg(long, default_value_t = 64)]
    pub keys: usize,
    /// Different values: tokens from --keys on
    #[arg(long, default_value_t = 64)]
    pub values: usize,
    /// Pairs in a sequence
    #[arg(long, default_value_t = 8)]
    pub pairs: usize,
    /// Times that a pair is told again with a value that its key did not have before; they go round all pairs, and the last
    /// value counts
    #[arg(long, default_value_t = 0)]
    pub rewrites: usize,
}

/// One sequence of `3 * pairs + 2 * rewrites` tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    pub tokens: Vec<u16>,
    /// The token that is right after each token, where one is asked for.
    pub targets: Vec<Option<u16>>,
}

impl Shape {
    /// What is wrong with it.
    ///
    /// # Errors
    /// If a sequence could not be made.
    pub fn check(&self) -> Result<()> {
        if self.pairs == 0 || self.pairs > self.keys {
            bail!("--pairs is {}; expected 1 to --keys, {}", self.pairs, self.keys);
        }
        if self.values < 2 {
            bail!("--values is {}; expected 2 or more", self.values);
        }
        if self.keys.saturating_add(self.values) > 1 << 16 {
            let both = self.keys.saturating_add(self.values);
            bail!("--keys and --values together are {both}; expected at most 65536");
        }
        // Every key needs another value each time, and a sequence has an end.
        let most = (self.pairs * (self.values - 1)).min((1 << 16) - self.pairs);
        if self.rewrites > most {
            bail!("--rewrites is {}; expected at most {most} with these --pairs and --values", self.rewrites);
        }
        Ok(())
    }

    /// Sequence number `index` of a seed.
    ///
    /// # Errors
    /// As [`check`](Shape::check).
    pub fn sequence(&self, seed: u64, side: Side, index: u64) -> Result<Sequence> {
        self.check()?;
        let mut draw = Draw::new(&[seed, side as u64, index]);
        let mut keys: Vec<usize> = (0..self.keys).collect();
        draw.shuffle(&mut keys);
        keys.truncate(self.pairs);
        let mut told: Vec<usize> = (0..self.pairs).collect();
        if self.rewrites > 0 {
            told.extend((0..self.pairs).cycle().take(self.rewrites));
            draw.shuffle(&mut told);
        }
        // Of each pair all values so far, the last one last.
        let mut values: Vec<Vec<usize>> = vec![Vec::new(); self.pairs];
        let mut tokens = Vec::with_capacity(3 * self.pairs + 2 * self.rewrites);
        for pair in told {
            let value = another(&mut draw, self.values, &values[pair]);
            values[pair].push(value);
            tokens.extend([keys[pair] as u16, (self.keys + value) as u16]);
        }
        let mut targets = vec![None; tokens.len()];
        let last = values.iter().map(|values| self.keys + values.last().copied().unwrap_or(0));
        let mut pairs: Vec<(u16, u16)> =
            keys.iter().zip(last).map(|(&key, value)| (key as u16, value as u16)).collect();
        draw.shuffle(&mut pairs);
        for (key, value) in pairs {
            tokens.push(key);
            targets.push(Some(value));
        }
        Ok(Sequence { tokens, targets })
    }
}

/// A number below `n` that is none of `had`, of which there are less than `n`.
fn another(draw: &mut Draw, n: usize, had: &[usize]) -> usize {
    let mut had = had.to_vec();
    had.sort_unstable();
    // The number-th of those that are left: every one of `had` up to it moves it on.
    had.iter().fold(draw.below(n - had.len()), |number, &before| number + usize::from(before <= number))
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    const SHAPE: Shape = Shape { keys: 96, values: 128, pairs: 16, rewrites: 0 };

    #[test]
    fn every_key_is_asked_for_once() {
        for index in 0..50 {
            let sequence = SHAPE.sequence(3, Side::Train, index).unwrap();
            assert_eq!((sequence.tokens.len(), sequence.targets.len()), (48, 48));
            let (told, asked) = sequence.tokens.split_at(32);
            assert!(sequence.targets[..32].iter().all(Option::is_none));
            for (key, target) in asked.iter().zip(&sequence.targets[32..]) {
                let at = told.chunks(2).position(|pair| pair[0] == *key).unwrap();
                assert_eq!(Some(told[2 * at + 1]), *target);
            }
            assert_eq!(asked.iter().collect::<HashSet<_>>().len(), 16);
            assert_eq!(sequence, SHAPE.sequence(3, Side::Train, index).unwrap());
            assert_ne!(sequence, SHAPE.sequence(4, Side::Train, index).unwrap());
        }
    }

    #[test]
    fn the_last_value_counts() {
        for rewrites in [1, 16, 40] {
            let shape = Shape { rewrites, ..SHAPE };
            // Whether the first and the last place told a pair for the first time, and for the last.
            let (mut first_again, mut last_kept) = (false, false);
            for index in 0..50 {
                let sequence = shape.sequence(3, Side::Train, index).unwrap();
                assert_eq!((sequence.tokens.len(), sequence.targets.len()), (48 + 2 * rewrites, 48 + 2 * rewrites));
                let (told, asked) = sequence.tokens.split_at(32 + 2 * rewrites);
                assert!(sequence.targets[..told.len()].iter().all(Option::is_none));
                let mut read: HashMap<u16, Vec<u16>> = HashMap::new();
                told.chunks(2).for_each(|pair| read.entry(pair[0]).or_default().push(pair[1]));
                assert_eq!((read.len(), asked.iter().collect::<HashSet<_>>().len()), (16, 16));
                for (key, target) in asked.iter().zip(&sequence.targets[told.len()..]) {
                    let (last, before) = read[key].split_last().unwrap();
                    assert_eq!(Some(*last), *target);
                    assert!(!before.contains(last) && (96..96 + 128).contains(last));
                    assert_eq!(read[key].iter().collect::<HashSet<_>>().len(), read[key].len());
                    assert!((rewrites / 16..=rewrites.div_ceil(16)).contains(&before.len()));
                }
                first_again |= told[..32].chunks(2).map(|pair| pair[0]).collect::<HashSet<_>>().len() < 16;
                last_kept |= read[&told[told.len() - 2]].len() == 1;
                assert_eq!(sequence, shape.sequence(3, Side::Train, index).unwrap());
            }
            assert!(first_again, "rewrites stand among the first tellings");
            assert!(last_kept || rewrites >= 16, "a pair that is told once may be the last");
        }
    }

    #[test]
    fn all_values_can_be_used_up() {
        let shape = Shape { keys: 4, values: 3, pairs: 2, rewrites: 4 };
        for index in 0..50 {
            let sequence = shape.sequence(1, Side::Train, index).unwrap();
            let told: HashSet<&[u16]> = sequence.tokens[..12].chunks(2).collect();
            assert_eq!(told.len(), 6, "two keys with each of three values: {sequence:?}");
        }
    }

    #[test]
    fn sides_share_no_sequence() {
        for shape in [SHAPE, Shape { rewrites: 20, ..SHAPE }] {
            let all = |side| (0..2000).map(|i| shape.sequence(1, side, i).unwrap().tokens).collect::<HashSet<_>>();
            let (train, held) = (all(Side::Train), all(Side::HeldOut));
            assert_eq!((train.len(), held.len()), (2000, 2000));
            assert!(train.is_disjoint(&held));
        }
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (shape, expected) in [
            (Shape { pairs: 0, ..SHAPE }, "--pairs is 0"),
            (Shape { pairs: 97, ..SHAPE }, "1 to --keys, 96"),
            (Shape { values: 1, ..SHAPE }, "--values is 1"),
            (Shape { values: 65_535, ..SHAPE }, "at most 65536"),
            (Shape { values: usize::MAX, ..SHAPE }, "at most 65536"),
            (Shape { values: 3, rewrites: 33, ..SHAPE }, "--rewrites is 33; expected at most 32"),
            (Shape { rewrites: usize::MAX, ..SHAPE }, "expected at most 2032"),
        ] {
            let why = shape.sequence(1, Side::Train, 0).unwrap_err().to_string();
            assert!(why.contains(expected), "{why}");
        }
    }
}
