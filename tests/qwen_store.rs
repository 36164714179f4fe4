//! Snapshots on disk: whole or not there, whatever happens to the process or to the files.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use gatedelta::Error;
use gatedelta::backend::Backend;
use gatedelta::backend::cpu::Cpu;
use gatedelta::qwen::{
    Cache, Event, GenerateOptions, LoadOptions, Model, Origin, Sampling, Session, Snapshot, Store, Usage,
};
use gatedelta::shape::Dtype;

use crate::qwen_naive::Tiny;
use crate::util::{Random, devices, error, golden};

const MODEL: &str = "models/tiny-text";
const BIG: u64 = 1 << 30;

fn cpu() -> Arc<dyn Backend> {
    static CPU: OnceLock<Arc<dyn Backend>> = OnceLock::new();
    CPU.get_or_init(|| Arc::new(Cpu::new(Some(1)).unwrap())).clone()
}

fn load_as(backend: Arc<dyn Backend>, name: &str, kv: Dtype) -> Model {
    Model::load(golden(name), backend, &LoadOptions { context: Some(512), kv, ..LoadOptions::default() }).unwrap()
}

fn model() -> Model {
    load_as(cpu(), MODEL, Dtype::F32)
}

/// The text of a seed.
fn text(seed: u64) -> Vec<u32> {
    let mut r = Random::new(seed);
    (0..300).map(|_| (r.unit() * 460.0) as u32).collect()
}

fn read(session: &mut Session, ids: &[u32]) -> Vec<u32> {
    session.prefill(ids, &mut |_, _| {}).unwrap().iter().map(|l| l.to_bits()).collect()
}

/// What a snapshot goes on with.
fn bits(snapshot: &Snapshot) -> Vec<u32> {
    let mut session = snapshot.model().session().unwrap();
    session.restore(snapshot).unwrap();
    [read(&mut session, &[7]), read(&mut session, &[8, 9, 10])].concat()
}

/// Snapshots of a text after each piece of 20 tokens.
fn snapshots(model: &Model, seed: u64, n: usize) -> Vec<Snapshot> {
    let mut session = model.session().unwrap();
    let piece = |ids: &[u32]| {
        read(&mut session, ids);
        session.snapshot().unwrap()
    };
    text(seed).chunks(20).take(n).map(piece).collect()
}

fn save(store: &Store, snapshots: &[Snapshot]) {
    for snapshot in snapshots {
        store.save(snapshot).unwrap();
    }
}

fn files(store: &Path) -> Vec<PathBuf> {
    let mut out: Vec<PathBuf> = fs::read_dir(store.join("v1")).unwrap().map(|e| e.unwrap().path()).collect();
    out.sort();
    out
}

fn named(store: &Path, end: &str) -> Vec<PathBuf> {
    files(store).into_iter().filter(|f| f.to_string_lossy().ends_with(end)).collect()
}

#[test]
fn what_comes_back_from_disk_goes_on_with_the_same_bits() {
    for device in devices() {
        let dir = tempfile::tempdir().unwrap();
        let model = load_as(device.backend.clone(), MODEL, Dtype::F32);
        let taken = snapshots(&model, 1, 4);
        let store = Store::open(dir.path(), BIG).unwrap();
        let written: Vec<u64> = taken.iter().map(|s| store.save(s).unwrap().bytes).collect();
        assert!(written[1..].iter().all(|n| n.abs_diff(written[0]) < 200), "only new tokens: {written:?}");
        assert_eq!(store.save(&taken[2]).unwrap().bytes, 0, "it is there");
        assert_eq!(store.usage().bytes, written.iter().sum::<u64>());
        let on_disk: u64 = [named(dir.path(), ".rows"), named(dir.path(), ".state")]
            .concat()
            .iter()
            .map(|f| f.metadata().unwrap().len())
            .sum();
        assert_eq!(store.usage().bytes, on_disk);
        drop(store);

        let store = Arc::new(Store::open(dir.path(), BIG).unwrap());
        assert_eq!(store.usage(), Usage { snapshots: 4, bytes: on_disk, budget: BIG });
        let again = load_as(device.backend.clone(), MODEL, Dtype::F32);
        for (ids, expected) in [(79, 2), (80, 3), (300, 3), (20, 0)] {
            let found = store.load(&again, &text(1)[..ids]).unwrap().unwrap();
            assert_eq!(found.ids(), taken[expected].ids());
            assert_eq!(bits(&found), bits(&taken[expected]), "{} {ids}", device.name);
        }
        assert!(store.load(&again, &text(1)[..19]).unwrap().is_none());
        assert!(store.load(&again, &text(2)).unwrap().is_none());
        // As a session comes upon it.
        let mut session = again.session().unwrap();
        session.set_cache(Some(Cache::new(BIG).with_store(store.clone())));
        let restored = session.reuse(&text(1)[..90]).unwrap();
        assert_eq!((restored.tokens, restored.origin), (80, Origin::Store));
        session.reset().unwrap();
        assert_eq!(session.reuse(&text(1)[..90]).unwrap().origin, Origin::Cache);
        // Saving what came from disk writes its own rows only.
        read(&mut session, &text(1)[80..90]);
        let bytes = store.save(&session.snapshot().unwrap()).unwrap().bytes;
        assert!(bytes < written[0], "{bytes}");
    }
}

