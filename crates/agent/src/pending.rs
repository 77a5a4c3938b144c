//! An event on its way: told to each hook that it concerns, and held until each verdict is there.
//!
//! The vCPU's thread may be wanted by the VMM at any time in between (to stop the VM, to save its state). Then it goes
//! back as if a signal had ended KVM_RUN, and goes on here when the VMM runs the vCPU again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_channel::{Answer, Producer, Record};
use vmsight_hooks::{Access, Delivery, Detail, Event, Expiry, Overflow, Verdict};

use crate::agent::{Agent, Session};
use crate::table::{Armed, Hooks};
use crate::vcpu::{Own, Vcpu};

/// How long a vCPU waits for room in the ring, where it is to wait: a monitor that does not read must not stop the guest.
const ROOM: Duration = Duration::from_secs(1);
/// How often who waits looks around.
const LOOK: Duration = Duration::from_millis(5);

/// What becomes of an MSR access that no hook stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Otherwise {
    /// It is done.
    Done,
    /// The VMM does it.
    Vmm,
    /// The VMM does not let it through.
    Fault,
}

/// What happened, and what it takes to let it happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Subject {
    Execute {
        rip: u64,
        patch: Option<u64>,
    },
    Step {
        rip: u64,
    },
    WriteMsr {
        index: u32,
        data: u64,
        old: Option<u64>,
        otherwise: Otherwise,
    },
    ReadMsr {
        index: u32,
        value: Option<u64>,
        otherwise: Otherwise,
    },
    Write {
        gpa: u64,
        len: u8,
        old: u64,
        new: u64,
    },
    Read {
        gpa: u64,
        len: u8,
        value: u64,
    },
    Port {
        out: bool,
        size: u8,
        port: u16,
        count: u32,
        offset: u64,
        value: Option<u32>,
    },
}

impl Subject {
    pub(crate) fn detail(&self, hook: &Told) -> Detail {
        match *self {
            Self::Execute { rip, .. } => Detail::Execute { rip: Gva(rip) },
            Self::Step { rip } => Detail::Step { rip: Gva(rip) },
            Self::WriteMsr { index, data, old, .. } => Detail::Msr {
                index,
                access: Access::WRITE,
                old,
                new: Some(data),
            },
            Self::ReadMsr { index, value, .. } => Detail::Msr {
                index,
                access: Access::READ,
                old: value,
                new: value,
            },
            Self::Write { gpa, len, old, new } => Detail::Memory {
                gva: hook.gva.map(Gva),
                gpa: Some(Gpa(gpa)),
                len,
                access: Access::WRITE,
                old: Some(old),
                new: Some(new),
                done: false,
            },
            Self::Read { gpa, len, value } => Detail::Memory {
                gva: hook.gva.map(Gva),
                gpa: Some(Gpa(gpa)),
                len,
                access: Access::READ,
                old: Some(value),
                new: Some(value),
                done: false,
            },
            Self::Port {
                out,
                size,
                port,
                value,
                ..
            } => Detail::Port {
                port,
                access: if out { Access::WRITE } else { Access::READ },
                len: size,
                value: if out { value } else { None },
            },
        }
    }
}

/// Somebody to be told.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) armed: Arc<Armed>,
    /// The virtual address of a memory access, where the hook gives it.
    pub(crate) gva: Option<u64>,
}

/// Those of `hooks` in whose scope a vCPU with this CR3 is.
pub(crate) fn in_scope(hooks: &Hooks, cr3: u64) -> Vec<Told> {
    let meant = hooks.iter().filter(|a| a.hook.scope.covers(cr3));
    meant
        .map(|armed| Told {
            armed: Arc::clone(armed),
            gva: None,
        })
        .collect()
}

#[derive(Debug)]
enum Stage {
    /// The hook at `next` is to be told.
    Tell { since: Option<Instant> },
    /// It was, and its verdict is awaited.
    Await {
        session: Arc<Session>,
        sequence: u64,
        deadline: Instant,
    },
}

/// The event.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) subject: Subject,
    pub(crate) registers: Registers,
    told: Vec<Told>,
    next: usize,
    stage: Stage,
}

/// Steps that are being made.
#[derive(Clone, Debug)]
pub(crate) struct Stepping {
    pub(crate) armed: Arc<Armed>,
    pub(crate) left: u64,
}

/// How far it came.
#[derive(Debug)]
pub(crate) enum Progress {
    /// All were told, and this is what is done; by whose wish, where it is somebody's.
    Concluded(Verdict, Option<Arc<Armed>>),
    /// The VMM wants its thread.
    Interrupted,
}

impl Pending {
    /// `told` are those whose filters have let it through.
    pub(crate) fn new(subject: Subject, registers: Registers, told: Vec<Told>) -> Self {
        Self {
            subject,
            registers,
            told,
            next: 0,
            stage: Stage::Tell { since: None },
        }
    }

