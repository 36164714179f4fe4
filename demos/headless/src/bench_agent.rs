//! A long conversation as the agent holds it: one session with a cache of snapshots, and turns that are appended. Each turn is
//! a question, a call that the model writes, a tool's result and an answer that the model writes; ids and weights mean nothing.
//!
//! Measured are the two prompts of each turn, from asking for the whole conversation to the first token: what was restored, what
//! was read, what was read again, and the time of both kinds of layers. To tell those apart the backend waits after each run of
//! layers of one kind. On the CPU, where each launch is waited for anyway, that costs nothing; on a GPU the waits are in the
//! rest, and the layers are timed by the device's own clock where it has one. Answers are written without it.
//!
//! The memory is what the backend has handed out and somebody still holds, not what a plan says.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gatedelta::backend::Backend;
use gatedelta::device::Account;
use gatedelta::qwen::{Cache, Config, Event, Finish, GenerateOptions, LayerKind, Model, Restored, Sampling, Session};
use gatedelta::tune::Kind;
use serde_json::json;

use crate::bench::print_json;
use crate::bench_model::Which;
use crate::observe::{Held, Look, Observed};
use crate::oracle::Random;
use crate::plot::{self, Panel, smooth};
use crate::say;
use crate::table::{Table, bytes, significant, verdict};

/// Device memory for snapshots, as the agent takes by default.
const SNAPSHOTS: u64 = 512 << 20;

/// By so much may the linear layers' share grow.
const BOUND: f64 = 0.2;

/// Turns at either end whose fastest are compared.
const WINDOW: usize = 10;

/// What was asked for.
pub struct Args<'a> {
    /// Turns.
    pub turns: u64,
    /// Tokens of all of them, system part included.
    pub length: u64,
    /// Where the picture goes.
    pub plot: &'a Path,
    /// JSON instead of tables.
    pub json: bool,
}

/// Tokens of the parts of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    /// Before the first turn.
    system: u64,
    question: u64,
    call: u64,
    result: u64,
    answer: u64,
}

/// One prompt, up to its first token. Times in seconds.
#[derive(Debug, Clone, Copy)]
struct Prompt {
    /// Tokens that needed no reading.
    restored: u64,
    read: u64,
    /// Of those read, how many had been read before.
    again: u64,
    first: f64,
    linear: f64,
    full: f64,
    /// For each token written after the first.
    write: f64,
}

/// A turn, and what memory is in use after it.
#[derive(Debug, Clone, Copy)]
struct Turn {
    question: Prompt,
    result: Prompt,
    /// Tokens read so far.
    position: u64,
    held: Held,
    snapshots: u64,
}

/// What became of the claim about memory.
struct Memory {
    /// Bytes of keys and values of a token.
    predicted: u64,
    /// The same, from what is in use for a conversation that fills its context.
    measured: f64,
    /// States and tails of the session.
    states: u64,
    /// All else that grew since the second turn.
    grown: i128,
    holds: bool,
}