#[test]
fn an_answer_under_way_survives_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let sampling = Sampling { temperature: 1.5, presence_penalty: 1.0, top_k: 0, ..Sampling::default() };
    let options = GenerateOptions { sampling, seed: 4, max_tokens: Some(20), ..GenerateOptions::default() };
    let ids = |events: &mut dyn Iterator<Item = Event>, n: usize| -> Vec<u32> {
        let id = |e| if let Event::Token { id, .. } = e { Some(id) } else { None };
        events.filter_map(id).take(n).collect()
    };
    let (model, prompt) = (model(), &text(3)[..30]);
    let whole = ids(&mut model.session().unwrap().generate(prompt, &options).unwrap(), 99);
    let mut session = model.session().unwrap();
    let mut answer = session.generate(prompt, &options).unwrap();
    assert_eq!(ids(&mut answer, 8), whole[..8]);
    Store::open(dir.path(), BIG).unwrap().save(&answer.session().snapshot().unwrap()).unwrap();

    let again = load_as(cpu(), MODEL, Dtype::F32);
    let snapshot = Store::open(dir.path(), BIG).unwrap().load(&again, &[prompt, &whole].concat()).unwrap().unwrap();
    let mut session = again.session().unwrap();
    session.restore(&snapshot).unwrap();
    assert_eq!(ids(&mut session.resume(&options).unwrap(), 99), whole[8..]);
}

#[test]
fn other_models_do_not_find_it_and_other_devices_do() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), BIG).unwrap();
    let own = model();
    let taken = snapshots(&own, 1, 2);
    save(&store, &taken);
    let ids = text(1);
    // Another type of cache, other weights of the same shape, another shape, random ones.
    assert_eq!(store.longest(&load_as(cpu(), MODEL, Dtype::F16), &ids).unwrap(), 0);
    assert_eq!(store.longest(&load_as(cpu(), "models/tiny-vision", Dtype::F32), &ids).unwrap(), 0);
    let options = LoadOptions { context: Some(512), ..LoadOptions::default() };
    let sizes = Tiny { vocab: 512, ..Tiny::default() };
    let dirs = [1, 2, 1].map(|seed| {
        let dir = tempfile::tempdir().unwrap();
        sizes.write(dir.path(), &sizes.tensors(seed, Dtype::F32), Dtype::F32);
        dir
    });
    let [one, other, same] = [0, 1, 2].map(|i: usize| Model::load(dirs[i].path(), cpu(), &options).unwrap());
    store.save(&snapshots(&one, 1, 1)[0]).unwrap();
    let found = [&own, &one, &other, &same].map(|m| store.longest(m, &ids).unwrap());
    assert_eq!(found, [40, 20, 0, 20], "the weights count, and not where they lie");
    let short =
        Model::load(golden(MODEL), cpu(), &LoadOptions { context: Some(30), ..LoadOptions::default() }).unwrap();
    assert_eq!(store.longest(&short, &ids).unwrap(), 20, "what fits the context");

    let expected: Vec<f64> = bits(&taken[1]).iter().map(|b| f64::from(f32::from_bits(*b))).collect();
    for device in &devices()[1..] {
        let there = load_as(device.backend.clone(), MODEL, Dtype::F32);
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), BIG).unwrap();
        save(&store, &taken);
        let found = bits(&store.load(&there, &ids).unwrap().unwrap());
        let found: Vec<f32> = found.into_iter().map(f32::from_bits).collect();
        let e = error(&found, &expected);
        assert!(e <= 1e-5, "{}: {e:e}", device.name);
        // In host memory too, which a lost device leaves.
        let moved = there.bring(&taken[1].to_host().unwrap()).unwrap();
        let moved: Vec<f32> = bits(&moved).into_iter().map(f32::from_bits).collect();
        assert_eq!(moved, found, "{}", device.name);
        // What goes on elsewhere is kept apart, whole, and comes back with its own bits.
        let mut session = there.session().unwrap();
        session.restore(&store.load(&there, &ids).unwrap().unwrap()).unwrap();
        read(&mut session, &ids[40..60]);
        let mixed = session.snapshot().unwrap();
        assert!(store.save(&mixed).unwrap().bytes > 0 && store.save(&mixed).unwrap().bytes == 0);
        assert_eq!(bits(&store.load(&there, &ids).unwrap().unwrap()), bits(&mixed), "{}", device.name);
        let native = snapshots(&there, 1, 3);
        save(&store, &native);
        assert_eq!(bits(&store.load(&there, &ids).unwrap().unwrap()), bits(&native[2]), "{}", device.name);
        let back = own.bring(&moved_back(&there, &taken[1])).unwrap();
        assert_eq!(bits(&back), bits(&taken[1]), "there and back is the same");
    }
    for (model, word) in [
        (load_as(cpu(), MODEL, Dtype::F16), "a cache in f32"),
        (one, "another shape"),
        (short, "at most the context's 30"),
    ] {
        let why = model.bring(&taken[1].to_host().unwrap()).unwrap_err();
        assert!(matches!(why, Error::Argument { .. }) && why.to_string().contains(word), "{why}");
    }
}

