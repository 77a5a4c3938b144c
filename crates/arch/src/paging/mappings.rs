//! Every page of a range, holes skipped at the level where they begin.

use core::ops::RangeInclusive;

use super::absent::{Absent, no_rights};
use super::arm64::Vmsa;
use super::format::{Entry, Format};
use super::walk::with_format;
use super::x86::{Legacy, Long, Pae};
use super::{Access, PagingMode, Steps, TableMemory, Translation};
use crate::{Dtb, Gpa, Gva};

/// One page of an address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Its first byte. May lie before the range asked for, where the range begins inside the page.
    pub gva: Gva,
    /// Where `gva` leads.
    pub translation: Translation,
}

/// [`mappings`] stopped early: it had visited as many tables as it was allowed to. The last item, if any.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("listing of pages stopped at {at:#x}: {tables} page tables visited, the limit")]
pub struct TableLimit {
    /// Everything before this address has been listed, nothing from here on.
    pub at: Gva,
    /// How many tables were visited.
    pub tables: u64,
}

/// Entries read ahead of each table: few enough to lie on the stack for all levels, enough that memory which costs
/// a system call a read is asked seldom.
const AHEAD: u32 = 64;

/// A table being listed.
#[derive(Clone, Copy)]
struct Frame {
    table: Gpa,
    /// The address of its first entry, in the bits that the tables resolve.
    base: u64,
    /// The entry to look at next.
    next: u32,
    access: Access,
    /// Entries `first .. first + read` of the table.
    ahead: [u64; AHEAD as usize],
    first: u32,
    read: u32,
}

impl Frame {
    const EMPTY: Self = Self {
        table: Gpa(0),
        base: 0,
        next: 0,
        access: Access {
            write: false,
            user: false,
            execute: false,
            user_execute: false,
            accessed: false,
            dirty: false,
            global: false,
        },
        ahead: [0; AHEAD as usize],
        first: 0,
        read: 0,
    };

    /// Starts over with another table; what was read ahead of the last one is forgotten.
    fn begin(&mut self, table: Gpa, base: u64, next: u32, access: Access) {
        (
            self.table,
            self.base,
            self.next,
            self.access,
            self.first,
            self.read,
        ) = (table, base, next, access, 0, 0);
    }

    /// The value of entry `index`, `None` where no memory backs it. `bits` is log2 of the table's entries.
    fn entry<F: Format, M: TableMemory + ?Sized>(
        &mut self,
        format: F,
        memory: &M,
        index: u32,
        bits: u8,
    ) -> Option<u64> {
        if index.wrapping_sub(self.first) >= self.read {
            let want = AHEAD.min((1u32 << bits) - index) as usize;
            self.first = index;
            self.read = format.read_run(memory, self.gpa(format, index), self.ahead.get_mut(..want)?) as u32;
        }
        let at = index.wrapping_sub(self.first);
        if at < self.read {
            self.ahead.get(at as usize).copied()
        } else {
            None
        }
    }

    fn gpa<F: Format>(&self, format: F, index: u32) -> Gpa {
        Gpa(self
            .table
            .0
            .wrapping_add(u64::from(index) << format.entry_shift()))
    }
}

/// The pages of a range of addresses, in address order. See [`mappings`].
pub struct Mappings<'m, M: TableMemory + ?Sized> {
    mode: PagingMode,
    memory: &'m M,
    start: u64,
    end: u64,
    frames: [Frame; 5],
    /// Tables in `frames`; the last is the current one. None: finished.
    depth: u8,
    steps: Steps,
    tables: u64,
    max_tables: u64,
    broken: u64,
    absent: Absent,
}

