//! Where things are in the guest's kernel: its text, and the stub's place in its address space.
//!
//! The stub has to be within 2 GiB of the text, whose hooks have 32 bits to say how far it is, and in every process' page
//! tables. The kernel's image has a gigabyte to itself, of which it fills a few dozen MiB and gives back the rest early in
//! its boot. The table of that gigabyte is one for all processes. In one of its entries that say nothing a table of ours is
//! entered; the table and the stub's pages are the hypervisor's, and read-only to the guest. With page tables of user mode
//! apart (KPTI) they are not in those, and need not be: no hook is called there.

use vmsight_arch::paging::{self, PagingMode, TableMemory};
use vmsight_arch::{Dtb, Gpa, Gva};

use crate::{LARGE, PAGE};

/// The kernel's image is in this gigabyte, wherever KASLR puts it.
pub const IMAGE: u64 = 0xffff_ffff_8000_0000;
const GIGABYTE: u64 = 1 << 30;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const IS_LARGE: u64 = 1 << 7;
/// Present, accessed; for the kernel, not to be written. The bit that says that it was accessed is set, so that no walk has
/// to set it in a table that is read-only.
const READ_ONLY: u64 = 0x21;
/// CR3 without PCID and flags.
const CR3_ADDRESS: u64 = ADDRESS;
/// Bytes of a call, and of the NOP in whose place it is.
pub const CALL: usize = 5;
/// What is in a hook's place where the handlers run in the hypervisor: VMCALL and a NOP of two bytes.
pub const EXIT: [u8; CALL] = [0x0f, 0x01, 0xc1, 0x66, 0x90];

/// KASLR's slide, from what the kernel wrote into LSTAR and where the linker put it. `None` where it cannot be one: the
/// kernel moves by whole large pages, up, within its gigabyte.
pub fn slide(lstar: u64, linked: u64) -> Option<u64> {
    let slide = lstar.checked_sub(linked)?;
    (slide.is_multiple_of(LARGE) && slide < GIGABYTE).then_some(slide)
}

/// Where the page tables under `cr3` lead.
pub fn physical(memory: &impl TableMemory, cr3: u64, address: u64) -> Option<u64> {
    let found = paging::walk(
        PagingMode::X86Level4,
        memory,
        Dtb(cr3 & CR3_ADDRESS),
        Gva(address),
    )
    .ok()?;
    Some(found.gpa.0)
}

/// A place for the stub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical address of the entry that says nothing.
    pub entry: u64,
    /// Guest-virtual address of the stub's first page.
    pub stub: u64,
}

impl Place {
    /// The highest there is.
    pub fn find(memory: &impl TableMemory, cr3: u64) -> Option<Self> {
        let mut table = cr3 & CR3_ADDRESS;
        let [root, second] = [39, 30].map(|shift| IMAGE >> shift & 511);
        for index in [root, second] {
            let entry = memory.entry_u64(Gpa(table + index * 8))?;
            if entry & PRESENT == 0 || (entry & IS_LARGE != 0 && index == second) {
                return None;
            }
            table = entry & ADDRESS;
        }
        let third = (0..512u64)
            .rev()
            .find(|n| memory.entry_u64(Gpa(table + n * 8)) == Some(0))?;
        // The gate's page number must not be that of an upper level: see `Views`.
        let page = (1..512).find(|n| ![root, second, third].contains(n))?;
        Some(Self {
            entry: table + third * 8,
            stub: IMAGE + third * LARGE + (page - 1) * PAGE,
        })
    }

    /// The entry that makes the page at `table` the place's table.
    pub fn link(table: u64) -> u64 {
        table | READ_ONLY
    }

    /// Fills that table with the stub's two pages.
    pub fn fill(self, table: &mut [u64; 512], pages: [u64; 2]) {
        for (n, page) in (0..).zip(pages) {
            let at = ((self.stub >> 12) + n) & 511;
            if let Some(entry) = table.get_mut(at as usize) {
                *entry = page | READ_ONLY;
            }
        }
    }
}

