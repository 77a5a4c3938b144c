//! INT3s in the guest's memory, and what stood there before.

use std::collections::BTreeSet;

use super::State;
use crate::guest::Guest;
use crate::inside::replaced;
use crate::slots::Slot;
use crate::step::BREAKPOINT;

/// Bytes that are compared before one is put back.
const LINE: usize = 64;

/// An INT3 that stands in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patch {
    pub(super) original: u8,
    /// What stood around it, at the aligned address, without what is ours. A kernel changes an instruction of its own here and there
    /// (jump labels, ftrace): then it is the same code still. Where most of it is something else, so is the page, and nothing is
    /// put back.
    around: [u8; LINE],
}

impl State {
    /// Puts INT3s where they should be, and takes out the others.
    pub(super) fn patch(&mut self, guest: &Guest<'_>) {
        let loggable = |gpa: u64| guest.slot(gpa, 1).is_none_or(Slot::is_logged);
        let wanted: BTreeSet<u64> = self
            .hooks
            .values()
            .flat_map(|(_, means)| means.int3s())
            .filter(|gpa| !loggable(*gpa))
            .collect();
        let there: Vec<(u64, Patch)> = self.patches.iter().map(|(gpa, p)| (*gpa, *p)).collect();
        for (gpa, patch) in there {
            if !wanted.contains(&gpa) {
                self.restore(guest, gpa, patch);
                self.patches.remove(&gpa);
            }
        }
        for gpa in wanted {
            if self.patches.contains_key(&gpa) {
                continue;
            }
            let (Some(original), Some(around)) = (guest.read(gpa, 1), self.around(guest, gpa)) else {
                continue;
            };
            if guest.write(gpa, 1, BREAKPOINT) {
                let original = original as u8;
                self.patches.insert(gpa, Patch { original, around });
            }
        }
    }

    /// Puts the original byte back, if the page is still the one that was patched.
    pub(super) fn restore(&self, guest: &Guest<'_>, gpa: u64, patch: Patch) {
        if guest.read(gpa, 1) != Some(BREAKPOINT) {
            return;
        }
        let Some(now) = self.around(guest, gpa) else {
            return;
        };
        let same = now.iter().zip(&patch.around).filter(|(a, b)| a == b).count();
        if 2 * same > LINE {
            guest.write(gpa, 1, patch.original.into());
        }
    }

    /// What stands at an address without what is ours, where something is.
    fn original(&self, gpa: u64) -> Option<u8> {
        let patch = self.patches.get(&gpa).map(|patch| patch.original);
        patch.or_else(|| replaced(&self.detours, |detour| detour.original, gpa))
    }

    /// The bytes around an address as they are without our INT3s and jumps.
    fn around(&self, guest: &Guest<'_>, gpa: u64) -> Option<[u8; LINE]> {
        let start = gpa & !(LINE as u64 - 1);
        let mut line = [0; LINE];
        for (at, word) in (start..).step_by(8).zip(line.chunks_exact_mut(8)) {
            word.copy_from_slice(&guest.read(at, 8)?.to_le_bytes());
        }
        for (at, byte) in (start..).zip(&mut line) {
            *byte = self.original(at).unwrap_or(*byte);
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmsight_hooks::{Hook, HookId};

    use super::super::means::{Breakpoint, Means, Place};
    use super::*;
    use crate::session::Session;
    use crate::table::Armed;

    fn memory() -> (Vec<u64>, [Slot; 1]) {
        let memory: Vec<u64> = (0..512).map(|i| (i & 0xff) * 0x0101_0101_0101_0101).collect();
        let slot = Slot {
            id: 0,
            flags: 0,
            gpa: 0,
            size: 4096,
            hva: memory.as_ptr() as u64,
            foreign: false,
        };
        (memory, [slot])
    }

    fn int3(state: &mut State, id: u32, gpa: u64) {
        let hook = Hook::execute(vmsight_arch::Gva(gpa));
        let (session, _file) = Session::new(1).unwrap();
        let armed = Arc::new(Armed::new(HookId(id), Arc::new(session), hook));
        let breakpoint = Breakpoint {
            at: gpa,
            place: Place::Int3(gpa),
            vector: None,
        };
        state
            .hooks
            .insert(HookId(id), (armed, Means::Breakpoints(vec![breakpoint])));
    }

    #[test]
    fn patches_come_and_go_in_any_order() {
        let (memory, slots) = memory();
        let before = memory.clone();
        let guest = Guest::new(&slots);
        let mut state = State::default();
        // Three in one word, one of them hooked twice.
        for (id, gpa) in [(1, 0x41), (2, 0x42), (3, 0x47), (4, 0x42)] {
            int3(&mut state, id, gpa);
        }
        state.patch(&guest);
        for gpa in [0x41, 0x42, 0x47] {
            assert_eq!(guest.read(gpa, 1), Some(0xcc));
        }
        state.hooks.remove(&HookId(2));
        state.patch(&guest);
        assert_eq!(guest.read(0x42, 1), Some(0xcc), "another hook is still there");
        state.hooks.remove(&HookId(1));
        state.patch(&guest);
        assert_eq!(guest.read(0x41, 1), Some(0x08));
        state.hooks.clear();
        state.patch(&guest);
        assert_eq!(memory, before);
    }

    #[test]
    fn a_page_that_became_another_is_left_alone() {
        let (memory, slots) = memory();
        let guest = Guest::new(&slots);
        let mut state = State::default();
        int3(&mut state, 1, 0x80);
        int3(&mut state, 2, 0x100);
        state.patch(&guest);
        // Code of somebody else, with an INT3 of his own at the same place; and one that is overwritten.
        for word in 1..8 {
            guest.write(0x80 + 8 * word, 8, 0x1122_3344_5566_7788);
        }
        guest.write(0x80, 8, 0x1122_3344_5566_77cc);
        guest.write(0x100, 1, 0x90);
        state.hooks.clear();
        state.patch(&guest);
        assert_eq!(guest.read(0x80, 8), Some(0x1122_3344_5566_77cc));
        assert_eq!(guest.read(0x100, 1), Some(0x90));
        drop(memory);
    }

    #[test]
    fn code_that_its_kernel_changes_near_by_is_put_back() {
        let (memory, slots) = memory();
        let guest = Guest::new(&slots);
        let mut state = State::default();
        int3(&mut state, 1, 0x83);
        state.patch(&guest);
        // The call of a tracer in the guest, right behind it.
        for (i, byte) in [0xe8, 1, 2, 3, 4].into_iter().enumerate() {
            guest.write(0x84 + i as u64, 1, byte);
        }
        state.hooks.clear();
        state.patch(&guest);
        assert_eq!(guest.read(0x83, 6), Some(0x0403_0201_e810));
        drop(memory);
    }

    #[test]
    fn memory_whose_writes_are_logged_holds_no_patches() {
        let (memory, mut slots) = memory();
        let mut state = State::default();
        int3(&mut state, 1, 0x80);
        state.patch(&Guest::new(&slots));
        assert_eq!(memory[16] & 0xff, 0xcc);
        slots[0].flags = kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
        state.patch(&Guest::new(&slots));
        assert_eq!(memory[16] & 0xff, 0x10);
        slots[0].flags = 0;
        state.patch(&Guest::new(&slots));
        assert_eq!(memory[16] & 0xff, 0xcc);
    }
}
