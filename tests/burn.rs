//! The layers for burn: gradients against finite differences in float64 and against burn's own, training, checkpoints.

use ::burn::backend::flex::FlexDevice;
use ::burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use ::burn::optim::{AdamWConfig, GradientsParams};
use ::burn::tensor::{DType, Device, FloatDType, Gradients, Int, Tensor, TensorData};
use gatedelta::Error;
use gatedelta::burn::{Engine, GatedDeltaNetConfig, Qwen35, Qwen35Config, Rule, gated_delta_rule, parts, plain};
use gatedelta::gdn::Options;
use gatedelta::qwen::{LoadOptions, Model};
use gatedelta::shape::Dtype;

use crate::qwen_naive::Tiny;
use crate::util::{Random, devices, error};

/// B, T, Hk, Hv, K, V
pub type Sizes = [usize; 6];

pub const NAMES: [&str; 6] = ["q", "k", "v", "g", "beta", "h0"];

fn shapes([b, t, hk, hv, k, v]: Sizes) -> [Vec<usize>; 6] {
    [vec![b, t, hk, k], vec![b, t, hk, k], vec![b, t, hv, v], vec![b, t, hv], vec![b, t, hv], vec![b, hv, k, v]]
}

/// q, k, v, g, beta, h0: numbers that f32 holds exactly.
pub fn inputs(sizes: Sizes, seed: u64) -> [Vec<f64>; 6] {
    let mut r = Random::new(seed);
    let unit = |r: &mut Random| f64::from(r.unit() as f32);
    let all = shapes(sizes).map(|s| s.iter().product::<usize>());
    std::array::from_fn(|i| {
        (0..all[i])
            .map(|_| match i {
                3 => -unit(&mut r),
                4 => unit(&mut r),
                _ => f64::from(r.normal()),
            })
            .collect()
    })
}

/// A layout of numbers that is known to be theirs: weights of the sum that is differentiated.
pub fn weights(n: usize, seed: u64) -> Vec<f64> {
    let mut r = Random::new(seed);
    (0..n).map(|_| f64::from(r.normal())).collect()
}

/// The definition, in float64: `[o | ht]`. Without the delta, what is written is `beta v`.
pub fn recurrence(x: &[Vec<f64>; 6], [b, t, hk, hv, dk, dv]: Sizes, options: &Options, delta: bool) -> Vec<f64> {
    let [q, k, v, g, beta, h0] = x;
    let scale = options.scale.map_or((dk as f64).powf(-0.5), f64::from);
    let unit = |x: &[f64]| -> Vec<f64> {
        let squares: f64 = x.iter().map(|x| x * x).sum();
        let r = if options.qk_l2norm { 1.0 / (squares + 1e-6).sqrt() } else { 1.0 };
        x.iter().map(|x| x * r).collect()
    };
    let mut o = vec![0.0; b * t * hv * dv];
    let mut ht = h0.clone();
    for (n, s) in ht.chunks_mut(dk * dv).enumerate() {
        let (n, h) = (n / hv, n % hv);
        for t in n * t..(n + 1) * t {
            let at = (t * hk + h / (hv / hk)) * dk;
            let (q, k) = (unit(&q[at..at + dk]), unit(&k[at..at + dk]));
            s.iter_mut().for_each(|s| *s *= g[t * hv + h].exp());
            for j in 0..dv {
                let read: f64 = if delta { (0..dk).map(|i| s[i * dv + j] * k[i]).sum() } else { 0.0 };
                let d = beta[t * hv + h] * (v[(t * hv + h) * dv + j] - read);
                (0..dk).for_each(|i| s[i * dv + j] += k[i] * d);
                o[(t * hv + h) * dv + j] = scale * (0..dk).map(|i| s[i * dv + j] * q[i]).sum::<f64>();
            }
        }
    }
    o.extend(ht);
    o
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn tensor<const D: usize>(numbers: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(numbers.to_vec(), shape.to_vec()), (device, dtype))
}

pub fn wide<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.try_into_vec_as::<f64>().unwrap()
}

/// Relative L2 error; infinite for NaN.
pub fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    if found.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let diff: Vec<f64> = found.iter().zip(expected).map(|(f, e)| f - e).collect();
    dot(&diff, &diff).sqrt() / dot(expected, expected).sqrt().max(1e-300)
}

