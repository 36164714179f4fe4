//! Finding adapters and opening devices.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::{Shared, WebGpu, bind, fault, fresh_id, kept, pipeline, submit};
use crate::backend::cpu::physical_memory;
use crate::error::{Error, Result};
use crate::source;
use crate::tune::{Caps, Class, Kind};

/// The adapters of this machine.
#[derive(Debug)]
pub struct Adapters {
    /// One entry per adapter and graphics API.
    pub found: Vec<Found>,
    /// Why there are none, in the loader's words; empty if there are some.
    pub why_none: String,
}

/// An adapter that can be opened.
#[derive(Debug, Clone)]
pub struct Found {
    /// What it is and could do with its own limits.
    pub caps: Caps,
    /// Its names, ids and type.
    pub info: wgpu::AdapterInfo,
    /// Its limits.
    pub limits: wgpu::Limits,
    /// Its features.
    pub features: wgpu::Features,
    adapter: wgpu::Adapter,
}

/// How to open an adapter.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Ask for WebGPU's default limits and for no feature, as a browser would: 16 KiB of workgroup memory, 8 storage
    /// buffers, 256 invocations, 128 MiB a binding. For tests: every kernel has a variant that keeps to them.
    pub default_limits: bool,
    /// Kernels and sizes as for this kind of device, whatever the adapter is. For tests: a driver in software has kernels of
    /// its own, and this way runs those of GPUs too.
    pub device_type: Option<wgpu::DeviceType>,
    /// The folder where compiled kernels are kept; by default the one that the environment variable `GATEDELTA_CACHE` names,
    /// or `gatedelta` in the user's folder for such things. An empty path keeps none, and so does a variable that is empty.
    pub cache: Option<PathBuf>,
}

impl WebGpu {
    /// Looks for adapters. Works, and says why there is none, on a machine without any driver.
    pub fn enumerate() -> Adapters {
        let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends,
            // Neither validation layers nor debug names: what wgpu itself checks is enough.
            flags: wgpu::InstanceFlags::empty(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let found: Vec<Found> = pollster::block_on(instance.enumerate_adapters(backends))
            .into_iter()
            .filter(|a| a.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS))
            .map(|adapter| {
                let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
                let caps = caps(&info, &wanted_limits(&limits, false), wanted_features(features, false));
                Found { caps, info, limits, features, adapter }
            })
            .collect();
        let why_none = if found.is_empty() {
            match pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())) {
                Ok(adapter) => format!("{} has no compute shaders", adapter.get_info().name),
                Err(e) => why_none(&e),
            }
        } else {
            String::new()
        };
        Adapters { found, why_none }
    }

    /// Opens an adapter.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the driver refuses the limits or the features.
    pub fn open(found: &Found, options: &OpenOptions) -> Result<WebGpu> {
        let descriptor = descriptor(found.features, &found.limits, options.default_limits);
        let (device, queue) = pollster::block_on(found.adapter.request_device(&descriptor)).map_err(|e| {
            Error::Unsupported { what: "opening the device".into(), by: found.info.name.clone(), why: e.to_string() }
        })?;
        let device_type = options.device_type.unwrap_or(found.info.device_type);
        let info = wgpu::AdapterInfo { device_type, ..found.info.clone() };
        let gpu = Self::with_device(device, queue, info, options.cache.as_deref(), true)?;
        let fault = gpu.shared.fault.clone();
        gpu.shared.device.on_uncaptured_error(Arc::new(move |error| {
            let error = fault.translate("reported late", 0, error);
            fault.keep(error);
        }));
        let fault = gpu.shared.fault.clone();
        gpu.shared.device.set_device_lost_callback(move |reason, why| {
            let destroyed = reason == wgpu::DeviceLostReason::Destroyed;
            fault.lose(if destroyed && why.is_empty() { "it was destroyed".into() } else { why });
        });
        Ok(gpu)
    }

    /// What a host application asks of an adapter for a device that it will share: its own needs can be added.
    pub fn descriptor(adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
        descriptor(adapter.features(), &adapter.limits(), false)
    }

    /// Uses a device that a host application opened, with the limits and features it chose ([`WebGpu::descriptor`]
    /// suggests some). `info` is its adapter's. Features that pay: `SUBGROUP`, `TIMESTAMP_QUERY`, `PIPELINE_CACHE`. The host keeps its own callbacks for uncaptured errors and the
    /// loss of the device; it tells of a loss through [`WebGpu::lost`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device lacks what WebGPU guarantees, [`Error::OutOfMemory`].
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue, info: wgpu::AdapterInfo) -> Result<WebGpu> {
        Self::with_device(device, queue, info, None, false)
    }

    fn with_device(
        device: wgpu::Device,
        queue: wgpu::Queue,
        info: wgpu::AdapterInfo,
        cache: Option<&Path>,
        own: bool,
    ) -> Result<WebGpu> {
        let (limits, features) = (device.limits(), device.features());
        let defaults = wgpu::Limits::default();
        for (what, found, least) in [
            (
                "storage buffers in a kernel",
                limits.max_storage_buffers_per_shader_stage,
                defaults.max_storage_buffers_per_shader_stage,
            ),
            (
                "bytes of workgroup memory",
                limits.max_compute_workgroup_storage_size,
                defaults.max_compute_workgroup_storage_size,
            ),
            (
                "threads in a workgroup",
                limits.max_compute_invocations_per_workgroup,
                defaults.max_compute_invocations_per_workgroup,
            ),
        ] {
            if found < least {
                let why = format!("the device allows {found}");
                return Err(Error::Unsupported { what: format!("{least} {what}"), by: info.name, why });
            }
        }
        let caps = caps(&info, &limits, features);
        let fault = Arc::new(fault::Fault::new(caps.name.clone()));
        let queue_state = Mutex::new(submit::State::new(&device));
        let binds = Mutex::new(bind::Binds::new(&device));
        let kept = kept::Kept::open(&device, &info, cache);
        let shared = Shared {
            features: source::Features::of(&caps),
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            own,
            device,
            queue,
            caps,
            limits,
            fault,
            dropped: Arc::default(),
            pipelines: pipeline::Pipelines::new(kept),
            binds,
            queue_state,
            staged: Default::default(),
            id: fresh_id(),
        };
        Ok(WebGpu { shared: Arc::new(shared) })
    }

    /// True once the device is lost.
    pub fn is_lost(&self) -> bool {
        self.shared.fault.gone().is_some()
    }

    /// Notes that the device is lost, for hosts that own it: every later call returns [`Error::DeviceLost`].
    pub fn lost(&self, why: &str) {
        self.shared.fault.lose(why.into());
    }
}