/// Holds the conversation, plots and reports it; true if nothing was read twice and memory grew as it should. Times are
/// reported and judged, and fail nothing: they depend on what else the machine does.
///
/// # Errors
/// Turns that do not fit the length, a model that does not exist or fit, a picture that cannot be written, whatever the device
/// reports.
pub fn run(backend: &Arc<dyn Backend>, account: &Account, which: &Which, args: &Args<'_>) -> Result<bool> {
    let parts = Parts::new(args.length, args.turns)?;
    let unwritable = || format!("--plot {}: cannot be written", args.plot.display());
    // Better now than when everything has been measured.
    std::fs::write(args.plot, "").with_context(unwritable)?;
    let config = which.config()?;
    let observed = Observed::new(backend.clone(), &config.layers);
    let (model, name) = which.load(observed.clone(), args.length)?;
    let mut talk = Talk::new(&model, &observed, parts)?;
    let (begin, shown) = (Instant::now(), std::io::stderr().is_terminal());
    for i in 1..=args.turns {
        talk.turn()?;
        if shown {
            eprint!("\rturn {i} of {}, {} s", args.turns, begin.elapsed().as_secs());
        }
    }
    if shown {
        eprintln!();
    }
    let back = talk.come_back()?;
    let memory = talk.memory(&config)?;
    let turns = &talk.turns;
    let again: u64 = turns.iter().flat_map(|t| [t.question.again, t.result.again]).sum();
    let longest = (backend.caps().kind != Kind::Cpu).then_some(talk.longest.as_secs_f64());
    let (question, result) = (change(turns, |t| t.question.linear), change(turns, |t| t.result.linear));
    let title = format!("A conversation of {} tokens in {} turns ({name})", args.length, args.turns);
    let panels = panels(&talk, memory.predicted);
    let picture = plot::svg(&title, &panels).map_err(anyhow::Error::from_boxed).context("the plot")?;
    std::fs::write(args.plot, picture).with_context(unwritable)?;
    let right = again == 0 && memory.holds;
    if args.json {
        for (i, turn) in turns.iter().enumerate() {
            print_json(turn_json(i + 1, turn));
        }
        print_json(json!({
            "bench": "agent", "model": name, "device": backend.caps().name, "turns": args.turns, "tokens": args.length,
            "read_again": again, "linear_question_change": question, "linear_result_change": result,
            "kv_bytes_per_token_predicted": memory.predicted, "kv_bytes_per_token": memory.measured,
            "state_bytes": memory.states, "other_growth_bytes": memory.grown, "memory_holds": memory.holds,
            "longest_submission_s": longest, "back_restored": back.tokens, "back_s": back.took.as_secs_f64(), "plot": args.plot.display().to_string(),
        }));
        return Ok(right);
    }
    let count = |kind: LayerKind| config.layers.iter().filter(|k| **k == kind).count();
    let Parts { system, question: asked, call, result: told, answer } = parts;
    let mut text = format!(
        "{}\n\nmodel {name}: {} linear and {} full-attention layers\n{} tokens: {system} of system and tools, then {} turns of a \
         question ({asked}), a call ({call} written), a tool's result ({told}) and an answer ({answer} written)\n\n{}\n",
        account.summary(),
        count(LayerKind::Linear),
        count(LayerKind::Full),
        args.length,
        args.turns,
        table(turns),
    );
    for (what, change, first, last) in [
        ("question", question, turns[1].question.linear, turns[turns.len() - 1].question.linear),
        ("tool's result", result, turns[1].result.linear, turns[turns.len() - 1].result.linear),
    ] {
        let holds = if change <= BOUND { "holds" } else { "does not hold in this run" };
        let _ = writeln!(
            text,
            "first token after a {what}, linear layers: {} ms in turn 2, {} ms in turn {}; fastest of {} turns at either end: \
             {:+.1} % (at most {:.0} % more: {holds})",
            significant(first * 1e3),
            significant(last * 1e3),
            args.turns,
            window(turns),
            change * 100.0,
            BOUND * 100.0,
        );
    }
    let _ = writeln!(text, "tokens read twice: {again} of {}: {}", args.length, verdict(again == 0));
    let _ = writeln!(
        text,
        "memory: keys and values take {} bytes a token, {} predicted; states and tails {}; all else grew by {} bytes: {}",
        memory.measured,
        memory.predicted,
        bytes(memory.states),
        memory.grown,
        verdict(memory.holds),
    );
    if let Some(longest) = longest {
        let _ = writeln!(text, "longest submission {} ms", significant(longest * 1e3));
    }
    let _ = writeln!(text, "in a new session: {back}\nplotted in {}\n", args.plot.display());
    say(&text);
    Ok(right)
}

impl Parts {
    /// Shares out `length` tokens.
    fn new(length: u64, turns: u64) -> Result<Parts> {
        ensure!(turns >= 3, "--turns {turns}: expected at least 3");
        // The system part takes as much as a turn.
        let shares = turns.saturating_add(1);
        let turn = length / shares;
        ensure!(turn >= 32, "--length {length}: expected at least {} for {turns} turns", shares.saturating_mul(32));
        let (question, call, answer) = (turn / 10, turn / 32 + 1, turn / 16 + 1);
        let system = length - turns * turn;
        Ok(Parts { system, question, call, result: turn - question - call - answer, answer })
    }
}

/// The conversation so far.
struct Talk<'a> {
    observed: &'a Observed,
    session: Session,
    cache: Cache,
    parts: Parts,
    random: Random,
    /// All of it; the last token is written and not read.
    ids: Vec<u32>,
    turns: Vec<Turn>,
    /// The longest submission of a prompt.
    longest: Duration,
}

