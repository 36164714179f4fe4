//! What a store knows of a snapshot, as bytes. Numbers are little-endian; lengths are compared with what is there, never believed.

use rayon::prelude::*;

use crate::qwen::generate::Answer;
use crate::qwen::sample::{Sampler, Sampling, SplitMix64};
use crate::qwen::state::history::Run;

/// What is kept of a snapshot beside its numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Of all that makes the snapshot what it is; the name of its files.
    pub id: u128,
    /// Of the model's shape, its weights, the type of its cache and the version of the format.
    pub model: u128,
    /// Of the device whose rounding is in the numbers.
    pub device: u128,
    /// The snapshot whose keys and values come before its own; 0 where they begin at position 0.
    pub parent: u128,
    /// Position where its own keys and values begin: the parent's end.
    pub begin: u64,
    /// Its ids from there on.
    pub ids: Vec<u32>,
    /// All pieces from position 0 on.
    pub runs: Vec<Run>,
    /// Bytes and sum of its keys and values.
    pub rows: Sum,
    /// Bytes and sum of its states and tails.
    pub state: Sum,
    /// The answer under way, as [`put_answer`] writes it; empty for none.
    pub answer: Vec<u8>,
}

/// Length and checksum of a run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub bytes: u64,
    pub hash: u128,
}

pub(super) fn hash(bytes: &[u8]) -> u128 {
    twox_hash::XxHash3_128::oneshot(bytes)
}

impl Sum {
    /// Blocks are summed in parallel, and then their sums.
    pub fn of(bytes: &[u8]) -> Sum {
        let blocks: Vec<u128> = bytes.par_chunks(BLOCK as usize).map(hash).collect();
        Sum::of_blocks(bytes.len() as u64, &blocks)
    }

    /// The same from the hashes of the blocks.
    pub fn of_blocks(bytes: u64, blocks: &[u128]) -> Sum {
        let all: Vec<[u8; 16]> = blocks.iter().map(|sum| sum.to_le_bytes()).collect();
        Sum { bytes, hash: hash(all.as_flattened()) }
    }
}

/// A part of the format: other blocks are other sums.
pub(super) const BLOCK: u64 = 4 << 20;

impl Record {
    /// Its position: the number of its tokens.
    pub fn end(&self) -> u64 {
        self.begin + self.ids.len() as u64
    }

    /// How many bytes [`Record::encode`] gives.
    pub fn encoded(&self) -> u64 {
        6 * 16 + 6 * 8 + 4 * self.ids.len() as u64 + 8 * self.runs.len() as u64 + self.answer.len() as u64 + 16
    }

    /// The bytes, their own checksum last.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for n in [self.id, self.model, self.device, self.parent, self.rows.hash, self.state.hash] {
            out.extend(n.to_le_bytes());
        }
        for n in [self.begin, self.rows.bytes, self.state.bytes] {
            out.extend(n.to_le_bytes());
        }
        for n in [self.ids.len(), self.runs.len(), self.answer.len()] {
            out.extend((n as u64).to_le_bytes());
        }
        self.ids.iter().for_each(|id| out.extend(id.to_le_bytes()));
        for run in &self.runs {
            out.extend(run.tokens.to_le_bytes());
            out.extend(run.pieces.to_le_bytes());
        }
        out.extend(&self.answer);
        let sum = hash(&out);
        out.extend(sum.to_le_bytes());
        debug_assert_eq!(out.len() as u64, self.encoded());
        out
    }

    /// Reads what [`Record::encode`] wrote; none if a bit is wrong.
    pub fn decode(bytes: &[u8]) -> Option<Record> {
        let (body, sum) = bytes.split_last_chunk::<16>()?;
        if hash(body) != u128::from_le_bytes(*sum) {
            return None;
        }
        let mut r = Reader(body);
        let [id, model, device, parent, rows_hash, state_hash] = r.array(Reader::u128)?;
        let [begin, rows_bytes, state_bytes] = r.array(Reader::u64)?;
        let [ids, runs, answer] = r.array(Reader::u64)?;
        let ids = r.list(ids, 4, Reader::u32)?;
        let runs = r.list(runs, 8, |r| Some(Run { tokens: r.u32()?, pieces: r.u32()? }))?;
        let answer = r.take(usize::try_from(answer).ok()?)?.to_vec();
        begin.checked_add(ids.len() as u64)?;
        let rows = Sum { bytes: rows_bytes, hash: rows_hash };
        let state = Sum { bytes: state_bytes, hash: state_hash };
        r.0.is_empty().then_some(Record { id, model, device, parent, begin, ids, runs, rows, state, answer })
    }
}

/// An answer under way as bytes.
pub(super) fn put_answer(answer: Option<&Answer>) -> Vec<u8> {
    let mut out = Vec::new();
    let Some(a) = answer else { return out };
    let s = a.sampler.sampling();
    let (random, seen) = a.sampler.parts();
    for n in [s.presence_penalty, s.temperature, s.top_p, s.min_p] {
        out.extend(n.to_bits().to_le_bytes());
    }
    for n in [s.top_k, u32::from(a.next.is_some()), a.next.unwrap_or(0)] {
        out.extend(n.to_le_bytes());
    }
    for n in [random.state(), a.begin, a.given, seen.len() as u64] {
        out.extend(n.to_le_bytes());
    }
    seen.iter().for_each(|id| out.extend(id.to_le_bytes()));
    out
}

