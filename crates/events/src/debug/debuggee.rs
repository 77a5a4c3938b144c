//! The guest as a debugger has it: it stands or runs, has threads, registers, memory, and things to stop at.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use iced_x86::{Decoder, DecoderOptions};
use vmsight_arch::{Dtb, Gva, Registers};
use vmsight_hooks::{Detail, Hook, HookId, HookKind, Register, Scope, Verdict};
use vmsight_linux::{CurrentReader, Kernel};
use vmsight_memory::AddressSpace;

use super::DebugError;
use super::points::{HELD, Point, Points};
use super::process::{Process, gs_base};
use super::registers;
use crate::{EventError, HookGuard, Monitor, Occurrence};

/// How long vCPUs that are to stand still are waited for, where each is held for itself. One that sleeps does
/// not come; it is held as soon as it wakes.
const OTHERS: Duration = Duration::from_millis(500);
/// The longest instruction.
const MAX_INSTRUCTION: usize = 15;

/// A vCPU that is held.
#[derive(Debug)]
struct Held {
    occurrence: Occurrence,
    /// The hook of a step whose event this is: taken out before the event is answered, it would let the vCPU
    /// go.
    guard: Option<HookGuard>,
    /// With the changes.
    registers: Registers,
    changes: Vec<(Register, u64)>,
}

/// What is wanted of a step.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// That the guest stands.
    Interrupt,
    /// That one instruction of the debuggee is executed: the one here.
    Step { from: u64 },
    /// That the access to memory for which it stopped is made: debuggers expect to find what was written.
    Access(Point),
    /// That a vCPU stands because another one does.
    Halt,
}

/// A step that was asked for.
#[derive(Debug)]
struct Stepping {
    guard: HookGuard,
    vcpu: u32,
    purpose: Purpose,
}

/// Where a process is waited for that went into the kernel in a step.
#[derive(Debug)]
struct Return {
    /// The instruction that is to be executed: it has not been when the process comes back to it.
    from: u64,
    at: Vec<HookGuard>,
}

/// Why the guest stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Why {
    Interrupted,
    Stepped,
    Met(Point),
}

/// Whose registers are shown for the thread that stopped.
#[derive(Clone, Copy, Debug)]
enum Shown {
    Vcpu(u32),
    /// Those of a process that is not on a vCPU in user mode.
    Saved,
}

/// What happens when the guest goes on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Action {
    #[default]
    Continue,
    Step(Tid),
}

#[derive(Debug)]
pub(super) struct Debuggee {
    monitor: Monitor,
    space: AddressSpace,
    current: Option<CurrentReader>,
    vcpus: u32,
    process: Option<Process>,
    pub(super) points: Points,
    pub(super) action: Action,
    held: BTreeMap<u32, Held>,
    shown: Shown,
    /// Of the process, when it was last looked for and was on no vCPU.
    saved: Registers,
    stepping: Vec<Stepping>,
    back: Option<Return>,
    /// A vCPU that sleeps and is to make a step, and the hook behind its HLT.
    waking: Option<(u32, HookGuard)>,
    /// Stops that are to be told after the first: each vCPU may have met something.
    pending: Vec<(u32, Why)>,
}

impl Debuggee {
    pub(super) fn new(
        monitor: Monitor,
        kernel: &Kernel,
        vcpus: u32,
        pid: Option<i32>,
    ) -> Result<Self, DebugError> {
        let process = pid.map(|pid| Process::new(kernel, pid)).transpose()?;
        let space = kernel.space().clone();
        Ok(Self::over(monitor, space, kernel.current().ok(), vcpus, process))
    }

    pub(super) fn over(
        monitor: Monitor,
        space: AddressSpace,
        current: Option<CurrentReader>,
        vcpus: u32,
        process: Option<Process>,
    ) -> Self {
        let scope = process.as_ref().map_or(Scope::All, Process::scope);
        Self {
            monitor,
            space,
            current,
            vcpus,
            process,
            points: Points::new(scope),
            action: Action::Continue,
            held: BTreeMap::new(),
            shown: Shown::Vcpu(0),
            saved: Registers::default(),
            stepping: Vec::new(),
            back: None,
            waking: None,
            pending: Vec::new(),
        }
    }

