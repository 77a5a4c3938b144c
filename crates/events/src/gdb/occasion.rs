//! Something happened at a vCPU: it is told, and verdicts are waited for.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{
    Delivery, Detail, Event, Expiry, HookId, HookKind, Moment, Overflow, Passage, Sequence, StepEnd, Verdict,
};
use vmsight_target::gdb::Accelerator;

use super::filter::Standing;
use super::wait::ROOM;
use super::worker::Worker;
use crate::EventError;

/// A deadline that is none.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// A vCPU at which something happened: what is to be told of it, and what is done then.
#[derive(Debug)]
pub(super) struct Occasion {
    pub(super) registers: Registers,
    /// The instruction whose execution is told of: it is stepped over when all is told and the vCPU still stands
    /// there.
    pub(super) at: Option<u64>,
    pub(super) tell: VecDeque<Tell>,
    /// The event whose verdict is waited for.
    pub(super) waiting: Option<Waiting>,
    /// Runs of steps that are being made.
    pub(super) steps: Vec<Run>,
}

/// Steps for a hook.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) hook: HookId,
    made: u64,
    left: u64,
}

impl Run {
    pub(super) const fn new(hook: HookId, count: u64) -> Self {
        Self {
            hook,
            made: 0,
            left: count,
        }
    }

    /// One more was made. What ends it, if nothing else does.
    fn advance(&mut self, asleep: bool) -> Option<StepEnd> {
        self.made = self.made.saturating_add(1);
        self.left = self.left.saturating_sub(1);
        match (asleep, self.left) {
            (true, 1..) => Some(StepEnd::Sleep),
            (_, 0) => Some(StepEnd::Count),
            _ => None,
        }
    }
}

/// Something to be told.
#[derive(Debug)]
pub(super) struct Tell {
    pub(super) hook: HookId,
    pub(super) detail: Detail,
    pub(super) undo: Option<Undo>,
    /// Whether the hook's filter has let it through.
    pub(super) passed: bool,
}

/// What a write that is done can be undone with.
#[derive(Clone, Debug)]
pub(super) struct Undo {
    pub(super) address: u64,
    pub(super) bytes: Vec<u8>,
}

/// An event that is held.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) event: Event,
    pub(super) undo: Option<Undo>,
    deadline: Instant,
    pub(super) expiry: Expiry,
}

impl Occasion {
    pub(super) fn new(registers: Registers) -> Self {
        Self {
            registers,
            at: None,
            tell: VecDeque::new(),
            waiting: None,
            steps: Vec::new(),
        }
    }
}

impl Occasion {
    pub(super) fn waits_with(&self, sequence: Sequence) -> bool {
        self.waiting
            .as_ref()
            .is_some_and(|w| w.event.sequence == sequence)
    }
}

impl Worker {
    /// A vCPU met a breakpoint, or a step ended that nobody waits for any more.
    pub(super) fn trapped(&mut self, registers: Registers) {
        let mut occasion = Occasion::new(registers);
        self.meet(&mut occasion);
        if occasion.at.is_some() {
            self.occasions.push_back(occasion);
        }
    }

    /// Whether a breakpoint is where a vCPU stands; then it is told of and stepped over.
    pub(super) fn meet(&mut self, occasion: &mut Occasion) {
        let rip = occasion.registers.rip;
        if !self.table.breaks(rip) {
            return;
        }
        occasion.at = Some(rip);
        let before = self.told.len();
        let vcpu = occasion.registers.vcpu;
        self.told.retain(|told| *told != (vcpu, rip));
        if self.told.len() != before {
            return;
        }
        let hooks = self.table.at(rip);
        occasion.tell.extend(hooks.into_iter().map(|hook| Tell {
            hook,
            detail: Detail::Execute { rip: Gva(rip) },
            undo: None,
            passed: false,
        }));
    }

    /// Takes the next of the occasions one thing further, or waits for what it needs.
    pub(super) fn advance(&mut self) -> Result<(), EventError> {
        let Some(mut occasion) = self.occasions.pop_front() else {
            return self.go_on();
        };
        if let Some(deadline) = occasion.waiting.as_ref().map(|w| w.deadline) {
            self.occasions.push_front(occasion);
            return self.wait_for_verdict(deadline);
        }
        let done = match occasion.tell.pop_front() {
            Some(tell) => match self.tell(&mut occasion, tell)? {
                None => false,
                Some(tell) => {
                    occasion.tell.push_front(tell);
                    self.occasions.push_front(occasion);
                    return self.wait_for_room();
                }
            },
            None => self.finish(&mut occasion)?,
        };
        if !done {
            self.occasions.push_front(occasion);
        }
        Ok(())
    }

