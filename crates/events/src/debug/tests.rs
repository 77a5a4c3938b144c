//! Where an event holds only its own vCPU, with a backend that does what it is told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use gdbstub::common::Tid;
use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva, Registers};
use vmsight_hooks::{
    Access, BackendKind, Capability, Counts, Detail, Event, Hook, HookId, HookKind, Range, Register, StepEnd,
    Tallied, Verdict,
};
use vmsight_memory::{AddressSpace, GuestMemory};

use super::debuggee::{Action, Debuggee, Why};
use super::points::{Point, Watch};
use crate::{Backend, EventError, Monitor};

/// The vCPU that sleeps: it is not stepped.
const SLEEPER: u32 = 2;
const PLACE: u64 = 0xffff_ffff_8100_0000;

#[derive(Debug, Default)]
struct State {
    hooks: BTreeMap<HookId, HookKind>,
    events: VecDeque<Event>,
    answers: Vec<(u32, Verdict)>,
    last: u32,
}

impl State {
    fn tell(&mut self, hook: HookId, vcpu: u32, detail: Detail) {
        self.last += 1;
        self.events.push_back(Event {
            sequence: self.last.into(),
            time: SystemTime::UNIX_EPOCH,
            vcpu,
            hook,
            cr3: 0,
            detail,
            held: true,
        });
    }

    fn id(&self, wanted: impl Fn(&HookKind) -> bool) -> HookId {
        *self.hooks.iter().find(|(_, kind)| wanted(kind)).unwrap().0
    }
}

#[derive(Clone, Debug, Default)]
struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }

    fn meets(&self, vcpu: u32) {
        self.with(|state| {
            let hook = state.id(|kind| matches!(kind, HookKind::Execute { .. }));
            state.tell(hook, vcpu, Detail::Execute { rip: Gva(PLACE) });
        });
    }

    fn answered(&self) -> Vec<(u32, Verdict)> {
        self.with(|state| std::mem::take(&mut state.answers))
    }

    fn armed(&self) -> Vec<HookKind> {
        self.with(|state| state.hooks.values().copied().collect())
    }
}

impl Backend for Fake {
    fn kind(&self) -> BackendKind {
        BackendKind::AgentKvm
    }

    fn capabilities(&self) -> Vec<Capability> {
        Vec::new()
    }

    fn arm(&self, hook: &Hook) -> Result<HookId, EventError> {
        Ok(self.with(|state| {
            state.last += 1;
            let id = HookId(state.last);
            state.hooks.insert(id, hook.kind);
            if let HookKind::Step { vcpu, .. } = hook.kind
                && vcpu != SLEEPER
            {
                let detail = Detail::Step {
                    rip: Gva(PLACE + 1),
                    made: 1,
                    end: StepEnd::Count,
                };
                state.tell(id, vcpu, detail);
            }
            id
        }))
    }

    fn disarm(&self, id: HookId) -> Result<(), EventError> {
        self.with(|state| {
            state.hooks.remove(&id);
            state.events.retain(|event| event.hook != id);
        });
        Ok(())
    }

    fn next(&self, _deadline: Instant) -> Result<Option<Event>, EventError> {
        Ok(self.with(|state| state.events.pop_front()))
    }

    fn wake(&self) {}

    fn registers(&self, event: &Event) -> Result<Registers, EventError> {
        Ok(Registers {
            vcpu: event.vcpu,
            rip: match event.detail {
                Detail::Step { rip, .. } | Detail::Execute { rip } => rip.0,
                _ => PLACE,
            },
            ..Registers::default()
        })
    }

    fn answer(&self, event: &Event, verdict: &Verdict) -> Result<(), EventError> {
        self.with(|state| {
            // What is taken out before it is answered lets its vCPU go too soon.
            assert!(state.hooks.contains_key(&event.hook), "{event:?}");
            state.answers.push((event.vcpu, verdict.clone()));
        });
        Ok(())
    }

    fn counts(&self, _id: HookId) -> Result<Counts, EventError> {
        Ok(Counts::default())
    }

    fn tally(&self, _id: HookId) -> Result<Tallied, EventError> {
        Ok(Tallied::default())
    }
}

fn guest() -> (Fake, Debuggee) {
    let fake = Fake::default();
    let memory = GuestMemory::from_bytes(vec![(Gpa(0), vec![0; 0x1000])]).unwrap();
    let space = AddressSpace::new(memory, PagingMode::X86Level4, Dtb(0));
    let monitor = Monitor::new(Box::new(fake.clone()));
    (fake, Debuggee::over(monitor, space, None, 3, None))
}

