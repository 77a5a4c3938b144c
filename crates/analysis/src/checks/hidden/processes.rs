//! Processes that exist and are not listed.

use std::cell::Cell;

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;
use vmsight_linux::structures::{Walk, hlist, list, xarray};
use vmsight_linux::{Kernel, LinuxError};

use super::cross_view::CrossView;
use super::task_slabs;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const PROCESSES: Check = Check {
    name: "hidden-processes",
    summary: "Every process is in all of the kernel's lists of processes",
    compares: "the list of tasks (ps from outside), the table of pids (ps and kill inside the guest) of the \
               initial namespace and of every other, the lists of children, the tasks of control groups, what \
               stands in the run queues of the CPUs, and what lives in the memory that tasks are made in; the \
               page tables that vCPUs use, of a guest that stands still, with those of tasks",
    why: "A process that is taken out of one of them runs on, and whoever asks by that way does not see it.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A process whose task is not where the kernel makes tasks, and that does not run or wait for a CPU at the moment.",
        "A process that programs in the guest hide from each other: see the checks of system calls and of function pointers.",
    ],
    run,
};

/// PID_MAX_LIMIT on 64-bit (include/linux/threads.h).
const MAX_TASKS: usize = 4 << 20;
/// Elements of lists that are looked at in all: bounds of each list are none of lists of lists.
const MAX_STEPS: usize = 16 << 20;
/// Processes that are told of.
const MAX_TOLD: usize = 1 << 10;
/// Namespaces of pids that are looked at.
const MAX_NAMESPACES: usize = 1 << 16;
/// `MAX_PID_NS_LEVEL` (kernel/pid_namespace.c).
const MAX_LEVEL: u64 = 32;
/// `PIDTYPE_PID` (include/linux/pid_types.h): the thread that a pid is of.
pub(super) const PID: u64 = 0;
/// `PIDTYPE_TGID`: the process that a pid is of.
const TGID: u64 = 1;
/// Two pointers, a `hlist_node`.
const NODE: u64 = 16;
/// CR0.PG.
const PAGING: u64 = 1 << 31;
const TASKS: &str = "in the list of tasks";
pub(super) const PIDS: &str = "in the table of pids";

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let reader = Reader::new(context)?;
    let listed = reader.listed(findings);
    let (by_pid, pids) = reader.by_pid(findings, TGID)?;
    let children = reader.children(findings);
    let mut views = CrossView::default();
    views.whole(TASKS, listed);
    views.whole(PIDS, by_pid);
    views.whole("a child of its parent", children);
    if let Some(found) = findings.or_note("the tasks of control groups", reader.in_cgroups()) {
        views.part("in a control group", reader.leaders(found));
    }
    if let Some(found) = findings.or_note("the run queues", reader.in_run_queues()) {
        views.part("running or waiting for a CPU", reader.leaders(found));
    }
    if let Some(found) = findings.or_note("the memory of tasks", task_slabs::processes(context)) {
        views.part("in the memory of tasks", found);
    }
    findings.looked_at(views.len());
    let missing: Vec<Gva> = views.missing().take(MAX_TOLD).collect();
    for task in missing {
        if let Err(error) = reader.report(findings, &views, task) {
            findings.note(format!("the task at {task}: {error}"));
        }
    }
    reader.namespaces(findings, &pids);
    if reader.left.get() == 0 {
        findings.note(format!(
            "lists of processes: no more looked at after {MAX_STEPS} elements"
        ));
    }
    // Those of a guest that runs are of another moment than its memory.
    if !context.is_changing()
        && let Err(error) = reader.roots(findings, &views)
    {
        findings.note(format!("the page tables of the vCPUs: {error}"));
    }
    Ok(())
}

/// The tables that a CR3 leads to, by the number of their page. With page-table isolation they are a pair, of which user mode
/// has the second one.
fn root(cr3: u64) -> u64 {
    (cr3 & 0x000f_ffff_ffff_f000) & !0x1000
}

/// Where what is looked at lies in a `task_struct`.
pub(super) struct Reader<'c> {
    context: &'c Context,
    init: Gva,
    tasks: u64,
    children: u64,
    sibling: u64,
    pub(super) leader: u64,
    pid: u64,
    thread_node: u64,
    signal: u64,
    threads: u64,
    exit_state: u64,
    /// Elements of lists that may still be looked at.
    left: Cell<usize>,
}

