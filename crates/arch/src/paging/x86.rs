//! The x86 table formats: 32-bit, PAE, 4-level and 5-level (SDM vol. 3A, chapter 4).

use super::format::{Entry, Format, clip_signed};
use super::{Access, TableMemory};
use crate::{Dtb, Gpa, Gva};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12. MAXPHYADDR is not known here and is taken as 52: an address above what the machine has is found
/// out by there being no memory behind it.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

#[inline(always)]
fn restrict(value: u64, above: Access) -> Access {
    let user = above.user & (value & USER != 0);
    let execute = above.execute & (value & NO_EXECUTE == 0);
    Access {
        write: above.write & (value & WRITE != 0),
        user,
        execute,
        user_execute: user & execute,
        ..above
    }
}

#[inline(always)]
fn leaf(value: u64, above: Access) -> Access {
    Access {
        accessed: value & ACCESSED != 0,
        dirty: value & DIRTY != 0,
        global: value & GLOBAL != 0,
        ..restrict(value, above)
    }
}

/// 4-level and 5-level paging (SDM 4.5). Bits 62:52 are ignored or protection keys.
#[derive(Clone, Copy)]
pub(super) struct Long<const LEVELS: u8>;

impl<const LEVELS: u8> Long<LEVELS> {
    const VA_BITS: u8 = 12 + 9 * LEVELS;
}

impl<const LEVELS: u8> Format for Long<LEVELS> {
    #[inline(always)]
    fn levels(self) -> u8 {
        LEVELS
    }

    #[inline(always)]
    fn shift(self, level: u8) -> u8 {
        3 + 9 * level
    }

    #[inline(always)]
    fn index_bits(self, _level: u8) -> u8 {
        9
    }

    #[inline(always)]
    fn root(self, dtb: Dtb) -> Gpa {
        Gpa(dtb.0 & ADDRESS)
    }

    #[inline(always)]
    fn canonical(self, gva: Gva) -> bool {
        let unused = 64 - Self::VA_BITS;
        (((gva.0 << unused) as i64) >> unused) as u64 == gva.0
    }

    fn clip(self, start: u64, end: u64) -> Option<(u64, u64)> {
        clip_signed(start, end, Self::VA_BITS)
    }

    #[inline(always)]
    fn extend(self, bits: u64, _near: u64) -> u64 {
        let unused = 64 - Self::VA_BITS;
        (((bits << unused) as i64) >> unused) as u64
    }

    #[inline(always)]
    fn decode(self, level: u8, value: u64) -> Entry {
        if value & PRESENT == 0 {
            return Entry::NotPresent;
        }
        match level {
            1 => Entry::Page(Gpa(value & ADDRESS)),
            2 | 3 if value & PAGE_SIZE != 0 => {
                // Bit 12 is PAT, the bits from 13 to the page's size are reserved (SDM tables 4-16 and 4-18).
                let span = (1u64 << self.shift(level)) - 1;
                if value & span & !0x1fff != 0 {
                    Entry::Reserved
                } else {
                    Entry::Page(Gpa(value & ADDRESS & !span))
                }
            }
            // PML4E and PML5E have no PS bit: it is reserved (SDM tables 4-14 and 4-15).
            4.. if value & PAGE_SIZE != 0 => Entry::Reserved,
            _ => Entry::Table(Gpa(value & ADDRESS)),
        }
    }

    #[inline(always)]
    fn inherit(self, _level: u8, value: u64, above: Access) -> Access {
        restrict(value, above)
    }

    #[inline(always)]
    fn leaf(self, _level: u8, value: u64, above: Access) -> Access {
        leaf(value, above)
    }
}

/// PAE paging (SDM 4.4): 32-bit addresses, a root of four entries.
#[derive(Clone, Copy)]
pub(super) struct Pae;

impl Format for Pae {
    #[inline(always)]
    fn levels(self) -> u8 {
        3
    }

    #[inline(always)]
    fn shift(self, level: u8) -> u8 {
        3 + 9 * level
    }

    #[inline(always)]
    fn index_bits(self, level: u8) -> u8 {
        if level == 3 { 2 } else { 9 }
    }

    #[inline(always)]
    fn root(self, dtb: Dtb) -> Gpa {
        // CR3 bits 31:5 (SDM table 4-7).
        Gpa(dtb.0 & 0xffff_ffe0)
    }

    #[inline(always)]
    fn canonical(self, gva: Gva) -> bool {
        gva.0 >> 32 == 0
    }

