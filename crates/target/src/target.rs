//! An attached target.

use std::fmt;
use std::sync::Arc;

use vmsight_arch::Registers;
use vmsight_memory::GuestMemory;
use vmsight_memory::dump::DumpFormat;

use crate::control::{GdbControl, PauseGuard, QmpControl, VirshControl};
use crate::{TargetError, VmInfo, Vmm};

/// What a target is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TargetKind {
    /// A running VM.
    Vm(Vmm),
    /// A running VM known only by its gdb stub; it is paused as long as the target lives.
    GdbStub,
    /// A memory dump.
    Dump(DumpFormat),
}

impl fmt::Display for TargetKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(vmm) => vmm.fmt(f),
            Self::GdbStub => f.write_str("gdb stub"),
            Self::Dump(format) => format.fmt(f),
        }
    }
}

/// A VM or a dump, ready to be read. Clones share everything.
#[derive(Clone, Debug)]
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
    /// The guest kernel's VMCOREINFO, where a dump has it.
    pub vmcoreinfo: Option<String>,
    /// Whether what [`AttachOptions::ahead`](crate::AttachOptions::ahead) was shown is a part of this memory: the same bytes at the
    /// same addresses. `false` where it was shown nothing.
    pub ahead: bool,
    pub(crate) control: Control,
}

/// What a target can be asked and told besides its memory.
#[derive(Clone, Debug)]
pub(crate) enum Control {
    Qmp(QmpControl),
    Gdb {
        control: GdbControl,
        /// Held where memory too is read through the stub.
        _memory: Option<Arc<PauseGuard>>,
    },
    /// Its monitor is libvirt's.
    Virsh(VirshControl),
    /// What the dump holds.
    Dump(Vec<Registers>),
    /// Why there is nothing.
    None(String),
}

impl Target {
    /// The registers of one vCPU or of all. Through QMP a running machine is not stopped for it, so the vCPUs are
    /// each seen at another moment; [`Self::pause`] first where that matters. A gdb stub stops it for the moment.
    ///
    /// # Errors
    /// Where neither a monitor nor the dump tells, or there is no such vCPU.
    pub fn registers(&self, vcpu: Option<u32>) -> Result<Vec<Registers>, TargetError> {
        let all = match &self.control {
            Control::Qmp(control) => control.registers().map_err(|e| self.or_exited(e))?,
            Control::Gdb { control, .. } => control
                .with(crate::gdb::Gdb::registers)
                .map_err(|e| self.or_exited(e.into()))?,
            Control::Virsh(control) => control.registers().map_err(|e| self.or_exited(e))?,
            Control::Dump(registers) if registers.is_empty() => {
                let why = format!("{} has none", self.kind);
                return Err(TargetError::NoRegisters {
                    target: self.name.clone(),
                    why,
                });
            }
            Control::Dump(registers) => registers.clone(),
            Control::None(why) => {
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
        let why = match &self.control {
            Control::Qmp(control) => return control.pause().map_err(|e| self.or_exited(e)),
            Control::Gdb { control, .. } => return control.pause().map_err(|e| self.or_exited(e.into())),
            Control::Virsh(control) => return control.pause().map_err(|e| self.or_exited(e)),
            Control::Dump(_) => "it is a dump".to_owned(),
            Control::None(why) => why.clone(),
        };
        Err(TargetError::NoPause {
            target: self.name.clone(),
            why,
        })
    }

    /// Whether the VM's process is gone; `false` for dumps.
    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.info.as_ref().is_some_and(|info| !same_process(info))
    }

    /// An error of the monitor of a VM that is gone says just that.
    pub(crate) fn or_exited(&self, error: TargetError) -> TargetError {
        match &self.info {
            Some(info) if !same_process(info) => TargetError::Exited { pid: info.pid },
            _ => error,
        }
    }
}

/// Whether the process described is still the one with that pid.
fn same_process(info: &VmInfo) -> bool {
    info.identity().runs()
}

/// What is shared between threads stays so.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<Target>();
    shared::<PauseGuard>();
    shared::<VmInfo>();
    shared::<TargetError>();
};
