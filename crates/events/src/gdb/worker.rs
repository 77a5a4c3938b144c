//! The thread that has the connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use vmsight_arch::Registers;
use vmsight_hooks::{Delivery, Hook, HookId, Sequence, Verdict};
use vmsight_memory::GuestMemory;
use vmsight_target::gdb::{Cause, Debugger, GdbError, Stop, Waited};

use super::occasion::Occasion;
use super::queue::{End, Queue};
use super::table::Table;
use super::watch::Hit;
use super::{end_of, of_stub};
use crate::EventError;

/// How often it is looked whether the owner of a paused VM let it go on.
pub(super) const LOOK: Duration = Duration::from_millis(25);
type Answer<T> = Sender<Result<T, EventError>>;

/// What others ask of the thread.
pub(super) enum Command {
    Arm(Hook, Answer<HookId>),
    Halt(Delivery, Answer<HookId>),
    Disarm(HookId, Answer<()>),
    Registers(Sequence, Answer<Registers>),
    RegistersOf(u32, Answer<Registers>),
    Answer(Sequence, Verdict, Answer<()>),
    End,
}

/// What the VM does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// It runs.
    Runs,
    /// It stands still for the occasions.
    Stands,
    /// It stands still for its owner, who may have let it go on meanwhile.
    Paused,
}

/// The connection and everything that is known.
pub(super) struct Worker {
    pub(super) debug: Debugger,
    /// For what no vCPU has in its address space at the moment.
    pub(super) memory: GuestMemory,
    pub(super) table: Table,
    pub(super) queue: Arc<Queue>,
    commands: Receiver<Command>,
    pub(super) state: State,
    pub(super) occasions: VecDeque<Occasion>,
    /// When the occasions are through the VM stays paused.
    pub(super) pause: bool,
    /// vCPUs that were told of an instruction and then paused in front of it: when the owner lets them go on they
    /// meet it once more, and nothing is told.
    pub(super) told: Vec<(u32, u64)>,
    pub(super) last: u32,
}

impl Worker {
    pub(super) fn new(
        debug: Debugger,
        memory: GuestMemory,
        queue: Arc<Queue>,
        commands: Receiver<Command>,
    ) -> Self {
        let ran = debug.ran();
        Self {
            debug,
            memory,
            table: Table::default(),
            queue,
            commands,
            state: State::Stands,
            occasions: VecDeque::new(),
            pause: !ran,
            told: Vec::new(),
            last: 0,
        }
    }