    fn clip(self, start: u64, end: u64) -> Option<(u64, u64)> {
        clip_32(start, end)
    }

    #[inline(always)]
    fn extend(self, bits: u64, _near: u64) -> u64 {
        bits
    }

    #[inline(always)]
    fn decode(self, level: u8, value: u64) -> Entry {
        if value & PRESENT == 0 {
            return Entry::NotPresent;
        }
        // PDPTE: bits 2:1, 8:5 and 63:52 are reserved (SDM table 4-8); below, 62:52 are (tables 4-9 to 4-11).
        let reserved = if level == 3 {
            0xfff0_0000_0000_01e6
        } else {
            0x7ff0_0000_0000_0000
        };
        if value & reserved != 0 {
            return Entry::Reserved;
        }
        match level {
            1 => Entry::Page(Gpa(value & ADDRESS)),
            2 if value & PAGE_SIZE != 0 => {
                if value & 0x1f_e000 != 0 {
                    Entry::Reserved
                } else {
                    Entry::Page(Gpa(value & ADDRESS & !0x1f_ffff))
                }
            }
            _ => Entry::Table(Gpa(value & ADDRESS)),
        }
    }

    #[inline(always)]
    fn inherit(self, level: u8, value: u64, above: Access) -> Access {
        // PDPTEs carry no rights.
        if level == 3 { above } else { restrict(value, above) }
    }

    #[inline(always)]
    fn leaf(self, _level: u8, value: u64, above: Access) -> Access {
        leaf(value, above)
    }
}

/// 32-bit paging (SDM 4.3): 4-byte entries, 4 KiB pages, and 4 MiB ones where PSE is on.
#[derive(Clone, Copy)]
pub(super) struct Legacy {
    /// CR4.PSE
    pub(super) pse: bool,
}

impl Format for Legacy {
    #[inline(always)]
    fn levels(self) -> u8 {
        2
    }

    #[inline(always)]
    fn shift(self, level: u8) -> u8 {
        2 + 10 * level
    }

    #[inline(always)]
    fn index_bits(self, _level: u8) -> u8 {
        10
    }

    #[inline(always)]
    fn entry_shift(self) -> u8 {
        2
    }

    #[inline(always)]
    fn root(self, dtb: Dtb) -> Gpa {
        Gpa(dtb.0 & 0xffff_f000)
    }

    #[inline(always)]
    fn canonical(self, gva: Gva) -> bool {
        gva.0 >> 32 == 0
    }

    fn clip(self, start: u64, end: u64) -> Option<(u64, u64)> {
        clip_32(start, end)
    }

    #[inline(always)]
    fn extend(self, bits: u64, _near: u64) -> u64 {
        bits
    }

    #[inline(always)]
    fn read<M: TableMemory + ?Sized>(self, memory: &M, gpa: Gpa) -> Option<u64> {
        memory.entry_u32(gpa).map(u64::from)
    }

    fn read_run<M: TableMemory + ?Sized>(self, memory: &M, gpa: Gpa, out: &mut [u64]) -> usize {
        let mut n = 0;
        while let Some(slot) = out.get_mut(n) {
            let Some(value) = memory.entry_u32(Gpa(gpa.0.wrapping_add(4 * n as u64))) else {
                break;
            };
            *slot = value.into();
            n += 1;
        }
        n
    }

    #[inline(always)]
    fn decode(self, level: u8, value: u64) -> Entry {
        if value & PRESENT == 0 {
            return Entry::NotPresent;
        }
        if level == 1 {
            return Entry::Page(Gpa(value & 0xffff_f000));
        }
        if self.pse && value & PAGE_SIZE != 0 {
            if value & (1 << 21) != 0 {
                return Entry::Reserved;
            }
            // PSE-36: bits 20:13 are bits 39:32 of the page's address (SDM table 4-4).
            return Entry::Page(Gpa((value & 0xffc0_0000) | ((value >> 13) & 0xff) << 32));
        }
        Entry::Table(Gpa(value & 0xffff_f000))
    }

    #[inline(always)]
    fn inherit(self, _level: u8, value: u64, above: Access) -> Access {
        restrict(value, above)
    }

    #[inline(always)]
    fn leaf(self, _level: u8, value: u64, above: Access) -> Access {
        leaf(value, above)
    }
}

fn clip_32(start: u64, end: u64) -> Option<(u64, u64)> {
    let end = end.min(0xffff_ffff);
    (start <= end).then_some((start, end))
}