/// The call of `target` at `address`; `None` where it is too far.
pub fn call(address: u64, target: u64) -> Option<[u8; CALL]> {
    let distance = target.wrapping_sub(address.wrapping_add(CALL as u64)) as i64;
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([0xe8, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    struct Words(BTreeMap<u64, u64>);

    impl TableMemory for Words {
        fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
            let table = gpa.0 & ADDRESS;
            let there = (0x1000..0x5000).contains(&table);
            there.then(|| self.0.get(&gpa.0).copied().unwrap_or(0))
        }

        fn entry_u32(&self, _: Gpa) -> Option<u32> {
            None
        }
    }

    /// A kernel of one large page at `IMAGE` + 16 MiB; the last entry of its gigabyte is taken.
    fn kernel() -> Words {
        Words(
            [
                (0x1ff8, 0x2063),
                (0x2ff0, 0x3063),
                (0x3040, 0x100_00e1),
                (0x3ff8, 0x4063),
            ]
            .into(),
        )
    }

    #[test]
    fn the_stub_lies_where_nothing_is() {
        let mut kernel = kernel();
        let place = Place::find(&kernel, 0x1fff).unwrap();
        assert_eq!(place.entry, 0x3ff0);
        assert_eq!(place.stub, 0xffff_ffff_bfc0_0000);
        assert_eq!(physical(&kernel, 0x1000, place.stub), None);
        kernel.0.insert(place.entry, Place::link(0x4000));
        let mut table = [0; 512];
        place.fill(&mut table, [0x812_3000, 0x812_4000]);
        for (n, entry) in (0..).zip(table) {
            kernel.0.insert(0x4000 + n * 8, entry);
        }
        assert_eq!(physical(&kernel, 0x1000, place.stub + 5), Some(0x812_3005));
        assert_eq!(physical(&kernel, 0x1000, place.stub + PAGE), Some(0x812_4000));
        assert_eq!(physical(&kernel, 0x1000, place.stub + 2 * PAGE), None);
        assert_eq!(physical(&kernel, 0x1000, IMAGE + 0x100_1234), Some(0x100_1234));
        // What is taken now is not found again.
        assert_eq!(Place::find(&kernel, 0x1000).unwrap().entry, 0x3fe8);
    }

    #[test]
    fn a_full_gigabyte_has_no_place() {
        let mut kernel = kernel();
        for n in 0..512 {
            kernel.0.entry(0x3000 + n * 8).or_insert(0x63);
        }
        assert_eq!(Place::find(&kernel, 0x1000), None);
        assert_eq!(Place::find(&Words(BTreeMap::new()), 0x1000), None);
        assert_eq!(Place::find(&Words(BTreeMap::new()), 0x9000), None);
        let mut whole = self::kernel();
        whole.0.insert(0x2ff0, 0xe3);
        assert_eq!(Place::find(&whole, 0x1000), None);
    }

    #[test]
    fn a_slide_is_whole_large_pages() {
        let linked = 0xffff_ffff_81c0_0080;
        assert_eq!(slide(linked, linked), Some(0));
        assert_eq!(slide(linked + 7 * LARGE, linked), Some(7 * LARGE));
        assert_eq!(slide(linked + PAGE, linked), None);
        assert_eq!(slide(linked - LARGE, linked), None);
        assert_eq!(slide(linked + GIGABYTE, linked), None);
    }

    #[test]
    fn a_call_says_how_far_it_is() {
        let at = 0xffff_ffff_8100_1000;
        assert_eq!(call(at, at + 5), Some([0xe8, 0, 0, 0, 0]));
        assert_eq!(call(at, at), Some([0xe8, 0xfb, 0xff, 0xff, 0xff]));
        assert_eq!(
            call(at, IMAGE + GIGABYTE - 1),
            Some([0xe8, 0xfa, 0xef, 0xff, 0x3e])
        );
        assert_eq!(call(at, 0xffff_8880_0000_0000), None);
    }
}
