//! burn's tensors and the kernels on one device of wgpu.
//!
//! burn opens the device and the backend is put on top of it. A call copies its inputs from burn's buffers into memory of its
//! own, runs, and copies the results back: burn gives many tensors out of one buffer, which may not be read and written by the
//! same launch. The copies move far fewer bytes than the kernels do.
//!
//! Both sides submit to one queue, which orders them: burn's pending work is flushed before a call, and what burn queues later
//! comes after it.

use std::sync::Arc;

use burn::tensor::{DType, Device, DeviceKind, Shape as Dims};
use burn_cubecl::cubecl::server::ServerError;
use burn_cubecl::cubecl::wgpu::{AutoCompiler, WgpuResource, WgpuServer};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::lanes::{Lanes, Part, SHAPES, Way, Work, room, whole};
use crate::backend::Backend;
use crate::backend::webgpu::{Exchange, HostBuffer, WebGpu};
use crate::error::{Error, Result};
use crate::gdn::{Backward, GradIo, Io, Options, Prefill};
use crate::pass::{Pass, Rows};
use crate::shape::Shape;

/// A device that burn and the kernels share.
pub(super) struct Shared {
    /// As burn names it, without autodiff.
    device: Device,
    gpu: WebGpu,
    rule: Lanes<DeltaRule>,
}

impl Shared {
    /// Has burn open its device of this kind.
    pub fn open(kind: DeviceKind) -> Result<(Shared, Device)> {
        let what = format!("sharing {kind:?}");
        let refused = |why: String| Error::Unsupported { what, by: "burn".into(), why };
        let options = Device::wgpu_options().device_kind(kind);
        let (device, setup) = options.init_with_setup().map_err(|e| refused(e.to_string()))?;
        let gpu = WebGpu::from_device(setup.device, setup.queue, setup.adapter.get_info())?;
        Ok((Shared { device: device.clone(), gpu, rule: Lanes::new(SHAPES) }, device))
    }

    /// The kernels' side.
    pub fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.gpu.clone())
    }

    /// Whether tensors of this device are this one's.
    pub fn has(&self, device: &Device) -> bool {
        device.clone().without_autodiff() == self.device
    }

    /// `[o | ht]` of q, k, v, g, beta and h0.
    pub fn forward(&self, shape: &Shape, options: &Options, x: [CubeTensor; 6]) -> Result<CubeTensor> {
        let work = DeltaRule { shape: shape.clone(), options: *options };
        let (t, _, _, vo, states) = sizes(shape);
        let packed = [(t * vo + states) as usize].into();
        let out = self.rule.forward(&self.gpu, &work, |way| self.call(way, x.into(), &[packed]))?;
        out.into_iter().next().ok_or_else(|| Error::argument("results", 0, 1))
    }

    /// Gradients of the six, given that of `[o | ht]`.
    pub fn backward(
        &self,
        shape: &Shape,
        options: &Options,
        x: [CubeTensor; 6],
        d: CubeTensor,
    ) -> Result<[CubeTensor; 6]> {
        let work = DeltaRule { shape: shape.clone(), options: *options };
        let shapes = x.each_ref().map(|x| x.meta.shape().clone());
        let all = x.into_iter().chain([d]).collect();
        let out = self.rule.backward(&self.gpu, &work, |way| self.call(way, all, &shapes))?;
        out.try_into().map_err(|_| Error::argument("results", "another number", 6))
    }

    /// Copies in, runs, copies out: results of these shapes.
    pub fn call(&self, way: &Way, inputs: Vec<CubeTensor>, results: &[Dims]) -> Result<Vec<CubeTensor>> {
        let trouble = |e: ServerError| Error::Device { device: self.gpu.caps().name.clone(), why: e.to_string() };
        let resource =
            |x: &CubeTensor| x.client.get_resource::<WgpuServer<AutoCompiler>>(x.handle.clone()).map_err(trouble);
        let inputs: Vec<CubeTensor> = inputs.into_iter().map(into_contiguous).collect();
        let first = inputs.first().ok_or_else(|| Error::argument("arguments", 0, "at least 1"))?;
        let out: Vec<CubeTensor> = results.iter().map(|shape| empty(first, shape.clone())).collect();
        // Held to the end: what they refer to is not given out again before the copies are queued.
        let sources = inputs.iter().map(resource).collect::<Result<Vec<_>>>()?;
        let targets = out.iter().map(resource).collect::<Result<Vec<_>>>()?;
        first.client.flush().map_err(trouble)?;
        let into = |part: &'_ Part| (host(sources[part.tensor].resource(), part.at * 4), part.view.clone());
        let copies: Vec<_> = way.inputs.iter().map(into).collect();
        let copies: Vec<_> = copies.iter().map(|(from, view)| Exchange::In(*from, view)).collect();
        self.gpu.exchange(&copies)?;
        self.gpu.run(&way.pass)?;
        let copies: Vec<_> = way
            .outputs
            .iter()
            .map(|part| Exchange::Out(&part.view, host(targets[part.tensor].resource(), part.at * 4)))
            .collect();
        self.gpu.exchange(&copies)?;
        Ok(out)
    }
}

