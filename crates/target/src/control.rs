//! Registers and pausing, through QMP or a gdb stub.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmsight_arch::Registers;

use crate::TargetError;
use crate::gdb::{Gdb, GdbError};
use crate::guard::Guard;
use crate::monitor;
use crate::qmp::{Qmp, QmpError};
use crate::spec::GdbAddress;

/// The mark by which the watch knows the answer to its last words.
const GUARD_ID: &str = "vmsight-guard";

/// What a running QEMU can be asked and told. Clones share one state.
#[derive(Clone, Debug)]
pub(crate) struct QmpControl {
    path: PathBuf,
    timeout: Duration,
    held: Arc<Mutex<Held>>,
}

/// A pause of ours: the connection stays open as long as it lasts, for its watch needs one.
#[derive(Default, Debug)]
struct Held {
    pauses: usize,
    qmp: Option<Qmp>,
    /// `None` where the VM did not run before: then nothing lets it go on but its owner.
    guard: Option<Guard>,
}

impl QmpControl {
    pub(crate) fn new(path: PathBuf, timeout: Duration) -> Self {
        Self {
            path,
            timeout,
            held: Arc::default(),
        }
    }

    /// The registers of all vCPUs. The machine is not stopped for it.
    pub(crate) fn registers(&self) -> Result<Vec<Registers>, TargetError> {
        self.with(|qmp| {
            let text = qmp.hmp("info registers -a")?;
            Ok(monitor::parse_registers(&text))
        })
    }

    /// Runs `ask` on a connection: the one that a pause holds, or one of its own that is closed at once.
    pub(crate) fn with<T>(
        &self,
        ask: impl FnOnce(&mut Qmp) -> Result<T, QmpError>,
    ) -> Result<T, TargetError> {
        let mut held = self.lock();
        match &mut held.qmp {
            Some(qmp) => Ok(ask(qmp)?),
            None => Ok(ask(&mut Qmp::connect(&self.path, self.timeout)?)?),
        }
    }

    /// Pauses the machine until the guard that is returned is dropped. A machine that does not run already is left
    /// as it is, then and after.
    pub(crate) fn pause(&self) -> Result<PauseGuard, TargetError> {
        let mut held = self.lock();
        if held.pauses == 0 {
            let mut qmp = Qmp::connect(&self.path, self.timeout)?;
            let status = qmp.status()?;
            if status.running {
                let connection = qmp.duplicate().map_err(|source| TargetError::Guard {
                    what: "its connection cannot be copied",
                    source,
                })?;
                // 0xff makes QEMU's parser forget a command that we were in the midst of.
                let words = format!(r#"\377\n{{"execute":"cont","id":"{GUARD_ID}"}}\n"#);
                let guard =
                    Guard::set(connection, &words, GUARD_ID).map_err(|source| TargetError::Guard {
                        what: "/bin/sh cannot be started",
                        source,
                    })?;
                // From here on the watch lets it go on whatever happens.
                qmp.stop()?;
                held.guard = Some(guard);
            } else {
                tracing::debug!(status = status.name, "the machine does not run already");
            }
            held.qmp = Some(qmp);
        }
        held.pauses += 1;
        Ok(PauseGuard {
            control: Pauses::Qmp(self.clone()),
        })
    }

    fn resume(&self) {
        let mut held = self.lock();
        held.pauses = held.pauses.saturating_sub(1);
        if held.pauses > 0 {
            return;
        }
        let guard = held.guard.take();
        let qmp = held.qmp.take();
        if let (Some(guard), Some(mut qmp)) = (guard, qmp) {
            match qmp.cont() {
                Ok(()) => guard.dismiss(),
                // The watch tries once more as it is dropped.
                Err(error) => tracing::warn!(%error, "the machine could not be told to go on"),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }
}

/// What a gdb stub can be asked and told. Connecting pauses the VM, so each question is a short pause.
#[derive(Clone, Debug)]
pub(crate) struct GdbControl {
    address: GdbAddress,
    server: Option<u32>,
    timeout: Duration,
    /// The connection of a pause, or of a target whose memory is read through it.
    stub: Arc<Mutex<Option<Gdb>>>,
    /// Who needs the connection to stay: pauses, and the target itself.
    holders: Arc<Mutex<usize>>,
}

impl GdbControl {
    /// `server` is the VM's process, where it is known.
    pub(crate) fn new(address: GdbAddress, server: Option<u32>, timeout: Duration) -> Self {
        Self {
            address,
            server,
            timeout,
            stub: Arc::default(),
            holders: Arc::default(),
        }
    }

    /// The connection, shared with whoever reads memory through it.
    pub(crate) fn stub(&self) -> Arc<Mutex<Option<Gdb>>> {
        Arc::clone(&self.stub)
    }

    pub(crate) fn with<T>(&self, ask: impl FnOnce(&mut Gdb) -> Result<T, GdbError>) -> Result<T, GdbError> {
        let mut stub = lock(&self.stub);
        match stub.as_mut() {
            Some(stub) => ask(stub),
            None => ask(&mut self.connect()?),
        }
    }

    /// Keeps the connection, and with it the pause, until the guard is dropped.
    pub(crate) fn pause(&self) -> Result<PauseGuard, GdbError> {
        let mut holders = lock(&self.holders);
        if *holders == 0 {
            *lock(&self.stub) = Some(self.connect()?);
        }
        *holders += 1;
        Ok(PauseGuard {
            control: Pauses::Gdb(self.clone()),
        })
    }

    fn connect(&self) -> Result<Gdb, GdbError> {
        Gdb::connect(&self.address, self.server, self.timeout)
    }

    fn release(&self) {
        let mut holders = lock(&self.holders);
        *holders = holders.saturating_sub(1);
        if *holders == 0 {
            *lock(&self.stub) = None;
        }
    }
}

/// A paused VM. It goes on when this is dropped, when the program panics or is killed; a VM that its owner had
/// paused stays paused (through a gdb stub that can be told only where QEMU's state is not plainly "paused", and
/// then it goes on). The monitor's socket, or the stub, is ours as long as this lives.
#[derive(Debug)]
#[must_use = "the VM goes on as soon as this is dropped"]
pub struct PauseGuard {
    control: Pauses,
}

#[derive(Debug)]
enum Pauses {
    Qmp(QmpControl),
    Gdb(GdbControl),
}

impl PauseGuard {
    /// Whether the VM ran before and will go on, as opposed to one its owner had paused.
    #[must_use]
    pub fn will_resume(&self) -> bool {
        match &self.control {
            Pauses::Qmp(control) => control.lock().guard.is_some(),
            Pauses::Gdb(control) => lock(&control.stub).as_ref().is_some_and(Gdb::will_resume),
        }
    }
}

impl Drop for PauseGuard {
    fn drop(&mut self) {
        match &self.control {
            Pauses::Qmp(control) => control.resume(),
            Pauses::Gdb(control) => control.release(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while it was locked leaves nothing half done that the watch would not mend.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
