//! State as a value: snapshots, forks, rewinding and the cache, to the last bit.

use std::sync::Arc;

use gatedelta::backend::Backend;
use gatedelta::qwen::{Cache, Event, Finish, GenerateOptions, LoadOptions, Model, Origin, Reason, Sampling, Session};
use gatedelta::shape::Dtype;

use crate::qwen_naive::Tiny;
use crate::util::{Device, Random, devices, golden};

const MODEL: &str = "models/tiny-text";
const MIB: u64 = 1 << 20;

fn load(backend: &Arc<dyn Backend>, context: u64) -> Model {
    let options = LoadOptions { context: Some(context), ..LoadOptions::default() };
    Model::load(golden(MODEL), backend.clone(), &options).unwrap()
}

/// A model whose pages hold 512 positions.
fn wide(backend: &Arc<dyn Backend>, kv: Dtype, context: u64) -> Model {
    let sizes = Tiny { layers: "LF", heads: 4, kv: 4, dim: 256, hv: 2, ..Tiny::default() };
    let dir = tempfile::tempdir().unwrap();
    sizes.write(dir.path(), &sizes.tensors(3, Dtype::F32), Dtype::F32);
    Model::load(dir.path(), backend.clone(), &LoadOptions { context: Some(context), kv, ..LoadOptions::default() })
        .unwrap()
}

fn random_ids(n: usize, below: u32, seed: u64) -> Vec<u32> {
    let mut r = Random::new(seed);
    (0..n).map(|_| (r.unit() * f64::from(below)) as u32).collect()
}

/// Reads ids one by one; the bits of all logits.
fn step(session: &mut Session, ids: &[u32]) -> Vec<u32> {
    ids.iter().flat_map(|id| read(session, &[*id])).collect()
}

/// Reads ids at once; the bits of the last logits.
fn read(session: &mut Session, ids: &[u32]) -> Vec<u32> {
    let logits = session.prefill(ids, &mut |_, _| {}).unwrap();
    assert!(logits.iter().all(|l| l.is_finite()));
    logits.iter().map(|l| l.to_bits()).collect()
}

fn greedy(max_tokens: u64) -> GenerateOptions {
    GenerateOptions { sampling: Sampling::GREEDY, max_tokens: Some(max_tokens), ..GenerateOptions::default() }
}

/// Fewer tokens where a device is software and steps are slow.
fn tokens(device: &Device, n: usize) -> usize {
    if device.name == "cpu" { n } else { n / 4 }
}

#[test]
fn what_is_restored_goes_on_with_the_same_bits() {
    for device in devices() {
        let model = load(&device.backend, 256);
        let ids = random_ids(120, 460, 1);
        let mut session = model.session().unwrap();
        read(&mut session, &ids[..50]);
        let n = tokens(device, 20);
        let snapshot = session.snapshot().unwrap();
        let first = step(&mut session, &ids[50..50 + n]);
        let other = read(&mut session, &ids[80..120]);
        for _ in 0..2 {
            session.restore(&snapshot).unwrap();
            assert_eq!(session.ids(), &ids[..50]);
            assert_eq!(step(&mut session, &ids[50..50 + n]), first, "{}", device.name);
            assert_eq!(read(&mut session, &ids[80..120]), other, "{}", device.name);
        }
        // A session that has never been there, and one that has failed nowhere but holds other things.
        let mut fresh = model.session().unwrap();
        read(&mut fresh, &ids[7..90]);
        fresh.restore(&snapshot).unwrap();
        assert_eq!(step(&mut fresh, &ids[50..50 + n]), first, "{}", device.name);
        drop(session);
        fresh.restore(&snapshot).unwrap();
        assert_eq!(step(&mut fresh, &ids[50..50 + n]), first, "{}", device.name);
    }
}

