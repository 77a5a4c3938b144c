//! The row of a process.

use std::sync::Arc;

use bitflags::bitflags;
use compact_str::CompactString;
use serde::Serialize;
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
#[derive(Clone, Debug, Serialize)]
pub struct Process {
    /// Pid in the root namespace.
    pub pid: i32,
    /// Pid of the parent in the root namespace.
    pub ppid: Option<i32>,
    /// Thread-group id; equals `pid`.
    pub tgid: i32,
    /// Pid in the process's own namespace.
    pub ns_pid: Option<i32>,
    /// Pids from the root namespace down to its own: the NSpid line of /proc/PID/status.
    pub ns_pids: Option<Vec<i32>>,
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
    /// Environment, `NAME=value` each.
    pub environ: Option<Vec<CompactString>>,
    /// Path of the executable, " (deleted)" appended if it is.
    pub exe: Option<String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Root directory.
    pub root: Option<String>,
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
    /// Supplementary groups.
    pub groups: Option<Vec<u32>>,
    /// Inheritable capabilities, a bit each (include/uapi/linux/capability.h).
    #[serde(serialize_with = "address::hex_opt")]
    pub cap_inheritable: Option<u64>,
    /// Permitted capabilities.
    #[serde(serialize_with = "address::hex_opt")]
    pub cap_permitted: Option<u64>,
    /// Effective capabilities.
    #[serde(serialize_with = "address::hex_opt")]
    pub cap_effective: Option<u64>,
    /// Bounding set.
    #[serde(serialize_with = "address::hex_opt")]
    pub cap_bounding: Option<u64>,
    /// Ambient capabilities.
    #[serde(serialize_with = "address::hex_opt")]
    pub cap_ambient: Option<u64>,
    /// Seccomp mode: 0 off, 1 strict, 2 filter.
    pub seccomp: Option<u32>,
    /// Seccomp filters in force.
    pub seccomp_filters: Option<u32>,
    /// Whether execve can give it no privileges.
    pub no_new_privs: Option<bool>,
    /// Start, in ticks of 10 ms since boot: field 22 of /proc/PID/stat.
    pub start_ticks: Option<u64>,
    /// Start by the guest's wall clock, RFC 3339 in UTC.
    pub start_time: Option<CompactString>,
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
    /// Number of threads.
    pub threads: Option<i32>,
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
    /// Address of its `task_struct`.
    #[serde(serialize_with = "address::gva")]
    pub task: Gva,
    /// Address of its `mm_struct`.
    #[serde(serialize_with = "address::gva_opt")]
    pub mm: Option<Gva>,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

impl Process {
    /// A row of which only the task's address is known.
    pub(crate) fn empty(task: Gva) -> Self {
        Self {
            pid: 0,
            ppid: None,
            tgid: 0,
            ns_pid: None,
            ns_pids: None,
            name: CompactString::default(),
            state: '?',
            kernel_thread: false,
            cmdline: None,
            argv: None,
            environ: None,
            exe: None,
            cwd: None,
            root: None,
            uid: None,
            euid: None,
            suid: None,
            fsuid: None,
            gid: None,
            egid: None,
            sgid: None,
            fsgid: None,
            groups: None,
            cap_inheritable: None,
            cap_permitted: None,
            cap_effective: None,
            cap_bounding: None,
            cap_ambient: None,
            seccomp: None,
            seccomp_filters: None,
            no_new_privs: None,
            start_ticks: None,
            start_time: None,
            utime_ticks: None,
            stime_ticks: None,
            nice: None,
            priority: None,
            rt_priority: None,
            policy: None,
            cpu: None,
            threads: None,
            sid: None,
            pgrp: None,
            tty: None,
            oom_score_adj: None,
            mnt_ns: None,
            pid_ns: None,
            net_ns: None,
            uts_ns: None,
            ipc_ns: None,
            user_ns: None,
            cgroup_ns: None,
            time_ns: None,
            cgroup: None,
            cgroups: None,
            container: None,
            container_runtime: None,
            vm_size_kb: None,
            vm_rss_kb: None,
            vm_swap_kb: None,
            vm_data_kb: None,
            vm_stack_kb: None,
            vm_exec_kb: None,
            task,
            mm: None,
            problems: Vec::new(),
        }
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
