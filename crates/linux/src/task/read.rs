//! Makes process rows: reads only what is asked for, each structure in as few reads as there are stretches of interest.

use std::sync::Arc;

use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;

use super::ahead::{self, Ahead, GROUP, Group, Object};
use super::cgroup::{CgroupReader, Membership};
use super::cred::CredReader;
use super::ids::PidReader;
use super::layouts::{MmLayout, SignalLayout, TaskLayout};
use super::names::KthreadNames;
use super::namespaces::{NamespaceCache, NamespaceReader};
use super::places::{PlaceCache, PlaceReader};
use super::process::{Process, ProcessFields};
use super::sizes::RssReader;
use super::state;
use super::times::TimesCache;
use super::tty::TtyReader;
use super::user;
use super::walk;
use crate::budget::{Budget, NO_ROOM, Own, ROWS, Share};
use crate::clock::Clock;
use crate::layout::{Extent, Spans};
use crate::listing::{Listing, Problem};
use crate::{Kernel, LinuxError};

/// Nanoseconds of a tick of USER_HZ, which is 100 on every architecture covered.
pub(crate) const TICK: u64 = 10_000_000;

/// Rows that one thread makes in a row: enough to pay for its buffers.
const CHUNK: usize = 64;

impl Kernel {
    /// All processes, in the kernel's own order (that of creation).
    ///
    /// # Errors
    /// If the kernel lacks a symbol or member that the listing cannot do without. An unreadable process costs its own row.
    pub fn processes(&self, fields: ProcessFields) -> Result<Listing<Process>, LinuxError> {
        self.list_processes(fields, |_| true)
    }

    /// The processes with these pids in the root namespace, in the kernel's own order. More than one row has the same pid only where
    /// the guest lies. Nothing is read of the others but their pids, and they take no room from these.
    ///
    /// # Errors
    /// As [`Kernel::processes`]. A pid that nobody has is none: it has no row.
    pub fn processes_of(&self, pids: &[i32], fields: ProcessFields) -> Result<Listing<Process>, LinuxError> {
        let layout: Arc<TaskLayout> = self.layout()?;
        let wanted: FxHashSet<i32> = pids.iter().copied().collect();
        self.list_processes(fields, |task| {
            layout
                .pid
                .read(self.space(), task)
                .is_ok_and(|pid| wanted.contains(&pid))
        })
    }

    fn list_processes(
        &self,
        fields: ProcessFields,
        wanted: impl Fn(Gva) -> bool,
    ) -> Result<Listing<Process>, LinuxError> {
        let reader = ProcessReader::new(self, fields)?;
        let mut cut = Vec::new();
        let (rows, warnings) = walk::stable(self, |tasks| {
            let tasks: Vec<Gva> = tasks.iter().copied().filter(|&task| wanted(task)).collect();
            let (rows, warnings) = reader.rows(&tasks);
            cut = warnings;
            rows
        })?;
        let mut listing = Listing::new(rows, warnings);
        for warning in reader.warnings.iter().cloned().chain(cut) {
            listing.warn(warning);
        }
        Ok(listing)
    }

    /// One process by its pid in the root namespace.
    pub fn process(&self, pid: i32, fields: ProcessFields) -> Result<Process, LinuxError> {
        let task = self.task(pid)?;
        let reader = ProcessReader::new(self, fields)?;
        let budgets = Budgets::of(1);
        Ok(reader.row_of(&[task], 0, &mut reader.scratch(&budgets)))
    }

    /// The address of the `task_struct` of the process `pid`.
    pub fn task(&self, pid: i32) -> Result<Gva, LinuxError> {
        let layout: Arc<TaskLayout> = self.layout()?;
        let list = walk::task_list(self)?;
        let found = list
            .tasks
            .iter()
            .find(|&&task| layout.pid.read(self.space(), task).is_ok_and(|p| p == pid));
        found.copied().ok_or_else(|| {
            let mut message = format!("the guest has no process {pid}");
            for warning in list.warnings() {
                message.push_str("; ");
                message.push_str(&warning);
            }
            LinuxError::NotFound(message)
        })
    }
}

