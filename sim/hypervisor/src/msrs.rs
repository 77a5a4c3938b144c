//! MSRs that the guest does not have as they are.

use vmsight_arch::registers::msr;
use vmsight_sim_hypervisor::ept::Table;

use crate::{machine, vmcs};

const PEBS_ENABLE: u32 = 0x3f1;
const RTIT_CTL: u32 = 0x570;
const DS_AREA: u32 = 0x600;
/// Of DEBUGCTL: last-branch records and single step on branches. The others store through virtual addresses.
const HARMLESS_DEBUGCTL: u64 = 3;
const VMX: core::ops::RangeInclusive<u32> = 0x480..=0x493;
/// What a guest reads from FEATURE_CONTROL: locked, and no VMX.
const LOCKED: u64 = 1;

/// The bitmap: which reads and writes leave the guest.
pub(crate) fn bitmap(table: &mut Table) {
    for number in VMX {
        set(table, number, Access::Read);
        set(table, number, Access::Write);
    }
    set(table, msr::FEATURE_CONTROL, Access::Read);
    for number in [
        msr::FEATURE_CONTROL,
        msr::APIC_BASE,
        msr::DEBUGCTL,
        PEBS_ENABLE,
        RTIT_CTL,
        DS_AREA,
    ] {
        set(table, number, Access::Write);
    }
}

/// With a policy: how a system call finds the kernel says where the kernel is.
pub(crate) fn watch_entry(table: &mut Table) {
    set(table, msr::LSTAR, Access::Write);
}

/// From the lockdown on, those too by which a system call finds the kernel.
pub(crate) fn lock(table: &mut Table) {
    set(table, msr::LSTAR, Access::Write);
    set(table, msr::EFER, Access::Write);
}

#[derive(Clone, Copy)]
enum Access {
    Read,
    Write,
}

fn set(table: &mut Table, number: u32, access: Access) {
    // Four parts of 1 KiB: reads of low and high numbers, writes of low and high ones.
    let high = usize::from(number >= 0xc000_0000);
    let part = high
        + match access {
            Access::Read => 0,
            Access::Write => 2,
        };
    let bit = (number & 0x1fff) as usize;
    if let Some(word) = table.0.get_mut(part * 128 + bit / 64) {
        *word |= 1 << (bit % 64);
    }
}

/// What a read gives that left the guest; `None`: #GP.
pub(crate) fn read(number: u32) -> Option<u64> {
    (number == msr::FEATURE_CONTROL).then_some(LOCKED)
}

/// Does a write that left the guest; `None`: #GP.
pub(crate) fn write(number: u32, value: u64) -> Option<()> {
    match number {
        msr::DEBUGCTL if value & !HARMLESS_DEBUGCTL == 0 => vmcs::write(vmcs::GUEST_DEBUGCTL, value),
        // Moved onto a page of the monitor, the APIC's registers would hide it.
        msr::APIC_BASE if value == machine::rdmsr(msr::APIC_BASE) => {}
        PEBS_ENABLE | RTIT_CTL | DS_AREA if value == 0 => {}
        msr::LSTAR if value == machine::rdmsr(msr::LSTAR) => {}
        msr::EFER if value == vmcs::read(vmcs::GUEST_EFER) => {}
        _ => return None,
    }
    Some(())
}
