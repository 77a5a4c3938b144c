//! Memory of ours in the guest: where the code lies that judges, and what it counts.
//!
//! What was written there once stays as it is until the machine is reset, and no place is given to other code: a
//! thread of the guest that was interrupted in it may go on there at any time later.

use std::collections::HashMap;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use vmsight_arch::paging::{PagingMode, Step, walk};
use vmsight_arch::registers::control::EFER_NXE;
use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{Program, Scope};

use super::{Displaced, Request, assemble};
use crate::agent::Agent;
use crate::guest::{Guest, UPPER_HALF};
use crate::kvm;
use crate::slots::{PAGE, Slot};
use crate::step::BREAKPOINT;

/// Where it lies for the guest. Between the local APIC's page and what KVM needs for itself on old processors no PC has
/// anything: QEMU's machines end their PCI window below 0xfec00000 (`hw/pci-host/{i440fx,q35}.c`), and KVM's own pages begin at
/// 0xfeffc000 (`target/i386/kvm/kvm.c`).
const GPA: u64 = 0xfef0_0000;
/// All of it.
const SIZE: u64 = 64 * PAGE;
/// The first page holds counters …
const COUNTERS: u64 = PAGE;
/// … the second the table of its pages. The guest's processors write to both: reading an entry counts as a write where the nested tables keep
/// account of what is accessed (SDM vol. 3C 29.3.3.2), and from a read-only slot KVM would emulate each instruction behind it …
const TABLE: u64 = PAGE;
/// … and the rest code, which they cannot write.
const CODE: u64 = 2 * PAGE;
/// What an entry of a table above the last spans.
const SPAN: u64 = 1 << 21;

/// Bits of an entry (SDM vol. 3A 4.5.4). Accessed and dirty are set: nobody has to.
mod entry {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    /// Reserved where EFER.NXE is not set.
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
}

/// What a piece of code is made of: the same gives the same.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Key {
    at: u64,
    displaced: Displaced,
    scope: Scope,
    program: Option<Vec<u8>>,
}

/// A piece of code in its place. All are virtual addresses of the guest but the counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Placed {
    pub(crate) entry: u64,
    pub(crate) trap: u64,
    pub(crate) resume: u64,
    pub(crate) counter: usize,
}

/// The memory. It is the guest's as long as the process lives.
#[derive(Debug)]
pub(crate) struct Window {
    memory: NonNull<u8>,
    ids: [u32; 2],
    /// The guest's virtual address, where it is mapped.
    at: Option<u64>,
    /// Bytes in use.
    used: u64,
    made: HashMap<Key, Placed>,
}

