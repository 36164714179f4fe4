//! Ctrl-C: stops an answer, and the program where none is under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::INTERRUPTED;

/// No answer is under way.
const IDLE: u32 = u32::MAX;
/// So many presses end the program even during an answer: whatever it is doing, it does not listen.
const PATIENCE: u32 = 3;

/// How often Ctrl-C was pressed since the answer began.
pub struct Interrupt(Arc<AtomicU32>);

impl Interrupt {
    /// Handles the signal from here on.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn install() -> Result<Self, ctrlc::Error> {
        let pressed = Arc::new(AtomicU32::new(IDLE));
        let shared = pressed.clone();
        ctrlc::set_handler(move || {
            if shared.load(Ordering::Relaxed) == IDLE || shared.fetch_add(1, Ordering::Relaxed) + 1 >= PATIENCE {
                std::process::exit(INTERRUPTED.into());
            }
        })?;
        Ok(Interrupt(pressed))
    }

    /// Runs `work`, which asks its argument whether to stop.
    pub fn during<T>(&self, work: impl FnOnce(&dyn Fn() -> bool) -> T) -> T {
        self.0.store(0, Ordering::Relaxed);
        let result = work(&|| self.0.load(Ordering::Relaxed) > 0);
        self.0.store(IDLE, Ordering::Relaxed);
        result
    }
}
