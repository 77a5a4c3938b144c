//! An event on its way: told to each hook that it concerns, and held until each verdict is there.
//!
//! The vCPU's thread may be wanted by the VMM at any time in between (to stop the VM, to save its state). Then it goes
//! back as if a signal had ended KVM_RUN, and goes on here when the VMM runs the vCPU again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_channel::{Answer, Producer, Record};
use vmsight_hooks::{Access, Decision, Delivery, Detail, Event, Expiry, Overflow, StepEnd, Verdict};

use crate::agent::Agent;
use crate::session::Session;
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

/// What a vCPU has when it begins a handler in 64-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Frame {
    /// The last two words of the stack: the error code, where the vector has one, and where the guest was.
    pub(crate) words: [u64; 2],
    pub(crate) cr2: u64,
}

impl Frame {
    fn detail(self, vector: u8) -> Detail {
        const PAGE_FAULT: u8 = 14;
        // #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP (SDM vol. 3A table 6-1), and AMD's #VC and #SX (APM vol. 2 table
        // 8-1).
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
        let [first, second] = self.words;
        let (error_code, rip) = match has_code {
            true => (Some(first as u32), second),
            false => (None, first),
        };
        Detail::Interrupt {
            vector,
            error_code,
            cr2: (vector == PAGE_FAULT).then_some(self.cr2),
            rip: Gva(rip),
        }
    }
}

/// What happened, and what it takes to let it happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Subject {
    Execute {
        rip: u64,
        patch: Option<u64>,
        /// At the begin of a handler: what the processor has pushed, and CR2.
        frame: Option<Frame>,
        /// Behind a filter in the guest: where its code does the instruction.
        resume: Option<u64>,
    },
    Step {
        rip: u64,
        made: u64,
        end: StepEnd,
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
            Self::Execute { rip, frame, .. } => match hook.armed.vector_at(rip) {
                Some(vector) => frame.unwrap_or_default().detail(vector),
                None => Detail::Execute { rip: Gva(rip) },
            },
            Self::Step { rip, made, end } => Detail::Step {
                rip: Gva(rip),
                made,
                end,
            },
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

/// How far one of those who are told is.
#[derive(Debug)]
enum Stage {
    /// It is to be told, and has waited for room since then.
    Untold { since: Option<Instant> },
    /// It was, and its verdict is awaited.
    Waits { sequence: u64, deadline: Instant },
    /// It has had its say.
    Done,
}

/// The event.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) subject: Subject,
    pub(crate) registers: Registers,
    /// In the order in which their hooks were armed.
    told: Vec<(Told, Stage)>,
    /// The verdicts, of which each is in its hook's place: they are put together when all are there.
    given: Vec<Option<Verdict>>,
    /// What was decided, where that is known already.
    decided: Option<Conclusion>,
}

/// What is done, and by whose wish.
pub(crate) type Conclusion = Decision<Arc<Armed>>;

/// Steps that are being made.
#[derive(Clone, Debug)]
pub(crate) struct Stepping {
    pub(crate) armed: Arc<Armed>,
    pub(crate) made: u64,
    pub(crate) left: u64,
}

impl Stepping {
    pub(crate) const fn new(armed: Arc<Armed>, count: u64) -> Self {
        Self {
            armed,
            made: 0,
            left: count,
        }
    }
}

/// How far it came.
#[derive(Debug)]
pub(crate) enum Progress {
    /// All were told, and this is what is done.
    Concluded(Conclusion),
    /// The VMM wants its thread.
    Interrupted,
}

/// What a vCPU has to wait for.
enum Wait {
    Nothing,
    Room(Arc<Session>),
    Verdict(Arc<Session>, u64),
}

impl Pending {
    /// `told` are those whose filters have let it through.
    pub(crate) fn new(subject: Subject, registers: Registers, told: Vec<Told>) -> Self {
        let untold = |told| (told, Stage::Untold { since: None });
        Self {
            subject,
            registers,
            given: vec![None; told.len()],
            told: told.into_iter().map(untold).collect(),
            decided: None,
        }
    }

    /// An event of which all is decided and nothing done yet.
    pub(crate) fn decided(subject: Subject, registers: Registers, conclusion: Conclusion) -> Self {
        Self {
            decided: Some(conclusion),
            ..Self::new(subject, registers, Vec::new())
        }
    }

    /// Tells those who are still to be told, and waits until each verdict is there. Hooks of one monitor are told
    /// one after the other, several monitors at the same time: the guest waits for the slowest, not for all in
    /// turn.
    pub(crate) fn advance(&mut self, agent: &'static Agent, vcpu: &Vcpu, own: &mut Own) -> Progress {
        loop {
            match self.turn(agent, vcpu, own) {
                Wait::Nothing => return Progress::Concluded(self.conclude()),
                Wait::Room(session) => {
                    if let Some(ring) = ring(agent, vcpu, own, &session) {
                        ring.sleep_for_room(&session.shared, LOOK);
                    }
                }
                Wait::Verdict(session, sequence) => {
                    if let Some(area) = session.shared.area(vcpu.index) {
                        area.wait_for_answer(sequence, &mut own.spin, LOOK);
                    }
                }
            }
            if vcpu.is_interrupted() {
                return Progress::Interrupted;
            }
        }
    }