// SAFETY: the memory is shared with the guest and is accessed through atomics only.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Makes it, and gives it to the guest as the slots `ids`.
    pub(crate) fn new(agent: &Agent, ids: [u32; 2]) -> io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { libc::mmap(ptr::null_mut(), SIZE as usize, protection, flags, -1, 0) };
        let memory = match NonNull::new(memory.cast::<u8>()) {
            Some(memory) if memory.as_ptr().cast() != libc::MAP_FAILED => memory,
            _ => return Err(io::Error::last_os_error()),
        };
        let window = Self {
            memory,
            ids,
            at: None,
            used: CODE,
            made: HashMap::new(),
        };
        let set = |slot: &Slot, size: u64| {
            kvm::set_memory(
                agent.vm,
                &kvm_userspace_memory_region {
                    slot: slot.id,
                    flags: slot.flags,
                    guest_phys_addr: slot.gpa,
                    memory_size: size,
                    userspace_addr: slot.hva,
                },
            )
        };
        let [data, code] = window.slots();
        let given = set(&data, data.size).and_then(|()| {
            let second = set(&code, code.size);
            second.inspect_err(|_| drop(set(&data, 0)))
        });
        if let Err(error) = given {
            // SAFETY: made above, and nobody has it.
            unsafe { libc::munmap(memory.as_ptr().cast(), SIZE as usize) };
            return Err(error);
        }
        Ok(window)
    }

    /// Its slots: counters and the table, and code.
    pub(crate) fn slots(&self) -> [Slot; 2] {
        let slot = |id, flags, from: u64, to: u64| Slot {
            id,
            flags,
            gpa: GPA + from,
            size: to - from,
            hva: self.memory.as_ptr().expose_provenance() as u64 + from,
            foreign: false,
        };
        let [first, second] = self.ids;
        [
            slot(first, 0, 0, CODE),
            slot(second, KVM_MEM_READONLY, CODE, SIZE),
        ]
    }

    /// The numbers of its slots.
    pub(crate) const fn ids(&self) -> [u32; 2] {
        self.ids
    }

    /// Where its code begins and ends for the guest; `None` where it is not mapped.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        self.at.map(|at| (at.wrapping_add(CODE), at.wrapping_add(SIZE)))
    }

    /// The machine was reset: nobody is in it, and it is mapped nowhere.
    pub(crate) fn forget(&mut self) {
        self.at = None;
        self.used = CODE;
        self.made.clear();
    }

    /// A reset while there was no hook was not seen: then the tables that it was mapped by are others.
    fn forget_if_gone(&mut self, guest: &Guest<'_>, roots: &[(Registers, u64)], is_used: bool) {
        let Some((at, (r, root))) = self.at.zip(roots.first()).filter(|_| !is_used) else {
            return;
        };
        let code = at.wrapping_add(CODE);
        if guest.translate_by(r, *root, code) != Some(GPA + CODE) {
            self.forget();
        }
    }

    /// Maps it at `at`, where the guest's tables must have nothing, by one entry that all these roots share. `is_used` says whether jumps
    /// lead to it now.
    pub(crate) fn map(
        &mut self,
        guest: &Guest<'_>,
        roots: &[(Registers, u64)],
        at: u64,
        is_used: bool,
    ) -> Result<(), String> {
        if !at.is_multiple_of(SPAN) {
            return Err(format!("{at:#x} is no multiple of 2 MiB"));
        }
        self.forget_if_gone(guest, roots, is_used);
        if self.at.is_some_and(|there| there != at) {
            return Err("filters inside have another place already".to_owned());
        }
        let mut places = roots.iter().map(|(r, root)| entry_above(guest, r, *root, at));
        let above = places.next().ok_or("no vCPU has the instruction mapped")??;
        for other in places {
            if other?.entry_gpa != above.entry_gpa {
                return Err(format!("the vCPUs do not share the table that maps {at:#x}"));
            }
        }
        let user = if at >= UPPER_HALF { 0 } else { entry::USER };
        let common = entry::PRESENT | entry::ACCESSED | user;
        let own = (GPA + TABLE) | common | entry::WRITABLE;
        if above.value == own {
            return Ok(());
        }
        if above.value != 0 {
            return Err(format!("the guest has something at {at:#x}"));
        }
        let no_execute = match roots.iter().all(|(r, _)| r.efer & EFER_NXE != 0) {
            true => entry::NO_EXECUTE,
            false => 0,
        };
        for page in 0..SIZE / PAGE {
            let value = match page * PAGE {
                // What can be written there is not to be executed.
                0 => GPA | common | entry::WRITABLE | entry::DIRTY | no_execute,
                TABLE => 0,
                offset => (GPA + offset) | common,
            };
            self.word(TABLE + 8 * page).store(value, Ordering::Relaxed);
        }
        let place = above.entry_gpa.0;
        if !guest.write(place, 8, own) {
            return Err("its page tables cannot be written".to_owned());
        }
        // By a walk as the guest's processors make it.
        let code = at.wrapping_add(CODE);
        let led = |(r, root): &(Registers, u64)| guest.translate_by(r, *root, code) == Some(GPA + CODE);
        if !roots.iter().all(led) {
            guest.write(place, 8, 0);
            return Err(format!(
                "the guest's tables do not lead to what was mapped at {at:#x}"
            ));
        }
        self.at = Some(at);
        Ok(())
    }

    /// The code for a filter; that which is there already, where there is.
    pub(crate) fn place(
        &mut self,
        at: u64,
        displaced: Displaced,
        scope: Scope,
        program: Option<&Program>,
    ) -> Result<Placed, String> {
        let key = Key {
            at,
            displaced,
            scope,
            program: program.map(Program::to_bytes),
        };
        if let Some(placed) = self.made.get(&key) {
            return Ok(*placed);
        }
        let base = self.at.ok_or("there is no room inside")?;
        let counter = self.made.len();
        let full = || "there is no more room for filters inside until the machine is reset".to_owned();
        if counter as u64 >= COUNTERS / 8 {
            return Err(full());
        }
        let entry = base.wrapping_add(self.used);
        let request = Request {
            at,
            displaced,
            scope,
            program,
            counter: base.wrapping_add(8 * counter as u64),
        };
        let code = assemble(&request, entry)?;
        let end = self.used + code.bytes.len() as u64;
        if end > SIZE {
            return Err(full());
        }
        for (offset, byte) in (self.used..).zip(&code.bytes) {
            self.byte(offset).store(*byte, Ordering::Relaxed);
        }
        let placed = Placed {
            entry,
            trap: entry.wrapping_add(code.trap),
            resume: entry.wrapping_add(code.resume),
            counter,
        };
        self.used = end.next_multiple_of(16);
        self.made.insert(key, placed);
        // Until it is armed.
        self.set_trap(&placed, false);
        Ok(placed)
    }

    /// Has a piece of code stop, or not, at what its filter lets through.
    pub(crate) fn set_trap(&self, placed: &Placed, on: bool) {
        const NOP: u64 = 0x90;
        if let Some(at) = self.at {
            let offset = placed.trap.wrapping_sub(at);
            let byte = if on { BREAKPOINT } else { NOP };
            self.byte(offset).store(byte as u8, Ordering::Release);
        }
    }

    /// Where a counter is. The guest may write anything there.
    pub(crate) fn counter(&self, placed: &Placed) -> &'static AtomicU64 {
        let word = self.word(8 * placed.counter as u64 % COUNTERS);
        // SAFETY: the memory is never unmapped.
        unsafe { &*ptr::from_ref(word) }
    }

    fn byte(&self, offset: u64) -> &AtomicU8 {
        let offset = (offset % SIZE) as usize;
        // SAFETY: inside the mapping, which is never unmapped.
        unsafe { AtomicU8::from_ptr(self.memory.as_ptr().add(offset)) }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let offset = ((offset % SIZE) & !7) as usize;
        // SAFETY: as above, and aligned: the mapping begins at a page.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(offset).cast()) }
    }
}

