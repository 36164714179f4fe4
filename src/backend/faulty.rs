//! A backend that fails when it is told to, around one that works: for tests of what has to go on. Nothing else uses it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Backend, Buffer, HostBytes, Readback, Timing, View};
use crate::error::{Error, Result};
use crate::pass::Pass;
use crate::tune::Caps;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The device is lost: this call and all later ones on it say so.
    Lost,
    /// The driver fails in this call; the work of it is not done.
    Driver,
    /// Memory is refused once. Calls that ask for none pass, and the next that does fails.
    OutOfMemory,
    /// Memory is refused from this call on, on this device.
    NoMemory,
}

/// The calls of any number of devices, counted in one row, and the faults that are due.
#[derive(Clone, Default)]
pub struct Plan(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Calls so far.
    calls: u64,
    /// Faults to come, the next first, each with the first call that it may meet.
    due: Vec<(u64, Fault)>,
    /// Those that have happened, with the call that each met.
    met: Vec<(u64, Fault)>,
}

/// What a call is, as far as faults are concerned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Memory,
    Other,
}

impl Plan {
    /// Faults by the number of the call that they meet, counted from 0; ascending.
    pub fn new(due: &[(u64, Fault)]) -> Plan {
        Plan(Arc::new(Mutex::new(State { due: due.to_vec(), ..State::default() })))
    }

    /// A device that follows the plan, under a name of its own.
    pub fn around(&self, backend: Arc<dyn Backend>) -> Faulty {
        let caps = Caps { name: format!("faulty {}", backend.caps().name), ..backend.caps().clone() };
        Faulty { plan: self.clone(), backend, caps, broken: Mutex::new(None) }
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Adds a fault for the next call.
    pub fn fail_now(&self, fault: Fault) {
        self.fail_after(0, fault);
    }

    /// Adds a fault for the call after so many more.
    pub fn fail_after(&self, calls: u64, fault: Fault) {
        let mut state = self.lock();
        let at = state.calls + calls;
        state.due.push((at, fault));
    }

    /// Faults that have happened, with the calls that they met.
    pub fn met(&self) -> Vec<(u64, Fault)> {
        self.lock().met.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call; the fault that meets it.
    fn call(&self, call: Call) -> Option<Fault> {
        let mut state = self.lock();
        let at = state.calls;
        state.calls += 1;
        let wants_memory = |fault: Fault| matches!(fault, Fault::OutOfMemory | Fault::NoMemory);
        let (from, fault) = *state.due.first()?;
        if at < from || wants_memory(fault) && call != Call::Memory {
            return None;
        }
        state.due.remove(0);
        state.met.push((at, fault));
        Some(fault)
    }
}

/// See the [module](self).
pub struct Faulty {
    plan: Plan,
    backend: Arc<dyn Backend>,
    caps: Caps,
    /// Lost, or without memory.
    broken: Mutex<Option<Fault>>,
}

impl Faulty {
    fn meet(&self, call: Call, what: &str, needed: u64) -> Result<()> {
        let device = self.caps.name.clone();
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = |device| Err(Error::DeviceLost { device, why: "a test took it away".into() });
        let refused = |device| {
            let limit = "a test has taken the rest".into();
            Err(Error::OutOfMemory { device, what: what.into(), needed, limit })
        };
        match *broken {
            Some(Fault::NoMemory) if call == Call::Memory => return refused(device),
            Some(Fault::Lost) => return lost(device),
            _ => {}
        }
        match self.plan.call(call) {
            None => Ok(()),
            Some(Fault::Driver) => Err(Error::Device { device, why: "a test had its driver fail".into() }),
            Some(Fault::OutOfMemory) => refused(device),
            Some(fault) => {
                *broken = Some(fault);
                if fault == Fault::Lost { lost(device) } else { refused(device) }
            }
        }
    }
}

impl Backend for Faulty {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, what: &str, bytes: u64) -> Result<Buffer> {
        self.meet(Call::Memory, what, bytes)?;
        self.backend.alloc(what, bytes)
    }

    fn import(&self, what: &str, bytes: HostBytes) -> Result<Buffer> {
        self.meet(Call::Memory, what, bytes.bytes().len() as u64)?;
        self.backend.import(what, bytes)
    }

    fn write(&self, to: &View, bytes: &[u8]) -> Result<()> {
        self.meet(Call::Other, "", 0)?;
        self.backend.write(to, bytes)
    }

    fn read(&self, from: &View) -> Result<Readback> {
        self.meet(Call::Other, "", 0)?;
        self.backend.read(from)
    }

    fn load(&self, pass: &Pass) -> Result<()> {
        self.meet(Call::Other, "", 0)?;
        self.backend.load(pass)
    }

    fn run(&self, pass: &Pass) -> Result<()> {
        self.meet(Call::Other, "", 0)?;
        self.backend.run(pass)
    }

    fn wait(&self) -> Result<()> {
        self.meet(Call::Other, "", 0)?;
        self.backend.wait()
    }

    fn time(&self, pass: &Pass) -> Result<Timing> {
        self.meet(Call::Other, "", 0)?;
        self.backend.time(pass)
    }

    fn abandon(&self) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(Fault::Lost);
        self.backend.abandon();
    }
}
