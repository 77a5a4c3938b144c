//! The list of all processes: `init_task.tasks`, which links the leaders of all thread groups.

use std::sync::Arc;

use vmsight_arch::Gva;

use super::layouts::TaskLayout;
use crate::structures::list;
use crate::structures::{End, MAX_OBJECTS};
use crate::{Kernel, LinuxError};

/// How often a list that changes while it is read is read again before what was read is shown with a warning.
const RETRIES: usize = 4;

/// The thread-group leaders, in the kernel's order; `init_task` (the idle task of CPU 0, pid 0) is not among them.
#[derive(Clone, Debug)]
pub(crate) struct TaskList {
    /// Addresses of `task_struct`s.
    pub(crate) tasks: Vec<Gva>,
    /// How the walk ended.
    pub(crate) end: End,
    /// Links that contradict each other, or a walk that did not come back to its head.
    pub(crate) uneven: usize,
}

impl TaskList {
    /// Follows the list once.
    fn read(kernel: &Kernel, layout: &TaskLayout, init: Gva) -> Self {
        let out = list::walk_long(kernel.space(), layout.tasks.at(init), MAX_OBJECTS);
        let tasks = out
            .walk
            .items
            .iter()
            .map(|&at| layout.tasks.container(at))
            .collect();
        Self {
            tasks,
            end: out.walk.end,
            uneven: out.uneven,
        }
    }

    fn is_sound(&self) -> bool {
        self.end.is_complete() && self.uneven == 0
    }

    /// What a listing must say of this list.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self.end.warning("task list").into_iter().collect();
        if self.uneven > 0 && self.end.is_complete() {
            warnings.push(format!(
                "task list: the backward links of {} tasks do not match the forward ones (changed while read, or tampered with)",
                self.uneven
            ));
        }
        warnings
    }
}

/// The address of `init_task`.
pub(crate) fn init_task(kernel: &Kernel) -> Result<Gva, LinuxError> {
    kernel.symbol("init_task")
}

/// Reads the task list, again where a live guest changed it under our hands.
pub(crate) fn task_list(kernel: &Kernel) -> Result<TaskList, LinuxError> {
    let layout: Arc<TaskLayout> = kernel.layout()?;
    let init = init_task(kernel)?;
    let mut list = TaskList::read(kernel, &layout, init);
    for _ in 0..RETRIES {
        if list.is_sound() || !kernel.memory().is_live() {
            break;
        }
        let again = TaskList::read(kernel, &layout, init);
        // Of two imperfect ones the longer shows more.
        if again.is_sound() || again.tasks.len() >= list.tasks.len() {
            list = again;
        }
    }
    Ok(list)
}

/// Reads the task list and makes rows of it, and does both again where a live guest changed the list in between: a task that ended
/// meanwhile may have given its memory to something else.
///
/// Returns the rows and the warnings about them.
pub(crate) fn stable<R>(
    kernel: &Kernel,
    mut rows: impl FnMut(&[Gva]) -> Vec<R>,
) -> Result<(Vec<R>, Vec<String>), LinuxError> {
    let mut list = task_list(kernel)?;
    let mut attempt = 0;
    loop {
        let out = rows(&list.tasks);
        if !kernel.memory().is_live() {
            return Ok((out, list.warnings()));
        }
        let after = task_list(kernel)?;
        if after.tasks == list.tasks {
            return Ok((out, after.warnings()));
        }
        attempt += 1;
        if attempt > RETRIES {
            let mut warnings = after.warnings();
            let (gone, new) = difference(&list.tasks, &after.tasks);
            warnings.push(format!(
                "task list: it changed at each of {attempt} readings; while the last was made, {gone} processes ended and {new} began"
            ));
            return Ok((out, warnings));
        }
        list = after;
    }
}

fn difference(before: &[Gva], after: &[Gva]) -> (usize, usize) {
    let before: rustc_hash::FxHashSet<u64> = before.iter().map(|g| g.0).collect();
    let after: rustc_hash::FxHashSet<u64> = after.iter().map(|g| g.0).collect();
    (
        before.difference(&after).count(),
        after.difference(&before).count(),
    )
}
