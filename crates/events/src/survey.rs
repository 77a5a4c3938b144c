//! Which backends reach a VM, and what each can do with it.

use vmsight_hooks::{BackendKind, Capability, Lack};
use vmsight_target::discover::ControlKind;
use vmsight_target::gdb::Accelerator;
use vmsight_target::{Target, TargetKind};

use crate::agent::AgentBackend;
use crate::{Backend, EventError, gdb};

/// One backend, as far as it can be told without touching the VM.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Which.
    pub backend: BackendKind,
    /// Why it does not reach this VM; `None` where nothing stands against it.
    pub obstacle: Option<String>,
    /// What it can do there, or could if it reached it.
    pub capabilities: Vec<Capability>,
    /// What it cannot do there, and why, as far as it can say.
    pub lacks: Vec<Lack>,
}

/// All backends that could reach the VM. The guest is not stopped for it: an agent is asked, of a stub only its accelerator is known, and whether somebody
/// else has it in use is found out when it is opened.
pub fn survey(target: &Target) -> Vec<Survey> {
    vec![agent(target), gdb_stub(target)]
}

fn agent(target: &Target) -> Survey {
    // Which of the two it would be is known once it is there.
    let kvm = accelerator(target) != Some("tcg");
    let absent = if kvm {
        BackendKind::AgentKvm
    } else {
        BackendKind::AgentTcg
    };
    let (backend, obstacle, capabilities, lacks) = match AgentBackend::of(target) {
        Ok(agent) => (agent.kind(), None, agent.capabilities(), agent.lacks()),
        Err(EventError::NoBackend { why, .. }) => (absent, Some(why), Vec::new(), Vec::new()),
        Err(error) => (absent, Some(error.to_string()), Vec::new(), Vec::new()),
    };
    Survey {
        backend,
        obstacle,
        capabilities,
        lacks,
    }
}

fn accelerator(target: &Target) -> Option<&str> {
    target.info.as_ref()?.accelerator.as_deref()
}

fn gdb_stub(target: &Target) -> Survey {
    let info = target.info.as_ref();
    let kvm = accelerator(target) == Some("kvm");
    let controls = |kind| info.is_some_and(|i| i.control.iter().any(|c| c.kind == kind));
    let obstacle = match target.kind {
        TargetKind::Dump(_) => Some("it is a dump: nothing happens in it".to_owned()),
        TargetKind::GdbStub => None,
        TargetKind::Vm(_) if controls(ControlKind::Qmp) || controls(ControlKind::Gdb) => None,
        TargetKind::Vm(_) => Some("it has neither a QMP socket nor a gdb stub".to_owned()),
        _ => Some("it is no VM".to_owned()),
    };
    Survey {
        backend: BackendKind::GdbStub,
        obstacle,
        capabilities: gdb::capabilities(if kvm { Accelerator::Kvm } else { Accelerator::Tcg }),
        lacks: Vec::new(),
    }
}
