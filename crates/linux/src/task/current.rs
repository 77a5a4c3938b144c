//! Who runs on a CPU: `current`, found from the GS base of a vCPU that is in the kernel.

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

use super::layouts::{CredLayout, TaskLayout};
use crate::layout::{Field, layout};
use crate::listing::address;
use crate::text::guest_array_text;
use crate::{Kernel, LinuxError};

/// `TASK_COMM_LEN`.
const COMM: usize = 16;

layout! {
    /// What a task acts with: differs from `real_cred` only while it acts for somebody else.
    struct SubjectiveLayout = "task_struct" {
        cred: Field<Gva> = "cred",
    }
}

/// A task at one moment, as far as an event needs it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Current {
    /// The process: its pid in the root namespace.
    pub pid: i32,
    /// The thread.
    pub tid: i32,
    /// `comm` of the thread.
    pub name: String,
    /// Effective user id, in the root user namespace; `None` where it could not be read.
    pub uid: Option<u32>,
    /// Address of its `task_struct`.
    #[serde(serialize_with = "address::gva")]
    pub task: Gva,
}

/// Finds the current task of vCPUs.
#[derive(Clone, Debug)]
pub struct CurrentReader {
    kernel: Kernel,
    /// What is added to the GS base: where the variable lies in each CPU's area.
    variable: u64,
    task: Arc<TaskLayout>,
    subjective: Arc<SubjectiveLayout>,
    cred: Arc<CredLayout>,
}

impl Kernel {
    /// What finds the current task of a vCPU. The variable is `current_task`, from 6.2 to 6.14 `pcpu_hot.current_task`
    /// (arch/x86/include/asm/current.h).
    ///
    /// # Errors
    /// If the kernel's symbols or types lack it.
    pub fn current(&self) -> Result<CurrentReader, LinuxError> {
        let variable = match self.per_cpu_symbol("pcpu_hot") {
            Ok(hot) => hot.wrapping_add(self.offset("pcpu_hot", "current_task")?),
            Err(_) => self.per_cpu_symbol("current_task")?,
        };
        Ok(CurrentReader {
            kernel: self.clone(),
            variable: variable.0,
            task: self.layout()?,
            subjective: self.layout()?,
            cred: self.layout()?,
        })
    }
}

/// Where the pid of the process that runs on a CPU lies, as a chain of pointers: for a filter that is to find it
/// without this kernel's types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PidChain {
    /// What is added to the GS base: the pointer to the `task_struct` is there.
    pub variable: u64,
    /// Where in it the process's id is (`tgid`, 4 bytes, in the root namespace).
    pub tgid: u64,
    /// Where in it the thread's id is (`pid`, 4 bytes, in the root namespace).
    pub pid: u64,
}

impl CurrentReader {
    /// Where the pid lies.
    pub fn pid_chain(&self) -> PidChain {
        PidChain {
            variable: self.variable,
            tgid: self.task.tgid.at(Gva(0)).0,
            pid: self.task.pid.at(Gva(0)).0,
        }
    }

    /// The `task_struct` of the vCPU whose GS base in kernel mode is `gs_base` (after SWAPGS).
    ///
    /// # Errors
    /// Where that is no GS base of this kernel's.
    pub fn task(&self, gs_base: u64) -> Result<Gva, ReadError> {
        self.kernel.pointer(Gva(gs_base.wrapping_add(self.variable)))
    }

    /// Who a task is.
    ///
    /// # Errors
    /// Where its `task_struct` cannot be read.
    pub fn describe(&self, task: Gva) -> Result<Current, ReadError> {
        let space = self.kernel.space();
        let mut comm = [0; COMM];
        space.read(self.task.comm.at(task), &mut comm)?;
        let cred = self.subjective.cred.read(space, task)?;
        Ok(Current {
            pid: self.task.tgid.read(space, task)?,
            tid: self.task.pid.read(space, task)?,
            name: guest_array_text(&comm),
            uid: self.cred.euid.read(space, cred).ok(),
            task,
        })
    }

    /// The process that made this one, or has adopted it: its pid.
    ///
    /// # Errors
    /// Where a `task_struct` cannot be read.
    pub fn parent(&self, task: Gva) -> Result<i32, ReadError> {
        let space = self.kernel.space();
        self.task
            .tgid
            .read(space, self.task.real_parent.read(space, task)?)
    }
}
