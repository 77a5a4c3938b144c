//! Processes, their threads, mappings and open files, as /proc shows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Text;

/// One process: the thread group with its leader's numbers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Process {
    /// Pid in the initial pid namespace.
    pub pid: u32,
    /// Pids from the outermost namespace to its own (`NSpid`).
    pub ns_pids: Vec<u32>,
    /// Pid of the parent.
    pub ppid: u32,
    /// Process group.
    pub pgrp: i64,
    /// Session.
    pub sid: i64,
    /// The thread's name as `/proc/PID/comm` prints it. A kworker's ends in what it works on, which its
    /// `task_struct.comm` does not: see [`Process::task_comm`].
    pub comm: Text,
    /// Arguments, split at NUL (an empty one is an empty entry; the NUL after the last makes no entry).
    pub cmdline: Vec<Text>,
    /// Environment, split in the same way.
    pub environ: Vec<Text>,
    /// What `/proc/PID/exe` points to; none for kernel threads and zombies.
    pub exe: Option<Text>,
    /// Working directory.
    pub cwd: Option<Text>,
    /// Root directory.
    pub root: Option<Text>,
    /// Users, groups and capabilities.
    pub creds: Credentials,
    /// Seccomp mode: 0 off, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Number of seccomp filters (Linux 5.9+).
    pub seccomp_filters: u32,
    /// Whether no_new_privs is set.
    pub no_new_privs: bool,
    /// State letter: R S D T t Z X I.
    pub state: char,
    /// Start time after boot, clock ticks ([`crate::System::clock_ticks`] a second), boot-time clock.
    pub start_ticks: u64,
    /// Nice value, -20 to 19.
    pub nice: i64,
    /// Priority as `/proc/PID/stat` has it.
    pub priority: i64,
    /// Real-time priority, 0 for the others.
    pub rt_priority: u32,
    /// Scheduling policy: 0 other, 1 fifo, 2 rr, 3 batch, 5 idle, 6 deadline.
    pub policy: u32,
    /// `PF_*` flags of the leader.
    pub flags: u32,
    /// Time of all its threads in user mode, gone ones included, clock ticks.
    pub utime_ticks: u64,
    /// The same in kernel mode.
    pub stime_ticks: u64,
    /// Controlling terminal as a device number in the encoding of `/proc/PID/stat`; 0 for none.
    pub tty_nr: i64,
    /// Foreground process group of the terminal.
    pub tpgid: i64,
    /// Pid of the tracer, 0 for none.
    pub tracer: u32,
    /// Octal umask; none where there is no fs_struct.
    pub umask: Option<u32>,
    /// OOM score adjustment.
    pub oom_score_adj: i32,
    /// Audit login uid; 4294967295 when not set.
    pub login_uid: u32,
    /// Whether it is a kernel thread (`PF_KTHREAD`).
    pub kthread: bool,
    /// Addresses and sizes of user memory; none for kernel threads and zombies.
    pub vm: Option<VmSizes>,
    /// Inode numbers of its namespaces by kind: cgroup, ipc, mnt, net, pid, pid_for_children, time, user, uts.
    pub namespaces: BTreeMap<String, u64>,
    /// Path in the unified cgroup hierarchy.
    pub cgroup: Text,
    /// The lines of `/proc/PID/cgroup`: its place in every hierarchy.
    pub cgroups: Vec<Text>,
    /// All its threads, the leader first.
    pub threads: Vec<Thread>,
    /// Mappings by address.
    pub maps: Vec<Map>,
    /// Open files by number.
    pub fds: Vec<Fd>,
    /// Where some pages of memory that it has locked lie. Only such pages stay where they are.
    pub frames: Vec<Frame>,
    /// The part of its memory which the workload asked the kernel to page out after this account was taken
    /// (`start`, `end`), when the guest's pagemap then showed its pages as swapped.
    pub paged_out: Option<(u64, u64)>,
}

impl Process {
    /// The name in `task_struct.comm`: without the note on current work that /proc adds to a kworker's.
    pub fn task_comm(&self) -> String {
        let comm = self.comm.lossy();
        match comm
            .strip_prefix("kworker/")
            .and_then(|rest| rest.find(':').map(|colon| (rest, colon)))
        {
            Some((rest, colon)) => {
                let end = rest[colon..].find(['-', '+']).map_or(rest.len(), |at| colon + at);
                format!("kworker/{}", &rest[..end])
            }
            None => comm,
        }
    }

    /// Whether it may come, go or be renamed while the guest is idle: the kernel's worker threads.
    pub fn is_transient(&self) -> bool {
        self.kthread && self.comm.starts_with("kworker/")
    }

    /// Pid in its own namespace.
    pub fn ns_pid(&self) -> u32 {
        self.ns_pids.last().copied().unwrap_or(self.pid)
    }

    /// The open file of this number.
    pub fn fd(&self, fd: u32) -> Option<&Fd> {
        self.fds.iter().find(|f| f.fd == fd)
    }
}

/// Who a process acts as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file-system user.
    pub uids: [u32; 4],
    /// Real, effective, saved, file-system group.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability bits: inheritable.
    pub cap_inheritable: u64,
    /// Capability bits: permitted.
    pub cap_permitted: u64,
    /// Capability bits: effective.
    pub cap_effective: u64,
    /// Capability bits: bounding set.
    pub cap_bounding: u64,
    /// Capability bits: ambient.
    pub cap_ambient: u64,
}

