//! One run of a program: how long it took, what it used.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What one run cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// From before the process is made until it is gone.
    pub(crate) wall: Duration,
    /// Processor time, user and system, all threads.
    pub(crate) cpu: Duration,
}

/// Runs a program whose output nobody reads. Panics where it fails: a failure must not pass for a fast run.
pub(crate) fn timed(command: &mut Command) -> Run {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    #[expect(
        clippy::zombie_processes,
        reason = "wait4 waits for it, and says what it used"
    )]
    let child = command
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let pid = child.id() as libc::pid_t;
    let (mut status, mut usage) = (0, no_usage());
    // SAFETY: both are ours and writable; the child is ours and has not been waited for.
    let waited = unsafe { libc::wait4(pid, &mut status, 0, &mut usage) };
    let wall = start.elapsed();
    assert!(
        waited == pid && status == 0,
        "{command:?} ended with status {status:#x}"
    );
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Run {
        wall,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
    }
}

fn no_usage() -> libc::rusage {
    // SAFETY: a structure of integers, for which all zeroes is a value.
    unsafe { std::mem::zeroed() }
}

/// The most memory that was seen, bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Peak {
    /// Pages of its own: heap, stacks, what it has changed of its data.
    pub(crate) anonymous: u64,
    /// Pages of mapped files (the dump, the profile, its own program) and of the guest's shared memory.
    pub(crate) mapped: u64,
    /// Of both together, as the kernel keeps it.
    pub(crate) total: u64,
}

impl Peak {
    pub(crate) fn max(self, other: Peak) -> Peak {
        Peak {
            anonymous: self.anonymous.max(other.anonymous),
            mapped: self.mapped.max(other.mapped),
            total: self.total.max(other.total),
        }
    }

    /// What /proc/PID/status says of a process; nothing of one that has ended.
    fn of(status: &str) -> Peak {
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            number.unwrap_or(0) * 1024
        };
        Peak {
            anonymous: kib("RssAnon:"),
            mapped: kib("RssFile:") + kib("RssShmem:"),
            total: kib("VmHWM:"),
        }
    }
}

/// Watches a run's memory by asking the system over and over: it keeps the highest total only, and that has the dump in it. A
/// peak of one kind between two looks is missed. (What wait4(2) says would not do: it has the memory of the parent in it.)
pub(crate) fn watched(command: &mut Command) -> Peak {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let file = format!("/proc/{}/status", child.id());
    let mut peak = Peak::default();
    let status = loop {
        peak = peak.max(Peak::of(&fs::read_to_string(&file).unwrap_or_default()));
        match child.try_wait() {
            Ok(None) => std::thread::sleep(Duration::from_micros(50)),
            Ok(Some(status)) => break status,
            Err(e) => panic!("cannot wait for {command:?}: {e}"),
        }
    };
    assert!(status.success(), "{command:?}: {status}");
    peak
}
