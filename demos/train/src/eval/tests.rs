use std::time::Duration;

use anyhow::bail;
use gatedelta_agent::engine::{Answer, End, Step};

use super::*;
use crate::data::scene::{Maker, estimate, template};
use crate::data::{Action, oracle::Oracle};

fn call(name: &str, arguments: Value) -> Call {
    Call { name: name.into(), arguments: arguments.as_object().unwrap().clone() }
}

fn ok(text: &str) -> Outcome {
    Outcome { ok: true, text: text.into() }
}

#[test]
fn words_and_numbers_are_found_whole() {
    for (answer, must) in [
        ("The result is 12.", "12"),
        ("12", "12"),
        ("It is 12, I think.", "12"),
        ("5 - 12 and 512, so 12", "12"),
        ("Plan.TXT   says\nhello", "plan.txt says hello"),
        ("There are: a/, b.txt.", "a/"),
        ("x", ""),
        ("minus -3.5!", "-3.5"),
        ("It is 14:05.", "14:05"),
    ] {
        assert!(holds(answer, must), "{answer:?} {must:?}");
    }
    for (answer, must) in [
        ("312", "12"),
        ("12.5", "12"),
        ("12,500", "12"),
        ("3.12", "12"),
        ("-12", "12"),
        ("It is 12:30", "12"),
        ("planetary", "plan"),
        ("", "12"),
        ("canned", "can't"),
    ] {
        assert!(!holds(answer, must), "{answer:?} {must:?}");
    }
}

#[test]
fn calls_are_the_same_if_they_ask_for_the_same() {
    let (a, b) = (ok("a"), ok("b"));
    let sum = |text: &str| call("calculator", json!({"expression": text}));
    assert!(same(&sum("2*3"), &ok("6"), &sum("3 + 3"), &ok("6")));
    assert!(!same(&sum("2*3"), &ok("6"), &sum("2*4"), &ok("8")));
    let failed = Outcome::failed("division by zero");
    assert!(!same(&sum("1/0"), &failed, &sum("2/0"), &failed));
    let list = |arguments: Value| call("list_files", arguments);
    assert!(same(&list(json!({})), &a, &list(json!({"path": "."})), &b));
    assert!(same(&list(json!({"path": "x"})), &a, &list(json!({"path": " ./x/"})), &b));
    assert!(!same(&list(json!({"path": "x"})), &a, &list(json!({})), &a));
    let notes = |action: &str, text: &str| call("notes", json!({"action": action, "text": text}));
    assert!(same(&notes("search", "Lucy"), &a, &notes("search", "lucy"), &b));
    assert!(!same(&notes("search", "Lucy"), &a, &notes("search", "Luc"), &a));
    assert!(!same(&notes("add", "Lucy"), &a, &notes("add", "lucy"), &a));
    let read = |arguments: Value| call("read_file", arguments);
    assert!(same(
        &read(json!({"path": "x", "start_line": 1, "lines": 2})),
        &a,
        &read(json!({"lines": 2, "path": "x"})),
        &b
    ));
    assert!(!same(&read(json!({"path": "x"})), &a, &list(json!({"path": "x"})), &a));
    assert!(!same(&read(json!({"path": "x"})), &a, &read(json!({"path": "x", "lines": 1})), &a));
}

/// Does what the oracle does but for one kind of request, where it does something else.
struct Wrong<'a> {
    maker: &'a Maker<'a>,
    /// The requests in the order in which they will come.
    plan: Vec<(Kind, Number)>,
    at: usize,
    /// What is written instead, for requests of this kind.
    instead: Option<(Kind, &'static str)>,
    acts: usize,
}

impl Engine for Wrong<'_> {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        Ok(self.maker.template.render(&messages.into(), Some(&tools.into()), true, thinking)?)
    }

    fn generate(&mut self, prompt: &str, _: usize, each: &mut dyn FnMut(Step<'_>) -> Result<bool>) -> Result<Answer> {
        let (kind, number) = self.plan[self.at];
        let scene = self.maker.scene(kind, number).unwrap();
        let results: Vec<String> = prompt
            .rsplit("<|im_start|>user\n<tool_response>\n")
            .take(self.acts)
            .map(|text| text.split("\n</tool_response>").next().unwrap().to_string())
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect();
        let action = (scene.task.acts[self.acts])(&results);
        self.acts += 1;
        let mut text = match &action {
            Action::Say { text, .. } => text.clone(),
            Action::Call(call) | Action::Work { call, .. } => {
                let arguments = call.arguments.iter();
                let arguments = arguments.map(|(key, value)| {
                    let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                    format!("<parameter={key}>\n{value}\n</parameter>\n")
                });
                let arguments: String = arguments.collect();
                format!("<tool_call>\n<function={}>\n{arguments}</function>\n</tool_call>", call.name)
            }
        };
        if let Some((wrong, instead)) = self.instead
            && wrong == kind
        {
            if instead == "error" {
                self.at += 1;
                self.acts = 0;
                bail!("the context is full");
            }
            text = instead.to_string();
        }
        if !text.contains("<tool_call>") {
            self.at += 1;
            self.acts = 0;
        }
        each(Step::Wrote { id: 1, text: &text })?;
        let none = Duration::ZERO;
        Ok(Answer {
            end: End::Stop,
            prompt: 100,
            reused: 0,
            read: 1,
            reread: 0,
            wrote: 1,
            decoded: 0,
            reading: none,
            writing: none,
        })
    }
}