/// One way to compute the operator.
pub type Operator<'a> = &'a dyn Fn([Tensor<4>; 3], [Tensor<3>; 2], Option<Tensor<4>>) -> (Tensor<4>, Tensor<4>);

/// `[o | ht]` and the gradients of `sum(w * [o | ht])`, the last of h0 if there is one.
pub fn differentiate(
    operator: Operator<'_>,
    x: &[Vec<f64>; 6],
    sizes: Sizes,
    w: &[f64],
    h0: bool,
    (dtype, device): (DType, &Device),
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let s = shapes(sizes);
    let four = |i: usize| tensor::<4>(&x[i], &s[i], dtype, device).require_grad();
    let three = |i: usize| tensor::<3>(&x[i], &s[i], dtype, device).require_grad();
    let (q, k, v, g, beta, state) = (four(0), four(1), four(2), three(3), three(4), four(5));
    let (o, ht) = operator([q.clone(), k.clone(), v.clone()], [g.clone(), beta.clone()], h0.then(|| state.clone()));
    assert_eq!((o.dtype(), ht.dtype()), (dtype, dtype));
    let (wo, wh) = w.split_at(x[2].len());
    let mut loss = (o.clone() * tensor(wo, &s[2], dtype, device)).sum();
    // What nothing looks at has no gradient.
    if wh.iter().any(|w| *w != 0.0) {
        loss = loss + (ht.clone() * tensor(wh, &s[5], dtype, device)).sum();
    }
    let grads = loss.backward();
    let mut all: Vec<Vec<f64>> = [&q, &k, &v].iter().map(|x| wide(x.grad(&grads).unwrap())).collect();
    all.extend([&g, &beta].iter().map(|x| wide(x.grad(&grads).unwrap())));
    if h0 {
        all.push(wide(state.grad(&grads).unwrap()));
    }
    let mut out = wide(o);
    out.extend(wide(ht));
    (out, all)
}

pub fn flex() -> Device {
    Device::new(FlexDevice).autodiff()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let sizes = [2, 70, 1, 2, 16, 32];
    let options = Options { qk_l2norm: true, ..Options::default() };
    let x = inputs(sizes, 1);
    let w = weights(x[2].len() + x[5].len(), 2);
    let loss = |x: &[Vec<f64>; 6]| dot(&recurrence(x, sizes, &options, true), &w);
    // A sample of every input's numbers, by central differences.
    let mut r = Random::new(3);
    let sample: Vec<Vec<usize>> =
        x.iter().map(|x| (0..40).map(|_| (r.unit() * x.len() as f64) as usize).collect()).collect();
    let expected: Vec<Vec<f64>> = (0..6)
        .map(|i| {
            let at = |j: usize, step: f64| {
                let mut moved = x.clone();
                moved[i][j] += step;
                loss(&moved)
            };
            sample[i].iter().map(|&j| (at(j, 1e-5) - at(j, -1e-5)) / 2e-5).collect()
        })
        .collect();
    for device in devices() {
        let engine = Engine::new(device.backend.clone());
        let operator: Operator<'_> = &|qkv, gates, h0| gated_delta_rule(&engine, qkv, gates, h0, &options);
        let (out, grads) = differentiate(operator, &x, sizes, &w, true, (DType::F32, &flex()));
        let e = distance(&out, &recurrence(&x, sizes, &options, true));
        assert!(e <= 1e-5, "{}: {e:e}", device.name);
        for i in 0..6 {
            let found: Vec<f64> = sample[i].iter().map(|&j| grads[i][j]).collect();
            let e = distance(&found, &expected[i]);
            println!("{} d{}: {e:.1e}", device.name, NAMES[i]);
            assert!(e <= 1e-5, "{} d{}: {e:e}", device.name, NAMES[i]);
        }
    }
}

