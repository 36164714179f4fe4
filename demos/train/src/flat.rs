//! AdamW over all weights of a model at once, as one row of numbers.
//!
//! The steps of a small model are many short launches, and a GPU waits for the host that issues them. Taken weight by weight,
//! shortening gradients and AdamW would be near half of them.
//!
//! ```text
//! g <- g min(1, longest / |g|)
//! m <- b1 m + (1 - b1) g     v <- b2 v + (1 - b2) g^2
//! w <- w (1 - rate decay) - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! (Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019.)

use anyhow::{Result, bail};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use gatedelta::burn::Qwen35;

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.95;
const EPS: f64 = 1e-8;
/// Of matrices alone.
const DECAY: f64 = 0.1;
/// The largest norm that all gradients together may have; larger ones are shortened to it.
const LONGEST: f64 = 1.0;

/// What the paths of all matrices have one of, and no other path has.
const MATRICES: [&str; 3] = ["_proj", "embed_tokens", "lm_head"];

/// Weights whose size is a multiple of this come first: a part of the row that begins at one needs no copy on a GPU.
const ALIGNED: usize = 64;

/// See the [module](self). Everything is `[N]`, on the device of the model, without a graph.
pub struct Flat {
    /// Weights in the order of the row, and how many numbers each has.
    order: Vec<(ParamId, usize)>,
    weights: Tensor<1>,
    first: Tensor<1>,
    second: Tensor<1>,
    /// 1 where weights decay, 0 elsewhere.
    decays: Tensor<1>,
    steps: i32,
}

impl Flat {
    /// For a model, before its first step.
    pub fn new(model: &Qwen35) -> Result<Self> {
        let mut found = Weights::default();
        model.visit(&mut found);
        // A stable order: aligned ones first, each half as the model has them.
        found.all.sort_by_key(|weight| weight.size % ALIGNED != 0);
        let Some(device) = found.all.first().map(|weight| weight.numbers.device()) else {
            bail!("the model has no weights");
        };
        let order: Vec<(ParamId, usize)> = found.all.iter().map(|weight| (weight.id, weight.size)).collect();
        let decays: Vec<f32> = found
            .all
            .iter()
            .flat_map(|weight| std::iter::repeat_n(f32::from(u8::from(weight.is_matrix)), weight.size))
            .collect();
        let size = decays.len();
        let weights = Tensor::cat(found.all.into_iter().map(|weight| weight.numbers).collect(), 0);
        let zeros = Tensor::zeros([size], &device);
        let decays = Tensor::from_data(TensorData::new(decays, [size]), &device);
        Ok(Flat { order, weights, first: zeros.clone(), second: zeros, decays, steps: 0 })
    }

    /// The model after one step.
    ///
    /// Gradients that are no numbers count as zeros, so that no weight is lost before the loss that they came from is read.
    pub fn step(&mut self, rate: f64, model: Qwen35, gradients: GradientsParams) -> Qwen35 {
        let g = shortened(self.row(&model, gradients));
        self.steps += 1;
        self.first = self.first.clone() * BETA_1 + g.clone() * (1.0 - BETA_1);
        self.second = self.second.clone() * BETA_2 + g.square() * (1.0 - BETA_2);
        let first = self.first.clone() / (1.0 - BETA_1.powi(self.steps));
        let second = self.second.clone() / (1.0 - BETA_2.powi(self.steps));
        let kept = self.decays.clone() * (-rate * DECAY) + 1.0;
        self.weights = self.weights.clone() * kept - first / (second.sqrt() + EPS) * rate;
        model.map(&mut Parts { flat: self })
    }

    /// The gradients of the model as one row; zeros where a weight has none.
    fn row(&self, model: &Qwen35, gradients: GradientsParams) -> Tensor<1> {
        let mut found = Gradients { from: gradients, all: Vec::new() };
        model.visit(&mut found);
        let device = self.weights.device();
        let part = |&(id, size): &(ParamId, usize)| {
            let at = found.all.iter().position(|(other, _)| *other == id);
            at.map_or_else(|| Tensor::zeros([size], &device), |at| found.all[at].1.clone())
        };
        Tensor::cat(self.order.iter().map(part).collect(), 0)
    }