const PER_KIND: u64 = 2;

fn report(kinds: &[Kind], instead: Option<(Kind, &'static str)>) -> Report {
    let maker = Maker { template: template().unwrap(), measure: &estimate, distance: Some(100) };
    let number = |index| Number { seed: 6, side: Side::HeldOut, index };
    let plan = kinds.iter().flat_map(|&kind| (0..PER_KIND).map(move |index| (kind, number(index)))).collect();
    let engine = Wrong { maker: &maker, plan, at: 0, instead, acts: 0 };
    let heard = AtomicUsize::new(0);
    let hear = || {
        heard.fetch_add(1, Ordering::Relaxed);
    };
    let report = run(&mut [engine], &maker, 6, kinds, PER_KIND, &hear).unwrap();
    assert_eq!(heard.into_inner(), kinds.len() * PER_KIND as usize);
    report
}

#[test]
fn a_model_that_does_all_right_scores_100() {
    let report = report(Kind::all(), None);
    for (kind, score) in &report.scores {
        assert_eq!((score.calls, score.answers, score.right), (2, 2, 2), "{}: {:?}", kind.name(), report.failures);
    }
    assert!(report.failures.is_empty());
    let table = report.to_string();
    assert!(table.starts_with("| kind of request "), "{table}");
    assert!(table.contains("| all two-step "), "{table}");
    let widths: Vec<usize> = table.lines().map(str::len).collect();
    assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
    assert_eq!(widths.len(), 2 + Kind::all().len() + Group::ALL.len());
}

#[test]
fn what_is_wrong_counts_where_it_is_wrong() {
    let kinds = [Kind::Calculator, Kind::NoteAdd, Kind::SmallTalk];
    let of = |report: &Report, at: usize| {
        let score = report.scores[at].1;
        (score.calls, score.answers, score.right)
    };
    // No call, and nothing of use said.
    let found = report(&kinds, Some((Kind::Calculator, "I do not know.")));
    assert_eq!([0, 1, 2].map(|at| of(&found, at)), [(0, 0, 0), (2, 2, 2), (2, 2, 2)]);
    assert_eq!(found.failures.len(), 2);
    assert!(
        found.failures[0].contains("expected calculator {\"expression\":")
            && found.failures[0].contains("I do not know.")
    );
    assert_eq!(
        found.group(Group::SingleStep),
        Score { requests: 4, calls: 2, answers: 2, right: 2, prompt_tokens: 400 }
    );
    // No call is wanted; the words are wrong.
    let found = report(&kinds, Some((Kind::SmallTalk, "Purple.")));
    assert_eq!(of(&found, 2), (2, 0, 0));
    // What fails in the engine is wrong and does not end the run.
    let found = report(&kinds, Some((Kind::NoteAdd, "error")));
    assert_eq!([0, 1, 2].map(|at| of(&found, at)), [(2, 2, 2), (0, 0, 0), (2, 2, 2)]);
    assert!(found.failures[0].contains("the context is full"));
}

/// Says the length of the prompt.
struct Parrot<'a>(&'a Maker<'a>);

impl Engine for Parrot<'_> {
    fn render(&self, messages: &[Value], tools: &[Value], thinking: Option<bool>) -> Result<String> {
        Ok(self.0.template.render(&messages.into(), Some(&tools.into()), true, thinking)?)
    }

    fn generate(&mut self, prompt: &str, _: usize, each: &mut dyn FnMut(Step<'_>) -> Result<bool>) -> Result<Answer> {
        each(Step::Wrote { id: 1, text: &prompt.len().to_string() })?;
        bail!("enough")
    }
}

#[test]
fn several_engines_make_the_same_report() {
    let maker = Maker { template: template().unwrap(), measure: &estimate, distance: Some(100) };
    let kinds = [Kind::Calculator, Kind::ListFiles, Kind::Untold];
    let report = |engines: usize| {
        let mut engines: Vec<Parrot<'_>> = (0..engines).map(|_| Parrot(&maker)).collect();
        run(&mut engines, &maker, 3, &kinds, 5, &|| {}).unwrap()
    };
    let (one, three) = (report(1), report(3));
    assert_eq!((one.failures.len(), one.to_json()), (15, three.to_json()));
    assert_eq!(one.to_json()["kinds"][2]["requests"], 5);
    assert!(one.failures[5].starts_with("list-files 0: "), "{}", one.failures[5]);
}

#[test]
fn the_oracle_is_an_engine_too() {
    let maker = Maker { template: template().unwrap(), measure: &estimate, distance: None };
    let number = Number { seed: 2, side: Side::HeldOut, index: 0 };
    let scene = maker.scene(Kind::ReadCompute, number).unwrap();
    let expected = maker.play(&maker.scene(Kind::ReadCompute, number).unwrap()).unwrap();
    let mut oracle = Oracle::new(&maker.template, &scene.task.acts);
    let found = turn::take(&mut oracle, &scene.world, &scene.history, &scene.task.request, 100).unwrap();
    assert_eq!(judge(&expected, &found).right, 1);
}
