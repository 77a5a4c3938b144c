//! An event on its way: told to the monitor, and held until the verdict is there.

use std::cell::{OnceCell, RefCell};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use vmsight_arch::Registers;
use vmsight_channel::{Answer, Producer, Record, Spin};
use vmsight_hooks::{self as hooks, Delivery, Detail, Event, Overflow, Passage, Scope, Verdict};

use super::front::{Front, Place};
use super::registers::{Reader, Wanted};
use crate::session::Session;
use crate::table::Armed;

/// How long a vCPU waits for room in the ring, where it is to wait: a monitor that does not read must not stop
/// the guest.
const ROOM: Duration = Duration::from_secs(1);
/// How often who waits looks around.
const LOOK: Duration = Duration::from_millis(5);

thread_local! {
    static SPIN: RefCell<Spin> = RefCell::new(Spin::default());
}

/// A vCPU at an event, on its own thread. To read all registers costs more than all the rest of an event that nobody is told of, so
/// that is done only where somebody wants to see them.
#[derive(Debug)]
pub(super) struct Moment<'a> {
    pub(super) front: &'a Front,
    pub(super) vcpu: u32,
    /// Where its instruction was translated.
    translated: u64,
    all: OnceCell<Option<Registers>>,
    /// What was wanted first: mostly nobody wants any others.
    few: OnceCell<(Wanted, Registers)>,
}

enum Pushed {
    /// With this number.
    Yes(u64),
    Full,
    Removed,
}

impl<'a> Moment<'a> {
    pub(super) fn new(front: &'a Front, vcpu: u32, translated: u64) -> Self {
        Self {
            front,
            vcpu,
            translated,
            all: OnceCell::new(),
            few: OnceCell::new(),
        }
    }

    /// All registers; `None` where QEMU does not give them.
    pub(super) fn registers(&self) -> Option<&Registers> {
        let read = |reader: &Reader| reader.all(self.vcpu, Some(self.translated));
        self.all
            .get_or_init(|| self.front.registers.as_ref().map(read))
            .as_ref()
    }

    /// At least those that are wanted; `None` where QEMU does not give them.
    pub(super) fn with<T>(&self, wanted: Wanted, look: impl FnOnce(&Registers) -> T) -> Option<T> {
        if let Some(all) = self.all.get() {
            return all.as_ref().map(look);
        }
        let reader = self.front.registers.as_ref()?;
        let read = || reader.read(self.vcpu, Some(self.translated), wanted);
        let (has, few) = self.few.get_or_init(|| (wanted, read()));
        Some(match has.covers(wanted) {
            true => look(few),
            false => look(&read()),
        })
    }

    /// Whether a hook's scope is that of the vCPU. A hook with a scope is armed only where there are registers.
    pub(super) fn is_in_scope(&self, armed: &Armed) -> bool {
        let scope = armed.hook.scope;
        scope == Scope::All
            || self
                .with(armed.judged_by, |r| scope.covers(r.cr3))
                .unwrap_or(false)
    }

    /// What a hook in whose scope the vCPU is was on has happened.
    pub(super) fn occur(&self, armed: &Arc<Armed>, detail: Detail) {
        if self.is_wanted(armed, &detail) {
            self.tell(armed, detail);
        }
    }

    /// The same, without a word of it: whether it is one to be told of.
    pub(super) fn is_wanted(&self, armed: &Armed, detail: &Detail) -> bool {
        if armed.is_removed() {
            return false;
        }
        armed.occurred.fetch_add(1, Ordering::Relaxed);
        self.wants(armed, detail)
    }

