//! All of a mixer between its projections as one operation of burn: convolution, gates, the gated delta rule and its norm,
//! with their gradients. In burn's own operations the pieces around the rule are some two hundred launches, forward and
//! back, most of them over tensors that are only passed on.

#[cfg(feature = "burn-gpu")]
use burn::backend::Cube;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
#[cfg(feature = "burn-gpu")]
use burn_cubecl::tensor::CubeTensor;

use super::lanes;
use super::mix_pass::{ARGUMENTS, Mix};
use super::rule::{at, heads, in_context_of, numbers};
use super::{Engine, expect_shape, stop};
use crate::error::{Error, Result};
use crate::shape::Shape;

/// What the projections of a mixer made of its input, and its small weights.
#[derive(Clone, Debug)]
pub struct MixInputs {
    /// `[B, T, 2 Hk K + Hv V]`: q, k, v before the convolution.
    pub qkv: Tensor<3>,
    /// `[B, T, Hv V]`: the gate of the norm.
    pub z: Tensor<3>,
    /// `[B, T, 2 Hv]`: a, what the decays are made of, then b, what beta is the sigmoid of.
    pub ab: Tensor<3>,
    /// `[2 Hk K + Hv V, 1, taps]`, the newest token last.
    pub conv: Tensor<3>,
    /// `[Hv]`
    pub a_log: Tensor<1>,
    /// `[Hv]`
    pub dt_bias: Tensor<1>,
    /// `[V]`
    pub norm: Tensor<1>,
}

/// Everything between the projections of a Gated DeltaNet mixer, over sequences of equal length that start from nothing; the
/// result is `[B, T, Hv V]`. Sizes are Hk, Hv, K, V.
///
/// ```text
/// q, k, v = silu(conv(qkv))      g = -exp(a_log) softplus(a + dt_bias)      beta = sigmoid(b)
/// o = gated_delta_rule(l2norm(q), l2norm(k), v, g, beta)
/// y = o rsqrt(mean(o^2) + eps) norm silu(z)
/// ```
///
/// All inputs get gradients, of first order only. Kept for the backward pass: the inputs and o. Arithmetic is f32.
///
/// # Panics
/// If a shape does not fit, naming the argument; if the device reports an error, tensors that it cannot bind whole among
/// them. NaN passes through.
#[track_caller]
pub fn gated_delta_mix(engine: &Engine, sizes: [usize; 4], x: MixInputs, eps: f64) -> Tensor<3> {
    let mix = match mix(sizes, &x, eps) {
        Ok(mix) => mix,
        Err(error) => stop("gated_delta_mix", &error),
    };
    let [b, t, width] = x.z.dims();
    let (device, dtype) = (x.qkv.device(), x.qkv.dtype());
    let place = if engine.shares(&device) { device.clone().without_autodiff() } else { Device::flex() };
    let call = Call { engine: engine.clone(), mix };
    let y = <Dispatch as Extension>::delta_mix(
        at(&place, x.qkv).into_dispatch(),
        at(&place, x.z).into_dispatch(),
        at(&place, x.ab).into_dispatch(),
        at(&place, x.conv).into_dispatch(),
        at(&place, x.a_log).into_dispatch(),
        at(&place, x.dt_bias).into_dispatch(),
        at(&place, x.norm).into_dispatch(),
        call,
    );
    let y = Tensor::<1>::from_dispatch(y);
    let device = in_context_of(device, &y.device());
    let y = if y.device() == device { y } else { y.to_device(&device) };
    let y = if dtype == DType::F32 { y } else { y.cast(FloatDType::from(dtype)) };
    y.reshape([b, t, width])
}

/// Whether [`gated_delta_mix`] takes tensors of this shape: its device binds them whole.
pub(super) fn fits(engine: &Engine, sizes: [usize; 4], x: &MixInputs) -> bool {
    mix(sizes, x, 0.0).is_ok_and(|mix| mix.fits(engine.backend().caps()))
}

