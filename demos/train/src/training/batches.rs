//! Which conversations a step has, and their tokens as rows of one length.

use anyhow::{Result, bail};

use crate::dataset::Dataset;
use crate::draw::Draw;

/// Conversations in batches of about so many tokens, anew for every epoch. The batch of a step depends on its number, on the
/// seed and on the data alone.
///
/// Rows are as long as the longest of them, rounded up to one of a few lengths: little is padded, and few shapes come up.
pub struct Batches<'a> {
    data: &'a Dataset,
    seed: u64,
    tokens: usize,
    /// Those that fit in, the longest first.
    fitting: Vec<u32>,
    /// The epoch that was last asked for, and its batches.
    epoch: Option<(u64, Vec<Vec<u32>>)>,
}

/// Rows of tokens.
#[derive(Debug, PartialEq)]
pub struct Batch {
    /// B, T
    pub shape: [usize; 2],
    /// `[B, T]`; padding at the end of a row is 0.
    pub ids: Vec<i64>,
    /// `[B, T]`: the token after each.
    pub next: Vec<i64>,
    /// `[B, T]`: what that token is.
    pub role: Vec<Role>,
}

/// What a token is to the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The model writes it.
    Answer,
    /// The model reads it.
    Context,
    /// It is not there.
    Padding,
}

impl Batch {
    /// Tokens of a role.
    pub fn count(&self, role: Role) -> usize {
        self.role.iter().filter(|found| **found == role).count()
    }

    /// Tokens that are there.
    pub fn tokens(&self) -> usize {
        self.role.len() - self.count(Role::Padding)
    }
}

/// The length of the row that `n` tokens get: a power of two or three quarters of one, a multiple of 64. Every length that
/// comes up costs a GPU its preparations.
fn rung(n: usize) -> usize {
    let power = n.max(64).next_power_of_two();
    if n <= power / 4 * 3 && power >= 256 { power / 4 * 3 } else { power }
}

impl<'a> Batches<'a> {
    /// Batches of conversations of at most `longest` tokens.
    ///
    /// # Errors
    /// If there are none.
    pub fn new(data: &'a Dataset, seed: u64, tokens: usize, longest: usize) -> Result<Self> {
        let all = Batches { data, seed, tokens, fitting: Vec::new(), epoch: None };
        let count = data.kinds.len() as u32;
        // One token alone is followed by none.
        let mut fitting: Vec<u32> = (0..count).filter(|&at| (1..longest).contains(&all.length(at))).collect();
        if fitting.is_empty() {
            bail!("of {count} conversations none has 2 to {longest} tokens");
        }
        fitting.sort_by_key(|&at| std::cmp::Reverse(rung(all.length(at))));
        Ok(Batches { fitting, ..all })
    }

    /// Tokens that are followed by one.
    fn length(&self, at: u32) -> usize {
        (self.data.offsets[at as usize + 1] - self.data.offsets[at as usize]).saturating_sub(1) as usize
    }

    /// Conversations that were left out because they are too long.
    pub fn left_out(&self) -> usize {
        self.data.kinds.len() - self.fitting.len()
    }

    /// The batches of an epoch. All epochs have as many, of the same shapes.
    fn plan(&self, epoch: u64) -> Vec<Vec<u32>> {
        let mut draw = Draw::new(&[self.seed, 1, epoch]);
        let mut order = self.fitting.clone();
        // Those of one rung change places.
        order.chunk_by_mut(|&a, &b| rung(self.length(a)) == rung(self.length(b))).for_each(|same| draw.shuffle(same));
        let mut batches = Vec::new();
        let mut rest = &order[..];
        while let Some(&first) = rest.first() {
            let rows = (self.tokens / rung(self.length(first))).clamp(1, rest.len());
            batches.push(rest[..rows].to_vec());
            rest = &rest[rows..];
        }
        draw.shuffle(&mut batches);
        batches
    }

    /// Steps of an epoch.
    pub fn per_epoch(&mut self) -> usize {
        self.of_epoch(0).len()
    }

    fn of_epoch(&mut self, epoch: u64) -> &[Vec<u32>] {
        if self.epoch.as_ref().is_none_or(|(found, _)| *found != epoch) {
            self.epoch = Some((epoch, self.plan(epoch)));
        }
        self.epoch.as_ref().map_or(&[], |(_, batches)| batches)
    }

