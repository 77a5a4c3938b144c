//! Going on over a breakpoint: the instruction under it is executed once, and nobody else slips past.

use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_sregs};
use vmsight_arch::paging::{PagingMode, walk};
use vmsight_arch::registers::control::RFLAGS_TF;
use vmsight_arch::{Gva, Registers};

use crate::agent::Agent;
use crate::debug::Applied;
use crate::guest::Guest;
use crate::instruction::{Decoded, Effect, LONGEST, decode};
use crate::kvm;
use crate::registers::from_kvm;
use crate::slots::PAGE;
use crate::table::Table;
use crate::vcpu::{Exit, Own, Vcpu};

/// RFLAGS.RF: the next instruction is executed although there is a hardware breakpoint on it (SDM vol. 3B 17.3.1.1).
pub(crate) const RFLAGS_RF: u64 = 1 << 16;
/// DR6.BS: a single step.
pub(crate) const DR6_STEP: u64 = 1 << 14;
/// INT3.
pub(crate) const BREAKPOINT: u64 = 0xcc;

/// How far it came.
#[derive(Clone, Debug)]
pub(crate) enum Over {
    /// The instruction was executed, or there is no INT3 there any more.
    Done { executed: bool },
    /// The VMM wants its thread first.
    Interrupted,
    /// The instruction needs something of the VMM, or of a hook: the exit is in the vCPU's page. With what was hooked when it
    /// was executed, which may be out by now.
    Exit(Arc<Table>),
}

/// The code at RIP as it is without our INT3s and jumps.
pub(crate) fn code(guest: &Guest<'_>, table: &Table, registers: &Registers) -> ([u8; LONGEST], usize) {
    let mut bytes = [0; LONGEST];
    let len = guest.read_virtual(registers, registers.rip, &mut bytes);
    if !table.patches.is_empty() || !table.replaced.is_empty() {
        for (i, byte) in bytes.iter_mut().enumerate().take(len) {
            if let Some(gpa) = guest.translate(registers, registers.rip.wrapping_add(i as u64))
                && let Some(original) = table.original(gpa)
            {
                *byte = original;
            }
        }
    }
    (bytes, len)
}

/// Decodes the instruction at RIP.
pub(crate) fn at_rip(guest: &Guest<'_>, table: &Table, registers: &Registers) -> Option<Decoded> {
    let (bytes, len) = code(guest, table, registers);
    decode(bytes.get(..len)?, registers)
}

/// Executes the instruction at `rip`, on which there is an INT3.
pub(crate) fn over(agent: &'static Agent, vcpu: &Vcpu, own: &mut Own, rip: u64) -> Over {
    let nothing = Over::Done { executed: false };
    let Ok((mut regs, sregs)) = own.registers(vcpu) else {
        return nothing;
    };
    if regs.rip != rip {
        return nothing;
    }
    let registers = from_kvm(vcpu.index, &regs, &sregs);
    let here = agent.with_guest(|guest, table| {
        let gpa = guest.translate(&registers, rip)?;
        table.patches.get(&gpa)?;
        let decoded = at_rip(guest, table, &registers);
        let simple = decoded.is_some_and(|d| done_here(guest, table, &registers, d, &mut regs));
        Some((decoded, simple))
    });
    let Some((decoded, simple)) = here else {
        return nothing;
    };
    if simple {
        return match own.set_registers(vcpu, &regs) {
            Ok(()) => Over::Done { executed: true },
            Err(_) => nothing,
        };
    }
    stepped(agent, vcpu, own, &registers, decoded)
}

/// Does the instruction at RIP without entering the guest, where it is a simple one; then `regs` are the registers behind it.
pub(crate) fn done_outside(agent: &Agent, vcpu: &Vcpu, regs: &mut kvm_regs, sregs: &kvm_sregs) -> bool {
    let registers = from_kvm(vcpu.index, regs, sregs);
    let done = agent.with_guest(|guest, table| {
        let decoded = at_rip(guest, table, &registers)?;
        Some(done_here(guest, table, &registers, decoded, regs))
    });
    done == Some(true)
}

/// Does a simple instruction; whether it could.
fn done_here(
    guest: &Guest<'_>,
    table: &Table,
    registers: &Registers,
    decoded: Decoded,
    regs: &mut kvm_regs,
) -> bool {
    if regs.rflags & RFLAGS_TF != 0 || !pushed(guest, table, registers, decoded) {
        return false;
    }
    regs.rip = regs.rip.wrapping_add(decoded.len);
    regs.rflags &= !RFLAGS_RF;
    if let Effect::Push(_) = decoded.effect {
        regs.rsp = regs.rsp.wrapping_sub(8);
    }
    true
}

