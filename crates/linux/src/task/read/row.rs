//! Fills one row out of what was read ahead: a method for each group of fields.

use std::sync::Arc;

use vmsight_arch::Gva;

use super::{MmReader, ProcessReader, Scratch, TICK};
use crate::budget::{NO_ROOM, Share};
use crate::listing::Problem;
use crate::task::process::{Process, ProcessFields};
use crate::task::{state, times, user};

/// The fields of `struct cred`.
const CREDENTIALS: &[(ProcessFields, &[&str])] = &[
    (
        ProcessFields::IDS,
        &["uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"],
    ),
    (ProcessFields::GROUPS, &["groups"]),
    (
        ProcessFields::CAPABILITIES,
        &[
            "cap_inheritable",
            "cap_permitted",
            "cap_effective",
            "cap_bounding",
            "cap_ambient",
        ],
    ),
    (ProcessFields::USER_NS, &["user_ns"]),
];

/// Those of `struct signal_struct`.
const SIGNAL: &[(ProcessFields, &[&str])] = &[
    (ProcessFields::THREADS, &["threads"]),
    (ProcessFields::SESSION, &["sid", "pgrp", "tty"]),
    (ProcessFields::OOM, &["oom_score_adj"]),
    (ProcessFields::TIMES, &["utime_ticks", "stime_ticks"]),
];

/// Those of [`ProcessFields::MEMORY`].
const SIZES: &[&str] = &[
    "vm_size_kb",
    "vm_rss_kb",
    "vm_swap_kb",
    "vm_data_kb",
    "vm_stack_kb",
    "vm_exec_kb",
];

impl ProcessReader {
    /// The row of the task at `address`, of which [`Scratch::ahead`] holds what was read.
    pub(super) fn row(&self, address: Gva, scratch: &mut Scratch<'_>) -> Process {
        let mut row = Process::empty(address);
        let mut share = scratch.budgets.rows.share();
        let space = self.kernel.space();
        if let Some(error) = scratch.ahead.task.error.take() {
            row.problem(Problem::read("task", &error));
            return row;
        }
        let (layout, task) = (&self.task, &scratch.ahead.task.buffer);
        row.pid = layout.pid.of(task);
        row.tgid = layout.tgid.of(task);
        row.name = crate::text::short_array_text(layout.comm.of(task));
        let flags = layout.flags.of(task);
        row.kernel_thread = flags & state::PF_KTHREAD != 0;
        if let Some(name) = self.names.full_name(&self.kernel, flags, task) {
            row.name = name.into();
        }
        row.state = state::letter(layout.state.of(task), layout.exit_state.of(task));
        let mm = layout.mm.of(task);
        row.mm = (!mm.is_null()).then_some(mm);
        // ppid is the parent's tgid: a child of a thread is a child of the process.
        match layout.tgid.read(space, layout.real_parent.of(task)) {
            Ok(ppid) => row.ppid = Some(ppid),
            Err(error) => row.problem(Problem::read("ppid", &error)),
        }
        self.scheduling(&mut row, scratch);
        self.start(&mut row, scratch);
        self.seccomp(&mut row, scratch);
        self.signal(&mut row, scratch);
        self.credentials(&mut row, scratch, &mut share);
        self.namespaces(&mut row, scratch);
        self.cgroup(&mut row, scratch, &mut share);
        self.directories(&mut row, scratch, &mut share);
        // Kernel threads have no memory of their own (what they borrow for a while is somebody else's).
        if !mm.is_null() && !row.kernel_thread {
            self.memory(&mut row, scratch, &mut share);
        }
        row
    }

    pub(super) fn has(&self, fields: ProcessFields) -> bool {
        self.fields.intersects(fields)
    }