/// What a listing of processes needs to know before it reads the first.
#[derive(Debug)]
pub(crate) struct ProcessReader {
    kernel: Kernel,
    fields: ProcessFields,
    task: Arc<TaskLayout>,
    task_spans: Spans,
    names: KthreadNames,
    signal: Option<SignalReader>,
    cred: Option<CredReader>,
    mm: Option<MmReader>,
    rss: Option<RssReader>,
    pids: Option<PidReader>,
    namespaces: Option<NamespaceReader>,
    cgroups: Option<CgroupReader>,
    places: Option<PlaceReader>,
    clock: Option<Clock>,
    warnings: Vec<String>,
}

#[derive(Debug)]
struct SignalReader {
    layout: Arc<SignalLayout>,
    spans: Spans,
    sid: usize,
    pgrp: usize,
    tty: TtyReader,
}

#[derive(Debug)]
struct MmReader {
    layout: Arc<MmLayout>,
    spans: Spans,
}

/// The fields of `struct cred`.
const CREDENTIALS: &[&str] = &[
    "uid",
    "euid",
    "suid",
    "fsuid",
    "gid",
    "egid",
    "sgid",
    "fsgid",
    "groups",
    "cap_inheritable",
    "cap_permitted",
    "cap_effective",
    "cap_bounding",
    "cap_ambient",
    "user_ns",
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

/// What a process has to itself of what the rows may hold: far more than an honest one needs.
const OWN: Own = Own { rows: 0, bytes: 4096 };

/// What the rows of one listing may hold.
#[derive(Debug)]
pub(crate) struct Budgets {
    /// Lists and paths out of the kernel.
    rows: Budget,
    /// Arguments and environments: a process can have megabytes of them, which must not cost others their paths.
    strings: Budget,
}

impl Budgets {
    /// For so many processes.
    fn of(processes: usize) -> Self {
        Self {
            rows: Budget::shared_by(processes, OWN),
            // Arguments and environment each.
            strings: Budget::shared_by(processes.saturating_mul(2), OWN),
        }
    }

    fn warnings(&self) -> impl Iterator<Item = String> {
        let rows = self.rows.warning("processes");
        rows.into_iter()
            .chain(self.strings.warning("arguments and environments"))
    }
}

/// Buffers and memories of one thread.
#[derive(Debug)]
pub(crate) struct Scratch<'b> {
    budgets: &'b Budgets,
    times: TimesCache,
    group: Group,
    /// Of the process whose row is made.
    ahead: Ahead,
    ttys: FxHashMap<u64, String>,
    namespaces: NamespaceCache,
    places: PlaceCache,
    memberships: FxHashMap<u64, Arc<Membership>>,
    // Session and group leaders' `struct pid`s: shared by whole families.
    pid_numbers: FxHashMap<u64, i32>,
}

impl ProcessReader {
    pub(crate) fn new(kernel: &Kernel, fields: ProcessFields) -> Result<Self, LinuxError> {
        let has = |wanted: ProcessFields| fields.intersects(wanted);
        let task: Arc<TaskLayout> = kernel.layout()?;
        let names = KthreadNames::new(kernel, &task);
        let mut extents = task_extents(&task, fields);
        extents.extend(names.extent());
        let task_spans = Spans::covering("task_struct", kernel.release(), extents)?;
        let needs_signal = has(ProcessFields::SIGNAL | ProcessFields::TIMES);
        let needs_mm =
            has(ProcessFields::MEMORY | ProcessFields::CMDLINE | ProcessFields::ENVIRON | ProcessFields::EXE);
        let mm = if needs_mm {
            Some(MmReader::new(kernel, fields)?)
        } else {
            None
        };
        let rss = match &mm {
            Some(mm) if has(ProcessFields::MEMORY) => Some(RssReader::new(kernel, &mm.layout)?),
            _ => None,
        };
        let mut warnings = Vec::new();
        let clock = if has(ProcessFields::START) {
            Clock::read(kernel)
                .map_err(|error| warnings.push(format!("no wall-clock start times: {error}")))
                .ok()
        } else {
            None
        };
        Ok(Self {
            kernel: kernel.clone(),
            fields,
            task,
            task_spans,
            names,
            signal: if needs_signal {
                Some(SignalReader::new(kernel)?)
            } else {
                None
            },
            cred: if has(ProcessFields::CREDENTIALS) {
                Some(CredReader::new(kernel)?)
            } else {
                None
            },
            mm,
            rss,
            pids: if has(ProcessFields::SIGNAL | ProcessFields::NAMESPACES) {
                Some(PidReader::new(kernel)?)
            } else {
                None
            },
            namespaces: if has(ProcessFields::NAMESPACES | ProcessFields::CREDENTIALS) {
                Some(NamespaceReader::new(kernel)?)
            } else {
                None
            },
            cgroups: if has(ProcessFields::CGROUP) {
                let made = CgroupReader::new(kernel);
                made.map_err(|error| warnings.push(format!("no control groups: {error}")))
                    .ok()
            } else {
                None
            },
            places: if has(ProcessFields::EXE | ProcessFields::CWD) {
                let made = PlaceReader::new(kernel);
                made.map_err(|error| warnings.push(format!("no paths: {error}")))
                    .ok()
            } else {
                None
            },
            clock,
            warnings,
        })
    }

