//! Names of tasks.

use std::sync::Arc;

use vmsight_arch::Gva;

use super::layouts::{KthreadLayout, TaskLayout};
use super::state;
use crate::Kernel;
use crate::layout::{Buffer, Extent, Field};

/// No kernel thread's name is longer: they are made by printf from short words.
const MAX_NAME: usize = 256;

/// Reads the names of kernel threads that do not fit in `comm`.
///
/// `comm` has room for 15 bytes. Since 5.17 a kernel thread whose name is longer keeps all of it in its `struct kthread`, and that is
/// what /proc and ps show (`proc_task_name` in fs/proc/array.c).
#[derive(Debug, Default)]
pub(crate) struct KthreadNames {
    members: Option<(Field<Gva>, Field<Gva>)>,
}

impl KthreadNames {
    pub(crate) fn new(kernel: &Kernel, task: &TaskLayout) -> Self {
        let full_name = kernel
            .layout()
            .ok()
            .and_then(|kthread: Arc<KthreadLayout>| kthread.full_name);
        Self {
            members: task.worker_private.zip(full_name),
        }
    }

    /// What must be read of the `task_struct`.
    pub(crate) fn extent(&self) -> Option<Extent> {
        self.members.map(|(private, _)| private.extent())
    }

    /// The whole name of the kernel thread in `task`, where `comm` is not it. Work-queue workers have another: what they are at.
    pub(crate) fn full_name(&self, kernel: &Kernel, flags: u32, task: &Buffer) -> Option<String> {
        if flags & (state::PF_KTHREAD | state::PF_WQ_WORKER) != state::PF_KTHREAD {
            return None;
        }
        let (private, full_name) = self.members?;
        let kthread = private.of(task);
        if kthread.is_null() {
            return None;
        }
        let name = full_name.read(kernel.space(), kthread).ok()?;
        if name.is_null() {
            return None;
        }
        kernel.text(name, MAX_NAME).ok()
    }
}
