//! Where a run trains: the kernels' device, and burn's.

use anyhow::Result;
use burn::tensor::Device;
#[cfg(feature = "burn-gpu")]
use burn::tensor::DeviceKind;
use gatedelta::burn::Engine;

/// What the options say of it.
#[derive(Debug, Clone, clap::Args)]
pub struct Place {
    /// gpu, gpu:N (the Nth discrete one, from 0) or lavapipe: burn and the kernels share the device (built with the feature
    /// burn-gpu); cpu or a part of an adapter's name: the kernels run there, and burn on the CPU [default: the best that works,
    /// burn on the CPU]
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
        if let Some(kind) = self.kind()? {
            let (engine, device) = Engine::share(kind)?;
            return Ok((engine, device.autodiff()));
        }
        #[cfg(not(feature = "burn-gpu"))]
        if self.device.as_deref().is_some_and(|name| name == "gpu" || name.starts_with("gpu:")) {
            anyhow::bail!("--device gpu: this program was built without the feature burn-gpu");
        }
        Ok((Engine::open(self.device.as_deref())?, Device::flex().autodiff()))
    }

    /// The device that burn and the kernels share, if the name is of one.
    #[cfg(feature = "burn-gpu")]
    fn kind(&self) -> Result<Option<DeviceKind>> {
        Ok(match self.device.as_deref() {
            Some("gpu") => Some(DeviceKind::DefaultDevice),
            Some("lavapipe") => Some(DeviceKind::Cpu),
            Some(name) => match name.strip_prefix("gpu:") {
                Some(index) => match index.parse() {
                    Ok(index) => Some(DeviceKind::DiscreteGpu(index)),
                    Err(_) => {
                        anyhow::bail!("--device {name}: expected gpu:N with the number of a discrete GPU, from 0")
                    }
                },
                None => None,
            },
            None => None,
        })
    }
}