#[test]
fn gradients_are_those_of_burn() {
    let plain_options = |l2norm, scale| Options { qk_l2norm: l2norm, scale, ..Options::default() };
    for (i, (sizes, h0, state, options)) in [
        ([1, 1, 1, 1, 16, 16], true, true, plain_options(true, None)),
        ([2, 33, 2, 6, 32, 16], true, true, plain_options(true, Some(0.5))),
        ([3, 20, 1, 2, 16, 48], false, true, plain_options(true, None)),
        ([1, 40, 2, 2, 16, 16], true, false, plain_options(true, None)),
    ]
    .into_iter()
    .enumerate()
    {
        let mut x = inputs(sizes, 10 + i as u64);
        if !h0 {
            x[5].fill(0.0);
        }
        let mut w = weights(x[2].len() + x[5].len(), 20);
        if !state {
            w[x[2].len()..].fill(0.0);
        }
        let reference: Operator<'_> = &|qkv, gates, h0| plain::recurrence(qkv, gates, h0, &options);
        let (out, expected) = differentiate(reference, &x, sizes, &w, h0, (DType::F64, &flex()));
        assert!(distance(&out, &recurrence(&x, sizes, &options, true)) <= 1e-12);
        for device in devices() {
            let engine = Engine::new(device.backend.clone());
            let kernels: Operator<'_> = &|qkv, gates, h0| gated_delta_rule(&engine, qkv, gates, h0, &options);
            let mut places = vec![(DType::F32, flex())];
            if device.name == "cpu" {
                places.extend([(DType::F64, flex()), (DType::F32, flex().gradient_checkpointing())]);
            }
            for (dtype, place) in places {
                let (found_out, found) = differentiate(kernels, &x, sizes, &w, h0, (dtype, &place));
                let e = distance(&found_out, &out);
                assert!(e <= 1e-5, "{} {sizes:?}: {e:e}", device.name);
                assert_eq!(found.len(), expected.len());
                for (name, (found, expected)) in NAMES.iter().zip(found.iter().zip(&expected)) {
                    let e = distance(found, expected);
                    println!("{} {sizes:?} {dtype:?} d{name}: {e:.1e}", device.name);
                    assert!(e <= 1e-5, "{} {sizes:?} {dtype:?} d{name}: {e:e}", device.name);
                }
            }
        }
    }
}

#[test]
fn a_constant_gets_no_gradient_and_costs_none() {
    let sizes = [2, 9, 1, 1, 16, 16];
    let (x, s) = (inputs(sizes, 5), shapes(sizes));
    let engine = Engine::open(Some("cpu")).unwrap();
    let (with, without) = (flex(), flex().without_autodiff());
    let make = |i: usize, device: &Device| tensor::<4>(&x[i], &s[i], DType::F32, device);
    let gates = |device: &Device| [3, 4].map(|i| tensor::<3>(&x[i], &s[i], DType::F32, device));
    let options = Options::default();
    let x4 = |device: &Device| [0, 1, 2].map(|i| make(i, device));
    let (plain, _) = gated_delta_rule(&engine, x4(&without), gates(&without), None, &options);
    assert!(!plain.is_autodiff());
    // q alone is tracked; everything else lives on a device that knows of no gradients.
    let [q, k, v] = [make(0, &with).require_grad(), make(1, &without), make(2, &without)];
    let (o, _) = gated_delta_rule(&engine, [q.clone(), k, v], gates(&without), Some(make(5, &without)), &options);
    assert!(o.is_autodiff());
    let grads = o.sum().backward();
    assert!(wide(q.grad(&grads).unwrap()).iter().any(|d| *d != 0.0));
}

#[test]
fn gated_linear_attention_is_its_recurrence() {
    let sizes = [2, 150, 1, 2, 16, 32];
    let options = Options { qk_l2norm: true, ..Options::default() };
    let x = inputs(sizes, 7);
    let w = weights(x[2].len() + x[5].len(), 8);
    let operator: Operator<'_> = &|qkv, gates, h0| plain::gated_linear(qkv, gates, h0, &options);
    let (out, grads) = differentiate(operator, &x, sizes, &w, true, (DType::F64, &flex()));
    let e = distance(&out, &recurrence(&x, sizes, &options, false));
    assert!(e <= 1e-12, "{e:e}");
    // Along one direction per input.
    for i in 0..6 {
        let u = weights(x[i].len(), 30 + i as u64);
        let at = |step: f64| {
            let mut moved = x.clone();
            moved[i].iter_mut().zip(&u).for_each(|(x, u)| *x += step * u);
            dot(&recurrence(&moved, sizes, &options, false), &w)
        };
        let (found, expected) = (dot(&grads[i], &u), (at(1e-6) - at(-1e-6)) / 2e-6);
        let e = (found - expected).abs() / expected.abs();
        println!("d{}: {e:.1e}", NAMES[i]);
        assert!(e <= 1e-6, "d{}: {found} {expected}", NAMES[i]);
    }
}

