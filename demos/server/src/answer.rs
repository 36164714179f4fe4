//! One answer in the making: logits in, tokens and text out.

use gatedelta::Result;
use gatedelta::qwen::{Sampler, TextStream, Tokenizer};

use crate::request::Settings;

/// Draws the tokens of an answer and turns them into text.
pub struct Writer {
    sampler: Sampler,
    text: TextStream,
    stops: Stops,
    settings: Settings,
    /// Ids that end the answer.
    ends: Vec<u32>,
    /// Beginnings of which the answer has to take one, as far as they agree with what it has.
    forced: Vec<Vec<u32>>,
    /// Tokens drawn, an end among them.
    drawn: usize,
    /// Tokens given out.
    given: u64,
}

/// A token with its log-probability.
#[derive(Debug, Clone, PartialEq)]
pub struct Likely {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability at temperature 1.
    pub logprob: f64,
}

/// What a draw gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// The token; none if it was one that ends the answer.
    pub token: Option<u32>,
    /// Text that is certain now.
    pub text: String,
    /// The log-probabilities of the token and of the likeliest, if they were asked for.
    pub logprobs: Option<(Likely, Vec<Likely>)>,
    /// Set where the answer is over.
    pub end: Option<End>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Model,
    /// A text of `stop` came up.
    Stop(String),
    /// So many tokens were asked for.
    Tokens,
    /// The context is full.
    Context,
    /// Its time is over.
    Time,
    /// The server stops.
    Shutdown,
}

impl End {
    /// `finish_reason`, short of tool calls.
    pub fn reason(&self) -> &'static str {
        match self {
            End::Model | End::Stop(_) => "stop",
            End::Tokens | End::Context | End::Time | End::Shutdown => "length",
        }
    }

    /// What exactly: the text of `stop`, or the limit.
    pub fn detail(&self) -> Option<&str> {
        match self {
            End::Model => None,
            End::Stop(text) => Some(text),
            End::Tokens => Some("max_tokens"),
            End::Context => Some("context"),
            End::Time => Some("time_limit"),
            End::Shutdown => Some("shutdown"),
        }
    }
}

impl Writer {
    /// An answer that begins with one of `forced`, if there are any.
    ///
    /// # Errors
    /// For settings out of range.
    pub fn new(tokenizer: &Tokenizer, settings: Settings, ends: Vec<u32>, forced: Vec<Vec<u32>>) -> Result<Writer> {
        Ok(Writer {
            sampler: Sampler::new(settings.sampling, settings.seed)?,
            text: tokenizer.stream(false),
            stops: Stops { stops: settings.stop.clone(), held: String::new() },
            settings,
            ends,
            forced,
            drawn: 0,
            given: 0,
        })
    }

    /// Tokens given out.
    pub fn given(&self) -> u64 {
        self.given
    }

    /// Draws the token after those whose logits these are.
    ///
    /// # Errors
    /// For logits that are no numbers.
    pub fn draw(&mut self, mut logits: Vec<f32>) -> Result<Drawn> {
        // Those of the model itself, before anything is forbidden or favoured.
        let raw = self.settings.logprobs.map(|top| (top, logits.clone()));
        for (id, bias) in &self.settings.bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        self.constrain(&mut logits);
        let id = self.sampler.sample(&logits)?;
        self.sampler.accept(id);
        self.drawn += 1;
        self.forced.retain(|ids| ids.get(self.drawn - 1) == Some(&id));
        if !self.settings.ignore_eos && self.ends.contains(&id) {
            let text = self.finish();
            return Ok(Drawn { token: None, text, logprobs: None, end: Some(End::Model) });
        }
        self.given += 1;
        // A vocabulary is often padded: a drawn id may have no token, and then no text.
        let piece = self.text.push(id).unwrap_or_default();
        let (mut text, stop) = self.stops.push(&piece);
        let mut end = stop.map(End::Stop);
        if end.is_none() && self.given >= self.settings.max_tokens {
            text += &self.finish();
            end = Some(End::Tokens);
        }
        let logprobs = raw.map(|(top, logits)| {
            let sum = log_sum(&logits);
            let of = |id: u32| Likely { id, logprob: f64::from(logits[id as usize]) - sum };
            (of(id), likeliest(&logits, top).into_iter().map(of).collect())
        });
        Ok(Drawn { token: Some(id), text, logprobs, end })
    }

