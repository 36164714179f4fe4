//! Scores of a model: held-out requests through the agent's own loop, with real tools, against what the oracle does.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, anyhow};
use gatedelta_agent::engine::Engine;
use gatedelta_agent::parse::Call;
use gatedelta_agent::tools::Outcome;
use serde_json::{Value, json};

use crate::data::scene::{Maker, Number, Played};
use crate::data::{Group, Kind, Side};
use crate::turn::{self, Turn};

/// Tokens that an answer may have, calls included.
const MAX_TOKENS: usize = 1024;

/// How requests of one kind went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    pub requests: usize,
    /// All calls right, with right arguments, and no other.
    pub calls: usize,
    /// The answer holds what it must.
    pub answers: usize,
    /// Both.
    pub right: usize,
    /// Tokens of the last prompts, all together.
    pub prompt_tokens: usize,
}

impl std::ops::AddAssign for Score {
    fn add_assign(&mut self, other: Score) {
        self.requests += other.requests;
        self.calls += other.calls;
        self.answers += other.answers;
        self.right += other.right;
        self.prompt_tokens += other.prompt_tokens;
    }
}

/// Scores by kind, and what went wrong.
#[derive(Debug, Default)]
pub struct Report {
    pub scores: Vec<(Kind, Score)>,
    pub failures: Vec<String>,
}

/// Asks for `per_kind` held-out requests of each kind, with as many at once as there are engines; `each` hears of every request
/// that is done.
///
/// # Errors
/// If a request cannot be made. What goes wrong in an engine counts as a wrong answer.
pub fn run<E: Engine + Send>(
    engines: &mut [E],
    maker: &Maker<'_>,
    seed: u64,
    kinds: &[Kind],
    per_kind: u64,
    each: &(dyn Fn() + Sync),
) -> Result<Report> {
    let all: Vec<(Kind, u64)> = kinds.iter().flat_map(|&kind| (0..per_kind).map(move |index| (kind, index))).collect();
    // Each engine takes the next one when it is done.
    let next = AtomicUsize::new(0);
    let work = |engine: &mut E| -> Result<Vec<(usize, Score, Option<String>)>> {
        let mut done = Vec::new();
        while let at = next.fetch_add(1, Ordering::Relaxed)
            && let Some(&(kind, index)) = all.get(at)
        {
            let (score, failure) = ask(engine, maker, kind, Number { seed, side: Side::HeldOut, index })?;
            done.push((at, score, failure));
            each();
        }
        Ok(done)
    };
    let mut done = std::thread::scope(|scope| -> Result<Vec<_>> {
        let threads: Vec<_> = engines.iter_mut().map(|engine| scope.spawn(|| work(engine))).collect();
        let mut done = Vec::new();
        for thread in threads {
            done.extend(thread.join().map_err(|_| anyhow!("a thread of the evaluation ended early"))??);
        }
        Ok(done)
    })?;
    // The same report however many there were.
    done.sort_by_key(|(at, ..)| *at);
    let mut scores: Vec<(Kind, Score)> = kinds.iter().map(|&kind| (kind, Score::default())).collect();
    done.iter().for_each(|(at, score, _)| scores[at / per_kind as usize].1 += *score);
    Ok(Report { scores, failures: done.into_iter().filter_map(|(_, _, failure)| failure).collect() })
}

/// How one request went, and what was wrong if it was.
fn ask(engine: &mut dyn Engine, maker: &Maker<'_>, kind: Kind, number: Number) -> Result<(Score, Option<String>)> {
    let expected = maker.play(&maker.scene(kind, number)?)?;
    // The oracle has changed its world: the model gets one of its own.
    let scene = maker.scene(kind, number)?;
    let request = &scene.task.request;
    let found = turn::take(engine, &scene.world, &scene.history, request, MAX_TOKENS);
    let (score, why) = match &found {
        Ok(found) => {
            let why = told(&found.calls, &found.answer, &found.raw);
            (judge(&expected, found), format!("{why} ({})", found.reason.name()))
        }
        Err(why) => (Score { requests: 1, ..Score::default() }, format!("{why:#}")),
    };
    let failure = (score.right == 0).then(|| {
        let wanted = told(&expected.turn.calls, &expected.turn.answer, "");
        format!("{} {}: {request}\n  expected {wanted}\n  found    {why}", kind.name(), number.index)
    });
    Ok((score, failure))
}

fn told(calls: &[Call], answer: &str, raw: &str) -> String {
    let mut parts: Vec<String> = calls.iter().map(|call| format!("{} {}", call.name, json!(call.arguments))).collect();
    parts.push(format!("{:?}", if answer.is_empty() { raw } else { answer }));
    parts.join(", then ")
}

/// Compares what was found with what was expected.
pub fn judge(expected: &Played, found: &Turn) -> Score {
    let wanted = &expected.turn;
    let pairs = wanted.calls.iter().zip(&wanted.results).zip(found.calls.iter().zip(&found.results));
    let calls = wanted.calls.len() == found.calls.len()
        && pairs.into_iter().all(|((call, result), (other, found))| same(call, result, other, found));
    let answer = expected.must.iter().all(|must| holds(&found.answer, must));
    Score {
        requests: 1,
        calls: usize::from(calls),
        answers: usize::from(answer),
        right: usize::from(calls && answer),
        prompt_tokens: found.prompt_tokens,
    }
}

