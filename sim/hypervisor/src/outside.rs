//! The same handlers, run out here: a hook that leaves the guest, which is what the gate is compared with.

use vmsight_arch::{Gpa, paging::TableMemory};
use vmsight_sim_abi::{Frame, Verdict};
use vmsight_sim_hypervisor::{PAGE, place};
use vmsight_sim_monitor::{Context, Memory, Rest};

use crate::boot::Registers;
use crate::exits::{self, Outcome};
use crate::guest::{GuestTables, Hypervisor};
use crate::{hooks, vmcs};

/// The guest's RAM.
struct Ram {
    end: u64,
}

impl Memory for Ram {
    fn read(&self, gpa: u64) -> Option<u64> {
        (gpa < self.end).then(|| GuestTables.entry_u64(Gpa(gpa)))?
    }

    fn write(&mut self, gpa: u64, word: u64) -> bool {
        let page = (gpa < self.end).then(|| hooks::page(gpa & !(PAGE - 1))).flatten();
        let slot = page.and_then(|page| page.get_mut((gpa % PAGE / 8) as usize));
        slot.map(|slot| *slot = word).is_some()
    }
}

impl Hypervisor {
    /// The guest has left by VMCALL. If that is a hook, its handler runs.
    pub(crate) fn hook_left(&mut self, registers: &mut Registers) -> Option<Outcome> {
        let patch = self.hooks.leaving(vmcs::read(vmcs::GUEST_RIP))?;
        if exits::privilege() != 0 {
            return None;
        }
        let frame = Frame {
            r9: registers.r9,
            r8: registers.r8,
            rdx: registers.rdx,
            rsi: registers.rsi,
            rdi: registers.rdi,
            site: patch.address + place::CALL as u64,
            cr3: vmcs::read(vmcs::GUEST_CR3),
        };
        let rest = Rest {
            gs_base: vmcs::read(vmcs::GUEST_GS_BASE),
            rcx: Some(registers.rcx),
        };
        let ram = Ram { end: self.ram_end };
        let mut context = Context::new(&frame, rest, ram);
        let hooks = &mut *self.hooks;
        let verdict =
            vmsight_sim_monitor::handle(&mut context, patch.handler, &mut hooks.watch, &mut hooks.handled);
        let Verdict::Refuse(value) = verdict else {
            return Some(Outcome::Done);
        };
        // At the head of a function the stack holds where its caller goes on.
        let rsp = vmcs::read(vmcs::GUEST_RSP);
        if let Some(caller) = context.read(rsp) {
            registers.rax = value as u64;
            vmcs::write(vmcs::GUEST_RSP, rsp.wrapping_add(8));
            vmcs::write(vmcs::GUEST_RIP, caller);
            return Some(Outcome::Again);
        }
        Some(Outcome::Done)
    }
}
