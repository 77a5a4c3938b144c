//! The AArch64 stage 1 table format, VMSAv8-64 (Arm ARM D8.2 and D8.3).

use super::format::{Entry, Format};
use super::{Access, Granule};
use crate::{Dtb, Gpa, Gva};

const VALID: u64 = 1 << 0;
/// Set: a table, or at the last level a page. Clear: a block.
const TABLE: u64 = 1 << 1;
/// AP[1]: accessible at EL0.
const USER: u64 = 1 << 6;
/// AP[2]: read-only.
const READ_ONLY: u64 = 1 << 7;
const ACCESS_FLAG: u64 = 1 << 10;
const NOT_GLOBAL: u64 = 1 << 11;
/// Dirty bit modifier: read-only means clean, hardware makes the page writable at the first write.
const DBM: u64 = 1 << 51;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const PXN_TABLE: u64 = 1 << 59;
const UXN_TABLE: u64 = 1 << 60;
/// APTable[0]: no access from EL0 below.
const NO_USER_TABLE: u64 = 1 << 61;
/// APTable[1]: no writes below.
const READ_ONLY_TABLE: u64 = 1 << 62;

/// The tables behind one TTBR.
#[derive(Clone, Copy)]
pub(super) struct Vmsa {
    /// log2 of the page size: 12, 14 or 16.
    page_shift: u8,
    va_bits: u8,
    levels: u8,
    lpa2: bool,
}

impl Vmsa {
    pub(super) fn new(granule: Granule, va_bits: u8, lpa2: bool) -> Self {
        let page_shift = match granule {
            Granule::K4 => 12,
            Granule::K16 => 14,
            Granule::K64 => 16,
        };
        let va_bits = va_bits.clamp(16, 52).max(page_shift + 1);
        let levels = (va_bits - page_shift).div_ceil(page_shift - 3);
        Self {
            page_shift,
            va_bits,
            levels,
            lpa2: lpa2 && granule != Granule::K64,
        }
    }

    /// The output address of a descriptor, less the bits under `low`.
    fn address(self, value: u64, low: u8) -> u64 {
        let below = !((1u64 << low) - 1);
        if self.lpa2 {
            // Bits 49:low in place, 51:50 in bits 9:8 (D8.3.1, TCR.DS = 1).
            (value & 0x0003_ffff_ffff_f000 & below) | ((value >> 8) & 3) << 50
        } else if self.page_shift == 16 {
            // Bits 47:low in place, 51:48 in bits 15:12.
            (value & 0x0000_ffff_ffff_0000 & below) | ((value >> 12) & 0xf) << 48
        } else {
            value & 0x0000_ffff_ffff_f000 & below
        }
    }

    /// Whether blocks exist at `level` (D8.2.6 to D8.2.8: level 1 and 2 of 4 KiB, 2 of the others, and one
    /// level more with 52-bit addresses).
    fn has_blocks(self, level: u8) -> bool {
        match self.page_shift {
            12 => matches!(level, 2 | 3) || (level == 4 && self.lpa2),
            14 => level == 2 || (level == 3 && self.lpa2),
            _ => matches!(level, 2 | 3),
        }
    }
}

impl Format for Vmsa {
    #[inline]
    fn levels(self) -> u8 {
        self.levels
    }

    #[inline]
    fn shift(self, level: u8) -> u8 {
        self.page_shift + (level - 1) * (self.page_shift - 3)
    }

    #[inline]
    fn index_bits(self, level: u8) -> u8 {
        (self.page_shift - 3).min(self.va_bits - self.shift(level))
    }

    #[inline]
    fn root(self, dtb: Dtb) -> Gpa {
        // TTBR bits 47:1 less CnP and ASID. A root of few entries is aligned to its size, at least to 64 bytes.
        Gpa(dtb.0 & 0x000f_ffff_ffff_ffc0)
    }

    #[inline]
    fn canonical(self, gva: Gva) -> bool {
        let top = gva.0 >> self.va_bits;
        top == 0 || top == u64::MAX >> self.va_bits
    }

    fn clip(self, start: u64, end: u64) -> Option<(u64, u64)> {
        // One register's tables serve one half: that of the start, or the upper one where the start is between.
        let low_end = (1u64 << self.va_bits) - 1;
        let (start, end) = if start <= low_end {
            (start, end.min(low_end))
        } else {
            (start.max(!low_end), end)
        };
        (start <= end).then_some((start, end))
    }

    #[inline]
    fn extend(self, bits: u64, near: u64) -> u64 {
        let mask = (1u64 << self.va_bits) - 1;
        (bits & mask) | if near >> 63 != 0 { !mask } else { 0 }
    }

    #[inline]
    fn decode(self, level: u8, value: u64) -> Entry {
        if value & VALID == 0 {
            return Entry::NotPresent;
        }
        if value & TABLE != 0 {
            let at = Gpa(self.address(value, self.page_shift));
            return if level == 1 {
                Entry::Page(at)
            } else {
                Entry::Table(at)
            };
        }
        if level > 1 && self.has_blocks(level) {
            Entry::Page(Gpa(self.address(value, self.shift(level))))
        } else {
            Entry::Reserved
        }
    }

    #[inline]
    fn inherit(self, _level: u8, value: u64, above: Access) -> Access {
        Access {
            write: above.write & (value & READ_ONLY_TABLE == 0),
            user: above.user & (value & NO_USER_TABLE == 0),
            execute: above.execute & (value & PXN_TABLE == 0),
            user_execute: above.user_execute & (value & UXN_TABLE == 0),
            ..above
        }
    }

    #[inline]
    fn leaf(self, _level: u8, value: u64, above: Access) -> Access {
        let dbm = value & DBM != 0;
        let read_only = value & READ_ONLY != 0;
        let user = above.user & (value & USER != 0);
        // A clean page of a guest that lets the hardware keep the dirty state is writable all the same.
        let write = above.write & (!read_only | dbm);
        Access {
            write,
            user,
            // What EL0 may write is never executable at EL1 (D8.4.1).
            execute: above.execute & (value & PXN == 0) & !(user & write),
            user_execute: above.user_execute & (value & UXN == 0),
            accessed: value & ACCESS_FLAG != 0,
            dirty: dbm & !read_only,
            global: value & NOT_GLOBAL == 0,
        }
    }
}
