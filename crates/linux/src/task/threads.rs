//! Threads: every task of every process.

use std::sync::Arc;

use compact_str::CompactString;
use rustc_hash::FxHashMap;
use serde::Serialize;
use vmsight_arch::Gva;

use super::layouts::{SignalLayout, TaskLayout};
use super::names::KthreadNames;
use super::read::TICK;
use super::state;
use super::times::{self, MAX_THREADS, Times};
use super::walk;
use crate::budget::{Budget, Own};
use crate::clock::Clock;
use crate::layout::{Buffer, Spans};
use crate::listing::{Listing, Problem, address};
use crate::structures::list;
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

/// A thread.
#[derive(Clone, Debug, Serialize)]
pub struct Thread {
    /// Thread id in the root namespace.
    pub tid: i32,
    /// The process it belongs to.
    pub pid: i32,
    /// `comm` of this very thread; of kernel threads the whole name (5.17 on).
    pub name: CompactString,
    /// The letter that ps shows.
    pub state: char,
    /// Whether it is a thread of the kernel's.
    pub kernel_thread: bool,
    /// The CPU it runs on or ran on last.
    pub cpu: Option<u32>,
    /// Whether it is on that CPU now.
    pub running: Option<bool>,
    /// Nice value.
    pub nice: i32,
    /// Priority as in /proc/PID/stat.
    pub priority: i32,
    /// Scheduling policy.
    pub policy: &'static str,
    /// Start, in ticks of 10 ms since boot.
    pub start_ticks: u64,
    /// Start by the guest's wall clock.
    pub start_time: Option<CompactString>,
    /// Ticks of 10 ms in user mode.
    pub utime_ticks: u64,
    /// Ticks in kernel mode.
    pub stime_ticks: u64,
    /// Lowest address of its kernel stack.
    #[serde(serialize_with = "address::gva")]
    pub stack: Gva,
    /// Address of its `task_struct`.
    #[serde(serialize_with = "address::gva")]
    pub task: Gva,
    /// What could not be read.
    pub problems: Vec<Problem>,
}

struct ThreadReader {
    kernel: Kernel,
    task: Arc<TaskLayout>,
    signal: Arc<SignalLayout>,
    spans: Spans,
    names: KthreadNames,
    clock: Option<Clock>,
}

impl Kernel {
    /// The threads of all processes, or of the process `pid`.
    pub fn threads(&self, pid: Option<i32>) -> Result<Listing<Thread>, LinuxError> {
        let reader = ThreadReader::new(self)?;
        let mut made = Made::new(&reader, 1);
        let more = match pid {
            Some(pid) => {
                reader.process(self.task(pid)?, &mut made);
                Vec::new()
            }
            None => {
                let (mut all, more) = walk::stable(self, |tasks| {
                    let mut made = Made::new(&reader, tasks.len());
                    let mut cut = 0;
                    for &task in tasks {
                        cut += usize::from(!reader.process(task, &mut made));
                    }
                    if cut > 0 {
                        made.warnings
                            .add(format!("threads: of {cut} processes not all are shown"));
                    }
                    vec![made]
                })?;
                made = all.pop().unwrap_or(made);
                more
            }
        };
        made.warnings.extend(made.budget.warning("threads"));
        made.warnings.extend(more);
        Ok(Listing::new(made.rows, made.warnings.into_vec()))
    }
}

/// Threads that are shown of every process, however many others have.
const OWN: Own = Own { rows: 16, bytes: 0 };

/// Rows in the making.
struct Made {
    rows: Vec<Thread>,
    warnings: Warnings,
    buffer: Buffer,
    budget: Budget,
    /// What is left of what the process at hand has to itself.
    own: Own,
    /// The `signal_struct`s whose threads are among the rows, with the process they were found by.
    signals: FxHashMap<Gva, Gva>,
}

impl Made {
    fn new(reader: &ThreadReader, processes: usize) -> Self {
        Self {
            rows: Vec::new(),
            warnings: Warnings::default(),
            buffer: reader.spans.buffer(),
            budget: Budget::shared_by(processes, OWN),
            own: Own::default(),
            signals: FxHashMap::default(),
        }
    }
}

