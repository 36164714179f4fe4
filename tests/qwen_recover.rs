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
const OPTIONS: LoadOptions = LoadOptions { context: Some(256), kv: Dtype::F32, snapshots: 0 };

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
    let snapshot = session.insist(Session::snapshot)?;
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
    let mut fork = session.insist(Session::fork)?;
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
    out.extend(
        session.prefill(&random_ids(45, 1)[restored.tokens as usize..], &mut |_, _| {})?.iter().map(|l| l.to_bits()),
    );
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
            // Calls at the borders of the parts are met by every kind of fault, of the others a sample that differs with the kind.
            let border = |at: u64| marks.iter().any(|(_, end)| (end.saturating_sub(2)..end + 2).contains(&at));
            for at in (0..total).filter(|at| border(*at) || (at + i as u64 + 2 * kind as u64) % 12 == 0) {
                runs += 1;
                let plan = Plan::new(&[(at, fault)]);
                let copies = if at % 3 == 0 { MIB } else { 0 };
                let (found, words, _, recovery) =
                    run(&plan, sampling, copies).unwrap_or_else(|e| panic!("{fault:?} at {at}: {e}"));
                assert!(found == out && words == text, "{fault:?} at {at} of {total}, {marks:?}\n{found:?}\n{out:?}");
                let met = !plan.met().is_empty();
                assert!(met || matches!(fault, Fault::OutOfMemory | Fault::NoMemory), "{fault:?} at {at}");
                match fault {
                    Fault::Lost => assert_eq!((recovery.losses(), recovery.place()), (1, Place::Chosen), "at {at}"),
                    // One that meets a snapshot for the cache costs that snapshot only.
                    Fault::Driver => assert!(recovery.losses() < 2 && recovery.place() == Place::Chosen, "at {at}"),
                    Fault::OutOfMemory => assert_eq!((recovery.losses(), recovery.place()), (0, Place::Chosen)),
                    Fault::NoMemory => assert_eq!(recovery.losses(), 0),
                }
            }
        }
    }
    println!("{runs} runs");
}

#[test]
fn after_two_losses_it_goes_on_on_the_cpu_and_says_so() {
    for sampling in SAMPLINGS {
        let clean = Plan::default();
        let (out, text, marks, _) = run(&clean, sampling, 0).unwrap();
        let total = clean.calls();
        let (mut lost, mut alive) = (0, 0);
        // Both in one part, one in each of two, the second while the first is recovered from.
        let pairs = (0..total).step_by(17).flat_map(|at| [1, 3, 40].map(|more| (at, at + more)));
        for (first, second) in pairs.filter(|(_, second)| *second < total) {
            let kinds = [(Fault::Lost, Fault::Driver), (Fault::Driver, Fault::Lost)][first as usize % 2];
            let plan = Plan::new(&[(first, kinds.0), (second, kinds.1)]);
            let (found, words, _, recovery) = run(&plan, sampling, if first % 3 == 0 { MIB } else { 0 }).unwrap();
            assert!(found == out && words == text, "{first} {second} of {total}, {marks:?}");
            // A driver that fails in a snapshot for the cache costs that snapshot only.
            if recovery.losses() < 2 {
                alive += 1;
                continue;
            }
            assert_eq!(recovery.place(), Place::Cpu, "{first} {second}");
            lost += 1;
            let past = recovery.past();
            let last = past.last().unwrap();
            assert!(last.to == cpu().caps().name && last.to_string().contains("the model runs on the CPU"), "{last}");
        }
        assert!(lost > 2 * alive, "{lost} {alive}");
    }
}

