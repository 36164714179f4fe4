//! The gradients of every case on one device, in every storage type.

use std::time::Instant;

use anyhow::{Context, Result};
use gatedelta::backend::Backend;
use gatedelta::gdn;
use gatedelta::shape::Dtype;

use crate::case::{self, Case};
use crate::check::{Worst, progress};
use crate::junit::Test;
use crate::table::{self, Table, verdict};
use crate::{oracle, same, say};

/// Storage types, simplest first.
const STORES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// The largest relative error of a gradient: dq, dk and dv are stored as q, k and v are.
pub fn bound(store: Dtype) -> f64 {
    if store == Dtype::F32 { 1e-5 } else { 5e-3 }
}

/// The gradients of a case that has cotangents, computed `runs` times, in f32 twice at least: all must give the same bits.
///
/// # Errors
/// A case without cotangents, whatever the library reports, and a run that differs from the first.
pub fn compute(backend: &dyn Backend, case: &Case, store: Dtype, runs: u32) -> Result<gdn::Gradients> {
    let given = case.cotangents.as_ref().context("tensor do is missing")?;
    let cotangents = gdn::Cotangents { d_o: &given.d_o, dht: given.dht.as_deref() };
    let runs = if store == Dtype::F32 { runs.max(2) } else { runs };
    same::repeated(
        runs,
        || Ok(gdn::backward(backend, &case.inputs(store), &cotangents)?),
        |found| named(found).map(|(name, x)| (name, bytemuck::cast_slice(x))).to_vec(),
    )
}

