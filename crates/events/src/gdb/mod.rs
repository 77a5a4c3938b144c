//! Hooks through QEMU's gdb stub: on any running QEMU, with KVM or TCG, that nobody prepared.
//!
//! One thread has the connection. It arms breakpoints and watchpoints, waits for the machine to stop, tells events,
//! applies verdicts and lets the machine go on; everybody else sends it commands and waits for its answers. A stop
//! halts all vCPUs.
//!
//! **Several hooks at one place** share one breakpoint. Those that are only told or counted get their event first;
//! those that hold the vCPU then get theirs one after the other, in the order in which they were armed. A changed
//! register is changed for those behind. A verdict by which the instruction is not executed (skip, return, another
//! instruction pointer) ends the turn: to those behind nothing happened.
//!
//! **Stepping over** a breakpoint is one step of that vCPU while all others stand still, so none passes unseen. TCG
//! does not look at breakpoints in a step; under KVM the breakpoint is out for the time of the step.
//!
//! **Two vCPUs at once**: QEMU tells of one. A breakpoint that the other one has reached is reached again when it
//! goes on. A watchpoint is not, for the access is done; so after each stop every other vCPU is let go on against a
//! breakpoint where it stands, which executes nothing and makes QEMU tell of the watchpoint.
//!
//! **Pauses that are not ours** (by the owner, by the verdict "pause", by a deadline that fails closed) end when
//! the owner lets the VM go on. It is looked at every 25 ms, because QEMU does not say so.
//!
//! **A hook that fails closed** has the VM paused, its breakpoints out, when this program is killed: by the watch of
//! the connection, which takes some milliseconds in which the guest may run unhooked. At a regular end it goes on.
//!
//! **A connection that is cut** (by somebody who shuts it, or a network that fails) leaves breakpoints in and the VM as it
//! stands: QEMU does nothing about it. So another one is made, and ends as this one would have.
//!
//! **Deadlines are kept here,** by that one thread, and so is the second that the VM stands still for room in the queue. A program
//! that is stopped as a whole (SIGSTOP) keeps none: what it holds waits until it goes on or is killed.
//!
//! **What is not seen**: that the owner pauses a VM which stands at a hook already; it goes on with the verdict. An
//! owner who lets it go on there lets the other vCPUs run until the held one meets its breakpoint again. Who is
//! killed within 25 ms after the owner ended a pause leaves the VM paused.

mod arm;
mod capability;
mod filter;
mod instruction;
mod occasion;
mod queue;
mod step;
mod table;
mod verdict;
mod wait;
mod watch;
mod worker;

use std::fmt;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmsight_arch::Registers;
use vmsight_hooks::{BackendKind, Capability, Counts, Delivery, Event, Hook, HookId, Tallied, Verdict};
use vmsight_memory::GuestMemory;
use vmsight_target::gdb::{Accelerator, Debugger, GdbError, Waker};
use vmsight_target::{Target, TargetError};

use crate::backend::Backend;
use crate::{EventError, Monitor};
use queue::{CAPACITY, End, Queue};
use worker::{Command, Worker};

/// How many events can wait to be taken, of all vCPUs together.
pub const MOST_WAITING: usize = CAPACITY;

/// How the stub is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GdbOptions {
    /// The longest wait for an answer of the stub.
    pub timeout: Duration,
}

impl Default for GdbOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
        }
    }
}

/// Opens the stub of a VM, and a monitor over it. The VM is paused for a moment; it is left as it was found.
///
/// # Errors
/// [`EventError::Busy`] where a debugger is connected, [`EventError::NoBackend`] where there is no stub to be had.
pub fn open(target: &Target, options: GdbOptions) -> Result<Monitor, EventError> {
    Ok(Monitor::new(Box::new(GdbBackend::open(target, options)?)))
}

/// What can be hooked through the stub of a VM that is run by `accelerator`.
pub fn capabilities(accelerator: Accelerator) -> Vec<Capability> {
    capability::table(accelerator)
}

/// The backend itself.
pub struct GdbBackend {
    accelerator: Accelerator,
    queue: Arc<Queue>,
    commands: Mutex<Sender<Command>>,
    waker: Waker,
    worker: Option<JoinHandle<()>>,
}

