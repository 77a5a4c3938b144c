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
    /// Called now and then by a handler that takes long: it does not hang.
    fn getting_on(&self) {}
}

/// What of the processor is not in the [`Frame`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rest {
    /// The base of GS: in the kernel, of this processor's variables.
    pub gs_base: u64,
    /// Fourth argument; `None` where it could not be had.
    pub rcx: Option<u64>,
}

/// What a handler gets.
#[derive(Debug)]
pub struct Context<'a, M> {
    /// The hooked function's registers.
    pub frame: &'a Frame,
    /// And the others.
    pub rest: Rest,
    memory: M,
}

impl<'a, M: Memory> Context<'a, M> {
    /// The guest at a hook.
    pub fn new(frame: &'a Frame, rest: Rest, memory: M) -> Self {
        Self { frame, rest, memory }
    }

    /// Reads the word at a guest-virtual address, which must be a multiple of 8.
    pub fn read(&self, address: u64) -> Option<u64> {
        self.memory.read(self.aligned(address)?)
    }

    /// Writes one; `false` where there is no such memory. The guest's own write protection does not matter.
    pub fn write(&mut self, address: u64, word: u64) -> bool {
        self.aligned(address)
            .is_some_and(|gpa| self.memory.write(gpa, word))
    }

    /// Reads bytes, wherever they begin and whatever pages they lie in: all of them or none. The guest may change them
    /// meanwhile.
    pub fn bytes(&self, address: u64, bytes: &mut [u8]) -> Option<()> {
        let all = bytes.len();
        (self.prefix(address, bytes, |_| true) == all).then_some(())
    }

    /// Reads a text that ends with a zero: how long it is without it, and whether there was no zero as far as `bytes`
    /// reaches or the guest has memory.
    pub fn text(&self, address: u64, bytes: &mut [u8]) -> (usize, bool) {
        let length = self.prefix(address, bytes, |byte| byte != 0);
        let mut last = [0];
        let after = address.wrapping_add(length as u64);
        (length, self.bytes(after, &mut last).is_none() || last != [0])
    }

