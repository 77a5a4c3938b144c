//! A tiny VMM of our own: real KVM, with the agent preloaded. It is this test binary once more, told by a variable
//! which guest to run; the test proper is the monitor.
//!
//! Each guest is a few instructions of real-mode or flat 64-bit code with counts that are known beforehand, so that
//! what was told can be compared with what happened.

#![allow(clippy::unwrap_used)]

mod access;
mod ends;
mod execute;
mod filters;
mod inside;
mod interrupts;
mod life;
mod monitors;
mod support;
mod torture;

use std::time::{Duration, Instant};

use support::{Bare, GuestKind, Machine, SLOT, Scene};
use vmsight_arch::{Gpa, Gva};
use vmsight_events::{EventError, Monitor};
use vmsight_hooks::{
    Access, Condition, Delivery, Detail, Exception, Expiry, Hook, HookKind, Overflow, Range, Register,
    StepEnd, Value, Verdict,
};

/// The VMM, when this binary is started as one. First by its name: the harness runs tests in that order, and this
/// one only where the variable is set.
#[test]
fn a_vmm() {
    support::vmm_if_asked();
}

/// The same for the monitor that is to be killed.
#[test]
fn a_monitor() {
    support::monitor_if_asked();
}

fn execute(at: u64) -> Hook {
    Hook::execute(Gva(at))
}
