//! Hooks come and go.

use std::sync::Arc;

use vmsight_arch::Gva;
use vmsight_arch::paging::PagingMode;
use vmsight_hooks::{BackendKind, Delivery, Detail, Hook, HookId, HookKind, Scope, StepEnd};
use vmsight_memory::AddressSpace;
use vmsight_target::gdb::{GdbError, Point};

use super::occasion::{Occasion, Run, Tell};
use super::of_stub;
use super::table::{Armed, Kept, Place, Shared, places};
use super::worker::{State, Worker, is_fatal_target};
use crate::EventError;

impl Worker {
    pub(super) fn arm(&mut self, hook: Hook) -> Result<HookId, EventError> {
        let limit = |why: String| EventError::Limit {
            backend: BackendKind::GdbStub,
            what: hook.kind.to_string(),
            why,
        };
        let step = match hook.kind {
            HookKind::Step { vcpu, count } => Some((vcpu, count)),
            HookKind::StepUntil { vcpu, most } => Some((vcpu, most)),
            _ => None,
        };
        if let Some((vcpu, _)) = step
            && vcpu >= self.debug.vcpus()
        {
            return Err(limit(format!("there are {} vCPUs", self.debug.vcpus())));
        }
        let places = places(&hook, self.debug.accelerator()).map_err(limit)?;
        self.stand()?;
        if let Some((vcpu, _)) = step
            && self.debug.is_halted(vcpu).map_err(of_stub)?
        {
            return Err(limit(format!(
                "vCPU {vcpu} sleeps in HLT, and nothing wakes it while the others stand still"
            )));
        }
        let id = HookId(self.last.wrapping_add(1));
        for (done, place) in places.iter().enumerate() {
            if let Err(error) = self.insert(*place, id) {
                for place in places.iter().take(done) {
                    self.take_out(*place, id)?;
                }
                return Err(match error {
                    EventError::Target(error) if !is_fatal_target(&error) => limit(error.to_string()),
                    error => error,
                });
            }
        }
        self.last = id.0;
        let mut armed = Armed::new(hook);
        if let (true, Some((start, len, _))) = (armed.keeps(), armed.memory()) {
            for vcpu in 0..self.debug.vcpus() {
                let registers = self.debug.registers(vcpu).map_err(of_stub)?;
                if !armed.hook.scope.covers(registers.cr3) {
                    continue;
                }
                armed.before = self.bytes_now(&registers, start, len)?;
                if armed.before.is_some() {
                    break;
                }
            }
            if armed.before.is_none() {
                armed.before = self.bytes_elsewhere(armed.hook.scope, start, len)?;
            }
        }
        self.queue.know(id, Arc::clone(&armed.sieve));
        self.table.hooks.insert(id, armed);
        if let Some((vcpu, count)) = step {
            let mut occasion = Occasion::new(self.debug.registers(vcpu).map_err(of_stub)?);
            let run = Run::new(id, count);
            occasion.steps.push(run);
            // What stands in front of a breakpoint would step over it unseen; one that is told of already is in the
            // list.
            let listed = self.occasions.iter_mut().find(|o| o.registers.vcpu == vcpu);
            match listed {
                Some(listed) => listed.steps.push(run),
                None => {
                    self.meet(&mut occasion);
                    self.occasions.push_back(occasion);
                }
            }
        }
        Ok(id)
    }

    /// The bytes of memory in an address space that no vCPU has now.
    fn bytes_elsewhere(&mut self, scope: Scope, start: u64, len: u64) -> Result<Option<Kept>, EventError> {
        let Scope::Dtb(dtb) = scope else {
            return Ok(None);
        };
        let registers = self.debug.registers(0).map_err(of_stub)?;
        let Some(mode) = PagingMode::from_registers(&registers) else {
            return Ok(None);
        };
        let space = AddressSpace::new(self.memory.clone(), mode, dtb);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        // What is not there yet has no old value.
        Ok(space.read(Gva(start), &mut bytes).is_ok().then(|| Kept {
            dtb: Armed::space(start, dtb.0),
            bytes,
        }))
    }

