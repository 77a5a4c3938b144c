//! What the walkers ask of a table format: its geometry and the meaning of an entry.

use super::{Access, TableMemory};
use crate::{Dtb, Gpa, Gva};

/// What one entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    /// Present bit clear.
    NotPresent,
    /// Reserved bits set, or a page size this level does not have.
    Reserved,
    /// The next table.
    Table(Gpa),
    /// A page whose first byte is here. Its size is that of the level's span.
    Page(Gpa),
}

/// A page-table format. Levels count down to 1, the last table.
pub(super) trait Format: Copy {
    /// How many levels there are.
    fn levels(self) -> u8;
    /// log2 of the bytes that one entry of `level` spans.
    fn shift(self, level: u8) -> u8;
    /// log2 of the number of entries in a table of `level`.
    fn index_bits(self, level: u8) -> u8;
    /// log2 of an entry's size in bytes.
    fn entry_shift(self) -> u8 {
        3
    }
    /// Where the root table lies.
    fn root(self, dtb: Dtb) -> Gpa;
    /// Bits of virtual address, and whether the rest extends the sign (x86-64), or must be zero (32-bit).
    fn canonical(self, gva: Gva) -> bool;
    /// The part of `start..=end` that can have mappings, moved to canonical addresses; `None` where none can.
    fn clip(self, start: u64, end: u64) -> Option<(u64, u64)>;
    /// The canonical address for the bits that the tables resolve. `near` is any address of the wanted half.
    fn extend(self, bits: u64, near: u64) -> u64;
    /// Reads the entry at `gpa`.
    #[inline(always)]
    fn read<M: TableMemory + ?Sized>(self, memory: &M, gpa: Gpa) -> Option<u64> {
        memory.entry_u64(gpa)
    }
    /// Reads entries from `gpa` on and returns how many came before the first without memory.
    fn read_run<M: TableMemory + ?Sized>(self, memory: &M, gpa: Gpa, out: &mut [u64]) -> usize {
        memory.entries_u64(gpa, out)
    }
    /// What `value` at `level` says.
    fn decode(self, level: u8, value: u64) -> Entry;
    /// The rights before the first table.
    fn start(self) -> Access {
        Access {
            write: true,
            user: true,
            execute: true,
            user_execute: true,
            ..Access::default()
        }
    }
    /// The rights of a table entry on top of those of the levels above.
    fn inherit(self, level: u8, value: u64, above: Access) -> Access;
    /// The rights and flags of a page, given those of the levels above.
    fn leaf(self, level: u8, value: u64, above: Access) -> Access;

    /// Where the entry for `gva` lies in the table at `table`.
    #[inline(always)]
    fn entry_gpa(self, level: u8, table: Gpa, gva: u64) -> Gpa {
        let index = (gva >> self.shift(level)) & ((1 << self.index_bits(level)) - 1);
        // Tables are aligned (the root may be less so in PAE and arm64), and no index passes the table.
        Gpa(table.0.wrapping_add(index << self.entry_shift()))
    }
}

/// Clips a range to the two halves of a sign-extended space of `bits` bits.
pub(super) fn clip_signed(start: u64, end: u64, bits: u8) -> Option<(u64, u64)> {
    let low_end = (1u64 << (bits - 1)) - 1;
    let high_start = !low_end;
    let start = if start > low_end && start < high_start {
        high_start
    } else {
        start
    };
    let end = if end > low_end && end < high_start {
        low_end
    } else {
        end
    };
    (start <= end).then_some((start, end))
}