    /// Goes through all once, as far as that goes without waiting.
    fn turn(&mut self, agent: &'static Agent, vcpu: &Vcpu, own: &mut Own) -> Wait {
        let mut wait = Wait::Nothing;
        // Monitors that are busy with an earlier hook.
        let mut busy: Vec<u64> = Vec::new();
        let (subject, registers) = (self.subject, self.registers);
        for ((told, stage), given) in self.told.iter_mut().zip(&mut self.given) {
            let session = &told.armed.session;
            if busy.contains(&session.id) {
                continue;
            }
            if let Stage::Untold { since } = stage {
                let since = *since.get_or_insert_with(Instant::now);
                match tell(agent, vcpu, own, told, &subject, &registers, since) {
                    Some(next) => *stage = next,
                    None => {
                        busy.push(session.id);
                        if matches!(wait, Wait::Nothing) {
                            wait = Wait::Room(Arc::clone(session));
                        }
                    }
                }
            }
            if let Stage::Waits { sequence, deadline } = *stage {
                match look(agent, vcpu, told, sequence, deadline) {
                    Some(verdict) => {
                        *given = Some(verdict);
                        *stage = Stage::Done;
                    }
                    None => {
                        busy.push(session.id);
                        if !matches!(wait, Wait::Verdict(..)) {
                            wait = Wait::Verdict(Arc::clone(session), sequence);
                        }
                    }
                }
            }
        }
        wait
    }

    fn conclude(&mut self) -> Conclusion {
        let mut conclusion = self.decided.take().unwrap_or_default();
        for ((told, _), given) in self.told.iter().zip(&mut self.given) {
            if let Some(verdict) = given.take() {
                conclusion.add(verdict, Arc::clone(&told.armed));
            }
        }
        conclusion
    }
}

/// The vCPU's end of its ring to a monitor.
fn ring<'o>(agent: &Agent, vcpu: &Vcpu, own: &'o mut Own, session: &Session) -> Option<&'o mut Producer> {
    if !own.rings.iter().any(|(id, _)| *id == session.id) {
        // Those of monitors that are gone go, too.
        let alive = agent.sessions();
        own.rings.retain(|(id, _)| alive.iter().any(|s| s.id == *id));
        own.rings.push((session.id, Producer::new(vcpu.index)));
    }
    let mut rings = own.rings.iter_mut();
    rings.find(|(id, _)| *id == session.id).map(|(_, ring)| ring)
}

/// Tells one; `None` where there is no room yet.
fn tell(
    agent: &Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    told: &Told,
    subject: &Subject,
    registers: &Registers,
    since: Instant,
) -> Option<Stage> {
    let armed = &told.armed;
    let session = &armed.session;
    if armed.is_removed() || session.is_over() {
        return Some(Stage::Done);
    }
    let (held, waits, patience) = match armed.hook.delivery {
        Delivery::Counted => return Some(Stage::Done),
        Delivery::Told { overflow } => (false, overflow == Overflow::Block, ROOM),
        Delivery::Held { deadline, .. } => (true, true, deadline),
    };
    let area = session.shared.area(vcpu.index);
    let Some((area, ring)) = area.zip(ring(agent, vcpu, own, session)) else {
        return Some(Stage::Done);
    };
    if !ring.has_room(&session.shared) {
        if waits && since.elapsed() < patience {
            return None;
        }
        armed.dropped.fetch_add(1, Ordering::Relaxed);
        area.dropped().fetch_add(1, Ordering::Relaxed);
        if waits {
            agent.expired(armed);
        }
        return Some(Stage::Done);
    }
    let sequence = session.sequence.fetch_add(1, Ordering::Relaxed);
    let event = Event {
        sequence,
        time: SystemTime::now(),
        vcpu: vcpu.index,
        hook: armed.id,
        cr3: registers.cr3,
        detail: subject.detail(told),
        held,
    };
    let Some(record) = Record::new(&event, registers) else {
        return Some(Stage::Done);
    };
    if held {
        area.open_event(sequence);
    }
    ring.push(&session.shared, &record);
    armed.told.fetch_add(1, Ordering::Relaxed);
    let deadline = Instant::now() + patience;
    Some(match held {
        true => Stage::Waits { sequence, deadline },
        false => Stage::Done,
    })
}

/// The verdict on an event that was told, if it is there or does not come any more.
fn look(agent: &Agent, vcpu: &Vcpu, told: &Told, sequence: u64, deadline: Instant) -> Option<Verdict> {
    let armed = &told.armed;
    let Some(area) = armed.session.shared.area(vcpu.index) else {
        return Some(Verdict::Continue);
    };
    let given = match area.answer_to(sequence) {
        Answer::Verdict(verdict) => {
            if verdict.is_none() {
                armed.notice("a verdict that makes no sense came; the guest went on");
            }
            verdict.unwrap_or_default()
        }
        // Looked at after the answer: who answers and then takes the hook out has answered.
        Answer::NotYet if armed.is_removed() || armed.session.is_over() => Verdict::Continue,
        Answer::NotYet if Instant::now() < deadline => return None,
        Answer::NotYet => {
            area.close_event();
            agent.expired(armed);
            return Some(Verdict::Continue);
        }
    };
    area.close_event();
    Some(given)
}

/// What the end of a deadline means for a hook.
pub(crate) fn expiry(armed: &Armed) -> Expiry {
    match armed.hook.delivery {
        Delivery::Held { expiry, .. } => expiry,
        _ => Expiry::Open,
    }
}
