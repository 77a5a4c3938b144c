//! What stays as it is: for user mode, for who writes control registers and MSRs, for who calls the hypervisor.

use super::*;

const VMCALL: u64 = 18;

/// From user mode.
pub(super) fn privileges(trial: &mut Trial) {
    let vmfunc = at(&raw const user_vmfunc);
    trial.attack(
        "VMFUNC from code of 32 bits",
        TRIPLE_FAULT,
        INVALID_OPCODE,
        0,
        compat_vmfunc,
        0,
    );
    trial.attack(
        "VMFUNC from user mode",
        TRIPLE_FAULT,
        INVALID_OPCODE,
        0,
        user,
        vmfunc,
    );
    trial.attack(
        "VMCALL from user mode",
        VMCALL,
        INVALID_OPCODE,
        0,
        user,
        at(&raw const user_vmcall),
    );
}

/// Bits and registers that stay as they are.
pub(super) fn pinned(trial: &mut Trial) {
    for (name, bit) in [("CR0.PE", 0), ("CR0.WP", 16), ("CR0.PG", 31)] {
        trial.attack(name, CONTROL_REGISTER, PROTECTION, 0, set_cr0, cr0() ^ 1 << bit);
    }
    for (name, bit) in [
        ("CR4.PAE", 5),
        ("CR4.LA57", 12),
        ("CR4.VMXE", 13),
        ("CR4.SMEP", 20),
        ("CR4.SMAP", 21),
        ("CR4.CET", 23),
        ("CR4.PKS", 24),
    ] {
        trial.attack(name, CONTROL_REGISTER, PROTECTION, 0, set_cr4, cr4() ^ 1 << bit);
    }
    const EFER: u32 = 0xc000_0080;
    const LSTAR: u32 = 0xc000_0082;
    const APIC_BASE: u32 = 0x1b;
    for (name, number, value) in [
        ("EFER.NXE", EFER, rdmsr(EFER) ^ 1 << 11),
        ("EFER.LME", EFER, rdmsr(EFER) ^ 1 << 8),
        ("LSTAR", LSTAR, 0x1234_5000),
        ("DEBUGCTL: branch trace store", 0x1d9, 0xc0),
        ("DS_AREA", 0x600, MONITOR + 0x1000),
        (
            "APIC over the monitor",
            APIC_BASE,
            monitor_page(Part::Fixed) | rdmsr(APIC_BASE) & 0xfff,
        ),
        ("FEATURE_CONTROL", 0x3a, 5),
    ] {
        let pair = (number, value);
        trial.attack(name, WRMSR, PROTECTION, 0, write_msr, at(&raw const pair));
    }
    trial.attack("VMX capabilities", RDMSR, PROTECTION, 0, read_msr, 0x480);
}

/// What is answered after the lockdown by the calls that change nothing, of which those that say what is so go on.
fn answers(trial: &mut Trial) {
    use Status::{Argument, Done, Unknown};
    let answers = [
        (Call::Version, 0, 0, Done),
        (Call::Exits, EPT_VIOLATION, 0, Done),
        (Call::Exits, 1 << 40, 0, Argument),
        (Call::Handled, 0, 0, Done),
        (Call::Ended, 0, 0, Done),
        (Call::MonitorHash, 3, 0, Done),
        (Call::MonitorHash, 4, 0, Argument),
        (Call::MonitorPage, 0, Part::Data as u64, Done),
        (Call::MonitorPage, 1 << 40, Part::Data as u64, Argument),
        (Call::MonitorPage, 0, 4, Argument),
        // No registered hook's.
        (Call::Invoke, STUB, 0, Argument),
        // The monitor's own.
        (Call::Drain, 0, 0, Unknown),
    ];
    let before = handled();
    let right = answers
        .iter()
        .filter(|(call, first, second, status)| {
            vmcall_with(*call as u64, *first, *second).0 == *status as u64
        })
        .count();
    trial.check(
        "calls that change nothing, after the lockdown",
        right == answers.len() && handled() == before,
        format_args!("{right} of {} answered as they must be", answers.len()),
    );
    trial.attack(
        "a report for user mode, after the lockdown",
        VMCALL,
        INVALID_OPCODE,
        0,
        user,
        at(&raw const user_report),
    );
}

/// Calls of the hypervisor after the lockdown.
pub(super) fn calls(trial: &mut Trial) {
    let before = handled();
    let changes = [
        Call::LoadMonitor,
        Call::RegisterHook,
        Call::Protect,
        Call::Lockdown,
    ];
    let locked = changes
        .iter()
        .filter(|&&c| vmcall(c as u64, STUB) == (Status::Locked as u64, 0))
        .count();
    answers(trial);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for turn in 0..2000 {
        let number = if turn % 2 == 0 {
            Call::Version as u64 + next() % 16
        } else {
            next()
        };
        // A report is long, and an invocation of the hook is what it says.
        if number != Call::Report as u64 && number != Call::Invoke as u64 {
            vmcall(number, next() >> (next() % 64));
        }
    }
    let good = locked == changes.len() && handled() == before;
    trial.check(
        "calls after the lockdown",
        good,
        format_args!("{locked} of {} refused", changes.len()),
    );
}