    /// What [`restore`](Flat::restore) takes: both moments.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn state(&self) -> Result<Vec<u8>> {
        let both: Vec<f32> = Tensor::cat(vec![self.first.clone(), self.second.clone()], 0).try_into_vec_as()?;
        Ok(both.into_iter().flat_map(f32::to_le_bytes).collect())
    }

    /// Goes on after so many steps with this state.
    ///
    /// # Errors
    /// If it is one of another model.
    pub fn restore(&mut self, state: &[u8], steps: u64) -> Result<()> {
        let [size] = self.weights.dims();
        if state.len() != 8 * size {
            bail!("the optimiser has {} bytes; expected {}", state.len(), 8 * size);
        }
        let device = self.weights.device();
        let half = |bytes: &[u8]| {
            let numbers: Vec<f32> =
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            Tensor::from_data(TensorData::new(numbers, [size]), &device)
        };
        (self.first, self.second) = (half(&state[..4 * size]), half(&state[4 * size..]));
        self.steps = i32::try_from(steps)?;
        Ok(())
    }
}

/// A row of gradients of at most the norm [`LONGEST`]: times `min(1, longest / norm)`, a number that stays on the device. All are
/// zeros where one is no number.
fn shortened(g: Tensor<1>) -> Tensor<1> {
    let norm = g.clone().square().sum().sqrt();
    let lost = norm.clone().is_finite().bool_not().expand(g.dims());
    let factor = ((norm + 1e-6).recip() * LONGEST).clamp_max(1.0);
    (g * factor).mask_fill(lost, 0.0)
}

/// One weight of a model.
struct Weight {
    id: ParamId,
    size: usize,
    is_matrix: bool,
    numbers: Tensor<1>,
}

/// Collects the weights of a model.
#[derive(Default)]
struct Weights {
    path: Vec<String>,
    all: Vec<Weight>,
}

impl ModuleVisitor for Weights {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val().inner();
        let size = value.dims().iter().product();
        let is_matrix = self.path.iter().any(|name| MATRICES.iter().any(|part| name.contains(part)));
        self.all.push(Weight { id: param.id, size, is_matrix, numbers: value.reshape([size]) });
    }
}

/// Collects gradients.
struct Gradients {
    from: GradientsParams,
    all: Vec<(ParamId, Tensor<1>)>,
}

impl ModuleVisitor for Gradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.from.remove::<D>(param.id) {
            let size = gradient.dims().iter().product::<usize>();
            self.all.push((param.id, gradient.reshape([size])));
        }
    }
}

/// Gives each weight its part of the row.
struct Parts<'a> {
    flat: &'a Flat,
}

impl ModuleMapper for Parts<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let mut from = 0;
        for (id, size) in &self.flat.order {
            if *id == param.id {
                let part = self.flat.weights.clone().narrow(0, from, *size);
                return param
                    .map(|old| Tensor::from_inner(part.reshape(old.dims())).set_require_grad(old.is_require_grad()));
            }
            from += size;
        }
        param
    }
}

#[cfg(test)]
mod tests {
    use burn::module::ParamGroup;
    use burn::optim::AdamWConfig;
    use burn::tensor::{Device, Int};
    use gatedelta::burn::Engine;

    use super::*;
    use crate::learn::alone;
    use crate::training::tests::tiny;

    fn model(device: &Device) -> Qwen35 {
        tiny().init(&Engine::open(Some("cpu")).unwrap(), device).unwrap()
    }

    fn loss(model: &Qwen35, device: &Device) -> Tensor<1> {
        let ids = Tensor::<2, Int>::from_data(TensorData::new((0..20i64).collect(), [2, 10]), device);
        model.forward(ids).powi_scalar(2).mean()
    }

    fn gradients(model: &Qwen35, device: &Device, times: f64) -> GradientsParams {
        GradientsParams::from_grads((loss(model, device) * times).backward(), model)
    }

    /// The weights of a model, as the row has them.
    fn weights(model: &Qwen35) -> Vec<f32> {
        Flat::new(model).unwrap().weights.try_into_vec_as().unwrap()
    }