    /// Notes of every field that was asked for why it is not there: what is empty without a problem is taken for empty in the guest.
    fn unreadable(&self, row: &mut Process, names: &[(ProcessFields, &[&'static str])], reason: &str) {
        let asked = names.iter().filter(|(fields, _)| self.has(*fields));
        for name in asked.flat_map(|(_, names)| *names) {
            row.problem(Problem::new(name, reason));
        }
    }

    fn scheduling(&self, row: &mut Process, scratch: &Scratch<'_>) {
        if !self.has(ProcessFields::SCHED) {
            return;
        }
        let (layout, task) = (&self.task, &scratch.ahead.task.buffer);
        // DEFAULT_PRIO is 120, MAX_RT_PRIO 100 (include/linux/sched/prio.h).
        let details = row.details_mut();
        details.nice = Some(layout.static_prio.of(task).wrapping_sub(120));
        details.priority = Some(layout.prio.of(task).wrapping_sub(100));
        details.rt_priority = Some(layout.rt_priority.of(task));
        details.policy = Some(state::policy(layout.policy.of(task)));
        details.cpu = layout.cpu.map(|cpu| cpu.of(task));
    }

    fn start(&self, row: &mut Process, scratch: &Scratch<'_>) {
        if !self.has(ProcessFields::START) {
            return;
        }
        let since_boot = self.task.start_boottime.of(&scratch.ahead.task.buffer);
        row.start_ticks = Some(since_boot / TICK);
        row.start_time = self.clock.as_ref().and_then(|clock| clock.wall(since_boot));
        if row.start_time.is_none() && self.clock.is_some() {
            row.problem(Problem::new(
                "start_time",
                format!("{since_boot} ns since boot is no time"),
            ));
        }
    }

    fn seccomp(&self, row: &mut Process, scratch: &Scratch<'_>) {
        if !self.has(ProcessFields::SECCOMP) {
            return;
        }
        let details = row.details_mut();
        details.seccomp = self
            .task
            .seccomp_mode
            .map(|mode| mode.of(&scratch.ahead.task.buffer));
        details.seccomp_filters = self
            .task
            .seccomp_filters
            .map(|count| count.of(&scratch.ahead.task.buffer));
        details.no_new_privs =
            Some(self.task.atomic_flags.of(&scratch.ahead.task.buffer) & state::PFA_NO_NEW_PRIVS != 0);
    }

    fn signal(&self, row: &mut Process, scratch: &mut Scratch<'_>) {
        let Some(reader) = &self.signal else { return };
        let address = self.task.signal.of(&scratch.ahead.task.buffer);
        if let Some(error) = scratch.ahead.signal.error.take() {
            self.unreadable(row, SIGNAL, &Problem::read("threads", &error).reason);
            return;
        }
        let (layout, signal) = (&reader.layout, &scratch.ahead.signal.buffer);
        if self.has(ProcessFields::THREADS) {
            row.threads = Some(layout.nr_threads.of(signal));
        }
        if self.has(ProcessFields::OOM) {
            row.details_mut().oom_score_adj = Some(layout.oom_score_adj.of(signal));
        }
        if let Some(session) = &reader.session {
            let mut number = |field, pid: Gva, row: &mut Process| {
                if pid.is_null() {
                    return None;
                }
                if let Some(&known) = scratch.pid_numbers.get(&pid.0) {
                    return Some(known);
                }
                match self.pids.as_ref()?.root_number(pid) {
                    Ok(number) => {
                        scratch.pid_numbers.insert(pid.0, number);
                        Some(number)
                    }
                    Err(error) => {
                        row.problem(Problem::read(field, &error));
                        None
                    }
                }
            };
            row.details_mut().sid = number("sid", reader.pid_at(signal, session.sid), row);
            row.details_mut().pgrp = number("pgrp", reader.pid_at(signal, session.pgrp), row);
            let tty = layout.tty.of(signal);
            if !tty.is_null() {
                match session.tty.name(tty, &mut scratch.ttys) {
                    Ok(name) => row.details_mut().tty = Some(name),
                    Err(error) => row.problem(Problem::read("tty", &error)),
                }
            }
        }
        if self.has(ProcessFields::TIMES) {
            let budget = &scratch.budgets.rows;
            let times = scratch.times.of(address, || {
                times::process_times(&self.kernel, &self.task, layout, signal, address, budget)
            });
            match times {
                Ok(times) => {
                    let details = row.details_mut();
                    details.utime_ticks = Some(times.user / TICK);
                    details.stime_ticks = Some(times.system / TICK);
                }
                Err(reason) => {
                    row.problem(Problem::new("utime_ticks", reason.clone()));
                    row.problem(Problem::new("stime_ticks", reason));
                }
            }
        }
    }

    fn credentials(&self, row: &mut Process, scratch: &mut Scratch<'_>, share: &mut Share<'_>) {
        let Some(reader) = &self.cred else { return };
        if let Some(error) = scratch.ahead.cred.error.take() {
            self.unreadable(row, CREDENTIALS, &Problem::read("uid", &error).reason);
            return;
        }
        let (layout, cred) = (&reader.cred, &scratch.ahead.cred.buffer);
        if self.has(ProcessFields::IDS) {
            row.uid = Some(layout.uid.of(cred));
            row.euid = Some(layout.euid.of(cred));
            row.suid = Some(layout.suid.of(cred));
            row.fsuid = Some(layout.fsuid.of(cred));
            row.gid = Some(layout.gid.of(cred));
            row.egid = Some(layout.egid.of(cred));
            row.sgid = Some(layout.sgid.of(cred));
            row.fsgid = Some(layout.fsgid.of(cred));
        }
        if self.has(ProcessFields::CAPABILITIES) {
            let details = row.details_mut();
            details.cap_inheritable = Some(layout.cap_inheritable.of(cred));
            details.cap_permitted = Some(layout.cap_permitted.of(cred));
            details.cap_effective = Some(layout.cap_effective.of(cred));
            details.cap_bounding = Some(layout.cap_bounding.of(cred));
            details.cap_ambient = Some(layout.cap_ambient.of(cred));
        }
        match reader.groups(cred) {
            Some(Ok(groups)) if share.bytes(groups.len() * size_of::<u32>()) => {
                row.details_mut().groups = Some(groups)
            }
            Some(Ok(_)) => row.problem(Problem::new("groups", NO_ROOM)),
            Some(Err(error)) => row.problem(Problem::read("groups", &error)),
            None => {}
        }
        if let Some(namespaces) = self
            .namespaces
            .as_ref()
            .filter(|_| self.has(ProcessFields::USER_NS))
        {
            match namespaces.user(layout.user_ns.of(cred), &mut scratch.namespaces) {
                Ok(inum) => row.details_mut().user_ns = Some(inum),
                Err(error) => row.problem(Problem::read("user_ns", &error)),
            }
        }
    }

    fn namespaces(&self, row: &mut Process, scratch: &mut Scratch<'_>) {
        if !self.has(ProcessFields::NAMESPACES) {
            return;
        }
        if let Some(reader) = &self.pids {
            let pid = self.task.thread_pid.of(&scratch.ahead.task.buffer);
            // A task that is being released has none left.
            if !pid.is_null() {
                let numbers = reader
                    .numbers(pid)
                    .and_then(|n| Ok((reader.namespace_inum(n.namespace)?, n.numbers)));
                match numbers {
                    Ok((inum, numbers)) => {
                        let details = row.details_mut();
                        details.pid_ns = Some(inum);
                        details.ns_pid = numbers.last().copied();
                        details.ns_pids = Some(numbers);
                    }
                    Err(error) => {
                        let names = [(ProcessFields::NAMESPACES, &["pid_ns", "ns_pid", "ns_pids"][..])];
                        self.unreadable(row, &names, &Problem::read("ns_pids", &error).reason);
                    }
                }
            }
        }
        let nsproxy = self.task.nsproxy.of(&scratch.ahead.task.buffer);
        // A zombie has given its namespaces back.
        if let (Some(reader), false) = (&self.namespaces, nsproxy.is_null()) {
            match reader.of_nsproxy(nsproxy, &mut scratch.namespaces) {
                Ok(found) => {
                    let details = row.details_mut();
                    details.uts_ns = found.uts;
                    details.ipc_ns = found.ipc;
                    details.mnt_ns = found.mnt;
                    details.net_ns = found.net;
                    details.time_ns = found.time;
                    details.cgroup_ns = found.cgroup;
                }
                Err(error) => {
                    let names = ["uts_ns", "ipc_ns", "mnt_ns", "net_ns", "time_ns", "cgroup_ns"];
                    let names = [(ProcessFields::NAMESPACES, &names[..])];
                    self.unreadable(row, &names, &Problem::read("mnt_ns", &error).reason);
                }
            }
        }
    }

    fn cgroup(&self, row: &mut Process, scratch: &mut Scratch<'_>, share: &mut Share<'_>) {
        let (Some(reader), Some(member)) = (&self.cgroups, self.task.cgroups) else {
            return;
        };
        let set = member.of(&scratch.ahead.task.buffer);
        if set.is_null() {
            return;
        }
        let budget = &scratch.budgets.rows;
        let membership = reader.membership(set, &mut scratch.memberships, budget, share);
        let details = row.details_mut();
        details.cgroup = membership.unified.clone();
        details.cgroups = Some(Arc::clone(&membership.lines));
        if let Some(container) = &membership.container {
            details.container = Some(container.id.clone());
            details.container_runtime = Some(container.runtime.to_owned());
        }
        if let Some(reason) = &membership.problem {
            row.problem(Problem::new("cgroup", reason.clone()));
        }
    }

    fn directories(&self, row: &mut Process, scratch: &mut Scratch<'_>, share: &mut Share<'_>) {
        let (Some(places), true) = (&self.places, self.has(ProcessFields::CWD)) else {
            return;
        };
        let fs = self.task.fs.of(&scratch.ahead.task.buffer);
        // A zombie has given it back.
        if !fs.is_null() {
            row.details_mut().cwd = row.path("cwd", places.cwd(fs, &mut scratch.places), share);
            row.details_mut().root = row.path("root", places.root(fs, &mut scratch.places), share);
        }
    }

    fn executable(&self, row: &mut Process, scratch: &mut Scratch<'_>, share: &mut Share<'_>) {
        let (Some(places), Some(mm), true) = (&self.places, &self.mm, self.has(ProcessFields::EXE)) else {
            return;
        };
        let file = mm
            .layout
            .exe_file
            .map_or(Gva(0), |member| member.of(&scratch.ahead.mm.buffer));
        if !file.is_null() {
            row.details_mut().exe = row.path("exe", places.file(file, &mut scratch.places), share);
        }
    }

    fn memory(&self, row: &mut Process, scratch: &mut Scratch<'_>, share: &mut Share<'_>) {
        let Some(reader) = &self.mm else { return };
        if let Some(error) = scratch.ahead.mm.error.take() {
            let names = [
                (ProcessFields::MEMORY, SIZES),
                (ProcessFields::EXE, &["exe"]),
                (ProcessFields::CMDLINE, &["cmdline", "argv"]),
                (ProcessFields::ENVIRON, &["environ"]),
            ];
            self.unreadable(row, &names, &Problem::read("mm", &error).reason);
            return;
        }
        let (layout, mm) = (&reader.layout, &scratch.ahead.mm.buffer);
        if let Some(rss) = &self.rss {
            let kb = |pages: u64| Some(pages.saturating_mul(4));
            let details = row.details_mut();
            details.vm_size_kb = kb(layout.total_vm.of(mm));
            details.vm_data_kb = kb(layout.data_vm.of(mm));
            details.vm_stack_kb = kb(layout.stack_vm.of(mm));
            details.vm_exec_kb = kb(layout.exec_vm.of(mm));
            match rss.pages(layout, mm) {
                Ok(pages) => {
                    let details = row.details_mut();
                    details.vm_rss_kb = kb(pages.resident);
                    details.vm_swap_kb = kb(pages.swapped);
                }
                Err(error) => {
                    row.problem(Problem::read("vm_rss_kb", &error));
                    row.problem(Problem::read("vm_swap_kb", &error));
                }
            }
        }
        self.executable(row, scratch, share);
        if self.has(ProcessFields::CMDLINE | ProcessFields::ENVIRON) {
            self.strings(row, scratch);
        }
    }

    fn strings(&self, row: &mut Process, scratch: &Scratch<'_>) {
        let Some(MmReader { layout, .. }) = &self.mm else {
            return;
        };
        let mm = &scratch.ahead.mm.buffer;
        let ahead = (Gva(layout.arg_start.of(mm)), scratch.ahead.arguments.as_slice());
        let space = match self
            .kernel
            .user_memory(layout.pgd.of(mm), scratch.ahead.root, ahead)
        {
            Ok(space) => space,
            Err(error) => {
                let names = [
                    (ProcessFields::CMDLINE, &["cmdline", "argv"][..]),
                    (ProcessFields::ENVIRON, &["environ"]),
                ];
                self.unreadable(row, &names, &format!("page tables of the process: {error}"));
                return;
            }
        };
        if self.has(ProcessFields::CMDLINE) {
            let mut share = scratch.budgets.strings.share();
            let read = user::command_line(&space, layout, mm, &mut share);
            row.argv = read.split();
            row.cmdline = row.argv.as_deref().map(user::joined);
            if let Some(problem) = read.problem {
                row.problem(Problem::new("argv", problem.reason.clone()));
                row.problem(problem);
            }
        }
        if self.has(ProcessFields::ENVIRON) {
            let read = user::strings(
                &space,
                layout.env_start.of(mm),
                layout.env_end.of(mm),
                "environ",
                &mut scratch.budgets.strings.share(),
            );
            row.details_mut().environ = read.split();
            row.problems.extend(read.problem);
        }
    }
}