impl Talk<'_> {
    fn new<'a>(model: &Model, observed: &'a Observed, parts: Parts) -> Result<Talk<'a>> {
        let mut session = model.session()?;
        let cache = Cache::new(SNAPSHOTS);
        session.set_cache(Some(cache.clone()));
        let mut talk = Talk {
            observed,
            session,
            cache,
            parts,
            random: Random::new(12),
            ids: Vec::new(),
            turns: Vec::new(),
            longest: Duration::ZERO,
        };
        talk.say(parts.system);
        Ok(talk)
    }

    /// Somebody else's tokens.
    fn say(&mut self, tokens: u64) {
        let vocab = self.session.model().config().vocab;
        let id = |random: &mut Random| ((random.uniform() * vocab as f32) as u32).min(vocab - 1);
        self.ids.extend((0..tokens).map(|_| id(&mut self.random)));
    }

    fn turn(&mut self) -> Result<()> {
        self.say(self.parts.question);
        let question = self.answer(self.parts.call)?;
        self.say(self.parts.result);
        let result = self.answer(self.parts.answer)?;
        let (held, snapshots) = (self.observed.held(), self.cache.usage().snapshots);
        let position = self.session.ids().len() as u64;
        self.turns.push(Turn { question, result, position, held, snapshots });
        Ok(())
    }

    /// Asks for the conversation as it is and has the model write so many tokens.
    fn answer(&mut self, tokens: u64) -> Result<Prompt> {
        let options =
            GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(tokens), ..GenerateOptions::default() };
        let common = self.session.ids().iter().zip(&self.ids).take_while(|(a, b)| a == b).count() as u64;
        self.observed.look(Look::Layers);
        let begin = Instant::now();
        let restored = self.session.reuse(&self.ids)?.tokens;
        let mut prompt = None;
        for event in self.session.generate(&self.ids[restored as usize..], &options)? {
            match event {
                Event::Prompt { .. } => {}
                Event::Token { id, .. } => {
                    prompt.get_or_insert_with(|| {
                        let (first, times) = (begin.elapsed(), self.observed.look(Look::Away));
                        let [first, linear, full] = [first, times.linear, times.full].map(|t| t.as_secs_f64());
                        self.longest = self.longest.max(times.longest);
                        let again = common.saturating_sub(restored);
                        Prompt { restored, read: 0, again, first, linear, full, write: f64::NAN }
                    });
                    self.ids.push(id);
                }
                Event::Done { finish: Finish::Failed(error), .. } => return Err(error.into()),
                Event::Done { finish: Finish::Length, timings, .. } => {
                    let mut prompt = prompt.context("an answer has no tokens")?;
                    prompt.read = timings.prompt_tokens;
                    prompt.write = timings.decode.as_secs_f64() / timings.decoded_tokens as f64;
                    return Ok(prompt);
                }
                Event::Done { finish, .. } => bail!("an answer of {tokens} tokens ended early: {finish:?}"),
            }
        }
        bail!("an answer had no end")
    }

    /// The conversation is taken up by another session, which reads what is left; from here on every position is in use.
    fn come_back(&mut self) -> Result<Restored> {
        let mut session = self.session.model().session()?;
        session.set_cache(Some(self.cache.clone()));
        let back = session.reuse(&self.ids)?;
        session.prefill(&self.ids[back.tokens as usize..], &mut |_, _| {})?;
        ensure!(session.ids() == self.ids, "the conversation that was taken up is another one");
        self.session = session;
        Ok(back)
    }

    fn memory(&self, config: &Config) -> Result<Memory> {
        let plan = self.session.model().memory();
        let full = config.layers.iter().filter(|k| **k == LayerKind::Full).count() as u64;
        let predicted = full * 2 * (config.kv_heads as u64 * config.head_dim as u64) * plan.kv.size();
        let kv = self.observed.held().kv;
        let states = plan.states + plan.tails;
        // What is neither keys and values nor a snapshot: the session, the weights, the scratch.
        let rest = |turn: &Turn| turn.held.other as i128 + turn.held.fixed as i128 - (turn.snapshots * states) as i128;
        let (second, last) = (&self.turns[1], &self.turns[self.turns.len() - 1]);
        let grown = rest(last) - rest(second);
        let own = last.held.fixed == (last.snapshots + 1) * states;
        let covers = |t: &Turn| t.held.kv >= t.position * predicted;
        let holds = kv == plan.context * predicted && grown == 0 && own && self.turns.iter().all(covers);
        Ok(Memory { predicted, measured: kv as f64 / plan.context as f64, states, grown, holds })
    }
}

/// How many turns at either end are compared.
fn window(turns: &[Turn]) -> usize {
    WINDOW.min((turns.len() - 1) / 2).max(1)
}

/// How the fastest of the last turns compares with that of the second and those after it: the work is the same, and all that
/// others do on the machine makes it slower.
fn change(turns: &[Turn], of: impl Fn(&Turn) -> f64) -> f64 {
    let n = window(turns);
    let fastest = |turns: &[Turn]| turns.iter().map(&of).fold(f64::INFINITY, f64::min);
    fastest(&turns[turns.len() - n..]) / fastest(&turns[1..=n]) - 1.0
}