impl<'c> Reader<'c> {
    pub(super) fn new(context: &'c Context) -> Result<Self, LinuxError> {
        let kernel = context.kernel();
        let of = |member| kernel.offset("task_struct", member);
        Ok(Self {
            context,
            init: context.symbol(&["init_task"])?,
            tasks: of("tasks")?,
            children: of("children")?,
            sibling: of("sibling")?,
            leader: of("group_leader")?,
            pid: of("pid")?,
            thread_node: of("thread_node")?,
            signal: of("signal")?,
            threads: kernel.offset("signal_struct", "thread_head")?,
            exit_state: of("exit_state")?,
            left: Cell::new(MAX_STEPS),
        })
    }

    fn kernel(&self) -> &'c Kernel {
        self.context.kernel()
    }

    pub(super) fn pointer(&self, task: Gva, offset: u64) -> Option<Gva> {
        let read = self.context.space().read_u64(task.wrapping_add(offset));
        read.ok().map(Gva).filter(|at| !at.is_null())
    }

    /// The nodes of the list whose head lies at `head`.
    fn nodes(&self, head: Gva) -> Walk {
        let left = self.left.get();
        let walk = list::walk(self.context.space(), head, left.min(MAX_TASKS)).walk;
        self.left.set(left.saturating_sub(walk.items.len() + 1));
        walk
    }

    pub(super) fn pid(&self, task: Gva) -> Option<i32> {
        let read = self.context.space().read_u32(task.wrapping_add(self.pid));
        read.ok().map(|pid| pid as i32)
    }

    /// The list that starts at `init_task`.
    pub(super) fn listed(&self, findings: &mut Findings) -> Vec<Gva> {
        let found = self.nodes(self.init.wrapping_add(self.tasks));
        let nodes = findings.complete("list of tasks", found).into_iter();
        nodes.map(|node| node.wrapping_sub(self.tasks)).collect()
    }

    /// The tasks that pids in the initial namespace are the `kind` of, and those pids. Every pid of every namespace has a number there.
    pub(super) fn by_pid(
        &self,
        findings: &mut Findings,
        kind: u64,
    ) -> Result<(Vec<Gva>, Vec<Gva>), LinuxError> {
        let kernel = self.kernel();
        let table = self
            .context
            .object("pid_namespace", self.context.symbol(&["init_pid_ns"])?)?;
        let found = xarray::walk_idr(kernel, table.member("idr")?)?;
        let first = kernel.offset("pid", "tasks")? + kind * 8;
        let link = kernel.offset("task_struct", "pid_links")? + kind * NODE;
        let entries = findings.complete("table of pids", found);
        let pids: Vec<Gva> = entries.iter().filter_map(xarray::Entry::pointer).collect();
        let tasks = pids
            .iter()
            .filter_map(|&pid| self.pointer(pid, first))
            .map(|node| node.wrapping_sub(link))
            .collect();
        Ok((tasks, pids))
    }

    /// The processes below `init_task`: the children of every thread of every one.
    pub(super) fn children(&self, findings: &mut Findings) -> Vec<Gva> {
        let mut found = Vec::new();
        let mut seen = FxHashSet::default();
        let mut left = vec![self.init];
        while let Some(process) = left.pop() {
            for thread in self.threads(process) {
                let head = thread.wrapping_add(self.children);
                for node in findings.complete("list of children", self.nodes(head)) {
                    let child = node.wrapping_sub(self.sibling);
                    if seen.len() < MAX_TASKS && seen.insert(child) {
                        found.push(child);
                        left.push(child);
                    }
                }
            }
        }
        found
    }

    /// The threads of a process, it itself included.
    pub(super) fn threads(&self, process: Gva) -> Vec<Gva> {
        let mut threads = vec![process];
        if let Some(signal) = self.pointer(process, self.signal) {
            let head = signal.wrapping_add(self.threads);
            let nodes = self.nodes(head).items;
            let others = nodes.iter().map(|node| node.wrapping_sub(self.thread_node));
            threads.extend(others.filter(|&thread| thread != process));
        }
        threads
    }

    /// The processes that threads belong to. The idle tasks of CPUs, whose pid is 0, are none.
    fn leaders(&self, threads: Vec<Gva>) -> FxHashSet<Gva> {
        let threads = threads.into_iter();
        threads
            .filter_map(|thread| self.pointer(thread, self.leader))
            .filter(|&leader| self.pid(leader).is_some_and(|pid| pid != 0))
            .collect()
    }

    /// The tasks in the sets of control groups (`css_set_table`, kernel/cgroup/cgroup.c).
    pub(super) fn in_cgroups(&self) -> Result<Vec<Gva>, LinuxError> {
        let (kernel, space) = (self.kernel(), self.context.space());
        let link = kernel.offset("task_struct", "cg_list")?;
        let node = kernel.offset("css_set", "hlist")?;
        let lists = [
            kernel.offset("css_set", "tasks")?,
            kernel.offset("css_set", "mg_tasks")?,
        ];
        let table = self.context.symbol(&["css_set_table"])?;
        let mut sets: Vec<Gva> = kernel.find_symbol(&["init_css_set"]).into_iter().collect();
        // CSS_SET_HASH_BITS is 7.
        for bucket in 0..128u64 {
            let left = self.left.get();
            let chain = hlist::walk(space, table.wrapping_add(bucket * 8), left).items;
            self.left.set(left.saturating_sub(chain.len() + 1));
            sets.extend(chain.iter().map(|at| at.wrapping_sub(node)));
        }
        let mut tasks = Vec::new();
        for set in sets {
            for offset in lists {
                let nodes = self.nodes(set.wrapping_add(offset)).items;
                tasks.extend(nodes.iter().map(|at| at.wrapping_sub(link)));
            }
        }
        Ok(tasks)
    }

    /// What runs on each CPU, and what waits for it in the fair class.
    pub(super) fn in_run_queues(&self) -> Result<Vec<Gva>, LinuxError> {
        let kernel = self.kernel();
        let queues = kernel.per_cpu_symbol("runqueues")?;
        let current = kernel.offset("rq", "curr")?;
        let waiting = kernel.offset("rq", "cfs_tasks")?;
        let link = kernel.offset("task_struct", "se.group_node")?;
        let mut tasks = Vec::new();
        for (_, queue) in kernel.per_cpu()?.copies(queues) {
            tasks.extend(self.pointer(queue, current));
            let nodes = self.nodes(queue.wrapping_add(waiting)).items;
            tasks.extend(nodes.iter().map(|node| node.wrapping_sub(link)));
        }
        Ok(tasks)
    }

    pub(super) fn describe(&self, findings: &mut Findings, task: Gva) -> Option<(i32, String)> {
        let object = findings.or_note("a task", self.context.object("task_struct", task))?;
        let pid = findings.or_note("a task", object.number("pid"))? as i32;
        Some((pid, object.array_text("comm").unwrap_or_default()))
    }

    fn report(&self, findings: &mut Findings, views: &CrossView, task: Gva) -> Result<(), LinuxError> {
        let object = self.context.object("task_struct", task)?;
        // One that ends is taken out of one after the other.
        let ends = object.number("exit_state")? != 0;
        if ends || self.pointer(task, self.leader) != Some(task) {
            return Ok(());
        }
        let Some((pid, name)) = self.describe(findings, task) else {
            return Ok(());
        };
        let lacking = views.lacking(task);
        let explanation = format!("the process exists, and yet is not {}", lacking.join(", not "));
        let mut finding =
            Finding::new(Severity::Critical, format!("process {pid} ({name})"), explanation).at(task);
        for answer in views.evidence(task) {
            finding = finding.with(answer);
        }
        finding = finding.with(self.context.evidence("parent", object.pointer("real_parent")?));
        if let Ok(mm) = object.pointer("mm") {
            finding = finding.with(Evidence::value("address space", mm));
        }
        findings.report(finding);
        Ok(())
    }

    /// A vCPU must use page tables of a task's, or of the kernel's own.
    fn roots(&self, findings: &mut Findings, views: &CrossView) -> Result<(), LinuxError> {
        let vcpus = match self.context.registers() {
            Ok(vcpus) => vcpus,
            Err(why) => {
                findings.note(format!("the vCPUs' registers: {why}"));
                return Ok(());
            }
        };
        let (kernel, context) = (self.kernel(), self.context);
        let top = kernel.offset("mm_struct", "pgd")?;
        // Kernel threads use those of whoever ran before them, who may have ended.
        let spaces = [
            kernel.offset("task_struct", "mm")?,
            kernel.offset("task_struct", "active_mm")?,
        ];
        let mut tasks: Vec<Gva> = views.objects().collect();
        tasks.push(self.init);
        let queues = kernel.per_cpu_symbol("runqueues")?;
        for (_, queue) in kernel.per_cpu()?.copies(queues) {
            for member in ["idle", "curr"] {
                tasks.extend(self.pointer(queue, kernel.offset("rq", member)?));
            }
        }
        let mut owned: FxHashSet<Gva> = tasks
            .iter()
            .flat_map(|&task| spaces.map(|offset| self.pointer(task, offset)))
            .flatten()
            .collect();
        owned.extend(kernel.find_symbol(&["efi_mm"]));
        let patching = kernel.find_symbol(&["text_poke_mm", "poking_mm"]);
        owned.extend(patching.and_then(|at| context.pointer("poking_mm", at).ok()));
        let mut known: FxHashSet<u64> = owned
            .iter()
            .filter_map(|&mm| self.pointer(mm, top))
            .filter_map(|pgd| context.space().translate(pgd).ok())
            .map(|found| root(found.gpa.0))
            .collect();
        known.insert(root(kernel.image().dtb.0));
        for vcpu in vcpus.iter().filter(|v| v.cr0 & PAGING != 0) {
            findings.looked_at(1);
            if !known.contains(&root(vcpu.cr3)) {
                let finding = Finding::new(
                    Severity::High,
                    format!("address space of vCPU {}", vcpu.vcpu),
                    "the vCPU uses page tables that are no task's and not the kernel's own",
                );
                findings.report(finding.with(Evidence::value("CR3", format_args!("{:#x}", vcpu.cr3))));
            }
        }
        Ok(())
    }

    /// Every pid must be in the table of each namespace that it has a number in.
    fn namespaces(&self, findings: &mut Findings, pids: &[Gva]) {
        let kernel = self.kernel();
        let layout = (|| -> Result<_, LinuxError> {
            let size = kernel.types().find_struct("upid");
            let size = size.and_then(|id| kernel.types().size_of(id)).unwrap_or(16);
            Ok((
                kernel.offset("pid", "level")?,
                kernel.offset("pid", "numbers")?,
                size,
                kernel.offset("upid", "ns")?,
                kernel.offset("pid_namespace", "idr")?,
            ))
        })();
        let Some((level, numbers, size, namespace, table)) =
            findings.or_note("the tables of pids of namespaces", layout)
        else {
            return;
        };
        let space = self.context.space();
        let mut tables: FxHashMap<Gva, FxHashMap<u64, Gva>> = FxHashMap::default();
        for &pid in pids {
            let depth = space.read_u32(pid.wrapping_add(level)).map_or(0, u64::from);
            for above in 1..=depth.min(MAX_LEVEL) {
                let upid = pid.wrapping_add(numbers + above * size);
                let Ok(number) = space.read_u32(upid) else {
                    continue;
                };
                let Some(owner) = self.pointer(upid, namespace) else {
                    continue;
                };
                if !tables.contains_key(&owner) {
                    if tables.len() >= MAX_NAMESPACES {
                        return findings.note(format!("more than {MAX_NAMESPACES} namespaces of pids"));
                    }
                    let found = xarray::walk_idr(kernel, owner.wrapping_add(table));
                    let found = found.map(|walk| walk.items).unwrap_or_default();
                    let entries = found.iter().filter_map(|e| Some((e.index, e.pointer()?)));
                    tables.insert(owner, entries.collect());
                }
                let known = tables.get(&owner).and_then(|table| table.get(&u64::from(number)));
                if known != Some(&pid) && self.is_alive(pid) {
                    let finding = Finding::new(
                        Severity::Critical,
                        format!("pid {number} of a nested namespace"),
                        "the pid is in the table of the initial namespace, and not in that of its own: programs there do not see it",
                    );
                    findings.report(finding.at(pid).with(Evidence::value("namespace", owner)));
                }
            }
        }
    }

    /// Whether a process that has not ended has the pid.
    fn is_alive(&self, pid: Gva) -> bool {
        let kernel = self.kernel();
        let offsets = kernel.offset("pid", "tasks").and_then(|first| {
            Ok((
                first + TGID * 8,
                kernel.offset("task_struct", "pid_links")? + TGID * NODE,
            ))
        });
        let Ok((first, link)) = offsets else { return false };
        let Some(node) = self.pointer(pid, first) else {
            return false;
        };
        let task = node.wrapping_sub(link);
        self.context
            .space()
            .read_u32(task.wrapping_add(self.exit_state))
            .is_ok_and(|state| state == 0)
    }
}