    /// What is left of the text when nothing follows.
    pub fn finish(&mut self) -> String {
        let rest = self.text.finish();
        let (mut text, _) = self.stops.push(&rest);
        text += &std::mem::take(&mut self.stops.held);
        text
    }

    /// Forbids all tokens but those with which a forced beginning goes on.
    fn constrain(&self, logits: &mut [f32]) {
        let allowed: Vec<u32> = self.forced.iter().filter_map(|ids| ids.get(self.drawn).copied()).collect();
        if !allowed.is_empty() {
            for (logit, id) in logits.iter_mut().zip(0u32..) {
                if !allowed.contains(&id) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// `ln sum exp(logits)`
fn log_sum(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + logits.iter().map(|l| (f64::from(*l) - top).exp()).sum::<f64>().ln()
}

/// The ids of the `n` largest, largest first; the smaller id first among equals.
fn likeliest(logits: &[f32], n: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let n = n.min(ids.len());
    if n == 0 {
        return Vec::new();
    }
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

/// Watches a text for the first of several others.
struct Stops {
    stops: Vec<String>,
    /// What may be the beginning of one.
    held: String,
}

impl Stops {
    /// Takes the next piece; what is certain not to be part of a stop, and the stop that was found.
    fn push(&mut self, piece: &str) -> (String, Option<String>) {
        if self.stops.is_empty() {
            return (piece.to_string(), None);
        }
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            let (text, stop) = (self.held[..at].to_string(), stop.clone());
            self.held.clear();
            return (text, Some(stop));
        }
        let begins = |text: &str| self.stops.iter().any(|stop| stop.starts_with(text));
        let at = self.held.char_indices().map(|(at, _)| at).find(|at| begins(&self.held[*at..]));
        let rest = self.held.split_off(at.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, rest), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(stops: &[&str], pieces: &[&str]) -> (String, Option<String>, String) {
        let mut watch = Stops { stops: stops.iter().map(|s| s.to_string()).collect(), held: String::new() };
        let mut out = String::new();
        for piece in pieces {
            let (text, found) = watch.push(piece);
            out += &text;
            if found.is_some() {
                return (out, found, watch.held);
            }
        }
        (out, None, watch.held)
    }

    #[test]
    fn a_stop_is_found_however_the_text_is_cut() {
        for cut in [1, 2, 3, 5, 30] {
            let text = "one tw two té three";
            let pieces: Vec<String> =
                text.chars().collect::<Vec<_>>().chunks(cut).map(|c| c.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            assert_eq!(stops(&["two"], &pieces), ("one tw ".into(), Some("two".into()), String::new()));
            assert_eq!(stops(&["three", "é t"], &pieces).0, "one tw two t");
            let (out, found, held) = stops(&["threee", "absent"], &pieces);
            assert_eq!((out + &held, found), (text.to_string(), None));
        }
        assert_eq!(stops(&["ab", "b"], &["ab"]), (String::new(), Some("ab".into()), String::new()));
        assert_eq!(stops(&["aab"], &["aaab"]), ("a".into(), Some("aab".into()), String::new()));
    }

    #[test]
    fn the_likeliest_and_their_sum() {
        let logits = [0.0, 2.0, -1.0, 2.0];
        assert_eq!(likeliest(&logits, 3), [1, 3, 0]);
        assert_eq!(likeliest(&logits, 9), [1, 3, 0, 2]);
        assert!(likeliest(&logits, 0).is_empty());
        let expected = (1.0 + 2.0 * 2f64.exp() + (-1f64).exp()).ln();
        assert!((log_sum(&logits) - expected).abs() < 1e-12);
        assert!((log_sum(&[900.0, 900.0]) - 900.0 - 2f64.ln()).abs() < 1e-9);
    }
}
