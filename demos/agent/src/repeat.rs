//! Notices an answer that has run into a loop.

/// Longest loop that is noticed, in tokens.
const PERIOD_LIMIT: usize = 64;
/// A loop is one that has gone on for so many tokens,
const LENGTH: usize = 256;
/// and for so many turns. Real answers repeat themselves too: rulers, tables, zeros.
const TURNS: usize = 8;

/// Watches the tokens of one answer.
pub struct Repeat {
    /// The last tokens, oldest overwritten.
    recent: [u32; PERIOD_LIMIT],
    seen: usize,
    /// Per period: for how many tokens each has equalled the one a period before.
    run: [usize; PERIOD_LIMIT],
}

impl Repeat {
    /// Nothing seen.
    pub fn new() -> Self {
        Repeat { recent: [0; PERIOD_LIMIT], seen: 0, run: [0; PERIOD_LIMIT] }
    }

    /// Takes the next token; true once the answer is in a loop.
    pub fn push(&mut self, id: u32) -> bool {
        let mut looping = false;
        for period in 1..=PERIOD_LIMIT.min(self.seen) {
            let run = &mut self.run[period - 1];
            let same = self.recent[(self.seen - period) % PERIOD_LIMIT] == id;
            *run = if same { *run + 1 } else { 0 };
            looping |= *run >= LENGTH.max(TURNS * period);
        }
        self.recent[self.seen % PERIOD_LIMIT] = id;
        self.seen += 1;
        looping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noticed(ids: impl Iterator<Item = u32>) -> Option<usize> {
        let mut repeat = Repeat::new();
        ids.take(20_000).position(|id| repeat.push(id))
    }

    #[test]
    fn loops_are_noticed_and_answers_are_not() {
        assert_eq!(noticed(std::iter::repeat(5)), Some(256));
        assert_eq!(noticed((0..).map(|n| n % 3)), Some(258));
        assert_eq!(noticed((0..).map(|n| n % 64)), Some(64 + 511));
        assert_eq!(noticed((0..).map(|n| if n < 100 { n } else { n % 7 })), Some(106 + 256));
        assert_eq!(noticed((0..).map(|n| n % 65)), None);
        assert_eq!(noticed((0..).map(|n: u32| n.wrapping_mul(2_654_435_761) >> 24)), None);
    }
}
