//! burn's tensors and the kernels on one device of wgpu.
//!
//! burn opens the device and the backend is put on top of it. A call copies its inputs from burn's buffers into memory of its
//! own, runs, and copies the results back: burn gives many tensors out of one buffer, which may not be read and written by the
//! same launch. The copies move far fewer bytes than the kernels do.
//!
//! Both sides submit to one queue, which orders them: burn's pending work is flushed before a call, and what burn queues later
//! comes after it.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Device, DeviceKind, Shape as Dims};
use burn_cubecl::cubecl::server::ServerError;
use burn_cubecl::cubecl::wgpu::{AutoCompiler, WgpuResource, WgpuServer};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use crate::backend::webgpu::{Exchange, HostBuffer, WebGpu};
use crate::backend::{Backend, View};
use crate::error::{Error, Result};
use crate::gdn::{Backward, GradIo, Io, Options, Prefill};
use crate::pass::{Pass, Rows};
use crate::shape::Shape;

/// Shapes that are kept ready: batches of training come in a few lengths, in any order.
const LANES: usize = 12;

/// A device that burn and the kernels share.
pub(super) struct Shared {
    /// As burn names it, without autodiff.
    device: Device,
    gpu: WebGpu,
    /// The last one is the one used last. Locked from a call's first copy to its last.
    lanes: Mutex<Vec<Lane>>,
}

/// The operator of one shape with its memory. All layers use the same: their calls follow each other on the queue.
struct Lane {
    shape: Shape,
    options: Options,
    io: Io,
    forward: Pass,
    /// Made by the first backward pass.
    backward: Option<(GradIo, Pass)>,
}

/// Where numbers of a tensor lie: from this one on, so many.
type Part<'a> = (&'a CubeTensor, u64, &'a View);

impl Shared {
    /// Has burn open its device of this kind.
    pub fn open(kind: DeviceKind) -> Result<(Shared, Device)> {
        let what = format!("sharing {kind:?}");
        let refused = |why: String| Error::Unsupported { what, by: "burn".into(), why };
        let options = Device::wgpu_options().device_kind(kind);
        let (device, setup) = options.init_with_setup().map_err(|e| refused(e.to_string()))?;
        let gpu = WebGpu::from_device(setup.device, setup.queue, setup.adapter.get_info())?;
        Ok((Shared { device: device.clone(), gpu, lanes: Mutex::default() }, device))
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
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = self.lane(&mut lanes, shape, options)?;
        let x = x.map(into_contiguous);
        let (o, ht) = (&lane.io.o.view, &lane.io.state);
        let out = empty(&x[0], [((o.bytes + ht.bytes) / 4) as usize].into());
        self.call(&pour(&lane.io, &x), &lane.forward, &[(&out, 0, o), (&out, o.bytes, ht)])?;
        Ok(out)
    }

    /// Gradients of the six, given that of `[o | ht]`.
    pub fn backward(
        &self,
        shape: &Shape,
        options: &Options,
        x: [CubeTensor; 6],
        d: CubeTensor,
    ) -> Result<[CubeTensor; 6]> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = self.lane(&mut lanes, shape, options)?;
        let (io, pass) = match &mut lane.backward {
            Some(made) => made,
            none => none.insert(gradients(&self.gpu, &lane.shape, &lane.options, &lane.io)?),
        };
        let (x, d) = (x.map(into_contiguous), into_contiguous(d));
        let mut inputs = pour(&lane.io, &x);
        inputs.extend([(&d, 0, &io.d_o.view), (&d, io.d_o.view.bytes, &io.dstate)]);
        let out = x.each_ref().map(|x| empty(x, x.meta.shape().clone()));
        let views = [&io.dq.view, &io.dk.view, &io.dv.view, &io.dg, &io.dbeta, &io.dstate];
        let outputs: Vec<Part<'_>> = out.iter().zip(views).map(|(x, view)| (x, 0, view)).collect();
        self.call(&inputs, pass, &outputs)?;
        Ok(out)
    }

    /// Copies in, runs, copies out.
    fn call(&self, inputs: &[Part<'_>], pass: &Pass, outputs: &[Part<'_>]) -> Result<()> {
        let trouble = |e: ServerError| Error::Device { device: self.gpu.caps().name.clone(), why: e.to_string() };
        let resource =
            |(x, ..): &Part<'_>| x.client.get_resource::<WgpuServer<AutoCompiler>>(x.handle.clone()).map_err(trouble);
        // Held to the end: what they refer to is not given out again before the copies are queued.
        let sources = inputs.iter().map(resource).collect::<Result<Vec<_>>>()?;
        let targets = outputs.iter().map(resource).collect::<Result<Vec<_>>>()?;
        if let Some((x, ..)) = inputs.first() {
            x.client.flush().map_err(trouble)?;
        }
        let copies: Vec<_> = sources
            .iter()
            .zip(inputs)
            .map(|(from, (_, at, to))| Exchange::In(host(from.resource(), *at), to))
            .collect();
        self.gpu.exchange(&copies)?;
        self.gpu.run(pass)?;
        let copies: Vec<_> = targets
            .iter()
            .zip(outputs)
            .map(|(to, (_, at, from))| Exchange::Out(from, host(to.resource(), *at)))
            .collect();
        self.gpu.exchange(&copies)
    }

    /// The lane of this shape, made if need be.
    fn lane<'a>(&self, lanes: &'a mut Vec<Lane>, shape: &Shape, options: &Options) -> Result<&'a mut Lane> {
        let lane = match lanes.iter().position(|lane| lane.shape == *shape && lane.options == *options) {
            Some(at) => lanes.remove(at),
            None => {
                if lanes.len() == LANES {
                    lanes.remove(0);
                }
                Lane::new(&self.gpu, shape, options)?
            }
        };
        let at = lanes.len();
        lanes.push(lane);
        Ok(&mut lanes[at])
    }
}