/// The entry that spans 2 MiB at `at`, in tables that are there.
fn entry_above(guest: &Guest<'_>, registers: &Registers, cr3: u64, at: u64) -> Result<Step, String> {
    /// The level above the last.
    const LEVEL: u8 = 2;
    let mode = PagingMode::from_registers(registers)
        .filter(|mode| matches!(mode, PagingMode::X86Level4 | PagingMode::X86Level5))
        .ok_or("filters inside need a guest in 64-bit mode")?;
    let steps = match walk(mode, guest, mode.dtb(cr3), Gva(at)) {
        Ok(found) => found.steps,
        Err(fault) => fault.steps,
    };
    let above = steps.iter().find(|step| step.level == LEVEL);
    above.ok_or_else(|| format!("the guest's tables do not lead to 2 MiB at {at:#x}"))
}

#[cfg(test)]
mod tests {
    use vmsight_arch::registers::control::{CR0_PG, CR4_LA57, CR4_PAE, EFER_LMA, EFER_LME};

    use super::*;

    /// Tables of one page each, from the root down, with a single entry each, at the index that the address has.
    fn tables(levels: u32, at: u64) -> Vec<u64> {
        let mut words = vec![0; 512 * levels as usize];
        for (n, level) in (2..=levels).rev().enumerate() {
            let index = (at >> (12 + 9 * (level - 1))) as usize & 511;
            if level > 2 {
                let next = PAGE * (n as u64 + 1);
                words[512 * n + index] = next | entry::PRESENT | entry::WRITABLE;
            }
        }
        words
    }

    #[test]
    fn the_entry_is_that_of_the_address() {
        for (levels, at) in [
            (4, 0xffff_ffff_9200_0000),
            (4, 0xffff_8123_4560_0000),
            (4, 0x1000_0000),
            (5, 0xff12_3456_7840_0000),
        ] {
            let words = tables(levels, at);
            let slots = [Slot {
                id: 0,
                flags: 0,
                gpa: 0,
                size: 8 * words.len() as u64,
                hva: words.as_ptr() as u64,
                foreign: false,
            }];
            let guest = Guest::new(&slots);
            let registers = Registers {
                cr0: CR0_PG,
                cr4: CR4_PAE | if levels == 5 { CR4_LA57 } else { 0 },
                efer: EFER_LMA | EFER_LME,
                ..Registers::default()
            };
            let last = PAGE * u64::from(levels - 2);
            let index = at >> 21 & 511;
            let above = entry_above(&guest, &registers, 0, at).map(|step| step.entry_gpa.0);
            assert_eq!(above, Ok(last + 8 * index), "{at:#x}");
            // Its neighbours of 1 GiB are not mapped at all.
            for other in [at.wrapping_add(1 << 30), at.wrapping_sub(1 << 30)] {
                assert!(entry_above(&guest, &registers, 0, other).is_err(), "{other:#x}");
            }
            assert!(entry_above(&guest, &Registers::default(), 0, at).is_err());
        }
    }
}