impl GdbBackend {
    /// Opens the stub of a VM.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(target: &Target, options: GdbOptions) -> Result<Self, EventError> {
        let debug = target.debug(options.timeout).map_err(|error| match error {
            TargetError::Gdb(GdbError::Busy { .. }) => EventError::Busy {
                target: target.name.clone(),
                why: error.to_string(),
            },
            TargetError::NoStub { target, why } => EventError::NoBackend { target, why },
            error => lost(error),
        })?;
        Self::over(debug, target.memory.clone())
    }

    fn over(debug: Debugger, memory: GuestMemory) -> Result<Self, EventError> {
        let waker = debug.waker();
        let accelerator = debug.accelerator();
        let queue = Arc::new(Queue::new(waker.clone()));
        let (commands, receiver) = mpsc::channel();
        let worker = Worker::new(debug, memory, Arc::clone(&queue), receiver);
        let worker = std::thread::Builder::new()
            .name("gdb-stub".to_owned())
            .spawn(move || worker.run())
            .map_err(|source| EventError::Io {
                doing: "starting a thread".to_owned(),
                source,
            })?;
        Ok(Self {
            accelerator,
            queue,
            commands: Mutex::new(commands),
            waker,
            worker: Some(worker),
        })
    }

    /// Sends a command and waits for its answer, which comes in bounded time: the thread waits for nobody but the
    /// stub.
    fn command<T>(
        &self,
        command: impl FnOnce(Sender<Result<T, EventError>>) -> Command,
    ) -> Result<T, EventError> {
        let (sender, answer) = mpsc::channel();
        let sent = self
            .commands
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(command(sender));
        if sent.is_ok() {
            self.waker.wake();
            if let Ok(answer) = answer.recv() {
                return answer;
            }
        }
        Err(self.queue.ended().error())
    }
}

impl Backend for GdbBackend {
    fn kind(&self) -> BackendKind {
        BackendKind::GdbStub
    }

    fn capabilities(&self) -> Vec<Capability> {
        capability::table(self.accelerator)
    }

    fn arm(&self, hook: &Hook) -> Result<HookId, EventError> {
        hook.validate()?;
        let table = self.capabilities();
        for feature in hook.features() {
            if !table.iter().any(|capability| capability.feature == feature) {
                return Err(EventError::Unsupported {
                    backend: self.kind(),
                    feature,
                    can: capability::instead(feature),
                });
            }
        }
        self.command(|answer| Command::Arm(hook.clone(), answer))
    }

    fn disarm(&self, id: HookId) -> Result<(), EventError> {
        self.command(|answer| Command::Disarm(id, answer))
    }

    fn next(&self, deadline: Instant) -> Result<Option<Event>, EventError> {
        self.queue.next(deadline)
    }

    fn wake(&self) {
        self.queue.wake();
    }

    fn registers(&self, event: &Event) -> Result<Registers, EventError> {
        self.command(|answer| Command::Registers(event.sequence, answer))
    }

    fn answer(&self, event: &Event, verdict: &Verdict) -> Result<(), EventError> {
        if !event.held {
            return Ok(());
        }
        self.command(|answer| Command::Answer(event.sequence, verdict.clone(), answer))
    }

    fn halts_all(&self) -> bool {
        true
    }

    fn halt(&self, delivery: Delivery) -> Result<HookId, EventError> {
        self.command(|answer| Command::Halt(delivery, answer))
    }

    fn registers_of(&self, vcpu: u32) -> Result<Registers, EventError> {
        self.command(|answer| Command::RegistersOf(vcpu, answer))
    }

    fn counts(&self, id: HookId) -> Result<Counts, EventError> {
        Ok(self.queue.counts(id))
    }

    fn tally(&self, id: HookId) -> Result<Tallied, EventError> {
        Ok(self.queue.tallied(id))
    }
}

impl Drop for GdbBackend {
    fn drop(&mut self) {
        let _ = self
            .commands
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .send(Command::End);
        self.waker.wake();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for GdbBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GdbBackend")
            .field("accelerator", &self.accelerator)
            .finish_non_exhaustive()
    }
}

/// The error of a target, said in the words of events.
fn lost(error: TargetError) -> EventError {
    if error.is_exit() {
        EventError::Gone
    } else {
        EventError::Target(error)
    }
}

/// The same for the stub's own.
fn of_stub(error: GdbError) -> EventError {
    lost(TargetError::from(error))
}

/// How a connection ends with this error.
fn end_of(error: &EventError) -> End {
    match error {
        EventError::Gone => End::Gone,
        other => End::Failed(other.to_string()),
    }
}
