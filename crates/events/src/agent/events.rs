//! The rings of all vCPUs as one stream of events.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmsight_arch::Registers;
use vmsight_channel::{Consumer, Record, Shared, Spin, VerdictWords};
use vmsight_hooks::{Event, HookId, Sequence};

use crate::EventError;

/// Events that are not held and whose registers are kept.
const REMEMBERED: usize = 1024;
/// The longest sleep: the end of the VM is looked for in between, should its bell be lost.
const SLEEP: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Events {
    shared: Arc<Shared>,
    gone: Arc<AtomicBool>,
    wakes: AtomicU64,
    rings: Mutex<Rings>,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Rings {
    /// Each with the records that were fetched from it and not delivered yet.
    rings: Vec<(Consumer, VecDeque<Record>)>,
    spin: Spin,
}

#[derive(Debug, Default)]
struct Kept {
    registers: HashMap<Sequence, Registers>,
    /// Those that were only told, oldest first.
    told: VecDeque<Sequence>,
    /// The event that each vCPU waits with, and its hook.
    held: HashMap<u32, (Sequence, HookId)>,
}

impl Events {
    pub(super) fn new(shared: Arc<Shared>, gone: Arc<AtomicBool>) -> Self {
        Self {
            shared,
            gone,
            wakes: AtomicU64::new(0),
            rings: Mutex::new(Rings {
                rings: Vec::new(),
                spin: Spin::default(),
            }),
            kept: Mutex::default(),
        }
    }

    /// The next event of any vCPU: of those that are there the one with the lowest number.
    pub(super) fn next(&self, deadline: Instant) -> Result<Option<Event>, EventError> {
        let wakes = self.wakes.load(Ordering::SeqCst);
        loop {
            let bell = self.shared.bell();
            {
                let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some((event, registers)) = rings.pop(&self.shared)? {
                    drop(rings);
                    self.keep(&event, registers);
                    return Ok(Some(event));
                }
            }
            if self.gone.load(Ordering::SeqCst) {
                return Err(EventError::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wakes.load(Ordering::SeqCst) != wakes {
                return Ok(None);
            }
            // Only one thread spins; the others sleep at once.
            let rang = match self.rings.try_lock() {
                Ok(mut rings) => self.shared.spin(bell, &mut rings.spin),
                Err(_) => false,
            };
            if !rang {
                self.shared.sleep(bell, left.min(SLEEP));
            }
        }
    }

    pub(super) fn wake(&self) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
        self.shared.ring_bell();
    }

    fn keep(&self, event: &Event, registers: Registers) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.registers.insert(event.sequence, registers);
        if event.held {
            if let Some((old, _)) = kept.held.insert(event.vcpu, (event.sequence, event.hook)) {
                kept.registers.remove(&old);
            }
            return;
        }
        kept.told.push_back(event.sequence);
        if kept.told.len() > REMEMBERED
            && let Some(oldest) = kept.told.pop_front()
        {
            kept.registers.remove(&oldest);
        }
    }

    pub(super) fn registers(&self, event: &Event) -> Option<Registers> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.registers.get(&event.sequence).copied()
    }

    /// Gives the verdict; false where the event does not wait for one any more.
    pub(super) fn answer(&self, event: &Event, verdict: &VerdictWords) -> bool {
        // Held over the answer: a vCPU's place for verdicts has one writer at a time.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.held.get(&event.vcpu).map(|(sequence, _)| *sequence) != Some(event.sequence) {
            return false;
        }
        kept.held.remove(&event.vcpu);
        kept.registers.remove(&event.sequence);
        match self.shared.area(event.vcpu) {
            Some(area) if area.is_open(event.sequence) => {
                area.answer(event.sequence, verdict);
                true
            }
            _ => false,
        }
    }

    /// A hook is out: the vCPUs that it held went on, and none of its events is delivered any more.
    pub(super) fn forget(&self, hook: HookId) {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.forget(&self.shared, hook);
        drop(rings);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.held.retain(|_, (_, its)| *its != hook);
    }
}

impl Rings {
    /// vCPUs may come while the VM runs.
    fn grow(&mut self, shared: &Shared) {
        let known = u32::try_from(self.rings.len()).unwrap_or(u32::MAX);
        let new = (known..shared.vcpus()).map(|vcpu| (Consumer::new(vcpu), VecDeque::new()));
        self.rings.extend(new);
    }

    /// Takes what is there, without waiting.
    fn pop(&mut self, shared: &Shared) -> Result<Option<(Event, Registers)>, EventError> {
        self.grow(shared);
        let mut first: Option<(u32, u64)> = None;
        for (vcpu, (ring, ahead)) in (0..).zip(&mut self.rings) {
            if ahead.is_empty() {
                ahead.extend(ring.pop(shared).map_err(lies)?);
            }
            if let Some(record) = ahead.front()
                && first.is_none_or(|(_, sequence)| record.sequence() < sequence)
            {
                first = Some((vcpu, record.sequence()));
            }
        }
        let Some((vcpu, _)) = first else { return Ok(None) };
        let record = self
            .rings
            .get_mut(vcpu as usize)
            .and_then(|(_, ahead)| ahead.pop_front());
        match record {
            Some(record) => record.read(vcpu).map(Some).map_err(lies),
            None => Ok(None),
        }
    }

    /// Drops what is there of a hook that is out: no more of it comes.
    fn forget(&mut self, shared: &Shared, hook: HookId) {
        self.grow(shared);
        for (vcpu, (ring, ahead)) in (0..).zip(&mut self.rings) {
            while let Ok(Some(record)) = ring.pop(shared) {
                ahead.push_back(record);
            }
            ahead.retain(|r| r.read(vcpu).map_or(true, |(event, _)| event.hook != hook));
        }
    }
}

fn lies(error: vmsight_channel::ChannelError) -> EventError {
    EventError::Protocol {
        what: format!("the agent's events: {error}"),
    }
}