/// Fills every parameter with its own random numbers: exact in bf16, and the same whatever other tests draw from burn.
pub struct Fill(pub Random);

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, old, mapper) = param.consume();
        let dims = old.dims();
        // Matrices [in, out] keep the size of what goes through them; vectors are norms, A_log and dt_bias.
        let scale = if D == 2 { 0.5f64.powi((dims[0] as f64).log2() as i32 / 2) } else { 0.25 };
        let numbers = weights(dims.iter().product(), (self.0.unit() * 1e9) as u64);
        let numbers: Vec<f64> = numbers.iter().map(|x| x * scale).collect();
        let new = tensor(&numbers, &dims, old.dtype(), &old.device()).require_grad();
        Param::from_mapped_value(id, new, mapper)
    }
}

/// Moves parameter number `at` by `step` times its own random direction, and makes all of them float64.
pub struct Nudge {
    pub at: usize,
    pub step: f64,
    pub seen: usize,
}

impl ModuleMapper for Nudge {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, old, mapper) = param.consume();
        let device = old.device();
        let mut new = old.detach().cast(FloatDType::F64).detach();
        if self.seen == self.at {
            let u = weights(new.dims().iter().product(), 1000 + self.at as u64);
            new = new.clone() + tensor(&u, &new.dims(), DType::F64, &device) * self.step;
        }
        self.seen += 1;
        Param::from_mapped_value(id, new.detach().require_grad(), mapper)
    }
}

/// The gradient of every parameter, with its place in the model.
pub struct Collect<'a> {
    pub grads: &'a Gradients,
    pub path: Vec<String>,
    pub found: Vec<(String, Vec<f64>)>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.join(".");
        let grad = param.val().grad(self.grads).unwrap_or_else(|| panic!("no gradient for {name}"));
        self.found.push((name, wide(grad)));
    }
}

/// A model of one linear and one full layer with all the groupings, filled from a seed.
pub fn model(engine: &Engine, tied: bool, seed: u64) -> Qwen35 {
    let config = Qwen35Config::new(40, 32, 48, 2, 4, 2)
        .with_full_attention_interval(2)
        .with_head_dim(16)
        .with_partial_rotary_factor(0.5)
        .with_linear_num_key_heads(2)
        .with_linear_num_value_heads(4)
        .with_linear_key_head_dim(16)
        .with_linear_value_head_dim(32)
        .with_tie_word_embeddings(tied);
    config.init(engine, &flex()).unwrap().map(&mut Fill(Random::new(seed)))
}

pub fn ids(sizes: [usize; 2], vocab: usize) -> (Vec<u32>, Tensor<2, Int>) {
    let mut r = Random::new(77);
    let ids: Vec<u32> = (0..sizes[0] * sizes[1]).map(|_| (r.unit() * vocab as f64) as u32).collect();
    let data = TensorData::new(ids.iter().map(|&i| i64::from(i)).collect::<Vec<_>>(), sizes);
    (ids, Tensor::from_data(data, &flex()))
}

