//! The thread that has the connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant, SystemTime};

use vmsight_arch::registers::control::{CR0_PE, EFER_LMA};
use vmsight_arch::{Gva, Registers};
use vmsight_hooks::{
    BackendKind, Delivery, Detail, Event, Expiry, Hook, HookId, HookKind, Overflow, Sequence, Verdict,
};
use vmsight_target::gdb::{Accelerator, Cause, Debug, GdbError, Point, Stop, Waited};

use super::instruction::{self, MAX_LEN, Still};
use super::queue::{End, Queue};
use super::table::{Armed, Place, Shared, Table, places};
use super::watch::Hit;
use super::{end_of, of_stub};
use crate::EventError;

/// How often it is looked whether the owner of a paused VM let it go on.
const LOOK: Duration = Duration::from_millis(25);
/// How long a step may take before it is looked what became of it.
const STEP: Duration = Duration::from_millis(100);
/// How often a step is tried.
const MAX_TRIES: u32 = 6;
/// Most rounds of a repeated string instruction that are stepped through at once.
const MAX_ROUNDS: u32 = 4096;

type Answer<T> = Sender<Result<T, EventError>>;

/// What others ask of the thread.
pub(super) enum Command {
    Arm(Hook, Answer<HookId>),
    Disarm(HookId, Answer<()>),
    Registers(Sequence, Answer<Registers>),
    Answer(Sequence, Verdict, Answer<()>),
    End,
}

/// A vCPU at which something happened: what is to be told of it, and what is done then.
#[derive(Debug)]
pub(super) struct Occasion {
    pub(super) registers: Registers,
    /// The instruction whose execution is told of: it is stepped over when all is told and the vCPU still stands there.
    at: Option<u64>,
    pub(super) tell: VecDeque<Tell>,
    /// The event whose verdict is waited for.
    waiting: Option<Waiting>,
    /// Steps to be made, and for which hooks.
    pub(super) steps: Vec<(HookId, u64)>,
}

/// Something to be told.
#[derive(Debug)]
pub(super) struct Tell {
    pub(super) hook: HookId,
    pub(super) detail: Detail,
    pub(super) undo: Option<Undo>,
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
    expiry: Expiry,
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

/// What the VM does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// It runs.
    Runs,
    /// It stands still for the occasions.
    Stands,
    /// It stands still for its owner, who may have let it go on meanwhile.
    Paused,
}

/// The connection and everything that is known.
pub(super) struct Worker {
    pub(super) debug: Debug,
    pub(super) table: Table,
    queue: Arc<Queue>,
    commands: Receiver<Command>,
    state: State,
    occasions: VecDeque<Occasion>,
    /// When the occasions are through the VM stays paused.
    pub(super) pause: bool,
    /// vCPUs that were told of an instruction and then paused in front of it: when the owner lets them go on they meet it
    /// once more, and nothing is told.
    told: Vec<(u32, u64)>,
    last: u32,
}

impl Worker {
    pub(super) fn new(debug: Debug, queue: Arc<Queue>, commands: Receiver<Command>) -> Self {
        let ran = debug.ran();
        Self {
            debug,
            table: Table::default(),
            queue,
            commands,
            state: State::Stands,
            occasions: VecDeque::new(),
            pause: !ran,
            told: Vec::new(),
            last: 0,
        }
    }