/// burn's memory behind a tensor, from this byte on.
fn host(resource: &WgpuResource, at: u64) -> HostBuffer<'_> {
    HostBuffer { buffer: &resource.buffer, offset: resource.offset + at }
}

/// Where q, k, v, g, beta and h0 go.
fn pour<'a>(io: &'a Io, x: &'a [CubeTensor; 6]) -> Vec<Part<'a>> {
    let views = [&io.q.view, &io.k.view, &io.v.view, &io.g, &io.beta, &io.state];
    x.iter().zip(views).map(|(x, view)| (x, 0, view)).collect()
}

/// An f32 tensor beside another one, with undefined content.
fn empty(beside: &CubeTensor, shape: Dims) -> CubeTensor {
    let handle = beside.client.empty(shape.num_elements() * 4);
    CubeTensor::new_contiguous(beside.client.clone(), beside.device.clone(), shape, handle, DType::F32)
}

/// Memory for so many f32 numbers.
fn room(gpu: &WebGpu, what: &str, numbers: u64) -> Result<View> {
    gpu.alloc(what, (numbers * 4).max(16))?.slice(0, numbers * 4)
}

impl Lane {
    fn new(gpu: &WebGpu, shape: &Shape, options: &Options) -> Result<Lane> {
        let (t, hv, qk, vo, states) = sizes(shape);
        let io = Io {
            q: Rows::packed(room(gpu, "q", t * qk)?, qk),
            k: Rows::packed(room(gpu, "k", t * qk)?, qk),
            v: Rows::packed(room(gpu, "v", t * vo)?, vo),
            g: room(gpu, "g", t * hv)?,
            beta: room(gpu, "beta", t * hv)?,
            state: room(gpu, "state", states)?,
            o: Rows::packed(room(gpu, "o", t * vo)?, vo),
        };
        let mut forward = Pass::new();
        Prefill::new(gpu, shape, options, qk.max(vo))?.record(&mut forward, &io)?;
        Ok(Lane { shape: shape.clone(), options: *options, io, forward, backward: None })
    }
}

/// The backward pass over the inputs of `io`.
fn gradients(gpu: &WebGpu, shape: &Shape, options: &Options, io: &Io) -> Result<(GradIo, Pass)> {
    let (t, hv, qk, vo, states) = sizes(shape);
    let io = GradIo {
        q: io.q.clone(),
        k: io.k.clone(),
        v: io.v.clone(),
        g: io.g.clone(),
        beta: io.beta.clone(),
        // Each call brings it again.
        h0: Some(io.state.clone()),
        d_o: Rows::packed(room(gpu, "d_o", t * vo)?, vo),
        dq: Rows::packed(room(gpu, "dq", t * qk)?, qk),
        dk: Rows::packed(room(gpu, "dk", t * qk)?, qk),
        dv: Rows::packed(room(gpu, "dv", t * vo)?, vo),
        dg: room(gpu, "dg", t * hv)?,
        dbeta: room(gpu, "dbeta", t * hv)?,
        dstate: room(gpu, "dstate", states)?,
    };
    let mut pass = Pass::new();
    Backward::new(gpu, shape, options, qk.max(vo))?.record(&mut pass, &io)?;
    Ok((io, pass))
}

/// T, Hv, Hk K, Hv V and numbers of all states.
fn sizes(shape: &Shape) -> (u64, u64, u64, u64, u64) {
    let h = &shape.heads;
    let (hk, hv, k, v) = (h.hk as u64, h.hv as u64, h.k as u64, h.v as u64);
    (shape.tokens(), hv, hk * k, hv * v, shape.sequences() as u64 * h.state_len())
}
