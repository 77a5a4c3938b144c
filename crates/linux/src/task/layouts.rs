//! The members of the task structures that the listings read.

use vmsight_arch::Gva;

use crate::layout::{Field, Place, layout};

layout! {
    /// `struct task_struct`: one per thread.
    pub(crate) struct TaskLayout = "task_struct" {
        tasks: Place = "tasks",
        thread_node: Place = "thread_node",
        pid: Field<i32> = "pid",
        tgid: Field<i32> = "tgid",
        comm: Place = "comm",
        flags: Field<u32> = "flags",
        // Renamed in 5.14, when it also shrank from long to int.
        state: Field<u64> = "__state" | "state",
        exit_state: Field<u64> = "exit_state",
        real_parent: Field<Gva> = "real_parent",
        group_leader: Field<Gva> = "group_leader",
        mm: Field<Gva> = "mm",
        fs: Field<Gva> = "fs",
        signal: Field<Gva> = "signal",
        cred: Field<Gva> = "real_cred",
        nsproxy: Field<Gva> = "nsproxy",
        thread_pid: Field<Gva> = "thread_pid",
        cgroups: Option<Field<Gva>> = "cgroups",
        seccomp_mode: Option<Field<u32>> = "seccomp.mode",
        seccomp_filters: Option<Field<u32>> = "seccomp.filter_count",
        atomic_flags: Field<u64> = "atomic_flags",
        // Named real_start_time up to 5.4.
        start_boottime: Field<u64> = "start_boottime" | "real_start_time",
        prio: Field<i32> = "prio",
        static_prio: Field<i32> = "static_prio",
        rt_priority: Field<u32> = "rt_priority",
        policy: Field<u32> = "policy",
        utime: Field<u64> = "utime",
        stime: Field<u64> = "stime",
        runtime: Field<u64> = "se.sum_exec_runtime",
        // In thread_info since 5.16.
        cpu: Option<Field<u32>> = "thread_info.cpu" | "cpu",
        on_cpu: Option<Field<u32>> = "on_cpu",
        stack: Field<Gva> = "stack",
        // Since 5.17: what kinds of tasks of the kernel's own keep about themselves.
        worker_private: Option<Field<Gva>> = "worker_private",
    }
}

layout! {
    /// `struct kthread`: what a kernel thread keeps about itself.
    pub(crate) struct KthreadLayout = "kthread" {
        full_name: Option<Field<Gva>> = "full_name",
    }
}

layout! {
    /// `struct signal_struct`: what the threads of a process share.
    pub(crate) struct SignalLayout = "signal_struct" {
        thread_head: Place = "thread_head",
        nr_threads: Field<i32> = "nr_threads",
        pids: Place = "pids",
        tty: Field<Gva> = "tty",
        oom_score_adj: Field<i16> = "oom_score_adj",
        // Of threads that are gone.
        utime: Field<u64> = "utime",
        stime: Field<u64> = "stime",
        runtime: Field<u64> = "sum_sched_runtime",
    }
}

layout! {
    /// `struct mm_struct`: an address space.
    pub(crate) struct MmLayout = "mm_struct" {
        pgd: Field<Gva> = "pgd",
        arg_start: Field<u64> = "arg_start",
        arg_end: Field<u64> = "arg_end",
        env_start: Field<u64> = "env_start",
        env_end: Field<u64> = "env_end",
        start_brk: Field<u64> = "start_brk",
        brk: Field<u64> = "brk",
        start_stack: Field<u64> = "start_stack",
        total_vm: Field<u64> = "total_vm",
        data_vm: Field<u64> = "data_vm",
        stack_vm: Field<u64> = "stack_vm",
        exec_vm: Field<u64> = "exec_vm",
        map_count: Field<u64> = "map_count",
        exe_file: Option<Field<Gva>> = "exe_file",
        rss_stat: Place = "rss_stat",
        // Up to 6.1 a struct of plain counters; an array of percpu_counter since 6.2.
        rss_counts: Option<Place> = "rss_stat.count",
        // Mappings: a red-black tree up to 6.0, a maple tree since 6.1.
        mm_rb: Option<Place> = "mm_rb",
        mm_mt: Option<Place> = "mm_mt",
        context_flags: Option<Field<u64>> = "context.flags",
    }
}

layout! {
    /// `struct percpu_counter`.
    pub(crate) struct PercpuCounterLayout = "percpu_counter" {
        count: Field<i64> = "count",
        counters: Field<Gva> = "counters",
    }
}

layout! {
    /// `struct cred`.
    pub(crate) struct CredLayout = "cred" {
        uid: Field<u32> = "uid",
        gid: Field<u32> = "gid",
        suid: Field<u32> = "suid",
        sgid: Field<u32> = "sgid",
        euid: Field<u32> = "euid",
        egid: Field<u32> = "egid",
        fsuid: Field<u32> = "fsuid",
        fsgid: Field<u32> = "fsgid",
        // kernel_cap_t: two words of 32 bits up to 6.2, one of 64 since 6.3. The same bytes on a little-endian machine.
        cap_inheritable: Field<u64> = "cap_inheritable",
        cap_permitted: Field<u64> = "cap_permitted",
        cap_effective: Field<u64> = "cap_effective",
        cap_bounding: Field<u64> = "cap_bset",
        cap_ambient: Field<u64> = "cap_ambient",
        group_info: Field<Gva> = "group_info",
        user_ns: Field<Gva> = "user_ns",
    }
}

layout! {
    /// `struct group_info`: supplementary groups.
    pub(crate) struct GroupInfoLayout = "group_info" {
        ngroups: Field<i32> = "ngroups",
        gid: Place = "gid",
    }
}

layout! {
    /// `struct pid`.
    pub(crate) struct PidLayout = "pid" {
        level: Field<u32> = "level",
        numbers: Place = "numbers",
    }
}

layout! {
    /// `struct upid`: a pid's number in one namespace.
    pub(crate) struct UpidLayout = "upid" {
        nr: Field<i32> = "nr",
        ns: Field<Gva> = "ns",
    }
}

layout! {
    /// `struct nsproxy`.
    pub(crate) struct NsproxyLayout = "nsproxy" {
        uts: Field<Gva> = "uts_ns",
        ipc: Field<Gva> = "ipc_ns",
        mnt: Field<Gva> = "mnt_ns",
        net: Field<Gva> = "net_ns",
        // Since 5.6.
        time: Option<Field<Gva>> = "time_ns",
        cgroup: Option<Field<Gva>> = "cgroup_ns",
    }
}

layout! {
    /// `struct tty_struct`.
    pub(crate) struct TtyLayout = "tty_struct" {
        name: Place = "name",
    }
}
