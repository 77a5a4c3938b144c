//! A walk taken one entry at a time, by a caller who reads the entries himself: many addresses in lock-step, or
//! through memory that answers in batches.

use super::arm64::Vmsa;
use super::format::{Entry, Format};
use super::walk::{Resolved, with_format};
use super::x86::{Legacy, Long, Pae};
use super::{FaultReason, PagingMode, Steps};
use crate::{Dtb, Gpa, Gva};

/// Where a walk stands: the table and the level whose entry is to be read next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cursor {
    mode: PagingMode,
    gva: Gva,
    table: Gpa,
    level: u8,
    steps: Steps,
}

/// What an entry did to a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// One level down: read the next entry.
    Table,
    /// The page is found.
    Page(Resolved),
    /// The walk ends here.
    Fault(FaultReason),
}

impl Cursor {
    /// Stands before the root's entry for `gva`; `None` where `gva` is not canonical.
    #[inline]
    pub fn new(mode: PagingMode, dtb: Dtb, gva: Gva) -> Option<Self> {
        with_format!(mode, format => {
            format.canonical(gva).then(|| {
                let level = format.levels();
                Self { mode, gva, table: format.root(dtb), level, steps: Steps::of_levels(level) }
            })
        })
    }

    /// The address being translated.
    pub fn gva(&self) -> Gva {
        self.gva
    }

    /// The level whose entry is to be read, 1 for the last.
    #[inline]
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Where the table to be read lies.
    #[inline]
    pub fn table(&self) -> Gpa {
        self.table
    }

    /// The entries read so far.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    /// Where the entry to be read lies. Its size is [`PagingMode::entry_size`].
    #[inline]
    pub fn entry_gpa(&self) -> Gpa {
        with_format!(self.mode, format => format.entry_gpa(self.level, self.table, self.gva.0))
    }

    /// Goes on with the value of the entry at [`Self::entry_gpa`].
    #[inline]
    pub fn feed(&mut self, value: u64) -> Progress {
        self.steps.push(self.entry_gpa(), value);
        with_format!(self.mode, format => match format.decode(self.level, value) {
            Entry::Table(next) if self.level > 1 => {
                self.table = next;
                self.level -= 1;
                Progress::Table
            }
            Entry::Page(page) => {
                let page_shift = format.shift(self.level);
                let gpa = Gpa(page.0 | (self.gva.0 & ((1 << page_shift) - 1)));
                Progress::Page(Resolved { gpa, page_shift })
            }
            Entry::NotPresent => Progress::Fault(FaultReason::NotPresent),
            Entry::Reserved | Entry::Table(_) => Progress::Fault(FaultReason::Reserved),
        })
    }
}

impl PagingMode {
    /// Size of a table entry in bytes: 4 for x86 32-bit paging, else 8.
    #[inline]
    pub const fn entry_size(self) -> u8 {
        if matches!(self, Self::X86_32 { .. }) { 4 } else { 8 }
    }

    /// How many levels of tables a walk passes at most.
    #[inline]
    pub fn levels(self) -> u8 {
        with_format!(self, format => format.levels())
    }

    /// log2 of the bytes that one entry of a table at `level` (1 to [`Self::levels`]) spans: at level 1 that of the
    /// smallest page.
    #[inline]
    pub fn span_shift(self, level: u8) -> u8 {
        with_format!(self, format => format.shift(level.clamp(1, format.levels())))
    }

    /// The page that a last-level entry names, `None` where it is absent or malformed.
    #[inline]
    pub fn last_level_page(self, value: u64) -> Option<Gpa> {
        with_format!(self, format => match format.decode(1, value) {
            Entry::Page(page) => Some(page),
            _ => None,
        })
    }
}
