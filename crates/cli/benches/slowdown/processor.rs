//! Processor time as Linux counts it for each thread: what somebody else's work on this machine does not add to.

use std::fs;

use serde_json::json;
use vmsight_lab::Guest;

/// Whose time is looked at.
pub(crate) struct Meter {
    qemu: u32,
    /// Threads that are a vCPU each.
    vcpus: Vec<u64>,
}

/// Nanoseconds on a processor since the threads began.
#[derive(Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) vcpus: u64,
    /// QEMU's other threads.
    pub(crate) rest: u64,
    /// A monitor's, if there is one.
    pub(crate) monitor: u64,
}

impl Meter {
    /// QEMU says which of its threads are vCPUs. It is asked now, for it serves one client at a time.
    pub(crate) fn of(guest: &Guest) -> Self {
        let answer = guest
            .qmp()
            .unwrap()
            .execute("query-cpus-fast", json!({}))
            .unwrap();
        let vcpus = answer.as_array().unwrap().iter();
        Self {
            qemu: guest.pid(),
            vcpus: vcpus.map(|cpu| cpu["thread-id"].as_u64().unwrap()).collect(),
        }
    }

    pub(crate) fn read(&self, monitor: Option<u32>) -> Spent {
        let (vcpus, rest) = threads(self.qemu)
            .into_iter()
            .partition::<Vec<_>, _>(|(thread, _)| self.vcpus.contains(thread));
        let sum = |threads: Vec<(u64, u64)>| threads.into_iter().map(|(_, spent)| spent).sum();
        assert_eq!(vcpus.len(), self.vcpus.len(), "a vCPU's thread is gone");
        Spent {
            vcpus: sum(vcpus),
            rest: sum(rest),
            monitor: monitor.map_or(0, |pid| sum(threads(pid))),
        }
    }
}

impl Spent {
    /// Milliseconds since `earlier`. A thread that ended meanwhile is left out, and what it had spent counts as nothing.
    pub(crate) fn since(self, earlier: Self) -> [f64; 3] {
        let difference = |now: u64, then: u64| now.saturating_sub(then) as f64 / 1e6;
        [
            difference(self.vcpus, earlier.vcpus),
            difference(self.rest, earlier.rest),
            difference(self.monitor, earlier.monitor),
        ]
    }
}

/// The threads of a process, and for each the nanoseconds that it was on a processor: the first field of `schedstat`
/// (Documentation/scheduler/sched-stats.rst). What a hypervisor took away meanwhile is not in it where the kernel is told (steal time).
fn threads(pid: u32) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let entry = entry.unwrap();
        // It may have ended by now.
        let Ok(text) = fs::read_to_string(entry.path().join("schedstat")) else {
            continue;
        };
        let thread = entry.file_name().to_str().unwrap().parse().unwrap();
        found.push((thread, text.split(' ').next().unwrap().parse().unwrap()));
    }
    found
}
