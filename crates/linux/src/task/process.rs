//! The row of a process.

use std::sync::{Arc, LazyLock};

use bitflags::bitflags;
use compact_str::CompactString;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use crate::budget::{NO_ROOM, Share};
use crate::layout::Extent;
use crate::listing::{Problem, address};
use crate::path::GuestPath;

bitflags! {
    /// What to read of each process. The task's address, pid, tgid, ppid, name, state, flags and threads are always read; the rest costs
    /// further reads in the guest and is read only if it is asked for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ProcessFields: u32 {
        /// Real, effective, saved and file-system ids of user and group.
        const IDS = 1 << 0;
        /// seccomp mode and filters, no_new_privs.
        const SECCOMP = 1 << 1;
        /// Start time.
        const START = 1 << 2;
        /// CPU time used, summed over the threads.
        const TIMES = 1 << 3;
        /// Nice value, priority, policy, CPU.
        const SCHED = 1 << 4;
        /// Number of threads.
        const THREADS = 1 << 5;
        /// Pids in the nested namespaces and all namespaces' inode numbers.
        const NAMESPACES = 1 << 6;
        /// Control groups and container.
        const CGROUP = 1 << 7;
        /// Memory sizes.
        const MEMORY = 1 << 8;
        /// Arguments, out of user memory.
        const CMDLINE = 1 << 9;
        /// Environment, out of user memory.
        const ENVIRON = 1 << 10;
        /// Path of the executable.
        const EXE = 1 << 11;
        /// Working and root directory.
        const CWD = 1 << 12;
        /// Supplementary groups.
        const GROUPS = 1 << 13;
        /// The capability sets.
        const CAPABILITIES = 1 << 14;
        /// User namespace.
        const USER_NS = 1 << 15;
        /// Session, process group, controlling terminal.
        const SESSION = 1 << 16;
        /// oom_score_adj.
        const OOM = 1 << 17;
        /// All that `struct cred` says.
        const CREDENTIALS = Self::IDS.bits() | Self::GROUPS.bits() | Self::CAPABILITIES.bits() | Self::USER_NS.bits();
        /// All that `struct signal_struct` says but CPU time.
        const SIGNAL = Self::THREADS.bits() | Self::SESSION.bits() | Self::OOM.bits();
    }
}

impl ProcessFields {
    /// Where the members lie that these fields come from, of `all` members with the fields that come from each.
    pub(crate) fn extents(self, all: &[(Self, Extent)]) -> impl Iterator<Item = Extent> {
        all.iter()
            .filter(move |(fields, _)| self.intersects(*fields))
            .map(|(_, extent)| *extent)
    }
}

impl Default for ProcessFields {
    /// What the table of `vmsight ps` shows.
    fn default() -> Self {
        Self::IDS | Self::START | Self::THREADS | Self::CMDLINE
    }
}

/// A process: the leader of a thread group. `None` is what was not asked for, what the process does not have, or what could not be
/// read; in the last case `problems` says so.
///
/// What a plain listing shows is here; the rest is in [`Process::details`]. Serialized, it is all one row.
#[derive(Clone, Debug)]
pub struct Process {
    /// Pid in the root namespace.
    pub pid: i32,
    /// Pid of the parent in the root namespace.
    pub ppid: Option<i32>,
    /// Thread-group id; equals `pid`.
    pub tgid: i32,
    /// `comm`, at most 15 bytes; of kernel threads the whole name, which may be longer (5.17 on).
    pub name: CompactString,
    /// The letter that ps shows: R running, S sleeping, D uninterruptible, T stopped, t traced, X dead, Z zombie, P parked, I idle.
    pub state: char,
    /// Whether it is a thread of the kernel's.
    pub kernel_thread: bool,
    /// Arguments joined by spaces; `None` for kernel threads and zombies, which have none.
    pub cmdline: Option<CompactString>,
    /// Arguments one by one.
    pub argv: Option<Vec<CompactString>>,
    /// Real user id, in the root user namespace as all ids.
    pub uid: Option<u32>,
    /// Effective user id.
    pub euid: Option<u32>,
    /// Saved user id.
    pub suid: Option<u32>,
    /// File-system user id.
    pub fsuid: Option<u32>,
    /// Real group id.
    pub gid: Option<u32>,
    /// Effective group id.
    pub egid: Option<u32>,
    /// Saved group id.
    pub sgid: Option<u32>,
    /// File-system group id.
    pub fsgid: Option<u32>,
    /// Start, in ticks of 10 ms since boot: field 22 of /proc/PID/stat.
    pub start_ticks: Option<u64>,
    /// Start by the guest's wall clock, RFC 3339 in UTC.
    pub start_time: Option<CompactString>,
    /// Number of threads.
    pub threads: Option<i32>,
    /// Address of its `task_struct`.
    pub task: Gva,
    /// Address of its `mm_struct`.
    pub mm: Option<Gva>,
    /// What could not be read.
    pub problems: Vec<Problem>,
    /// The rest, if any of it is there. Kept apart, for it is most of a row: where nobody asks for it, a listing of many processes is
    /// made in less than half of the memory, which is what it waits for.
    details: Option<Box<ProcessDetails>>,
}