impl ThreadReader {
    fn new(kernel: &Kernel) -> Result<Self, LinuxError> {
        let task: Arc<TaskLayout> = kernel.layout()?;
        let mut extents = vec![
            task.pid.extent(),
            task.tgid.extent(),
            task.comm.extent(),
            task.flags.extent(),
            task.state.extent(),
            task.exit_state.extent(),
            task.prio.extent(),
            task.static_prio.extent(),
            task.policy.extent(),
            task.start_boottime.extent(),
            task.utime.extent(),
            task.stime.extent(),
            task.runtime.extent(),
            task.stack.extent(),
        ];
        let names = KthreadNames::new(kernel, &task);
        extents.extend(names.extent());
        extents.extend([task.cpu, task.on_cpu].into_iter().flatten().map(|f| f.extent()));
        Ok(Self {
            kernel: kernel.clone(),
            spans: Spans::covering("task_struct", kernel.release(), extents)?,
            signal: kernel.layout()?,
            clock: Clock::read(kernel).ok(),
            names,
            task,
        })
    }

    /// Adds the threads of the process whose leader is `leader`; false where there is no room for them.
    fn process(&self, leader: Gva, made: &mut Made) -> bool {
        let space = self.kernel.space();
        made.own = made.budget.own();
        let signal = match self.task.signal.read(space, leader) {
            Ok(signal) => signal,
            Err(error) => return self.add(leader, Some(Problem::read("tid", &error)), made),
        };
        if let Some(&other) = made.signals.get(&signal) {
            // Processes have lists of threads of their own. Threads are shown once, however many say that they are theirs.
            let reason = format!("its list of threads is that of the task at {other}");
            return self.add(leader, Some(Problem::new("tid", reason)), made);
        }
        made.signals.insert(signal, leader);
        let limit = made.budget.limit(MAX_THREADS);
        let walk = list::walk(space, self.signal.thread_head.at(signal), limit).walk;
        made.budget.walked(walk.items.len());
        made.warnings
            .extend(walk.end.warning(&format!("thread list of the task at {leader}")));
        if walk.items.is_empty() {
            // A thread is better than none: the leader itself.
            return self.add(leader, None, made);
        }
        walk.items
            .iter()
            .all(|&at| self.add(self.task.thread_node.container(at), None, made))
    }

    fn add(&self, task: Gva, problem: Option<Problem>, made: &mut Made) -> bool {
        if !made.budget.row_of(&mut made.own, 0) {
            return false;
        }
        let mut row = self.row(task, &mut made.buffer);
        row.problems.extend(problem);
        made.rows.push(row);
        true
    }

    fn row(&self, address: Gva, buffer: &mut Buffer) -> Thread {
        let read = self.spans.read(self.kernel.space(), address, buffer);
        let (layout, task) = (&self.task, &*buffer);
        let mut row = Thread {
            tid: 0,
            pid: 0,
            name: CompactString::default(),
            state: '?',
            kernel_thread: false,
            cpu: None,
            running: None,
            nice: 0,
            priority: 0,
            policy: "unknown",
            start_ticks: 0,
            start_time: None,
            utime_ticks: 0,
            stime_ticks: 0,
            stack: Gva(0),
            task: address,
            problems: Vec::new(),
        };
        if let Err(error) = read {
            row.problems.push(Problem::read("task", &error));
            return row;
        }
        let times = Times {
            user: layout.utime.of(task),
            system: layout.stime.of(task),
        };
        let times = times::adjust(times, layout.runtime.of(task));
        let since_boot = layout.start_boottime.of(task);
        row.tid = layout.pid.of(task);
        row.pid = layout.tgid.of(task);
        row.name = crate::text::short_array_text(layout.comm.of(task));
        row.state = state::letter(layout.state.of(task), layout.exit_state.of(task));
        row.kernel_thread = layout.flags.of(task) & state::PF_KTHREAD != 0;
        if let Some(name) = self.names.full_name(&self.kernel, layout.flags.of(task), task) {
            row.name = name.into();
        }
        row.cpu = layout.cpu.map(|cpu| cpu.of(task));
        row.running = layout.on_cpu.map(|on| on.of(task) != 0);
        row.nice = layout.static_prio.of(task).wrapping_sub(120);
        row.priority = layout.prio.of(task).wrapping_sub(100);
        row.policy = state::policy(layout.policy.of(task));
        row.start_ticks = since_boot / TICK;
        row.start_time = self.clock.as_ref().and_then(|clock| clock.wall(since_boot));
        row.utime_ticks = times.user / TICK;
        row.stime_ticks = times.system / TICK;
        row.stack = layout.stack.of(task);
        row
    }
}
