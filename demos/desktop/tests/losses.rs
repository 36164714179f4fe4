//! The model's device fails while an answer comes: it goes on, and the window is told.

use std::sync::Arc;

use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::backend::faulty::{Fault, Plan};
use gatedelta::device::{Account, Candidate, Verdict};
use gatedelta::qwen;
use gatedelta::tune::{Class, Kind};
use gatedelta_desktop::worker::{Choice, Loaded, Update, Worker};

use crate::{PATIENCE, Place};

/// An account of a device of this name.
fn account(name: &str) -> Account {
    let candidate = Candidate {
        name: name.into(),
        driver: "of a test".into(),
        kind: Kind::Cpu,
        class: Class::Other,
        caps: None,
        verdict: Verdict::NotTried("a test has it".into()),
    };
    Account { candidates: vec![candidate], chosen: Some(0), why: "it is the only one".into() }
}

/// What an answer told: its text, the notices, and the device it was told to be on since.
struct Told {
    text: String,
    notices: Vec<String>,
    loaded: Option<Box<Loaded>>,
}

/// Asks, and has the device fail in the answer.
fn ask(worker: &Worker, turn: u64, plan: &Plan, fault: Option<Fault>) -> Told {
    // The answer is of ten tokens and more, each of some calls.
    fault.into_iter().for_each(|fault| plan.fail_after(20, fault));
    worker.ask(turn, Vec::new(), "hello".into());
    let mut told = Told { text: String::new(), notices: Vec::new(), loaded: None };
    loop {
        match worker.wait(PATIENCE).expect("news of the worker") {
            Update::Text(text) => told.text += &text,
            Update::Notice(text) => told.notices.push(text),
            Update::Loaded(loaded) => told.loaded = Some(loaded),
            Update::Answered(of, answer) => {
                assert_eq!(of, turn);
                answer.unwrap();
                return told;
            }
            _ => {}
        }
    }
}

#[test]
fn an_answer_goes_on_after_losses_and_the_window_is_told() {
    let plan = Plan::default();
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::new(None).unwrap());
    let of_plan = plan.clone();
    let devices = move |_, _| -> gatedelta_desktop::worker::Open {
        let (plan, cpu) = (of_plan.clone(), cpu.clone());
        Box::new(move |place| {
            Ok(match place {
                qwen::Place::Chosen => (Arc::new(plan.around(cpu.clone())), account("chosen")),
                qwen::Place::Cpu => (cpu.clone(), account("the CPU")),
            })
        })
    };
    let place = Place::new();
    let worker = Worker::start_on(place.setup().args, None, None, Box::new(devices), || {}).unwrap();
    worker.load(Choice::default());
    loop {
        match worker.wait(PATIENCE).expect("news of the worker") {
            Update::Loaded(_) => break,
            Update::Loading(..) => {}
            other => panic!("{other:?}"),
        }
    }
    let clean = ask(&worker, 1, &plan, None);
    assert!(clean.text.len() > 20 && clean.notices.is_empty() && clean.loaded.is_none(), "{}", clean.text);
    for (turn, on) in [(2, "chosen"), (3, "the CPU")] {
        let told = ask(&worker, turn, &plan, Some(Fault::Lost));
        assert_eq!(told.text, clean.text, "{on}");
        assert!(told.notices.len() == 1 && told.notices[0].contains("was lost"), "{:?}", told.notices);
        let start = told.loaded.expect("the device it is on now").start;
        assert!(start.device.starts_with(on), "{}", start.device);
    }
    worker.end(PATIENCE);
}
