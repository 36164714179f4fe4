//! The front of a file of a store: what it knows of a snapshot.

use gatedelta::qwen::state::store::reread;
use twox_hash::XxHash3_128;

use super::store;

pub const WORDS: &[&str] = &[];

/// A record: once as the front of a file is, once with a length and a checksum that hold.
pub fn target(data: &[u8]) {
    check(data);
    let Some(body) = data.len().checked_sub(16).map(|n| &data[..n]) else { return };
    let sum = XxHash3_128::oneshot(body).to_le_bytes();
    // Where a record says how many bytes follow it.
    let rows = body.get(104..112).and_then(|n| n.try_into().ok()).map_or(0, u64::from_le_bytes);
    let length = (body.len() as u32 + 16).to_le_bytes();
    check(&[&b"GDROWS\x001"[..], &length, body, &sum, &vec![0; rows.min(1 << 16) as usize]].concat());
}

/// What is read is what was written: nothing is passed over, and nothing made up.
fn check(file: &[u8]) {
    if let Some(front) = reread(file) {
        assert!(file.starts_with(&front), "written again it differs");
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let rows = store::image().files.iter().filter(|(name, _)| name.ends_with(".rows"));
    let length = |file: &[u8]| u32::from_le_bytes(file[8..12].try_into().unwrap()) as usize;
    rows.map(|(_, file)| file[12..12 + length(file)].to_vec()).collect()
}