/// Does what a simple instruction does to memory; whether it is one.
fn pushed(guest: &Guest<'_>, table: &Table, registers: &Registers, decoded: Decoded) -> bool {
    match decoded.effect {
        Effect::Nothing => true,
        Effect::Push(number) => {
            let at = registers.rsp().wrapping_sub(8);
            let Some(value) = registers.gprs.get(number).copied() else {
                return false;
            };
            let Some(mode) = PagingMode::from_registers(registers) else {
                return false;
            };
            let Ok(found) = walk(mode, guest, mode.dtb(registers.cr3), Gva(at)) else {
                return false;
            };
            let access = found.access;
            // What a processor would do without a word: the page is writable, was written before, belongs to who pushes, and
            // nobody watches it.
            access.write
                && access.dirty
                && access.user == (registers.cpl() == 3)
                && at & (PAGE - 1) <= PAGE - 8
                && !table
                    .pages
                    .contains_key(&found.page_gpa().0.max(found.gpa.0 & !(PAGE - 1)))
                && guest.write(found.gpa.0, 8, value)
        }
        _ => false,
    }
}

/// Steps over the instruction with the original byte in its place, while no other vCPU is in the guest.
fn stepped(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    before: &Registers,
    decoded: Option<Decoded>,
) -> Over {
    let rip = before.rip;
    let Some(stopped) = agent.stop() else {
        return Over::Interrupted;
    };
    // Looked up again: it may have been taken out until all were stopped.
    let place = agent.with_guest(|guest, table| {
        let gpa = guest.translate(before, rip)?;
        let original = table.patches.get(&gpa)?.original;
        guest.write(gpa, 1, original.into()).then_some(gpa)
    });
    let Some(gpa) = place else {
        return Over::Done { executed: false };
    };
    let step = Applied {
        step: true,
        ..own.debug
    };
    // Both of what follows go by the registers, and the second one changes what else may be staged.
    own.flush(vcpu);
    if !agent.kernel.block_interrupts {
        hold_interrupts(vcpu);
    }
    let result = match step.apply(vcpu, agent.kernel.block_interrupts) {
        Ok(()) => {
            own.debug = step;
            own.sync_registers(vcpu, true);
            vcpu.enter_guest()
        }
        Err(_) => -1,
    };
    agent.with_guest(|guest, _| guest.write(gpa, 1, BREAKPOINT));
    // As long as all are stopped it is the one with which the guest was entered.
    let table = agent.table();
    drop(stopped);
    own.known = result >= 0;
    if result < 0 {
        // A signal, before the instruction or after it.
        return match kvm::get_regs(vcpu.fd) {
            Ok(regs) if regs.rip != rip => Over::Done { executed: true },
            _ => Over::Interrupted,
        };
    }
    match vcpu.exit() {
        Exit::Debug { exception: 1, dr6 } if dr6 & DR6_STEP != 0 => {
            clean(agent, vcpu, own, before, decoded);
            Over::Done { executed: true }
        }
        _ => Over::Exit(table),
    }
}

/// Where KVM cannot keep interrupts out, the shadow that MOV SS casts does for one instruction.
fn hold_interrupts(vcpu: &Vcpu) {
    const VALID_SHADOW: u32 = kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
    if let Ok(mut events) = kvm::get_events(vcpu.fd) {
        events.interrupt.shadow = kvm_bindings::KVM_X86_SHADOW_INT_MOV_SS as u8;
        events.flags |= VALID_SHADOW;
        let _ = kvm::set_events(vcpu.fd, &events);
    }
}

/// After a step: KVM steps by RFLAGS.TF, and an instruction that stores RFLAGS stores that too. The guest must not see it.
pub(crate) fn clean(agent: &Agent, vcpu: &Vcpu, own: &mut Own, before: &Registers, decoded: Option<Decoded>) {
    if before.rflags & RFLAGS_TF != 0 {
        return;
    }
    let Ok((mut regs, sregs)) = own.registers(vcpu) else {
        return;
    };
    let after = from_kvm(vcpu.index, &regs, &sregs);
    let stored = match decoded.map(|d| d.effect) {
        Some(Effect::Syscall) => {
            regs.r11 &= !RFLAGS_TF;
            let _ = own.set_registers(vcpu, &regs);
            return;
        }
        Some(Effect::StoresFlags) => Some(regs.rsp),
        // An exception: the stack holds an error code or none, RIP, CS and RFLAGS (SDM vol. 3A 6.14.2).
        _ => agent.with_guest(|guest, _| {
            let frame = [0, 8].into_iter().find(|skip| {
                let at = regs.rsp.wrapping_add(*skip);
                after.cpl() == 0 && guest.read_virtual_u64(&after, at) == Some(before.rip)
            })?;
            let expected = decoded.map(|d| before.rip.wrapping_add(d.len));
            (expected != Some(regs.rip)).then(|| regs.rsp.wrapping_add(frame + 16))
        }),
    };
    let Some(at) = stored else { return };
    agent.with_guest(|guest, _| {
        // TF is in the second byte.
        let at = at.wrapping_add(1);
        if let Some(gpa) = guest.translate(&after, at)
            && let Some(byte) = guest.read(gpa, 1)
        {
            guest.write(gpa, 1, byte & !(RFLAGS_TF >> 8));
        }
    });
}
