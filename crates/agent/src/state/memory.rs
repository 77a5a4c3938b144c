//! Slots: as the VMM set them, and cut where pages of them are watched.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use libc::c_int;
use vmsight_hooks::{Access, HookKind};

use super::State;
use super::means::Means;
use super::patches::Patch;
use crate::agent::Agent;
use crate::guest::Guest;
use crate::kvm;
use crate::slots::{PAGE, Piece, Protection, Slot, cut};

impl State {
    pub(super) fn protections(&self) -> BTreeMap<u64, Protection> {
        let mut pages = BTreeMap::new();
        for (armed, means) in self.hooks.values() {
            let (Means::Pages(parts), HookKind::Memory { access, .. }) = (means, armed.hook.kind) else {
                continue;
            };
            let protection = if access.contains(Access::READ) {
                Protection::All
            } else {
                Protection::Writes
            };
            for (gpa, ..) in parts {
                let page = pages.entry(gpa & !(PAGE - 1)).or_insert(protection);
                *page = protection.max(*page);
            }
        }
        pages
    }

    /// Cuts slots so that watched pages are slots of their own.
    pub(super) fn cut(&mut self, agent: &Agent, pages: &BTreeMap<u64, Protection>) -> io::Result<()> {
        let mut result = Ok(());
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        for slot in slots {
            let wanted = cut(&slot, pages);
            let whole = [Piece {
                gpa: slot.gpa,
                size: slot.size,
                hva: slot.hva,
                flags: slot.flags,
            }];
            let current: Vec<Piece> = match self.pieces.get(&slot.id) {
                Some(pieces) => pieces.iter().map(|(_, p)| *p).collect(),
                None => whole.to_vec(),
            };
            if wanted == current {
                continue;
            }
            let changed = self.recut(agent, &slot, &wanted);
            if changed.is_err() {
                result = changed;
                // As the VMM made it: that was possible before.
                let _ = self.recut(agent, &slot, &whole);
            }
        }
        result
    }

    /// Replaces what stands for a slot by these pieces.
    fn recut(&mut self, agent: &Agent, slot: &Slot, wanted: &[Piece]) -> io::Result<()> {
        let set = |id: u32, piece: &Piece, size: u64| {
            kvm::set_memory(
                agent.vm,
                &kvm_userspace_memory_region {
                    slot: id,
                    flags: piece.flags,
                    guest_phys_addr: piece.gpa,
                    memory_size: size,
                    userspace_addr: piece.hva,
                },
            )
        };
        let whole = Piece {
            gpa: slot.gpa,
            size: slot.size,
            hva: slot.hva,
            flags: slot.flags,
        };
        for (id, piece) in self
            .pieces
            .remove(&slot.id)
            .unwrap_or_else(|| vec![(slot.id, whole)])
        {
            set(id, &piece, 0)?;
        }
        let mut used: BTreeSet<u32> = self.slots.keys().copied().collect();
        used.extend(self.pieces.values().flatten().map(|(id, _)| *id));
        used.extend(self.window.iter().flat_map(|window| window.ids()));
        // Numbers from the top down: VMMs count from the bottom.
        let space = slot.id & !0xffff;
        let mut next = agent.kernel.slots.min(0x8000);
        let mut made = Vec::new();
        for (n, piece) in wanted.iter().enumerate() {
            let id = if n == 0 {
                Some(slot.id)
            } else {
                loop {
                    match next.checked_sub(1) {
                        None => break None,
                        Some(id) => {
                            next = id;
                            if !used.contains(&(space | id)) {
                                break Some(space | id);
                            }
                        }
                    }
                }
            };
            let done = match id {
                Some(id) => set(id, piece, piece.size).map(|()| id),
                None => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            };
            match done {
                Ok(id) => made.push((id, *piece)),
                Err(error) => {
                    self.pieces.insert(slot.id, made);
                    return Err(error);
                }
            }
        }
        if wanted != [whole] {
            self.pieces.insert(slot.id, made);
        }
        Ok(())
    }

    /// The VMM sets a slot.
    pub(crate) fn set_memory(&mut self, agent: &Agent, slot: Slot, real: impl FnOnce() -> c_int) -> c_int {
        if self.hooks.is_empty() {
            let result = real();
            if result >= 0 {
                self.note(slot);
                // Where a table names memory, it must not name what the VMM takes away next.
                if !agent.table().slots.is_empty() {
                    let slots = self.all_slots();
                    agent.publish(self.table(slots, BTreeMap::new()));
                }
            }
            return result;
        }
        let stopped = agent.stop();
        // What is ours goes out of the slot before the VMM changes it, and all cuts with it: the VMM may use their
        // numbers.
        let old = self.slots.get(&slot.id).copied();
        let _ = self.cut(agent, &BTreeMap::new());
        let slots: Vec<Slot> = self.slots.values().copied().collect();
        let guest = Guest::new(&slots);
        let leaves = |gpa: u64| old.is_some_and(|o| o.hva(gpa, 1).is_some());
        let there: Vec<(u64, Patch)> = self.patches.iter().map(|(g, p)| (*g, *p)).collect();
        for (gpa, patch) in there.into_iter().filter(|(gpa, _)| leaves(*gpa)) {
            self.restore(&guest, gpa, patch);
            self.patches.remove(&gpa);
        }
        self.divert_no_more(&guest, leaves);
        let result = real();
        // errno is the caller's answer, and what follows would overwrite it.
        let error = io::Error::last_os_error();
        if result >= 0 {
            if slot.is_logged() && !old.is_some_and(|o| o.is_logged()) && self.touches(&slot) {
                agent.tell_all("the VMM keeps account of writes (a migration, a snapshot): hooks in that memory rest meanwhile");
            }
            self.note(slot);
        }
        if let Err(error) = self.reconcile(agent) {
            agent.tell_all(&format!(
                "a hook could not be kept as the VMM changed its memory: {error}"
            ));
        }
        drop(stopped);
        if result < 0 {
            crate::errno::set(error.raw_os_error().unwrap_or(libc::EINVAL));
        }
        result
    }

    /// Whether a hook is in this slot.
    fn touches(&self, slot: &Slot) -> bool {
        let inside = |gpa: u64| slot.hva(gpa, 1).is_some();
        self.hooks.values().any(|(_, means)| match means {
            Means::Breakpoints(_) => means.int3s().any(inside),
            Means::Detour(detour) => inside(detour.gpa),
            Means::Pages(parts) => parts.iter().any(|(gpa, ..)| inside(*gpa)),
            Means::Plain => false,
        })
    }

    fn note(&mut self, slot: Slot) {
        if slot.size == 0 {
            self.slots.remove(&slot.id);
        } else {
            self.slots.insert(slot.id, slot);
        }
    }
}