    pub(super) fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Whether it stands.
    pub(super) fn stands(&self) -> bool {
        !self.held.is_empty()
    }

    /// Sees to it that it will stand: [`Self::poll`] says when.
    pub(super) fn interrupt(&mut self) -> Result<(), EventError> {
        let waited = |s: &Stepping| matches!(s.purpose, Purpose::Interrupt);
        if self.stands() || self.stepping.iter().any(waited) {
            return Ok(());
        }
        if self.monitor.halts_all() {
            let guard = self.monitor.halt(HELD)?;
            self.stepping.push(Stepping {
                guard,
                vcpu: 0,
                purpose: Purpose::Interrupt,
            });
            return Ok(());
        }
        // Whichever executes anything: the others may sleep.
        let tried: Vec<_> = (0..self.vcpus)
            .map(|vcpu| self.step(vcpu, Purpose::Interrupt))
            .collect();
        match tried.iter().any(Result::is_ok) {
            true => Ok(()),
            false => tried.into_iter().collect(),
        }
    }

    fn step(&mut self, vcpu: u32, purpose: Purpose) -> Result<(), EventError> {
        let hook = Hook::new(HookKind::Step { vcpu, count: 1 }).delivered(HELD);
        let guard = self.monitor.hook(&hook)?;
        self.stepping.push(Stepping { guard, vcpu, purpose });
        Ok(())
    }

