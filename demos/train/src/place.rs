//! Where a run trains: the kernels' device, and burn's.

use anyhow::Result;
use burn::tensor::Device;
#[cfg(feature = "burn-gpu")]
use burn::tensor::DeviceKind;
use gatedelta::burn::Engine;

/// What the options say of it.
#[derive(Debug, Clone, clap::Args)]
pub struct Place {
    /// gpu or lavapipe: burn and the kernels share the device (built with the feature burn-gpu); cpu or a part of an adapter's
    /// name: the kernels run there, and burn on the CPU [default: the best that works, burn on the CPU]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
}

impl Place {
    /// Opens it.
    ///
    /// # Errors
    /// Whatever is wrong with the name or the device.
    pub fn open(&self) -> Result<(Engine, Device)> {
        #[cfg(feature = "burn-gpu")]
        if let Some(kind) = match self.device.as_deref() {
            Some("gpu") => Some(DeviceKind::DefaultDevice),
            Some("lavapipe") => Some(DeviceKind::Cpu),
            _ => None,
        } {
            let (engine, device) = Engine::share(kind)?;
            return Ok((engine, device.autodiff()));
        }
        #[cfg(not(feature = "burn-gpu"))]
        if self.device.as_deref() == Some("gpu") {
            anyhow::bail!("--device gpu: this program was built without the feature burn-gpu");
        }
        Ok((Engine::open(self.device.as_deref())?, Device::flex().autodiff()))
    }
}
