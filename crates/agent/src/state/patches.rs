//! INT3s in the guest's memory, and what stood there before.

use std::collections::{BTreeMap, BTreeSet};

use super::State;
use crate::guest::Guest;
use crate::slots::Slot;

/// INT3.
const BREAKPOINT: u8 = 0xcc;

/// An INT3 that stands in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patch {
    pub(super) original: u8,
    /// What stood around it, 8 bytes at the aligned address, with the original: where that changed, the page has
    /// become something else, and nothing is put back.
    around: u64,
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
                restore(guest, gpa, patch, &self.patches);
                self.patches.remove(&gpa);
            }
        }
        for gpa in wanted {
            if self.patches.contains_key(&gpa) {
                continue;
            }
            let (Some(original), Some(around)) = (guest.read(gpa, 1), around(guest, gpa, &self.patches))
            else {
                continue;
            };
            if guest.write(gpa, 1, BREAKPOINT.into()) {
                let original = original as u8;
                self.patches.insert(gpa, Patch { original, around });
            }
        }
    }
}

/// The 8 aligned bytes around an address, with the originals of all INT3s in them.
fn around(guest: &Guest<'_>, gpa: u64, patches: &BTreeMap<u64, Patch>) -> Option<u64> {
    let start = gpa & !7;
    let mut value = guest.read(start, 8)?;
    for (at, patch) in patches.range(start..start + 8) {
        let shift = 8 * (at - start);
        value = value & !(0xff << shift) | u64::from(patch.original) << shift;
    }
    Some(value)
}

/// Puts the original byte back, if the page is still the one that was patched.
pub(super) fn restore(guest: &Guest<'_>, gpa: u64, patch: Patch, patches: &BTreeMap<u64, Patch>) {
    let still = guest.read(gpa, 1) == Some(BREAKPOINT.into());
    if still && around(guest, gpa, patches) == Some(patch.around) {
        guest.write(gpa, 1, patch.original.into());
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
        guest.write(0x80, 8, 0x1122_3344_5566_77cc);
        guest.write(0x100, 1, 0x90);
        state.hooks.clear();
        state.patch(&guest);
        assert_eq!(guest.read(0x80, 8), Some(0x1122_3344_5566_77cc));
        assert_eq!(guest.read(0x100, 1), Some(0x90));
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