#[test]
fn forks_do_not_hear_of_each_other() {
    for device in devices() {
        for kv in [Dtype::F32, Dtype::F16] {
            // Both sides of the border of a page, and on it.
            for at in if device.name == "cpu" { vec![500usize, 512, 700] } else { vec![510] } {
                let model = wide(&device.backend, kv, 1100);
                let ids = random_ids(at + 80, 90, at as u64);
                let (a, b) = (&ids[at..at + 40], &ids[at + 40..]);
                let mut expected = Vec::new();
                for part in [a, b] {
                    let mut alone = model.session().unwrap();
                    read(&mut alone, &ids[..at]);
                    expected.push([read(&mut alone, part), step(&mut alone, &part[..4])].concat());
                }
                let mut session = model.session().unwrap();
                read(&mut session, &ids[..at]);
                let mut fork = session.fork().unwrap();
                // In turns: one writes in place, the other into a copy.
                let (mut left, mut right) = (read(&mut session, a), read(&mut fork, b));
                left.extend(step(&mut session, &a[..4]));
                right.extend(step(&mut fork, &b[..4]));
                assert!(left == expected[0] && right == expected[1], "{} {kv} {at}", device.name);
                assert_eq!(fork.ids(), [&ids[..at], b, &b[..4]].concat());
            }
            if device.name != "cpu" {
                break;
            }
        }
    }
}

#[test]
fn rewinding_and_reading_again_gives_the_same_bits() {
    for device in devices() {
        let model = load(&device.backend, 256);
        let ids = random_ids(90, 460, 2);
        let stops = if device.name == "cpu" { (0..=90).collect() } else { vec![0u64, 41, 64, 83] };
        for cache in [None, Some(Cache::new(64 * MIB).every(16).unwrap())] {
            let mut session = model.session().unwrap();
            session.set_cache(cache.clone());
            // What the logits were after each token that ended a piece.
            let mut seen = std::collections::BTreeMap::new();
            let mut at = 0;
            for n in [40, 1, 1, 20, 1, 1, 20, 6] {
                at += n;
                seen.insert(at, read(&mut session, &ids[at - n..at]));
            }
            let end = session.snapshot().unwrap();
            let mut short = 0;
            for stop in &stops {
                session.restore(&end).unwrap();
                let restored = session.rewind(*stop).unwrap();
                assert_eq!((session.ids(), restored.tokens), (&ids[..*stop as usize], *stop));
                short += u64::from(restored.origin == Origin::Cache && restored.replayed < 16);
                // From the last token that ended a piece, the pieces come again.
                let before = seen.range(..=*stop as usize).next_back().map_or(0, |(at, _)| *at);
                session.rewind(before as u64).unwrap();
                let mut at = before;
                for (end, expected) in seen.range(before + 1..) {
                    assert_eq!(&read(&mut session, &ids[at..*end]), expected, "{} {stop} {end}", device.name);
                    at = *end;
                }
            }
            assert_eq!(short > 0, cache.is_some());
        }
        let mut session = model.session().unwrap();
        read(&mut session, &ids[..5]);
        assert!(session.rewind(6).unwrap_err().to_string().contains("found 6, expected at most the 5"));
        assert_eq!(session.ids(), &ids[..5]);
    }
}

/// Ids, text and end of an answer under way.
fn rest(events: impl Iterator<Item = Event>) -> (Vec<u32>, String, Option<Finish>) {
    let (mut ids, mut all, mut end) = (Vec::new(), String::new(), None);
    for event in events {
        match event {
            Event::Token { id, text } => {
                ids.push(id);
                all += &text;
            }
            Event::Done { text, finish, .. } => {
                all += &text;
                end = Some(finish);
            }
            Event::Prompt { .. } => {}
        }
    }
    (ids, all, end)
}

