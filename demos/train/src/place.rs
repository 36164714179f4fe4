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
        if let Some(name) = self.device.as_deref().filter(|name| *name == "gpu" || name.starts_with("gpu:")) {
            anyhow::bail!("--device {name}: this program was built without the feature burn-gpu");
        }
        Ok((Engine::open(self.device.as_deref())?, Device::flex().autodiff()))
    }

    /// The device that burn and the kernels share, if the name is of one.
    #[cfg(feature = "burn-gpu")]
    fn kind(&self) -> Result<Option<DeviceKind>> {
        let Some(name) = self.device.as_deref() else { return Ok(None) };
        Ok(match (name, name.strip_prefix("gpu:").map(str::parse)) {
            ("gpu", _) => Some(DeviceKind::DefaultDevice),
            ("lavapipe", _) => Some(DeviceKind::Cpu),
            (_, Some(Ok(index))) => Some(DeviceKind::DiscreteGpu(index)),
            (_, Some(Err(_))) => {
                anyhow::bail!("--device {name}: expected gpu:N with the number of a discrete GPU, from 0")
            }
            (_, None) => None,
        })
    }
}

#[cfg(all(test, feature = "burn-gpu"))]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_that_burn_shares() {
        let kind = |name: &str| Place { device: Some(name.into()) }.kind();
        assert!(matches!(kind("gpu"), Ok(Some(DeviceKind::DefaultDevice))));
        assert!(matches!(kind("gpu:1"), Ok(Some(DeviceKind::DiscreteGpu(1)))));
        assert!(matches!(kind("cpu"), Ok(None)));
        for bad in ["gpu:", "gpu:x", "gpu:-1"] {
            let why = kind(bad).unwrap_err().to_string();
            assert!(why.contains(bad) && why.contains("expected gpu:N"), "{why}");
        }
    }
}