    pub(super) fn run(mut self) {
        // Said also in a panic: nobody may wait for a thread that is gone.
        let farewell = Farewell(Arc::clone(&self.queue));
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => {
                    if let Err(error) = self.settle() {
                        tracing::debug!(%error, "the hooks were taken out the short way");
                    }
                    break;
                }
                Err(error) => {
                    self.queue.end(end_of(&error));
                    break;
                }
            }
        }
        // Before anybody learns that it is over.
        drop(self);
        drop(farewell);
    }

    /// One thing after another; false at the end.
    fn turn(&mut self) -> Result<bool, EventError> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return Ok(false),
                Ok(command) => self.command(command)?,
                Err(TryRecvError::Empty) => break,
            }
        }
        match self.state {
            State::Stands => self.advance()?,
            State::Runs => {
                if let Waited::Stop(stop) = self.debug.wait(None).map_err(of_stub)? {
                    self.stopped(&[stop])?;
                }
            }
            State::Paused => match self.debug.wait(Some(Instant::now() + LOOK)).map_err(of_stub)? {
                Waited::Stop(stop) => self.stopped(&[stop])?,
                Waited::Woken => {}
                Waited::TimedOut => self.look()?,
            },
        }
        Ok(true)
    }

    fn command(&mut self, command: Command) -> Result<(), EventError> {
        // An error of the connection ends this thread; one of the command is for who gave it.
        fn give<T>(answer: &Answer<T>, result: Result<T, EventError>) -> Result<(), EventError> {
            match result {
                Err(error) if is_fatal(&error) => {
                    let end = end_of(&error);
                    let _ = answer.send(Err(error));
                    Err(end.error())
                }
                other => {
                    let _ = answer.send(other);
                    Ok(())
                }
            }
        }
        match command {
            Command::Arm(hook, answer) => {
                let result = self.arm(hook);
                give(&answer, result)
            }
            Command::Halt(delivery, answer) => {
                let result = self.halt(delivery);
                give(&answer, result)
            }
            Command::Disarm(id, answer) => {
                let result = self.disarm(id);
                give(&answer, result)
            }
            Command::Registers(sequence, answer) => {
                let held = self.occasions.front().filter(|o| o.waits_with(sequence));
                let _ = answer.send(held.map(|o| o.registers).ok_or_else(|| EventError::Protocol {
                    what: format!("event {sequence} is not held: its vCPU went on"),
                }));
                Ok(())
            }
            Command::RegistersOf(vcpu, answer) => {
                let held = self.occasions.front().is_some_and(|o| o.waiting.is_some());
                if held && vcpu < self.debug.vcpus() {
                    let result = self.debug.registers(vcpu).map_err(of_stub);
                    return give(&answer, result);
                }
                let _ = answer.send(Err(EventError::Limit {
                    backend: vmsight_hooks::BackendKind::GdbStub,
                    what: format!("the registers of vCPU {vcpu}"),
                    why: format!(
                        "there are {} vCPUs, and an event must be held",
                        self.debug.vcpus()
                    ),
                }));
                Ok(())
            }
            Command::Answer(sequence, verdict, answer) => {
                let result = self.answer(sequence, &verdict);
                give(&answer, result)
            }
            Command::End => Ok(()),
        }
    }

    /// Makes the VM stand still, where it does not, for as long as nothing lets it go on.
    pub(super) fn stand(&mut self) -> Result<(), EventError> {
        match self.state {
            State::Stands => Ok(()),
            State::Runs | State::Paused => self.look(),
        }
    }

    /// Looks whether the VM runs, and if so makes it stand still.
    fn look(&mut self) -> Result<(), EventError> {
        let stops = self.debug.interrupt().map_err(of_stub)?;
        match stops.is_empty() {
            true => Ok(()),
            false => self.interrupted(&stops),
        }
    }

    /// The VM ran when we interrupted it; it stands from here on, until [`Self::advance`] finds that all is told.
    fn interrupted(&mut self, stops: &[Stop]) -> Result<(), EventError> {
        let others: Vec<Stop> = stops
            .iter()
            .copied()
            .filter(|stop| stop.cause != Cause::Paused)
            .collect();
        self.stopped(&others)
    }

    /// The VM stopped; without a stop it was our interrupt.
    fn stopped(&mut self, stops: &[Stop]) -> Result<(), EventError> {
        self.state = State::Stands;
        let mut hits = Vec::new();
        let mut told = None;
        for stop in stops {
            match stop.cause {
                Cause::Trap | Cause::Watch { .. } => {
                    told = Some(stop.vcpu);
                    let registers = self.debug.registers(stop.vcpu).map_err(of_stub)?;
                    match stop.cause {
                        Cause::Watch { kind, address } => hits.push(Hit {
                            registers,
                            kind,
                            address,
                        }),
                        _ => self.trapped(registers),
                    }
                }
                // By its owner, or for a reason that only he can mend.
                _ => self.pause = true,
            }
        }
        // A VM that its owner paused is not let go on even against a breakpoint.
        if !self.pause {
            hits.extend(self.pending(told)?);
        }
        let occasions = self.accesses(&hits)?;
        self.occasions.extend(occasions);
        self.entrust(self.pause)
    }

    /// What becomes of the VM if we are killed from here on: it stays paused, or is made to, where a hook fails closed.
    fn entrust(&mut self, paused: bool) -> Result<(), EventError> {
        self.debug
            .hold(paused || self.table.fails_closed())
            .map_err(of_stub)
    }

    /// All occasions are through.
    pub(super) fn go_on(&mut self) -> Result<(), EventError> {
        if std::mem::take(&mut self.pause) {
            self.debug.hold(true).map_err(of_stub)?;
            self.state = State::Paused;
            // So that the next stop is told, and for the case that its owner was quicker.
            self.look()?;
        } else {
            self.entrust(false)?;
            self.debug.resume().map_err(of_stub)?;
            self.state = State::Runs;
        }
        Ok(())
    }

    /// Before the end: watchpoints go with the hits that QEMU has not told of.
    fn settle(&mut self) -> Result<(), EventError> {
        if self.state == State::Runs && self.table.watches() {
            self.stand()?;
        }
        // Not told of any more, and its owner has it paused.
        self.debug
            .hold(self.pause || self.state == State::Paused)
            .map_err(of_stub)
    }
}

/// Says to those who wait that nothing more comes.
struct Farewell(Arc<Queue>);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.end(End::Gone);
    }
}

/// Whether the connection is of no more use.
fn is_fatal(error: &EventError) -> bool {
    match error {
        EventError::Gone | EventError::Protocol { .. } => true,
        EventError::Target(error) => is_fatal_target(error),
        _ => false,
    }
}

pub(super) fn is_fatal_target(error: &vmsight_target::TargetError) -> bool {
    !matches!(error, vmsight_target::TargetError::Gdb(GdbError::Refused { .. }))
}