#[test]
fn refused_memory_says_what_was_asked_and_frees_caches_first() {
    let plan = Plan::default();
    let (recovery, told) = load(&plan).unwrap();
    let mut session = recovery.session().unwrap();
    let cache = Cache::new(64 * MIB).every(16).unwrap();
    let other = Cache::new(64 * MIB);
    recovery.watch(&other);
    session.set_cache(Some(cache.clone()));
    session.prefill(&random_ids(60, 1), &mut |_, _| {}).unwrap();
    other.insert(session.snapshot().unwrap(), gatedelta::qwen::Reason::Asked);
    assert!(cache.usage().snapshots > 2 && other.usage().snapshots == 1);
    // Once: what is in the caches goes, and that is enough.
    plan.fail_now(Fault::OutOfMemory);
    session.set_cache(None);
    session.prefill(&random_ids(30, 2), &mut |_, _| {}).unwrap();
    assert_eq!((plan.met().len(), recovery.place(), recovery.losses()), (1, Place::Chosen, 0));
    assert_eq!(other.usage().snapshots, 0);
    {
        let told = told.lock().unwrap();
        assert!(
            told.len() == 1 && told[0].contains("needs") && told[0].contains("bytes; a test has taken the rest"),
            "{told:?}"
        );
    }
    // For good: the CPU has some.
    plan.fail_now(Fault::NoMemory);
    session.prefill(&random_ids(30, 3), &mut |_, _| {}).unwrap();
    assert_eq!((recovery.place(), recovery.losses()), (Place::Cpu, 0));
    let last = recovery.past().pop().unwrap().to_string();
    assert!(last.contains("a test has taken the rest") && last.contains("runs on the CPU"), "{last}");
    assert_eq!(session.ids(), [random_ids(60, 1), random_ids(30, 2), random_ids(30, 3)].concat());
    // While the weights are brought there: the same is tried once more, then the CPU.
    for (faults, place) in [(&[9][..], Place::Chosen), (&[9, 40][..], Place::Cpu)] {
        let due: Vec<(u64, Fault)> = faults.iter().map(|at| (*at, Fault::NoMemory)).collect();
        let (recovery, _) = load(&Plan::new(&due)).unwrap();
        assert_eq!((recovery.place(), recovery.losses(), recovery.past().len()), (place, 0, 1));
    }
}

#[test]
fn where_nothing_is_left_the_error_is_told() {
    let plan = Plan::default();
    let of_plan = plan.clone();
    // A CPU that fails too.
    let open = move |_| {
        let backend: Arc<dyn Backend> = Arc::new(of_plan.around(cpu()));
        Ok((backend, Account::default()))
    };
    let recovery = Recovery::load_with(golden(MODEL), &OPTIONS, open, |_| {}, &mut |_, _| {}).unwrap();
    let mut session = recovery.session().unwrap();
    session.prefill(&random_ids(20, 1), &mut |_, _| {}).unwrap();
    for _ in 0..2 {
        plan.fail_now(Fault::Lost);
        session.prefill(&random_ids(5, 2), &mut |_, _| {}).unwrap();
    }
    plan.fail_now(Fault::Lost);
    let why = session.prefill(&random_ids(5, 2), &mut |_, _| {}).unwrap_err();
    assert!(matches!(why, Error::DeviceLost { .. }), "{why}");
    assert_eq!(recovery.losses(), 2);
    assert_eq!(session.ids().len(), 30, "what was read is still known");
    // An error of the caller's is no matter of the device.
    let plan = Plan::default();
    let (recovery, told) = load(&plan).unwrap();
    let mut session = recovery.session().unwrap();
    assert!(matches!(session.prefill(&[1 << 20], &mut |_, _| {}), Err(Error::Argument { .. })));
    assert!(recovery.past().is_empty() && told.lock().unwrap().is_empty());
    // A context that does not fit the model is one too, whatever the device.
    let options = LoadOptions { context: Some(1 << 40), ..OPTIONS };
    let why = Recovery::load_with(golden(MODEL), &options, opener(&plan), |_| {}, &mut |_, _| {}).unwrap_err();
    assert!(matches!(why, Error::Argument { .. }), "{why}");
}