fn moved_back(there: &Model, snapshot: &Snapshot) -> gatedelta::qwen::HostSnapshot {
    there.bring(&snapshot.to_host().unwrap()).unwrap().to_host().unwrap()
}

#[test]
fn a_second_opener_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), BIG).unwrap();
    let why = Store::open(dir.path(), BIG).unwrap_err().to_string();
    assert!(why.contains("another process has this store open"), "{why}");
    assert!(!store.is_view());
    drop(store);
    Store::open(dir.path(), BIG).unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(Store::open(&file, BIG), Err(Error::Save { .. })));
}

#[test]
fn a_view_finds_what_a_writer_beside_it_has_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::view(dir.path()), Err(Error::Load { .. })), "there is no store");
    let model = model();
    let taken = snapshots(&model, 1, 4);
    let writer = Store::open(dir.path(), BIG).unwrap();
    save(&writer, &taken[..2]);
    let views = [Store::view(dir.path()).unwrap(), Store::view(dir.path()).unwrap()];
    let names = files(dir.path());
    for view in &views {
        assert!(view.is_view());
        assert_eq!(bits(&view.load(&model, &text(1)).unwrap().unwrap()), bits(&taken[1]));
        let usage = view.usage();
        assert_eq!((usage.snapshots, usage.bytes), (2, writer.usage().bytes));
        let refused = [view.save(&taken[2]).map(drop), view.pin(&taken[0], true).map(drop), view.clear()];
        for why in refused {
            let why = why.unwrap_err();
            assert!(matches!(&why, Error::Save { .. }) && why.to_string().contains("view"), "{why}");
        }
    }
    assert_eq!(files(dir.path()), names);
    // A session that comes upon it; what the writer adds and takes away.
    save(&writer, &taken[2..]);
    let view = Arc::new(Store::view(dir.path()).unwrap());
    let mut session = model.session().unwrap();
    session.set_cache(Some(Cache::new(BIG).with_store(view)));
    let restored = session.reuse(&text(1)[..90]).unwrap();
    assert_eq!((restored.tokens, restored.origin), (80, Origin::Store));
    assert_eq!(bits(&views[0].load(&model, &text(1)).unwrap().unwrap()), bits(&taken[3]));
    writer.clear().unwrap();
    assert!(views.iter().all(|view| view.load(&model, &text(1)).unwrap().is_none()));
    drop(writer);
    // Of a store that nobody has open, with a file that is not whole: passed over, and left where it is.
    let writer = Store::open(dir.path(), BIG).unwrap();
    save(&writer, &taken);
    drop(writer);
    let states = named(dir.path(), ".state");
    for state in &states {
        let mut bytes = fs::read(state).unwrap();
        bytes[100] ^= 1;
        fs::write(state, bytes).unwrap();
    }
    let names = files(dir.path());
    let view = Store::view(dir.path()).unwrap();
    assert_eq!(view.longest(&model, &text(1)).unwrap(), 80);
    for _ in 0..2 {
        assert!(view.load(&model, &text(1)).unwrap().is_none());
    }
    assert_eq!(files(dir.path()), names);
}