    pub(super) fn run(mut self) {
        // Said also in a panic: nobody may wait for a thread that is gone.
        let farewell = Farewell(Arc::clone(&self.queue));
        loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => {
                    if let Err(error) = self.settle() {
                        tracing::debug!(%error, "the hooks were taken out the short way");
                    }
                    break;
                }
                Err(error) => {
                    self.queue.end(end_of(&error));
                    break;
                }
            }
        }
        // Before anybody learns that it is over.
        drop(self);
        drop(farewell);
    }

    /// One thing after another; false at the end.
    fn turn(&mut self) -> Result<bool, EventError> {
        loop {
            match self.commands.try_recv() {
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return Ok(false),
                Ok(command) => self.command(command)?,
                Err(TryRecvError::Empty) => break,
            }
        }
        match self.state {
            State::Stands => self.advance()?,
            State::Runs => {
                if let Waited::Stop(stop) = self.debug.wait(None).map_err(of_stub)? {
                    self.stopped(&[stop])?;
                }
            }
            State::Paused => match self.debug.wait(Some(Instant::now() + LOOK)).map_err(of_stub)? {
                Waited::Stop(stop) => self.stopped(&[stop])?,
                Waited::Woken => {}
                Waited::TimedOut => {
                    let stops = self.debug.interrupt().map_err(of_stub)?;
                    if !stops.is_empty() {
                        self.interrupted(&stops)?;
                    }
                }
            },
        }
        Ok(true)
    }

    fn command(&mut self, command: Command) -> Result<(), EventError> {
        // An error of the connection ends this thread; one of the command is for who gave it.
        fn give<T>(answer: &Answer<T>, result: Result<T, EventError>) -> Result<(), EventError> {
            match result {
                Err(error) if is_fatal(&error) => {
                    let end = end_of(&error);
                    let _ = answer.send(Err(error));
                    Err(end.error())
                }
                other => {
                    let _ = answer.send(other);
                    Ok(())
                }
            }
        }
        match command {
            Command::Arm(hook, answer) => {
                let result = self.arm(hook);
                give(&answer, result)
            }
            Command::Disarm(id, answer) => {
                let result = self.disarm(id);
                give(&answer, result)
            }
            Command::Registers(sequence, answer) => {
                let held = self.occasions.front().filter(|o| o.waits_with(sequence));
                let _ = answer.send(held.map(|o| o.registers).ok_or_else(|| EventError::Protocol {
                    what: format!("event {sequence} is not held: its vCPU went on"),
                }));
                Ok(())
            }
            Command::Answer(sequence, verdict, answer) => {
                let result = self.answer(sequence, &verdict);
                give(&answer, result)
            }
            Command::End => Ok(()),
        }
    }

    /// Makes the VM stand still, where it does not, for as long as nothing lets it go on.
    fn stand(&mut self) -> Result<(), EventError> {
        if self.state != State::Stands {
            let stops = self.debug.interrupt().map_err(of_stub)?;
            if !stops.is_empty() {
                self.interrupted(&stops)?;
            }
        }
        Ok(())
    }

    /// The VM ran when we interrupted it; it stands from here on, until [`Self::advance`] finds that all is told.
    fn interrupted(&mut self, stops: &[Stop]) -> Result<(), EventError> {
        let others: Vec<Stop> = stops
            .iter()
            .copied()
            .filter(|stop| stop.cause != Cause::Paused)
            .collect();
        self.stopped(&others)
    }

    /// The VM stopped; without a stop it was our interrupt.
    fn stopped(&mut self, stops: &[Stop]) -> Result<(), EventError> {
        self.state = State::Stands;
        let mut hits = Vec::new();
        let mut told = None;
        for stop in stops {
            match stop.cause {
                Cause::Trap | Cause::Watch { .. } => {
                    told = Some(stop.vcpu);
                    let registers = self.debug.registers(stop.vcpu).map_err(of_stub)?;
                    match stop.cause {
                        Cause::Watch { kind, address } => hits.push(Hit {
                            registers,
                            kind,
                            address,
                        }),
                        _ => self.trapped(registers),
                    }
                }
                // By its owner, or for a reason that only he can mend.
                _ => self.pause = true,
            }
        }
        // A VM that its owner paused is not let go on even against a breakpoint.
        if !self.pause {
            hits.extend(self.pending(told)?);
        }
        let occasions = self.accesses(&hits)?;
        self.occasions.extend(occasions);
        self.debug.hold(self.pause).map_err(of_stub)
    }

    /// A vCPU met a breakpoint, or a step ended that nobody waits for any more.
    fn trapped(&mut self, registers: Registers) {
        let mut occasion = Occasion::new(registers);
        self.meet(&mut occasion);
        if occasion.at.is_some() {
            self.occasions.push_back(occasion);
        }
    }

    /// Whether a breakpoint is where a vCPU stands; then it is told of and stepped over.
    fn meet(&mut self, occasion: &mut Occasion) {
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
        }));
    }

    /// Takes the next of the occasions one thing further, or waits for what it needs.
    fn advance(&mut self) -> Result<(), EventError> {
        let Some(mut occasion) = self.occasions.pop_front() else {
            return self.go_on();
        };
        if let Some(deadline) = occasion.waiting.as_ref().map(|w| w.deadline) {
            self.occasions.push_front(occasion);
            match self.debug.wait(Some(deadline)).map_err(of_stub)? {
                // Its owner let it go on behind our back.
                Waited::Stop(stop) => self.resumed_behind(&stop)?,
                Waited::Woken => {}
                Waited::TimedOut => self.expire()?,
            }
            return Ok(());
        }
        let done = match occasion.tell.pop_front() {
            Some(tell) => match self.tell(&mut occasion, tell)? {
                None => false,
                Some(tell) => {
                    // No room: until somebody fetches an event, or a command comes.
                    occasion.tell.push_front(tell);
                    self.occasions.push_front(occasion);
                    self.debug.wait(Some(Instant::now() + LOOK)).map_err(of_stub)?;
                    return Ok(());
                }
            },
            None => self.finish(&mut occasion)?,
        };
        if !done {
            self.occasions.push_front(occasion);
        }
        Ok(())
    }

    /// Somebody resumed the VM while it stood for an occasion. A breakpoint is met again; a watchpoint's access is done.
    fn resumed_behind(&mut self, stop: &Stop) -> Result<(), EventError> {
        tracing::debug!(?stop, "the VM was let go on while it stood at a hook");
        if let Cause::Watch { kind, address } = stop.cause {
            let registers = self.debug.registers(stop.vcpu).map_err(of_stub)?;
            let occasions = self.accesses(&[Hit {
                registers,
                kind,
                address,
            }])?;
            self.occasions.extend(occasions);
        }
        Ok(())
    }

    /// Tells one thing; gives it back where there is no room.
    fn tell(&mut self, occasion: &mut Occasion, tell: Tell) -> Result<Option<Tell>, EventError> {
        let id = tell.hook;
        let Some(armed) = self.table.hooks.get(&id) else {
            return Ok(None);
        };
        let (delivery, scope) = (armed.hook.delivery, armed.hook.scope);
        let registers = &occasion.registers;
        if !scope.covers(registers.cr3) {
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
            Delivery::Counted => self.queue.count(id, |c| c.occurred += 1),
            Delivery::Told { overflow } => {
                if self.queue.has_room() {
                    self.queue.count(id, |c| c.occurred += 1);
                    self.queue.push(event);
                } else if overflow == Overflow::Block {
                    return Ok(Some(tell));
                } else {
                    self.queue.count(id, |c| {
                        c.occurred += 1;
                        c.dropped += 1;
                    });
                }
            }
            Delivery::Held { deadline, expiry } => {
                self.queue.count(id, |c| c.occurred += 1);
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

    /// All is told: the vCPU does what is left for it to do. True where that is nothing.
    fn finish(&mut self, occasion: &mut Occasion) -> Result<bool, EventError> {
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
        let hit = self.step(occasion)?;
        if self.pause {
            return Ok(true);
        }
        occasion.at = None;
        if let Some(hit) = hit {
            // TCG has an interrupt left for it, for which the vCPU would stop once more.
            if self.debug.accelerator() == Accelerator::Tcg {
                self.probe(vcpu)?;
            }
            for other in self.accesses(&[hit])? {
                occasion.tell.extend(other.tell);
            }
        }
        let mut ended = Vec::new();
        occasion.steps.retain_mut(|(hook, left)| {
            *left = left.saturating_sub(1);
            if *left == 0 {
                ended.push(*hook);
            }
            *left > 0
        });
        let rip = Gva(occasion.registers.rip);
        occasion.tell.extend(ended.into_iter().map(|hook| Tell {
            hook,
            detail: Detail::Step { rip },
            undo: None,
        }));
        // A step does not look at breakpoints.
        if !occasion.steps.is_empty() {
            self.meet(occasion);
        }
        Ok(occasion.tell.is_empty() && occasion.steps.is_empty())
    }

    /// One instruction of one vCPU, while all others stand. Gives the watchpoint it met.
    fn step(&mut self, occasion: &mut Occasion) -> Result<Option<Hit>, EventError> {
        let vcpu = occasion.registers.vcpu;
        let rip = occasion.registers.rip;
        // The processor would stop in front of it for ever. TCG does not look at breakpoints in a step.
        let here = Place::instruction(rip);
        let kvm = self.debug.accelerator() == Accelerator::Kvm;
        let point = self.table.places.get(&here).map(|s| s.point);
        if let (true, Some(point)) = (kvm, point) {
            self.remove_point(vcpu, point, here)?;
        }
        let mut hit = None;
        let mut missed = 0;
        if !kvm && self.passes_pause(&mut occasion.registers)? {
            return Ok(None);
        }
        for _ in 0..MAX_ROUNDS {
            if let Some(Cause::Watch { kind, address }) = self.one_step(vcpu, rip)? {
                hit = Some((kind, address));
            }
            occasion.registers = self.debug.registers(vcpu).map_err(of_stub)?;
            if occasion.registers.rip != rip || self.pause {
                break;
            }
            let bits = self.bits(&occasion.registers)?;
            let code = self.code(&occasion.registers)?;
            match instruction::still(&code, bits, rip) {
                Still::Repeats => {}
                Still::Jumped => break,
                Still::NotExecuted => {
                    missed += 1;
                    if missed > MAX_TRIES {
                        break;
                    }
                }
            }
        }
        if let (true, Some(point)) = (kvm, point) {
            self.debug.insert(vcpu, point, rip, 1).map_err(of_stub)?;
        }
        let registers = occasion.registers;
        Ok(hit.map(|(kind, address)| Hit {
            registers,
            kind,
            address,
        }))
    }

    /// Moves a vCPU past PAUSE, which does nothing and cannot be stepped over alone.
    fn passes_pause(&mut self, registers: &mut Registers) -> Result<bool, EventError> {
        let mut code = [0; instruction::PAUSE.len()];
        match self.debug.read(registers.vcpu, registers.rip, &mut code) {
            Ok(()) if code == instruction::PAUSE => {}
            Ok(()) | Err(GdbError::Refused { .. }) => return Ok(false),
            Err(error) => return Err(of_stub(error)),
        }
        let next = registers.rip.wrapping_add(code.len() as u64);
        self.debug
            .write_register(registers.vcpu, "rip", next)
            .map_err(of_stub)?;
        registers.rip = next;
        Ok(true)
    }

    /// Steps once and says why it stopped.
    fn one_step(&mut self, vcpu: u32, from: u64) -> Result<Option<Cause>, EventError> {
        let mut patience = STEP;
        for _ in 0..MAX_TRIES {
            self.debug.step(vcpu).map_err(of_stub)?;
            let deadline = Instant::now() + patience;
            let mut stops: Vec<Stop> = Vec::new();
            match self.debug.wait_stop(deadline).map_err(of_stub)? {
                Some(stop) => stops.push(stop),
                // HLT: it sleeps behind it. Or a busy host.
                None => {
                    let interrupted = self.debug.interrupt().map_err(of_stub)?;
                    stops.extend(interrupted.into_iter().filter(|s| s.cause != Cause::Paused));
                }
            }
            for stop in &stops {
                match stop.cause {
                    Cause::Trap | Cause::Watch { .. } if stop.vcpu == vcpu => return Ok(Some(stop.cause)),
                    Cause::Trap | Cause::Watch { .. } => {}
                    _ => {
                        self.pause = true;
                        return Ok(None);
                    }
                }
            }
            if self.debug.registers(vcpu).map_err(of_stub)?.rip != from {
                return Ok(None);
            }
            patience = patience.saturating_mul(2);
        }
        Err(EventError::Protocol {
            what: format!("the gdb stub does not step vCPU {vcpu}"),
        })
    }

    /// All occasions are through.
    fn go_on(&mut self) -> Result<(), EventError> {
        if std::mem::take(&mut self.pause) {
            self.debug.hold(true).map_err(of_stub)?;
            self.debug.expect_stops().map_err(of_stub)?;
            self.state = State::Paused;
        } else {
            self.debug.hold(false).map_err(of_stub)?;
            self.debug.resume().map_err(of_stub)?;
            self.state = State::Runs;
        }
        Ok(())
    }

    /// No verdict came.
    fn expire(&mut self) -> Result<(), EventError> {
        let Some(waiting) = self.occasions.front_mut().and_then(|o| o.waiting.take()) else {
            return Ok(());
        };
        let id = waiting.event.hook;
        self.queue.withdraw(waiting.event.sequence);
        self.queue.count(id, |c| c.expired += 1);
        tracing::warn!(hook = id.0, "no verdict came in time");
        match waiting.expiry {
            Expiry::Open => self.disarm(id),
            Expiry::Closed => {
                self.pause = true;
                Ok(())
            }
        }
    }

    fn answer(&mut self, sequence: Sequence, verdict: &Verdict) -> Result<(), EventError> {
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

    fn arm(&mut self, hook: Hook) -> Result<HookId, EventError> {
        let limit = |why: String| EventError::Limit {
            backend: BackendKind::GdbStub,
            what: hook.kind.to_string(),
            why,
        };
        if let HookKind::Step { vcpu, .. } = hook.kind
            && vcpu >= self.debug.vcpus()
        {
            return Err(limit(format!("there are {} vCPUs", self.debug.vcpus())));
        }
        let places = places(&hook, self.debug.accelerator()).map_err(limit)?;
        self.stand()?;
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
                armed.before = self.look(&registers, start, len)?;
                if armed.before.is_some() {
                    break;
                }
            }
        }
        let step = match armed.hook.kind {
            HookKind::Step { vcpu, count } => Some((vcpu, count)),
            _ => None,
        };
        self.table.hooks.insert(id, armed);
        if let Some((vcpu, count)) = step {
            let mut occasion = Occasion::new(self.debug.registers(vcpu).map_err(of_stub)?);
            occasion.steps.push((id, count));
            // What stands in front of a breakpoint would step over it unseen; one that is told of already is in the list.
            let listed = self.occasions.iter_mut().find(|o| o.registers.vcpu == vcpu);
            match listed {
                Some(listed) => listed.steps.push((id, count)),
                None => {
                    self.meet(&mut occasion);
                    self.occasions.push_back(occasion);
                }
            }
        }
        Ok(id)
    }

    fn insert(&mut self, place: Place, id: HookId) -> Result<(), EventError> {
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

    fn take_out(&mut self, place: Place, id: HookId) -> Result<(), EventError> {
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

    /// Takes a breakpoint out. INT3 bytes can be taken out only where they are mapped: by `vcpu`'s page tables, or another's.
    fn remove_point(&mut self, vcpu: u32, point: Point, place: Place) -> Result<(), EventError> {
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

    pub(super) fn disarm(&mut self, id: HookId) -> Result<(), EventError> {
        if !self.table.hooks.contains_key(&id) {
            self.queue.forget(id);
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
                self.debug.expect_stops().map_err(of_stub)?;
            }
        }
        self.table.hooks.remove(&id);
        for place in places {
            self.take_out(place, id)?;
        }
        for occasion in &mut self.occasions {
            occasion.tell.retain(|tell| tell.hook != id);
            occasion.steps.retain(|(hook, _)| *hook != id);
            occasion.waiting.take_if(|waiting| waiting.event.hook == id);
        }
        self.queue.forget(id);
        Ok(())
    }

    /// Before the end: watchpoints go with the hits that QEMU has not told of.
    fn settle(&mut self) -> Result<(), EventError> {
        if self.state == State::Runs && self.table.watches() {
            self.stand()?;
        }
        // Not told of any more, and its owner has it paused.
        self.debug
            .hold(self.pause || self.state == State::Paused)
            .map_err(of_stub)
    }

    /// The size of the code that a vCPU executes, in bits.
    pub(super) fn bits(&mut self, registers: &Registers) -> Result<u32, EventError> {
        let long = registers.efer & EFER_LMA != 0;
        // Compatibility mode has 32-bit addresses.
        if long && registers.rip >> 32 != 0 {
            return Ok(64);
        }
        if registers.cr0 & CR0_PE == 0 {
            return Ok(16);
        }
        let all = self.debug.all_registers(registers.vcpu).map_err(of_stub)?;
        let has = |bit: u16| all.cs.attributes & (1 << bit) != 0;
        Ok(match (long && has(13), has(14)) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        })
    }

    /// What is at the instruction pointer, as far as it can be read.
    pub(super) fn code(&mut self, registers: &Registers) -> Result<Vec<u8>, EventError> {
        let rip = registers.rip;
        // The page behind may not be there.
        let to_the_end = usize::try_from(0x1000 - (rip & 0xfff)).unwrap_or(MAX_LEN);
        for len in [MAX_LEN, to_the_end.min(MAX_LEN)] {
            let mut code = vec![0; len];
            match self.debug.read(registers.vcpu, rip, &mut code) {
                Ok(()) => return Ok(code),
                Err(GdbError::Refused { .. }) => {}
                Err(error) => return Err(of_stub(error)),
            }
        }
        Ok(Vec::new())
    }
}

/// A deadline that is none.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

impl Occasion {
    fn waits_with(&self, sequence: Sequence) -> bool {
        self.waiting
            .as_ref()
            .is_some_and(|w| w.event.sequence == sequence)
    }
}

/// Says to those who wait that nothing more comes.
struct Farewell(Arc<Queue>);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.end(End::Gone);
    }
}

/// Whether the connection is of no more use.
fn is_fatal(error: &EventError) -> bool {
    match error {
        EventError::Gone | EventError::Protocol { .. } => true,
        EventError::Target(error) => is_fatal_target(error),
        _ => false,
    }
}

fn is_fatal_target(error: &vmsight_target::TargetError) -> bool {
    !matches!(error, vmsight_target::TargetError::Gdb(GdbError::Refused { .. }))
}
