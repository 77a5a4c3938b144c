//! Between the thread that has the connection and those that fetch events.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmsight_hooks::{Counts, Event, HookId, Sequence, Sieve, Tallied};
use vmsight_target::gdb::Waker;

use crate::EventError;

/// Most events that wait to be fetched.
pub(super) const CAPACITY: usize = 4096;

/// How the connection ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// The VM is gone.
    Gone,
    /// The connection failed, in words.
    Failed(String),
}

impl End {
    /// The error that says so.
    pub(super) fn error(&self) -> EventError {
        match self {
            Self::Gone => EventError::Gone,
            Self::Failed(why) => EventError::Protocol {
                what: format!("the connection to the gdb stub was lost: {why}"),
            },
        }
    }
}

/// Events that wait, and what became of the others.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    waker: Waker,
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<Event>,
    /// How often those who wait were woken.
    wakes: u64,
    end: Option<End>,
    counts: HashMap<HookId, Counts>,
    /// The filters of the hooks, with what they counted.
    sieves: HashMap<HookId, Arc<Sieve>>,
    last: Sequence,
    /// The other thread waits for room.
    waits: bool,
    /// Since when an event has waited for room, where there has been none from then on.
    full_since: Option<Instant>,
}

impl Queue {
    pub(super) fn new(waker: Waker) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            waker,
        }
    }

    /// The next event; `None` at the deadline or when woken. What was told before the end is still given.
    pub(super) fn next(&self, deadline: Instant) -> Result<Option<Event>, EventError> {
        let mut state = self.state();
        let wakes = state.wakes;
        loop {
            if let Some(event) = state.events.pop_front() {
                state.full_since = None;
                if std::mem::take(&mut state.waits) {
                    self.waker.wake();
                }
                return Ok(Some(event));
            }
            if let Some(end) = &state.end {
                return Err(end.error());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.wakes != wakes {
                return Ok(None);
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn wake(&self) {
        let mut state = self.state();
        state.wakes = state.wakes.wrapping_add(1);
        self.changed.notify_all();
    }

    /// Whether there is room for an event that nobody waits with. Where there is none the waker is used once there is.
    pub(super) fn has_room(&self) -> bool {
        let mut state = self.state();
        state.waits = state.events.len() >= CAPACITY;
        !state.waits
    }

    /// How long events have waited for room, from when the first did: the guest waits once for a monitor that takes none, however many
    /// hooks it meets.
    pub(super) fn waited(&self) -> Duration {
        let mut state = self.state();
        state.full_since.get_or_insert_with(Instant::now).elapsed()
    }

    /// Puts an event in and gives it its number.
    pub(super) fn push(&self, mut event: Event) -> Sequence {
        let mut state = self.state();
        state.last = state.last.wrapping_add(1);
        event.sequence = state.last;
        state.counts.entry(event.hook).or_default().told += 1;
        state.events.push_back(event);
        self.changed.notify_one();
        state.last
    }

    /// Takes out those of a hook that is not armed any more.
    pub(super) fn forget(&self, hook: HookId) {
        let mut state = self.state();
        state.events.retain(|event| event.hook != hook);
        if state.events.len() < CAPACITY {
            state.full_since = None;
        }
        if let Some(sieve) = state.sieves.remove(&hook) {
            sieve.count(state.counts.entry(hook).or_default());
        }
    }

    /// Takes out one event, where nobody has fetched it.
    pub(super) fn withdraw(&self, sequence: Sequence) {
        self.state().events.retain(|event| event.sequence != sequence);
    }

    pub(super) fn count(&self, hook: HookId, change: impl FnOnce(&mut Counts)) {
        change(self.state().counts.entry(hook).or_default());
    }

    pub(super) fn counts(&self, hook: HookId) -> Counts {
        let state = self.state();
        let mut counts = state.counts.get(&hook).copied().unwrap_or_default();
        if let Some(sieve) = state.sieves.get(&hook) {
            sieve.count(&mut counts);
        }
        counts
    }

    /// A hook is armed, with this filter.
    pub(super) fn know(&self, hook: HookId, sieve: Arc<Sieve>) {
        self.state().sieves.insert(hook, sieve);
    }

    /// What a hook's filter counted by key.
    pub(super) fn tallied(&self, hook: HookId) -> Tallied {
        let sieve = self.state().sieves.get(&hook).cloned();
        sieve.map(|s| s.tallied()).unwrap_or_default()
    }

    /// The connection ended: nobody waits any more.
    pub(super) fn end(&self, end: End) {
        let mut state = self.state();
        state.end.get_or_insert(end);
        self.changed.notify_all();
    }

    /// How it ended.
    pub(super) fn ended(&self) -> End {
        self.state().end.clone().unwrap_or(End::Gone)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that is done under the lock leaves it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
