//! A filter at work, with what it counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::evaluate::{FilterMemory, Moment, Truth};
use super::tally::{Counting, Tallied};
use super::{Filter, Looks, Rate};
use crate::event::Counts;

/// What becomes of an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Passage {
    /// It is wanted.
    Wanted,
    /// The condition does not hold.
    Filtered,
    /// It does, but there were too many.
    Limited,
}

/// The filter of one hook that is armed. Any thread may use it.
#[derive(Debug, Default)]
pub struct Sieve {
    filter: Filter,
    looks: Looks,
    filtered: AtomicU64,
    undecided: AtomicU64,
    limited: AtomicU64,
    window: Mutex<Window>,
    counting: Mutex<Counting>,
}

/// The time that runs, and how many came in it.
#[derive(Debug, Default)]
struct Window {
    since: Option<Instant>,
    events: u32,
}

impl Window {
    fn admits(&mut self, rate: Rate, now: Instant) -> bool {
        let runs = |since: Instant| now.saturating_duration_since(since) < rate.per;
        if !self.since.is_some_and(runs) {
            self.since = Some(now);
            self.events = 0;
        }
        let admitted = self.events < rate.events;
        self.events += u32::from(admitted);
        admitted
    }
}

impl Sieve {
    /// A filter that has counted nothing yet.
    pub fn new(filter: Filter) -> Self {
        Self {
            looks: filter.looks(),
            filter,
            ..Self::default()
        }
    }

    /// Whether everything passes and nothing is counted: nobody needs to be asked then.
    pub const fn is_open(&self) -> bool {
        self.filter.is_none()
    }

    /// What it looks at: whatever else the registers of a [`Moment`] hold does not matter to it.
    pub const fn looks(&self) -> Looks {
        self.looks
    }

    /// What becomes of an event. The time is asked for only where it matters.
    pub fn pass(
        &self,
        moment: Moment<'_>,
        memory: &impl FilterMemory,
        now: impl FnOnce() -> Instant,
    ) -> Passage {
        if let Some(condition) = &self.filter.condition {
            match condition.truth(moment, memory) {
                Truth::False => {
                    self.filtered.fetch_add(1, Ordering::Relaxed);
                    return Passage::Filtered;
                }
                Truth::Unknown => {
                    self.undecided.fetch_add(1, Ordering::Relaxed);
                }
                Truth::True => {}
            }
        }
        if let Some(tally) = &self.filter.tally {
            let key = tally.key().number(moment, memory);
            let mut counting = self.counting.lock().unwrap_or_else(PoisonError::into_inner);
            counting.add(key.map(|number| tally.bucket(number)));
        }
        if let Some(rate) = self.filter.rate {
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            if !window.admits(rate, now()) {
                self.limited.fetch_add(1, Ordering::Relaxed);
                return Passage::Limited;
            }
        }
        Passage::Wanted
    }

    /// Fills in what became of events here.
    pub fn count(&self, counts: &mut Counts) {
        counts.filtered = self.filtered.load(Ordering::Relaxed);
        counts.undecided = self.undecided.load(Ordering::Relaxed);
        counts.limited = self.limited.load(Ordering::Relaxed);
    }

    /// What was counted by key; nothing where nothing was to be.
    pub fn tallied(&self) -> Tallied {
        self.counting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .tallied()
    }
}