    /// Tells one thing; gives it back where there is no room.
    pub(super) fn tell(&mut self, occasion: &mut Occasion, tell: Tell) -> Result<Option<Tell>, EventError> {
        let id = tell.hook;
        let Some(armed) = self.table.hooks.get(&id) else {
            return Ok(None);
        };
        let (delivery, scope) = (armed.hook.delivery, armed.hook.scope);
        let registers = &occasion.registers;
        // Of steps until a condition each was one, and where they have led to does not matter.
        let occurred = u64::from(!matches!(armed.hook.kind, HookKind::StepUntil { .. }));
        if !tell.passed && !scope.covers(registers.cr3) {
            return Ok(None);
        }
        if !tell.passed && !self.wants(id, registers, &tell.detail) {
            self.queue.count(id, |c| c.occurred += occurred);
            return Ok(None);
        }
        let mut event = Event {
            sequence: 0,
            time: SystemTime::now(),
            vcpu: registers.vcpu,
            hook: id,
            cr3: registers.cr3,
            detail: tell.detail,
            held: false,
        };
        match delivery {
            Delivery::Counted => self.queue.count(id, |c| c.occurred += occurred),
            Delivery::Told { overflow } => {
                if self.queue.has_room() {
                    self.queue.count(id, |c| c.occurred += occurred);
                    self.queue.push(event);
                } else if overflow == Overflow::Block && self.queue.waited() < ROOM {
                    return Ok(Some(Tell { passed: true, ..tell }));
                } else {
                    self.queue.count(id, |c| {
                        c.occurred += occurred;
                        c.dropped += 1;
                    });
                    if overflow == Overflow::Block {
                        // Of the occasions the hook is taken out of all but this one.
                        occasion.steps.retain(|run| run.hook != id);
                        self.expired(id, Expiry::Open, "no room for an event came in time")?;
                    }
                }
            }
            Delivery::Held { deadline, expiry } => {
                self.queue.count(id, |c| c.occurred += occurred);
                event.held = true;
                event.sequence = self.queue.push(event.clone());
                let now = Instant::now();
                occasion.waiting = Some(Waiting {
                    event,
                    undo: tell.undo,
                    deadline: now.checked_add(deadline).unwrap_or(now + FAR),
                    expiry,
                });
            }
        }
        Ok(None)
    }

    /// Whether a hook's filter wants this.
    fn wants(&mut self, id: HookId, registers: &Registers, detail: &Detail) -> bool {
        let Some(armed) = self.table.hooks.get(&id) else {
            return false;
        };
        if armed.sieve.is_open() {
            return true;
        }
        let memory = Standing {
            memory: &self.memory,
            stub: RefCell::new(&mut self.debug),
        };
        let moment = Moment { registers, detail };
        armed.sieve.pass(moment, &memory, Instant::now) == Passage::Wanted
    }

    /// A step was made: the runs of steps that end with it.
    fn count_step(&mut self, occasion: &mut Occasion, asleep: bool) {
        let registers = occasion.registers;
        let mut tell = Vec::new();
        occasion.steps.retain_mut(|run| {
            let mut end = run.advance(asleep);
            let step = |made, end| Detail::Step {
                rip: Gva(registers.rip),
                made,
                end,
            };
            let hook = self.table.hooks.get(&run.hook).map(|armed| &armed.hook);
            let until = hook.filter(|hook| matches!(hook.kind, HookKind::StepUntil { .. }));
            let until = until.map(|hook| hook.scope);
            if let Some(scope) = until {
                self.queue.count(run.hook, |c| c.occurred += 1);
                let so_far = step(run.made, StepEnd::Condition);
                if scope.covers(registers.cr3) && self.wants(run.hook, &registers, &so_far) {
                    end = Some(StepEnd::Condition);
                }
            }
            if let Some(end) = end {
                tell.push(Tell {
                    hook: run.hook,
                    detail: step(run.made, end),
                    undo: None,
                    passed: until.is_some(),
                });
            }
            end.is_none()
        });
        occasion.tell.extend(tell);
    }

    /// All is told: the vCPU does what is left for it to do. True where that is nothing.
    pub(super) fn finish(&mut self, occasion: &mut Occasion) -> Result<bool, EventError> {
        let rip = occasion.registers.rip;
        let vcpu = occasion.registers.vcpu;
        let stands = occasion.at == Some(rip) && self.table.breaks(rip);
        if self.pause {
            if stands {
                self.told.push((vcpu, rip));
            }
            return Ok(true);
        }
        if !stands && occasion.steps.is_empty() {
            return Ok(true);
        }
        let step = self.step(occasion)?;
        if self.pause {
            return Ok(true);
        }
        occasion.at = None;
        if step.missed && stands {
            // It meets the breakpoint once more.
            self.told.push((vcpu, rip));
        }
        if let Some(hit) = step.hit {
            // TCG has an interrupt left for it, for which the vCPU would stop once more.
            if self.debug.accelerator() == Accelerator::Tcg {
                self.probe(vcpu)?;
            }
            for other in self.accesses(&[hit])? {
                occasion.tell.extend(other.tell);
            }
        }
        self.count_step(occasion, step.asleep);
        // A step does not look at breakpoints.
        if !occasion.steps.is_empty() {
            self.meet(occasion);
        }
        Ok(occasion.tell.is_empty() && occasion.steps.is_empty())
    }

    pub(super) fn answer(&mut self, sequence: Sequence, verdict: &Verdict) -> Result<(), EventError> {
        // One that expired meanwhile is answered already.
        let Some(mut occasion) = self.occasions.pop_front() else {
            return Ok(());
        };
        let waiting = match occasion.waits_with(sequence) {
            true => occasion.waiting.take(),
            false => None,
        };
        let result = match waiting {
            Some(waiting) => self.apply(&mut occasion, &waiting, verdict),
            None => Ok(()),
        };
        // It goes elsewhere: to those behind nothing happened.
        if occasion.at.is_some_and(|at| at != occasion.registers.rip) {
            occasion.tell.clear();
            occasion.at = None;
        }
        self.occasions.push_front(occasion);
        result
    }
}
