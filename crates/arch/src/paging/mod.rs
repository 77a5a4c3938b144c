//! Page-table walks: from a virtual address and a root to a physical address, or to the reason why not.

use crate::{Gpa, Gva};

/// Where a walk reads table entries from: guest-physical memory.
pub trait TableMemory {
    /// The little-endian 8-byte entry at `gpa`, `None` where no memory backs it.
    fn entry_u64(&self, gpa: Gpa) -> Option<u64>;
    /// The little-endian 4-byte entry at `gpa` (x86 32-bit paging), `None` where no memory backs it.
    fn entry_u32(&self, gpa: Gpa) -> Option<u32>;
}

/// How virtual addresses are translated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PagingMode {
    /// x86 32-bit paging (SDM vol. 3, 4.3). `pse` says whether 4 MiB pages are on (CR4.PSE).
    X86_32 {
        /// CR4.PSE
        pse: bool,
    },
    /// x86 PAE paging (SDM vol. 3, 4.4).
    X86Pae,
    /// x86-64 with four levels, 48-bit addresses (SDM vol. 3, 4.5).
    X86Level4,
    /// x86-64 with five levels, 57-bit addresses (SDM vol. 3, 4.5).
    X86Level5,
    /// AArch64 stage 1, one translation table base register (Arm ARM D8.2).
    Arm64 {
        /// Size of a page.
        granule: Granule,
        /// Bits of virtual address that the walk resolves: 64 − TxSZ, 16 to 52.
        va_bits: u8,
    },
}

/// AArch64's page sizes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Granule {
    /// 4 KiB
    K4,
    /// 16 KiB
    K16,
    /// 64 KiB
    K64,
}

/// What the tables allow on a page: the combination of all levels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Access {
    /// Writes are allowed (all levels).
    pub write: bool,
    /// User mode may access (all levels).
    pub user: bool,
    /// Instructions may be fetched (no level has NX/XN; for arm64, privileged execution).
    pub execute: bool,
    /// The leaf's accessed flag.
    pub accessed: bool,
    /// The leaf's dirty flag.
    pub dirty: bool,
    /// The leaf's global flag.
    pub global: bool,
}

/// One table entry that a walk read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Step {
    /// Level of the table, 1 for the last (PTE) up to 5 (PML5E).
    pub level: u8,
    /// Where the entry lies.
    pub entry_gpa: Gpa,
    /// What it held.
    pub value: u64,
}

/// The entries of one walk, root first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Steps {
    steps: [Step; 5],
    len: u8,
}

impl Steps {
    /// Adds a step; more than five are ignored, no machine has them.
    pub(crate) fn push(&mut self, step: Step) {
        if let Some(slot) = self.steps.get_mut(self.len as usize) {
            *slot = step;
            self.len += 1;
        }
    }

    /// The entries read, root first.
    pub fn as_slice(&self) -> &[Step] {
        self.steps.get(..self.len as usize).unwrap_or(&[])
    }
}

/// A successful walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The physical address of the very byte asked for.
    pub gpa: Gpa,
    /// log2 of the page's size in bytes: 12, 21, 30 … .
    pub page_shift: u8,
    /// What the tables allow.
    pub access: Access,
    /// The entries it came from: the evidence.
    pub steps: Steps,
}

/// Why a walk ended without a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultReason {
    /// The address is not canonical for this mode.
    NonCanonical,
    /// The entry's present (valid) bit is clear. Its value is in the fault: it may be a swap entry.
    NotPresent,
    /// The entry sets reserved bits or an impossible size.
    Reserved,
    /// No memory backs the entry.
    Unbacked,
}

/// A failed walk: where and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// The address asked for.
    pub gva: Gva,
    /// Why.
    pub reason: FaultReason,
    /// The level whose entry failed, 0 where no table was read.
    pub level: u8,
    /// The entries read up to and including the one that failed (none backed: the last is missing).
    pub steps: Steps,
}
