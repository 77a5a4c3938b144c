//! Interrupts between processors, by the local APIC (SDM vol. 3, 11.6.1).

use vmsight_arch::registers::msr;

use crate::machine::{outb, rdmsr, wrmsr};

/// An INIT.
pub(crate) const INIT: u32 = 5 << 8 | ASSERT;
/// A startup interrupt; the page's number is added.
pub(crate) const STARTUP: u32 = 6 << 8 | ASSERT;
/// An NMI.
pub(crate) const NMI: u32 = 4 << 8 | ASSERT;
const ASSERT: u32 = 1 << 14;
const PENDING: u32 = 1 << 12;

const X2APIC: u64 = 1 << 10;
const X2APIC_COMMAND: u32 = 0x830;
const COMMAND: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const IDENTITY: u64 = 0x20;
const ADDRESS: u64 = 0xffff_f000;

fn base() -> Option<u64> {
    let base = rdmsr(msr::APIC_BASE);
    (base & X2APIC == 0).then_some(base & ADDRESS)
}

/// The number of the processor that asks.
pub(crate) fn own_number() -> u32 {
    match base() {
        // SAFETY: a register of the APIC, which is identity-mapped.
        Some(base) => unsafe { ((base + IDENTITY) as *const u32).read_volatile() >> 24 },
        None => core::arch::x86_64::__cpuid(0xb).edx,
    }
}

/// Sends an interrupt to the processor of this number.
pub(crate) fn send(to: u32, command: u32) {
    let Some(base) = base() else {
        // SAFETY: an interrupt to another processor, which is what is wanted.
        unsafe { wrmsr(X2APIC_COMMAND, u64::from(to) << 32 | u64::from(command)) };
        return;
    };
    let (low, high) = ((base + COMMAND) as *mut u32, (base + COMMAND_HIGH) as *mut u32);
    // SAFETY: registers of the APIC. The guest may have been about to send something itself: it finds its own half again.
    unsafe {
        let theirs = high.read_volatile();
        while low.read_volatile() & PENDING != 0 {}
        high.write_volatile(to << 24);
        low.write_volatile(command);
        while low.read_volatile() & PENDING != 0 {}
        high.write_volatile(theirs);
    }
}

/// Waits for about so many microseconds.
pub(crate) fn wait(microseconds: u32) {
    for _ in 0..microseconds {
        // SAFETY: the port of the firmware's progress codes, a write to which takes a microsecond.
        unsafe { outb(0x80, 0) };
    }
}
