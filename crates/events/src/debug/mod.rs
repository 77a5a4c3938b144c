//! A server for debuggers over hooks: gdb and lldb debug a guest's kernel, or one process of the guest.
//!
//! **The kernel**: threads are vCPUs, breakpoints are hooks in every address space, addresses are the
//! kernel's (in the lower half those of whom the vCPU runs). **One process**: hooks are armed in its page
//! tables and only its own events stop anything; it is shown as one thread, the one that stopped. A process
//! that is not on a vCPU in user mode shows the registers with which it will return to user mode; they cannot
//! be changed, and a step waits until it has returned and made it. A step into a system call or a page fault
//! ends behind the call.
//!
//! **All stop.** Where one event halts the machine (the gdb stub) nothing more is needed. Where it holds only
//! its own vCPU, each other one is made to step once, which holds it too; one that sleeps is held when it
//! wakes, and its registers are not known before.
//!
//! **An interrupt** (Ctrl-C, and a debugger's arrival) is an event in which nothing happened, of vCPU 0
//! (`Monitor::halt`), or else a step of whichever vCPU executes something: what comes of it is an event like
//! others, that holds, shows registers and is answered. Pausing the VM through its monitor would show no
//! registers where the stub's connection is the only one, and leave a guest that its owner may resume under the
//! debugger's feet.
//!
//! **A vCPU that sleeps** in HLT makes no step while the others stand. All go on until it has woken and is
//! back behind its HLT, which is where the step ends.
//!
//! **Breakpoints stay in the guest** while it stands, whatever the debugger takes out: see `points`.
//! **Changed registers** are written by the verdict with which the vCPU goes on; only a vCPU whose own event
//! is held has one.
//!
//! **The end**: whoever goes, the debugger or this program, all hooks come out and the guest goes on.

mod debuggee;
mod points;
mod process;
mod registers;
mod target;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStubBuilder, GdbStubError, MultiThreadStopReason};
use vmsight_linux::{Kernel, LinuxError};

use crate::{EventError, Monitor};
use debuggee::{Debuggee, Why};
use wire::{Incoming, Next};

pub use wire::Wire;

/// How long a wait lasts before it is looked whether to go on at all.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long the guest may take to stand still for a debugger that arrives.
const ARRIVAL: Duration = Duration::from_secs(30);
/// The largest packet.
const PACKET: usize = 1 << 16;

/// Why a guest cannot be debugged, or not any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DebugError {
    /// Hooks failed.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The process, or what is to be known of it, cannot be found.
    #[error("looking for the process that is to be debugged")]
    Kernel(#[from] LinuxError),
    /// The connection to the debugger failed.
    #[error("the connection to the debugger: {0}")]
    Connection(#[from] io::Error),
    /// What the debugger says makes no sense.
    #[error("the debugger cannot be served: {0}")]
    Protocol(String),
    /// It did not stand still.
    #[error("the guest did not stand still within {} s", ARRIVAL.as_secs())]
    NoStop,
}

/// How a debugger went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parting {
    /// It detached.
    Detached,
    /// It killed the debuggee, as it believes: a guest is only let go.
    Killed,
    /// Its connection ended.
    Lost,
    /// It was no debugger: it said nothing, or something else. The guest did not stand still for it.
    Stranger,
    /// The VM ended.
    Ended,
    /// We were told to stop.
    Stopped,
}

/// What a debugger is given: a guest's kernel, or a process of the guest.
#[derive(Debug)]
pub struct Debugger {
    debuggee: Debuggee,
}

impl Debugger {
    /// Over hooks of a guest with so many vCPUs. With a pid (root namespace) that process is debugged.
    ///
    /// # Errors
    /// Where there is no such process, or it has no memory of its own.
    pub fn new(monitor: Monitor, kernel: &Kernel, vcpus: u32, pid: Option<i32>) -> Result<Self, DebugError> {
        Ok(Self {
            debuggee: Debuggee::new(monitor, kernel, vcpus, pid)?,
        })
    }

    /// Serves one debugger until it goes, or `stop` is set. The guest stands still from its first word on.
    /// Afterwards, whatever happened, no hook is left and the guest runs.
    ///
    /// # Errors
    /// Where hooks or the connection fail.
    pub fn serve(&mut self, wire: Wire, stop: &AtomicBool) -> Result<Parting, DebugError> {
        let served = self.session(wire, stop);
        match (served, self.debuggee.let_go()) {
            (Err(DebugError::Event(EventError::Gone)), _) | (Ok(_), Err(EventError::Gone)) => {
                Ok(Parting::Ended)
            }
            (Ok(_), Err(error)) => Err(error.into()),
            (served, _) => served,
        }
    }

