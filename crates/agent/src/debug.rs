//! Guest debugging: what KVM is told for a vCPU.

use std::io;

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
};

use crate::kvm;
use crate::vcpu::Vcpu;

/// What one vCPU is debugged for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Applied {
    /// Hardware breakpoints on execution.
    pub(crate) hardware: [Option<u64>; 4],
    /// INT3 comes to us.
    pub(crate) software: bool,
    pub(crate) step: bool,
}

impl Applied {
    /// The same for KVM. `block` says whether it can keep interrupts out while it steps (Linux 5.15).
    fn to_kvm(self, block: bool) -> kvm_guest_debug {
        let mut control = 0;
        let mut debug = kvm_guest_debug::default();
        // Bit 10 is always set (SDM vol. 3B 17.2.4).
        let mut dr7 = 1 << 10;
        for (i, (address, register)) in self.hardware.iter().zip(&mut debug.arch.debugreg).enumerate() {
            if let Some(address) = address {
                *register = *address;
                // Enabled for all tasks; type and length 0: execution.
                dr7 |= 2 << (2 * i);
                control |= KVM_GUESTDBG_USE_HW_BP;
            }
        }
        if let Some(register) = debug.arch.debugreg.get_mut(7) {
            *register = dr7;
        }
        if self.software {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if self.step {
            control |= KVM_GUESTDBG_SINGLESTEP;
            if block {
                control |= KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        if control != 0 {
            control |= KVM_GUESTDBG_ENABLE;
        }
        debug.control = control;
        debug
    }

    /// Tells KVM.
    pub(crate) fn apply(self, vcpu: &Vcpu, block: bool) -> io::Result<()> {
        kvm::set_guest_debug(vcpu.fd, &self.to_kvm(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_is_told() {
        assert_eq!(Applied::default().to_kvm(true).control, 0, "nothing is off");
        let some = Applied {
            hardware: [None, Some(0x1000), None, Some(0x2000)],
            software: true,
            step: true,
        };
        let kvm = some.to_kvm(true);
        assert_eq!(kvm.control, 0x1_0000 | 0x2_0000 | 0x10_0000 | 3);
        assert_eq!(kvm.arch.debugreg, [0, 0x1000, 0, 0x2000, 0, 0, 0, 0x400 | 0x88]);
        assert_eq!(some.to_kvm(false).control & 0x10_0000, 0);
        let step = Applied {
            step: true,
            ..Applied::default()
        };
        assert_eq!(step.to_kvm(false).control, 3);
    }
}