/// A view that looks while a writer in another process writes, drops and is ended.
#[test]
fn a_view_never_sees_half_of_what_is_being_written() {
    if in_child() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    drop(Store::open(dir.path(), BIG).unwrap());
    let view = Store::view(dir.path()).unwrap();
    let mut command = child(dir.path(), "qwen_store::a_view_never_sees_half_of_what_is_being_written", 1);
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut out = BufReader::new(process.stdout.take().unwrap());
    let (mut line, mut looks, mut found) = (String::new(), 0, 0);
    while looks < 40 && out.read_line(&mut line).unwrap() > 0 {
        let said = said(&line);
        line.clear();
        for (seed, position) in said {
            let ids = text(seed);
            let snapshot = view.load(&model, &ids).unwrap().expect("what was said to be saved");
            let n = snapshot.position();
            assert!(n >= position, "{n} of {position}");
            let mut session = model.session().unwrap();
            ids[..n as usize].chunks(PIECE).for_each(|piece| drop(read(&mut session, piece)));
            assert_eq!(bits(&snapshot), bits(&session.snapshot().unwrap()));
            found += 1;
        }
        looks += 1;
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(found >= 20, "{found}");
}

/// A panic in the database would be caught, and told on the way: one that is damaged is not looked into at all.
#[test]
fn an_index_that_is_not_as_it_was_left_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let taken = snapshots(&model, 1, 2);
    let store = Store::open(dir.path(), BIG).unwrap();
    save(&store, &taken);
    let sum = dir.path().join("v1/index.sum");
    assert!(!sum.exists(), "it changes");
    drop(store);
    let (whole, index) = (fs::read(&sum).unwrap(), dir.path().join("v1/index.redb"));
    assert_eq!(whole.len(), 16);
    let good = fs::read(&index).unwrap();
    let mut r = Random::new(3);
    for round in 0..20 {
        let mut bytes = good.clone();
        match round {
            0 => bytes.clear(),
            1 => bytes.truncate(bytes.len() / 2),
            2 => bytes.extend([0; 4096]),
            _ => (0..round).for_each(|_| {
                let at = (r.unit() * bytes.len() as f64) as usize;
                bytes[at] ^= 0x55;
            }),
        }
        fs::write(&index, bytes).unwrap();
        fs::write(&sum, &whole).unwrap();
        let store = Store::open(dir.path(), BIG).unwrap();
        assert!(dir.path().join("v1/index.broken").exists(), "round {round}: it was put aside");
        assert_eq!(bits(&store.load(&model, &text(1)).unwrap().unwrap()), bits(&taken[1]));
        fs::remove_file(dir.path().join("v1/index.broken")).unwrap();
    }
    // What was pinned stays so where the index is as it was left, and where a writer ended without closing it.
    let store = Store::open(dir.path(), BIG).unwrap();
    assert!(store.pin(&taken[0], true).unwrap());
    drop(store);
    for written in [whole.as_slice(), b"cut", b""] {
        if written.len() < 16 {
            fs::write(&sum, written).unwrap();
        }
        let store = Store::open(dir.path(), BIG).unwrap();
        store.clear().unwrap();
        assert_eq!(store.usage().snapshots, 1, "{written:?}");
        save(&store, &taken);
        drop(store);
    }
    assert!(!dir.path().join("v1/index.broken").exists());
    fs::remove_file(&index).unwrap();
    assert_eq!(Store::open(dir.path(), BIG).unwrap().usage().snapshots, 2);
}

#[test]
fn the_budget_of_the_disk_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let taken = snapshots(&model, 1, 10);
    let store = Store::open(dir.path(), BIG).unwrap();
    save(&store, &taken);
    assert!(store.pin(&taken[1], true).unwrap());
    let all = store.usage().bytes;
    drop(store);
    let store = Store::open(dir.path(), all / 2).unwrap();
    let usage = store.usage();
    assert!(usage.bytes <= all / 2 && usage.snapshots < 10 && usage.snapshots > 2, "{usage}");
    let sizes = |end| -> u64 { named(dir.path(), end).iter().map(|f| f.metadata().unwrap().len()).sum() };
    assert_eq!(sizes(".rows") + sizes(".state"), usage.bytes);
    // What is pinned is whole, though states around it went; what went can come again.
    assert_eq!(bits(&store.load(&model, &text(1)[..40]).unwrap().unwrap()), bits(&taken[1]));
    store.clear().unwrap();
    assert_eq!(store.usage().snapshots, 1);
    assert!(store.pin(&taken[1], false).unwrap() && !store.pin(&taken[5], true).unwrap());
    store.clear().unwrap();
    assert_eq!((store.usage().bytes, named(dir.path(), ".rows").len()), (0, 0));
    assert!(store.save(&taken[0]).unwrap().bytes > 0);
    assert_eq!(bits(&store.load(&model, &text(1)).unwrap().unwrap()), bits(&taken[0]));
}

