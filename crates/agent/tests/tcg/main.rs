//! The agent as a plugin of stock QEMUs, on a real Debian guest with two processors, held against the guest's
//! own account of what it did. One guest for each QEMU: 7.2, whose interface for plugins gives no registers,
//! and 10.x, whose does.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod guest;
mod life;
mod memory;
mod processor;

use vmsight_hooks::{BackendKind, Feature};
use vmsight_lab::Qemu;

use guest::Watched;

#[test]
fn with_qemu_7() {
    let watched = Watched::boot(Qemu::System);
    let before = watched.state();
    {
        let monitor = watched.monitor();
        assert_eq!(monitor.backend(), BackendKind::AgentTcg);
        let features: Vec<_> = monitor.capabilities().iter().map(|c| c.feature).collect();
        assert!(features.contains(&Feature::PhysicalWrite) && !features.contains(&Feature::MsrWrite));
    }
    processor::execution_is_counted(&watched);
    processor::what_takes_registers_is_refused(&watched);
    memory::each_write_is_told_without_values(&watched);
    life::a_killed_monitor_leaves_no_trace(&watched);
    life::a_monitor_that_is_cut_off_holds_nobody(&watched);
    life::a_full_ring_takes_the_hook_out(&watched);
    life::a_held_vcpu_and_its_verdicts(&watched);
    life::two_monitors_have_each_their_own(&watched);
    life::hooks_come_and_go_under_load(&watched);
    // The stub has registers, which most of what is made of events takes.
    life::backends(&watched, BackendKind::GdbStub);
    assert_eq!(watched.state(), before, "the guest is as it was");
}

#[test]
fn with_qemu_10() {
    let watched = Watched::boot(Qemu::Backports);
    let before = watched.state();
    {
        let monitor = watched.monitor();
        let features: Vec<_> = monitor.capabilities().iter().map(|c| c.feature).collect();
        assert!(features.contains(&Feature::MsrWrite) && features.contains(&Feature::Step));
    }
    processor::system_calls_are_traced(&watched);
    processor::programs_are_hooked_where_they_are(&watched);
    processor::instructions_are_told_with_their_values(&watched);
    processor::exceptions_are_told(&watched);
    processor::steps_are_counted(&watched);
    processor::filters_are_evaluated_at_the_hook(&watched);
    memory::each_write_is_told_with_its_values(&watched);
    memory::reads_and_physical_addresses(&watched);
    life::a_killed_monitor_leaves_no_trace(&watched);
    life::a_monitor_that_is_cut_off_holds_nobody(&watched);
    life::a_full_ring_takes_the_hook_out(&watched);
    life::a_held_vcpu_and_its_verdicts(&watched);
    life::two_monitors_have_each_their_own(&watched);
    life::hooks_come_and_go_under_load(&watched);
    life::backends(&watched, BackendKind::AgentTcg);
    assert_eq!(watched.state(), before, "the guest is as it was");
}

/// The monitor that is killed: a process of its own.
#[test]
fn victim() {
    life::victim();
}
