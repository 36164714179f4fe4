//! Devices that fail at any moment: what is written is what would have been written.

use std::sync::{Arc, Mutex};

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::backend::faulty::{Fault, Plan};
use gatedelta::device::Account;
use gatedelta::qwen::recover::Opened;
use gatedelta::qwen::{
    Batch, Cache, Event, Finish, GenerateOptions, LoadOptions, Notice, Place, Recovery, Sampling, Session,
};
use gatedelta::shape::Dtype;

use crate::util::{Random, golden};

const MODEL: &str = "models/tiny-text";
const MIB: u64 = 1 << 20;
const OPTIONS: LoadOptions = LoadOptions { context: Some(256), kv: Dtype::F32 };

fn random_ids(n: usize, seed: u64) -> Vec<u32> {
    let mut r = Random::new(seed);
    (0..n).map(|_| (r.unit() * 460.0) as u32).collect()
}

fn cpu() -> Arc<dyn Backend> {
    static CPU: std::sync::OnceLock<Arc<Cpu>> = std::sync::OnceLock::new();
    CPU.get_or_init(|| Arc::new(Cpu::new(Some(1)).unwrap())).clone()
}

/// A device that follows a plan, opened anew each time; and the CPU.
fn opener(plan: &Plan) -> impl FnMut(Place) -> gatedelta::Result<Opened> + Send + use<> {
    let plan = plan.clone();
    move |place| {
        let backend: Arc<dyn Backend> = match place {
            Place::Chosen => Arc::new(plan.around(cpu())),
            Place::Cpu => cpu(),
        };
        Ok((backend, Account::default()))
    }
}

/// A model on a device that follows a plan, and what is told.
fn load(plan: &Plan) -> gatedelta::Result<(Recovery, Arc<Mutex<Vec<String>>>)> {
    let told = Arc::new(Mutex::new(Vec::new()));
    let hears = told.clone();
    let tell = move |notice: &Notice<'_>| {
        if !matches!(notice, Notice::Loading(..)) {
            hears.lock().unwrap().push(notice.to_string());
        }
    };
    Ok((Recovery::load_with(golden(MODEL), &OPTIONS, opener(plan), tell, &mut |_, _| {})?, told))
}

