//! What the stub can do, and who can do the rest.

use vmsight_hooks::{BackendKind, Capability, Feature, VerdictKind};
use vmsight_target::gdb::Accelerator;

/// Verdicts at an instruction that is about to be executed.
const EXECUTE: &[VerdictKind] = &[
    VerdictKind::Continue,
    VerdictKind::Skip,
    VerdictKind::Return,
    VerdictKind::SetRegisters,
    VerdictKind::Pause,
    VerdictKind::Step,
    VerdictKind::Remove,
];
/// Verdicts after a write.
const WRITE: &[VerdictKind] = &[
    VerdictKind::Continue,
    VerdictKind::Deny,
    VerdictKind::SetRegisters,
    VerdictKind::SetData,
    VerdictKind::Pause,
    VerdictKind::Step,
    VerdictKind::Remove,
];
/// Verdicts after anything else.
const DONE: &[VerdictKind] = &[
    VerdictKind::Continue,
    VerdictKind::SetRegisters,
    VerdictKind::Pause,
    VerdictKind::Step,
    VerdictKind::Remove,
];

/// The table for a VM that is run by `accelerator`.
pub(super) fn table(accelerator: Accelerator) -> Vec<Capability> {
    let capability = |feature, mechanism: &str, limits: &str, verdicts: &[VerdictKind]| Capability {
        feature,
        mechanism: mechanism.to_owned(),
        limits: limits.to_owned(),
        verdicts: verdicts.to_owned(),
    };
    let step = capability(
        Feature::Step,
        "single step of one vCPU",
        "the other vCPUs stand still, and interrupts and the guest's timers wait; a run of steps ends at HLT",
        DONE,
    );
    let until = capability(
        Feature::StepUntil,
        "single step of one vCPU, with the condition asked here",
        "as single steps; each costs a stop of the whole VM",
        DONE,
    );
    match accelerator {
        Accelerator::Tcg => vec![
            capability(
                Feature::Execute,
                "QEMU's breakpoints",
                "every stop halts the whole VM; a string instruction with a repeat prefix may be told more than once",
                EXECUTE,
            ),
            capability(
                Feature::VirtualRead,
                "QEMU's watchpoints",
                "told when it is done; by virtual address only; of one instruction's accesses to several hooked \
                 places the first is told; not what devices read",
                DONE,
            ),
            capability(
                Feature::VirtualWrite,
                "QEMU's watchpoints",
                "told when it is done: deny writes the old bytes back, and another vCPU may have read the new \
                 ones; by virtual address only; of one instruction's accesses to several hooked places the first \
                 is told; not what devices write; where two vCPUs write to one hooked range at the same moment \
                 the value between is not known",
                WRITE,
            ),
            step,
            until,
        ],
        Accelerator::Kvm => vec![
            capability(
                Feature::Execute,
                "4 debug registers, then INT3",
                "every stop halts the whole VM; INT3 bytes can be seen by the guest, and need the address to be \
                 mapped when they are armed and taken out",
                EXECUTE,
            ),
            capability(
                Feature::VirtualRead,
                "debug registers",
                "only together with writes; 1, 2, 4 or 8 bytes, aligned; at most 4 with the breakpoints; told \
                 when it is done; a write of the same value looks like a read; where two vCPUs stop at the same \
                 moment one event may be lost",
                DONE,
            ),
            capability(
                Feature::VirtualWrite,
                "debug registers",
                "1, 2, 4 or 8 bytes, aligned; at most 4 with the breakpoints; told when it is done: deny writes \
                 the old bytes back, and another vCPU may have read the new ones; where two vCPUs stop at the \
                 same moment one event may be lost",
                WRITE,
            ),
            step,
            until,
        ],
    }
}

/// The backends that can do what the stub cannot.
pub(super) fn instead(feature: Feature) -> &'static [BackendKind] {
    match feature {
        Feature::VirtualRead
        | Feature::VirtualWrite
        | Feature::PhysicalRead
        | Feature::PhysicalWrite
        | Feature::MsrWrite
        | Feature::MsrRead
        | Feature::Interrupt
        | Feature::Port => &[BackendKind::AgentKvm, BackendKind::AgentTcg],
        Feature::Inside => &[BackendKind::AgentKvm],
        Feature::VirtualExecute
        | Feature::ControlWrite
        | Feature::ControlRead
        | Feature::Cr8Write
        | Feature::Xcr0Write
        | Feature::DebugWrite
        | Feature::Cpuid
        | Feature::Hypercall
        | Feature::DescriptorTable => &[BackendKind::AgentTcg],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_stub_cannot_it_does_not_claim() {
        for accelerator in [Accelerator::Tcg, Accelerator::Kvm] {
            let table = table(accelerator);
            for feature in [Feature::MsrWrite, Feature::PhysicalWrite, Feature::Port] {
                assert!(table.iter().all(|c| c.feature != feature), "{feature}");
                assert_eq!(instead(feature), [BackendKind::AgentKvm, BackendKind::AgentTcg]);
            }
            assert_eq!(instead(Feature::DescriptorTable), [BackendKind::AgentTcg]);
            assert!(instead(Feature::PhysicalExecute).is_empty());
            assert!(table.iter().all(|c| !c.verdicts.contains(&VerdictKind::Inject)));
        }
    }
}
