//! The gated delta rule as an operation of burn, differentiated by our own backward pass.

#[cfg(feature = "burn-gpu")]
use burn::backend::Cube;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Device, FloatDType, GradientCheckpointingStrategy, Tensor, TensorData};
#[cfg(feature = "burn-gpu")]
use burn_cubecl::tensor::CubeTensor;

use super::{Engine, expect_shape, stop};
use crate::error::{Error, Result};
use crate::gdn::{self, Cotangents, Inputs, Options};
use crate::shape::{HeadMap, Heads, Shape};

/// The operator over sequences of equal length, from `h0` (zero if none): the outputs and the state after the last token.
///
/// Per value head `h`, which reads key head `h div (Hv / Hk)`, with `s` the scale:
///
/// ```text
/// S <- exp(g) S     d = beta (v - S^T k)     S <- S + k d^T     o = s S^T q
/// ```
///
/// | argument | shape |
/// |---|---|
/// | q, k | `[B, T, Hk, K]` |
/// | v | `[B, T, Hv, V]` |
/// | g, beta | `[B, T, Hv]`; g is a log decay, at most 0 |
/// | h0 | `[B, Hv, K, V]` |
/// | o | `[B, T, Hv, V]`, in the type of v |
/// | ht | `[B, Hv, K, V]`, in the type of v |
///
/// All inputs get gradients, of first order only. Nothing of the forward pass is kept but the inputs: see
/// [`gdn::backward`](crate::gdn::backward()). Formulas: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024).
///
/// # Panics
/// If a shape does not fit, naming the argument; if g is NaN or positive; if the device reports an error.
#[track_caller]
pub fn gated_delta_rule(
    engine: &Engine,
    [q, k, v]: [Tensor<4>; 3],
    [g, beta]: [Tensor<3>; 2],
    h0: Option<Tensor<4>>,
    options: &Options,
) -> (Tensor<4>, Tensor<4>) {
    let shape = match shape(&q, &k, &v, &g, &beta, h0.as_ref()) {
        Ok(shape) => shape,
        Err(error) => stop("gated_delta_rule", &error),
    };
    let ([b, t, _, dk], [_, _, hv, dv]) = (q.dims(), v.dims());
    let (device, dtype) = (v.device(), v.dtype());
    let place = if engine.shares(&device) { device.clone().without_autodiff() } else { Device::flex() };
    let h0 = h0.unwrap_or_else(|| Tensor::zeros([b, hv, dk, dv], (&place, DType::F32)));
    let call = Call { engine: engine.clone(), shape, options: *options };
    let packed = <Dispatch as Extension>::delta_rule(
        at(&place, q).into_dispatch(),
        at(&place, k).into_dispatch(),
        at(&place, v).into_dispatch(),
        at(&place, g).into_dispatch(),
        at(&place, beta).into_dispatch(),
        at(&place, h0).into_dispatch(),
        call,
    );
    let packed = Tensor::<1>::from_dispatch(packed);
    let (o, ht) = (b * t * hv * dv, b * hv * dk * dv);
    let back = |part: Tensor<4>| {
        let device = in_context_of(device.clone(), &part.device());
        let part = if part.device() == device { part } else { part.to_device(&device) };
        if dtype == DType::F32 { part } else { part.cast(FloatDType::from(dtype)) }
    };
    let o = back(packed.clone().narrow(0, 0, o).reshape([b, t, hv, dv]));
    (o, back(packed.narrow(0, b * t * hv * dv, ht).reshape([b, hv, dk, dv])))
}

/// The batch that the tensors make up, if they fit each other.
fn shape(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    g: &Tensor<3>,
    beta: &Tensor<3>,
    h0: Option<&Tensor<4>>,
) -> Result<Shape> {
    let ([b, t, hk, dk], [_, _, hv, dv]) = (q.dims(), v.dims());
    if b == 0 || t == 0 {
        return Err(Error::argument("q", format!("the shape {:?}", q.dims()), "at least one sequence and one token"));
    }
    expect_shape("k", &k.dims(), &q.dims())?;
    expect_shape("v", &v.dims(), &[b, t, hv, dv])?;
    expect_shape("g", &g.dims(), &[b, t, hv])?;
    expect_shape("beta", &beta.dims(), &[b, t, hv])?;
    if let Some(h0) = h0 {
        expect_shape("h0", &h0.dims(), &[b, hv, dk, dv])?;
    }
    Shape::new(heads(hk, hv, dk, dv)?, (0..=b as u64).map(|n| n * t as u64).collect())
}

/// Heads as the released checkpoints number them.
pub(super) fn heads(hk: usize, hv: usize, k: usize, v: usize) -> Result<Heads> {
    // What does not fit in 32 bits is out of every range.
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Heads::new(narrow(hk), narrow(hv), narrow(k), narrow(v), HeadMap::Div)
}

/// f32 on this device: burn's own differentiable conversions bring gradients back.
pub(super) fn at<const D: usize>(place: &Device, x: Tensor<D>) -> Tensor<D> {
    let x = if x.dtype() == DType::F32 { x } else { x.cast(FloatDType::F32) };
    let place = in_context_of(place.clone(), &x.device());
    if x.device() == place { x } else { x.to_device(&place) }
}

/// A device with autodiff as the other one has it.
pub(super) fn in_context_of(device: Device, other: &Device) -> Device {
    let device = device.without_autodiff();
    match other.gradient_checkpointing_strategy() {
        None => device,
        Some(GradientCheckpointingStrategy::Balanced) => device.autodiff().gradient_checkpointing(),
        Some(_) => device.autodiff(),
    }
}

/// What is the same in both directions.
#[derive(Clone, Debug)]
struct Call {
    engine: Engine,
    shape: Shape,
    options: Options,
}