/// The operation that the tensors make up, if they fit each other.
fn mix([hk, hv, k, v]: [usize; 4], x: &MixInputs, eps: f64) -> Result<Mix> {
    let heads = heads(hk, hv, k, v)?;
    let [b, t, width] = x.qkv.dims();
    if b == 0 || t == 0 {
        return Err(Error::argument(
            "qkv",
            format!("the shape {:?}", x.qkv.dims()),
            "at least one sequence and one token",
        ));
    }
    expect_shape("qkv", &x.qkv.dims(), &[b, t, 2 * hk * k + hv * v])?;
    expect_shape("z", &x.z.dims(), &[b, t, hv * v])?;
    expect_shape("ab", &x.ab.dims(), &[b, t, 2 * hv])?;
    let taps = x.conv.dims()[2];
    expect_shape("conv", &x.conv.dims(), &[width, 1, taps])?;
    if !(2..=8).contains(&taps) {
        return Err(Error::argument("taps of conv", taps, "2 to 8"));
    }
    expect_shape("a_log", &x.a_log.dims(), &[hv])?;
    expect_shape("dt_bias", &x.dt_bias.dims(), &[hv])?;
    expect_shape("norm", &x.norm.dims(), &[v])?;
    let shape = Shape::new(heads, (0..=b as u64).map(|n| n * t as u64).collect())?;
    Ok(Mix { shape, taps: taps as u32, eps: eps as f32 })
}

/// What is the same in both directions.
#[derive(Clone, Debug)]
struct Call {
    engine: Engine,
    mix: Mix,
}

/// The arguments: f32, packed.
type Args<B> = [FloatTensor<B>; ARGUMENTS];

/// What runs the operation on tensors of one backend of burn.
trait Runs: Backend {
    /// y and o, `[T Hv V]` each.
    fn forward(call: &Call, x: Args<Self>) -> Result<[FloatTensor<Self>; 2]>;

    /// Gradients of the arguments, given those, o, and the gradient of y.
    fn backward(call: &Call, x: Args<Self>, o: FloatTensor<Self>, dy: FloatTensor<Self>) -> Result<Args<Self>>;
}

impl Runs for Flex {
    fn forward(call: &Call, x: Args<Flex>) -> Result<[FlexTensor; 2]> {
        let x = x.map(|x| x.to_contiguous());
        let inputs = x.iter().map(|x| numbers("argument", x)).collect::<Result<Vec<_>>>()?;
        let backend = call.engine.backend();
        let out = call.engine.lanes.forward(backend, &call.mix, |way| lanes::call(backend, way, &inputs, 2))?;
        let mut out = out.into_iter();
        let mut next = || {
            let numbers = out.next().unwrap_or_default();
            let n = numbers.len();
            FlexTensor::from_data(TensorData::new(numbers, [n]))
        };
        Ok([next(), next()])
    }

    fn backward(call: &Call, x: Args<Flex>, o: FlexTensor, dy: FlexTensor) -> Result<Args<Flex>> {
        let x = x.map(|x| x.to_contiguous());
        let (o, dy) = (o.to_contiguous(), dy.to_contiguous());
        let inputs = x.iter().chain([&o, &dy]).map(|x| numbers("argument", x)).collect::<Result<Vec<_>>>()?;
        let backend = call.engine.backend();
        let mut out =
            call.engine.lanes.backward(backend, &call.mix, |way| lanes::call(backend, way, &inputs, ARGUMENTS))?;
        let mut as_its_input = |i: usize| TensorData::new(std::mem::take(&mut out[i]), x[i].layout().shape().clone());
        Ok(std::array::from_fn(|i| FlexTensor::from_data(as_its_input(i))))
    }
}

