//! A VM that stands waits for a verdict, or for room for an event; and for neither without end.

use std::time::{Duration, Instant};

use vmsight_hooks::{Expiry, HookId};
use vmsight_target::gdb::{Cause, Stop, Waited};

use super::of_stub;
use super::watch::Hit;
use super::worker::{LOOK, Worker};
use crate::EventError;

/// How long a vCPU waits for room in the queue, where it is to wait: a monitor that takes no events must not stop the guest. As
/// long as with an agent.
pub(super) const ROOM: Duration = Duration::from_secs(1);

impl Worker {
    /// Until the verdict comes, or its deadline.
    pub(super) fn wait_for_verdict(&mut self, deadline: Instant) -> Result<(), EventError> {
        match self.debug.wait(Some(deadline)).map_err(of_stub)? {
            Waited::Stop(stop) => self.resumed_behind(&stop),
            Waited::Woken => Ok(()),
            Waited::TimedOut => self.expire(),
        }
    }

    /// Until somebody takes an event, or a command comes, or it is time to look again.
    pub(super) fn wait_for_room(&mut self) -> Result<(), EventError> {
        match self.debug.wait(Some(Instant::now() + LOOK)).map_err(of_stub)? {
            Waited::Stop(stop) => self.resumed_behind(&stop),
            Waited::Woken | Waited::TimedOut => Ok(()),
        }
    }

    /// Somebody resumed the VM while it stood for an occasion. A breakpoint is met again; a watchpoint's access is
    /// done.
    fn resumed_behind(&mut self, stop: &Stop) -> Result<(), EventError> {
        tracing::debug!(?stop, "the VM was let go on while it stood at a hook");
        if let Cause::Watch { kind, address } = stop.cause {
            let registers = self.debug.registers(stop.vcpu).map_err(of_stub)?;
            let occasions = self.accesses(&[Hit {
                registers,
                kind,
                address,
            }])?;
            self.occasions.extend(occasions);
        }
        Ok(())
    }

    /// No verdict came.
    fn expire(&mut self) -> Result<(), EventError> {
        let Some(waiting) = self.occasions.front_mut().and_then(|o| o.waiting.take()) else {
            return Ok(());
        };
        self.queue.withdraw(waiting.event.sequence);
        self.expired(waiting.event.hook, waiting.expiry, "no verdict came in time")
    }

    /// A hook's event was waited with for too long. What it has told of before can still be taken.
    pub(super) fn expired(&mut self, id: HookId, expiry: Expiry, why: &str) -> Result<(), EventError> {
        self.queue.count(id, |c| c.expired += 1);
        match expiry {
            Expiry::Open => {
                tracing::warn!(hook = id.0, "{why}: the guest goes on, and the hook is out");
                self.unhook(id)
            }
            Expiry::Closed => {
                tracing::warn!(hook = id.0, "{why}: the VM is paused");
                self.pause = true;
                Ok(())
            }
        }
    }
}