#[test]
fn a_batch_goes_on_after_faults_with_every_session() {
    let prompts = [30, 7, 19].map(|n| random_ids(n, n as u64));
    let write = |plan: &Plan| -> (Vec<u32>, Recovery) {
        let (recovery, _) = load(plan).unwrap();
        recovery.set_copies(MIB, 6).unwrap();
        let mut sessions: Vec<Session> = prompts.iter().map(|_| recovery.session().unwrap()).collect();
        for (session, prompt) in sessions.iter_mut().zip(&prompts) {
            session.prefill(prompt, &mut |_, _| {}).unwrap();
        }
        let mut batch = Batch::new(&recovery.model());
        let (mut next, mut out) = (vec![3, 4, 5], Vec::new());
        for round in 0..8 {
            // One leaves on the way.
            let n = if round < 5 { 3 } else { 2 };
            let mut of: Vec<&mut Session> = sessions.iter_mut().take(n).collect();
            let logits = batch.step(&mut of, &next[..n]).unwrap();
            let vocab = logits.len() / n;
            for (next, row) in next.iter_mut().zip(logits.chunks_exact(vocab)) {
                *next = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
            }
            out.extend(logits.iter().map(|l| l.to_bits()));
        }
        for (session, (prompt, rounds)) in sessions.iter().zip(prompts.iter().zip([8, 8, 5])) {
            assert_eq!(session.ids().len(), prompt.len() + rounds, "each token is read once");
        }
        (out, recovery)
    };
    let clean = Plan::default();
    let (expected, _) = write(&clean);
    for at in (0..clean.calls()).step_by(5) {
        for fault in [Fault::Lost, Fault::OutOfMemory, Fault::NoMemory] {
            let (found, _) = write(&Plan::new(&[(at, fault)]));
            assert!(found == expected, "{fault:?} at {at}");
        }
        let (found, recovery) = write(&Plan::new(&[(at, Fault::Driver), (at + 9, Fault::Lost)]));
        assert!(found == expected && recovery.losses() >= 1, "two at {at}");
    }
}

#[test]
fn copies_in_host_memory_keep_to_their_bound_and_spare_reading() {
    let ids = random_ids(200, 1);
    // Calls of the device that coming back takes.
    let back = |bytes: u64| {
        let plan = Plan::default();
        let (recovery, _) = load(&plan).unwrap();
        recovery.set_copies(bytes, 16).unwrap();
        let mut session = recovery.session().unwrap();
        for id in &ids {
            session.prefill(&[*id], &mut |_, _| {}).unwrap();
            assert!(recovery.copies() <= bytes, "{} of {bytes}", recovery.copies());
        }
        let held = recovery.copies();
        plan.fail_now(Fault::Lost);
        let before = plan.calls();
        let logits = session.prefill(&[7], &mut |_, _| {}).unwrap();
        (plan.calls() - before, held, logits)
    };
    let (none, _, expected) = back(0);
    let (all, held, found) = back(64 * MIB);
    assert!(held > 0 && found == expected);
    assert!(all < none / 3, "{all} calls instead of {none}");
    // Half of it is enough for a part of the way.
    let (half, held_half, found) = back(held * 2 / 3);
    assert!(held_half > 0 && found == expected && all < half && half < none, "{all} {half} {none}");
    assert!(load(&Plan::default()).unwrap().0.set_copies(1, 0).is_err());
}

