//! A client for QEMU's gdb stub, where that is the only way to a VM.
//!
//! **QEMU pauses the VM when a client connects and does not let it go on when the client vanishes.** So: a stub that
//! serves somebody else is not connected to at all (the connection would wait in a queue and pause the VM when it
//! is taken from there, long after we are gone); every connection has a guard process that sends
//! the detach packet if we die; and a VM that was not running before is left without detaching, which would start
//! it.
//!
//! [`Debugger`] is the connection for hooks, where the machine runs most of the time.
//!
//! The protocol is that of the gdb manual, appendix E; QEMU's own packets are `qqemu.…` (gdbstub.c).

mod busy;
mod connect;
mod connection;
mod debugger;
mod error;
mod features;
mod link;
mod memory;
mod open;
mod packet;
mod questions;
mod stop;
mod waker;

pub use debugger::{Accelerator, Debugger, Point, Stop, Waited};
pub use error::GdbError;
pub use stop::{Cause, WatchKind};
pub use waker::Waker;

pub(crate) use busy::refuse_if_busy;
pub(crate) use connection::Gdb;
pub(crate) use memory::StubMemory;
