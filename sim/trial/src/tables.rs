//! The trial's own page tables, IDT and GDT: all of memory below 4 GiB as it is, and one table in the upper half, where the
//! stub and the gate are and where attacks put what they like.

use core::arch::asm;
use core::ptr::addr_of_mut;

use crate::start::{exception_entries, exception_stacks, nmi_entry, set_cr3, timer_entry};

/// Where the stub's first page is; the gate comes after it.
pub(crate) const STUB: u64 = 0xffff_ffff_8123_0000;
/// The gate's page.
pub(crate) const GATE: u64 = STUB + 0x1000;
const PRESENT: u64 = 3;
const USER: u64 = 4;
const LARGE: u64 = 0x80;

/// A page.
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u64; 512]);

/// Task registers of the two processors.
const TASKS: [u16; 2] = [0x30, 0x40];
/// The IDT's entries name one of these stacks: exceptions, interrupts, NMIs.
const STACKS: u64 = 3;
const NMI: usize = 2;

/// PML4, PDPT, four PDs; PDPT, PD and PT of the upper half; a PT for the monitor's own address.
#[unsafe(export_name = "trial_tables")]
pub(crate) static mut TABLES: [Page; 10] = [const { Page([0; 512]) }; 10];
/// The two pages that become the stub.
pub(crate) static mut STUBS: [Page; 2] = [const { Page([0; 512]) }; 2];
static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];
static mut TSS: [[u32; 26]; 2] = [[0; 26]; 2];
/// One of an attacker's.
static mut FORGED_TSS: [u32; 26] = [0; 26];
#[unsafe(export_name = "trial_gdt")]
static mut GDT: [u64; 10] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
    0,
    0,
    0,
];

#[repr(C, packed)]
struct Register {
    limit: u16,
    base: u64,
}

/// Physical, and in the lower half virtual, address.
pub(crate) fn at<T>(what: *const T) -> u64 {
    what as u64
}

/// Sets everything up and uses it.
pub(crate) fn initialise() {
    // SAFETY: once, at the begin; the values are those of the architecture.
    unsafe {
        let tables = &mut *addr_of_mut!(TABLES);
        let base = at(tables.as_ptr());
        let page = |n: u64| base + n * 4096;
        tables[0].0[0] = page(1) | PRESENT | USER;
        tables[0].0[511] = page(6) | PRESENT;
        tables[6].0[510] = page(7) | PRESENT;
        tables[7].0[9] = page(8) | PRESENT;
        for n in 0..4 {
            tables[1].0[n] = page(2 + n as u64) | PRESENT | USER;
            for m in 0..512 {
                tables[2 + n].0[m] = ((n * 512 + m) as u64) << 21 | PRESENT | USER | LARGE;
            }
        }
        let stubs = at(addr_of_mut!(STUBS));
        tables[8].0[0x30] = stubs | PRESENT;
        tables[8].0[0x31] = (stubs + 4096) | PRESENT;
        set_cr3(base);

        let idt = &mut *addr_of_mut!(IDT);
        let first = at(&raw const exception_entries);
        for vector in 0..32 {
            let gate = &mut idt[vector as usize];
            set_gate(gate, first + vector * 16);
            // On a stack of their own: attacks leave RSP anywhere.
            gate[0] |= 1 << 32;
        }
        set_gate(&mut idt[32], at(&raw const timer_entry));
        set_gate(&mut idt[NMI], at(&raw const nmi_entry));
        idt[32][0] |= 2 << 32;
        idt[NMI][0] |= 3 << 32;

        for (n, tss) in (*addr_of_mut!(TSS)).iter_mut().enumerate() {
            let stack = |number: u64| {
                (at(&raw const exception_stacks) + (n as u64 * STACKS + number) * 0x1000) as u32
            };
            // RSP0, IST1 to IST3.
            tss[1] = stack(1);
            for number in 1..=STACKS {
                tss[7 + 2 * number as usize] = stack(number);
            }
            describe_task(n, at(&raw const *tss));
        }
        load(0);
    }
}

/// Loads what a processor, 0 or 1, uses of what [`initialise`] made.
pub(crate) fn load(processor: usize) {
    load_gdt(None);
    load_idt(own_idt(), 4095);
    // SAFETY: the table has a task state segment there; marked as busy by a processor that was started before, it would not
    // be taken.
    unsafe {
        (*addr_of_mut!(GDT))[TASKS[processor] as usize / 8] &= !(2 << 40);
        asm!("ltr {:x}", in(reg) TASKS[processor]);
    }
}

/// Has a processor's descriptor say that its task state segment is there.
///
/// # Safety
/// Nobody else uses the table meanwhile.
unsafe fn describe_task(processor: usize, tss: u64) {
    // SAFETY: by the caller.
    let gdt = unsafe { &mut *addr_of_mut!(GDT) };
    let index = TASKS[processor] as usize / 8;
    gdt[index] = 103 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    gdt[index + 1] = tss >> 32;
}

