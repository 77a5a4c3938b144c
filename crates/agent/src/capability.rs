//! What can be hooked here: what this kernel's KVM can, asked of it.

use std::os::fd::RawFd;

use kvm_bindings::{
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_NR_MEMSLOTS, KVM_CAP_READONLY_MEM, KVM_CAP_SET_GUEST_DEBUG,
    KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SYNC_REGS, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_GUESTDBG_BLOCKIRQ, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS,
};
use vmsight_hooks::{Capability, Feature, Lack, VerdictKind};

use crate::kvm::extension;

/// What KVM said.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Kernel {
    /// vCPUs can be brought out of the guest without a race, and their registers come along: nothing works without.
    usable: bool,
    pub(crate) hardware_breakpoints: bool,
    /// Interrupts can be kept out while a vCPU steps.
    pub(crate) block_interrupts: bool,
    read_only: bool,
    msr_filter: bool,
    pub(crate) slots: u32,
}

impl Kernel {
    /// Asks.
    pub(crate) fn ask(vm: RawFd) -> Self {
        let registers = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
        let has = |capability| extension(vm, capability) != 0;
        Self {
            usable: has(KVM_CAP_IMMEDIATE_EXIT) && extension(vm, KVM_CAP_SYNC_REGS) & registers == registers,
            hardware_breakpoints: has(KVM_CAP_SET_GUEST_DEBUG),
            block_interrupts: extension(vm, KVM_CAP_SET_GUEST_DEBUG2) & KVM_GUESTDBG_BLOCKIRQ != 0,
            read_only: has(KVM_CAP_READONLY_MEM),
            msr_filter: has(KVM_CAP_X86_USER_SPACE_MSR) && has(KVM_CAP_X86_MSR_FILTER),
            slots: extension(vm, KVM_CAP_NR_MEMSLOTS),
        }
    }

    /// Whether a feature can be had here.
    pub(crate) fn can(&self, feature: Feature) -> bool {
        self.list().iter().any(|c| c.feature == feature)
    }

