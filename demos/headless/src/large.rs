//! Cases of `check --large`: the shapes that FlashQLA tests its kernels on (`tests/test_gdr_unit.py`: heads of 128, batches and
//! single sequences of up to 32768 tokens, gates from none at all to total decay), grids beyond 65,535, generated here.

use gatedelta::shape::{HeadMap, Heads, Shape};

use crate::case::Case;
use crate::oracle::{self, Random};
use crate::oracle_grad;

/// Name, q/k and value heads, cumulated lengths.
const SHAPES: [(&str, u32, u32, &[u64]); 9] = [
    ("large_4_4", 4, 4, &[0, 4096]),
    ("large_2_8", 2, 8, &[0, 4096]),
    ("large_4_16", 4, 16, &[0, 4096]),
    ("large_ragged", 16, 32, &[0, 410, 841, 1135, 2126, 2512, 4096]),
    ("large_short", 16, 64, &[0, 211, 985]),
    ("large_eleven", 8, 8, &[0, 33, 40, 71, 72, 105, 120, 153, 153, 170, 199, 232]),
    ("large_three", 4, 8, &[0, 16789, 16800, 25001]),
    ("large_one_4", 4, 4, &[0, 32768]),
    ("large_one_16", 16, 16, &[0, 32768]),
];

/// All of them with their answers in float64: minutes, and some 10 GiB of memory.
///
/// # Errors
/// None that a caller can cause: the shapes are legal.
pub fn cases() -> gatedelta::Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (i, (name, hk, hv, cu)) in SHAPES.into_iter().enumerate() {
        let shape = Shape::new(Heads::new(hk, hv, 128, 128, HeadMap::Div)?, cu.to_vec())?;
        cases.push(answered(inputs(name, shape, i as u64), i as u64));
    }
    // More sequences than a grid of WebGPU has cells along one side.
    let many = Shape::new(Heads::new(1, 1, 16, 16, HeadMap::Div)?, (0..=70_000).collect())?;
    cases.push(answered(inputs("large_70000_sequences", many, 100), 100));
    Ok(cases)
}

/// FlashQLA's inputs: unit q and k; decay of head h `A softplus(x / 2 + 1)` with A = 0 for the first head, 16 for the last, any
/// between for the others; beta = sigmoid(x).
fn inputs(name: &str, shape: Shape, seed: u64) -> Case {
    let hv = shape.heads.hv as usize;
    let mut case = oracle::inputs(name, shape, false, true, 1000 + seed);
    let mut random = Random::new(2000 + seed);
    let rates: Vec<f32> = (0..hv)
        .map(|h| match h {
            0 => 0.0,
            _ if h + 1 == hv => 16.0,
            _ => 16.0 * random.uniform(),
        })
        .collect();
    for (i, g) in case.g.iter_mut().enumerate() {
        *g = -rates[i % hv] * (0.5 * random.normal() + 1.0).exp().ln_1p();
    }
    case.beta.iter_mut().for_each(|beta| *beta = 1.0 / (1.0 + (-random.normal()).exp()));
    case.large = true;
    case
}

fn answered(mut case: Case, seed: u64) -> Case {
    case.answers = Some(oracle::answers(&case));
    let mut cotangents = oracle_grad::cotangents(&case, 3000 + seed);
    cotangents.dht.iter_mut().flatten().for_each(|x| *x /= 8.0);
    case.gradients = Some(oracle_grad::gradients(&case, &cotangents));
    case.cotangents = Some(cotangents);
    case
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decay_goes_from_none_to_total() {
        let heads = Heads::new(1, 3, 16, 16, HeadMap::Div).unwrap();
        let case = inputs("x", Shape::one(heads, 200), 1);
        let of = |h: usize| case.g.iter().skip(h).step_by(3);
        assert!(of(0).all(|&g| g == 0.0) && of(1).all(|&g| g < 0.0 && g.is_finite()));
        let mean = of(2).sum::<f32>() / 200.0;
        assert!((-25.0..-15.0).contains(&mean), "{mean}");
        assert!(case.beta.iter().all(|&b| 0.0 < b && b < 1.0));
    }
}
