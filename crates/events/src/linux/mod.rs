//! Named hooks of a Linux guest, built from plain ones: system calls, processes, modules.
//!
//! Where to hook is found in the guest's own memory by symbol and by disassembly; what an event means is read through its
//! own structures. So these work with every backend that can hook execution.

mod control;
mod error;
mod filter;
mod guard;
mod lifecycle;
mod place;
mod site;
mod syscall;
mod whose;

pub use control::{ControlRecord, ControlSite, ControlTrace, control_sites};
pub use error::TraceError;
pub use filter::current_pid;
pub use guard::{Guard, Incident, Judgement, Rule, RuleError};
pub use lifecycle::{Lifecycle, LifecycleRecord, LifecycleTrace};
pub use place::{Inside, calls_of, inside};
pub use site::{SyscallSite, syscall_sites};
pub use syscall::{
    Argument, SyscallCount, SyscallCounter, SyscallCounts, SyscallRecord, SyscallTrace, Value,
};