/// burn's memory behind a tensor, from this byte on.
fn host(resource: &WgpuResource, at: u64) -> HostBuffer<'_> {
    HostBuffer { buffer: &resource.buffer, offset: resource.offset + at }
}

/// An f32 tensor beside another one, with undefined content.
fn empty(beside: &CubeTensor, shape: Dims) -> CubeTensor {
    let handle = beside.client.empty(shape.num_elements() * 4);
    CubeTensor::new_contiguous(beside.client.clone(), beside.device.clone(), shape, handle, DType::F32)
}

/// The operator of one shape.
#[derive(Clone, PartialEq)]
struct DeltaRule {
    shape: Shape,
    options: Options,
}

/// Arguments: q, k, v, g, beta, h0.
fn inputs(io: &Io) -> Vec<Part> {
    let views = [&io.q.view, &io.k.view, &io.v.view, &io.g, &io.beta, &io.state];
    views.iter().enumerate().map(|(i, view)| whole(i, view)).collect()
}

impl Work for DeltaRule {
    type Memory = Io;

    /// One result: `[o | ht]`.
    fn forward(&self, backend: &dyn Backend) -> Result<(Io, Way)> {
        let (t, hv, qk, vo, states) = sizes(&self.shape);
        let room = |what: &str, numbers| room(backend, what, numbers);
        let io = Io {
            q: Rows::packed(room("q", t * qk)?, qk),
            k: Rows::packed(room("k", t * qk)?, qk),
            v: Rows::packed(room("v", t * vo)?, vo),
            g: room("g", t * hv)?,
            beta: room("beta", t * hv)?,
            state: room("state", states)?,
            o: Rows::packed(room("o", t * vo)?, vo),
        };
        let mut pass = Pass::new();
        Prefill::new(backend, &self.shape, &self.options, qk.max(vo))?.record(&mut pass, &io)?;
        let outputs = vec![whole(0, &io.o.view), Part { tensor: 0, at: t * vo, view: io.state.clone() }];
        let way = Way { inputs: inputs(&io), outputs, pass };
        Ok((io, way))
    }

    /// Arguments: those, then the gradient of the result. Results: the gradients of the six.
    fn backward(&self, backend: &dyn Backend, io: &Io) -> Result<Way> {
        let (t, hv, qk, vo, states) = sizes(&self.shape);
        let room = |what: &str, numbers| room(backend, what, numbers);
        let d = GradIo {
            q: io.q.clone(),
            k: io.k.clone(),
            v: io.v.clone(),
            g: io.g.clone(),
            beta: io.beta.clone(),
            // Each call brings it again.
            h0: Some(io.state.clone()),
            d_o: Rows::packed(room("d_o", t * vo)?, vo),
            dq: Rows::packed(room("dq", t * qk)?, qk),
            dk: Rows::packed(room("dk", t * qk)?, qk),
            dv: Rows::packed(room("dv", t * vo)?, vo),
            dg: room("dg", t * hv)?,
            dbeta: room("dbeta", t * hv)?,
            dstate: room("dstate", states)?,
        };
        let mut pass = Pass::new();
        Backward::new(backend, &self.shape, &self.options, qk.max(vo))?.record(&mut pass, &d)?;
        let mut inputs = inputs(io);
        inputs.extend([whole(6, &d.d_o.view), Part { tensor: 6, at: t * vo, view: d.dstate.clone() }]);
        let views = [&d.dq.view, &d.dk.view, &d.dv.view, &d.dg, &d.dbeta, &d.dstate];
        let outputs = views.iter().enumerate().map(|(i, view)| whole(i, view)).collect();
        Ok(Way { inputs, outputs, pass })
    }
}

/// T, Hv, Hk K, Hv V and numbers of all states.
fn sizes(shape: &Shape) -> (u64, u64, u64, u64, u64) {
    let h = &shape.heads;
    let (hk, hv, k, v) = (h.hk as u64, h.hv as u64, h.k as u64, h.v as u64);
    (shape.tokens(), hv, hk * k, hv * v, shape.sequences() as u64 * h.state_len())
}
