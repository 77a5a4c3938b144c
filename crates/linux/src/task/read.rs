//! Makes process rows: reads only what is asked for, each structure in as few reads as there are stretches of interest.

mod row;

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
use super::walk;
use crate::budget::{Budget, Own, ROWS};
use crate::clock::Clock;
use crate::layout::{Buffer, Extent, Spans};
use crate::listing::Listing;
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
    session: Option<SessionReader>,
}

/// What is needed for [`ProcessFields::SESSION`].
#[derive(Debug)]
struct SessionReader {
    /// Where the session's `struct pid` is in the array of them …
    sid: usize,
    /// … and the process group's.
    pgrp: usize,
    tty: TtyReader,
}

#[derive(Debug)]
struct MmReader {
    layout: Arc<MmLayout>,
    spans: Spans,
}

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
    /// Of the process whose row is made. Boxed, as those of the group: they change places.
    ahead: Box<Ahead>,
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
                Some(SignalReader::new(kernel, fields)?)
            } else {
                None
            },
            cred: if has(ProcessFields::CREDENTIALS) {
                Some(CredReader::new(kernel, fields)?)
            } else {
                None
            },
            mm,
            rss,
            pids: if has(ProcessFields::SESSION | ProcessFields::NAMESPACES) {
                Some(PidReader::new(kernel)?)
            } else {
                None
            },
            namespaces: if has(ProcessFields::NAMESPACES | ProcessFields::USER_NS) {
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
            ahead: Box::new(self.room()),
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
            group.slots.resize_with(tasks.len(), || Box::new(self.room()));
        }
        let slots = group.slots.get_mut(..tasks.len()).unwrap_or_default();
        let space = self.kernel.space();
        let layout = &self.task;
        tasks
            .iter()
            .for_each(|&task| self.task_spans.prefetch(space, task));
        let of_tasks = tasks.iter().zip(slots.iter_mut());
        self.task_spans
            .read_all(space, of_tasks.map(|(&task, slot)| (task, &mut slot.task)));
        let read = |slot: &&mut Box<Ahead>| slot.task.error.is_none();
        // Kernel threads have no memory of their own.
        let user = |slot: &&mut Box<Ahead>| {
            let task = &slot.task.buffer;
            read(slot) && !layout.mm.of(task).is_null() && layout.flags.of(task) & state::PF_KTHREAD == 0
        };
        for slot in slots.iter_mut().filter(read) {
            let task = &slot.task.buffer;
            space.prefetch(layout.tgid.at(layout.real_parent.of(task)), &[0]);
            if let Some(reader) = &self.signal {
                reader.spans.prefetch(space, layout.signal.of(task));
            }
            if let Some(reader) = &self.cred {
                reader.prefetch(layout.cred.of(task));
            }
            if let Some(reader) = self.mm.as_ref().filter(|_| user(&slot)) {
                reader.spans.prefetch(space, layout.mm.of(&slot.task.buffer));
            }
        }
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
        for slot in slots.iter_mut().filter(read) {
            if let (Some(reader), Some(pids)) = (&self.signal, &self.pids)
                && let Some(session) = &reader.session
            {
                for index in [session.sid, session.pgrp] {
                    pids.prefetch(reader.pid_at(&slot.signal.buffer, index));
                }
            }
            if let Some(reader) = &self.cred {
                reader.prefetch_groups(&slot.cred.buffer);
            }
        }
        let Some(reader) = &self.mm else { return };
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
}

impl SignalReader {
    /// The `struct pid` that `signal` has at `index` of its array.
    fn pid_at(&self, signal: &Buffer, index: usize) -> Gva {
        let pids = self.layout.pids.of(signal);
        pids.get(index * 8..index * 8 + 8).map_or(Gva(0), |bytes| {
            Gva(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
        })
    }

    fn new(kernel: &Kernel, fields: ProcessFields) -> Result<Self, LinuxError> {
        let layout: Arc<SignalLayout> = kernel.layout()?;
        let extents = [
            (ProcessFields::THREADS, layout.nr_threads.extent()),
            (ProcessFields::SESSION, layout.pids.extent()),
            (ProcessFields::SESSION, layout.tty.extent()),
            (ProcessFields::OOM, layout.oom_score_adj.extent()),
            (ProcessFields::TIMES, layout.utime.extent()),
            (ProcessFields::TIMES, layout.stime.extent()),
            (ProcessFields::TIMES, layout.runtime.extent()),
        ];
        let spans = Spans::covering("signal_struct", kernel.release(), fields.extents(&extents))?;
        let session = fields.contains(ProcessFields::SESSION);
        let session = session.then(|| SessionReader::new(kernel)).transpose()?;
        Ok(Self {
            layout,
            spans,
            session,
        })
    }
}

impl SessionReader {
    fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        // `enum pid_type` has had this order since 4.19.
        let index = |name, usual| {
            kernel
                .enumerator("pid_type", name)
                .and_then(|v| usize::try_from(v).ok())
                .filter(|&v| v < 8)
                .unwrap_or(usual)
        };
        Ok(Self {
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