    fn session(&mut self, wire: Wire, stop: &AtomicBool) -> Result<Parting, DebugError> {
        let debuggee = &mut self.debuggee;
        let (mut incoming, outgoing) = wire::open(wire, debuggee.monitor())?;
        let Some(first) = first_byte(&mut incoming, stop) else {
            return Ok(match stop.load(Ordering::Relaxed) {
                true => Parting::Stopped,
                false => Parting::Stranger,
            });
        };
        arrive(debuggee, stop)?;
        let stub = GdbStubBuilder::new(outgoing).packet_buffer_size(PACKET).build();
        let stub = stub.map_err(|e| DebugError::Protocol(e.to_string()))?;
        let mut state = stub.run_state_machine(debuggee).map_err(failed)?;
        if let GdbStubStateMachine::Idle(idle) = state {
            state = idle.incoming_data(debuggee, first).map_err(failed)?;
        }
        while !stop.load(Ordering::Relaxed) {
            state = match state {
                GdbStubStateMachine::Idle(idle) => match incoming.next(PATIENCE) {
                    Next::Byte(byte) => idle.incoming_data(debuggee, byte).map_err(failed)?,
                    Next::NotYet => idle.into(),
                    Next::End => return Ok(Parting::Lost),
                },
                GdbStubStateMachine::Running(running) => match incoming.next(Duration::ZERO) {
                    Next::Byte(byte) => running.incoming_data(debuggee, byte).map_err(failed)?,
                    Next::NotYet => match debuggee.poll(PATIENCE) {
                        Ok(Some(why)) => {
                            let reason = debuggee.reason(why);
                            running.report_stop(debuggee, reason).map_err(failed)?
                        }
                        Ok(None) => running.into(),
                        Err(EventError::Gone) => {
                            let exited = MultiThreadStopReason::<u64>::Exited(0);
                            running.report_stop(debuggee, exited).map_err(failed)?
                        }
                        Err(error) => return Err(error.into()),
                    },
                    Next::End => return Ok(Parting::Lost),
                },
                GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
                    debuggee.interrupt()?;
                    let later = None::<MultiThreadStopReason<u64>>;
                    interrupt.interrupt_handled(debuggee, later).map_err(failed)?
                }
                GdbStubStateMachine::Disconnected(end) => {
                    return Ok(match end.get_reason() {
                        DisconnectReason::Disconnect => Parting::Detached,
                        DisconnectReason::Kill => Parting::Killed,
                        _ => Parting::Ended,
                    });
                }
            };
        }
        Ok(Parting::Stopped)
    }
}

/// What the debugger begins with; `None` where it is none. For whoever only looks whether the port is open,
/// or speaks another protocol (a web page can have its reader's browser post anything to a port), nothing
/// stands still.
fn first_byte(incoming: &mut Incoming, stop: &AtomicBool) -> Option<u8> {
    let deadline = Instant::now() + ARRIVAL;
    while !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
        match incoming.next(PATIENCE) {
            Next::Byte(byte @ (b'+' | b'$')) => return Some(byte),
            Next::Byte(_) | Next::End => return None,
            Next::NotYet => {}
        }
    }
    None
}

/// Makes the guest stand still.
fn arrive(debuggee: &mut Debuggee, stop: &AtomicBool) -> Result<(), DebugError> {
    let deadline = Instant::now() + ARRIVAL;
    debuggee.interrupt()?;
    while !stop.load(Ordering::Relaxed) {
        if let Some(Why::Interrupted | Why::Stepped | Why::Met(_)) = debuggee.poll(PATIENCE)? {
            break;
        }
        if Instant::now() > deadline {
            return Err(DebugError::NoStop);
        }
    }
    Ok(())
}

fn failed(error: GdbStubError<EventError, io::Error>) -> DebugError {
    if error.is_connection_error() {
        return match error.into_connection_error() {
            Some((error, _)) => DebugError::Connection(error),
            None => DebugError::Protocol("its connection failed".to_owned()),
        };
    }
    let text = error.to_string();
    match error.into_target_error() {
        Some(error) => DebugError::Event(error),
        None => DebugError::Protocol(text),
    }
}
