//! The tokens of a sequence, and the pieces in which they were read.
//!
//! Sums of floating-point numbers depend on their order, so the same tokens read in other pieces give other last bits. What is
//! to be read again bit by bit is read again in the same pieces: that is why they are remembered.

use std::ops::Range;

/// Tokens and pieces so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct History {
    ids: Vec<u32>,
    /// Pieces in order, equal neighbours as one run; their tokens add up to those of `ids`.
    runs: Vec<Run>,
}

/// Pieces of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Tokens of a piece, at least 1.
    pub tokens: u32,
    /// How many pieces, at least 1.
    pub pieces: u32,
}

impl History {
    /// Puts a history together; none if the runs do not add up to the ids.
    #[cfg(feature = "store")]
    pub fn from_parts(ids: Vec<u32>, runs: Vec<Run>) -> Option<History> {
        let whole = |r: &Run| r.tokens > 0 && r.pieces > 0;
        let total = runs.iter().try_fold(0u64, |sum, r| sum.checked_add(r.tokens as u64 * r.pieces as u64));
        let merged = runs.windows(2).all(|w| w[0].tokens != w[1].tokens);
        (runs.iter().all(whole) && merged && total == Some(ids.len() as u64)).then_some(History { ids, runs })
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    #[cfg(feature = "store")]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The number of tokens.
    pub fn len(&self) -> u64 {
        self.ids.len() as u64
    }

    pub fn clear(&mut self) {
        self.ids.clear();
        self.runs.clear();
    }

    /// Appends a piece.
    pub fn push(&mut self, piece: &[u32]) {
        let tokens = piece.len() as u32;
        if tokens == 0 {
            return;
        }
        self.ids.extend_from_slice(piece);
        match self.runs.last_mut() {
            Some(run) if run.tokens == tokens && run.pieces < u32::MAX => run.pieces += 1,
            _ => self.runs.push(Run { tokens, pieces: 1 }),
        }
    }

    /// The first `n` tokens; a piece that goes beyond them is cut there.
    pub fn truncated(&self, n: u64) -> History {
        let mut out = History::default();
        for piece in self.pieces(0..n) {
            out.push(&self.ids[piece]);
        }
        out
    }

    /// The tokens of every piece of the positions `range`, as ranges of ids; pieces that cross its ends are cut there.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Range<usize>> {
        let (from, to) = (range.start as usize, (range.end as usize).min(self.ids.len()));
        let lengths = self.runs.iter().flat_map(|r| std::iter::repeat_n(r.tokens as usize, r.pieces as usize));
        let ranges = lengths.scan(0, |at, n| {
            let begin = *at;
            *at += n;
            Some(begin..*at)
        });
        let inside = ranges.skip_while(move |r| r.end <= from).take_while(move |r| r.start < to);
        inside.map(move |r| r.start.max(from)..r.end.min(to))
    }

    /// True if these are the first tokens of `longer`, read in the same pieces.
    pub fn begins(&self, longer: &History) -> bool {
        if !longer.ids.starts_with(&self.ids) {
            return false;
        }
        // Only the last run may go on.
        self.runs.iter().enumerate().all(|(i, run)| {
            let last = i + 1 == self.runs.len();
            let same = |other: &Run| run.pieces == other.pieces || last && run.pieces < other.pieces;
            longer.runs.get(i).is_some_and(|other| other.tokens == run.tokens && same(other))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(pieces: &[usize]) -> History {
        let mut out = History::default();
        for n in pieces {
            let at = out.ids.len() as u32;
            out.push(&(at..at + *n as u32).collect::<Vec<_>>());
        }
        out
    }

    fn pieces(h: &History, range: Range<u64>) -> Vec<usize> {
        h.pieces(range).map(|r| r.len()).collect()
    }

    #[test]
    fn pieces_come_back_as_they_went_in() {
        let h = history(&[5, 5, 3, 1, 1, 1, 4]);
        assert_eq!(h.runs.len(), 4);
        assert_eq!(pieces(&h, 0..20), [5, 5, 3, 1, 1, 1, 4]);
        assert_eq!(pieces(&h, 5..14), [5, 3, 1]);
        assert_eq!(pieces(&h, 7..12), [3, 2]);
        assert_eq!(pieces(&h, 20..20), [0; 0]);
        assert_eq!(pieces(&h, 0..99), pieces(&h, 0..20));
        assert_eq!(h.truncated(12), history(&[5, 5, 2]));
        assert_eq!(h.truncated(0), History::default());
    }

    #[test]
    fn a_beginning_has_the_same_tokens_in_the_same_pieces() {
        let h = history(&[5, 5, 3, 1, 1, 1, 4]);
        for n in [0, 5, 10, 13, 14, 15, 16, 20] {
            assert!(h.truncated(n).begins(&h), "{n}");
        }
        for n in [3, 12, 17] {
            assert!(!h.truncated(n).begins(&h), "{n}");
        }
        assert!(!history(&[10]).begins(&h) && !history(&[5, 5, 5]).begins(&h) && !h.begins(&h.truncated(19)));
        let mut other = history(&[5]);
        other.ids[0] = 9;
        assert!(!other.begins(&h));
    }
}