#[test]
fn a_whole_model_has_the_gradients_of_finite_differences() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let kernels = model(&engine, false, 1);
    let (_, ids) = ids([2, 7], 40);
    let w = weights(2 * 7 * 40, 4);
    let loss =
        |model: &Qwen35, dtype| (model.forward(ids.clone()) * tensor::<3>(&w, &[2, 7, 40], dtype, &flex())).mean();
    let collect = |model: &Qwen35, loss: Tensor<1>| {
        let grads = loss.backward();
        let mut collect = Collect { grads: &grads, path: Vec::new(), found: Vec::new() };
        model.visit(&mut collect);
        collect.found
    };
    // The same model in float64, the rule token by token.
    let exact = |at: usize, step: f64| kernels.clone().with_rule(Rule::Plain).map(&mut Nudge { at, step, seen: 0 });
    let still = exact(usize::MAX, 0.0);
    let expected = collect(&still, loss(&still, DType::F64));
    assert_eq!(expected.len(), 2 + 2 * 2 + 2 * 3 + 9 + 6 + 1);
    let found = collect(&kernels, loss(&kernels, DType::F32));
    let (mut worst, mut worst_difference) = (0f64, 0f64);
    for (i, ((name, found), (_, expected))) in found.iter().zip(&expected).enumerate() {
        let e = distance(found, expected);
        worst = worst.max(e);
        assert!(e <= 1e-5, "{name}: {e:e}");
        let at = |step: f64| wide(loss(&exact(i, step), DType::F64))[0];
        let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
        let along = dot(expected, &weights(expected.len(), 1000 + i as u64));
        let scale = dot(expected, expected).sqrt();
        let e = (difference - along).abs() / scale;
        worst_difference = worst_difference.max(e);
        assert!(e <= 1e-6, "{name}: {difference} {along}");
    }
    println!("f32 kernels against float64: {worst:.1e}; float64 against differences: {worst_difference:.1e}");
}

#[test]
fn thirty_steps_lower_a_loss_the_same_way_every_time() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let config = GatedDeltaNetConfig::new(32)
        .with_linear_num_key_heads(1)
        .with_linear_num_value_heads(2)
        .with_linear_key_head_dim(16)
        .with_linear_value_head_dim(16);
    // Every token is to say what the one before it was.
    let x = weights(4 * 20 * 32, 6);
    let x = tensor::<3>(&x, &[4, 20, 32], DType::F32, &flex());
    let target = x.clone().narrow(1, 0, 19);
    let run = |rule: Rule| -> Vec<f64> {
        let mut layer = config.clone().with_rule(rule).init(&engine, &flex()).unwrap().map(&mut Fill(Random::new(2)));
        let mut optimiser = AdamWConfig::new().init();
        (0..30)
            .map(|_| {
                let loss = (layer.forward(x.clone()).narrow(1, 1, 19) - target.clone()).square().mean();
                let grads = GradientsParams::from_grads(loss.backward(), &layer);
                layer = optimiser.step(2e-2, layer.clone(), grads);
                wide(loss)[0]
            })
            .collect()
    };
    let losses = [Rule::Delta, Rule::Linear].map(|rule| {
        let losses = run(rule);
        println!("{rule:?}: {:.5} to {:.5}", losses[0], losses[29]);
        assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
        assert_eq!(losses, run(rule));
        losses
    });
    assert!((losses[0][29] - losses[1][29]).abs() > 1e-4, "the rule makes no difference");
}

#[test]
fn weights_are_drawn_as_the_family_does() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let layer = GatedDeltaNetConfig::new(64).with_linear_num_value_heads(64).with_linear_value_head_dim(16);
    let layer = layer.init(&engine, &flex()).unwrap();
    let a = wide(layer.a_log.val().exp());
    assert!(a.iter().all(|a| (0.0..16.01).contains(a)) && a.iter().any(|a| *a > 8.0) && a.iter().any(|a| *a < 8.0));
    let dt: Vec<f64> = wide(layer.dt_bias.val()).iter().map(|x| x.exp().ln_1p()).collect();
    assert!(dt.iter().all(|dt| (0.9e-3..0.101).contains(dt)), "{dt:?}");
    assert!(dt.iter().any(|dt| *dt < 0.01) && dt.iter().any(|dt| *dt > 0.01));
    assert!(wide(layer.conv1d.weight.val()).iter().all(|w| w.abs() <= 0.5));
    assert!(wide(layer.norm.weight.val()).iter().all(|w| *w == 1.0));
    let matrix = wide(layer.in_proj_qkv.weight.val());
    let std = (dot(&matrix, &matrix) / matrix.len() as f64).sqrt();
    assert!((0.019..0.021).contains(&std), "{std}");
}