/// Lists the pages that `range` touches, in address order, at a cost proportional to the tables that are there.
///
/// A guest can make one table serve at every level and so list 2^27 pages and more out of one page of memory:
/// `max_tables` bounds the tables visited (each time counts, also of the same table). When it is reached, a
/// last item says so. A process of Linux has about one table per 2 MiB in use; 2^20 tables are 2 TiB.
///
/// AArch64: a root serves one half of the addresses, that in which the range begins.
pub fn mappings<M: TableMemory + ?Sized>(
    mode: PagingMode,
    memory: &M,
    dtb: Dtb,
    range: RangeInclusive<Gva>,
    max_tables: u64,
) -> Mappings<'_, M> {
    let (start, end) = (range.start().0, range.end().0);
    let mut m = Mappings {
        mode,
        memory,
        start,
        end,
        frames: [Frame::EMPTY; 5],
        depth: 0,
        steps: Steps::default(),
        tables: 0,
        max_tables,
        broken: 0,
        absent: Absent::NoPage,
    };
    with_format!(mode, format => {
        if let Some((start, end)) = format.clip(start, end) {
            m.start = start;
            m.end = end;
            m.depth = 1;
            m.tables = 1;
            m.steps = Steps::of_levels(format.levels());
            let top = format.levels();
            let next = (start >> format.shift(top)) & ((1 << format.index_bits(top)) - 1);
            m.frames[0].begin(format.root(dtb), 0, next as u32, format.start());
        }
    });
    m
}

impl<M: TableMemory + ?Sized> Mappings<'_, M> {
    /// Lists the pages too that absent entries keep, by what `absent` says of them.
    #[must_use]
    pub fn with_absent(self, absent: Absent) -> Self {
        Self { absent, ..self }
    }

    /// Entries met so far that are present and yet lead nowhere: reserved bits, or no memory behind them.
    pub fn broken(&self) -> u64 {
        self.broken
    }

    /// Tables visited so far.
    pub fn tables(&self) -> u64 {
        self.tables
    }

    fn step<F: Format>(&mut self, format: F) -> Option<Result<Mapping, TableLimit>> {
        while self.depth > 0 {
            let top = usize::from(self.depth) - 1;
            let level = format.levels().checked_sub(self.depth - 1)?;
            let frame = self.frames.get_mut(top)?;
            let index = frame.next;
            if index >> format.index_bits(level) != 0 {
                self.depth -= 1;
                continue;
            }
            frame.next += 1;
            let shift = format.shift(level);
            let bits = frame.base | (u64::from(index) << shift);
            let gva = format.extend(bits, self.start);
            if gva > self.end {
                self.depth = 0;
                return None;
            }
            let (above, entry_gpa) = (frame.access, frame.gpa(format, index));
            let Some(value) = frame.entry(format, self.memory, index, format.index_bits(level)) else {
                // Tables lie within a page: what is not backed here is not backed for the rest of the table.
                self.broken += 1;
                self.depth -= 1;
                continue;
            };
            let mut entry = format.decode(level, value);
            let mut absent = false;
            if entry == Entry::NotPresent
                && value != 0
                && let Some(page) = self.absent.page(self.mode, level, value)
            {
                entry = Entry::Page(page);
                absent = true;
            }
            if let Entry::Table(_) | Entry::Page(_) = entry {
                self.steps.truncate(self.depth - 1);
                self.steps.push(entry_gpa, value);
            }
            match entry {
                Entry::NotPresent => {}
                Entry::Table(next) if level > 1 => {
                    if self.tables >= self.max_tables {
                        self.depth = 0;
                        return Some(Err(TableLimit {
                            at: Gva(gva.max(self.start)),
                            tables: self.tables,
                        }));
                    }
                    self.tables += 1;
                    let below = level - 1;
                    // Where the range begins inside this entry, so does the listing of its table.
                    let first = self.start.saturating_sub(gva) >> format.shift(below);
                    let access = format.inherit(level, value, above);
                    self.frames
                        .get_mut(top + 1)?
                        .begin(next, bits, first as u32, access);
                    self.depth += 1;
                }
                Entry::Page(page) => {
                    let access = if absent {
                        no_rights(value)
                    } else {
                        format.leaf(level, value, above)
                    };
                    let translation = Translation {
                        gpa: page,
                        page_shift: shift,
                        access,
                        steps: self.steps,
                    };
                    return Some(Ok(Mapping {
                        gva: Gva(gva),
                        translation,
                    }));
                }
                Entry::Reserved | Entry::Table(_) => self.broken += 1,
            }
        }
        None
    }
}

impl<M: TableMemory + ?Sized> Iterator for Mappings<'_, M> {
    type Item = Result<Mapping, TableLimit>;

    fn next(&mut self) -> Option<Self::Item> {
        with_format!(self.mode, format => self.step(format))
    }
}