    /// Reads an integer of 8 bytes.
    pub fn u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.bytes(address, &mut bytes)?;
        Some(u64::from_le_bytes(bytes))
    }

    /// Reads one of 4.
    pub fn u32(&self, address: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.bytes(address, &mut bytes)?;
        Some(u32::from_le_bytes(bytes))
    }

    /// Reads one of 2.
    pub fn u16(&self, address: u64) -> Option<u16> {
        let mut bytes = [0; 2];
        self.bytes(address, &mut bytes)?;
        Some(u16::from_le_bytes(bytes))
    }

    /// Shows that the handler, which takes long, does not hang.
    pub fn getting_on(&self) {
        self.memory.getting_on();
    }

    /// Reads bytes as long as they are there and wanted: how many.
    fn prefix(&self, address: u64, bytes: &mut [u8], wanted: impl Fn(u8) -> bool) -> usize {
        let mut page = None;
        let mut kept = None;
        for (n, byte) in bytes.iter_mut().enumerate() {
            let at = address.wrapping_add(n as u64);
            if page.is_none_or(|(start, _)| start != at & !0xfff) {
                let Some(gpa) = self.translate(at & !0xfff) else {
                    return n;
                };
                page = Some((at & !0xfff, gpa));
            }
            if kept.is_none_or(|(start, _)| start != at & !7) {
                let word = page.and_then(|(_, gpa)| self.memory.read(gpa + (at & 0xff8)));
                let Some(word) = word else { return n };
                kept = Some((at & !7, word));
            }
            let there = kept.map_or(0, |(_, word)| (word >> (at % 8 * 8)) as u8);
            if !wanted(there) {
                return n;
            }
            *byte = there;
        }
        bytes.len()
    }

    fn aligned(&self, address: u64) -> Option<u64> {
        (address & 7 == 0).then(|| self.translate(address))?
    }

    /// Walks the guest's four levels of page tables: four reads at most, whatever they hold. (`vmsight-arch` has a walker
    /// for all modes, with evidence and reasons; compiled for the host it uses vector registers, which are the guest's. A test holds the
    /// two against each other.)
    fn translate(&self, address: u64) -> Option<u64> {
        let sign = address >> 47;
        if sign != 0 && sign != 0x1_ffff {
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

    use proptest::prelude::*;
    use vmsight_arch::paging::{FaultReason, PagingMode, TableMemory, walk};
    use vmsight_arch::{Dtb, Gpa, Gva};

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

    fn copied(words: &mut Words, rdi: u64, rsi: u64) {
        let frame = Frame {
            rdi,
            rsi,
            cr3: 0x1fff,
            ..Frame::default()
        };
        copy(&mut Context::new(&frame, Rest::default(), &mut *words));
    }

    #[test]
    fn a_word_is_copied_across_pages() {
        let mut words = words();
        copied(&mut words, 0x10, 0x20_1238);
        assert_eq!(words.0[&0x60_1238], 7);
    }

    #[test]
    fn what_is_not_there_is_left() {
        let mut words = words();
        let before = words.0.clone();
        // Absent, misaligned, not canonical, no memory behind it; and the same as what is written to.
        for bad in [0x1000, 0x11, 1 << 47, 0x20_0000, u64::MAX] {
            copied(&mut words, bad, 0x20_1238);
            copied(&mut words, 0x10, bad);
        }
        assert_eq!(words.0, before);
        // Tables that lead to themselves.
        words.0.insert(0x1000, 0x1003);
        copied(&mut words, 0, 0x20_1238);
        assert_eq!(words.0[&0x60_1238], 0);
    }

    fn seen<T>(words: &mut Words, look: impl FnOnce(&Context<'_, &mut Words>) -> T) -> T {
        let frame = Frame {
            cr3: 0x1000,
            ..Frame::default()
        };
        look(&Context::new(&frame, Rest::default(), words))
    }

    #[test]
    fn bytes_are_read_from_anywhere_and_across_pages() {
        let mut words = words();
        // The page after the first is another one than the next in physical memory.
        words.0.insert(0x4008, 0x9003);
        words.0.insert(0x5ff8, u64::from_le_bytes(*b"-------s"));
        words
            .0
            .insert(0x9000, u64::from_le_bytes(*b"h\0\x01\x02\x03\x04\x05\x06"));
        seen(&mut words, |context| {
            assert_eq!(context.u16(0xfff), Some(u16::from_le_bytes(*b"sh")));
            assert_eq!(context.u32(0x1002), Some(0x0403_0201));
            assert_eq!(context.u64(0x10), Some(7));
            // The last bytes have no memory behind them.
            assert_eq!(context.u64(0x1001), None);
            let mut text = [0xff; 8];
            assert_eq!(context.text(0xfff, &mut text), (2, false));
            assert_eq!(&text[..3], b"sh\xff");
            assert_eq!(context.text(0xffe, &mut text[..2]), (2, true));
            assert_eq!(context.text(0x1002, &mut text), (6, true));
            assert_eq!(context.text(0x2000, &mut text), (0, true));
            assert_eq!(context.text(u64::MAX - 1, &mut text), (0, true));
        });
    }

    #[test]
    fn a_walk_ends_whatever_the_tables_hold() {
        let mut words = words();
        // A page of tables that is its own next level, and what the last of them maps: itself.
        words.0.insert(0x1000, 0x1003);
        seen(&mut words, |context| {
            assert_eq!(context.u64(0), Some(0x1003));
            assert_eq!(context.bytes(0, &mut [0; 0x2000]), None);
        });
    }

    /// The same memory for the walker of `vmsight-arch`.
    struct Tables<'w>(&'w Words);

    impl TableMemory for Tables<'_> {
        fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
            self.0.0.get(&gpa.0).copied()
        }

        fn entry_u32(&self, _: Gpa) -> Option<u32> {
            None
        }
    }

    /// An entry that leads to one of the pages 1 to 4, or maps something.
    fn entry() -> impl Strategy<Value = u64> {
        let flags = prop_oneof![4 => Just(3u64), 1 => Just(0x83), 1 => Just(0x8000_0000_0000_0083), 1 => Just(2), 1 => 0..0x200u64];
        let page = prop_oneof![8 => (1..5u64).prop_map(|n| n << 12), 1 => (0..1u64 << 40).prop_map(|n| n << 12), 1 => (0..64u64).prop_map(|n| n << 30)];
        (flags, page).prop_map(|(flags, page)| flags | (page & ADDRESS))
    }

    proptest! {
        /// Entries of which the processor would say that reserved bits are set lead nowhere for a guest.
        #[test]
        fn what_the_walker_of_all_modes_finds_is_found(
            entries in prop::collection::vec(((1..5u64), (0..4u64), entry()), 8..40),
            indices in prop::collection::vec(0..4u64, 4),
            offset in 0..0x1000u64,
        ) {
            let zeros = (1..5u64).flat_map(|page| (0..4u64).map(move |slot| (page * 0x1000 + slot * 8, 0)));
            let entries = entries.into_iter().map(|(page, slot, entry)| (page * 0x1000 + slot * 8, entry));
            let mut words = Words(zeros.chain(entries).collect());
            let address = indices.iter().fold(0, |address, index| address << 9 | index) << 12 | offset;
            let walked = walk(PagingMode::X86Level4, &Tables(&words), Dtb(0x1000), Gva(address));
            let found = seen(&mut words, |context| context.translate(address));
            match walked {
                Ok(translation) => prop_assert_eq!(found, Some(translation.gpa.0)),
                Err(fault) if fault.reason == FaultReason::Reserved => {}
                Err(fault) => prop_assert_eq!(found, None, "{:?}", fault),
            }
        }
    }
}
