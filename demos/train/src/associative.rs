//! Multi-query associative recall (Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2023):
//! pairs of a key and a value, then every key once more, in another order, each to be answered with its value.
//!
//! ```text
//! tokens   k3 v7 k1 v2 k9 v4 | k1 k9 k3
//! targets                    | v2 v4 v7
//! ```
//!
//! Each pair of a key and a value belongs to one side by its hash: no pair of a held-out sequence is in a training sequence, so
//! nothing but the sequence itself can tell the answer.

use anyhow::{Result, bail};

use crate::data::Side;
use crate::draw::Draw;

/// The size of the task.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Shape {
    /// Different keys: tokens from 0 on
    #[arg(long, default_value_t = 128)]
    pub keys: usize,
    /// Different values: tokens from --keys on
    #[arg(long, default_value_t = 128)]
    pub values: usize,
    /// Pairs in a sequence
    #[arg(long, default_value_t = 16)]
    pub pairs: usize,
}

/// One sequence of `3 * pairs` tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    pub tokens: Vec<u16>,
    /// The token that is right after each token, where one is asked for.
    pub targets: Vec<Option<u16>>,
}

/// Of the values that a key can have, one in so many is held out.
const HELD_OUT: usize = 4;

fn side_of(key: usize, value: usize) -> Side {
    if Draw::new(&[key as u64, value as u64]).below(HELD_OUT) == 0 { Side::HeldOut } else { Side::Train }
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
        if self.values < 64 {
            bail!("--values is {}; expected 64 or more, so that every key has values of both sides", self.values);
        }
        if self.keys + self.values > 1 << 16 {
            bail!("--keys and --values together are {}; expected at most 65536", self.keys + self.values);
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
        let mut pairs = Vec::with_capacity(self.pairs);
        for key in keys {
            let first = draw.below(self.values);
            // From there on, the first value of this side.
            let Some(value) =
                (0..self.values).map(|n| (first + n) % self.values).find(|&value| side_of(key, value) == side)
            else {
                bail!("key {key} has no value of this side among {}", self.values);
            };
            pairs.push((key as u16, (self.keys + value) as u16));
        }
        let mut tokens: Vec<u16> = pairs.iter().flat_map(|&(key, value)| [key, value]).collect();
        let mut targets = vec![None; tokens.len()];
        draw.shuffle(&mut pairs);
        for (key, value) in pairs {
            tokens.push(key);
            targets.push(Some(value));
        }
        Ok(Sequence { tokens, targets })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const SHAPE: Shape = Shape { keys: 96, values: 128, pairs: 16 };

    fn pairs(side: Side) -> HashSet<(u16, u16)> {
        (0..300)
            .flat_map(|index| {
                let sequence = SHAPE.sequence(1, side, index).unwrap();
                sequence.tokens[..2 * SHAPE.pairs].chunks(2).map(|pair| (pair[0], pair[1])).collect::<Vec<_>>()
            })
            .collect()
    }

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
    fn sides_share_no_pair() {
        let (train, held) = (pairs(Side::Train), pairs(Side::HeldOut));
        assert!(train.is_disjoint(&held));
        assert!(train.len() > 3000 && held.len() > 1500, "{} and {}", train.len(), held.len());
        // Every key occurs on both sides, so that a held-out sequence holds nothing unknown but its pairs.
        let keys = |pairs: &HashSet<(u16, u16)>| pairs.iter().map(|pair| pair.0).collect::<HashSet<_>>().len();
        assert_eq!((keys(&train), keys(&held)), (96, 96));
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (shape, expected) in [
            (Shape { pairs: 0, ..SHAPE }, "--pairs is 0"),
            (Shape { pairs: 97, ..SHAPE }, "1 to --keys, 96"),
            (Shape { values: 63, ..SHAPE }, "--values is 63"),
            (Shape { values: 65_535, ..SHAPE }, "at most 65536"),
        ] {
            let why = shape.sequence(1, Side::Train, 0).unwrap_err().to_string();
            assert!(why.contains(expected), "{why}");
        }
    }
}
