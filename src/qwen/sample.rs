//! From logits to a token: penalties, temperature, top-k, top-p, min-p, and the random numbers behind them.

use crate::error::{Error, Result};

/// How a token is drawn from its logits. The filters apply in the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Subtracted from the logit of every id that the answer already holds; -2 to 2.
    pub presence_penalty: f32,
    /// Divides the logits; 0 takes the largest instead of drawing.
    pub temperature: f32,
    /// Keeps the k largest; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of largest probabilities that sums to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keeps probabilities of at least this share of the largest; 0 keeps all.
    pub min_p: f32,
}

impl Default for Sampling {
    /// What Qwen recommends for answers without thinking, short of its presence penalty.
    fn default() -> Self {
        Sampling { presence_penalty: 0.0, temperature: 0.7, top_k: 20, top_p: 0.8, min_p: 0.0 }
    }
}

impl Sampling {
    /// Always the largest logit.
    pub const GREEDY: Sampling = Sampling { presence_penalty: 0.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// True if the token is the largest logit, whatever the seed.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.presence_penalty == 0.0
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the field.
    pub fn check(&self) -> Result<()> {
        for (what, n, low, high) in [
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
        ] {
            if !(low..=high).contains(&n) {
                return Err(Error::argument(what, n, format!("{low} to {high}")));
            }
        }
        Ok(())
    }
}

/// Draws the tokens of one answer. The same seed, options and logits give the same tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
    /// Ids of the answer so far, ascending, each once.
    seen: Vec<u32>,
    /// Candidates, kept from call to call for their memory.
    kept: Vec<(f32, u32)>,
}

impl Clone for Sampler {
    /// What matters for the tokens to come; the memory of the candidates does not.
    fn clone(&self) -> Self {
        let Sampler { sampling, random, seen, .. } = self;
        Sampler { sampling: *sampling, random: random.clone(), seen: seen.clone(), kept: Vec::new() }
    }
}

impl Sampler {
    /// A sampler at the start of an answer.
    ///
    /// # Errors
    /// As [`Sampling::check`].
    pub fn new(sampling: Sampling, seed: u64) -> Result<Self> {
        sampling.check()?;
        Ok(Sampler { sampling, random: SplitMix64::new(seed), seen: Vec::new(), kept: Vec::new() })
    }

    /// One in the middle of an answer; `seen` ascends.
    #[cfg(feature = "store")]
    pub(crate) fn from_parts(sampling: Sampling, random: SplitMix64, seen: Vec<u32>) -> Self {
        Sampler { sampling, random, seen, kept: Vec::new() }
    }

    /// Its random numbers, and the ids of the answer so far.
    #[cfg(feature = "store")]
    pub(crate) fn parts(&self) -> (&SplitMix64, &[u32]) {
        (&self.random, &self.seen)
    }

    /// The options.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Counts `id` as a part of the answer, for the presence penalty.
    pub fn accept(&mut self, id: u32) {
        if let Err(at) = self.seen.binary_search(&id) {
            self.seen.insert(at, id);
        }
    }

    /// Draws the next id from the logits `[vocab]`. Minus infinity forbids an id.
    ///
    /// # Errors
    /// [`Error::Argument`] if a logit is NaN or plus infinity, if all are forbidden or if there are none.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(i) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(Error::argument(format!("logits[{i}]"), logits[i], "finite, or minus infinity"));
        }
        let s = self.sampling;
        self.kept.clear();
        self.kept.extend(logits.iter().zip(0u32..).filter(|(l, _)| **l > f32::NEG_INFINITY).map(|(l, i)| (*l, i)));
        for id in &self.seen {
            // Ids ascend in both lists; nothing was dropped from `kept` in the usual case.
            if let Ok(at) = self.kept.binary_search_by_key(id, |c| c.1) {
                self.kept[at].0 -= s.presence_penalty;
            }
        }
        let best = self.kept.iter().copied().reduce(|a, b| if b.0 > a.0 { b } else { a });
        let Some((top, best)) = best else {
            return Err(Error::argument("logits", format!("{} forbidden", logits.len()), "at least one finite"));
        };
        if s.temperature == 0.0 {
            return Ok(best);
        }

        // Larger first; the smaller id first among equals, so that ties do not depend on the sort.
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let k = s.top_k as usize;
        if k > 0 && k < self.kept.len() {
            self.kept.select_nth_unstable_by(k - 1, order);
            self.kept.truncate(k);
        }
        // Unnormalised probabilities: the largest is 1.
        for c in &mut self.kept {
            c.0 = ((c.0 - top) / s.temperature).exp();
        }
        if s.top_p < 1.0 {
            self.kept.sort_unstable_by(order);
            let enough = s.top_p as f64 * self.kept.iter().map(|c| c.0 as f64).sum::<f64>();
            let mut sum = 0.0;
            // The entry that reaches the sum stays, so at least one does.
            let last = self.kept.iter().position(|c| {
                sum += c.0 as f64;
                sum >= enough
            });
            self.kept.truncate(last.map_or(self.kept.len(), |i| i + 1));
        }
        self.kept.retain(|c| c.0 >= s.min_p);
        if s.top_p == 1.0 {
            self.kept.sort_unstable_by_key(|c| c.1);
        }
        let total: f64 = self.kept.iter().map(|c| c.0 as f64).sum();
        let mut left = self.random.unit() * total;
        for c in &self.kept {
            left -= c.0 as f64;
            if left < 0.0 {
                return Ok(c.1);
            }
        }
        // Rounding may leave a crumb at the end of the sum.
        Ok(self.kept.last().map_or(best, |c| c.1))
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): a counter through a mixing function.
///
/// Equidistributed over its period of 2^64 and cheap to start at any position; not for secrets.
#[derive(Debug, Clone)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        SplitMix64 { state: seed }
    }

    /// What [`SplitMix64::new`] makes the rest of the stream of.
    #[cfg(feature = "store")]
    pub(crate) fn state(&self) -> u64 {
        self.state
    }

    /// The same stream, `n` numbers further on.
    pub fn skip(&self, n: u64) -> Self {
        SplitMix64 { state: self.state.wrapping_add(n.wrapping_mul(Self::STEP)) }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(Self::STEP);
        let z = self.state;
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}