/// q, k, v, g, beta, h0: f32, packed.
type Six = [FlexTensor; 6];

impl Call {
    /// `[o | ht]`.
    fn forward(&self, x: Six) -> Result<FlexTensor> {
        let x = x.map(|x| x.to_contiguous());
        let out = gdn::prefill(self.engine.backend(), &self.inputs(&x)?)?;
        let mut packed = out.o;
        packed.extend_from_slice(&out.ht);
        let n = packed.len();
        Ok(FlexTensor::from_data(TensorData::new(packed, [n])))
    }

    /// Gradients of the six, given that of `[o | ht]`.
    fn backward(&self, x: &Six, d: FlexTensor) -> Result<Six> {
        let (x, d) = (x.each_ref().map(FlexTensor::to_contiguous), d.to_contiguous());
        let inputs = self.inputs(&x)?;
        let (d_o, dht) = numbers("gradient", &d)?.split_at(inputs.v.len());
        // A state that nothing looked at has a gradient of zeros.
        let dht = dht.iter().any(|x| *x != 0.0).then_some(dht);
        let out = gdn::backward(self.engine.backend(), &inputs, &Cotangents { d_o, dht })?;
        let mut all = [out.dq, out.dk, out.dv, out.dg, out.dbeta, out.dh0];
        let mut as_its_input = |i: usize| TensorData::new(std::mem::take(&mut all[i]), x[i].layout().shape().clone());
        Ok(std::array::from_fn(|i| FlexTensor::from_data(as_its_input(i))))
    }

    fn inputs<'a>(&self, x: &'a Six) -> Result<Inputs<'a>> {
        let [q, k, v, g, beta, h0] = x;
        Ok(Inputs {
            shape: self.shape.clone(),
            q: numbers("q", q)?,
            k: numbers("k", k)?,
            v: numbers("v", v)?,
            g: numbers("g", g)?,
            beta: numbers("beta", beta)?,
            h0: Some(numbers("h0", h0)?),
            options: self.options,
        })
    }
}

/// The numbers of a packed f32 tensor, where they are.
pub(super) fn numbers<'a>(what: &str, x: &'a FlexTensor) -> Result<&'a [f32]> {
    x.as_slice().ok_or_else(|| Error::argument(what, format!("{:?} in strides", x.dtype()), "packed f32"))
}

/// What runs the operator on tensors of one backend of burn: q, k, v, g, beta and h0, f32.
trait Runs: Backend {
    /// `[o | ht]`.
    fn forward(call: &Call, x: [FloatTensor<Self>; 6]) -> Result<FloatTensor<Self>>;

    /// Gradients of the six, given that of `[o | ht]`.
    fn backward(call: &Call, x: [FloatTensor<Self>; 6], d: FloatTensor<Self>) -> Result<[FloatTensor<Self>; 6]>;
}

impl Runs for Flex {
    fn forward(call: &Call, x: Six) -> Result<FlexTensor> {
        call.forward(x)
    }

    fn backward(call: &Call, x: Six, d: FlexTensor) -> Result<Six> {
        call.backward(&x, d)
    }
}

/// Tensors come here from the shared device alone; those of others were brought to the host.
#[cfg(feature = "burn-gpu")]
impl Runs for Cube {
    fn forward(call: &Call, x: [CubeTensor; 6]) -> Result<CubeTensor> {
        call.engine.shared()?.forward(&call.shape, &call.options, x)
    }

    fn backward(call: &Call, x: [CubeTensor; 6], d: CubeTensor) -> Result<[CubeTensor; 6]> {
        call.engine.shared()?.backward(&call.shape, &call.options, x, d)
    }
}

#[backend_extension(Autodiff, Flex, Cube: cfg(feature = "burn-gpu"))]
trait Extension: Backend {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        h0: FloatTensor<Self>,
        call: Call,
    ) -> FloatTensor<Self>;
}

impl Extension for Flex {
    fn delta_rule(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        g: FlexTensor,
        beta: FlexTensor,
        h0: FlexTensor,
        call: Call,
    ) -> FlexTensor {
        run::<Self>([q, k, v, g, beta, h0], &call)
    }
}

#[cfg(feature = "burn-gpu")]
impl Extension for Cube {
    fn delta_rule(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        g: CubeTensor,
        beta: CubeTensor,
        h0: CubeTensor,
        call: Call,
    ) -> CubeTensor {
        run::<Self>([q, k, v, g, beta, h0], &call)
    }
}

fn run<B: Runs>(x: [FloatTensor<B>; 6], call: &Call) -> FloatTensor<B> {
    B::forward(call, x).unwrap_or_else(|error| stop("gated_delta_rule", &error))
}

impl<B: Runs, C: CheckpointStrategy> Extension for Autodiff<B, C> {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        h0: FloatTensor<Self>,
        call: Call,
    ) -> FloatTensor<Self> {
        let all = [q, k, v, g, beta, h0];
        let nodes = all.each_ref().map(|x| x.node());
        let x = all.map(|x| x.into_primitive());
        let out = run::<B>(x.clone(), &call);
        match DeltaRule.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, call), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

#[derive(Debug)]
struct DeltaRule;

impl<B: Runs> Backward<B, 6> for DeltaRule {
    type State = ([FloatTensor<B>; 6], Call);

    fn backward(self, ops: Ops<Self::State, 6>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d = grads.consume::<B>(&ops.node);
        let (x, call) = ops.state;
        let all = B::backward(&call, x, d).unwrap_or_else(|error| stop("backward of gated_delta_rule", &error));
        for (parent, d) in ops.parents.into_iter().zip(all) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, d);
            }
        }
    }
}