#[test]
fn a_checkpoint_runs_in_the_runtime_and_gives_the_same_logits() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let (numbers, ids) = ids([1, 90], 40);
    for (tied, dtype) in [(true, Dtype::F32), (false, Dtype::Bf16), (true, Dtype::F16)] {
        let model = model(&engine, tied, 3);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/model");
        model.save_checkpoint(&dir, dtype).unwrap();
        // Once more over what is there.
        model.save_checkpoint(&dir, dtype).unwrap();
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
        for device in devices() {
            let options = LoadOptions { context: Some(128), ..LoadOptions::default() };
            let runtime = Model::load(&dir, device.backend.clone(), &options).unwrap();
            let found = runtime.session().unwrap().logits(&numbers).unwrap();
            let e = error(&found, &wide(model.forward(ids.clone())));
            println!("{} {dtype}: {e:.1e}", device.name);
            assert!(e <= 1e-4, "{} {dtype}: {e:e}", device.name);
        }
        // Read back by another model, it computes the same up to the rounding of what is stored.
        let again = self::model(&engine, tied, 4).load_checkpoint(&dir).unwrap();
        let found: Vec<f32> = again.forward(ids.clone()).try_into_vec_as().unwrap();
        let e = error(&found, &wide(model.forward(ids.clone())));
        assert!(e <= if dtype == Dtype::F32 { 0.0 } else { 1e-4 }, "{dtype}: {e:e}");
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut found: Vec<(String, Vec<usize>)> = file.iter().map(|(n, t)| (n.into(), t.shape().to_vec())).collect();
        found.sort();
        let sizes = Tiny {
            hidden: 32,
            ffn: 48,
            layers: "LF",
            heads: 4,
            kv: 2,
            dim: 16,
            hk: 2,
            hv: 4,
            k: 16,
            v: 32,
            taps: 4,
            vocab: 40,
            tied,
        };
        let released: Vec<(String, Vec<usize>)> =
            sizes.tensors(0, Dtype::F32).into_iter().map(|(n, (shape, _))| (n, shape)).collect();
        assert_eq!(found, released);
    }
}

#[test]
fn what_cannot_be_saved_is_an_error() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let linear = model(&engine, true, 3).with_rule(Rule::Linear);
    let e = linear.save_checkpoint(dir.path(), Dtype::F32).unwrap_err();
    assert!(matches!(e, Error::Unsupported { .. }), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let e = model(&engine, true, 3).load_checkpoint(dir.path()).unwrap_err();
    assert!(matches!(&e, Error::Load { why, .. } if why.contains("no .safetensors file")), "{e}");
    let tied = tempfile::tempdir().unwrap();
    model(&engine, true, 3).save_checkpoint(tied.path(), Dtype::F32).unwrap();
    let e = model(&engine, false, 3).load_checkpoint(tied.path()).unwrap_err();
    assert!(matches!(&e, Error::Load { why, .. } if why.contains("lm_head.weight")), "{e}");
    // A directory where the file should go: what was there stays, and nothing half-written does.
    std::fs::create_dir_all(dir.path().join("model.safetensors/x")).unwrap();
    let e = model(&engine, true, 3).save_checkpoint(dir.path(), Dtype::F32).unwrap_err();
    assert!(matches!(&e, Error::Save { path, .. } if path.ends_with("model.safetensors")), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let e = model(&engine, true, 3).save_checkpoint(&file, Dtype::F32).unwrap_err();
    assert!(matches!(e, Error::Save { .. }), "{e}");
}

/// What a panic said.
pub fn said<R>(f: impl FnOnce() -> R) -> String {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)) {
        Ok(_) => "nothing".into(),
        Err(said) => said.downcast_ref::<String>().cloned().unwrap_or_default(),
    }
}