    /// An event without anything that happened: the machine stands for it.
    pub(super) fn halt(&mut self, delivery: Delivery) -> Result<HookId, EventError> {
        self.stand()?;
        let registers = self.debug.registers(0).map_err(of_stub)?;
        let id = HookId(self.last.wrapping_add(1));
        self.last = id.0;
        let hook = Hook::new(HookKind::Step { vcpu: 0, count: 1 }).delivered(delivery);
        self.table.hooks.insert(id, Armed::new(hook));
        let mut occasion = Occasion::new(registers);
        occasion.tell.push_back(Tell {
            hook: id,
            detail: Detail::Step {
                rip: Gva(occasion.registers.rip),
                made: 0,
                end: StepEnd::Count,
            },
            undo: None,
            passed: false,
        });
        self.occasions.push_back(occasion);
        Ok(id)
    }

    pub(super) fn insert(&mut self, place: Place, id: HookId) -> Result<(), EventError> {
        if let Some(shared) = self.table.places.get_mut(&place) {
            shared.hooks.push(id);
            return Ok(());
        }
        let mut failure = None;
        for point in place.points(self.debug.accelerator()) {
            // Some vCPU's page tables have it mapped, if any do.
            for vcpu in 0..self.debug.vcpus() {
                match self.debug.insert(vcpu, *point, place.address, place.len) {
                    Ok(()) => {
                        let shared = Shared {
                            point: *point,
                            vcpu,
                            hooks: vec![id],
                        };
                        self.table.places.insert(place, shared);
                        return Ok(());
                    }
                    Err(error @ GdbError::Refused { .. }) => failure = Some(error),
                    Err(error) => return Err(of_stub(error)),
                }
            }
        }
        Err(failure.map_or(EventError::Gone, of_stub))
    }

    pub(super) fn take_out(&mut self, place: Place, id: HookId) -> Result<(), EventError> {
        let Some(shared) = self.table.places.get_mut(&place) else {
            return Ok(());
        };
        shared.hooks.retain(|hook| *hook != id);
        if !shared.hooks.is_empty() {
            return Ok(());
        }
        let (point, vcpu) = (shared.point, shared.vcpu);
        self.table.places.remove(&place);
        self.told.retain(|(_, rip)| place != Place::instruction(*rip));
        self.remove_point(vcpu, point, place)
    }

    /// Takes a breakpoint out. INT3 bytes can be taken out only where they are mapped: by `vcpu`'s page tables, or
    /// another's.
    pub(super) fn remove_point(&mut self, vcpu: u32, point: Point, place: Place) -> Result<(), EventError> {
        let others = (0..self.debug.vcpus()).filter(|other| *other != vcpu);
        let mut failure = None;
        for vcpu in std::iter::once(vcpu).chain(others) {
            match self.debug.remove(vcpu, point, place.address, place.len) {
                Ok(()) => return Ok(()),
                Err(error @ GdbError::Refused { .. }) => failure = Some(error),
                Err(error) => return Err(of_stub(error)),
            }
        }
        Err(failure.map_or(EventError::Gone, of_stub))
    }

    /// Takes a hook out, and its events that nobody has taken.
    pub(super) fn disarm(&mut self, id: HookId) -> Result<(), EventError> {
        self.unhook(id)?;
        self.queue.forget(id);
        Ok(())
    }

    /// Takes a hook out; what it has told of stays.
    pub(super) fn unhook(&mut self, id: HookId) -> Result<(), EventError> {
        if !self.table.hooks.contains_key(&id) {
            return Ok(());
        }
        let places: Vec<Place> = self
            .table
            .places
            .iter()
            .filter(|(_, shared)| shared.hooks.contains(&id))
            .map(|(place, _)| *place)
            .collect();
        if !places.is_empty() {
            // With a watchpoint go the hits that QEMU has not told of: it would look for them in memory it has freed.
            self.stand()?;
            if self.state == State::Paused && places.iter().any(|place| place.is_watch()) {
                self.pending(None)?;
            }
        }
        self.table.hooks.remove(&id);
        for place in places {
            self.take_out(place, id)?;
        }
        for occasion in &mut self.occasions {
            occasion.tell.retain(|tell| tell.hook != id);
            occasion.steps.retain(|run| run.hook != id);
            occasion.waiting.take_if(|waiting| waiting.event.hook == id);
        }
        Ok(())
    }
}
