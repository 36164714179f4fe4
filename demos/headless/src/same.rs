//! The same inputs give the same bits, every time.

use anyhow::{Result, bail, ensure};

/// Names and words of what was computed.
pub type Parts<'a> = Vec<(&'static str, &'a [u32])>;

/// Computes the same `runs` times, once at least: what came first, if all others are the same in every bit.
///
/// # Errors
/// What `compute` reports, and where a run differs from the first.
pub fn repeated<T>(runs: u32, compute: impl Fn() -> Result<T>, parts: impl Fn(&T) -> Parts<'_>) -> Result<T> {
    let first = compute()?;
    for run in 2..=runs {
        let again = compute()?;
        for ((name, first), (_, again)) in parts(&first).into_iter().zip(parts(&again)) {
            let (found, expected) = (again.len(), first.len());
            ensure!(
                found == expected,
                "{name}: run {run} of the same inputs has {found} numbers, the first {expected}"
            );
            if let Some(at) = first.iter().zip(again).position(|(first, again)| first != again) {
                bail!("{name}: run {run} of the same inputs gives other bits, first in number {at}");
            }
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Runs of which each gets its number.
    fn counted(runs: u32, compute: impl Fn(u32) -> Vec<f32>) -> (u32, Result<Vec<f32>>) {
        let count = Cell::new(0);
        let result = repeated(
            runs,
            || {
                count.set(count.get() + 1);
                Ok(compute(count.get()))
            },
            |x| vec![("x", bytemuck::cast_slice(x))],
        );
        (count.get(), result)
    }

    #[test]
    fn runs_that_agree_give_the_first_and_others_are_named() {
        for (runs, expected) in [(0, 1), (1, 1), (2, 2), (100, 100)] {
            let (count, result) = counted(runs, |_| vec![1.0, f32::NAN]);
            assert_eq!((count, result.unwrap().len()), (expected, 2), "NaN of the same bits is the same");
        }
        let said = |runs, compute: fn(u32) -> Vec<f32>| counted(runs, compute).1.unwrap_err().to_string();
        let third = said(5, |run| vec![1.0, if run == 3 { -0.0 } else { 0.0 }]);
        assert_eq!(third, "x: run 3 of the same inputs gives other bits, first in number 1");
        assert_eq!(said(2, |run| vec![0.0; run as usize]), "x: run 2 of the same inputs has 2 numbers, the first 1");
        assert!(counted(2, |run| vec![if run == 3 { 1.0 } else { 0.0 }]).1.is_ok(), "two runs are two");
    }

    #[test]
    fn an_error_of_any_run_is_told() {
        let left = Cell::new(2);
        let compute = || {
            ensure!(left.get() > 0, "lost");
            left.set(left.get() - 1);
            Ok(vec![0u32])
        };
        assert_eq!(repeated(9, compute, |x| vec![("x", x)]).unwrap_err().to_string(), "lost");
    }
}
