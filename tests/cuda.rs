//! The CUDA backend: its header, its compiled kernels, its errors; and the devices that the rest of the suite runs it on.
//!
//! Without a GPU its kernels run on the CPU, compiled as C++ behind a stand-in for the driver (`tests/cuda/emulator`).

#[cfg(feature = "cuda")]
mod attend;
#[cfg(feature = "cuda")]
mod bad;
#[cfg(feature = "cuda")]
mod compiled;
#[cfg(feature = "cuda")]
mod far;
mod header;
#[cfg(feature = "cuda")]
mod hopper;
#[cfg(feature = "cuda")]
mod mma;
#[cfg(feature = "cuda")]
mod product;
#[cfg(feature = "cuda")]
mod replay;
#[cfg(feature = "cuda")]
mod special;

use crate::util::Device;

/// The stand-in for the driver, built where that has not happened, as this process's CUDA driver.
#[cfg(feature = "cuda")]
pub fn emulator() -> Result<Device, String> {
    use std::sync::OnceLock;

    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    LOADED
        .get_or_init(|| {
            let path = emulator_dir()?.join("libcuda.so");
            // SAFETY: the library is ours; it does nothing when it is loaded.
            let library = unsafe { libloading::Library::new(&path) }.map_err(|e| e.to_string())?;
            // The driver is looked for by name, and found because a library of that name is there already.
            std::mem::forget(library);
            Ok(())
        })
        .clone()?;
    device("emulator")
}

/// The directory of the stand-in, built from the sources as they are.
#[cfg(feature = "cuda")]
pub fn emulator_dir() -> Result<std::path::PathBuf, String> {
    use std::path::Path;
    use std::sync::OnceLock;

    static BUILT: OnceLock<Result<std::path::PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            if !cfg!(target_os = "linux") {
                return Err("the stand-in for the driver is for Linux".into());
            }
            let compiler = std::env::var("CXX").unwrap_or("g++".into());
            if std::process::Command::new(&compiler).arg("--version").output().is_err() {
                return Err(format!("there is no C++ compiler {compiler} for the stand-in of the driver"));
            }
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/emulator/build.sh");
            let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-emulator");
            let built = std::process::Command::new("sh").arg(&script).arg(&dir).output().map_err(|e| e.to_string())?;
            match built.status.success() {
                true => Ok(dir),
                // Sources that do not compile are no lack of the machine.
                false => panic!("{}: {}", script.display(), String::from_utf8_lossy(&built.stderr)),
            }
        })
        .clone()
}

/// Runs the ignored test `name` of this module in a process whose driver is the stand-in, told to be like `like`; what it printed.
#[cfg(feature = "cuda")]
pub fn child(name: &str, like: &str, env: &[(&str, &str)]) -> Option<String> {
    let dir = match emulator_dir() {
        Ok(dir) => dir,
        Err(why) => {
            crate::util::skipped("emulator", &why);
            return None;
        }
    };
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("cuda::{name}"), "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", dir)
        .env("GATEDELTA_EMULATE", like)
        .env_remove("GATEDELTA_DEVICE")
        .env_remove("GATEDELTA_HOPPER")
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let text = [&*String::from_utf8_lossy(&out.stdout), &*String::from_utf8_lossy(&out.stderr)].concat();
    assert!(out.status.success(), "{like}: {text}");
    Some(text)
}

/// The first CUDA device of this process's driver.
#[cfg(feature = "cuda")]
pub fn device(name: &'static str) -> Result<Device, String> {
    use gatedelta::backend::cuda::{Cuda, OpenOptions};

    let devices = Cuda::enumerate();
    let found = devices.found.first().ok_or(devices.why_none)?;
    Ok(Device {
        name,
        backend: std::sync::Arc::new(Cuda::open(found, &OpenOptions::default()).map_err(|e| e.to_string())?),
    })
}

#[cfg(not(feature = "cuda"))]
pub fn emulator() -> Result<Device, String> {
    device("emulator")
}

#[cfg(not(feature = "cuda"))]
pub fn device(_: &'static str) -> Result<Device, String> {
    Err("built without the feature cuda".into())
}
