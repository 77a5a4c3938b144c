//! Page-table walks: from a virtual address and a root to a physical address, or to the reason why not.
//!
//! Every walk is bounded by the number of levels of its mode, whatever the guest wrote into its tables, and
//! [`mappings`] by a number of tables that the caller sets.

mod absent;
mod arm64;
mod cursor;
mod format;
mod mappings;
mod walk;
mod x86;

pub use absent::Absent;
pub use cursor::{Cursor, Progress};
pub use mappings::{Mapping, Mappings, TableLimit, mappings};
pub use walk::{Resolved, resolve, walk};

use core::fmt;

use crate::{Gpa, Gva};

/// Where a walk reads table entries from: guest-physical memory.
pub trait TableMemory {
    /// The little-endian 8-byte entry at `gpa`, `None` where no memory backs it.
    fn entry_u64(&self, gpa: Gpa) -> Option<u64>;
    /// The little-endian 4-byte entry at `gpa` (x86 32-bit paging), `None` where no memory backs it.
    fn entry_u32(&self, gpa: Gpa) -> Option<u32>;

    /// Reads consecutive 8-byte entries from `gpa` on and returns how many came before the first that no memory
    /// backs. Memory for which one long read is cheaper than many short ones does better than this default.
    fn entries_u64(&self, gpa: Gpa, out: &mut [u64]) -> usize {
        let mut at = gpa;
        for (n, slot) in out.iter_mut().enumerate() {
            let Some(value) = self.entry_u64(at) else { return n };
            *slot = value;
            at = at.wrapping_add(8);
        }
        out.len()
    }
}

impl<M: TableMemory + ?Sized> TableMemory for &M {
    #[inline]
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        (**self).entry_u64(gpa)
    }

    #[inline]
    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        (**self).entry_u32(gpa)
    }

    fn entries_u64(&self, gpa: Gpa, out: &mut [u64]) -> usize {
        (**self).entries_u64(gpa, out)
    }
}

/// How virtual addresses are translated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PagingMode {
    /// x86 32-bit paging (SDM vol. 3, 4.3). `pse` says whether 4 MiB pages are on (CR4.PSE); PSE-36 is taken
    /// as given, up to 40 bits of physical address.
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
    /// AArch64 stage 1, one translation table base register (Arm ARM D8.2). The walk accepts addresses of
    /// either half (all bits from `va_bits` up clear, or all set): the caller picks the register for the half.
    Arm64 {
        /// Size of a page.
        granule: Granule,
        /// Bits of virtual address that the walk resolves: 64 − TxSZ, 16 to 52 (17 at least with 64 KiB pages);
        /// values outside are clamped.
        va_bits: u8,
        /// TCR_ELx.DS: 52-bit output addresses in 4 KiB and 16 KiB descriptors (FEAT_LPA2). 64 KiB descriptors
        /// always carry address bits 51:48 in bits 15:12 (FEAT_LPA; zero on older machines).
        lpa2: bool,
    },
}

impl fmt::Display for PagingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::X86_32 { .. } => f.write_str("x86 32-bit"),
            Self::X86Pae => f.write_str("x86 PAE"),
            Self::X86Level4 => f.write_str("x86-64 4-level"),
            Self::X86Level5 => f.write_str("x86-64 5-level"),
            Self::Arm64 { granule, va_bits, .. } => write!(f, "arm64 {granule:?} {va_bits}-bit"),
        }
    }
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
    /// Instructions may be fetched (no level has NX; for arm64, by privileged code: no level has PXN).
    pub execute: bool,
    /// User mode may fetch instructions (x86: `user` and `execute`; arm64: no level has UXN).
    pub user_execute: bool,
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

/// The entries of one walk, root first: at most five.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Steps {
    // Levels count down by one from `top`, so they need not be kept: results stay small.
    entries: [(Gpa, u64); 5],
    top: u8,
    len: u8,
}

impl Steps {
    /// No steps yet of a walk through `top` levels.
    pub(crate) fn of_levels(top: u8) -> Self {
        Self {
            top,
            ..Self::default()
        }
    }

    /// Adds the entry of the next level down; more than five are ignored, no machine has them.
    #[inline]
    pub(crate) fn push(&mut self, entry_gpa: Gpa, value: u64) {
        if let Some(slot) = self.entries.get_mut(usize::from(self.len)) {
            *slot = (entry_gpa, value);
            self.len += 1;
        }
    }

    /// Drops what is deeper than `len` steps.
    pub(crate) fn truncate(&mut self, len: u8) {
        if len < self.len {
            self.len = len;
            // Cleared, so that equal walks compare equal.
            self.entries
                .iter_mut()
                .skip(usize::from(len))
                .for_each(|e| *e = (Gpa(0), 0));
        }
    }

    /// How many entries were read.
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether none was read.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entries read, root first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Step> + ExactSizeIterator + '_ {
        let entries = self.entries.get(..usize::from(self.len)).unwrap_or(&[]);
        entries.iter().enumerate().map(|(i, &(entry_gpa, value))| Step {
            level: self.top.saturating_sub(i as u8),
            entry_gpa,
            value,
        })
    }

    /// The entry read last: the leaf of a translation.
    pub fn last(&self) -> Option<Step> {
        self.iter().next_back()
    }
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
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
    /// Where the entry that failed lies, 0 where no table was read.
    pub entry_gpa: Gpa,
    /// The entries read up to and including the one that failed (not backed: the last is missing).
    pub steps: Steps,
}

impl PageFault {
    /// The value of the entry that failed, `None` where none could be read.
    pub fn entry(&self) -> Option<u64> {
        match self.reason {
            FaultReason::NotPresent | FaultReason::Reserved => self.steps.last().map(|s| s.value),
            FaultReason::NonCanonical | FaultReason::Unbacked => None,
        }
    }

    /// Whether the entry that failed is not present and yet holds something: a page that the guest has put
    /// elsewhere (swap, migration), as against one that never was. To the processor a mapping without access rights
    /// looks the same: [`Absent`] tells it apart.
    pub fn is_paged_out(&self) -> bool {
        self.reason == FaultReason::NotPresent && self.entry().is_some_and(|v| v != 0)
    }
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}: ", self.gva)?;
        match self.reason {
            FaultReason::NonCanonical => f.write_str("not a canonical address"),
            FaultReason::NotPresent => write!(
                f,
                "not present: level {} entry at {:#x} is {:#x}",
                self.level,
                self.entry_gpa,
                self.entry().unwrap_or(0)
            ),
            FaultReason::Reserved => write!(
                f,
                "reserved bits: level {} entry at {:#x} is {:#x}",
                self.level,
                self.entry_gpa,
                self.entry().unwrap_or(0)
            ),
            FaultReason::Unbacked => {
                write!(
                    f,
                    "level {} entry at {:#x} has no memory behind it",
                    self.level, self.entry_gpa
                )
            }
        }
    }
}

impl core::error::Error for PageFault {}

impl Translation {
    /// The physical address of the first byte of the page.
    pub const fn page_gpa(&self) -> Gpa {
        Gpa(self.gpa.0 & !(self.page_size() - 1))
    }

    /// The size of the page in bytes.
    pub const fn page_size(&self) -> u64 {
        1 << (self.page_shift & 63)
    }
}