/// Loads the first processor's task register with a task state segment at another address, and with the trial's own.
pub(crate) fn load_task(base: Option<u64>) {
    // SAFETY: one processor; the next exception would use the segment, and there is none until the own one is back.
    unsafe {
        describe_task(0, base.unwrap_or(at(addr_of_mut!(TSS))));
        asm!("ltr {:x}", in(reg) TASKS[0]);
    }
}

/// Base of what the task register has, as the table says it, which is marked as in use when it was loaded.
pub(crate) fn task() -> Option<u64> {
    // SAFETY: one processor.
    let gdt = unsafe { addr_of_mut!(GDT).read_volatile() };
    let [low, high, ..] = gdt[TASKS[0] as usize / 8..] else {
        return None;
    };
    let base = low >> 16 & 0xff_ffff | (low >> 56) << 24 | high << 32;
    (low >> 40 & 2 != 0).then_some(base)
}

/// A task state segment of an attacker's: all its stacks begin there.
pub(crate) fn forged_task(stack: u64) -> u64 {
    // SAFETY: one processor.
    let tss = unsafe { &mut *addr_of_mut!(FORGED_TSS) };
    // RSP0 to RSP2, and IST1 to IST7.
    for first in (1..7).step_by(2).chain((9..23).step_by(2)) {
        (tss[first], tss[first + 1]) = (stack as u32, (stack >> 32) as u32);
    }
    at(&raw const *tss)
}

/// Copies the PML4 to physical page 0, so that it is one of the guest's.
pub(crate) fn copy_to_page_zero() {
    // SAFETY: nothing is there once the BIOS has done its work. Rust knows no address 0, so not in Rust.
    unsafe {
        asm!("rep movsq", inout("rcx") 512u64 => _, inout("rsi") at(addr_of_mut!(TABLES)) => _, inout("rdi") 0u64 => _,
            options(nostack));
    }
}

fn set_gate(gate: &mut [u64; 2], to: u64) {
    *gate = [
        to & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (to >> 16 & 0xffff) << 48,
        to >> 32,
    ];
}

/// The IDT that [`initialise`] made.
pub(crate) fn own_idt() -> u64 {
    at(addr_of_mut!(IDT))
}

/// Loads IDTR.
pub(crate) fn load_idt(base: u64, limit: u16) {
    let register = Register { limit, base };
    // SAFETY: where it points to nothing of use, the next exception ends the run.
    unsafe { asm!("lidt [{}]", in(reg) &register, options(nostack)) };
}

/// Loads GDTR with another base, and with the trial's own.
pub(crate) fn load_gdt(base: Option<u64>) {
    let base = base.unwrap_or(at(addr_of_mut!(GDT)));
    let register = Register { limit: 79, base };
    // SAFETY: the next load of a segment would read it; there is none until it is back.
    unsafe { asm!("lgdt [{}]", in(reg) &register, options(nostack)) };
}

/// Base and limit of IDTR.
pub(crate) fn idt() -> (u64, u16) {
    let mut register = Register { limit: 0, base: 0 };
    // SAFETY: stores ten bytes.
    unsafe { asm!("sidt [{}]", in(reg) &mut register, options(nostack)) };
    (register.base, register.limit)
}

/// Puts a physical page at a virtual one of the lower half, whose whole 2 MiB have nothing else from then on.
pub(crate) fn map_low(virtual_page: u64, physical: u64) {
    // SAFETY: nothing of the trial's is there.
    unsafe {
        let tables = &mut *addr_of_mut!(TABLES);
        let table = at(&raw const tables[9]);
        tables[9].0[(virtual_page >> 12 & 511) as usize] = physical | PRESENT;
        tables[2 + (virtual_page >> 30) as usize].0[(virtual_page >> 21 & 511) as usize] = table | PRESENT;
        set_cr3(crate::start::cr3());
    }
}

/// What is at a page of the table in the upper half, 0 to 511, until it is dropped.
pub(crate) struct Mapped {
    index: usize,
    before: u64,
}

/// Puts a physical page at a virtual one of the upper half's table.
pub(crate) fn map(virtual_page: u64, physical: u64) -> Mapped {
    let index = (virtual_page >> 12 & 511) as usize;
    let before = exchange(index, physical | PRESENT);
    Mapped { index, before }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        exchange(self.index, self.before);
    }
}

fn exchange(index: usize, entry: u64) -> u64 {
    // SAFETY: the table is reached nowhere else meanwhile.
    unsafe {
        let slot = &mut (*addr_of_mut!(TABLES))[8].0[index];
        let before = core::ptr::replace(slot, entry);
        asm!("invlpg [{}]", in(reg) STUB & !(511 << 12) | (index as u64) << 12, options(nostack));
        before
    }
}