    pub(crate) fn scratch<'b>(&self, budgets: &'b Budgets) -> Scratch<'b> {
        Scratch {
            budgets,
            times: TimesCache::default(),
            group: Group::default(),
            ahead: self.room(),
            ttys: FxHashMap::default(),
            namespaces: NamespaceCache::default(),
            places: PlaceCache::default(),
            memberships: FxHashMap::default(),
            pid_numbers: FxHashMap::default(),
        }
    }

    /// The rows of `tasks`, in their order, and what is left out of them.
    fn rows(&self, tasks: &[Gva]) -> (Vec<Process>, Vec<String>) {
        let mut warnings = Vec::new();
        let some = tasks.get(..ROWS).unwrap_or(tasks);
        if some.len() < tasks.len() {
            warnings.push(format!(
                "processes: {} of {} are shown, the rest are left out",
                some.len(),
                tasks.len()
            ));
        }
        let budgets = Budgets::of(some.len());
        let rows = if some.len() <= 2 * CHUNK {
            let mut scratch = self.scratch(&budgets);
            (0..some.len())
                .map(|index| self.row_of(some, index, &mut scratch))
                .collect()
        } else {
            (0..some.len())
                .into_par_iter()
                .with_min_len(CHUNK)
                .map_init(
                    || self.scratch(&budgets),
                    |scratch, index| self.row_of(some, index, scratch),
                )
                .collect()
        };
        warnings.extend(budgets.warnings());
        (rows, warnings)
    }

    /// Buffers for one process.
    fn room(&self) -> Ahead {
        let object = |spans: Option<&Spans>| Object::new(spans.map(Spans::buffer).unwrap_or_default());
        Ahead {
            task: object(Some(&self.task_spans)),
            signal: object(self.signal.as_ref().map(|s| &s.spans)),
            cred: Object::new(self.cred.as_ref().map(CredReader::buffer).unwrap_or_default()),
            mm: object(self.mm.as_ref().map(|m| &m.spans)),
            root: None,
            arguments: Vec::new(),
        }
    }

    /// The row of one of `tasks`. Those behind it are read with it, for it is their turn next.
    fn row_of(&self, tasks: &[Gva], index: usize, scratch: &mut Scratch<'_>) -> Process {
        let group = &scratch.group;
        let is_read = (group.start..group.start + group.len).contains(&index);
        if !is_read {
            let end = tasks.len().min(index + GROUP);
            self.read_ahead(tasks.get(index..end).unwrap_or_default(), &mut scratch.group);
            scratch.group.start = index;
        }
        if let Some(slot) = scratch.group.slots.get_mut(index - scratch.group.start) {
            std::mem::swap(slot, &mut scratch.ahead);
        }
        self.row(tasks.get(index).copied().unwrap_or(Gva(0)), scratch)
    }

    /// Reads the structures of `tasks`, each kind of all in one batch.
    fn read_ahead(&self, tasks: &[Gva], group: &mut Group) {
        group.len = tasks.len();
        if group.slots.len() < tasks.len() {
            group.slots.resize_with(tasks.len(), || self.room());
        }
        let slots = group.slots.get_mut(..tasks.len()).unwrap_or_default();
        let space = self.kernel.space();
        let layout = &self.task;
        let of_tasks = tasks.iter().zip(slots.iter_mut());
        self.task_spans
            .read_all(space, of_tasks.map(|(&task, slot)| (task, &mut slot.task)));
        let read = |slot: &&mut Ahead| slot.task.error.is_none();
        if let Some(reader) = &self.signal {
            let objects = slots
                .iter_mut()
                .filter(read)
                .map(|slot| (layout.signal.of(&slot.task.buffer), &mut slot.signal));
            reader.spans.read_all(space, objects);
        }
        if let Some(reader) = &self.cred {
            reader.read_all(
                slots
                    .iter_mut()
                    .filter(read)
                    .map(|slot| (layout.cred.of(&slot.task.buffer), &mut slot.cred)),
            );
        }
        let Some(reader) = &self.mm else { return };
        // Kernel threads have none of their own.
        let user = |slot: &&mut Ahead| {
            let task = &slot.task.buffer;
            read(slot) && !layout.mm.of(task).is_null() && layout.flags.of(task) & state::PF_KTHREAD == 0
        };
        let objects = slots
            .iter_mut()
            .filter(user)
            .map(|slot| (layout.mm.of(&slot.task.buffer), &mut slot.mm));
        reader.spans.read_all(space, objects);
        if !self.has(ProcessFields::CMDLINE | ProcessFields::ENVIRON) {
            return;
        }
        let mut wanted = Vec::with_capacity(tasks.len());
        for slot in slots.iter_mut().filter(user) {
            slot.arguments.clear();
            slot.root = None;
            if slot.mm.error.is_some() {
                continue;
            }
            let mm = &slot.mm.buffer;
            slot.root = self
                .kernel
                .known_user_root(reader.layout.pgd.of(mm), &mut group.stretches);
            let (start, end) = (reader.layout.arg_start.of(mm), reader.layout.arg_end.of(mm));
            let Some(root) = slot.root.filter(|_| start != 0) else {
                continue;
            };
            let in_page = 4096 - Gva(start).page_offset();
            slot.arguments
                .resize(end.saturating_sub(start).min(in_page as u64) as usize, 0);
            wanted.push((root, Gva(start), &mut slot.arguments));
        }
        ahead::arguments(self.kernel.memory(), space.mode(), &mut wanted);
    }

    /// The row of the task at `address`, of which [`Scratch::ahead`] holds what was read.
    fn row(&self, address: Gva, scratch: &mut Scratch<'_>) -> Process {
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
        row.name = crate::text::guest_array_text(layout.comm.of(task));
        let flags = layout.flags.of(task);
        row.kernel_thread = flags & state::PF_KTHREAD != 0;
        if let Some(name) = self.names.full_name(&self.kernel, flags, task) {
            row.name = name;
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

    fn has(&self, fields: ProcessFields) -> bool {
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
        row.nice = Some(layout.static_prio.of(task).wrapping_sub(120));
        row.priority = Some(layout.prio.of(task).wrapping_sub(100));
        row.rt_priority = Some(layout.rt_priority.of(task));
        row.policy = Some(state::policy(layout.policy.of(task)));
        row.cpu = layout.cpu.map(|cpu| cpu.of(task));
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
        row.seccomp = self
            .task
            .seccomp_mode
            .map(|mode| mode.of(&scratch.ahead.task.buffer));
        row.seccomp_filters = self
            .task
            .seccomp_filters
            .map(|count| count.of(&scratch.ahead.task.buffer));
        row.no_new_privs =
            Some(self.task.atomic_flags.of(&scratch.ahead.task.buffer) & state::PFA_NO_NEW_PRIVS != 0);
    }

    fn signal(&self, row: &mut Process, scratch: &mut Scratch<'_>) {
        let Some(reader) = &self.signal else { return };
        let address = self.task.signal.of(&scratch.ahead.task.buffer);
        if let Some(error) = scratch.ahead.signal.error.take() {
            let names = [
                (
                    ProcessFields::SIGNAL,
                    &["threads", "sid", "pgrp", "tty", "oom_score_adj"][..],
                ),
                (ProcessFields::TIMES, &["utime_ticks", "stime_ticks"]),
            ];
            self.unreadable(row, &names, &Problem::read("threads", &error).reason);
            return;
        }
        let (layout, signal) = (&reader.layout, &scratch.ahead.signal.buffer);
        if self.has(ProcessFields::SIGNAL) {
            row.threads = Some(layout.nr_threads.of(signal));
            row.oom_score_adj = Some(layout.oom_score_adj.of(signal));
            let pids = layout.pids.of(signal);
            let pid_at = |index: usize| {
                pids.get(index * 8..index * 8 + 8).map_or(Gva(0), |b| {
                    Gva(u64::from_le_bytes(b.try_into().unwrap_or_default()))
                })
            };
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
            row.sid = number("sid", pid_at(reader.sid), row);
            row.pgrp = number("pgrp", pid_at(reader.pgrp), row);
            let tty = layout.tty.of(signal);
            if !tty.is_null() {
                match reader.tty.name(tty, &mut scratch.ttys) {
                    Ok(name) => row.tty = Some(name),
                    Err(error) => row.problem(Problem::read("tty", &error)),
                }
            }
        }
        if self.has(ProcessFields::TIMES) {
            let budget = &scratch.budgets.rows;
            let times = scratch.times.of(address, || {
                super::times::process_times(&self.kernel, &self.task, layout, signal, address, budget)
            });
            match times {
                Ok(times) => {
                    row.utime_ticks = Some(times.user / TICK);
                    row.stime_ticks = Some(times.system / TICK);
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
            let names = [(ProcessFields::CREDENTIALS, CREDENTIALS)];
            self.unreadable(row, &names, &Problem::read("uid", &error).reason);
            return;
        }
        let (layout, cred) = (&reader.cred, &scratch.ahead.cred.buffer);
        row.uid = Some(layout.uid.of(cred));
        row.euid = Some(layout.euid.of(cred));
        row.suid = Some(layout.suid.of(cred));
        row.fsuid = Some(layout.fsuid.of(cred));
        row.gid = Some(layout.gid.of(cred));
        row.egid = Some(layout.egid.of(cred));
        row.sgid = Some(layout.sgid.of(cred));
        row.fsgid = Some(layout.fsgid.of(cred));
        row.cap_inheritable = Some(layout.cap_inheritable.of(cred));
        row.cap_permitted = Some(layout.cap_permitted.of(cred));
        row.cap_effective = Some(layout.cap_effective.of(cred));
        row.cap_bounding = Some(layout.cap_bounding.of(cred));
        row.cap_ambient = Some(layout.cap_ambient.of(cred));
        match reader.groups(cred) {
            Ok(groups) if share.bytes(groups.len() * size_of::<u32>()) => row.groups = Some(groups),
            Ok(_) => row.problem(Problem::new("groups", NO_ROOM)),
            Err(error) => row.problem(Problem::read("groups", &error)),
        }
        if let Some(namespaces) = &self.namespaces {
            match namespaces.user(layout.user_ns.of(cred), &mut scratch.namespaces) {
                Ok(inum) => row.user_ns = Some(inum),
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
                        row.pid_ns = Some(inum);
                        row.ns_pid = numbers.last().copied();
                        row.ns_pids = Some(numbers);
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
                    row.uts_ns = found.uts;
                    row.ipc_ns = found.ipc;
                    row.mnt_ns = found.mnt;
                    row.net_ns = found.net;
                    row.time_ns = found.time;
                    row.cgroup_ns = found.cgroup;
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
        row.cgroup = membership.unified.clone();
        row.cgroups = Some(Arc::clone(&membership.lines));
        if let Some(container) = &membership.container {
            row.container = Some(container.id.clone());
            row.container_runtime = Some(container.runtime.to_owned());
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
            row.cwd = row.path("cwd", places.cwd(fs, &mut scratch.places), share);
            row.root = row.path("root", places.root(fs, &mut scratch.places), share);
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
            row.exe = row.path("exe", places.file(file, &mut scratch.places), share);
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
            row.vm_size_kb = kb(layout.total_vm.of(mm));
            row.vm_data_kb = kb(layout.data_vm.of(mm));
            row.vm_stack_kb = kb(layout.stack_vm.of(mm));
            row.vm_exec_kb = kb(layout.exec_vm.of(mm));
            match rss.pages(layout, mm) {
                Ok(pages) => {
                    row.vm_rss_kb = kb(pages.resident);
                    row.vm_swap_kb = kb(pages.swapped);
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
            row.cmdline = row.argv.as_ref().map(|argv| argv.join(" "));
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
            row.environ = read.split();
            row.problems.extend(read.problem);
        }
    }
}

impl SignalReader {
    fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let layout: Arc<SignalLayout> = kernel.layout()?;
        let extents = [
            layout.nr_threads.extent(),
            layout.pids.extent(),
            layout.tty.extent(),
            layout.oom_score_adj.extent(),
            layout.utime.extent(),
            layout.stime.extent(),
            layout.runtime.extent(),
        ];
        let spans = Spans::covering("signal_struct", kernel.release(), extents)?;
        // `enum pid_type` has had this order since 4.19.
        let index = |name, usual| {
            kernel
                .enumerator("pid_type", name)
                .and_then(|v| usize::try_from(v).ok())
                .filter(|&v| v < 8)
                .unwrap_or(usual)
        };
        Ok(Self {
            layout,
            spans,
            pgrp: index("PIDTYPE_PGID", 2),
            sid: index("PIDTYPE_SID", 3),
            tty: TtyReader::new(kernel)?,
        })
    }
}

impl MmReader {
    fn new(kernel: &Kernel, fields: ProcessFields) -> Result<Self, LinuxError> {
        let layout: Arc<MmLayout> = kernel.layout()?;
        let mut extents = vec![layout.pgd.extent()];
        if fields.intersects(ProcessFields::CMDLINE | ProcessFields::ENVIRON) {
            extents.extend(
                [
                    &layout.arg_start,
                    &layout.arg_end,
                    &layout.env_start,
                    &layout.env_end,
                ]
                .map(|f| f.extent()),
            );
        }
        if fields.contains(ProcessFields::MEMORY) {
            extents.extend(
                [
                    &layout.total_vm,
                    &layout.data_vm,
                    &layout.stack_vm,
                    &layout.exec_vm,
                ]
                .map(|f| f.extent()),
            );
            extents.push(layout.rss_stat.extent());
        }
        extents.extend(
            layout
                .exe_file
                .filter(|_| fields.contains(ProcessFields::EXE))
                .map(|f| f.extent()),
        );
        let spans = Spans::covering("mm_struct", kernel.release(), extents)?;
        Ok(Self { layout, spans })
    }
}

/// The members of `task_struct` that the fields asked for come from.
fn task_extents(task: &TaskLayout, fields: ProcessFields) -> Vec<Extent> {
    let has = |wanted: ProcessFields| fields.intersects(wanted);
    let mut out = vec![
        task.pid.extent(),
        task.tgid.extent(),
        task.comm.extent(),
        task.flags.extent(),
        task.state.extent(),
        task.exit_state.extent(),
        task.real_parent.extent(),
        task.mm.extent(),
    ];
    if has(ProcessFields::SIGNAL | ProcessFields::TIMES) {
        out.push(task.signal.extent());
    }
    if has(ProcessFields::CREDENTIALS) {
        out.push(task.cred.extent());
    }
    if has(ProcessFields::NAMESPACES) {
        out.extend([task.nsproxy.extent(), task.thread_pid.extent()]);
    }
    if has(ProcessFields::START) {
        out.push(task.start_boottime.extent());
    }
    if has(ProcessFields::SCHED) {
        out.extend([task.prio, task.static_prio].map(|f| f.extent()));
        out.extend([task.rt_priority, task.policy].map(|f| f.extent()));
        out.extend(task.cpu.map(|f| f.extent()));
    }
    if has(ProcessFields::SECCOMP) {
        out.push(task.atomic_flags.extent());
        out.extend(
            [task.seccomp_mode, task.seccomp_filters]
                .into_iter()
                .flatten()
                .map(|f| f.extent()),
        );
    }
    if has(ProcessFields::CGROUP) {
        out.extend(task.cgroups.map(|f| f.extent()));
    }
    if has(ProcessFields::CWD) {
        out.push(task.fs.extent());
    }
    out
}