#[test]
fn wrong_shapes_and_gates_are_named() {
    let engine = Engine::open(Some("cpu")).unwrap();
    let sizes = [2, 5, 1, 2, 16, 32];
    let (x, s) = (inputs(sizes, 9), shapes(sizes));
    type Change<'a> = &'a dyn Fn(&mut [Vec<usize>; 6], &mut [Vec<f64>; 6]);
    let call = |change: Change<'_>| {
        let (mut x, mut s) = (x.clone(), s.clone());
        change(&mut s, &mut x);
        said(|| {
            let four = |i: usize| {
                let n = s[i].iter().product();
                tensor::<4>(&x[i].iter().cycle().take(n).copied().collect::<Vec<_>>(), &s[i], DType::F32, &flex())
            };
            let three = |i: usize| {
                let n = s[i].iter().product();
                tensor::<3>(&x[i].iter().cycle().take(n).copied().collect::<Vec<_>>(), &s[i], DType::F32, &flex())
            };
            let options = Options::default();
            gated_delta_rule(&engine, [four(0), four(1), four(2)], [three(3), three(4)], Some(four(5)), &options)
        })
    };
    assert_eq!(call(&|_, _| {}), "nothing");
    let expect = |said: String, words: &[&str]| {
        assert!(words.iter().all(|w| said.contains(w)), "{said:?} lacks one of {words:?}");
    };
    expect(call(&|s, _| s[1][1] = 4), &["k: found", "[2, 4, 1, 16]", "expected [2, 5, 1, 16]"]);
    expect(call(&|s, _| s[2][0] = 3), &["v: found", "[3, 5, 2, 32]", "expected [2, 5, 2, 32]"]);
    expect(call(&|s, _| s[3][2] = 1), &["g: found", "[2, 5, 1]", "expected [2, 5, 2]"]);
    expect(call(&|s, _| s[4][1] = 6), &["beta: found", "[2, 6, 2]"]);
    expect(call(&|s, _| s[5][2] = 32), &["h0: found", "[2, 2, 32, 32]", "expected [2, 2, 16, 32]"]);
    let odd = call(&|s, _| {
        s[0][3] = 17;
        s[1][3] = 17;
        s[5][2] = 17;
    });
    expect(odd, &["K (q/k head size): found 17", "multiple of 16"]);
    expect(call(&|_, x| x[3][3] = 0.5), &["g[", "found 0.5", "at most 0"]);
    expect(call(&|_, x| x[3][3] = f64::NAN), &["g[", "found NaN"]);

    let e = GatedDeltaNetConfig::new(32).with_linear_num_value_heads(17).init(&engine, &flex()).unwrap_err();
    assert!(e.to_string().contains("Hv (value heads): found 17"), "{e}");
    let layer = GatedDeltaNetConfig::new(32).with_linear_num_key_heads(1).with_linear_num_value_heads(1);
    let layer = layer.init(&engine, &flex()).unwrap();
    let x = tensor::<3>(&[0.0; 2 * 3 * 31], &[2, 3, 31], DType::F32, &flex());
    expect(said(|| layer.forward(x)), &["x: found", "[2, 3, 31]", "[2, 3, 32]"]);
    for (config, word) in [
        (Qwen35Config::new(40, 32, 48, 2, 4, 3), "num_attention_heads"),
        (Qwen35Config::new(40, 32, 48, 2, 4, 2).with_full_attention_interval(0), "full_attention_interval"),
        (Qwen35Config::new(40, 32, 48, 2, 4, 2).with_head_dim(260), "head_dim"),
        (Qwen35Config::new(40, 32, 48, 2, 4, 2).with_linear_conv_kernel_dim(1), "linear_conv_kernel_dim"),
        (Qwen35Config::new(0, 32, 48, 2, 4, 2), "vocab_size"),
    ] {
        let e = config.init(&engine, &flex()).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
}

#[test]
fn attention_in_blocks_is_attention() {
    // More than two blocks of queries, the last one in part.
    let (t, d) = (2100, 8);
    let device = flex().without_autodiff();
    let x = [1, 2, 3].map(|seed| weights(t * d, seed));
    let [q, k, v] = x.each_ref().map(|x| tensor::<4>(x, &[1, 1, t, d], DType::F64, &device));
    let found = wide(parts::causal_attention(q, k, v));
    for i in [0, 1, 1023, 1024, 1025, 2047, 2048, 2099] {
        let row = |x: &[f64], i: usize| x[i * d..(i + 1) * d].to_vec();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let w: Vec<f64> = (0..=i).map(|j| (dot(&row(&x[0], i), &row(&x[1], j)) / (d as f64).sqrt()).exp()).collect();
        let sum: f64 = w.iter().sum();
        let expected: Vec<f64> = (0..d).map(|c| (0..=i).map(|j| w[j] * x[2][j * d + c]).sum::<f64>() / sum).collect();
        assert!(distance(&row(&found, i), &expected) <= 1e-12, "{i}");
    }
}
