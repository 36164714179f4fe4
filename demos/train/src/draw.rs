//! Random choices out of a seed.

use gatedelta::qwen::SplitMix64;

/// A stream of choices.
#[derive(Debug, Clone)]
pub struct Draw(SplitMix64);

impl Draw {
    /// The stream that these numbers name; streams of different names have nothing to do with each other.
    pub fn new(name: &[u64]) -> Self {
        let seed = name.iter().fold(0, |seed, &part| SplitMix64::new(seed ^ part).bits());
        Draw(SplitMix64::new(seed))
    }

    /// A number below `n`; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        // The high half of a product is uniform up to n / 2^64.
        ((self.0.bits() as u128 * n as u128) >> 64) as usize
    }

    /// A number from `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below((high - low + 1) as usize) as u64
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < percent as usize
    }

    /// One of a list that is not empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// Puts a list into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for end in (1..list.len()).rev() {
            list.swap(end, self.below(end + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_even_and_repeatable() {
        let mut counts = [0; 10];
        let mut draw = Draw::new(&[1, 2]);
        (0..10_000).for_each(|_| counts[draw.below(10)] += 1);
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
        assert!((0..100).all(|_| (3..=5).contains(&draw.range(3, 5))));
        assert_eq!(draw.below(0), 0);

        let mut list: Vec<u32> = (0..50).collect();
        Draw::new(&[7]).shuffle(&mut list);
        let mut again: Vec<u32> = (0..50).collect();
        Draw::new(&[7]).shuffle(&mut again);
        assert_eq!(list, again);
        assert!(!list.is_sorted());
        again.sort();
        assert_eq!(again, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn streams_have_nothing_in_common() {
        let first = |name: &[u64]| Draw::new(name).range(0, u64::MAX - 1);
        assert_ne!(first(&[1, 2]), first(&[2, 1]));
        assert_ne!(first(&[0]), first(&[0, 0]));
    }
}
