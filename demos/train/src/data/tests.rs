use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::json;

use super::grammar;
use super::oracle::message;
use super::scene::{Maker, Number, any, estimate, template};
use super::*;
use crate::turn;

fn all(templates: &[&str]) -> Vec<String> {
    templates.iter().flat_map(|template| grammar::all(template)).collect()
}

#[test]
fn sides_share_no_wording() {
    let mut held: HashMap<String, &str> = HashMap::new();
    for (name, form) in forms() {
        assert!(form.train.len() >= 4 && form.held.len() >= 2, "{name}");
        held.extend(all(form.held).into_iter().map(|text| (text.to_lowercase(), name)));
    }
    // A path alone is no wording.
    held.remove("{path}");
    let mut draw = Draw::new(&[5]);
    for (name, form) in forms() {
        for _ in 0..1000 {
            let text = form.wording(Side::Train, &mut draw).to_lowercase();
            assert_eq!(held.get(&text), None, "{name}: {text:?}");
        }
    }
}

#[test]
fn held_out_wording_is_made_of_words_that_are_trained() {
    // Nobody can understand a word that was never seen; held out is how words are put together.
    let words = |text: &str| -> Vec<String> {
        text.to_lowercase()
            .split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '{' && c != '}')
            .map(str::to_string)
            .collect()
    };
    let known: HashSet<String> = forms().flat_map(|(_, form)| all(form.train)).flat_map(|text| words(&text)).collect();
    for (name, form) in forms() {
        for word in all(form.held).iter().flat_map(|text| words(text)) {
            assert!(known.contains(&word), "{name}: {word:?}");
        }
    }
}

fn maker() -> Maker<'static> {
    Maker { template: template().unwrap(), measure: &estimate, distance: Some(150) }
}

/// Requests of every kind.
fn requests(side: Side, count: u64) -> Vec<(Kind, String)> {
    let maker = maker();
    let mut all = Vec::new();
    for &kind in Kind::all() {
        let number = |index| Number { seed: 11, side, index };
        all.extend((0..count).map(|index| (kind, maker.scene(kind, number(index)).unwrap().task.request)));
    }
    all
}

#[test]
fn sides_share_no_request() {
    let (train, held) = (requests(Side::Train, 12), requests(Side::HeldOut, 12));
    let said: HashSet<String> = train.iter().map(|(_, request)| request.to_lowercase()).collect();
    for (kind, request) in &held {
        assert!(!said.contains(&request.to_lowercase()), "{}: {request}", kind.name());
    }
    for (kind, request) in train.iter().chain(&held) {
        assert!(!request.contains(['{', '}', '[', '|', '<']), "{}: {request}", kind.name());
    }
    // Whole numbers of two digits and more belong to a side, those that a note or a file name has aside.
    let numbers = |requests: &[(Kind, String)]| -> HashSet<String> {
        let plain = requests.iter().filter(|(kind, _)| *kind == Kind::Calculator);
        plain
            .flat_map(|(_, text)| {
                text.split(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | ','))
                    .map(|n| n.trim_matches(['.', ',']).to_string())
                    .collect::<Vec<_>>()
            })
            .filter(|number| number.len() > 1)
            .collect()
    };
    let (train, held) = (numbers(&train), numbers(&held));
    assert!(train.len() > 10 && held.len() > 10 && train.is_disjoint(&held), "{train:?} {held:?}");
}

#[test]
fn the_agent_makes_of_it_what_was_meant() {
    let maker = maker();
    for side in [Side::Train, Side::HeldOut] {
        for &kind in Kind::all() {
            for index in 0..6 {
                let scene = maker.scene(kind, Number { seed: 4, side, index }).unwrap();
                let before = scene.history.len().max(1);
                let played = maker.play(&scene).unwrap();
                let turn = &played.turn;
                let at = format!("{} {index} {:?}", kind.name(), scene.task.request);
                let calls = match kind.group() {
                    Group::SingleStep => 1,
                    Group::TwoSteps => 2,
                    Group::Memory | Group::Talk => 0,
                };
                assert_eq!((turn.calls.len(), turn.results.len()), (calls, calls), "{at}");
                // The parser read what the template wrote: the messages are those that were meant.
                let mut results = Vec::new();
                let mut messages = turn.messages[before..].iter();
                assert_eq!(messages.next().unwrap(), &json!({"role": "user", "content": scene.task.request}), "{at}");
                for act in &scene.task.acts {
                    let action = act(&results);
                    assert_eq!(messages.next().unwrap(), &message(&action), "{at}");
                    if let Action::Call(_) | Action::Work { .. } = action {
                        results.push(messages.next().unwrap()["content"].as_str().unwrap().to_string());
                    } else if let Action::Say { text, must } = action {
                        assert!(
                            !text.trim().is_empty() && must.iter().all(|must| !must.is_empty()),
                            "{at}: {text:?} {must:?}"
                        );
                        assert!(
                            must.iter().all(|must| text.to_lowercase().contains(&must.to_lowercase())),
                            "{at}: {text:?}"
                        );
                    }
                }
                assert_eq!(messages.next(), None, "{at}");
                // A file that is not there is not; a note may not be there, nor a time zone of the training data.
                for (call, result) in turn.calls.iter().zip(&turn.results) {
                    let strange = kind == Kind::Clock && side == Side::Train;
                    let good = result.ok != (kind == Kind::Missing) || kind == Kind::NoteDelete || strange;
                    assert!(good, "{at}: {call:?} {}", result.text);
                }
                assert!(turn.results.iter().all(|result| !result.text.contains("[cut")), "{at}");
            }
        }
    }
}

#[test]
fn the_same_number_is_the_same_conversation() {
    let maker = maker();
    let mut texts = HashSet::new();
    for &kind in Kind::all() {
        let text = |seed, index| maker.text(kind, Number { seed, side: Side::Train, index }).unwrap();
        assert_eq!(text(1, 0), text(1, 0), "{}", kind.name());
        texts.extend([text(1, 0), text(1, 1), text(2, 0)]);
    }
    assert_eq!(texts.len(), 3 * Kind::all().len());
}

#[test]
fn a_fact_is_asked_for_from_afar() {
    let maker = Maker { distance: Some(4000), ..maker() };
    let scene = maker.scene(Kind::Recall, Number { seed: 1, side: Side::HeldOut, index: 3 }).unwrap();
    let played = maker.play(&scene).unwrap();
    let value = &played.must[0];
    let told = scene
        .history
        .iter()
        .position(|message| message["role"] == "user" && message["content"].as_str().unwrap().contains(value));
    let texts = scene.history[told.unwrap() + 2..].iter().map(|message| estimate(message["content"].as_str().unwrap()));
    let between: usize = texts.sum();
    assert!((4000..6000).contains(&between), "{between}");
    assert!(turn::take(&mut oracle::Oracle::new(&maker.template, &scene.task.acts), &scene.world, &[], "x", 9).is_ok());
}

#[test]
fn every_kind_comes_up() {
    let mut draw = Draw::new(&[1]);
    let mut counts = BTreeMap::new();
    (0..5000).for_each(|_| *counts.entry(any(&mut draw).name()).or_insert(0) += 1);
    assert_eq!(counts.len(), Kind::all().len());
    assert!(counts.values().all(|count| *count > 50), "{counts:?}");
}
