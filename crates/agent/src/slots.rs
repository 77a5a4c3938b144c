//! Slots of guest memory, and how they are cut where pages of them are watched.

use std::collections::BTreeMap;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// A slot as the VMM set it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot {
    /// Its number; the address space (0, or 1 in system-management mode) in the upper half.
    pub(crate) id: u32,
    pub(crate) flags: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    /// Where it lies in the VMM.
    pub(crate) hva: u64,
    /// Set by the request that knows files of confidential memory: such slots are left alone.
    pub(crate) foreign: bool,
}

impl Slot {
    /// Whether all of `len` bytes from `gpa` on are in it, and where the first lies in the VMM.
    pub(crate) fn hva(&self, gpa: u64, len: u64) -> Option<u64> {
        let offset = gpa.checked_sub(self.gpa)?;
        (offset.checked_add(len)? <= self.size).then(|| self.hva.wrapping_add(offset))
    }

    /// Whether the VMM keeps account of the pages that are written: for a migration, or a screen.
    pub(crate) fn is_logged(&self) -> bool {
        self.flags & KVM_MEM_LOG_DIRTY_PAGES != 0
    }
}

/// What is taken from the guest on a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Protection {
    /// Writes: the slot is read-only.
    Writes,
    /// Reads and writes: there is no slot.
    All,
}

/// A part of a slot that is set as a slot of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) hva: u64,
    pub(crate) flags: u32,
}

/// Cuts a slot along watched pages, given by the address of their first byte. Where none is in it, it stays one piece. Slots
/// whose writes are logged, or that are foreign, are not cut.
pub(crate) fn cut(slot: &Slot, pages: &BTreeMap<u64, Protection>) -> Vec<Piece> {
    let end = slot.gpa.saturating_add(slot.size);
    let mut pieces = Vec::new();
    let mut push = |from: u64, to: u64, flags: u32| {
        if from < to {
            pieces.push(Piece {
                gpa: from,
                size: to - from,
                hva: slot.hva.wrapping_add(from - slot.gpa),
                flags,
            });
        }
    };
    let mut at = slot.gpa;
    if !slot.is_logged() && !slot.foreign {
        let first = slot.gpa & !(PAGE - 1);
        let mut watched = pages.range(first..end).peekable();
        while let Some((&page, &protection)) = watched.next() {
            // Writes to a read-only slot come to the VMM anyway, and never change it.
            if protection == Protection::Writes && slot.flags & KVM_MEM_READONLY != 0 {
                continue;
            }
            let from = page.max(slot.gpa);
            let mut to = page.saturating_add(PAGE);
            while let Some((&next, _)) = watched.next_if(|&(&next, &p)| next == to && p == protection) {
                to = next.saturating_add(PAGE);
            }
            let to = to.min(end);
            push(at, from, slot.flags);
            if protection == Protection::Writes {
                push(from, to, slot.flags | KVM_MEM_READONLY);
            }
            at = to;
        }
    }
    push(at, end, slot.flags);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: Slot = Slot {
        id: 3,
        flags: 0,
        gpa: 0x10_0000,
        size: 0x10_0000,
        hva: 0x7f00_0000_0000,
        foreign: false,
    };

    fn pages(list: &[(u64, Protection)]) -> BTreeMap<u64, Protection> {
        list.iter().copied().collect()
    }

    fn ranges(pieces: &[Piece]) -> Vec<(u64, u64, u32)> {
        for p in pieces {
            assert_eq!(
                p.hva - RAM.hva,
                p.gpa - RAM.gpa,
                "the same memory at the same place"
            );
        }
        pieces.iter().map(|p| (p.gpa, p.gpa + p.size, p.flags)).collect()
    }

    use Protection::{All, Writes};
    const RO: u32 = KVM_MEM_READONLY;

    #[test]
    fn a_slot_nobody_watches_stays_whole() {
        let whole = [(0x10_0000, 0x20_0000, 0)];
        assert_eq!(ranges(&cut(&RAM, &pages(&[]))), whole);
        // Its neighbours' pages are not its own.
        let around = pages(&[(0xf_f000, Writes), (0x20_0000, Writes)]);
        assert_eq!(ranges(&cut(&RAM, &around)), whole);
    }

    #[test]
    fn pages_are_cut_out_and_neighbours_kept_together() {
        let watched = pages(&[
            (0x11_0000, Writes),
            (0x11_1000, Writes),
            (0x11_2000, All),
            (0x18_0000, Writes),
        ]);
        assert_eq!(
            ranges(&cut(&RAM, &watched)),
            [
                (0x10_0000, 0x11_0000, 0),
                (0x11_0000, 0x11_2000, RO),
                (0x11_3000, 0x18_0000, 0),
                (0x18_0000, 0x18_1000, RO),
                (0x18_1000, 0x20_0000, 0),
            ]
        );
        // The first and the last page.
        let ends = pages(&[(0x10_0000, Writes), (0x1f_f000, All)]);
        assert_eq!(
            ranges(&cut(&RAM, &ends)),
            [(0x10_0000, 0x10_1000, RO), (0x10_1000, 0x1f_f000, 0)]
        );
        // Nothing is left of a slot that is watched whole.
        let one = Slot { size: PAGE, ..RAM };
        assert_eq!(ranges(&cut(&one, &pages(&[(0x10_0000, All)]))), []);
    }

    #[test]
    fn logged_and_foreign_slots_are_left_alone() {
        let watched = pages(&[(0x11_0000, All)]);
        let logged = Slot {
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            ..RAM
        };
        assert_eq!(cut(&logged, &watched).len(), 1);
        let foreign = Slot { foreign: true, ..RAM };
        assert_eq!(cut(&foreign, &watched).len(), 1);
        let rom = Slot { flags: RO, ..RAM };
        assert_eq!(cut(&rom, &pages(&[(0x11_0000, Writes)])).len(), 1);
        assert_eq!(cut(&rom, &watched).len(), 2);
    }

    #[test]
    fn addresses_at_the_end_of_the_space_do_not_wrap() {
        let last = Slot {
            gpa: u64::MAX - 0x1fff,
            size: 0x1fff,
            ..RAM
        };
        let pieces = cut(
            &last,
            &pages(&[(u64::MAX - 0xfff, Writes), (u64::MAX - 0x1fff, All)]),
        );
        assert_eq!(pieces.len(), 1);
        assert_eq!(RAM.hva(0x1f_fff8, 8), Some(RAM.hva + 0xf_fff8));
        assert_eq!(RAM.hva(0x1f_fff9, 8), None);
        assert_eq!(RAM.hva(0xf_ffff, 1), None);
        assert_eq!(RAM.hva(0x10_0000, u64::MAX), None);
    }
}
