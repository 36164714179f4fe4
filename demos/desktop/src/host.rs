//! One wgpu device that draws the window and, where the choice falls on its adapter, runs the model.

use std::sync::Arc;

use eframe::egui_wgpu::{RenderState, WgpuConfiguration, WgpuSetup, WgpuSetupCreateNew};
use eframe::wgpu;
use gatedelta::Result;
use gatedelta::backend::webgpu::WebGpu;

/// How the window's device is to be opened: with the limits that the kernels want.
pub fn configuration() -> WgpuConfiguration {
    WgpuConfiguration { wgpu_setup: WgpuSetup::CreateNew(setup()), ..Default::default() }
}

/// The same for a device without a window.
pub fn setup() -> WgpuSetupCreateNew {
    let mut setup = WgpuSetupCreateNew::without_display_handle();
    setup.device_descriptor = Arc::new(WebGpu::descriptor);
    setup
}

/// The window's device as a backend.
///
/// # Errors
/// If the device lacks what the kernels need.
pub fn share(state: &RenderState) -> Result<WebGpu> {
    share_device(&state.adapter, &state.device, &state.queue)
}

/// The same from its parts.
///
/// # Errors
/// As [`share`].
pub fn share_device(adapter: &wgpu::Adapter, device: &wgpu::Device, queue: &wgpu::Queue) -> Result<WebGpu> {
    let gpu = WebGpu::from_device(device.clone(), queue.clone(), adapter.get_info())?;
    let told = gpu.clone();
    device.set_device_lost_callback(move |_, why| told.lost(if why.is_empty() { "it was destroyed" } else { &why }));
    // Errors of the kernels are caught where they happen; one of the window's own must not end the program.
    device.on_uncaptured_error(Arc::new(|error| log::error!("wgpu: {error}")));
    Ok(gpu)
}