    /// Waits for it to stop; `None` where it does not within `patience`, or somebody woke us.
    pub(super) fn poll(&mut self, patience: Duration) -> Result<Option<Why>, EventError> {
        if let Some((vcpu, why)) = self.pending.pop() {
            self.shown = Shown::Vcpu(vcpu);
            return Ok(Some(why));
        }
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(occurrence) = self.monitor.next(left)? else {
                return Ok(None);
            };
            if let Some((vcpu, why)) = self.take(occurrence)? {
                self.stopped(vcpu, why)?;
                return Ok(Some(why));
            }
            // Events of no interest may follow each other without end.
            if left.is_zero() {
                return Ok(None);
            }
        }
    }

    /// What an event means; where that is nothing its vCPU goes on.
    fn take(&mut self, occurrence: Occurrence) -> Result<Option<(u32, Why)>, EventError> {
        let (hook, vcpu) = (occurrence.event().hook, occurrence.event().vcpu);
        if let Some(at) = self.stepping.iter().position(|s| s.guard.id() == hook) {
            let Stepping { guard, purpose, .. } = self.stepping.swap_remove(at);
            self.hold(occurrence, Some(guard))?;
            return match purpose {
                Purpose::Interrupt => Ok(Some((vcpu, Why::Interrupted))),
                Purpose::Halt => Ok(None),
                Purpose::Access(point) => Ok(Some((vcpu, Why::Met(point)))),
                Purpose::Step { from } => self.stepped(vcpu, from),
            };
        }
        if self
            .back
            .as_ref()
            .is_some_and(|back| back.at.iter().any(|g| g.id() == hook))
        {
            return self.came_back(occurrence);
        }
        if let Some((sleeper, guard)) = &self.waking
            && guard.id() == hook
        {
            if *sleeper != vcpu {
                answer(occurrence, Verdict::Continue)?;
                return Ok(None);
            }
            self.hold(occurrence, None)?;
            return Ok(Some((vcpu, Why::Stepped)));
        }
        let point = self.points.of(hook);
        match point {
            Some(point) if self.concerns(&occurrence)? => {
                let early = matches!(occurrence.event().detail, Detail::Memory { done: false, .. });
                self.hold(occurrence, None)?;
                if early {
                    self.step(vcpu, Purpose::Access(point))?;
                    self.release(vcpu)?;
                    return Ok(None);
                }
                Ok(Some((vcpu, Why::Met(point))))
            }
            _ => {
                answer(occurrence, Verdict::Continue)?;
                Ok(None)
            }
        }
    }

    fn concerns(&self, occurrence: &Occurrence) -> Result<bool, EventError> {
        match &self.process {
            Some(process) => Ok(process.runs_on(&occurrence.registers()?, self.current.as_ref())),
            None => Ok(true),
        }
    }

    fn hold(&mut self, occurrence: Occurrence, guard: Option<HookGuard>) -> Result<(), EventError> {
        let registers = occurrence.registers()?;
        let held = Held {
            occurrence,
            guard,
            registers,
            changes: Vec::new(),
        };
        self.held.insert(registers.vcpu, held);
        Ok(())
    }

    /// An instruction was executed. A process for which that led into the kernel is not looked at before it
    /// is back.
    fn stepped(&mut self, vcpu: u32, from: u64) -> Result<Option<(u32, Why)>, EventError> {
        let now = self.held.get(&vcpu).map_or(from, |held| held.registers.rip);
        if self.process.is_some() && from >> 63 == 0 && now >> 63 == 1 {
            self.wait_for_return(from, true)?;
            self.release(vcpu)?;
            return Ok(None);
        }
        Ok(Some((vcpu, Why::Stepped)))
    }

    /// Hooks the place where a process comes back from the kernel: the instruction itself, which a page fault
    /// or a call that is made again leads to, and with `next` the one behind.
    fn wait_for_return(&mut self, from: u64, next: bool) -> Result<(), EventError> {
        let Some(process) = &self.process else {
            return Ok(());
        };
        let mut places = vec![from];
        if next {
            let mut code = [0; MAX_INSTRUCTION];
            let len = readable(&process.space, from, &mut code);
            let mut decoder = Decoder::with_ip(
                64,
                code.get(..len).unwrap_or_default(),
                from,
                DecoderOptions::NONE,
            );
            let instruction = decoder.decode();
            if !instruction.is_invalid() {
                places.push(instruction.next_ip());
            }
        }
        let hook = |at| Hook::execute(Gva(at)).within(process.scope()).delivered(HELD);
        let at = places
            .into_iter()
            .map(|at| self.monitor.hook(&hook(at)))
            .collect::<Result<_, _>>()?;
        self.back = Some(Return { from, at });
        Ok(())
    }

    fn wait_for_waking(&mut self, vcpu: u32, rip: u64) -> Result<(), EventError> {
        let hook = Hook::execute(Gva(rip)).delivered(HELD);
        self.waking = Some((vcpu, self.monitor.hook(&hook)?));
        Ok(())
    }

    /// A process is back in user mode.
    fn came_back(&mut self, occurrence: Occurrence) -> Result<Option<(u32, Why)>, EventError> {
        if !self.concerns(&occurrence)? {
            answer(occurrence, Verdict::Continue)?;
            return Ok(None);
        }
        let vcpu = occurrence.event().vcpu;
        let Detail::Execute { rip } = occurrence.event().detail else {
            return Ok(None);
        };
        self.hold(occurrence, None)?;
        let from = self.back.as_ref().map(|back| back.from);
        if from == Some(rip.0) {
            self.step(vcpu, Purpose::Step { from: rip.0 })?;
            self.release(vcpu)?;
            return Ok(None);
        }
        Ok(Some((vcpu, Why::Stepped)))
    }

    /// It stands: all of it.
    fn stopped(&mut self, vcpu: u32, why: Why) -> Result<(), EventError> {
        self.shown = Shown::Vcpu(vcpu);
        if let (Why::Interrupted, Some(process)) = (why, &self.process) {
            let running = (0..self.vcpus).find(|vcpu| {
                let registers = self.registers_of(*vcpu).ok();
                registers.is_some_and(|r| r.cpl() == 3 && process.runs_on(&r, self.current.as_ref()))
            });
            self.shown = match running {
                Some(vcpu) => Shown::Vcpu(vcpu),
                None => {
                    self.saved = process.saved().unwrap_or_default();
                    Shown::Saved
                }
            };
        }
        // Whatever else was wanted is over. The hooks of a return are taken out with the rest when the guest
        // goes on.
        self.stepping
            .retain(|s| matches!(s.purpose, Purpose::Halt | Purpose::Access(_)));
        if !self.monitor.halts_all() {
            self.halt_others()?;
        }
        Ok(())
    }

    /// Makes the other vCPUs stand, where an event holds only its own.
    fn halt_others(&mut self) -> Result<(), EventError> {
        for vcpu in 0..self.vcpus {
            let waited = self.stepping.iter().any(|s| s.vcpu == vcpu);
            if !self.held.contains_key(&vcpu) && !waited {
                match self.step(vcpu, Purpose::Halt) {
                    // It sleeps, and cannot be held before it wakes.
                    Err(EventError::Limit { .. }) => {}
                    other => other?,
                }
            }
        }
        let deadline = Instant::now() + OTHERS;
        while !self.stepping.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(occurrence) = self.monitor.next(left)? else {
                if left.is_zero() {
                    break;
                }
                continue;
            };
            if let Some(pending) = self.take(occurrence)? {
                self.stepping.retain(|s| s.vcpu != pending.0);
                self.pending.push(pending);
            }
        }
        Ok(())
    }

    /// Lets the guest go on, as was asked for.
    pub(super) fn resume(&mut self) -> Result<(), EventError> {
        // Another vCPU met something at the same time: that is told first, and nothing moves.
        if !self.pending.is_empty() {
            return Ok(());
        }
        self.stepping.clear();
        // Its hooks go when the events that are held by them are answered.
        let (back, waking) = (self.back.take(), self.waking.take());
        let held: Vec<HookId> = self.held.values().map(|h| h.occurrence.event().hook).collect();
        self.points.prune(&held);
        if let Action::Step(tid) = std::mem::take(&mut self.action) {
            let shown = match self.process {
                Some(_) => self.shown,
                None => vcpu_of(tid).map_or(self.shown, Shown::Vcpu),
            };
            match shown {
                Shown::Vcpu(vcpu) => {
                    let from = self.registers_of(vcpu)?.rip;
                    match self.step(vcpu, Purpose::Step { from }) {
                        // It sleeps behind HLT: the step is over when it has woken and is back there.
                        Err(EventError::Limit { .. }) => self.wait_for_waking(vcpu, from)?,
                        other => other?,
                    }
                }
                Shown::Saved => self.wait_for_return(self.saved.rip, false)?,
            }
        }
        self.release_all()?;
        drop((back, waking));
        self.points.prune(&[]);
        Ok(())
    }

    /// Answers what is held: each vCPU goes on.
    fn release_all(&mut self) -> Result<(), EventError> {
        (0..self.vcpus).try_for_each(|vcpu| self.release(vcpu))
    }

    fn release(&mut self, vcpu: u32) -> Result<(), EventError> {
        let Some(held) = self.held.remove(&vcpu) else {
            return Ok(());
        };
        let verdict = match held.changes.is_empty() {
            true => Verdict::Continue,
            false => Verdict::SetRegisters(held.changes),
        };
        answer(held.occurrence, verdict)?;
        drop(held.guard);
        Ok(())
    }

    /// Ends it: no hook is left, and the guest goes on.
    pub(super) fn let_go(&mut self) -> Result<(), EventError> {
        self.pending.clear();
        self.points.want_none();
        self.action = Action::Continue;
        let done = self.resume();
        (self.back, self.waking) = (None, None);
        self.stepping.clear();
        self.held.clear();
        self.points.prune(&[]);
        done
    }

    /// The threads there are: vCPUs, or the one of the process that stopped.
    pub(super) fn threads(&self) -> impl Iterator<Item = Tid> {
        let count = match self.process {
            Some(_) => 1,
            None => self.vcpus,
        };
        (0..count).filter_map(tid_of)
    }

    pub(super) fn thread(&self) -> Tid {
        match (self.process.is_some(), self.shown) {
            (false, Shown::Vcpu(vcpu)) => tid_of(vcpu).unwrap_or(Tid::MIN),
            _ => Tid::MIN,
        }
    }

    /// What a thread is, in a few words.
    pub(super) fn describe(&self, tid: Tid) -> String {
        match self.of(tid) {
            Shown::Vcpu(vcpu) => {
                let who = || {
                    let reader = self.current.as_ref()?;
                    let task = reader.task(gs_base(&self.registers_of(vcpu).ok()?)?).ok()?;
                    let current = reader.describe(task).ok()?;
                    Some(format!(": {} {}", current.tid, printable(&current.name)))
                };
                format!("vCPU {vcpu}{}", who().unwrap_or_default())
            }
            Shown::Saved => "not in user mode now".to_owned(),
        }
    }

    fn of(&self, tid: Tid) -> Shown {
        match self.process {
            Some(_) => self.shown,
            None => vcpu_of(tid).map_or(self.shown, Shown::Vcpu),
        }
    }

    /// The registers of a thread.
    pub(super) fn registers(&self, tid: Tid) -> Result<Registers, EventError> {
        match self.of(tid) {
            Shown::Vcpu(vcpu) => self.registers_of(vcpu),
            Shown::Saved => Ok(self.saved),
        }
    }

    fn registers_of(&self, vcpu: u32) -> Result<Registers, EventError> {
        match self.held.get(&vcpu) {
            Some(held) => Ok(held.registers),
            None => self.monitor.registers_of(vcpu),
        }
    }

    /// Changes registers of a thread; false where they cannot be: only an event that is held can be answered
    /// with them.
    pub(super) fn change(&mut self, tid: Tid, changes: Vec<(Register, u64)>) -> bool {
        let Shown::Vcpu(vcpu) = self.of(tid) else {
            return false;
        };
        let Some(held) = self.held.get_mut(&vcpu) else {
            return false;
        };
        for change in changes {
            registers::apply(&mut held.registers, change);
            held.changes.retain(|(register, _)| *register != change.0);
            held.changes.push(change);
        }
        true
    }

    /// The address space in which a thread's address is meant: the process's, or the kernel's and, in the
    /// lower half, that of whom the vCPU runs.
    pub(super) fn space(&self, tid: Tid, address: u64) -> Result<AddressSpace, EventError> {
        match &self.process {
            Some(process) => Ok(process.space.clone()),
            None if address >> 63 == 1 => Ok(self.space.clone()),
            None => Ok(self.space.with_dtb(Dtb::from_cr3(self.registers(tid)?.cr3))),
        }
    }

    /// The debugger's form of a stop.
    pub(super) fn reason(&self, why: Why) -> MultiThreadStopReason<u64> {
        let tid = self.thread();
        let signal = |signal| MultiThreadStopReason::SignalWithThread { tid, signal };
        match why {
            Why::Interrupted => signal(Signal::SIGINT),
            Why::Stepped => signal(Signal::SIGTRAP),
            Why::Met(Point::Execute(_)) => MultiThreadStopReason::SwBreak(tid),
            Why::Met(Point::Memory { address, watch, .. }) => MultiThreadStopReason::Watch {
                tid,
                kind: watch.kind(),
                addr: address,
            },
        }
    }
}

/// Reads as many bytes from an address on as there are.
pub(super) fn readable(space: &AddressSpace, address: u64, buf: &mut [u8]) -> usize {
    match space.read_partial(Gva(address), buf).into_iter().next() {
        Some((range, Ok(()))) => range.end,
        _ => 0,
    }
}

/// A verdict that does not fit is no reason to end: the vCPU went on.
fn answer(occurrence: Occurrence, verdict: Verdict) -> Result<(), EventError> {
    match occurrence.answer(verdict) {
        Err(error @ EventError::Verdict { .. }) => {
            tracing::warn!("{error}");
            Ok(())
        }
        other => other,
    }
}

fn tid_of(vcpu: u32) -> Option<Tid> {
    Tid::new(usize::try_from(vcpu).ok()?.checked_add(1)?)
}

fn vcpu_of(tid: Tid) -> Option<u32> {
    u32::try_from(tid.get().checked_sub(1)?).ok()
}

/// A name that the guest gave, fit for a debugger's terminal.
fn printable(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
        .collect()
}