/// Copies a store.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("v1")).unwrap();
    for file in files(from) {
        fs::copy(&file, to.join("v1").join(file.file_name().unwrap())).unwrap();
    }
}

#[test]
fn damage_takes_what_it_hits_and_makes_nothing_up() {
    let good = tempfile::tempdir().unwrap();
    let model = model();
    let texts = [1, 2];
    let all: Vec<Snapshot> = texts.iter().flat_map(|seed| snapshots(&model, *seed, 4)).collect();
    let store = Store::open(good.path(), BIG).unwrap();
    // An index of the first half, to be mixed with the files of the whole.
    save(&store, &all[..4]);
    drop(store);
    let old = tempfile::tempdir().unwrap();
    copy(good.path(), old.path());
    let store = Store::open(good.path(), BIG).unwrap();
    save(&store, &all[4..]);
    drop(store);
    let expected: HashMap<Vec<u32>, Vec<u32>> = all.iter().map(|s| (s.ids().to_vec(), bits(s))).collect();

    /// Both texts from the longest snapshot down; how many come.
    fn take(store: &Store, model: &Model, expected: &HashMap<Vec<u32>, Vec<u32>>) -> usize {
        let mut n = 0;
        for ids in [1, 2].map(text) {
            let mut length = ids.len();
            while let Some(found) = store.load(model, &ids[..length]).unwrap() {
                assert_eq!(Some(&bits(&found)), expected.get(found.ids()), "a wrong one");
                length = found.ids().len() - 1;
                n += 1;
            }
        }
        n
    }

    let mut r = Random::new(11);
    let mut draw = |n: usize| (r.unit() * n as f64) as usize;
    let mut counts = [0usize; 9];
    for round in 0..120 {
        let dir = tempfile::tempdir().unwrap();
        copy(good.path(), dir.path());
        let files: Vec<PathBuf> = files(dir.path()).into_iter().filter(|f| !f.ends_with("lock")).collect();
        let (one, other) = (&files[draw(files.len())], &files[draw(files.len())]);
        let length = one.metadata().unwrap().len() as usize;
        let index = dir.path().join("v1/index.redb");
        let is_blob = one != &index;
        match round % 8 {
            0 | 1 => {
                let mut bytes = fs::read(one).unwrap();
                bytes[draw(length)] ^= 1 << draw(8);
                fs::write(one, bytes).unwrap();
            }
            2 => fs::File::options().write(true).open(one).unwrap().set_len(draw(length) as u64).unwrap(),
            3 => fs::remove_file(one).unwrap(),
            4 => drop(fs::copy(one, other).unwrap()),
            5 => fs::write(&index, vec![0xA5; draw(200_000)]).unwrap(),
            6 => drop(fs::copy(old.path().join("v1/index.redb"), &index).unwrap()),
            _ => {
                let mut bytes = fs::read(&index).unwrap();
                for _ in 0..1 + draw(40) {
                    let at = draw(bytes.len());
                    bytes[at] = draw(256) as u8;
                }
                fs::write(&index, bytes).unwrap();
            }
        }
        let store = Store::open(dir.path(), BIG).unwrap();
        let n = take(&store, &model, &expected);
        counts[n] += 1;
        match round % 8 {
            // The files say all that the index did.
            5..=7 => assert_eq!(n, 8, "round {round}"),
            // One file is one snapshot, or those of its text that rest on it; two for a copy over another.
            4 => {}
            _ if is_blob => assert!(n >= 4, "round {round}: {n} of 8"),
            _ => assert_eq!(n, 8, "round {round}"),
        }
        // What was lost can be saved again, and the store stays sound.
        save(&store, &all);
        drop(store);
        let store = Store::open(dir.path(), BIG).unwrap();
        assert_eq!(take(&store, &model, &expected), 8, "round {round}");
    }
    println!("snapshots left of 8: {counts:?}");
    assert!(counts[8] > 0 && counts[..8].iter().sum::<usize>() > 20, "{counts:?}");
}