/// What a run is made of, and the calls of the device up to the end of each part.
type Marks = Vec<(&'static str, u64)>;

/// Tries again what cannot come back by itself.
fn insist<T>(session: &mut Session, what: impl Fn(&Session) -> gatedelta::Result<T>) -> gatedelta::Result<T> {
    loop {
        match what(session) {
            Ok(done) => return Ok(done),
            Err(why) => session.revive(why)?,
        }
    }
}

fn answer(session: &mut Session, ids: &[u32], sampling: Sampling, out: &mut Vec<u32>) -> gatedelta::Result<String> {
    let options = GenerateOptions { sampling, seed: 7, max_tokens: Some(10), ..GenerateOptions::default() };
    let (mut text, mut read) = (String::new(), 0);
    for event in session.generate(ids, &options)? {
        match event {
            Event::Prompt { done, total } => {
                assert!(done > read && total == ids.len() as u64, "{read} {done} {total}");
                read = done;
            }
            Event::Token { id, text: more } => {
                out.push(id);
                text += &more;
            }
            Event::Done { finish: Finish::Failed(why), .. } => return Err(why),
            Event::Done { text: more, .. } => text += &more,
        }
    }
    Ok(text)
}

/// An answer, a turn of a tool, going back, a fork, an answer that is stopped and goes on.
fn run(plan: &Plan, sampling: Sampling, copies: u64) -> gatedelta::Result<(Vec<u32>, String, Marks, Recovery)> {
    let (mut marks, mut out, mut text) = (Marks::new(), Vec::new(), String::new());
    let (recovery, _) = load(plan)?;
    recovery.set_copies(copies, 8)?;
    marks.push(("load", plan.calls()));
    let mut session = recovery.session()?;
    session.set_cache(Some(Cache::new(64 * MIB).every(16)?));
    marks.push(("session", plan.calls()));
    text += &answer(&mut session, &random_ids(45, 1), sampling, &mut out)?;
    marks.push(("answer", plan.calls()));
    let snapshot = insist(&mut session, Session::snapshot)?;
    marks.push(("snapshot", plan.calls()));
    // What a tool says is read, and answered.
    text += &answer(&mut session, &random_ids(11, 2), sampling, &mut out)?;
    marks.push(("tool", plan.calls()));
    session.restore(&snapshot)?;
    marks.push(("restore", plan.calls()));
    let logits = session.logits(&random_ids(5, 3))?;
    out.extend(logits.iter().map(|l| l.to_bits()));
    session.rewind(50)?;
    marks.push(("rewind", plan.calls()));
    let mut fork = insist(&mut session, Session::fork)?;
    text += &answer(&mut fork, &random_ids(3, 4), sampling, &mut out)?;
    marks.push(("fork", plan.calls()));
    // Stopped after four tokens, and gone on with.
    let options = GenerateOptions { sampling, seed: 9, max_tokens: Some(8), ..GenerateOptions::default() };
    let next = random_ids(3, 5);
    let first = session.generate(&next, &options)?.filter(|e| matches!(e, Event::Token { .. })).take(4);
    let ids = |event| match event {
        Event::Token { id, .. } => Some(id),
        _ => None,
    };
    out.extend(first.filter_map(ids));
    out.extend(session.resume(&options)?.filter_map(ids));
    session.reset()?;
    let restored = session.reuse(&random_ids(45, 1))?;
    out.extend(session.prefill(&random_ids(45, 1)[restored.tokens as usize..], &mut |_, _| {})?.iter().map(|l| l.to_bits()));
    marks.push(("reuse", plan.calls()));
    drop((fork, session));
    assert_eq!(recovery.copies(), 0, "copies go with their sessions");
    Ok((out, text, marks, recovery))
}

const SAMPLINGS: [Sampling; 2] =
    [Sampling::GREEDY, Sampling { presence_penalty: 0.5, temperature: 1.3, top_k: 50, top_p: 0.95, min_p: 0.0 }];

#[test]
fn a_fault_at_any_call_changes_nothing() {
    let mut runs = 0;
    for (i, sampling) in SAMPLINGS.into_iter().enumerate() {
        let plan = Plan::default();
        let (out, text, marks, recovery) = run(&plan, sampling, 0).unwrap();
        assert!(recovery.past().is_empty() && recovery.losses() == 0 && recovery.place() == Place::Chosen);
        let total = plan.calls();
        println!("{marks:?}");
        assert!(marks.windows(2).all(|w| w[0].1 < w[1].1), "every part asks the device for something: {marks:?}");
        for (kind, fault) in [Fault::Lost, Fault::Driver, Fault::OutOfMemory, Fault::NoMemory].into_iter().enumerate() {
            // Each call is met by some kind of fault with some sampling; those at the borders of the parts by every one.
            let border = |at: u64| marks.iter().any(|(_, end)| (end.saturating_sub(2)..end + 2).contains(&at));
            for at in (0..total).filter(|at| border(*at) || (at + i as u64 + 2 * kind as u64) % 4 == 0) {
                runs += 1;
                let plan = Plan::new(&[(at, fault)]);
                let copies = if at % 3 == 0 { MIB } else { 0 };
                let (found, words, _, recovery) = run(&plan, sampling, copies).unwrap_or_else(|e| panic!("{fault:?} at {at}: {e}"));
                assert!(found == out && words == text, "{fault:?} at {at} of {total}, {marks:?}\n{found:?}\n{out:?}");
                let met = !plan.met().is_empty();
                assert!(met || matches!(fault, Fault::OutOfMemory | Fault::NoMemory), "{fault:?} at {at}");
                match fault {
                    Fault::Lost | Fault::Driver => {
                        assert_eq!((recovery.losses(), recovery.place()), (1, Place::Chosen), "{fault:?} at {at}");
                    }
                    Fault::OutOfMemory => assert_eq!((recovery.losses(), recovery.place()), (0, Place::Chosen)),
                    Fault::NoMemory => assert_eq!(recovery.losses(), 0),
                }
            }
        }
    }
    println!("{runs} runs");
}
