//! The guest's memory map: the firmware's, less what is ours.

use core::ops::Range;

/// What a range of physical memory is, by the numbers of ACPI's address range types (ACPI 6.5, table 15.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(pub u32);

impl Kind {
    /// Memory that the system may use.
    pub const RAM: Kind = Kind(1);
    /// Not to be touched.
    pub const RESERVED: Kind = Kind(2);
}

/// One range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Physical addresses.
    pub range: Range<u64>,
    /// What is there.
    pub kind: Kind,
}

/// As many ranges as the boot protocol's zero page holds.
pub const CAPACITY: usize = 128;

/// Ranges in the order in which the firmware names them.
#[derive(Debug, Clone)]
pub struct MemoryMap {
    entries: [Entry; CAPACITY],
    used: usize,
}

impl Default for MemoryMap {
    fn default() -> Self {
        const NONE: Entry = Entry {
            range: 0..0,
            kind: Kind::RESERVED,
        };
        Self {
            entries: [NONE; CAPACITY],
            used: 0,
        }
    }
}

impl MemoryMap {
    /// The ranges.
    pub fn entries(&self) -> &[Entry] {
        self.entries.get(..self.used).unwrap_or_default()
    }

    /// Adds a range; `false` where there is no room.
    pub fn add(&mut self, range: Range<u64>, kind: Kind) -> bool {
        if range.is_empty() {
            return true;
        }
        let Some(slot) = self.entries.get_mut(self.used) else {
            return false;
        };
        *slot = Entry { range, kind };
        self.used += 1;
        true
    }

    /// Takes `taken` out of all RAM and makes it reserved; `false` where there is no room for the pieces, and then the
    /// map is of no use.
    pub fn reserve(&mut self, taken: Range<u64>) -> bool {
        let mut rest = MemoryMap::default();
        let mut room = true;
        for entry in self.entries() {
            let Range { start, end } = entry.range;
            if entry.kind != Kind::RAM || end <= taken.start || taken.end <= start {
                room &= rest.add(start..end, entry.kind);
            } else {
                room &= rest.add(start..taken.start.max(start), entry.kind);
                room &= rest.add(taken.end.min(end)..end, entry.kind);
            }
        }
        room &= rest.add(taken, Kind::RESERVED);
        *self = rest;
        room
    }

    /// Whether all of `range` is RAM of one entry.
    pub fn is_ram(&self, range: &Range<u64>) -> bool {
        self.entries()
            .iter()
            .any(|e| e.kind == Kind::RAM && e.range.start <= range.start && range.end <= e.range.end)
    }

    /// Whether any of `range` is RAM.
    pub fn touches_ram(&self, range: &Range<u64>) -> bool {
        self.entries()
            .iter()
            .any(|e| e.kind == Kind::RAM && e.range.start < range.end && range.start < e.range.end)
    }

    /// The end of the highest RAM.
    pub fn end_of_ram(&self) -> u64 {
        let ram = self.entries().iter().filter(|e| e.kind == Kind::RAM);
        ram.map(|e| e.range.end).max().unwrap_or(0)
    }

    /// The lowest `size` bytes of RAM at or above `from` at a multiple of `align`, a power of two, which touch none of
    /// `avoid`.
    pub fn find(&self, from: u64, size: u64, align: u64, avoid: &[Range<u64>]) -> Option<u64> {
        let mut best: Option<u64> = None;
        for entry in self.entries().iter().filter(|e| e.kind == Kind::RAM) {
            let mut start = entry.range.start.max(from).checked_next_multiple_of(align)?;
            // Each step passes the end of one range that is in the way, so there are no more steps than those.
            for _ in 0..=avoid.len() {
                let end = start.checked_add(size)?;
                if end > entry.range.end {
                    break;
                }
                match avoid.iter().find(|a| a.start < end && start < a.end) {
                    Some(a) => start = a.end.checked_next_multiple_of(align)?,
                    None => {
                        best = Some(best.map_or(start, |b| b.min(start)));
                        break;
                    }
                }
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> MemoryMap {
        let mut map = MemoryMap::default();
        map.add(0..0x9_f000, Kind::RAM);
        map.add(0x9_f000..0x10_0000, Kind::RESERVED);
        map.add(0x10_0000..0x2000_0000, Kind::RAM);
        map
    }

    #[test]
    fn what_is_taken_is_ram_no_more() {
        let mut map = map();
        assert!(map.reserve(0x800_0000..0x840_0000));
        assert!(map.is_ram(&(0x10_0000..0x800_0000)));
        assert!(map.is_ram(&(0x840_0000..0x2000_0000)));
        assert!(!map.touches_ram(&(0x800_0000..0x840_0000)));
        assert_eq!(map.entries().len(), 5);
        // At the begin, at the end, and whole.
        assert!(map.reserve(0x10_0000..0x20_0000) && map.reserve(0x1f00_0000..0x2000_0000));
        assert_eq!(map.end_of_ram(), 0x1f00_0000);
        assert!(map.reserve(0..0xa_0000));
        assert!(!map.touches_ram(&(0..0x20_0000)));
    }

    #[test]
    fn room_is_found_beside_what_is_in_the_way() {
        let map = map();
        assert_eq!(map.find(0x100_0000, 0x100_0000, 0x20_0000, &[]), Some(0x100_0000));
        let avoid = [0x180_0000..0x190_0001, 0x1a0_0000..0x1b0_0000];
        assert_eq!(
            map.find(0x100_0000, 0x100_0000, 0x20_0000, &avoid),
            Some(0x1c0_0000)
        );
        assert_eq!(map.find(0x100_0000, 0x2000_0000, 0x20_0000, &[]), None);
        assert_eq!(map.find(u64::MAX, 1, 0x1000, &[]), None);
    }

    #[test]
    fn a_full_map_says_so() {
        let mut map = MemoryMap::default();
        for n in 0..CAPACITY as u64 {
            assert!(map.add(n * 0x2000..n * 0x2000 + 0x1000, Kind::RAM));
        }
        assert!(!map.add(0x1000_0000..0x1000_1000, Kind::RAM));
        assert!(!map.reserve(0x100..0x200));
    }
}