    #[test]
    fn weights_decay_if_they_are_matrices() {
        let _alone = alone();
        let config = tiny().with_tie_word_embeddings(false);
        let model = config.init(&Engine::open(Some("cpu")).unwrap(), &Device::flex()).unwrap();
        let mut found = Weights::default();
        model.visit(&mut found);
        assert!(found.all.len() > 40);
        struct Two(Vec<bool>);
        impl ModuleVisitor for Two {
            fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
                self.0.push(D == 2);
            }
        }
        let mut two = Two(Vec::new());
        model.visit(&mut two);
        assert_eq!(found.all.iter().map(|weight| weight.is_matrix).collect::<Vec<_>>(), two.0);
    }

    #[test]
    fn a_step_is_that_of_adamw_taken_weight_by_weight() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let start = model(&device);
        let adamw = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_epsilon(1e-8);
        let (bare, decayed) = (adamw.clone().with_weight_decay(0.0), adamw.with_weight_decay(0.1));
        let matrices = ParamGroup::from_any_predicates(MATRICES.to_vec());
        let mut peer = bare.init().with_group(matrices, decayed.build(), None);
        let (mut ours, mut theirs) = (start.clone(), start.clone());
        let mut flat = Flat::new(&start).unwrap();
        for step in 1..5 {
            // The same gradients for both, so that no rounding comes back larger; too short to be shortened.
            let same = || gradients(&start, &device, 1e-2 / f64::from(step));
            ours = flat.step(1e-2 * f64::from(step), ours, same());
            theirs = peer.step(1e-2 * f64::from(step), theirs, same());
        }
        let (ours, theirs, start) = (weights(&ours), weights(&theirs), weights(&start));
        let norm = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let (apart, way) = (norm(&ours, &theirs), norm(&theirs, &start));
        assert!(way > 1.0 && apart <= 1e-6 * way, "{apart} {way}");
    }

    #[test]
    fn long_gradients_are_shortened_and_lost_ones_count_as_zero() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let model = model(&device);
        let flat = Flat::new(&model).unwrap();
        let row = |times: f64| flat.row(&model, gradients(&model, &device, times));
        let numbers = |row: Tensor<1>| -> Vec<f32> { row.try_into_vec_as().unwrap() };
        let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let whole = norm(&numbers(row(1.0)));
        assert!(whole > 1e-3, "{whole}");
        let long = row(7.0 / whole);
        let (before, after) = (numbers(long.clone()), numbers(shortened(long)));
        assert!((norm(&before) - 7.0).abs() < 1e-2 && (norm(&after) - 1.0).abs() < 1e-4, "{}", norm(&after));
        let factor = norm(&after) / norm(&before);
        let apart =
            before.iter().zip(&after).map(|(x, y)| (f64::from(*x) * factor - f64::from(*y)).powi(2)).sum::<f64>();
        assert!(apart.sqrt() < 1e-6, "every number by the same factor: {apart}");
        let short = row(0.5 / whole);
        assert_eq!(numbers(shortened(short.clone())), numbers(short), "short ones stay as they are");
        for times in [f64::NAN, f64::INFINITY] {
            assert!(numbers(shortened(row(times))).iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn it_goes_on_bit_for_bit_from_its_state() {
        let _alone = alone();
        let device = Device::flex().autodiff();
        let mut model = model(&device);
        let mut flat = Flat::new(&model).unwrap();
        for _ in 0..3 {
            model = flat.step(1e-2, model.clone(), gradients(&model, &device, 1.0));
        }
        let mut again = Flat::new(&model).unwrap();
        again.restore(&flat.state().unwrap(), 3).unwrap();
        let one = flat.step(1e-2, model.clone(), gradients(&model, &device, 1.0));
        let two = again.step(1e-2, model.clone(), gradients(&model, &device, 1.0));
        assert_eq!(weights(&one), weights(&two));
        assert_ne!(weights(&one), weights(&model));
        assert!(again.restore(&[0; 8], 1).unwrap_err().to_string().contains("the optimiser has 8 bytes"));
    }
}
