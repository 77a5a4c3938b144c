//! The processes as holders of files, directories and namespaces.

use std::sync::Arc;

use rustc_hash::FxHashSet;
use serde::{Serialize, Serializer};
use vmsight_arch::Gva;

use crate::budget::{Budget, Own};
use crate::layout::{Field, Place, Spans, layout};
use crate::structures::list;
use crate::task::walk::task_list;
use crate::text::guest_array_text;
use crate::warnings::Warnings;
use crate::{Kernel, LinuxError};

/// More threads than one process can have.
const MAX_THREADS: usize = 1 << 20;

layout! {
    struct HolderLayout = "task_struct" {
        pid: Field<i32> = "pid",
        comm: Place = "comm",
        files: Field<Gva> = "files",
        fs: Field<Gva> = "fs",
        mm: Field<Gva> = "mm",
        nsproxy: Field<Gva> = "nsproxy",
        signal: Field<Gva> = "signal",
        thread_node: Place = "thread_node",
    }
}

layout! {
    struct ThreadsLayout = "signal_struct" {
        thread_head: Place = "thread_head",
        nr_threads: Field<i32> = "nr_threads",
    }
}

/// A process, or a thread that has file descriptors of its own.
#[derive(Clone, Debug)]
pub(crate) struct Holder {
    /// Pid in the root namespace.
    pub(crate) pid: i32,
    /// The thread's id where it is not the process itself.
    pub(crate) tid: Option<i32>,
    pub(crate) comm: Arc<str>,
    /// `files_struct`, null for one that has ended.
    pub(crate) files: Gva,
    /// `fs_struct`, null for one that has ended.
    pub(crate) fs: Gva,
    /// `mm_struct`, null for kernel threads.
    pub(crate) mm: Gva,
    /// `nsproxy`, null for one that has ended.
    pub(crate) nsproxy: Gva,
}

/// Who has an object open. Serialised as `"PID/NAME/FD"`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Pid in the root namespace.
    pub pid: i32,
    /// The process's name.
    pub name: Arc<str>,
    /// The file descriptor.
    pub fd: u32,
}

impl Serialize for Owner {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}/{}", self.pid, self.name, self.fd))
    }
}

/// All processes, and the threads whose files, directories or namespaces differ from their process's; and warnings about the lists.
pub(crate) fn all(kernel: &Kernel) -> Result<(Vec<Holder>, Vec<String>), LinuxError> {
    let layout: Arc<HolderLayout> = kernel.layout()?;
    let threads: Arc<ThreadsLayout> = kernel.layout()?;
    let l = &layout;
    let spans = Spans::covering(
        "task_struct",
        kernel.release(),
        [
            l.pid.extent(),
            l.comm.extent(),
            l.files.extent(),
            l.fs.extent(),
            l.mm.extent(),
            l.nsproxy.extent(),
            l.signal.extent(),
            l.thread_node.extent(),
        ],
    )?;
    let space = kernel.space();
    let tasks = task_list(kernel)?;
    // Every process is a holder, however many threads of others are.
    let budget = Budget::shared_by(tasks.tasks.len(), Own { rows: 1, bytes: 0 });
    let mut warnings = Warnings::default();
    warnings.extend(tasks.warnings());
    // Processes have lists of threads of their own: one that many say is theirs is followed once.
    let mut signals: FxHashSet<Gva> = FxHashSet::default();
    let mut sharing = 0usize;
    let mut holders = Vec::with_capacity(tasks.tasks.len());
    let mut object = spans.buffer();
    let mut broken = 0usize;
    for task in tasks.tasks {
        if spans.read(space, task, &mut object).is_err() {
            broken += 1;
            continue;
        }
        let leader = Holder {
            pid: l.pid.of(&object),
            tid: None,
            comm: guest_array_text(l.comm.of(&object)).into(),
            files: l.files.of(&object),
            fs: l.fs.of(&object),
            mm: l.mm.of(&object),
            nsproxy: l.nsproxy.of(&object),
        };
        let signal = l.signal.of(&object);
        let known = (leader.files, leader.fs, leader.nsproxy);
        let pid = leader.pid;
        if !budget.row_of(&mut budget.own(), 0) {
            break;
        }
        holders.push(leader);
        // Most processes have one thread: nothing to look for.
        if signal.is_null() || threads.nr_threads.read(space, signal).is_ok_and(|n| n == 1) {
            continue;
        }
        if !signals.insert(signal) {
            sharing += 1;
            continue;
        }
        let limit = budget.limit(MAX_THREADS);
        let found = list::walk(space, threads.thread_head.at(signal), limit);
        budget.walked(found.walk.items.len());
        let mut seen: FxHashSet<(Gva, Gva, Gva)> = [known].into_iter().collect();
        for node in found.walk.items {
            let thread = l.thread_node.container(node);
            if thread == task || spans.read(space, thread, &mut object).is_err() {
                continue;
            }
            let own = (l.files.of(&object), l.fs.of(&object), l.nsproxy.of(&object));
            if own.0.is_null() && own.1.is_null() && own.2.is_null() || !seen.insert(own) {
                continue;
            }
            if !budget.row(0) {
                break;
            }
            holders.push(Holder {
                pid,
                tid: Some(l.pid.of(&object)),
                comm: guest_array_text(l.comm.of(&object)).into(),
                files: if own.0 == known.0 { Gva(0) } else { own.0 },
                fs: if own.1 == known.1 { Gva(0) } else { own.1 },
                mm: Gva(0),
                nsproxy: if own.2 == known.2 { Gva(0) } else { own.2 },
            });
        }
        if let Some(warning) = found.walk.end.warning(&format!("threads of process {pid}")) {
            warnings.add(warning);
        }
    }
    if broken > 0 {
        warnings.add(format!("{broken} processes could not be read"));
    }
    if sharing > 0 {
        warnings.add(format!(
            "{sharing} processes have a list of threads that is another's: its threads were looked at once"
        ));
    }
    warnings.extend(budget.warning("processes and threads"));
    Ok((holders, warnings.into_vec()))
}
