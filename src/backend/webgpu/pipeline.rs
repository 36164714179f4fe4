//! Compiled kernels, kept by (row, consts).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};

use super::kept::Kept;
use super::{Shared, lock, submit};
use crate::error::{Error, Result};
use crate::kernel::{Access, Kernel};
use crate::source;

/// Bytes of the uniform before the row's params: `base`, a vec3 of u32.
pub(super) const BASE_BYTES: usize = 12;

/// A compiled variant.
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: Arc<Layout>,
    /// Measured speed, shared by all launches of the variant.
    pub(super) rate: Mutex<submit::Rate>,
}

/// How a row's arguments are bound: the same for all its variants.
pub(super) struct Layout {
    pub(super) bind: wgpu::BindGroupLayout,
    pub(super) pipeline: wgpu::PipelineLayout,
    /// Bytes of the uniform, padded as WGSL pads the struct.
    pub(super) uniform_bytes: u64,
}

/// All variants of one row.
struct Row {
    layout: Arc<Layout>,
    variants: HashMap<Vec<u32>, Slot>,
}

/// A variant, once it is compiled. Whoever comes first compiles it; others wait for that one alone.
type Slot = Arc<Mutex<Option<Arc<Pipeline>>>>;

/// All compiled kernels of a device.
pub(super) struct Pipelines {
    rows: Mutex<HashMap<&'static str, Row>>,
    kept: Option<Kept>,
}

impl Pipelines {
    pub(super) fn new(kept: Option<Kept>) -> Self {
        Pipelines { rows: Mutex::default(), kept }
    }

    /// The compiled variant; compiles it first where that has not happened.
    pub(super) fn get(&self, shared: &Shared, kernel: &'static Kernel, consts: &[u32]) -> Result<Arc<Pipeline>> {
        let (layout, slot) = self.slot(shared, kernel, consts)?;
        let mut slot = lock(&slot);
        if let Some(found) = &*slot {
            return Ok(found.clone());
        }
        let cache = self.kept.as_ref().map(|kept| &kept.cache);
        let pipeline = Arc::new(compile(shared, kernel, consts, layout, cache)?);
        *slot = Some(pipeline.clone());
        if let Some(kept) = &self.kept {
            kept.compiled();
        }
        Ok(pipeline)
    }

    fn slot(&self, shared: &Shared, kernel: &'static Kernel, consts: &[u32]) -> Result<(Arc<Layout>, Slot)> {
        let mut rows = lock(&self.rows);
        let row = match rows.entry(kernel.name) {
            Entry::Occupied(row) => row.into_mut(),
            Entry::Vacant(place) => {
                let layout = Arc::new(shared.guarded(kernel.name, || layout(&shared.device, kernel))?);
                place.insert(Row { layout, variants: HashMap::new() })
            }
        };
        if let Some(slot) = row.variants.get(consts) {
            return Ok((row.layout.clone(), slot.clone()));
        }
        let slot = row.variants.entry(consts.to_vec()).or_default().clone();
        Ok((row.layout.clone(), slot))
    }
}

fn layout(device: &wgpu::Device, kernel: &Kernel) -> Layout {
    let uniform_bytes = (BASE_BYTES as u64 + 4 * kernel.params.len() as u64).next_multiple_of(16);
    let entry = |binding: u32, ty, has_dynamic_offset, min_binding_size| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform, true, NonZeroU64::new(uniform_bytes))];
    for (i, arg) in kernel.args.iter().enumerate() {
        let ty = wgpu::BufferBindingType::Storage { read_only: arg.access == Access::Read };
        entries.push(entry(i as u32 + 1, ty, false, None));
    }
    let label = Some(kernel.name);
    let bind = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
    let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label,
        bind_group_layouts: &[Some(&bind)],
        immediate_size: 0,
    });
    Layout { bind, pipeline, uniform_bytes }
}

fn compile(
    shared: &Shared,
    kernel: &Kernel,
    consts: &[u32],
    layout: Arc<Layout>,
    cache: Option<&wgpu::PipelineCache>,
) -> Result<Pipeline> {
    let text = source::wgsl(kernel, consts, shared.features)?;
    let compile_error = |error: wgpu::Error| match error {
        wgpu::Error::OutOfMemory { .. } => shared.failure(kernel.name, 0, error),
        wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => Error::Compile {
            kernel: format!("{} {consts:?}", kernel.name),
            device: shared.caps.name.clone(),
            log: description,
        },
    };
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source: wgpu::ShaderSource::Wgsl(text.into()) };
    // Bounds checks stay on. A counter in every loop would burden the inner products and stop compilers from unrolling them.
    let checks = wgpu::ShaderRuntimeChecks { force_loop_bounding: false, ..wgpu::ShaderRuntimeChecks::checked() };
    // SAFETY: without loop bounding a loop that never ends is undefined behaviour. Every loop in `shaders/` counts up or
    // down to a bound that it does not change.
    let (module, error) = shared.scoped(|| unsafe { shared.device.create_shader_module_trusted(descriptor, checks) });
    if let Some(error) = error {
        return Err(compile_error(error));
    }
    let (pipeline, error) = shared.scoped(|| {
        shared.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.name),
            layout: Some(&layout.pipeline),
            module: &module,
            entry_point: Some(kernel.name),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Kernels write workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache,
        })
    });
    match error {
        Some(error) => Err(compile_error(error)),
        None => Ok(Pipeline { pipeline, layout, rate: Mutex::new(submit::Rate::first(shared.caps.class)) }),
    }
}