#[test]
fn what_was_taken_before_a_loss_is_good_after_it() {
    let plan = Plan::default();
    let (recovery, _) = load(&plan).unwrap();
    let (mut session, mut idle) = (recovery.session().unwrap(), recovery.session().unwrap());
    let cache = Cache::new(64 * MIB);
    session.set_cache(Some(cache.clone()));
    session.prefill(&random_ids(40, 1), &mut |_, _| {}).unwrap();
    idle.prefill(&random_ids(25, 2), &mut |_, _| {}).unwrap();
    let snapshot = session.snapshot().unwrap();
    cache.insert(snapshot.clone(), gatedelta::qwen::Reason::Asked);
    let expected = session.prefill(&[5], &mut |_, _| {}).unwrap();
    plan.fail_now(Fault::Lost);
    session.prefill(&[6], &mut |_, _| {}).unwrap();
    assert_eq!(recovery.losses(), 1);
    assert_eq!(cache.usage().snapshots, 0, "what is on a lost device is nothing");
    session.restore(&snapshot).unwrap();
    assert_eq!(session.prefill(&[5], &mut |_, _| {}).unwrap(), expected);
    // A session that did nothing meanwhile.
    let mut alone = recovery.model().session().unwrap();
    alone.prefill(&random_ids(25, 2), &mut |_, _| {}).unwrap();
    let expected = alone.prefill(&[9], &mut |_, _| {}).unwrap();
    assert_eq!(idle.prefill(&[9], &mut |_, _| {}).unwrap(), expected);
    // One that is of no recovery keeps its error.
    assert!(alone.restore(&snapshot).is_err() && alone.insist(|_| Err::<(), _>(Error::argument("a", 1, 2))).is_err());
}

#[cfg(feature = "webgpu")]
#[test]
fn a_destroyed_device_comes_back_in_the_middle_of_an_answer() {
    use gatedelta::backend::webgpu::{OpenOptions, WebGpu};
    let adapters = WebGpu::enumerate();
    let Some(found) = adapters.found.iter().find(|f| f.caps.name.contains("llvmpipe")).cloned() else {
        return crate::util::skipped("lavapipe", &adapters.why_none);
    };
    // The device is destroyed before the events with these numbers.
    let write = |destroyed: &[usize]| {
        let gpus: Arc<Mutex<Vec<WebGpu>>> = Arc::default();
        let (opened, found) = (gpus.clone(), found.clone());
        let open = move |place| {
            let backend: Arc<dyn Backend> = match place {
                Place::Cpu => cpu(),
                Place::Chosen => {
                    let gpu = WebGpu::open(&found, &OpenOptions::default())?;
                    opened.lock().unwrap().push(gpu.clone());
                    Arc::new(gpu)
                }
            };
            Ok((backend, Account::default()))
        };
        let recovery = Recovery::load_with(golden(MODEL), &OPTIONS, open, |_| {}, &mut |_, _| {}).unwrap();
        recovery.set_copies(MIB, 8).unwrap();
        let mut session = recovery.session().unwrap();
        session.set_cache(Some(Cache::new(MIB).every(16).unwrap()));
        let options = GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(6), ..GenerateOptions::default() };
        let (mut ids, mut events) = (Vec::new(), 0);
        let prompt = random_ids(20, 1);
        let mut answer = session.generate(&prompt, &options).unwrap();
        loop {
            if destroyed.contains(&events) {
                gpus.lock().unwrap().last().unwrap().device().destroy();
            }
            match answer.next() {
                Some(Event::Token { id, .. }) => ids.push(id),
                Some(Event::Done { finish: Finish::Failed(why), .. }) => panic!("{destroyed:?}: {why}"),
                Some(_) => {}
                None => break,
            }
            events += 1;
        }
        drop(answer);
        assert_eq!(session.ids().len(), prompt.len() + 5);
        (ids, events, recovery)
    };
    let (expected, events, recovery) = write(&[]);
    assert!(recovery.past().is_empty() && expected.len() == 6);
    for destroyed in [&[0][..], &[1], &[2], &[events - 3, events - 2]] {
        let (found, _, recovery) = write(destroyed);
        assert_eq!(found, expected, "destroyed before event {destroyed:?}");
        assert_eq!(recovery.losses(), destroyed.len());
        assert_eq!(recovery.place() == Place::Cpu, destroyed.len() == 2);
    }
}
