//! Registers and pausing: through QMP, through a gdb stub, or through libvirt where it holds the monitor.

mod qmp;
mod stub;
mod virsh;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use qmp::QmpControl;
pub(crate) use stub::GdbControl;
pub(crate) use virsh::VirshControl;

/// A paused VM. It goes on when this is dropped, when the program panics or is killed; a VM that its owner had
/// paused stays paused (through a gdb stub that can be told only where QEMU's state is not plainly "paused", and
/// then it goes on). The monitor's socket, or the stub, is ours as long as this lives.
///
/// Nothing else ends the pause: there is no longest one, and a program that is itself stopped (SIGSTOP, Ctrl-Z, a debugger)
/// keeps its VM paused until it goes on or is ended, as a debugger does whose user went for lunch. To let it go on behind
/// the back of somebody who looks at it would give him a picture that is neither of one moment nor known not to be. So
/// drop this as soon as what is needed was read, and before waiting for anybody: a pager, a full pipe, a prompt.
#[derive(Debug)]
#[must_use = "the VM goes on as soon as this is dropped"]
pub struct PauseGuard {
    control: Pauses,
}

#[derive(Debug)]
enum Pauses {
    Qmp(QmpControl),
    Gdb(GdbControl),
    Virsh(VirshControl),
}

impl PauseGuard {
    /// Whether the VM ran before and will go on, as opposed to one its owner had paused.
    #[must_use]
    pub fn will_resume(&self) -> bool {
        match &self.control {
            Pauses::Qmp(control) => control.will_resume(),
            Pauses::Gdb(control) => control.will_resume(),
            Pauses::Virsh(control) => control.will_resume(),
        }
    }
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        match &self.control {
            Pauses::Qmp(control) => control.resume(),
            Pauses::Gdb(control) => control.release(),
            Pauses::Virsh(control) => control.resume(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was locked leaves nothing half done that the watch would not mend.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