/// What few listings ask for of a process. `None` means the same as in [`Process`].
#[derive(Clone, Debug, Default)]
pub struct ProcessDetails {
    /// Pid in the process's own namespace.
    pub ns_pid: Option<i32>,
    /// Pids from the root namespace down to its own: the NSpid line of /proc/PID/status.
    pub ns_pids: Option<Vec<i32>>,
    /// Environment, `NAME=value` each.
    pub environ: Option<Vec<CompactString>>,
    /// Path of the executable, " (deleted)" appended if it is.
    pub exe: Option<String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Root directory.
    pub root: Option<String>,
    /// Supplementary groups.
    pub groups: Option<Vec<u32>>,
    /// Inheritable capabilities, a bit each (include/uapi/linux/capability.h).
    pub cap_inheritable: Option<u64>,
    /// Permitted capabilities.
    pub cap_permitted: Option<u64>,
    /// Effective capabilities.
    pub cap_effective: Option<u64>,
    /// Bounding set.
    pub cap_bounding: Option<u64>,
    /// Ambient capabilities.
    pub cap_ambient: Option<u64>,
    /// Seccomp mode: 0 off, 1 strict, 2 filter.
    pub seccomp: Option<u32>,
    /// Seccomp filters in force.
    pub seccomp_filters: Option<u32>,
    /// Whether execve can give it no privileges.
    pub no_new_privs: Option<bool>,
    /// Time in user mode in ticks of 10 ms, as /proc/PID/stat: that of all threads, gone ones included.
    pub utime_ticks: Option<u64>,
    /// Time in kernel mode.
    pub stime_ticks: Option<u64>,
    /// Nice value, −20 to 19.
    pub nice: Option<i32>,
    /// Priority as /proc/PID/stat has it: 20 + nice for normal tasks, negative for real-time ones.
    pub priority: Option<i32>,
    /// Real-time priority, 0 for normal tasks.
    pub rt_priority: Option<u32>,
    /// Scheduling policy: normal, fifo, rr, batch, idle, deadline, ext.
    pub policy: Option<&'static str>,
    /// The CPU it runs on or ran on last.
    pub cpu: Option<u32>,
    /// Session id.
    pub sid: Option<i32>,
    /// Process-group id.
    pub pgrp: Option<i32>,
    /// Controlling terminal: the path below /dev.
    pub tty: Option<String>,
    /// How much the out-of-memory killer is to favour it: −1000 never to 1000 first.
    pub oom_score_adj: Option<i16>,
    /// Inode number of the mount namespace, as all `*_ns`.
    pub mnt_ns: Option<u32>,
    /// Pid namespace.
    pub pid_ns: Option<u32>,
    /// Network namespace.
    pub net_ns: Option<u32>,
    /// UTS namespace.
    pub uts_ns: Option<u32>,
    /// IPC namespace.
    pub ipc_ns: Option<u32>,
    /// User namespace.
    pub user_ns: Option<u32>,
    /// Cgroup namespace.
    pub cgroup_ns: Option<u32>,
    /// Time namespace.
    pub time_ns: Option<u32>,
    /// Path in the unified (v2) control-group hierarchy.
    pub cgroup: Option<Arc<str>>,
    /// Place in every hierarchy: the lines of /proc/PID/cgroup.
    pub cgroups: Option<Arc<[String]>>,
    /// Id or name of the container it runs in, told from its control groups.
    pub container: Option<String>,
    /// The runtime that made the container.
    pub container_runtime: Option<String>,
    /// Virtual size in KiB.
    pub vm_size_kb: Option<u64>,
    /// Resident in memory, KiB. Exact, where the guest's own /proc may lag (see the docs).
    pub vm_rss_kb: Option<u64>,
    /// Swapped out, KiB.
    pub vm_swap_kb: Option<u64>,
    /// Data, KiB.
    pub vm_data_kb: Option<u64>,
    /// Stack, KiB.
    pub vm_stack_kb: Option<u64>,
    /// Code of executable mappings, KiB.
    pub vm_exec_kb: Option<u64>,
}

/// The details of a process of which none were asked for.
static NO_DETAILS: LazyLock<ProcessDetails> = LazyLock::new(ProcessDetails::default);

impl Process {
    /// A row of which only the task's address is known.
    pub(crate) fn empty(task: Gva) -> Self {
        Self {
            pid: 0,
            ppid: None,
            tgid: 0,
            name: CompactString::default(),
            state: '?',
            kernel_thread: false,
            cmdline: None,
            argv: None,
            uid: None,
            euid: None,
            suid: None,
            fsuid: None,
            gid: None,
            egid: None,
            sgid: None,
            fsgid: None,
            start_ticks: None,
            start_time: None,
            threads: None,
            task,
            mm: None,
            problems: Vec::new(),
            details: None,
        }
    }