/// Names and gradients.
pub fn named(found: &gdn::Gradients) -> [(&'static str, &[f32]); 6] {
    [
        ("dq", &found.dq),
        ("dk", &found.dk),
        ("dv", &found.dv),
        ("dg", &found.dg),
        ("dbeta", &found.dbeta),
        ("dh0", &found.dh0),
    ]
}

/// The relative error of each gradient that has an answer, in the order of [`named`].
pub fn errors(found: &gdn::Gradients, wanted: &case::Gradients) -> [Option<f64>; 6] {
    let error = |found: &[f32], wanted: &[f32]| Some(oracle::error(found, wanted));
    [
        error(&found.dq, &wanted.dq),
        error(&found.dk, &wanted.dk),
        error(&found.dv, &wanted.dv),
        error(&found.dg, &wanted.dg),
        error(&found.dbeta, &wanted.dbeta),
        wanted.dh0.as_ref().and_then(|wanted| error(&found.dh0, wanted)),
    ]
}

/// Checks the cases that have gradients, prints them as a table, and notes the largest errors in `worst`, one a storage type.
pub fn check(
    label: &str,
    backend: &dyn Backend,
    cases: &[Case],
    runs: u32,
    tests: &mut Vec<Test>,
    worst: &mut [Worst],
) {
    let columns =
        ["case", "f32 dq", "f32 dk", "f32 dv", "f32 dg", "f32 dbeta", "f32 dh0", "f16 worst", "bf16 worst", "verdict"];
    let mut table = Table::new(1, &columns);
    let mut failures = String::new();
    for case in cases.iter().filter(|case| case.gradients.is_some()) {
        let (mut row, mut pass) = (vec![case.name.clone()], true);
        for (&store, worst) in STORES.iter().zip(&mut *worst) {
            progress(&format!("{label}: {} backward {store}", case.name));
            let begin = Instant::now();
            let judged = judge(case, compute(backend, case, store, runs), bound(store));
            let seconds = begin.elapsed().as_secs_f64();
            for (name, error) in &judged.errors {
                worst.add(*error, || format!("{name} of {}", case.name));
            }
            let name = format!("backward {store}");
            if let Some(why) = &judged.failure {
                pass = false;
                failures.push_str(&format!("{} {name}: {why}\n", case.name));
            }
            row.extend(if store == Dtype::F32 { judged.cells() } else { vec![judged.worst()] });
            let output = judged.output(bound(store));
            tests.push(Test {
                class: format!("{label}.{}", case.name),
                name,
                seconds,
                output,
                failure: judged.failure,
            });
        }
        row.push(verdict(pass));
        table.row(row);
    }
    progress("");
    say(&format!("{table}{failures}"));
}

/// What became of one case in one storage type.
struct Judged {
    /// Of the gradients that have answers, where there are gradients.
    errors: Vec<(&'static str, f64)>,
    failure: Option<String>,
}

impl Judged {
    /// One cell for each gradient.
    fn cells(&self) -> Vec<String> {
        let cell =
            |name: &str| self.errors.iter().find(|(n, _)| *n == name).map_or("-".into(), |(_, e)| table::error(*e));
        ["dq", "dk", "dv", "dg", "dbeta", "dh0"].map(cell).to_vec()
    }

    /// The largest error.
    fn worst(&self) -> String {
        self.errors.iter().map(|(_, e)| *e).reduce(f64::max).map_or("-".into(), table::error)
    }

    /// The numbers of a report.
    fn output(&self, bound: f64) -> String {
        let errors = self.errors.iter().map(|(name, e)| format!("{name} {}, ", table::error(*e)));
        format!("{}at most {bound:.0e}", errors.collect::<String>())
    }
}

fn judge(case: &Case, result: Result<gdn::Gradients>, bound: f64) -> Judged {
    let failed = |why: String| Judged { errors: Vec::new(), failure: Some(why) };
    let found = match result {
        Ok(found) => found,
        Err(error) => return failed(format!("{error:#}")),
    };
    let Some(wanted) = &case.gradients else { return failed("no answers".into()) };
    let errors: Vec<_> = named(&found)
        .into_iter()
        .zip(errors(&found, wanted))
        .filter_map(|((name, _), error)| error.map(|error| (name, error)))
        .collect();
    let wrong: Vec<_> = errors
        .iter()
        .filter(|(_, error)| *error > bound)
        .map(|(name, error)| format!("{name}: relative error {}, at most {bound:.0e} allowed", table::error(*error)))
        .collect();
    Judged { errors, failure: (!wrong.is_empty()).then(|| wrong.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Case {
        let cases = oracle::generated().unwrap();
        cases.into_iter().find(|c| c.name == "generated_small_heads").unwrap()
    }

    fn right(case: &Case) -> gdn::Gradients {
        let case::Gradients { dq, dk, dv, dg, dbeta, dh0 } = case.gradients.clone().unwrap();
        gdn::Gradients { dq, dk, dv, dg, dbeta, dh0: dh0.unwrap() }
    }

    #[test]
    fn a_wrong_gradient_fails_and_so_do_nan_and_a_wrong_length() {
        let case = small();
        let judged = |g: gdn::Gradients| judge(&case, Ok(g), 1e-5).failure;
        assert_eq!(judged(right(&case)), None);
        type Pick = fn(&mut gdn::Gradients) -> &mut Vec<f32>;
        let picks: [(&str, Pick); 6] = [
            ("dq", |g| &mut g.dq),
            ("dk", |g| &mut g.dk),
            ("dv", |g| &mut g.dv),
            ("dg", |g| &mut g.dg),
            ("dbeta", |g| &mut g.dbeta),
            ("dh0", |g| &mut g.dh0),
        ];
        for (name, pick) in picks {
            let after = |change: fn(&mut Vec<f32>)| {
                let mut g = right(&case);
                change(pick(&mut g));
                judged(g).unwrap()
            };
            assert!(after(|x| x[5] += 1.0).starts_with(&format!("{name}: relative error")), "{name}");
            assert!(after(|x| x[0] = f32::NAN).starts_with(&format!("{name}: relative error NaN")), "{name}");
            assert!(after(|x| x.truncate(x.len() - 1)).starts_with(&format!("{name}: relative error NaN")), "{name}");
            assert!(after(Vec::clear).starts_with(name), "{name}");
        }
    }

    #[test]
    fn an_error_fails_and_no_answers_do_not_pass() {
        let mut case = small();
        let judged = judge(&case, Err(anyhow::anyhow!("lost")), 1.0);
        assert_eq!((judged.failure.as_deref(), judged.worst(), judged.cells().len()), (Some("lost"), "-".into(), 6));
        let found = right(&case);
        case.gradients = None;
        assert!(judge(&case, Ok(found), 1.0).failure.is_some());
    }

    #[test]
    fn a_failure_is_in_the_report_and_in_the_worst() {
        let mut case = small();
        case.gradients.as_mut().unwrap().dg[3] += 9.0;
        let backend = gatedelta::device::open(Some("cpu")).unwrap().0;
        let (mut tests, mut worst) = (Vec::new(), vec![Worst::default(); STORES.len()]);
        check("cpu", &*backend, &[case, Case { gradients: None, ..small() }], 1, &mut tests, &mut worst);
        assert_eq!(tests.len(), 3);
        for (test, worst) in tests.iter().zip(&worst) {
            assert!(test.failure.as_ref().unwrap().starts_with("dg: relative error"), "{:?}", test.failure);
            assert_eq!((worst.at.as_str(), worst.error > 0.1), ("dg of generated_small_heads", true));
        }
    }
}
