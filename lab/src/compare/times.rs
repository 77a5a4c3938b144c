//! When processes and threads began and what they have used since.

use vmsight_linux::Kernel;
use vmsight_linux::clock::rfc3339;

use super::Differences;
use crate::truth::{Process, Truth};

/// Nanoseconds of a clock tick as /proc counts them.
const TICK: i64 = 10_000_000;
/// Nanoseconds of a second.
const SECOND: i64 = 1_000_000_000;
/// What rounding can make of the same time: each of the two numbers is cut to whole ticks.
const ROUNDED: u64 = 2;

/// CPU time in clock ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) user: u64,
    pub(super) system: u64,
}

impl Used {
    fn sum(self) -> u64 {
        self.user.saturating_add(self.system)
    }
}

/// Clock ticks since the guest's account, by vmsight's own view of its clock.
pub(super) fn passed(kernel: &Kernel, truth: &Truth) -> u64 {
    let since = kernel.info().uptime_s.unwrap_or_default() - truth.system.uptime;
    // Some seconds lie between the account of a process and that of the clock.
    ((since.max(0.0) + 10.0) * 100.0) as u64
}

/// Whether it may have run after the account: kernel threads, the first process, which waited for the account, the one whose arguments
/// were then paged out, and the one that takes orders. The others stand still.
pub(super) fn may_run(process: &Process) -> bool {
    process.kthread || process.pid == 1 || ["paged-out", "orders"].iter().any(|name| process.comm == *name)
}

/// The start by the wall clock: ticks since boot, added to a boot time that is cut to whole seconds and adjusted while the guest runs.
pub(super) fn start(
    at: &dyn Fn(&str) -> String,
    seen: Option<&str>,
    ticks: u64,
    truth: &Truth,
    out: &mut Differences,
) {
    let said = (truth.system.boot_time as i64) * SECOND + (ticks as i64) * TICK;
    let (from, to) = (rfc3339(said - SECOND), rfc3339(said + 2 * SECOND));
    // Such times are in order where their texts are.
    let near = (from.as_deref()..to.as_deref()).contains(&seen);
    out.near(at("start_time"), near, seen, rfc3339(said));
}

/// What it has used: as much as the guest said, or with `passed` up to so many ticks more.
///
/// How the sum divides is the kernel's estimate, and /proc never lets either number fall, whatever it estimates later: a look from
/// outside cannot know what was shown before. So the parts of what stands still may differ by a quarter of the whole.
pub(super) fn used(
    at: &dyn Fn(&str) -> String,
    seen: Used,
    said: Used,
    passed: Option<u64>,
    out: &mut Differences,
) {
    let most = said.sum() + ROUNDED + passed.unwrap_or_default();
    let near = (said.sum().saturating_sub(ROUNDED)..=most).contains(&seen.sum());
    out.near(at("CPU time"), near, seen, said);
    if passed.is_none() {
        let slack = ROUNDED + said.sum() / 4;
        let near = seen.user.abs_diff(said.user) <= slack && seen.system.abs_diff(said.system) <= slack;
        out.near(at("parts of CPU time"), near, seen, said);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn differences(seen: (u64, u64), said: (u64, u64), passed: Option<u64>) -> usize {
        let used_of = |(user, system)| Used { user, system };
        let mut out = Differences::default();
        used(
            &|what| what.to_owned(),
            used_of(seen),
            used_of(said),
            passed,
            &mut out,
        );
        out.found.len()
    }

    #[test]
    fn what_stands_still_has_used_what_it_had() {
        assert_eq!(differences((30, 10), (30, 10), None), 0);
        assert_eq!(differences((31, 11), (30, 10), None), 0);
        assert_eq!(differences((40, 10), (30, 10), None), 1);
        assert_eq!(differences((80, 10), (30, 10), None), 2);
        assert_eq!(differences((10, 30), (30, 10), None), 1);
    }

    #[test]
    fn what_may_run_has_used_no_more_than_there_was() {
        assert_eq!(differences((30, 60), (30, 10), Some(50)), 0);
        assert_eq!(differences((30, 70), (30, 10), Some(50)), 1);
        assert_eq!(differences((20, 10), (30, 10), Some(50)), 1);
    }
}
