//! What can be hooked here, by what QEMU's version gives.

use vmsight_hooks::{Access, Capability, Feature, Hook, HookKind, Lack, Range, Scope, VerdictKind};

use crate::guest::UPPER_HALF;

/// As much memory lies below the hole of every machine; there QEMU's own count of memory is the guest's. Before
/// 8.2 a plugin is told the former (`plugins/api.c`, `qemu_plugin_hwaddr_phys_addr`).
const LOW_MEMORY: u64 = 2 << 30;

const TRANSLATED: &str = "calls in translated code";
const DECODED: &str = "the instruction, decoded when it is translated";

/// All of it. `registers`: whether QEMU gives registers and the values of memory accesses; `gates`: whether it
/// can be asked where the gates of interrupts are; `pauses`: whether it can be asked to pause the VM.
pub(super) fn list(registers: bool, gates: bool, pauses: bool) -> Vec<Capability> {
    use VerdictKind::{Continue, Pause, Remove};
    let verdicts = match pauses {
        true => vec![Continue, Pause, Remove],
        false => vec![Continue, Remove],
    };
    let mut list = Vec::new();
    let mut add = |feature, mechanism: &str, limits: &str| {
        list.push(Capability {
            feature,
            mechanism: mechanism.to_owned(),
            limits: limits.to_owned(),
            verdicts: verdicts.clone(),
        });
    };
    let execute = match registers {
        true => {
            "any number of places; flags may be those of an earlier instruction; a pause comes at the end of \
             the translated block"
        }
        false => {
            "any number of places, in the kernel's half of the address space; no registers; a pause comes at \
             the end of the translated block"
        }
    };
    add(Feature::Execute, TRANSLATED, execute);
    let memory = match registers {
        true => {
            "any number, of any size; told when it is done; the old value is what was there when the hook was \
             armed or at its last event, of up to 64 KiB; nothing is seen of what devices do, nor the \
             processor itself (page walks, exception frames)"
        }
        false => {
            "any number, of any size, physical ones below 2 GiB; told when it is done, without values; no \
             registers; nothing is seen of what devices do, nor the processor itself (page walks, exception frames)"
        }
    };
    for feature in [
        Feature::VirtualRead,
        Feature::VirtualWrite,
        Feature::PhysicalRead,
        Feature::PhysicalWrite,
    ] {
        add(feature, TRANSLATED, memory);
    }
    add(Feature::VirtualExecute, TRANSLATED, execute);
    let values = if registers {
        ""
    } else {
        "no registers, and no values"
    };
    for feature in [Feature::ControlWrite, Feature::DescriptorTable] {
        add(feature, DECODED, values);
    }
    let old = if registers {
        "the old value is not told"
    } else {
        values
    };
    for feature in [Feature::Cr8Write, Feature::Xcr0Write, Feature::DebugWrite] {
        add(feature, DECODED, old);
    }
    let control = match registers {
        true => "of CR8, XCR0 and debug registers without the value",
        false => values,
    };
    add(Feature::ControlRead, DECODED, control);
    if registers {
        let msr = "also where the access faults; the old value, and what a read gives, of EFER and the bases \
            of FS and GS only";
        add(Feature::MsrWrite, DECODED, msr);
        add(Feature::MsrRead, DECODED, msr);
        if gates {
            add(
                Feature::Interrupt,
                "the first instruction of each handler that a gate names; where the gates are is read off \
                 what QEMU's monitor prints",
                "long mode only; INT n and a jump to the handler too; new gates count when LIDT is executed, \
                 and a moment later; handlers that several vectors share are refused",
            );
        }
        let step = "interrupts are stepped through too; all vCPUs are slow meanwhile";
        add(Feature::Step, TRANSLATED, step);
        let until = "as single steps; the condition is asked at each instruction of the vCPU";
        add(Feature::StepUntil, TRANSLATED, until);
        let port = "also where the access faults; of strings without the value";
        add(Feature::Port, DECODED, port);
        add(Feature::Cpuid, DECODED, "");
        add(Feature::Hypercall, DECODED, "");
    }
    list
}