/// The first turns, the last one, and some between.
fn table(turns: &[Turn]) -> Table {
    let columns = [
        "turn",
        "after",
        "restored",
        "read",
        "again",
        "first token ms",
        "linear ms",
        "full ms",
        "rest ms",
        "writing ms/token",
        "keys and values",
        "states",
        "snapshots",
    ];
    let mut table = Table::new(2, &columns);
    let shown = |i: &usize| {
        let power = 10usize.pow((i + 1).ilog10());
        *i + 1 == turns.len() || [1, 2, 5].contains(&((i + 1) / power)) && (i + 1) % power == 0
    };
    for i in (0..turns.len()).filter(shown) {
        let turn = &turns[i];
        let states = turn.held.fixed / (turn.snapshots + 1);
        for (after, p) in [("question", &turn.question), ("result", &turn.result)] {
            let ms = |s: f64| significant(s * 1e3);
            table.row(vec![
                (i + 1).to_string(),
                after.into(),
                p.restored.to_string(),
                p.read.to_string(),
                p.again.to_string(),
                ms(p.first),
                ms(p.linear),
                ms(p.full),
                ms(p.first - p.linear - p.full),
                ms(p.write),
                bytes(turn.held.kv),
                bytes(states),
                turn.snapshots.to_string(),
            ]);
        }
    }
    table
}

fn turn_json(number: usize, turn: &Turn) -> serde_json::Value {
    let prompt = |p: &Prompt| {
        json!({
            "restored": p.restored, "read": p.read, "again": p.again, "first_token_s": p.first, "linear_s": p.linear,
            "full_s": p.full, "write_s_per_token": p.write,
        })
    };
    json!({
        "bench": "agent_turn", "turn": number, "question": prompt(&turn.question), "result": prompt(&turn.result),
        "position": turn.position, "kv_bytes": turn.held.kv, "fixed_bytes": turn.held.fixed,
        "other_bytes": turn.held.other, "snapshots": turn.snapshots,
    })
}

/// Both first tokens of each turn, and the session's memory.
fn panels(talk: &Talk<'_>, per_token: u64) -> Vec<Panel> {
    let turns = &talk.turns;
    let series = |of: &dyn Fn(&Turn) -> f64| turns.iter().map(of).collect::<Vec<f64>>();
    let first = |title: String, of: fn(&Turn) -> &Prompt| {
        let ms = |part: fn(&Prompt) -> f64| smooth(&series(&|t| part(of(t)) * 1e3), 2);
        Panel {
            title,
            unit: "ms",
            series: vec![
                ("linear layers".into(), ms(|p| p.linear)),
                ("full-attention layers".into(), ms(|p| p.full)),
                ("rest: restoring, embedding, head, snapshot".into(), ms(|p| p.first - p.linear - p.full)),
            ],
            stacked: true,
        }
    };
    let linear = |of: fn(&Turn) -> &Prompt| smooth(&series(&|t| of(t).linear * 1e3), 2);
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    let Parts { question, result, .. } = talk.parts;
    vec![
        first(format!("Time to first token after a question of {question} tokens"), |t| &t.question),
        first(format!("Time to first token after a tool's result of {result} tokens"), |t| &t.result),
        Panel {
            title: "Of these, the linear layers alone".into(),
            unit: "ms",
            series: vec![
                (format!("after a question of {question} tokens"), linear(|t| &t.question)),
                (format!("after a tool's result of {result} tokens"), linear(|t| &t.result)),
            ],
            stacked: false,
        },
        Panel {
            title: "Memory of the session".into(),
            unit: "MiB",
            series: vec![
                (
                    "states and convolution tails of the linear layers".into(),
                    series(&|t| mib(t.held.fixed / (t.snapshots + 1))),
                ),
                ("keys and values of the full-attention layers, pages".into(), series(&|t| mib(t.held.kv))),
                ("of these, in use".into(), series(&|t| mib(t.position * per_token))),
            ],
            stacked: false,
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_shared_out_to_the_last_token() {
        for (length, turns) in [(100_000, 200), (1_000, 3), (129, 3), (32 * 201, 200)] {
            let p = Parts::new(length, turns).unwrap();
            assert_eq!(p.system + turns * (p.question + p.call + p.result + p.answer), length);
            assert!(p.question > 0 && p.call > 1 && p.answer > 1 && p.result > 0 && p.system > 0, "{p:?}");
        }
        for (length, turns, word) in
            [(100, 3, "--length 100"), (1000, 2, "--turns 2"), (u64::MAX, u64::MAX, "--length")]
        {
            let why = Parts::new(length, turns).unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn the_ends_are_compared_without_the_first_turn() {
        let turn = |linear: f64| {
            let prompt = Prompt { restored: 0, read: 0, again: 0, first: 0.0, linear, full: 0.0, write: 0.0 };
            Turn { question: prompt, result: prompt, position: 0, held: Held::default(), snapshots: 0 }
        };
        let turns: Vec<Turn> = [9.0, 1.0, 2.0, 1.1, 2.2].map(turn).to_vec();
        assert_eq!(window(&turns), 2);
        assert!((change(&turns, |t| t.question.linear) - 0.1).abs() < 1e-9);
    }
}