fn tid(vcpu: usize) -> Tid {
    Tid::new(vcpu + 1).unwrap()
}

const SOON: Duration = Duration::from_secs(1);

#[test]
fn everybody_stands_but_who_sleeps() {
    let (fake, mut guest) = guest();
    guest.interrupt().unwrap();
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Interrupted));
    assert!(guest.registers(tid(0)).is_ok() && guest.registers(tid(1)).is_ok());
    assert!(guest.registers(tid(2)).is_err());
    assert_eq!(fake.answered(), []);
    // A second one while it stands is none.
    guest.interrupt().unwrap();
    guest.resume().unwrap();
    assert_eq!(fake.answered(), [(0, Verdict::Continue), (1, Verdict::Continue)]);
    assert_eq!(fake.armed(), []);
    assert_eq!(guest.poll(Duration::ZERO).unwrap(), None);
}

#[test]
fn a_breakpoint_that_is_taken_out_while_it_holds_stays_until_the_guest_goes_on() {
    let (fake, mut guest) = guest();
    let point = Point::Execute(PLACE);
    let monitor = guest.monitor().clone();
    guest.points.add(&monitor, point).unwrap();
    fake.meets(1);
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Met(point)));
    assert!(guest.points.remove(point) && !guest.points.remove(point));
    let execute = HookKind::Execute { at: Gva(PLACE) };
    assert!(fake.armed().contains(&execute));
    assert!(guest.change(tid(1), vec![(Register::RAX, 5)]));
    assert_eq!(guest.registers(tid(1)).unwrap().rax(), 5);
    guest.resume().unwrap();
    let changed = Verdict::SetRegisters(vec![(Register::RAX, 5)]);
    assert_eq!(fake.answered(), [(0, Verdict::Continue), (1, changed)]);
    assert_eq!(fake.armed(), []);
}

#[test]
fn a_step_moves_one_instruction_and_keeps_breakpoints() {
    let (fake, mut guest) = guest();
    let point = Point::Execute(PLACE);
    let monitor = guest.monitor().clone();
    guest.points.add(&monitor, point).unwrap();
    fake.meets(0);
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Met(point)));
    guest.action = Action::Step(tid(0));
    guest.resume().unwrap();
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Stepped));
    assert_eq!(guest.registers(tid(0)).unwrap().rip, PLACE + 1);
    guest.let_go().unwrap();
    assert_eq!(fake.armed(), []);
    assert!(!guest.stands());
}

#[test]
fn two_that_meet_it_at_once_are_told_one_after_the_other() {
    let (fake, mut guest) = guest();
    let point = Point::Execute(PLACE);
    let monitor = guest.monitor().clone();
    guest.points.add(&monitor, point).unwrap();
    fake.meets(0);
    fake.meets(1);
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Met(point)));
    assert_eq!(guest.thread(), tid(0));
    guest.resume().unwrap();
    assert_eq!(fake.answered(), [], "nobody moves before both are told");
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Met(point)));
    assert_eq!(guest.thread(), tid(1));
    guest.resume().unwrap();
    assert_eq!(fake.answered().len(), 2);
}

#[test]
fn a_write_is_made_before_it_is_told() {
    let (fake, mut guest) = guest();
    let point = Point::Memory {
        address: PLACE,
        len: 8,
        watch: Watch::Write,
    };
    let monitor = guest.monitor().clone();
    guest.points.add(&monitor, point).unwrap();
    fake.with(|state| {
        let hook = state.id(|kind| {
            let range = Range::Virtual {
                start: Gva(PLACE),
                len: 8,
            };
            *kind
                == HookKind::Memory {
                    range,
                    access: Access::WRITE,
                }
        });
        let detail = Detail::Memory {
            gva: Some(Gva(PLACE)),
            gpa: None,
            len: 8,
            access: Access::WRITE,
            old: None,
            new: None,
            done: false,
        };
        state.tell(hook, 1, detail);
    });
    assert_eq!(guest.poll(SOON).unwrap(), Some(Why::Met(point)));
    assert_eq!(
        fake.answered(),
        [(1, Verdict::Continue)],
        "the access was let happen"
    );
    assert_eq!(guest.registers(tid(1)).unwrap().rip, PLACE + 1);
}
