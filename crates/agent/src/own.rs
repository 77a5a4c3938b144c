//! A vCPU's registers as its own thread sees them: without asking KVM where KVM has told already.
//!
//! Each request to KVM makes it load the vCPU and put it away again. That takes a third of a microsecond, and where KVM itself runs
//! in a VM several, as it comes upon registers that its own hypervisor keeps. An event would need half a dozen.

use std::io;

use kvm_bindings::{KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_sregs};

use crate::kvm;
use crate::vcpu::{Own, Vcpu};

impl Own {
    /// Has registers come with each exit, or not. Pending exceptions come with them where they are needed.
    pub(crate) fn sync_registers(&mut self, vcpu: &Vcpu, on: bool) {
        let wanted = match (on, self.emulated) {
            (false, _) => 0,
            (true, false) => KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS,
            (true, true) => KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS,
        };
        self.synced = vcpu.sync_registers(self.synced, wanted.into());
    }

    /// The vCPU's registers.
    pub(crate) fn registers(&self, vcpu: &Vcpu) -> io::Result<(kvm_regs, kvm_sregs)> {
        if self.known {
            return Ok(vcpu.synced());
        }
        Ok((kvm::get_regs(vcpu.fd)?, kvm::get_sregs(vcpu.fd)?))
    }

    /// Changes the vCPU's registers.
    pub(crate) fn set_registers(&mut self, vcpu: &Vcpu, registers: &kvm_regs) -> io::Result<()> {
        // Where steps are counted more is done before the guest is entered.
        if self.known && self.stepping.is_none() {
            vcpu.stage_registers(registers);
            self.staged = true;
            return Ok(());
        }
        self.known = false;
        self.flush(vcpu);
        kvm::set_regs(vcpu.fd, registers)
    }

    /// Takes back the exception that KVM has ready for the guest.
    pub(crate) fn forget_exception(&mut self, vcpu: &Vcpu) {
        let synced = self.known && self.synced & u64::from(KVM_SYNC_X86_EVENTS) != 0;
        let events = match synced {
            true => Ok(vcpu.synced_events()),
            false => kvm::get_events(vcpu.fd),
        };
        let Ok(mut events) = events else { return };
        events.exception.injected = 0;
        events.exception.pending = 0;
        events.exception_has_payload = 0;
        if synced {
            vcpu.stage_events(&events);
            self.staged = true;
        } else {
            let _ = kvm::set_events(vcpu.fd, &events);
            // There will be more of them.
            self.emulated = true;
        }
    }

    /// Lets KVM have now what it was to take with the next entry: before others look at the vCPU, and before requests
    /// whose meaning depends on its registers.
    pub(crate) fn flush(&mut self, vcpu: &Vcpu) {
        if !std::mem::take(&mut self.staged) {
            return;
        }
        let (registers, events) = vcpu.unstage();
        if let Some(registers) = registers {
            let _ = kvm::set_regs(vcpu.fd, &registers);
        }
        if let Some(events) = events {
            let _ = kvm::set_events(vcpu.fd, &events);
        }
    }
}
