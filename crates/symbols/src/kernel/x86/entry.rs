//! Page-table entries and tables as plain numbers. The walkers in `arch` translate; here the tables themselves are looked at.

use vmsight_arch::Gpa;
use vmsight_memory::{GuestMemory, ReadOp};

/// One entry (SDM vol. 3A, table 4-14 and on).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry(pub(super) u64);

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 12 to 51.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Entry {
    pub(super) fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    pub(super) fn may_write(self) -> bool {
        self.0 & WRITE != 0
    }

    pub(super) fn may_execute(self) -> bool {
        self.0 & NO_EXECUTE == 0
    }

    /// The table of the next level, for an entry above the last level.
    pub(super) fn table(self) -> Option<Gpa> {
        (self.is_present() && self.0 & LARGE == 0).then_some(Gpa(self.0 & ADDRESS))
    }

    /// The page of 2 MiB, for an entry of the second level.
    pub(super) fn large_page(self) -> Option<Gpa> {
        (self.is_present() && self.0 & LARGE != 0).then_some(Gpa(self.0 & ADDRESS & !0x1f_ffff))
    }

    /// The page of 4 KiB, for an entry of the last level.
    pub(super) fn page(self) -> Option<Gpa> {
        self.is_present().then_some(Gpa(self.0 & ADDRESS))
    }
}

/// A whole table.
pub(super) struct Table(Box<[u8; 4096]>);

impl Table {
    pub(super) fn entry(&self, index: usize) -> Entry {
        let bytes = self
            .0
            .get(index * 8..index * 8 + 8)
            .and_then(|b| b.try_into().ok());
        Entry(bytes.map_or(0, u64::from_le_bytes))
    }

    pub(super) fn entries(&self) -> impl DoubleEndedIterator<Item = (usize, Entry)> + '_ {
        (0..512).map(|i| (i, self.entry(i)))
    }
}

/// The table at `gpa`, `None` where no memory is.
pub(super) fn read_table(memory: &GuestMemory, gpa: Gpa) -> Option<Table> {
    let mut bytes = Box::new([0; 4096]);
    memory.read(gpa.page_start(), bytes.as_mut_slice()).ok()?;
    Some(Table(bytes))
}

/// The last entry of each page that is read as a table; an empty entry where no memory is. Read in one go, which counts when the
/// memory is another process's.
pub(super) fn last_entries(memory: &GuestMemory, pages: &[Gpa]) -> Vec<Entry> {
    let mut bytes = vec![[0_u8; 8]; pages.len()];
    let mut ops: Vec<ReadOp<'_>> = pages
        .iter()
        .zip(&mut bytes)
        .map(|(p, b)| ReadOp::new(p.wrapping_add(0xff8), b))
        .collect();
    memory.read_batch(&mut ops);
    let failed: Vec<bool> = ops.iter().map(|op| op.result.is_err()).collect();
    bytes
        .iter()
        .zip(failed)
        .map(|(b, failed)| Entry(if failed { 0 } else { u64::from_le_bytes(*b) }))
        .collect()
}