/// Whether two calls ask for the same. Expressions are the same if their values are.
fn same(a: &Call, of_a: &Outcome, b: &Call, of_b: &Outcome) -> bool {
    let value = a.name == "calculator" && of_a.ok && of_a == of_b;
    a.name == b.name && (value || tidy(a) == tidy(b))
}

/// The arguments without what makes no difference to the tool.
fn tidy(call: &Call) -> Value {
    let mut arguments = call.arguments.clone();
    for value in arguments.values_mut() {
        if let Some(text) = value.as_str() {
            *value = json!(text.trim());
        }
    }
    // The search is for small and capital letters alike.
    if arguments.get("action").is_some_and(|action| action == "search")
        && let Some(text) = arguments.get_mut("text")
    {
        *text = json!(text.as_str().unwrap_or_default().to_lowercase());
    }
    if let Some(path) = arguments.get_mut("path")
        && let Some(text) = path.as_str()
    {
        let text = text.trim_start_matches("./").trim_end_matches('/');
        *path = json!(if text == "." { "" } else { text });
    }
    let defaults = [("path", json!("")), ("start_line", json!(1)), ("time_zone", json!(""))];
    arguments.retain(|key, value| !defaults.iter().any(|(name, default)| key == name && value == default));
    // Their order makes no difference either.
    arguments.sort_keys();
    Value::Object(arguments)
}

/// Whether `answer` holds `must` as words of its own, whatever the case and the spaces: 12 is not in 312, nor in 12.5.
fn holds(answer: &str, must: &str) -> bool {
    let fold = |text: &str| text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
    let (answer, must) = (fold(answer), fold(must));
    let number = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    if must.is_empty() {
        return true;
    }
    // Overlapping places count too.
    answer.char_indices().filter(|&(at, _)| answer[at..].starts_with(&must)).any(|(at, _)| {
        let mut before = answer[..at].chars().rev();
        let mut after = answer[at + must.len()..].chars();
        let (last, next) = (before.next(), after.next());
        let joins = |c: Option<char>, edge: Option<char>| {
            edge.is_some_and(char::is_alphanumeric) && c.is_some_and(char::is_alphanumeric)
        };
        let begins = must.chars().next();
        let ends = must.chars().next_back();
        let fraction_before =
            number(begins) && (last == Some('-') || matches!(last, Some('.' | ',')) && number(before.next()));
        let fraction_after = number(ends) && matches!(next, Some('.' | ',' | ':')) && number(after.next());
        !joins(last, begins) && !joins(next, ends) && !fraction_before && !fraction_after
    })
}

impl Report {
    /// The scores of a group of kinds together.
    pub fn group(&self, group: Group) -> Score {
        let mut sum = Score::default();
        self.scores.iter().filter(|(kind, _)| kind.group() == group).for_each(|(_, score)| sum += *score);
        sum
    }

    /// The counts, and what went wrong, for other programs.
    pub fn to_json(&self) -> Value {
        let row = |(kind, score): &(Kind, Score)| {
            let Score { requests, calls, answers, right, prompt_tokens } = *score;
            json!({
                "kind": kind.name(), "group": kind.group().name(), "requests": requests, "right_calls": calls,
                "right_answers": answers, "both_right": right, "prompt_tokens": prompt_tokens,
            })
        };
        json!({"kinds": self.scores.iter().map(row).collect::<Vec<_>>(), "failures": self.failures})
    }
}

/// A table in Markdown.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |part: usize, of: usize| format!("{:.1} %", 100.0 * part as f64 / of.max(1) as f64);
        let row = |name: String, score: &Score| {
            let Score { requests, calls, answers, right, prompt_tokens } = *score;
            let mean = prompt_tokens / requests.max(1);
            [
                name,
                requests.to_string(),
                mean.to_string(),
                percent(calls, requests),
                percent(answers, requests),
                percent(right, requests),
            ]
        };
        let head = ["kind of request", "requests", "prompt tokens", "right calls", "right answers", "both right"];
        let mut rows = vec![head.map(str::to_string)];
        for group in Group::ALL {
            let of: Vec<_> = self.scores.iter().filter(|(kind, _)| kind.group() == group).collect();
            rows.extend(of.iter().map(|(kind, score)| row(kind.name(), score)));
            if of.len() > 1 {
                rows.push(row(format!("all {}", group.name()), &self.group(group)));
            }
        }
        let widths: Vec<usize> =
            (0..head.len()).map(|at| rows.iter().map(|row| row[at].len()).max().unwrap_or(0)).collect();
        for (at, row) in rows.iter().enumerate() {
            write!(f, "| {:<1$} |", row[0], widths[0])?;
            row.iter().zip(&widths).skip(1).try_for_each(|(cell, width)| write!(f, " {cell:>width$} |"))?;
            writeln!(f)?;
            if at == 0 {
                write!(f, "|-{:-<1$}-|", "", widths[0])?;
                widths[1..].iter().try_for_each(|width| write!(f, "-{:-<width$}:|", ""))?;
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
