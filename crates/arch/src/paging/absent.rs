//! Pages that are there although the processor takes their entries for absent.

use super::{Access, FaultReason, PageFault, PagingMode, Translation};
use crate::Gpa;

const PRESENT: u64 = 1 << 0;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
/// The global bit, which means nothing to the processor in an absent entry.
const PROT_NONE: u64 = 1 << 8;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The highest address bit: that of no memory, so that it tells an inverted address from one that is not.
const INVERTED: u64 = 1 << 51;

/// What an operating system means by an entry whose present bit is clear.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Absent {
    /// No page. All that the processor knows.
    #[default]
    NoPage,
    /// Linux in the user half of an address space: a page without any rights (`PROT_NONE`, or waiting to be looked at by NUMA
    /// balancing) stays where it is and keeps its address in an entry that is not present. x86-64 only; no page elsewhere.
    ///
    /// `_PAGE_PROTNONE` marks it, or in a level 2 entry the size bit alone while a large page is being split (`pte_present` and
    /// `pmd_present` in arch/x86/include/asm/pgtable.h); an entry of swap or migration has both clear. Since 4.19 the address is
    /// stored with all its bits inverted (arch/x86/include/asm/pgtable-invert.h); before, as it is.
    Linux,
}

impl Absent {
    /// The page that the absent entry `value` of a table at `level` keeps, `None` where it keeps none.
    pub fn page(self, mode: PagingMode, level: u8, value: u64) -> Option<Gpa> {
        let long = matches!(mode, PagingMode::X86Level4 | PagingMode::X86Level5);
        if self == Self::NoPage || !long || value & PRESENT != 0 {
            return None;
        }
        let large = value & PAGE_SIZE != 0;
        let marked = value & PROT_NONE != 0;
        let there = match level {
            1 => marked,
            2 => large,
            3 => large && marked,
            _ => false,
        };
        let address = if value & INVERTED != 0 { !value } else { value };
        let span = (1u64 << mode.span_shift(level)) - 1;
        there.then_some(Gpa(address & ADDRESS & !span))
    }

    /// The translation that a walk ended short of because the entry is absent. Its rights are none.
    pub fn translation(self, mode: PagingMode, fault: &PageFault) -> Option<Translation> {
        if fault.reason != FaultReason::NotPresent {
            return None;
        }
        let value = fault.entry()?;
        let page = self.page(mode, fault.level, value)?;
        let page_shift = mode.span_shift(fault.level);
        Some(Translation {
            gpa: Gpa(page.0 | (fault.gva.0 & ((1 << page_shift) - 1))),
            page_shift,
            access: no_rights(value),
            steps: fault.steps,
        })
    }
}

/// Nobody may do anything; what was done before is still marked.
pub(super) fn no_rights(value: u64) -> Access {
    Access {
        accessed: value & ACCESSED != 0,
        dirty: value & DIRTY != 0,
        ..Access::default()
    }
}