const CHILD: &str = "GATEDELTA_TEST_STORE";
const PIECE: usize = 5;

/// Saves snapshots of the text of a seed until it is ended, each time from the begin of another text.
fn write_forever(dir: &str, seed: u64) {
    let (model, store) = (model(), Store::open(dir, BIG).unwrap());
    for seed in seed.. {
        let mut session = model.session().unwrap();
        for piece in text(seed).chunks(PIECE).take(12) {
            read(&mut session, piece);
            match store.save(&session.snapshot().unwrap()) {
                Ok(_) => println!("saved {seed} {}", session.ids().len()),
                Err(why) => {
                    println!("refused {why}");
                    return;
                }
            }
        }
    }
}

fn child(dir: &Path, test: &str, seed: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(CHILD, format!("{seed} {}", dir.display()));
    command
}

/// In the child: true after it has done its work.
fn in_child() -> bool {
    let Ok(order) = std::env::var(CHILD) else { return false };
    let (seed, dir) = order.split_once(' ').unwrap();
    write_forever(dir, seed.parse().unwrap());
    true
}

/// What a child said that it had saved: the last position of each seed.
fn said(output: &str) -> HashMap<u64, u64> {
    // A line that is cut short was not said.
    let lines = output.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let numbers = lines.filter_map(|l| l.trim().strip_prefix("saved ")?.split_once(' '));
    numbers.map(|(seed, position)| (seed.parse().unwrap(), position.parse().unwrap())).collect()
}

#[test]
fn a_process_that_is_killed_loses_at_most_its_newest() {
    if in_child() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let mut r = Random::new(5);
    let (mut saved, mut kills) = (0, 0);
    for round in 0..100u64 {
        let seed = 1000 * (round + 1);
        let mut command = child(dir.path(), "qwen_store::a_process_that_is_killed_loses_at_most_its_newest", seed);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut out = BufReader::new(process.stdout.take().unwrap());
        let mut output = String::new();
        // Half of them while they start and save for the first time, half after they have saved.
        let mut most = 150_000.0;
        if round % 2 == 0 {
            while !output.contains("saved") && out.read_line(&mut output).unwrap() > 0 {}
            most = 40_000.0;
        }
        std::thread::sleep(Duration::from_micros((r.unit() * most) as u64));
        process.kill().unwrap();
        out.read_to_string(&mut output).unwrap();
        kills += u32::from(!process.wait().unwrap().success());
        let store = Store::open(dir.path(), BIG).unwrap();
        let partial = |f: &PathBuf| f.file_name().unwrap().to_string_lossy().starts_with(".tmp");
        assert!(!files(dir.path()).iter().any(partial));
        for (seed, position) in said(&output) {
            saved += position / PIECE as u64;
            let ids = text(seed);
            let found = store.load(&model, &ids).unwrap().expect("what was said to be saved");
            let n = found.position();
            assert!(n == position || n == position + PIECE as u64, "round {round}: {n} of {position}");
            let mut session = model.session().unwrap();
            ids[..n as usize].chunks(PIECE).for_each(|piece| drop(read(&mut session, piece)));
            assert_eq!(bits(&found), bits(&session.snapshot().unwrap()), "round {round}");
        }
    }
    println!("{kills} kills, {saved} snapshots");
    assert!(kills >= 95 && saved > 50, "{kills} {saved}");
}

/// A limit on the size of files stands for the full disk.
#[test]
#[cfg(unix)]
fn a_full_disk_is_an_error_and_leaves_what_was_there() {
    if in_child() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let taken = snapshots(&model, 1, 3);
    let store = Store::open(dir.path(), BIG).unwrap();
    save(&store, &taken);
    drop(store);
    let before = files(dir.path());
    let test = "qwen_store::a_full_disk_is_an_error_and_leaves_what_was_there";
    let inner = child(dir.path(), test, 7);
    let script = "ulimit -f 16 && trap '' XFSZ && exec \"$0\" \"$@\"";
    let mut full = Command::new("sh");
    full.args(["-c", script]).arg(inner.get_program()).args(inner.get_args());
    let output = full.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?)))).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).to_string();
    assert!(
        said.contains("refused") && said.contains("too large"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(files(dir.path()), before, "no trace");
    let store = Store::open(dir.path(), BIG).unwrap();
    assert_eq!(store.usage().snapshots, 3);
    assert_eq!(bits(&store.load(&model, &text(1)).unwrap().unwrap()), bits(&taken[2]));
    store.save(&snapshots(&model, 7, 1)[0]).unwrap();
}