/// What is asked of an adapter that has these features and limits.
fn descriptor(
    features: wgpu::Features,
    limits: &wgpu::Limits,
    default_limits: bool,
) -> wgpu::DeviceDescriptor<'static> {
    wgpu::DeviceDescriptor {
        label: Some("gatedelta"),
        required_features: wanted_features(features, default_limits),
        required_limits: wanted_limits(limits, default_limits),
        // Weights come in pieces of all sizes: large reserved blocks would waste what a small card has.
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        ..Default::default()
    }
}

/// The features of an adapter that the kernels and the backend use.
fn wanted_features(has: wgpu::Features, default_limits: bool) -> wgpu::Features {
    if default_limits {
        return wgpu::Features::empty();
    }
    has & (wgpu::Features::SUBGROUP | wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE)
}

/// WebGPU's defaults, with the adapter's own numbers for what the kernels and the backend use.
fn wanted_limits(has: &wgpu::Limits, default_limits: bool) -> wgpu::Limits {
    let defaults = wgpu::Limits::default();
    if default_limits {
        return defaults;
    }
    wgpu::Limits {
        max_storage_buffer_binding_size: has.max_storage_buffer_binding_size,
        max_buffer_size: has.max_buffer_size,
        min_storage_buffer_offset_alignment: has.min_storage_buffer_offset_alignment,
        min_uniform_buffer_offset_alignment: has.min_uniform_buffer_offset_alignment,
        max_compute_workgroup_storage_size: has.max_compute_workgroup_storage_size,
        max_compute_invocations_per_workgroup: has.max_compute_invocations_per_workgroup,
        max_compute_workgroup_size_x: has.max_compute_workgroup_size_x,
        max_compute_workgroups_per_dimension: has.max_compute_workgroups_per_dimension,
        ..defaults.or_worse_values_from(has)
    }
}

/// Why no adapter was found. wgpu accounts for every API, also for those that nobody asked for.
fn why_none(error: &wgpu::RequestAdapterError) -> String {
    let text = error.to_string();
    let (what, apis) = text.split_once("; ").unwrap_or((&text, ""));
    let relevant = |api: &&str| !api.ends_with("not requested") && !api.ends_with("support not compiled in");
    let apis: Vec<&str> = apis.split(", ").filter(relevant).collect();
    [what, &apis.join(", ")].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(": ")
}

fn caps(info: &wgpu::AdapterInfo, limits: &wgpu::Limits, features: wgpu::Features) -> Caps {
    let align = (limits.min_storage_buffer_offset_alignment as u64).max(16);
    // Kernels count bytes of a binding in u32.
    let max_binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(u32::MAX as u64);
    let class = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => Class::Discrete,
        wgpu::DeviceType::IntegratedGpu => Class::Integrated,
        wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => Class::Other,
        wgpu::DeviceType::Cpu => Class::Software,
    };
    Caps {
        name: info.name.clone(),
        driver: [info.driver.as_str(), info.driver_info.as_str(), &format!("{:?}", info.backend)]
            .into_iter()
            .filter(|s| !s.is_empty())
            .collect::<Vec<_>>()
            .join(", "),
        kind: Kind::WebGpu,
        class,
        max_binding: max_binding / align * align,
        max_buffer: limits.max_buffer_size / align * align,
        align,
        workgroup_memory: limits.max_compute_workgroup_storage_size,
        workgroup_threads: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
        subgroup: features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size)),
        f16: features.contains(wgpu::Features::SHADER_F16),
        threads: 0,
        // WebGPU does not tell; a driver in software has the host's.
        memory: if class == Class::Software { physical_memory() } else { None },
    }
}