/// Addresses and sizes of a user address space; sizes in KiB.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VmSizes {
    /// `VmPeak`.
    pub peak: u64,
    /// `VmSize`.
    pub size: u64,
    /// `VmLck`.
    pub locked: u64,
    /// `VmHWM`.
    pub rss_peak: u64,
    /// `VmRSS`.
    pub rss: u64,
    /// `RssAnon`.
    pub rss_anon: u64,
    /// `RssFile`.
    pub rss_file: u64,
    /// `RssShmem`.
    pub rss_shmem: u64,
    /// `VmData`.
    pub data: u64,
    /// `VmStk`.
    pub stack: u64,
    /// `VmExe`.
    pub exe: u64,
    /// `VmLib`.
    pub lib: u64,
    /// `VmPTE`.
    pub pte: u64,
    /// `VmSwap`.
    pub swap: u64,
    /// Start of code (address), and the like from `/proc/PID/stat`.
    pub start_code: u64,
    /// End of code.
    pub end_code: u64,
    /// Start of the initialised data.
    pub start_data: u64,
    /// End of the initialised data.
    pub end_data: u64,
    /// Start of the heap.
    pub start_brk: u64,
    /// Initial stack pointer.
    pub start_stack: u64,
    /// Arguments, start.
    pub arg_start: u64,
    /// Arguments, end.
    pub arg_end: u64,
    /// Environment, start.
    pub env_start: u64,
    /// Environment, end.
    pub env_end: u64,
}

/// One thread.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Thread {
    /// Its id in the initial pid namespace.
    pub tid: u32,
    /// Its name.
    pub comm: Text,
    /// State letter.
    pub state: char,
    /// Start time after boot, clock ticks.
    pub start_ticks: u64,
    /// Nice value.
    pub nice: i64,
    /// Priority as its `stat` has it.
    pub priority: i64,
    /// Scheduling policy, numbered as the process's.
    pub policy: u32,
    /// The CPU it ran on last.
    pub cpu: u32,
    /// Its own time in user mode, clock ticks.
    pub utime_ticks: u64,
    /// The same in kernel mode.
    pub stime_ticks: u64,
    /// Its working directory, where its directories are not those of the leader.
    pub cwd: Option<Text>,
    /// Its root directory, likewise.
    pub root: Option<Text>,
    /// Its open files, where they are not those of the leader.
    pub fds: Vec<Fd>,
    /// Its kernel stack, where it slept while that was read.
    pub stack: Option<KernelStack>,
}

/// A kernel stack of a thread that slept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelStack {
    /// How often the thread was switched away from until then: as long as that is the same, it sleeps on.
    pub switches: u64,
    /// The lines of `/proc/PID/task/TID/stack` without `[<0>]`: `function+offset/size`, with ` [module]`. The scheduler's own
    /// functions are not among them.
    pub frames: Vec<String>,
}

/// Where a page of a process lies, from `/proc/PID/pagemap`, and what is in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Address in the process, at the beginning of a page of 4 KiB.
    pub address: u64,
    /// Number of the physical page of 4 KiB.
    pub frame: u64,
    /// Size of the page that a single entry of the page tables maps there, bytes; 0 where `smaps` leaves that open.
    pub page_size: u64,
    /// The eight bytes at the address, from `/proc/PID/mem`.
    pub word: u64,
}

/// One mapping, from `/proc/PID/maps`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `rwxp` or `rwxs`, with `-` for what is not allowed.
    pub perms: String,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device of the file: major, minor.
    pub dev: (u32, u32),
    /// Inode number, 0 for none.
    pub inode: u64,
    /// Path or `[name]`, empty for anonymous memory; a line break in it stays as the kernel's `\012`.
    pub path: Text,
}

/// One open file.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Fd {
    /// Its number.
    pub fd: u32,
    /// What the link in `/proc/PID/fd` says.
    pub link: Text,
    /// Open flags (`O_*`, with `O_CLOEXEC` for close-on-exec).
    pub flags: u32,
    /// File position.
    pub pos: i64,
    /// Mount id.
    pub mnt_id: i64,
    /// Device of the inode: major, minor.
    pub dev: (u32, u32),
    /// Inode number.
    pub inode: u64,
    /// Type and permission bits of the inode.
    pub mode: u32,
    /// Size of the inode, bytes.
    pub size: u64,
    /// Number of links to the inode.
    pub links: u64,
    /// Owner of the inode.
    pub uid: u32,
    /// Device number, for device files: major, minor.
    pub rdev: (u32, u32),
    /// What else fdinfo says, line by line: eventfd-count, tfd, inotify, sigmask, Pid, …
    pub details: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kworker_names_lose_the_work() {
        for (shown, task) in [
            ("kworker/0:1-events", "kworker/0:1"),
            ("kworker/u4:0+flush-8:0", "kworker/u4:0"),
            ("kworker/0:0H-kblockd", "kworker/0:0H"),
            ("kworker/1:2H", "kworker/1:2H"),
            ("kworker/R-rcu_gp", "kworker/R-rcu_gp"),
            ("web-frontend", "web-frontend"),
            ("kworker/0:1ab-x:y", "kworker/0:1ab"),
        ] {
            let process = Process {
                comm: Text::from(shown),
                ..Process::default()
            };
            assert_eq!(process.task_comm(), task);
        }
    }
}
