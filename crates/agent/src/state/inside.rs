//! Hooks whose filters are judged in the guest: jumps in its memory, and where they lead.

use vmsight_arch::Registers;
use vmsight_arch::paging::PagingMode;
use vmsight_hooks::{Hook, HookKind};

use super::State;
use super::means::{Means, Place, USER_ROOT};
use crate::agent::Agent;
use crate::guest::Guest;
use crate::inside::{JUMP, Placed, Window, displaced, jump};
use crate::slots::{PAGE, Slot};

/// The longest instruction.
const LONGEST: u64 = 15;

/// An instruction that a jump is put in place of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Detour {
    /// Its virtual address …
    pub(super) at: u64,
    /// … and the physical one.
    pub(super) gpa: u64,
    pub(super) original: [u8; JUMP],
    jump: [u8; JUMP],
    pub(super) placed: Placed,
}

/// As [`Guest::write`] takes it.
fn number(bytes: [u8; JUMP]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl State {
    /// The memory that the guest has, with what of it is ours.
    pub(super) fn all_slots(&self) -> Vec<Slot> {
        let ours = self.window.iter().flat_map(Window::slots);
        self.slots.values().copied().chain(ours).collect()
    }

    /// Makes what a hook needs whose filter is to be judged inside; why it cannot be otherwise. All vCPUs are out of the guest.
    pub(super) fn detour(&mut self, agent: &Agent, hook: &Hook, room: u64) -> Result<Means, String> {
        let HookKind::Execute { at } = hook.kind else {
            return Err("only executions have a filter inside".to_owned());
        };
        let at = at.0;
        let gpa = self
            .translate(agent, at, hook.scope)
            .ok_or_else(|| format!("nothing is mapped at {at:#x}"))?;
        if self.breaks_within(at, gpa, JUMP as u64) {
            return Err("another hook is on this instruction, and a filter inside needs it alone".to_owned());
        }
        if at & (PAGE - 1) > PAGE - JUMP as u64 {
            return Err("the instruction is on two pages".to_owned());
        }
        let slots = self.all_slots();
        let guest = Guest::new(&slots);
        let slot = guest.slot(gpa, JUMP as u64).ok_or("there is no memory there")?;
        if slot.is_logged() {
            return Err("a jump would get into the migration or snapshot that is being made".to_owned());
        }
        let len = LONGEST.min(PAGE - (gpa & (PAGE - 1)));
        let bytes: Option<Vec<u8>> = (gpa..gpa + len)
            .map(|gpa| guest.read(gpa, 1).map(|byte| byte as u8))
            .collect();
        let bytes = bytes.ok_or("there is no memory there")?;
        let original = *bytes
            .first_chunk::<JUMP>()
            .ok_or("the instruction is on two pages")?;
        let displaced = displaced(&bytes, at).ok_or(
            "the instruction there cannot be done elsewhere: it takes a NOP, a call or a jump of 5 bytes, as functions that can be traced begin with",
        )?;
        self.open_window(agent)?;
        let slots = self.all_slots();
        let guest = Guest::new(&slots);
        let roots = Self::roots(agent, &guest, at, gpa);
        let window = self.window.as_mut().ok_or("there is no room inside")?;
        window.map(&guest, &roots, room, !self.detours.is_empty())?;
        let placed = window.place(at, displaced, hook.scope, hook.filter.condition())?;
        let jump = jump(at, placed.entry).ok_or("the place for filters is more than 2 GiB away")?;
        Ok(Means::Detour(Detour {
            at,
            gpa,
            original,
            jump,
            placed,
        }))
    }

    /// The roots of all vCPUs' tables by which the instruction is where it was found. With page-table isolation those of the kernel,
    /// where its code is executed.
    fn roots(agent: &Agent, guest: &Guest<'_>, at: u64, gpa: u64) -> Vec<(Registers, u64)> {
        let registers = Self::registers(agent);
        let own = |r: Registers| {
            let mut roots = [r.cr3 & !USER_ROOT, r.cr3].into_iter();
            let root = roots.find(|root| guest.translate_by(&r, *root, at) == Some(gpa))?;
            Some((r, root))
        };
        // One that has not begun yet has no tables.
        let begun = registers
            .into_iter()
            .filter(|r| PagingMode::from_registers(r).is_some());
        begun.filter_map(own).collect()
    }

    fn open_window(&mut self, agent: &Agent) -> Result<(), String> {
        if self.window.is_some() {
            return Ok(());
        }
        let mut free = (0..agent.kernel.slots.min(0x8000)).rev();
        let mut id = || free.find(|id| !self.slots.contains_key(id) && !self.is_piece(*id));
        let ids = [id(), id()].map(|id| id.ok_or("KVM has no more slots of memory"));
        let [first, second] = ids;
        let window = Window::new(agent, [first?, second?])
            .map_err(|error| format!("the guest cannot be given memory for it: {error}"))?;
        self.window = Some(window);
        Ok(())
    }

    fn is_piece(&self, id: u32) -> bool {
        self.pieces.values().flatten().any(|(piece, _)| *piece == id)
    }

    /// Whether a hook has a breakpoint in these bytes, by this address or by another one of the same memory.
    fn breaks_within(&self, at: u64, gpa: u64, len: u64) -> bool {
        self.hooks.values().any(|(_, means)| match means {
            Means::Breakpoints(list) => list.iter().any(|b| {
                let same = matches!(b.place, Place::Int3(place) if place.wrapping_sub(gpa) < len);
                same || b.at.wrapping_sub(at) < len
            }),
            Means::Detour(detour) => detour.gpa.abs_diff(gpa) < len || detour.at.abs_diff(at) < len,
            _ => false,
        })
    }

    /// Whether an instruction was replaced by a jump. `offset` says how far it is from one.
    pub(super) fn is_replaced(&self, offset: impl Fn(&Detour) -> u64) -> bool {
        let mut detours = self.hooks.values().filter_map(|(_, means)| means.detour());
        detours.any(|detour| offset(detour) < JUMP as u64)
    }

    /// Puts jumps where they should be, and takes out the others. Where writes are logged there are none.
    pub(super) fn divert(&mut self, guest: &Guest<'_>) {
        let wanted: Vec<Detour> = self
            .hooks
            .values()
            .filter_map(|(_, means)| means.detour())
            .filter(|d| {
                guest
                    .slot(d.gpa, JUMP as u64)
                    .is_some_and(|slot| !slot.is_logged())
            })
            .copied()
            .collect();
        let there: Vec<Detour> = self.detours.values().copied().collect();
        for detour in there.iter().filter(|d| !wanted.contains(d)) {
            self.undo(guest, detour);
        }
        for detour in wanted {
            if self.detours.contains_key(&detour.gpa) {
                continue;
            }
            let len = JUMP as u8;
            if guest.read(detour.gpa, len) == Some(number(detour.original))
                && guest.write(detour.gpa, len, number(detour.jump))
            {
                if let Some(window) = &self.window {
                    window.set_trap(&detour.placed, true);
                }
                self.detours.insert(detour.gpa, detour);
            }
        }
    }

    /// Takes the jumps out of a slot that the VMM changes.
    pub(super) fn divert_no_more(&mut self, guest: &Guest<'_>, leaves: impl Fn(u64) -> bool) {
        let there: Vec<Detour> = self.detours.values().copied().collect();
        for detour in there.iter().filter(|d| leaves(d.gpa)) {
            self.undo(guest, detour);
        }
    }

    /// Puts the instruction back, if the page is still the one that was changed. Who is behind the jump goes on there, and stops no more.
    fn undo(&mut self, guest: &Guest<'_>, detour: &Detour) {
        let len = JUMP as u8;
        if guest.read(detour.gpa, len) == Some(number(detour.jump)) {
            guest.write(detour.gpa, len, number(detour.original));
        }
        if let Some(window) = &self.window {
            window.set_trap(&detour.placed, false);
        }
        self.detours.remove(&detour.gpa);
    }
}
