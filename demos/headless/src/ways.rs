//! The ways through the operator that must all give the same answer: at once, in pieces, token by token, by verified drafts.

use std::ops::Range;

use gatedelta::backend::Backend;
use gatedelta::gdn::{self, Inputs, MAX_STEP_TOKENS, Outputs};
use gatedelta::shape::{Dtype, Shape};
use gatedelta::{Error, Result};

use crate::case::Case;
use crate::same;

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One chunked prefill.
    Prefill,
    /// Three prefills, each from the state that the last one left, cut inside chunks.
    Split,
    /// One token of every sequence at a time.
    Decode,
    /// Drafts of up to 16 tokens of which a changing number is accepted.
    Verify,
}

impl Way {
    /// All of them, simplest first.
    pub const ALL: [Way; 4] = [Way::Prefill, Way::Split, Way::Decode, Way::Verify];

    /// Its name in tables and reports.
    pub fn name(self) -> &'static str {
        match self {
            Way::Prefill => "prefill",
            Way::Split => "split",
            Way::Decode => "decode",
            Way::Verify => "verify",
        }
    }

    /// Computes the case this way `runs` times, a prefill twice at least: all must give the same bits.
    ///
    /// # Errors
    /// Whatever the library reports, an output of the wrong length, and a run that differs from the first.
    pub fn compute(self, backend: &dyn Backend, case: &Case, store: Dtype, runs: u32) -> anyhow::Result<Outputs> {
        let runs = if self == Way::Prefill { runs.max(2) } else { runs };
        same::repeated(
            runs,
            || Ok(self.once(backend, case, store)?),
            |out| vec![("o", bytemuck::cast_slice(&out.o)), ("ht", bytemuck::cast_slice(&out.ht))],
        )
    }

    fn once(self, backend: &dyn Backend, case: &Case, store: Dtype) -> Result<Outputs> {
        let mut walk = Walk::new(case, store);
        let lengths = walk.lengths();
        match self {
            Way::Prefill => {
                let all: Vec<_> = lengths.iter().map(|&len| 0..len).collect();
                walk.advance(&all, |inputs| gdn::prefill(backend, inputs))?;
            }
            Way::Split => {
                for part in 0..3 {
                    // Off by one, so that lengths which are a multiple of 48 are cut inside chunks too.
                    let cut = |len: usize, part: usize| if part == 3 { len } else { (len * part / 3 + part).min(len) };
                    let spans: Vec<_> = lengths.iter().map(|&len| cut(len, part)..cut(len, part + 1)).collect();
                    walk.advance(&spans, |inputs| gdn::prefill(backend, inputs))?;
                }
            }
            Way::Decode => {
                for t in 0..lengths.iter().copied().max().unwrap_or(0) {
                    let spans: Vec<_> = lengths.iter().map(|&len| t.min(len)..(t + 1).min(len)).collect();
                    walk.advance(&spans, |inputs| gdn::decode(backend, inputs))?;
                }
            }
            Way::Verify => {
                let mut done = vec![0; lengths.len()];
                for round in 0.. {
                    if done == lengths {
                        break;
                    }
                    let draft = MAX_STEP_TOKENS as usize;
                    let spans: Vec<_> = done.iter().zip(&lengths).map(|(&at, &len)| at..len.min(at + draft)).collect();
                    // Walks through 0 ..= 16, so that no, some and all tokens are accepted in turn.
                    let most = (round * 7 + 3) % (draft + 1);
                    let accepted: Vec<_> = spans.iter().map(|s| s.len().min(most) as u32).collect();
                    walk.advance(&spans, |inputs| gdn::verify(backend, inputs, &accepted))?;
                    done.iter_mut().zip(&accepted).for_each(|(done, &n)| *done += n as usize);
                }
            }
        }
        Ok(walk.finish())
    }
}

/// A case on its way: the outputs so far and the state to go on from.
struct Walk<'a> {
    case: &'a Case,
    store: Dtype,
    o: Vec<f32>,
    state: Option<Vec<f32>>,
}

impl<'a> Walk<'a> {
    fn new(case: &'a Case, store: Dtype) -> Self {
        Walk { case, store, o: vec![f32::NAN; case.v.len()], state: case.h0.clone() }
    }

    /// Tokens of each sequence.
    fn lengths(&self) -> Vec<usize> {
        self.case.shape.cu_seqlens().windows(2).map(|w| (w[1] - w[0]) as usize).collect()
    }

    /// Calls the operator on the span of tokens of each sequence, counted from its first, and keeps what comes back.
    fn advance(&mut self, spans: &[Range<usize>], call: impl Fn(&Inputs<'_>) -> Result<Outputs>) -> Result<()> {
        let (case, heads) = (self.case, self.case.shape.heads);
        let starts = case.shape.cu_seqlens();
        let tokens: Vec<usize> =
            spans.iter().zip(starts).flat_map(|(span, &start)| span.clone().map(move |t| start as usize + t)).collect();
        let mut cu = vec![0];
        for span in spans {
            cu.push(cu[cu.len() - 1] + span.len() as u64);
        }
        let pick = |rows: &[f32], width: u32| -> Vec<f32> {
            let width = width as usize;
            tokens.iter().flat_map(|&t| rows[t * width..(t + 1) * width].iter().copied()).collect()
        };
        let (q, k) = (pick(&case.q, heads.hk * heads.k), pick(&case.k, heads.hk * heads.k));
        let v = pick(&case.v, heads.hv * heads.v);
        let (g, beta) = (pick(&case.g, heads.hv), pick(&case.beta, heads.hv));
        let out = call(&Inputs {
            shape: Shape::new(heads, cu)?,
            q: &q,
            k: &k,
            v: &v,
            g: &g,
            beta: &beta,
            h0: self.state.as_deref(),
            options: case.options(self.store),
        })?;
        let state_len = case.shape.sequences() * heads.state_len() as usize;
        for (what, found, expected) in [("o", out.o.len(), v.len()), ("ht", out.ht.len(), state_len)] {
            if found != expected {
                return Err(Error::argument(what, format!("{found} numbers"), expected));
            }
        }
        let width = (heads.hv * heads.v) as usize;
        for (&t, row) in tokens.iter().zip(out.o.chunks_exact(width)) {
            self.o[t * width..(t + 1) * width].copy_from_slice(row);
        }
        self.state = Some(out.ht);
        Ok(())
    }

    fn finish(self) -> Outputs {
        let zeros = || vec![0.0; self.case.shape.sequences() * self.case.shape.heads.state_len() as usize];
        Outputs { o: self.o, ht: self.state.unwrap_or_else(zeros) }
    }
}
