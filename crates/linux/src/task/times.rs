//! CPU time of processes and threads, as /proc shows it.

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use super::layouts::{SignalLayout, TaskLayout};
use crate::Kernel;
use crate::budget::Budget;
use crate::layout::Buffer;
use crate::structures::list;

/// The most threads of one process that are followed: a guest has no more than 4 Mi tasks in all, a process rarely above some thousand.
pub(crate) const MAX_THREADS: usize = 1 << 20;

/// Nanoseconds spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) user: u64,
    pub(crate) system: u64,
}

/// Times that were summed already. Each process has a `signal_struct` of its own; one that many say is theirs is followed once.
#[derive(Debug, Default)]
pub(crate) struct TimesCache(FxHashMap<u64, Result<Times, String>>);

impl TimesCache {
    /// The times of the `signal_struct` at `signal`, by `sum` where they are not known.
    pub(crate) fn of(
        &mut self,
        signal: Gva,
        sum: impl FnOnce() -> Result<Times, String>,
    ) -> Result<Times, String> {
        self.0.entry(signal.0).or_insert_with(sum).clone()
    }
}

/// The time of all threads of the process whose `signal_struct` is in `signal`, those that are gone included.
pub(crate) fn process_times(
    kernel: &Kernel,
    task: &TaskLayout,
    layout: &SignalLayout,
    signal: &Buffer,
    address: Gva,
    budget: &Budget,
) -> Result<Times, String> {
    let mut times = Times {
        user: layout.utime.of(signal),
        system: layout.stime.of(signal),
    };
    let mut runtime = layout.runtime.of(signal);
    let limit = budget.limit(MAX_THREADS);
    let threads = list::walk(kernel.space(), layout.thread_head.at(address), limit).walk;
    budget.walked(threads.items.len());
    if let Some(warning) = threads.end.warning("thread list") {
        return Err(warning);
    }
    for at in threads.items {
        let thread = task.thread_node.container(at);
        let read = |field: &crate::layout::Field<u64>| {
            field
                .read(kernel.space(), thread)
                .map_err(|error| format!("thread at {thread}: {error}"))
        };
        times.user = times.user.wrapping_add(read(&task.utime)?);
        times.system = times.system.wrapping_add(read(&task.stime)?);
        runtime = runtime.wrapping_add(read(&task.runtime)?);
    }
    Ok(adjust(times, runtime))
}

/// Ticks say how time divides between user and kernel mode, the scheduler's precise sum how much there was (`cputime_adjust` in
/// kernel/sched/cputime.c). The kernel also keeps what it shows from ever falling; a single look cannot see that.
pub(crate) fn adjust(times: Times, runtime: u64) -> Times {
    let Times { user, system } = times;
    if system == 0 {
        return Times {
            user: runtime,
            system: 0,
        };
    }
    if user == 0 {
        return Times {
            user: 0,
            system: runtime,
        };
    }
    let total = u128::from(user) + u128::from(system);
    let system = (u128::from(system) * u128::from(runtime) / total) as u64;
    Times {
        user: runtime.wrapping_sub(system),
        system,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_divide_the_precise_sum() {
        let times = |user, system| Times { user, system };
        assert_eq!(adjust(times(30, 10), 80), times(60, 20));
        assert_eq!(adjust(times(0, 10), 80), times(0, 80));
        assert_eq!(adjust(times(30, 0), 80), times(80, 0));
        assert_eq!(adjust(times(0, 0), 7), times(7, 0));
        let huge = adjust(times(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(huge.user.wrapping_add(huge.system), u64::MAX);
    }
}