    /// What few listings ask for.
    pub fn details(&self) -> &ProcessDetails {
        self.details.as_deref().unwrap_or(&NO_DETAILS)
    }

    /// The same, to be filled in.
    pub(crate) fn details_mut(&mut self) -> &mut ProcessDetails {
        self.details.get_or_insert_default()
    }

    /// A path for one of the fields, its problems noted.
    pub(crate) fn path(
        &mut self,
        field: &'static str,
        path: Result<GuestPath, ReadError>,
        share: &mut Share<'_>,
    ) -> Option<String> {
        match path {
            Ok(path) if !share.bytes(path.path.len()) => {
                self.problem(Problem::new(field, NO_ROOM));
                None
            }
            Ok(path) => {
                let text = path.to_string();
                self.problems
                    .extend(path.problem.map(|reason| Problem::new(field, reason)));
                Some(text)
            }
            Err(error) => {
                self.problem(Problem::read(field, &error));
                None
            }
        }
    }

    /// Notes what kept a field from being read.
    pub(crate) fn problem(&mut self, problem: Problem) {
        self.problems.push(problem);
    }
}

/// Makes one row of a process and its details.
macro_rules! row {
    (|$process:ident, $details:ident| { $($name:ident: $value:expr,)* }) => {
        impl Process {
            /// The names of the fields it has where it is serialized, its details among them.
            pub const FIELDS: &[&str] = &[$(stringify!($name)),*];
        }

        impl Serialize for Process {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let ($process, $details) = (self, self.details());
                let mut row = serializer.serialize_struct("Process", Self::FIELDS.len())?;
                $(row.serialize_field(stringify!($name), &$value)?;)*
                row.end()
            }
        }
    };
}

row!(|process, details| {
    pid: process.pid,
    ppid: process.ppid,
    tgid: process.tgid,
    ns_pid: details.ns_pid,
    ns_pids: details.ns_pids,
    name: process.name,
    state: process.state,
    kernel_thread: process.kernel_thread,
    cmdline: process.cmdline,
    argv: process.argv,
    environ: details.environ,
    exe: details.exe,
    cwd: details.cwd,
    root: details.root,
    uid: process.uid,
    euid: process.euid,
    suid: process.suid,
    fsuid: process.fsuid,
    gid: process.gid,
    egid: process.egid,
    sgid: process.sgid,
    fsgid: process.fsgid,
    groups: details.groups,
    cap_inheritable: details.cap_inheritable.map(Bits),
    cap_permitted: details.cap_permitted.map(Bits),
    cap_effective: details.cap_effective.map(Bits),
    cap_bounding: details.cap_bounding.map(Bits),
    cap_ambient: details.cap_ambient.map(Bits),
    seccomp: details.seccomp,
    seccomp_filters: details.seccomp_filters,
    no_new_privs: details.no_new_privs,
    start_ticks: process.start_ticks,
    start_time: process.start_time,
    utime_ticks: details.utime_ticks,
    stime_ticks: details.stime_ticks,
    nice: details.nice,
    priority: details.priority,
    rt_priority: details.rt_priority,
    policy: details.policy,
    cpu: details.cpu,
    threads: process.threads,
    sid: details.sid,
    pgrp: details.pgrp,
    tty: details.tty,
    oom_score_adj: details.oom_score_adj,
    mnt_ns: details.mnt_ns,
    pid_ns: details.pid_ns,
    net_ns: details.net_ns,
    uts_ns: details.uts_ns,
    ipc_ns: details.ipc_ns,
    user_ns: details.user_ns,
    cgroup_ns: details.cgroup_ns,
    time_ns: details.time_ns,
    cgroup: details.cgroup,
    cgroups: details.cgroups,
    container: details.container,
    container_runtime: details.container_runtime,
    vm_size_kb: details.vm_size_kb,
    vm_rss_kb: details.vm_rss_kb,
    vm_swap_kb: details.vm_swap_kb,
    vm_data_kb: details.vm_data_kb,
    vm_stack_kb: details.vm_stack_kb,
    vm_exec_kb: details.vm_exec_kb,
    task: Address(process.task),
    mm: process.mm.map(Address),
    problems: process.problems,
});

/// An address, as `"0x…"`.
struct Address(Gva);

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        address::gva(&self.0, serializer)
    }
}

/// A set of bits, as `"0x…"`.
struct Bits(u64);

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        address::hex(&self.0, serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_is_left_out_of_the_row() {
        let mut process = Process::empty(Gva(0x10));
        process.details_mut();
        // As it is printed, each field of the two has its name, and the details have one themselves.
        assert_eq!(
            format!("{process:?}").matches(": ").count(),
            Process::FIELDS.len() + 1
        );
        let row = serde_json::to_value(&process).unwrap();
        assert_eq!(row.as_object().map(|row| row.len()), Some(Process::FIELDS.len()));
        assert_eq!(row["task"], "0x10");
        process.details_mut().cap_bounding = Some(0x1ff);
        assert_eq!(serde_json::to_value(&process).unwrap()["cap_bounding"], "0x1ff");
    }
}