#[test]
fn an_answer_goes_on_from_a_snapshot_taken_within_it() {
    for device in devices() {
        let model = load(&device.backend, 256);
        let prompt = random_ids(20, 460, 3);
        let sampling =
            Sampling { temperature: 1.3, presence_penalty: 0.7, top_k: 0, top_p: 1.0, ..Sampling::default() };
        let options = GenerateOptions { sampling, seed: 9, max_tokens: Some(24), ..GenerateOptions::default() };
        let whole = rest(model.session().unwrap().generate(&prompt, &options).unwrap());
        assert_eq!(whole.0.len(), 24);
        for after in [0usize, 1, 2, 11, 24] {
            let mut session = model.session().unwrap();
            let mut answer = session.generate(&prompt, &options).unwrap();
            let mut begun = String::new();
            let mut n = 0;
            while n < after || after == 0 {
                match answer.next().unwrap() {
                    Event::Token { text, .. } => {
                        begun += &text;
                        n += 1;
                    }
                    Event::Prompt { .. } if after == 0 => break,
                    _ => {}
                }
            }
            let snapshot = answer.session().snapshot().unwrap();
            assert!(snapshot.has_answer());
            drop(answer);
            let mut other = model.session().unwrap();
            assert!(other.resume(&options).unwrap_err().to_string().contains("no answer under way"));
            other.restore(&snapshot).unwrap();
            for session in [&mut session, &mut other] {
                let went_on = rest(session.resume(&options).unwrap());
                assert_eq!(went_on.0, whole.0[after..], "{} after {after}", device.name);
                assert_eq!(format!("{begun}{}", went_on.1), whole.1);
                assert!(matches!(went_on.2, Some(Finish::Length)));
            }
        }
        let mut session = model.session().unwrap();
        rest(session.generate(&prompt, &options).unwrap());
        read(&mut session, &[1]);
        assert!(session.resume(&options).is_err(), "reading ends an answer");
    }
}

#[test]
fn a_prompt_that_begins_in_the_cache_has_the_bits_of_one_read_whole() {
    for device in devices() {
        let model = load(&device.backend, 256);
        let ids = random_ids(150, 460, 4);
        let fresh = |ids: &[u32]| {
            let mut session = model.session().unwrap();
            session.set_cache(Some(Cache::new(64 * MIB).every(32).unwrap()));
            read(&mut session, ids)
        };
        let cache = Cache::new(64 * MIB).every(32).unwrap();
        let mut session = model.session().unwrap();
        session.set_cache(Some(cache.clone()));
        assert_eq!(read(&mut session, &ids), fresh(&ids));
        // Other endings, and the same again.
        for (begin, expected) in [(40, 32), (70, 64), (128, 128), (31, 0), (150, 128)] {
            let other = [&ids[..begin], &[5, 6, 7]].concat();
            let restored = session.reuse(&other).unwrap();
            assert_eq!((restored.tokens, restored.total), (expected, other.len() as u64));
            assert_eq!(restored.origin, if expected == 0 { Origin::Nothing } else { Origin::Cache });
            assert_eq!(read(&mut session, &other[expected as usize..]), fresh(&other), "{} {begin}", device.name);
        }
        // Going on is no restoring.
        let longer = [session.ids(), &[8, 9]].concat();
        let restored = session.reuse(&longer).unwrap();
        assert_eq!((restored.tokens, restored.origin), (longer.len() as u64 - 2, Origin::Session));
        assert!(session.reuse(&[]).unwrap_err().to_string().contains("at least one"));
    }
}

