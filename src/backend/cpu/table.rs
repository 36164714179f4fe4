//! Tables are data that an earlier launch may have written, so they are checked when their launch begins.

use crate::error::{Error, Result};

/// A row of a table.
pub(super) type Entry = [u32; 4];

/// Checks rows of (first token, tokens, state slot, _): inside `tokens` and `slots`, and no two alike.
pub(super) fn sequences(kernel: &str, table: &[Entry], tokens: usize, slots: usize) -> Result<()> {
    runs(kernel, "seqs", table, tokens)?;
    distinct_slots(kernel, "seqs", table, slots)
}

/// Checks that every row (first, count, ..) stays inside `limit` and that no two rows share an element.
pub(super) fn runs(kernel: &str, name: &str, table: &[Entry], limit: usize) -> Result<()> {
    for (i, &[first, count, ..]) in table.iter().enumerate() {
        if first as u64 + count as u64 > limit as u64 {
            let found = format!("{count} from {first}");
            return Err(Error::argument(
                format!("{kernel}: {name}[{i}]"),
                found,
                format!("inside the {limit} there are"),
            ));
        }
    }
    let rising = table.windows(2).all(|w| w[0][0] as u64 + w[0][1] as u64 <= w[1][0] as u64);
    if rising {
        return Ok(());
    }
    let mut order: Vec<&Entry> = table.iter().filter(|e| e[1] > 0).collect();
    order.sort_unstable();
    match order.windows(2).find(|w| w[0][0] as u64 + w[0][1] as u64 > w[1][0] as u64) {
        Some(w) => {
            let found = format!("{:?} and {:?}", &w[0][..2], &w[1][..2]);
            Err(Error::argument(format!("{kernel}: {name}"), found, "rows that share nothing"))
        }
        None => Ok(()),
    }
}

/// Checks that the third number of every row is below `slots` and that no two rows have the same.
pub(super) fn distinct_slots(kernel: &str, name: &str, table: &[Entry], slots: usize) -> Result<()> {
    for (i, e) in table.iter().enumerate() {
        if e[2] as usize >= slots {
            let what = format!("{kernel}: {name}[{i}] slot");
            return Err(Error::argument(what, e[2], format!("below {slots}")));
        }
    }
    let mut used: Vec<u32> = table.iter().map(|e| e[2]).collect();
    used.sort_unstable();
    match used.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(Error::argument(format!("{kernel}: {name} slot"), format!("{} twice", w[0]), "each slot once")),
        None => Ok(()),
    }
}
