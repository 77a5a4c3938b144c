//! Through QEMU's own monitor.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmsight_arch::Registers;

use super::{PauseGuard, Pauses, lock};
use crate::TargetError;
use crate::guard::Guard;
use crate::host::process::Identity;
use crate::monitor;
use crate::qmp::{Qmp, QmpError};

/// The mark by which the watch knows the answer to its last words.
const GUARD_ID: &str = "vmsight-guard";

/// What a running QEMU can be asked and told. Clones share one state.
#[derive(Clone, Debug)]
pub(crate) struct QmpControl {
    path: PathBuf,
    vm: Identity,
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
    /// The monitor of `vm` at `path`.
    pub(crate) fn new(path: PathBuf, vm: Identity, timeout: Duration) -> Self {
        Self {
            path,
            vm,
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
            None => Ok(ask(&mut self.connect()?)?),
        }
    }

    /// A connection to the very VM: another one may have the socket's path by now.
    fn connect(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.path, self.timeout)?.refuse_another(self.vm)
    }

    /// Pauses the machine until the guard that is returned is dropped. A machine that does not run already is left
    /// as it is, then and after.
    pub(crate) fn pause(&self) -> Result<PauseGuard, TargetError> {
        let mut held = self.lock();
        if held.pauses == 0 {
            let mut qmp = self.connect()?;
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

    pub(super) fn resume(&self) {
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

    /// Whether the machine goes on when the pause ends.
    pub(super) fn will_resume(&self) -> bool {
        self.lock().guard.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }
}