    /// All that can.
    pub(crate) fn list(&self) -> Vec<Capability> {
        use VerdictKind::{Continue, Deny, Inject, Pause, Remove, Return, SetData, SetRegisters, Skip, Step};
        if !self.usable {
            return Vec::new();
        }
        let mut list = Vec::new();
        let mut add = |feature, mechanism: &str, limits: &str, verdicts: &[VerdictKind]| {
            list.push(Capability {
                feature,
                mechanism: mechanism.to_owned(),
                limits: limits.to_owned(),
                verdicts: verdicts.to_vec(),
            });
        };
        if self.hardware_breakpoints {
            add(
                Feature::Execute,
                "4 hardware breakpoints, then INT3, by KVM_SET_GUEST_DEBUG",
                "the guest's own hardware breakpoints rest meanwhile; a guest that reads its code sees an INT3; a user page must be \
                 mapped when it is hooked",
                &[Continue, Skip, Return, SetRegisters, Inject, Pause, Step, Remove],
            );
            if self.read_only {
                add(
                    Feature::Inside,
                    "a jump to code of ours in the guest, which asks the filter and stops by an INT3",
                    "where the instruction is a NOP, a call or a jump of 5 bytes (functions that can be traced begin with one), with one hook on \
                     it; no texts, and of memory only what is current on a processor; the guest's kernel can find it and take it out, as any \
                     INT3; what is put away is counted where the guest can write",
                    &[Continue, Skip, Return, SetRegisters, Inject, Pause, Step, Remove],
                );
            }
            add(
                Feature::Step,
                "KVM_GUESTDBG_SINGLESTEP",
                if self.block_interrupts {
                    "interrupts wait meanwhile"
                } else {
                    "interrupts are stepped through too: this kernel cannot keep them out (Linux 5.15 can)"
                },
                &[Continue, SetRegisters, Inject, Pause, Step, Remove],
            );
            add(
                Feature::StepUntil,
                "KVM_GUESTDBG_SINGLESTEP, with the condition asked in the VMM",
                "as single steps; each costs an exit, and none an event",
                &[Continue, SetRegisters, Inject, Pause, Step, Remove],
            );
            add(
                Feature::Interrupt,
                "breakpoints on the handlers that the IDT names",
                "in 64-bit mode; handlers are found when it is armed, at most 32 at a time; two vectors with one handler cannot be told apart",
                &[Continue, SetRegisters, Pause, Step, Remove],
            );
        }
        let write = &[Continue, Skip, Deny, SetData, Pause, Remove];
        let pages = "pages are found when the hook is armed; a locked read-modify-write is not atomic there against other vCPUs; \
                     page tables must not be watched; what devices do is not seen; an instruction that KVM's emulator does not know (AVX) cannot write there";
        if self.read_only {
            for feature in [Feature::PhysicalWrite, Feature::VirtualWrite] {
                add(feature, "read-only memory slots", pages, write);
            }
        }
        for feature in [Feature::PhysicalRead, Feature::VirtualRead] {
            add(
                feature,
                "no memory slot",
                "as for writes; no instruction may be fetched from there",
                &[Continue, SetData, Pause, Remove],
            );
        }
        if self.msr_filter {
            let limits = "not the MSRs of the x2APIC; no writes of the time-stamp counter";
            let verdicts = &[Continue, Deny, SetData, Pause, Remove];
            let mut with_skip = verdicts.to_vec();
            with_skip.push(Skip);
            add(Feature::MsrWrite, "KVM_X86_SET_MSR_FILTER", limits, &with_skip);
            add(Feature::MsrRead, "KVM_X86_SET_MSR_FILTER", limits, verdicts);
        }
        add(
            Feature::Port,
            "KVM_EXIT_IO",
            "only ports that KVM leaves to the VMM (not its own interrupt controller and timer); of a string the first value",
            &[Continue, Skip, Deny, SetData, Pause, Remove],
        );
        list
    }

    /// What cannot be hooked here, and why.
    pub(crate) fn lacks(&self) -> Vec<Lack> {
        let kvms = "KVM does it itself and brings no such exit to the VMM";
        let all = Feature::ALL.iter().copied().filter(|feature| !self.can(*feature));
        all.map(|feature| {
            let why = match feature {
                _ if !self.usable => "this kernel's KVM cannot give a vCPU back at once, with its registers",
                Feature::ControlWrite => {
                    "with nested paging the processor does it alone, and KVM brings no such exit to the VMM; the kernel's own \
                     instructions that write them can be hooked (trace --cr, guard)"
                }
                Feature::Cr8Write => "only a VMM with an interrupt controller of its own sees it, and no stock one has that on",
                Feature::Xcr0Write | Feature::Cpuid => kvms,
                Feature::DebugWrite | Feature::ControlRead => {
                    "KVM does it itself, but for the exit with DR7.GD, which it has on Intel's processors only"
                }
                Feature::Hypercall => "KVM answers hypercalls itself; the only ones it can bring out are those of confidential guests",
                Feature::DescriptorTable => "KVM intercepts them only where it emulates UMIP, and does them itself then",
                Feature::VirtualExecute | Feature::PhysicalExecute => {
                    "KVM has no page that may be read and not executed; single instructions can be hooked"
                }
                Feature::Execute | Feature::Step | Feature::StepUntil | Feature::Interrupt => "this kernel's KVM has no guest debugging",
                Feature::Inside => "this kernel's KVM has no guest debugging, or no read-only memory",
                Feature::PhysicalWrite | Feature::VirtualWrite => "this kernel's KVM has no read-only memory",
                Feature::MsrRead | Feature::MsrWrite => "this kernel's KVM does not filter MSRs (Linux 5.10 does)",
                _ => "there is no means",
            };
            Lack {
                feature,
                why: why.to_owned(),
            }
        })
        .collect()
    }
}