/// Tensors come here from the shared device alone; those of others were brought to the host.
#[cfg(feature = "burn-gpu")]
impl Runs for Cube {
    fn forward(call: &Call, x: Args<Cube>) -> Result<[CubeTensor; 2]> {
        let shared = call.engine.shared()?;
        let flat = || x[1].meta.shape().num_elements();
        call.engine.lanes.forward(call.engine.backend(), &call.mix, |way| {
            let out = shared.call(way, x.clone().into(), &[[flat()].into(), [flat()].into()])?;
            out.try_into().map_err(|_| Error::argument("results", "another number", 2))
        })
    }

    fn backward(call: &Call, x: Args<Cube>, o: CubeTensor, dy: CubeTensor) -> Result<Args<Cube>> {
        let shared = call.engine.shared()?;
        call.engine.lanes.backward(call.engine.backend(), &call.mix, |way| {
            let shapes: Vec<_> = x.iter().map(|x| x.meta.shape().clone()).collect();
            let all = x.clone().into_iter().chain([o, dy]).collect();
            let out = shared.call(way, all, &shapes)?;
            out.try_into().map_err(|_| Error::argument("results", "another number", ARGUMENTS))
        })
    }
}

#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "burn-gpu"))]
trait Extension: Backend {
    #[allow(clippy::too_many_arguments)]
    fn delta_mix(
        qkv: FloatTensor<Self>,
        z: FloatTensor<Self>,
        ab: FloatTensor<Self>,
        conv: FloatTensor<Self>,
        a_log: FloatTensor<Self>,
        dt_bias: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        call: Call,
    ) -> FloatTensor<Self>;
}

impl Extension for Flex {
    fn delta_mix(
        qkv: FlexTensor,
        z: FlexTensor,
        ab: FlexTensor,
        conv: FlexTensor,
        a_log: FlexTensor,
        dt_bias: FlexTensor,
        norm: FlexTensor,
        call: Call,
    ) -> FlexTensor {
        let [y, _] = run::<Self>([qkv, z, ab, conv, a_log, dt_bias, norm], &call);
        y
    }
}

#[cfg(feature = "burn-gpu")]
impl Extension for Cube {
    fn delta_mix(
        qkv: CubeTensor,
        z: CubeTensor,
        ab: CubeTensor,
        conv: CubeTensor,
        a_log: CubeTensor,
        dt_bias: CubeTensor,
        norm: CubeTensor,
        call: Call,
    ) -> CubeTensor {
        let [y, _] = run::<Self>([qkv, z, ab, conv, a_log, dt_bias, norm], &call);
        y
    }
}

fn run<B: Runs>(x: Args<B>, call: &Call) -> [FloatTensor<B>; 2] {
    B::forward(call, x).unwrap_or_else(|error| stop("gated_delta_mix", &error))
}

impl<B: Runs, C: CheckpointStrategy> Extension for Autodiff<B, C> {
    fn delta_mix(
        qkv: FloatTensor<Self>,
        z: FloatTensor<Self>,
        ab: FloatTensor<Self>,
        conv: FloatTensor<Self>,
        a_log: FloatTensor<Self>,
        dt_bias: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        call: Call,
    ) -> FloatTensor<Self> {
        let all = [qkv, z, ab, conv, a_log, dt_bias, norm];
        let nodes = all.each_ref().map(|x| x.node());
        let x = all.map(|x| x.into_primitive());
        let [y, o] = run::<B>(x.clone(), &call);
        match DeltaMix.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, o, call), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct DeltaMix;

impl<B: Runs> Backward<B, ARGUMENTS> for DeltaMix {
    type State = (Args<B>, FloatTensor<B>, Call);

    fn backward(self, ops: Ops<Self::State, ARGUMENTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, o, call) = ops.state;
        let all = B::backward(&call, x, o, dy).unwrap_or_else(|error| stop("backward of gated_delta_mix", &error));
        for (parent, d) in ops.parents.into_iter().zip(all) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, d);
            }
        }
    }
}
