//! Interrupts between processors, by the local APIC (SDM vol. 3, 11.6.1).
//!
//! While a processor waits for its SIPI, an INIT does nothing to it. Bochs 2.7 keeps one that comes then, and has the
//! processor leave for it for ever after. So for as long, stores to the APIC leave to the hypervisor, which does them all
//! but for such an INIT. From the lockdown on, or when no processor waits any more, the APIC is the guest's alone.

use core::sync::atomic::Ordering;

use vmsight_arch::paging::{self, PagingMode, TableMemory};
use vmsight_arch::registers::msr;
use vmsight_arch::{Dtb, Gva};
use vmsight_sim_hypervisor::PAGE;
use vmsight_sim_hypervisor::ept::{MemoryType, Permissions};
use vmsight_sim_hypervisor::store::{self, Source};

use crate::boot::Registers;
use crate::exits::Outcome;
use crate::guest::{GuestTables, Hypervisor};
use crate::machine::{outb, rdmsr, wrmsr};
use crate::processor::Processor;
use crate::{exits, vmcs};

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
const DELIVERY: u32 = 7 << 8;
const SHORTHAND: u32 = 3 << 18;
const OTHERS: u32 = 3 << 18;
const LOGICAL: u32 = 1 << 11;
const IDENTITY: u64 = 0x20;
const ADDRESS: u64 = 0xffff_f000;

/// Bytes of an instruction, at most.
const INSTRUCTION: usize = 15;
/// In the access rights of CS: code of 64 bits.
const CODE_64: u64 = 1 << 13;

/// Where the APIC's registers are; `None` where they are MSRs.
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

impl Hypervisor {
    /// Has stores to the APIC leave as long as a processor waits for its SIPI, and no longer.
    pub(crate) fn watch_apic(&mut self, processor: &Processor) {
        let waits = Processor::all().any(|p| p.waiting.load(Ordering::SeqCst));
        self.set_apic(processor, waits && !self.locked);
    }

    fn set_apic(&mut self, processor: &Processor, watched: bool) {
        let Some(page) = base().filter(|_| watched != self.apic_watched) else {
            return;
        };
        let permissions = if watched {
            Permissions::READ
        } else {
            Permissions::ALL
        };
        self.alone(processor, |hypervisor| {
            let (guest, pool) = (hypervisor.guest, &mut hypervisor.pool);
            // Where there is no page left for the table, all stays as it is.
            if guest
                .map(pool, page, page, permissions, MemoryType::Uncacheable)
                .is_ok()
            {
                hypervisor.apic_watched = watched;
            }
        });
    }

    /// Whether the guest left for a store to the APIC that is the hypervisor's to do.
    pub(crate) fn is_apic_store(&self, gpa: u64) -> bool {
        self.apic_watched && base() == Some(gpa & !(PAGE - 1))
    }

    /// Does it.
    pub(crate) fn apic_store(&mut self, registers: &Registers, processor: &Processor, gpa: u64) -> Outcome {
        let Some((value, length)) = stored(registers) else {
            // One that cannot be read: the APIC is the guest's from here on.
            self.set_apic(processor, false);
            return Outcome::Again;
        };
        if gpa & (PAGE - 1) != COMMAND || !reaches_who_waits(value) {
            // SAFETY: a register of the APIC, which is identity-mapped, and what the guest stores there.
            unsafe { (gpa as *mut u32).write_volatile(value) };
        }
        Outcome::Past(length)
    }
}

/// Whether a command is an INIT to none but processors that wait for a SIPI.
fn reaches_who_waits(command: u32) -> bool {
    if command & (DELIVERY | LOGICAL) != INIT & DELIVERY {
        return false;
    }
    let own = own_number();
    let to = match base() {
        // SAFETY: a register of the APIC, which is identity-mapped.
        Some(base) => unsafe { ((base + COMMAND_HIGH) as *const u32).read_volatile() >> 24 },
        None => return false,
    };
    let meant = |p: &&Processor| {
        let number = p.apic.load(Ordering::Relaxed);
        match command & SHORTHAND {
            0 => number == to,
            OTHERS => number != own,
            _ => true,
        }
    };
    Processor::all()
        .filter(meant)
        .all(|p| p.waiting.load(Ordering::SeqCst))
}

/// What the guest's instruction stores, and how long it is.
fn stored(registers: &Registers) -> Option<(u32, u64)> {
    if !exits::long_mode() || vmcs::read(vmcs::GUEST_CS_ACCESS) & CODE_64 == 0 {
        return None;
    }
    let (rip, cr3) = (vmcs::read(vmcs::GUEST_RIP), Dtb(vmcs::read(vmcs::GUEST_CR3)));
    let mut bytes = [0u8; INSTRUCTION.next_multiple_of(8) + 8];
    for (word, address) in bytes.chunks_exact_mut(8).zip((rip & !7..).step_by(8)) {
        let found = paging::walk(PagingMode::X86Level4, &GuestTables, cr3, Gva(address));
        // What comes after the instruction may be nothing.
        let value = found.ok().and_then(|found| GuestTables.entry_u64(found.gpa));
        word.copy_from_slice(&value.unwrap_or(0).to_le_bytes());
    }
    let store = store::decode(bytes.get((rip & 7) as usize..)?)?;
    let value = match store.source {
        Source::Register(4) => vmcs::read(vmcs::GUEST_RSP) as u32,
        Source::Register(number) => registers.get(number)? as u32,
        Source::Value(value) => value,
    };
    Some((value, store.length))
}