    /// Tells those who are still to be told. The first verdict that is not "continue" decides.
    pub(crate) fn advance(&mut self, agent: &'static Agent, vcpu: &Vcpu, own: &mut Own) -> Progress {
        while let Some(told) = self.told.get(self.next).cloned() {
            let step = match &mut self.stage {
                Stage::Tell { since } => {
                    let since = *since.get_or_insert_with(Instant::now);
                    self.tell(agent, vcpu, own, &told, since)
                }
                Stage::Await {
                    session,
                    sequence,
                    deadline,
                } => {
                    let (session, sequence, deadline) = (Arc::clone(session), *sequence, *deadline);
                    wait(agent, vcpu, own, &told, &session, sequence, deadline)
                }
            };
            match step {
                Step::Stay if vcpu.is_interrupted() => return Progress::Interrupted,
                Step::Stay => {}
                Step::Await(stage) => self.stage = stage,
                Step::Given(Verdict::Continue) => {
                    self.next += 1;
                    self.stage = Stage::Tell { since: None };
                }
                Step::Given(verdict) => return Progress::Concluded(verdict, Some(told.armed)),
            }
        }
        Progress::Concluded(Verdict::Continue, None)
    }

    fn tell(&self, agent: &Agent, vcpu: &Vcpu, own: &mut Own, told: &Told, since: Instant) -> Step {
        let armed = &told.armed;
        let go_on = Step::Given(Verdict::Continue);
        if armed.is_removed() {
            return go_on;
        }
        let (held, patience) = match armed.hook.delivery {
            Delivery::Counted => return go_on,
            Delivery::Told { .. } => (false, ROOM),
            Delivery::Held { deadline, .. } => (true, deadline),
        };
        let Some(session) = agent.session() else {
            return go_on;
        };
        let ring = match &mut own.ring {
            Some((id, ring)) if *id == session.id => ring,
            other => &mut other.insert((session.id, Producer::new(vcpu.index))).1,
        };
        if !ring.has_room(&session.shared) {
            let waits = !matches!(
                armed.hook.delivery,
                Delivery::Told {
                    overflow: Overflow::Drop
                }
            );
            if waits && since.elapsed() < patience {
                ring.sleep_for_room(&session.shared, LOOK);
                return Step::Stay;
            }
            armed.dropped.fetch_add(1, Ordering::Relaxed);
            if let Some(area) = session.shared.area(vcpu.index) {
                area.dropped().fetch_add(1, Ordering::Relaxed);
            }
            if held {
                agent.expired(armed);
            }
            return go_on;
        }
        let sequence = session.sequence.fetch_add(1, Ordering::Relaxed);
        let event = Event {
            sequence,
            time: SystemTime::now(),
            vcpu: vcpu.index,
            hook: armed.id,
            cr3: self.registers.cr3,
            detail: self.subject.detail(told),
            held,
        };
        let (Some(record), Some(area)) = (
            Record::new(&event, &self.registers),
            session.shared.area(vcpu.index),
        ) else {
            return go_on;
        };
        if held {
            area.open_event(sequence);
        }
        ring.push(&session.shared, &record);
        armed.told.fetch_add(1, Ordering::Relaxed);
        if !held {
            return go_on;
        }
        let deadline = Instant::now() + patience;
        Step::Await(Stage::Await {
            session,
            sequence,
            deadline,
        })
    }
}

enum Step {
    Stay,
    Await(Stage),
    Given(Verdict),
}

fn wait(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    told: &Told,
    session: &Arc<Session>,
    sequence: u64,
    deadline: Instant,
) -> Step {
    let armed = &told.armed;
    let Some(area) = session.shared.area(vcpu.index) else {
        return Step::Given(Verdict::Continue);
    };
    let given = match area.answer_to(sequence) {
        Answer::Verdict(verdict) => {
            if verdict.is_none() {
                agent.notice(
                    Some(armed.id),
                    "a verdict that makes no sense came; the guest went on",
                );
            }
            verdict.unwrap_or_default()
        }
        // Looked at after the answer: who answers and then takes the hook out has answered.
        Answer::NotYet if armed.is_removed() || session.is_over() => Verdict::Continue,
        Answer::NotYet => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                area.close_event();
                agent.expired(armed);
                return Step::Given(Verdict::Continue);
            }
            area.wait_for_answer(sequence, &mut own.spin, left.min(LOOK));
            return Step::Stay;
        }
    };
    area.close_event();
    Step::Given(given)
}

/// What the end of a deadline means for a hook.
pub(crate) fn expiry(armed: &Armed) -> Expiry {
    match armed.hook.delivery {
        Delivery::Held { expiry, .. } => expiry,
        _ => Expiry::Open,
    }
}