    /// Tells of it, and waits for the verdict where it is to be waited for.
    pub(super) fn tell(&self, armed: &Arc<Armed>, detail: Detail) {
        let (held, patience) = match armed.hook.delivery {
            Delivery::Counted => return,
            Delivery::Told { .. } => (false, ROOM),
            Delivery::Held { deadline, .. } => (true, deadline),
        };
        let session = &armed.session;
        let Some(place) = self.front.place(self.vcpu) else {
            // There are more vCPUs than rings.
            self.lose(session, armed, held);
            return;
        };
        let start = Instant::now();
        let sequence = loop {
            match self.push(session, place, armed, detail, held) {
                Pushed::Yes(sequence) => break sequence,
                Pushed::Removed => return,
                Pushed::Full => {}
            }
            let drop = Delivery::Told {
                overflow: Overflow::Drop,
            };
            let drops = armed.hook.delivery == drop;
            let late = !drops && start.elapsed() >= patience;
            if drops || late || !self.front.is_running() {
                // Who has waited for long enough does not wait again at the next event: the hook comes out.
                self.lose(session, armed, held || late);
                return;
            }
            let rings = place.rings.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, ring)) = rings.iter().find(|(id, _)| *id == session.id) {
                ring.sleep_for_room(&session.shared, LOOK);
            }
        };
        if held {
            let verdict = self.wait(session, place, armed, sequence, Instant::now() + patience);
            self.apply(armed, &verdict);
        }
    }

    /// Whether the hook's filter wants it. A hook with a filter is armed only where there are registers.
    fn wants(&self, armed: &Armed, detail: &Detail) -> bool {
        if armed.sieve.is_open() {
            return true;
        }
        let passage = self.with(armed.judged_by, |registers| {
            let moment = hooks::Moment { registers, detail };
            armed.sieve.pass(moment, self.front, Instant::now)
        });
        passage.is_none_or(|passage| passage == Passage::Wanted)
    }

    /// There is no room, and it is waited for no more where it `expires`.
    fn lose(&self, session: &Session, armed: &Armed, expires: bool) {
        armed.dropped.fetch_add(1, Ordering::Relaxed);
        if let Some(area) = session.shared.area(self.vcpu) {
            area.dropped().fetch_add(1, Ordering::Relaxed);
        }
        if expires {
            self.front.expired(armed);
        }
    }

    fn push(
        &self,
        session: &Arc<Session>,
        place: &Place,
        armed: &Arc<Armed>,
        detail: Detail,
        held: bool,
    ) -> Pushed {
        let mut rings = place.rings.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock, which who takes a hook out takes too: nothing is told of it when he is through.
        if armed.is_removed() || session.is_over() {
            return Pushed::Removed;
        }
        if !rings.iter().any(|(id, _)| *id == session.id) {
            // Those of monitors that are gone go, too.
            let there = self.front.sessions();
            rings.retain(|(id, _)| there.iter().any(|s| s.id == *id));
            rings.push((session.id, Producer::new(self.vcpu)));
        }
        let ring = rings.iter_mut().find(|(id, _)| *id == session.id);
        let Some((area, (_, ring))) = session.shared.area(self.vcpu).zip(ring) else {
            return Pushed::Removed;
        };
        if !ring.has_room(&session.shared) {
            return Pushed::Full;
        }
        let none = Registers {
            vcpu: self.vcpu,
            ..Registers::default()
        };
        let registers = self.registers().unwrap_or(&none);
        let sequence = session.sequence.fetch_add(1, Ordering::Relaxed);
        let event = Event {
            sequence,
            time: SystemTime::now(),
            vcpu: self.vcpu,
            hook: armed.id,
            cr3: registers.cr3,
            detail,
            held,
        };
        let Some(record) = Record::new(&event, registers) else {
            return Pushed::Removed;
        };
        if held {
            area.open_event(sequence);
            let number = session.id << 48 ^ sequence.wrapping_add(1);
            place.held.store(number, Ordering::SeqCst);
        }
        ring.push(&session.shared, &record);
        armed.told.fetch_add(1, Ordering::Relaxed);
        Pushed::Yes(sequence)
    }

    fn wait(
        &self,
        session: &Session,
        place: &Place,
        armed: &Armed,
        sequence: u64,
        deadline: Instant,
    ) -> Verdict {
        let Some(area) = session.shared.area(self.vcpu) else {
            return Verdict::Continue;
        };
        let verdict = loop {
            if let Answer::Verdict(verdict) = area.answer_to(sequence) {
                if verdict.is_none() {
                    armed.notice("a verdict that makes no sense came; the guest went on");
                }
                break verdict.unwrap_or_default();
            }
            // Looked at after the answer: who answers and then takes the hook out has answered. QEMU's main
            // thread waits for this one when the VM is to stand still: it does so as soon as the vCPU is out of
            // the guest, whatever the verdict.
            if armed.is_removed() || session.is_over() || !self.front.is_running() {
                break Verdict::Continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                area.close_event();
                place.held.store(0, Ordering::SeqCst);
                self.front.expired(armed);
                return Verdict::Continue;
            }
            SPIN.with_borrow_mut(|spin| area.wait_for_answer(sequence, spin, left.min(LOOK)));
        };
        area.close_event();
        place.held.store(0, Ordering::SeqCst);
        verdict
    }

    fn apply(&self, armed: &Armed, verdict: &Verdict) {
        match verdict {
            Verdict::Continue => {}
            Verdict::Pause => self.front.pause(),
            Verdict::Remove => self.front.disarm(armed.id),
            // The monitor has been told what can be done here, and knows better.
            _ => armed.notice("a plugin of QEMU cannot do that; the guest went on"),
        }
    }
}
