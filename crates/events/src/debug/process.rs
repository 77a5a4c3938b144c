//! The one process that is debugged.

use vmsight_arch::{Gva, Registers};
use vmsight_hooks::Scope;
use vmsight_linux::{CurrentReader, Kernel, LinuxError};
use vmsight_memory::AddressSpace;

/// A process of the guest.
#[derive(Debug)]
pub(super) struct Process {
    kernel: Kernel,
    pid: i32,
    task: Gva,
    pub(super) space: AddressSpace,
}

impl Process {
    pub(super) fn new(kernel: &Kernel, pid: i32) -> Result<Self, LinuxError> {
        let space = kernel.process_space(pid)?.ok_or_else(|| {
            let why = format!("process {pid} has no user memory: it is a kernel thread or has ended");
            LinuxError::NotFound(why)
        })?;
        Ok(Self {
            kernel: kernel.clone(),
            pid,
            task: kernel.task(pid)?,
            space,
        })
    }

    /// Where its hooks are armed.
    pub(super) fn scope(&self) -> Scope {
        Scope::Dtb(self.space.dtb())
    }

    /// Whether a vCPU runs it. Its page tables alone do not tell: when it has ended they may become somebody
    /// else's, and children made by vfork have the same.
    pub(super) fn runs_on(&self, registers: &Registers, current: Option<&CurrentReader>) -> bool {
        if !self.scope().covers(registers.cr3) {
            return false;
        }
        match current.and_then(|reader| current_pid(reader, registers)) {
            Some(pid) => pid == self.pid,
            None => true,
        }
    }

    /// Its main thread's registers of user mode, as it left them.
    pub(super) fn saved(&self) -> Option<Registers> {
        let saved = self.kernel.user_registers(self.task);
        saved.unwrap_or_else(|error| {
            tracing::debug!(%error, "no registers of process {}", self.pid);
            None
        })
    }
}

fn current_pid(reader: &CurrentReader, registers: &Registers) -> Option<i32> {
    let task = reader.task(gs_base(registers)?).ok()?;
    reader.describe(task).ok().map(|current| current.pid)
}

/// The GS base that the kernel uses: the other one in user mode, and in the first instructions of the
/// kernel's entry.
pub(super) fn gs_base(registers: &Registers) -> Option<u64> {
    let is_kernel = |base: &u64| base >> 63 == 1;
    let own = Some(registers.gs.base).filter(is_kernel);
    let other = registers.kernel_gs_base.filter(is_kernel);
    match registers.cpl() {
        0 => own.or(other),
        _ => other,
    }
}
