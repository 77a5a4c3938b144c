//! What was found right in an earlier look at the same running guest, so that it need not be looked into again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmsight_arch::Gva;

use crate::text::Region;
use crate::{Certainty, Context, Finding, Outcome, Owner};

/// What checks that are made again and again of one guest (`vmsight check --watch`) know of the looks before: what they found, and the
/// kernel's code and what it was held against. The code is kept whole and compared byte by byte: no checksum whose collisions somebody
/// could make. As much memory is used as the kernel has text, some 15 MB.
#[derive(Clone, Debug, Default)]
pub struct Known {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    code: Option<Code>,
    unchanged: usize,
    /// What the last look found, after it had looked at it again.
    findings: Vec<Finding>,
}

impl Known {
    /// How many of the kernel's functions the last look did not decode: they were as the look before had found them right.
    #[must_use]
    pub fn unchanged_functions(&self) -> usize {
        self.state().unchanged
    }

    /// Takes what is known of the kernel's code, if it has the same functions and is held against the same.
    pub(crate) fn take_code(&self, surroundings: &Surroundings, now: &Region) -> Option<Code> {
        self.state().code.take().filter(|code| {
            let before = &code.region;
            code.surroundings == *surroundings
                && before.start == now.start
                && before.functions == now.functions
        })
    }

    /// Keeps what is known of it now.
    pub(crate) fn keep_code(&self, code: Code, unchanged: usize) {
        let mut state = self.state();
        (state.code, state.unchanged) = (Some(code), unchanged);
    }

    /// Whether the last look found all of this too: it need not be looked at again, for it has been now. Counts it if so.
    pub(crate) fn saw(&self, findings: &mut [Finding]) -> bool {
        let state = self.state();
        let before: Option<Vec<u32>> = findings
            .iter()
            .map(
                |now| match state.findings.iter().find(|f| f.is_of(now))?.certainty {
                    Certainty::Seen(times) => Some(times),
                    Certainty::Still => None,
                },
            )
            .collect();
        let Some(before) = before else { return false };
        for (finding, times) in findings.iter_mut().zip(before) {
            finding.certainty = Certainty::Seen(times.saturating_add(1));
        }
        true
    }

    /// Keeps what this look found.
    pub(crate) fn keep_findings(&self, outcomes: &[Outcome]) {
        self.state().findings = outcomes.iter().flat_map(|o| o.findings.iter().cloned()).collect();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What code is held against, beside what it points to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// Whose each address is.
    pub(crate) owners: Vec<(u64, u64, Owner)>,
    /// Places that the kernel patches, ascending.
    pub(crate) calls: Vec<u64>,
    /// Places of kprobes, ascending.
    pub(crate) probes: Vec<u64>,
}

/// The kernel's code, as it was.
#[derive(Debug)]
pub(crate) struct Code {
    pub(crate) surroundings: Surroundings,
    pub(crate) region: Region,
    /// What is known of each stretch of functions.
    pub(crate) stretches: Vec<Stretch>,
}

/// What is known of some functions in a row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stretch {
    /// Nothing was wrong, and what it depends on beside its bytes is in [`Surroundings`] and in `pointers`.
    pub(crate) right: bool,
    /// Pointers that it jumps through, and what they were.
    pub(crate) pointers: Vec<(Gva, Gva)>,
}

impl Code {
    /// Whether nothing has changed that would have the functions between two addresses, the stretch of this number, judged otherwise.
    pub(crate) fn is_right(
        &self,
        context: &Context,
        number: usize,
        now: &Region,
        (start, end): (u64, u64),
    ) -> bool {
        let same = self.region.slice(start, end) == now.slice(start, end);
        let pointer = |(slot, to): &(Gva, Gva)| context.space().read_u64(*slot) == Ok(to.0);
        let stretch = self.stretches.get(number);
        same && stretch.is_some_and(|stretch| stretch.right && stretch.pointers.iter().all(pointer))
    }
}