    /// The batch of a step, from 0.
    pub fn batch(&mut self, step: u64) -> Batch {
        let each = self.per_epoch() as u64;
        let rows = self.of_epoch(step / each)[(step % each) as usize].clone();
        self.rows(&rows)
    }

    fn rows(&self, rows: &[u32]) -> Batch {
        let t = rung(rows.iter().map(|&at| self.length(at)).max().unwrap_or(0));
        let size = rows.len() * t;
        let mut batch =
            Batch { shape: [rows.len(), t], ids: vec![0; size], next: vec![0; size], role: vec![Role::Padding; size] };
        for (row, &at) in rows.iter().enumerate() {
            let from = self.data.offsets[at as usize] as usize;
            for i in 0..self.length(at) {
                let (to, from) = (row * t + i, from + i);
                batch.ids[to] = i64::from(self.data.ids[from]);
                batch.next[to] = i64::from(self.data.ids[from + 1]);
                batch.role[to] = if self.data.mask[from + 1] == 1 { Role::Answer } else { Role::Context };
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conversations of these lengths: token `i` of conversation `n` is `1000 n + i`, every third is the model's.
    fn data(lengths: &[usize]) -> Dataset {
        let mut data = Dataset::new();
        for (n, &length) in lengths.iter().enumerate() {
            data.ids.extend((0..length).map(|i| (1000 * n + i) as u16));
            data.mask.extend((0..length).map(|i| u8::from(i % 3 == 0)));
            data.offsets.push(data.ids.len() as u64);
            data.kinds.push(0);
        }
        data
    }

    #[test]
    fn an_epoch_has_every_conversation_once_and_little_padding() {
        let lengths: Vec<usize> = (0..60).map(|n| 2 + (n * 37) % 900).collect();
        let data = data(&lengths);
        let mut batches = Batches::new(&data, 3, 2048, 8192).unwrap();
        let each = batches.per_epoch() as u64;
        let mut orders = Vec::new();
        for epoch in 0..2 {
            let mut seen = Vec::new();
            for step in epoch * each..(epoch + 1) * each {
                let batch = batches.batch(step);
                let [b, t] = batch.shape;
                assert!(t % 64 == 0 && b * t <= 2048 && batch.ids.len() == b * t);
                seen.extend(batch.ids.chunks(t).map(|row| row[0] / 1000));
            }
            orders.push(seen.clone());
            seen.sort();
            assert_eq!(seen, (0..60).collect::<Vec<i64>>());
        }
        assert_ne!(orders[0], orders[1], "epochs differ");
        // A batch depends on its step alone, whatever was asked for before.
        assert_eq!(Batches::new(&data, 3, 2048, 8192).unwrap().batch(each + 1), batches.batch(each + 1));
        assert!(Batches::new(&data, 4, 2048, 8192).unwrap().batch(0) != batches.batch(0), "seeds differ");
        assert_eq!(
            (rung(0), rung(1), rung(64), rung(65), rung(1000), rung(1025), rung(8191)),
            (64, 64, 64, 128, 1024, 1536, 8192)
        );
    }

    #[test]
    fn every_token_is_to_say_the_next() {
        let data = data(&[5, 4]);
        let batch = Batches::new(&data, 0, 1000, 100).unwrap().batch(0);
        assert_eq!(batch.shape, [2, 64]);
        let at = batch.ids[0] as usize / 1000 * 64;
        let row = 64 - at;
        assert_eq!(batch.ids[at..at + 5], [0, 1, 2, 3, 0]);
        assert_eq!(batch.next[at..at + 5], [1, 2, 3, 4, 0]);
        use Role::{Answer, Context, Padding};
        assert_eq!(batch.role[at..at + 5], [Context, Context, Answer, Context, Padding]);
        assert_eq!(batch.role[row..row + 4], [Context, Context, Answer, Padding]);
        assert_eq!((batch.count(Answer), batch.count(Context), batch.tokens()), (2, 5, 7));
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let data = data(&[1, 2, 100, 101]);
        assert_eq!(Batches::new(&data, 0, 64, 100).unwrap().left_out(), 2);
        // A conversation longer than a step is one of its own.
        assert_eq!(Batches::new(&data, 0, 64, 100).unwrap().per_epoch(), 2);
        let why = Batches::new(&data, 0, 64, 1).err().unwrap().to_string();
        assert!(why.contains("of 4 conversations none has 2 to 1 tokens"), "{why}");
    }
}
