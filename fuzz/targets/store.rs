//! A store of which one file holds something else.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use gatedelta::backend::cpu::Cpu;
use gatedelta::qwen::{GenerateOptions, LoadOptions, Model, Sampling, Session, Snapshot, Store};

pub const WORDS: &[&str] = &[];

const BIG: u64 = 1 << 30;
const MODEL: [(&str, &[u8]); 2] = [
    ("config.json", include_bytes!("../../tests/golden/models/tiny-text/config.json")),
    ("model.safetensors", include_bytes!("../../tests/golden/models/tiny-text/model.safetensors")),
];

/// A store and what is in it.
pub struct Image {
    model: Model,
    /// By name, in its directory.
    pub files: Vec<(String, Vec<u8>)>,
    /// What each snapshot goes on with, by its ids.
    expected: HashMap<Vec<u32>, Vec<u32>>,
}

fn text(seed: u32) -> Vec<u32> {
    (0..24u32).map(|i| (i * i * 7 + seed * 131) % 460).collect()
}

fn read(session: &mut Session, ids: &[u32]) -> Vec<u32> {
    session.prefill(ids, &mut |_, _| {}).unwrap().iter().map(|l| l.to_bits()).collect()
}

/// What a snapshot goes on with.
fn bits(snapshot: &Snapshot) -> Vec<u32> {
    let mut session = snapshot.model().session().unwrap();
    session.restore(snapshot).unwrap();
    read(&mut session, &[7])
}

/// Two texts, of one of them two snapshots that rest on one another and one with an answer under way.
pub fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        MODEL.iter().for_each(|(name, content)| fs::write(dir.path().join(name), content).unwrap());
        let backend = Arc::new(Cpu::new(Some(1)).unwrap());
        let options = LoadOptions { context: Some(64), ..LoadOptions::default() };
        let model = Model::load(dir.path(), backend, &options).unwrap();
        let mut taken = Vec::new();
        for seed in [1, 2] {
            let mut session = model.session().unwrap();
            for piece in text(seed).chunks(8).take(2) {
                read(&mut session, piece);
                taken.push(session.snapshot().unwrap());
            }
        }
        let mut session = model.session().unwrap();
        let sampling = Sampling { temperature: 1.0, presence_penalty: 1.0, ..Sampling::default() };
        let options = GenerateOptions { sampling, seed: 4, max_tokens: Some(20), ..GenerateOptions::default() };
        let mut answer = session.generate(&text(1)[..20], &options).unwrap();
        answer.by_ref().take(6).for_each(drop);
        taken.push(answer.session().snapshot().unwrap());
        let store = Store::open(dir.path(), BIG).unwrap();
        // Asks for the hash of the weights while they are there.
        for snapshot in &taken {
            store.save(snapshot).unwrap();
        }
        drop(store);
        let entries = fs::read_dir(dir.path().join("v1")).unwrap().map(|e| e.unwrap());
        let files = entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()));
        let mut files: Vec<_> = files.filter(|(name, _)| name != "lock").collect();
        files.sort();
        let expected = taken.iter().map(|s| (s.ids().to_vec(), bits(s))).collect();
        Image { model, files, expected }
    })
}

/// The first byte chooses the file, the others are its content.
pub fn target(data: &[u8]) {
    let image = image();
    let Some((which, content)) = data.split_first() else { return };
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("v1")).unwrap();
    let which = usize::from(*which) % image.files.len();
    for (i, (name, whole)) in image.files.iter().enumerate() {
        fs::write(dir.path().join("v1").join(name), if i == which { content } else { whole }).unwrap();
    }
    let view = Store::view(dir.path()).unwrap();
    let seen = take(&view, image);
    drop(view);
    let store = Store::open(dir.path(), BIG).unwrap();
    let found = take(&store, image);
    assert_eq!(seen, found, "a view finds what the store does");
    drop(store);
    again(dir.path(), image, found);
}

/// What was found once is found again.
fn again(dir: &Path, image: &Image, found: usize) {
    assert_eq!(take(&Store::open(dir, BIG).unwrap(), image), found);
}

/// All snapshots from the longest down, each of which has to be right; how many come.
fn take(store: &Store, image: &Image) -> usize {
    let mut n = 0;
    for ids in image.expected.keys() {
        if let Some(found) = store.load(&image.model, ids).unwrap() {
            assert_eq!(Some(&bits(&found)), image.expected.get(found.ids()), "a wrong one");
            n += usize::from(found.ids() == ids);
        }
    }
    n
}

pub fn seeds() -> Vec<Vec<u8>> {
    image().files.iter().enumerate().map(|(i, (_, file))| [&[i as u8][..], file].concat()).collect()
}