/// Reads what [`put_answer`] wrote: none if it does not hold together, none inside for no answer.
pub(super) fn get_answer(bytes: &[u8], position: u64) -> Option<Option<Answer>> {
    if bytes.is_empty() {
        return Some(None);
    }
    let mut r = Reader(bytes);
    let [presence_penalty, temperature, top_p, min_p] = r.array(|r| r.u32().map(f32::from_bits))?;
    let [top_k, has_next, next] = r.array(Reader::u32)?;
    let [random, begin, given, seen] = r.array(Reader::u64)?;
    let seen = r.list(seen, 4, Reader::u32)?;
    let sampling = Sampling { presence_penalty, temperature, top_k, top_p, min_p };
    let ascending = seen.windows(2).all(|w| w[0] < w[1]);
    let (flag, written) = (has_next == 1 || has_next == 0 && next == 0, position.checked_sub(begin)?);
    if !r.0.is_empty() || sampling.check().is_err() || !ascending || !flag || given.saturating_sub(1) > written {
        return None;
    }
    let sampler = Sampler::from_parts(sampling, SplitMix64::new(random), seen);
    Some(Some(Answer { sampler, next: (has_next == 1).then_some(next), begin, given }))
}

/// Takes numbers from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn u128(&mut self) -> Option<u128> {
        Some(u128::from_le_bytes(self.take(16)?.try_into().ok()?))
    }

    fn array<T: Default + Copy, const N: usize>(&mut self, each: impl Fn(&mut Self) -> Option<T>) -> Option<[T; N]> {
        let mut out = [T::default(); N];
        for slot in &mut out {
            *slot = each(self)?;
        }
        Some(out)
    }

    /// `n` items of `size` bytes, if so many are there.
    fn list<T>(&mut self, n: u64, size: usize, each: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let bytes = usize::try_from(n).ok()?.checked_mul(size)?;
        let mut inner = Reader(self.take(bytes)?);
        (0..n).map(|_| each(&mut inner)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> Record {
        Record {
            id: 1,
            model: 2 << 100,
            device: 3,
            parent: 4,
            begin: 5,
            ids: vec![6, 7, 8],
            runs: vec![Run { tokens: 4, pieces: 2 }],
            rows: Sum::of(b"rows"),
            state: Sum::of(b"state"),
            answer: vec![9; 5],
        }
    }

    #[test]
    fn a_record_comes_back_and_a_wrong_bit_is_seen() {
        let bytes = record().encode();
        assert_eq!(Record::decode(&bytes), Some(record()));
        for i in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[i / 8] ^= 1 << (i % 8);
            assert_eq!(Record::decode(&bytes), None, "bit {i}");
        }
        for n in 0..bytes.len() {
            assert_eq!(Record::decode(&bytes[..n]), None);
        }
    }

    /// An answer is read as it was written or not at all, wherever the record says that it ends.
    #[test]
    fn an_answer_that_would_be_written_otherwise_is_refused() {
        let sampler = Sampler::from_parts(Sampling::default(), SplitMix64::new(1), vec![2]);
        let bytes = put_answer(Some(&Answer { sampler, next: None, begin: 3, given: 2 }));
        assert!(get_answer(&bytes, u64::MAX).is_some() && get_answer(&bytes, 2).is_none());
        // Whether there is a next token, and which.
        for (at, value) in [(20, 2u32), (20, u32::MAX), (24, 7)] {
            let mut bytes = bytes.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert!(get_answer(&bytes, 9).is_none(), "{value} at {at}");
        }
    }

    proptest! {
        #[test]
        fn anything_else_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..300), lies in any::<u64>()) {
            prop_assert_eq!(Record::decode(&bytes), None);
            get_answer(&bytes, 10);
            // Lengths that lie under a checksum that holds.
            bytes.resize(200, 0);
            bytes[120..128].copy_from_slice(&lies.to_le_bytes());
            let sum = hash(&bytes);
            bytes.extend(sum.to_le_bytes());
            Record::decode(&bytes);
        }

        #[test]
        fn an_answer_comes_back(next in prop::option::of(0u32..9), random in any::<u64>(), seen in 0u32..5) {
            let sampler = Sampler::from_parts(Sampling::default(), SplitMix64::new(random), (0..seen).collect());
            let bytes = put_answer(Some(&Answer { sampler, next, begin: 3, given: 2 }));
            let back = get_answer(&bytes, 5).unwrap().unwrap();
            prop_assert_eq!(put_answer(Some(&back)), bytes.clone());
            prop_assert!(get_answer(&bytes, 2).is_none() && get_answer(&bytes[1..], 5).is_none());
        }
    }
}