#[test]
fn snapshots_come_where_turns_end() {
    let model = load(&devices()[0].backend, 512);
    let cache = Cache::new(64 * MIB).every(100).unwrap();
    let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    let parts = [
        turn("system", "be brief, and then some more words"),
        turn("user", "one"),
        turn("assistant", "1"),
        turn("user", "two"),
        turn("assistant", "2"),
        turn("user", "three"),
    ];
    let begin = "<|im_start|>assistant\n";
    let length = |n: usize| model.tokenizer().unwrap().encode(&parts[..n].concat()).unwrap().len() as u64;
    let prompt = model.tokenizer().unwrap().encode(&(parts.concat() + begin)).unwrap();
    let mut session = model.session().unwrap();
    session.set_cache(Some(cache.clone()));
    let answer = rest(session.generate(&prompt, &greedy(5)).unwrap()).0;
    let mut found: Vec<(u64, Reason)> = cache.kept().iter().map(|k| (k.snapshot.position(), k.reason)).collect();
    found.sort_by_key(|f| f.0);
    let total = prompt.len() as u64;
    let mut expected = vec![
        (length(1), Reason::System),
        (length(4), Reason::User),
        (length(6), Reason::User),
        (total, Reason::Prompt),
        (total + 4, Reason::Answer),
    ];
    expected.extend((1..=total / 100).map(|i| (i * 100, Reason::Every)));
    expected.sort_by_key(|f| f.0);
    assert_eq!(found, expected);
    // The same question again needs no reading at all; another answer departs after the user's turn.
    let prompted = cache.kept().into_iter().find(|k| k.reason == Reason::Prompt).unwrap();
    session.restore(&prompted.snapshot).unwrap();
    assert_eq!(rest(session.resume(&greedy(5)).unwrap()).0, answer);
    let edited = parts.concat() + &turn("assistant", "other") + &turn("user", "four") + begin;
    let restored = session.reuse(&model.tokenizer().unwrap().encode(&edited).unwrap()).unwrap();
    assert!(restored.tokens >= total && restored.origin == Origin::Cache, "{restored:?}");
    let without = parts[..4].concat() + &turn("user", "else") + begin;
    let restored = session.reuse(&model.tokenizer().unwrap().encode(&without).unwrap()).unwrap();
    assert_eq!(restored.tokens, length(4));
}

#[test]
fn the_budget_is_kept_and_what_is_costly_stays() {
    let model = load(&devices()[0].backend, 512);
    let ids = random_ids(400, 460, 5);
    let cache = Cache::new(u64::MAX).every(10).unwrap();
    let mut session = model.session().unwrap();
    session.set_cache(Some(cache.clone()));
    read(&mut session, &ids);
    let all = cache.usage();
    assert_eq!(all.snapshots, 40);
    // The pages are there once: the rest is states and tails.
    let own = cache.kept()[0].snapshot.own_bytes();
    let pages = all.bytes - 40 * own;
    assert!(pages <= 2 * 512 * model.memory().cache / 512, "{pages}");
    let first = cache.kept().into_iter().find(|k| k.snapshot.position() == 10).unwrap().snapshot;
    assert!(cache.pin(&first, true));

    let gone = cache.set_budget(pages + 8 * own);
    assert_eq!((gone.len(), cache.usage().snapshots), (32, 8));
    assert!(cache.usage().bytes <= pages + 8 * own);
    let mut left: Vec<u64> = cache.kept().iter().map(|k| k.snapshot.position()).collect();
    left.sort_unstable();
    // Dense where it is recent, sparse where it is old.
    assert_eq!((left[0], left[7]), (10, 400), "{left:?}");
    let gaps: Vec<u64> = left[1..].windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps.first() > gaps.last(), "{left:?}");
    println!("{left:?}: {}", gone[0]);

    cache.set_budget(0);
    assert_eq!(cache.kept().len(), 1, "what is pinned stays");
    assert!(cache.pin(&first, false) && !cache.insert(first.clone(), Reason::Asked).is_empty());
    assert_eq!(cache.usage().snapshots, 0);
    assert!(!cache.pin(&first, true));
    // The session did not notice.
    read(&mut session, &ids[..20]);
}

#[test]
fn a_snapshot_of_another_model_is_refused() {
    let (one, other) = (load(&devices()[0].backend, 64), load(&devices()[0].backend, 64));
    let mut session = one.session().unwrap();
    read(&mut session, &[1, 2, 3]);
    let snapshot = session.snapshot().unwrap();
    let mut theirs = other.session().unwrap();
    read(&mut theirs, &[4]);
    let why = theirs.restore(&snapshot).unwrap_err().to_string();
    assert!(why.contains("another loading of it"), "{why}");
    assert_eq!(theirs.ids(), [4], "nothing has changed");
    let cache = Cache::new(MIB * 64);
    cache.insert(snapshot, Reason::Asked);
    assert!(cache.longest(&other, &[1, 2, 3, 4]).is_none() && cache.longest(&one, &[1, 2, 3, 4]).is_some());
    assert!(Cache::new(1).every(0).is_err());
}
