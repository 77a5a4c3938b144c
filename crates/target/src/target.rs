//! An attached target.

use std::fmt;

use vmsight_arch::Registers;
use vmsight_memory::GuestMemory;

use crate::control::{PauseGuard, QmpControl};
use crate::host::process::Process;
use crate::{TargetError, VmInfo, Vmm};

/// What a target is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TargetKind {
    /// A running VM.
    Vm(Vmm),
}

impl fmt::Display for TargetKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(vmm) => vmm.fmt(f),
        }
    }
}

/// A VM or a dump, ready to be read.
#[derive(Debug)]
#[non_exhaustive]
pub struct Target {
    /// Its guest-physical memory.
    pub memory: GuestMemory,
    /// Its name for people: the VM's name, or the target as given. Escape it before a terminal.
    pub name: String,
    /// What it is.
    pub kind: TargetKind,
    /// How it was reached and what is doubtful about it, one sentence each.
    pub notes: Vec<String>,
    /// What is known of its process.
    pub info: Option<VmInfo>,
    /// Why there is no `control`, or the control.
    pub(crate) control: Result<QmpControl, String>,
}

impl Target {
    /// The registers of one vCPU or of all. A running machine is not stopped for it, so the vCPUs are each seen at
    /// another moment; [`Self::pause`] first where that matters.
    ///
    /// # Errors
    /// Where neither a monitor nor the dump tells, or there is no such vCPU.
    pub fn registers(&self, vcpu: Option<u32>) -> Result<Vec<Registers>, TargetError> {
        let all = match &self.control {
            Ok(control) => control.registers().map_err(|e| self.or_exited(e))?,
            Err(why) => {
                return Err(TargetError::NoRegisters {
                    target: self.name.clone(),
                    why: why.clone(),
                });
            }
        };
        if all.is_empty() {
            let why = "what its monitor says of them is not understood (another architecture?)".to_owned();
            return Err(TargetError::NoRegisters {
                target: self.name.clone(),
                why,
            });
        }
        let Some(wanted) = vcpu else { return Ok(all) };
        let count = all.len();
        let one: Vec<Registers> = all.into_iter().filter(|r| r.vcpu == wanted).collect();
        if one.is_empty() {
            return Err(TargetError::NoVcpu {
                target: self.name.clone(),
                vcpu: wanted,
                count,
            });
        }
        Ok(one)
    }

    /// Pauses the VM until the guard is dropped. It goes on also where the program panics or is killed. A VM that
    /// its owner had paused stays as it is.
    ///
    /// # Errors
    /// Where nothing can pause it: no monitor, a busy one, a dump.
    pub fn pause(&self) -> Result<PauseGuard, TargetError> {
        match &self.control {
            Ok(control) => control.pause().map_err(|e| self.or_exited(e)),
            Err(why) => Err(TargetError::NoPause {
                target: self.name.clone(),
                why: why.clone(),
            }),
        }
    }

    /// Whether the VM's process is gone; `false` for dumps.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.info.as_ref().is_some_and(|info| !same_process(info))
    }

    /// An error of the monitor of a VM that is gone says just that.
    fn or_exited(&self, error: TargetError) -> TargetError {
        match &self.info {
            Some(info) if !same_process(info) => TargetError::Exited { pid: info.pid },
            _ => error,
        }
    }
}

/// Whether the process described is still the one with that pid.
fn same_process(info: &VmInfo) -> bool {
    let process = Process { pid: info.pid };
    !process.is_gone()
        && (info.start_ticks.is_none() || process.stat().ok().map(|s| s.start_ticks) == info.start_ticks)
}
