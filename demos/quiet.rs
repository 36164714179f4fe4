//! Silence from a Vulkan layer that has nothing to do without a display.

/// Keeps Mesa's device-select layer out where there is no display: older ones ask Wayland which GPU shows the desktop, and
/// libwayland writes an error to the standard error whenever adapters are listed. A user who steers that layer keeps it.
///
/// To be called first of all in `main`.
pub fn hush() {
    const STEERING: [&str; 6] =
        ["NODEVICE_SELECT", "MESA_VK_DEVICE_SELECT", "DRI_PRIME", "XDG_RUNTIME_DIR", "WAYLAND_DISPLAY", "DISPLAY"];
    if cfg!(target_os = "linux") && STEERING.iter().all(|name| std::env::var_os(name).is_none()) {
        // SAFETY: no other thread runs yet that could read the environment.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}