/// What cannot be hooked here, and why.
pub(super) fn lacks(can: &[Capability], registers: bool) -> Vec<Lack> {
    let lacking = |feature: &&Feature| can.iter().all(|c| c.feature != **feature);
    let lack = |feature: &Feature| Lack {
        feature: *feature,
        why: match feature {
            Feature::PhysicalExecute => {
                "a plugin is told virtual addresses of code only; virtual ones can be hooked"
            }
            Feature::Inside => "a call in translated code costs less than a filter inside: it is asked here",
            Feature::Interrupt if registers => {
                "where the gates are is not in what this QEMU's monitor prints"
            }
            _ => "it takes registers, which this QEMU gives no plugin; QEMU 10 does",
        }
        .to_owned(),
    };
    Feature::ALL.iter().filter(lacking).map(lack).collect()
}

/// Why a hook cannot be had of a QEMU that gives no registers, where the kind alone can.
pub(super) fn unfit(hook: &Hook) -> Option<&'static str> {
    if !hook.filter.is_none() {
        return Some("whether a filter wants an event takes registers to tell");
    }
    if hook.scope != Scope::All {
        return Some("whose address space a vCPU is in takes registers to tell");
    }
    let user = match hook.kind {
        HookKind::Execute { at } => at.0 < UPPER_HALF,
        HookKind::Memory {
            range: range @ Range::Physical { .. },
            ..
        } => {
            let high = range.first().saturating_add(range.len()) > LOW_MEMORY;
            return high.then_some(
                "what it calls a physical address is one from 2 GiB on only by chance (it counts in its own memory)",
            );
        }
        HookKind::Memory { range, access } => access.contains(Access::EXECUTE) && range.first() < UPPER_HALF,
        _ => false,
    };
    user.then_some(
        "the code of a program is translated once for all places at which it is mapped: which one \
    runs takes registers to tell",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsight_arch::{Dtb, Gpa, Gva};

    #[test]
    fn what_takes_registers_is_not_claimed_without() {
        let has = |registers, feature| list(registers, true, true).iter().any(|c| c.feature == feature);
        let no_gates = list(true, false, true);
        assert!(no_gates.iter().all(|c| c.feature != Feature::Interrupt));
        for feature in [
            Feature::Interrupt,
            Feature::MsrWrite,
            Feature::MsrRead,
            Feature::Port,
            Feature::Cpuid,
            Feature::Hypercall,
            Feature::Step,
            Feature::StepUntil,
        ] {
            assert!(has(true, feature) && !has(false, feature), "{feature}");
        }
        for feature in [Feature::Execute, Feature::PhysicalWrite, Feature::ControlWrite] {
            assert!(has(true, feature) && has(false, feature), "{feature}");
        }
        assert!(
            list(true, true, false)
                .iter()
                .all(|c| !c.verdicts.contains(&VerdictKind::Pause))
        );
    }

    #[test]
    fn hooks_that_take_registers_are_known() {
        let kernel = Hook::execute(Gva(0xffff_ffff_8100_0000));
        assert_eq!(unfit(&kernel), None);
        assert!(unfit(&kernel.clone().within(Scope::Dtb(Dtb(0x1000)))).is_some());
        assert!(unfit(&Hook::execute(Gva(0x40_0000))).is_some());
        assert_eq!(unfit(&Hook::write(Gva(0x40_0000), 8)), None);
        let physical = |start, len| {
            Hook::new(HookKind::Memory {
                range: Range::Physical {
                    start: Gpa(start),
                    len,
                },
                access: Access::WRITE,
            })
        };
        assert_eq!(unfit(&physical(LOW_MEMORY - 8, 8)), None);
        assert!(unfit(&physical(LOW_MEMORY - 8, 9)).is_some());
        assert!(unfit(&physical(u64::MAX, 1)).is_some());
    }
}
