//! The guest at a hook: its registers, and its memory by virtual address.

use vmsight_sim_abi::Frame;

/// Bits of an entry of a page table: present, and a large page.
const PRESENT: u64 = 1;
const IS_LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest's physical memory. Everything in it is the guest's to choose, and may change between two reads.
pub trait Memory {
    /// The 8-byte word at `gpa`, a multiple of 8; `None` where the guest has no memory that is the monitor's to touch.
    fn read(&self, gpa: u64) -> Option<u64>;
    /// Writes one; `false` likewise.
    fn write(&mut self, gpa: u64, word: u64) -> bool;
}

/// What a handler gets.
#[derive(Debug)]
pub struct Context<'a, M> {
    /// The hooked function's registers.
    pub frame: &'a Frame,
    memory: M,
}

impl<'a, M: Memory> Context<'a, M> {
    /// The guest at a hook.
    pub fn new(frame: &'a Frame, memory: M) -> Self {
        Self { frame, memory }
    }

    /// Reads the word at a guest-virtual address, which must be a multiple of 8.
    pub fn read(&self, address: u64) -> Option<u64> {
        self.memory.read(self.translate(address)?)
    }

    /// Writes one; `false` where there is no such memory. The guest's own write protection does not matter.
    pub fn write(&mut self, address: u64, word: u64) -> bool {
        self.translate(address)
            .is_some_and(|gpa| self.memory.write(gpa, word))
    }

    /// Walks the guest's four levels of page tables: four reads at most, whatever they hold. (`vmsight-arch` has a walker
    /// for all modes, with evidence and reasons; compiled for the host it uses vector registers, which are the guest's.)
    fn translate(&self, address: u64) -> Option<u64> {
        let sign = address >> 47;
        if (sign != 0 && sign != 0x1_ffff) || address & 7 != 0 {
            return None;
        }
        let mut table = self.frame.cr3 & ADDRESS;
        let mut shift = 39;
        loop {
            let entry = self.memory.read(table + ((address >> shift) & 511) * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            let inside = (1u64 << shift) - 1;
            // Bit 7 of the root's entries is reserved, that of the last level something else.
            if shift == 12 || (entry & IS_LARGE != 0 && shift < 39) {
                return Some((entry & ADDRESS & !inside) | (address & inside));
            }
            table = entry & ADDRESS;
            shift -= 9;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy;

    extern crate std;
    use std::collections::BTreeMap;

    struct Words(BTreeMap<u64, u64>);

    impl Memory for &mut Words {
        fn read(&self, gpa: u64) -> Option<u64> {
            self.0.get(&gpa).copied()
        }

        fn write(&mut self, gpa: u64, word: u64) -> bool {
            self.0.get_mut(&gpa).map(|w| *w = word).is_some()
        }
    }

    /// Virtual address 0 and, as a large page, 2 MiB.
    fn words() -> Words {
        let tables = [
            (0x1000, 0x2003),
            (0x2000, 0x3003),
            (0x3000, 0x4003),
            (0x4000, 0x5003),
            (0x3008, 0x60_0083),
        ];
        Words(tables.into_iter().chain([(0x5010, 7), (0x60_1238, 0)]).collect())
    }

    fn copied(words: &mut Words, rdi: u64, rsi: u64) -> u64 {
        let frame = Frame {
            rdi,
            rsi,
            cr3: 0x1fff,
            ..Frame::default()
        };
        let mut handled = 0;
        copy(&mut Context::new(&frame, &mut *words), &mut handled);
        handled
    }

    #[test]
    fn a_word_is_copied_across_pages() {
        let mut words = words();
        assert_eq!(copied(&mut words, 0x10, 0x20_1238), 1);
        assert_eq!(words.0[&0x60_1238], 7);
    }

    #[test]
    fn what_is_not_there_is_left() {
        let mut words = words();
        let before = words.0.clone();
        // Absent, misaligned, not canonical, no memory behind it; and the same as what is written to.
        for bad in [0x1000, 0x11, 1 << 47, 0x20_0000, u64::MAX] {
            assert_eq!(copied(&mut words, bad, 0x20_1238), 1);
            assert_eq!(copied(&mut words, 0x10, bad), 1);
        }
        assert_eq!(words.0, before);
        // Tables that lead to themselves.
        words.0.insert(0x1000, 0x1003);
        copied(&mut words, 0, 0x20_1238);
        assert_eq!(words.0[&0x60_1238], 0);
    }
}
