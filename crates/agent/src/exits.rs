//! Exits that hooks caused: what happened, and who is told.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE, kvm_regs, kvm_sregs,
};
use vmsight_arch::Registers;
use vmsight_hooks::{Access, Exception, HookKind, StepEnd};

use crate::agent::Agent;
use crate::conclude::conclude;
use crate::kvm;
use crate::pending::{Frame, Otherwise, Pending, Progress, Subject, Told, in_scope};
use crate::registers::from_kvm;
use crate::sift::sift;
use crate::slots::PAGE;
use crate::step::{BREAKPOINT, DR6_STEP, RFLAGS_RF, clean, done_outside};
use crate::table::{Armed, Inside, Table};
use crate::vcpu::{Exit, Own, Vcpu};

/// What the vCPU's thread does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    /// Back into the guest.
    Again,
    /// Back to the VMM: the exit is its own, too.
    ToVmm,
    /// Back to the VMM as if a signal had come.
    Interrupted,
}

/// Looks at an exit. `table` is the one with which the guest was entered.
pub(crate) fn handle(agent: &'static Agent, vcpu: &Vcpu, own: &mut Own, table: &Table) -> Next {
    let exit = vcpu.exit();
    if exit == Exit::Other {
        return Next::ToVmm;
    }
    let (regs, sregs) = vcpu.synced();
    let registers = from_kvm(vcpu.index, &regs, &sregs);
    let cr3 = registers.cr3;
    let (subject, told) = match exit {
        Exit::Debug { exception, dr6 } => return debug(agent, vcpu, own, table, registers, exception, dr6),
        Exit::Mmio {
            gpa,
            data,
            len,
            write,
        } => {
            if len == 0 || !table.pages.contains_key(&(gpa & !(PAGE - 1))) {
                return Next::ToVmm;
            }
            // A device's memory, or none at all.
            let Some(old) = agent.with_guest(|guest, _| guest.read(gpa, len)) else {
                return Next::ToVmm;
            };
            let mask = u64::MAX >> (64 - 8 * u32::from(len));
            let subject = match write {
                true => Subject::Write {
                    gpa,
                    len,
                    old,
                    new: data & mask,
                },
                false => Subject::Read { gpa, len, value: old },
            };
            let access = if write { Access::WRITE } else { Access::READ };
            let watching = table.watching(gpa, len.into(), access);
            let meant = watching.filter(|s| s.armed.hook.scope.covers(cr3));
            let told = meant.map(|span| Told {
                armed: Arc::clone(&span.armed),
                gva: span.gva.map(|gva| gva.wrapping_add(gpa.wrapping_sub(span.gpa))),
            });
            (subject, told.collect())
        }
        Exit::WriteMsr { index, data, reason } => {
            let Some(told) = msr_hooks(table, index, Access::WRITE, reason, cr3) else {
                return unwatched(vcpu, table, reason);
            };
            let subject = Subject::WriteMsr {
                index,
                data,
                old: kvm::get_msr(vcpu.fd, index),
                otherwise: otherwise(table, index, KVM_MSR_FILTER_WRITE),
            };
            (subject, told)
        }
        Exit::ReadMsr { index, reason } => {
            let Some(told) = msr_hooks(table, index, Access::READ, reason, cr3) else {
                return unwatched(vcpu, table, reason);
            };
            let subject = Subject::ReadMsr {
                index,
                value: kvm::get_msr(vcpu.fd, index),
                otherwise: otherwise(table, index, KVM_MSR_FILTER_READ),
            };
            (subject, told)
        }
        Exit::Io {
            out,
            size,
            port,
            count,
            offset,
        } => {
            let access = if out { Access::WRITE } else { Access::READ };
            let last = port.saturating_add(u16::from(size.max(1)) - 1);
            let hooks = table
                .ports
                .iter()
                .filter(|(from, to, a, _)| a.intersects(access) && *from <= last && port <= *to)
                .map(|(.., armed)| Arc::clone(armed))
                .collect();
            let told = in_scope(&hooks, cr3);
            if told.is_empty() {
                return Next::ToVmm;
            }
            let value = vcpu.io_value(offset, size);
            let subject = Subject::Port {
                out,
                size,
                port,
                count,
                offset,
                value,
            };
            (subject, told)
        }
        Exit::Unknown => {
            let place = agent.with_guest(|guest, _| guest.translate(&registers, registers.rip));
            let patched = place.is_some_and(|gpa| table.patches.contains_key(&gpa));
            if !patched && !table.inside.contains_key(&registers.rip) {
                return Next::ToVmm;
            }
            // Ours: the emulator has no INT3 (Linux, arch/x86/kvm/emulate.c), and KVM has #UD ready for the guest.
            own.forget_exception(vcpu);
            return debug(agent, vcpu, own, table, registers, 3, 0);
        }
        Exit::Other => return Next::ToVmm,
    };
    begin(agent, vcpu, own, subject, registers, told)
}

/// Who watches an MSR; `None` where the exit is the VMM's alone.
fn msr_hooks(table: &Table, index: u32, access: Access, reason: u32, cr3: u64) -> Option<Vec<Told>> {
    if reason != KVM_MSR_EXIT_REASON_FILTER {
        return None;
    }
    let hooks = table.msrs.get(&index)?;
    let wants =
        |a: &&Arc<Armed>| matches!(a.hook.kind, HookKind::Msr { access: its, .. } if its.intersects(access));
    let hooks: Vec<_> = hooks.iter().filter(wants).cloned().collect();
    if hooks.is_empty() {
        return None;
    }
    Some(in_scope(&hooks, cr3))
}

/// What would be done with an MSR access that the VMM's own filter does not let through: it wants to do it itself, or, where it
/// did not ask for such exits, it is #GP.
fn otherwise(table: &Table, index: u32, kind: u32) -> Otherwise {
    if table.vmm_filter.lets_through(index, kind) {
        Otherwise::Done
    } else if table.vmm_reasons & KVM_MSR_EXIT_REASON_FILTER != 0 {
        Otherwise::Vmm
    } else {
        Otherwise::Fault
    }
}

/// An access that only the VMM's filter brought out.
fn unwatched(vcpu: &Vcpu, table: &Table, reason: u32) -> Next {
    if reason == KVM_MSR_EXIT_REASON_FILTER && table.vmm_reasons & reason == 0 {
        vcpu.give_msr(true, None);
        return Next::Again;
    }
    Next::ToVmm
}

fn debug(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    table: &Table,
    registers: Registers,
    exception: u32,
    dr6: u64,
) -> Next {
    let rip = registers.rip;
    if vcpu.vmm_debug.load(Ordering::Relaxed) {
        return Next::ToVmm;
    }
    if exception == 3 {
        if let Some(inside) = table.inside.get(&rip) {
            return arrived(agent, vcpu, own, inside, registers);
        }
        let place = agent.with_guest(|guest, _| guest.translate(&registers, rip));
        if let Some(gpa) = place
            && let Some(patched) = table.patches.get(&gpa)
        {
            let at = |a: &&Arc<Armed>| a.breaks_at(rip);
            let hooks = patched.hooks.iter().filter(at).cloned().collect();
            let told = in_scope(&hooks, registers.cr3);
            let patch = Some(gpa);
            let subject = execution(agent, &registers, patch, &told);
            return begin(agent, vcpu, own, subject, registers, told);
        }
        let byte = place.and_then(|gpa| agent.with_guest(|guest, _| guest.read(gpa, 1)));
        if byte == Some(BREAKPOINT) {
            raise(
                vcpu,
                own,
                Exception {
                    vector: 3,
                    error_code: None,
                    cr2: None,
                },
            );
        }
        // Otherwise it was ours, and is out by now.
        return Next::Again;
    }
    if dr6 & DR6_STEP != 0
        && let Some((before, decoded)) = own.stepped.take()
    {
        clean(agent, vcpu, own, &before, decoded);
    }
    if dr6 & DR6_STEP != 0 && own.past.take().is_some() {
        count_step(agent, vcpu, own);
        return Next::Again;
    }
    if dr6 & DR6_STEP != 0 && own.stepping.is_some() {
        return match stepped(agent, vcpu, own, registers) {
            true => proceed(agent, vcpu, own),
            false => Next::Again,
        };
    }
    // A step over an INT3 that a signal ended late.
    if dr6 & DR6_STEP != 0 && own.debug.step {
        return Next::Again;
    }
    if dr6 & 15 != 0 && own.debug.hardware.contains(&Some(rip)) {
        // RF is set until an instruction is done: this one was told already, and is being executed by KVM's own emulator, which
        // does not look at RF (Linux, arch/x86/kvm/x86.c, kvm_vcpu_check_code_breakpoint).
        if registers.rflags & RFLAGS_RF != 0 {
            own.past = Some(rip);
            own.emulated = true;
            return Next::Again;
        }
        let told = table
            .execute
            .get(&rip)
            .map(|hooks| in_scope(hooks, registers.cr3))
            .unwrap_or_default();
        let subject = execution(agent, &registers, None, &told);
        return begin(agent, vcpu, own, subject, registers, told);
    }
    // The guest's own: a step, or a breakpoint of its debugger.
    if let Ok(mut registers) = kvm::get_debugregs(vcpu.fd) {
        registers.dr6 |= dr6;
        let _ = kvm::set_debugregs(vcpu.fd, &registers);
    }
    raise(
        vcpu,
        own,
        Exception {
            vector: 1,
            error_code: None,
            cr2: None,
        },
    );
    Next::Again
}

/// A filter in the guest wants the event. All is as it was at the instruction, and there the vCPU is to stand: whoever looks at it, or saves it,
/// finds nothing of ours.
fn arrived(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    inside: &Inside,
    mut registers: Registers,
) -> Next {
    let (mut regs, _) = vcpu.synced();
    regs.rip = inside.at;
    registers.rip = inside.at;
    // Where KVM refuses its own registers the guest comes back here.
    if own.set_registers(vcpu, &regs).is_err() {
        return Next::Again;
    }
    let told = in_scope(&inside.hooks, registers.cr3);
    let subject = Subject::Execute {
        rip: inside.at,
        patch: None,
        frame: None,
        resume: Some(inside.resume),
    };
    begin(agent, vcpu, own, subject, registers, told)
}

/// The execution of the instruction at RIP, with what is on the stack where somebody wants to know of it as the
/// begin of a handler.
fn execution(agent: &Agent, registers: &Registers, patch: Option<u64>, told: &[Told]) -> Subject {
    let rip = registers.rip;
    let handler = told.iter().any(|t| t.armed.vector_at(rip).is_some());
    let frame = handler.then(|| {
        let word = |offset| {
            let at = registers.rsp().wrapping_add(offset);
            agent.with_guest(|guest, _| guest.read_virtual_u64(registers, at))
        };
        Frame {
            words: [0, 8].map(|offset| word(offset).unwrap_or(0)),
            cr2: registers.cr2,
        }
    });
    Subject::Execute {
        rip,
        patch,
        frame,
        resume: None,
    }
}

/// An instruction was executed here, not by KVM: it counts as a step where steps are counted.
pub(crate) fn count_step(agent: &Agent, vcpu: &Vcpu, own: &mut Own) {
    if own.stepping.is_none() {
        return;
    }
    let Ok((regs, sregs)) = own.registers(vcpu) else {
        return;
    };
    stepped(agent, vcpu, own, from_kvm(vcpu.index, &regs, &sregs));
}

/// A step was made. Whether it was the last: then its event is pending.
fn stepped(agent: &Agent, vcpu: &Vcpu, own: &mut Own, registers: Registers) -> bool {
    // Within our own code the guest has not come any further. The instruction that was replaced is done when it is left.
    if agent.with_guest(|_, table| table.is_ours(registers.rip)) {
        return false;
    }
    let Some(stepping) = &mut own.stepping else {
        return false;
    };
    stepping.made = stepping.made.saturating_add(1);
    stepping.left = stepping.left.saturating_sub(1);
    let (made, left) = (stepping.made, stepping.left);
    let told = || {
        vec![Told {
            armed: Arc::clone(&stepping.armed),
            gva: None,
        }]
    };
    let step = |end| Subject::Step {
        rip: registers.rip,
        made,
        end,
    };
    let until = matches!(stepping.armed.hook.kind, HookKind::StepUntil { .. });
    let in_scope = stepping.armed.hook.scope.covers(registers.cr3);
    if until && !in_scope {
        stepping.armed.occurred.fetch_add(1, Ordering::Relaxed);
    }
    let (end, told) = if until && in_scope {
        // Each is an occurrence, and the filter says which is the last.
        let met = sift(agent, vcpu, &step(StepEnd::Condition), &registers, told());
        match (met.is_empty(), left) {
            (false, _) => (StepEnd::Condition, met),
            (true, 0) => (StepEnd::Count, told()),
            _ => return false,
        }
    } else if left > 0 {
        return false;
    } else if until {
        (StepEnd::Count, told())
    } else {
        let step = step(StepEnd::Count);
        (StepEnd::Count, sift(agent, vcpu, &step, &registers, told()))
    };
    own.stepping = None;
    own.pending = Some(Box::new(Pending::new(step(end), registers, told)));
    true
}

/// Raises an exception before the next instruction.
pub(crate) fn raise(vcpu: &Vcpu, own: &mut Own, exception: Exception) -> bool {
    own.flush(vcpu);
    own.known = false;
    if let Some(cr2) = exception.cr2 {
        let Ok(mut sregs) = kvm::get_sregs(vcpu.fd) else {
            return false;
        };
        sregs.cr2 = cr2;
        if kvm::set_sregs(vcpu.fd, &sregs).is_err() {
            return false;
        }
    }
    let Ok(mut events) = kvm::get_events(vcpu.fd) else {
        return false;
    };
    events.exception.injected = 1;
    events.exception.pending = 0;
    events.exception.nr = exception.vector;
    events.exception.has_error_code = u8::from(exception.error_code.is_some());
    events.exception.error_code = exception.error_code.unwrap_or(0);
    events.exception_has_payload = 0;
    kvm::set_events(vcpu.fd, &events).is_ok()
}

fn begin(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    subject: Subject,
    registers: Registers,
    told: Vec<Told>,
) -> Next {
    let told = sift(agent, vcpu, &subject, &registers, told);
    // What nobody wants to know of is to cost as little as it can.
    let plain = matches!(
        subject,
        Subject::Execute {
            patch: None,
            resume: None,
            ..
        }
    );
    if told.is_empty() && plain {
        return pass(agent, vcpu, own);
    }
    own.pending = Some(Box::new(Pending::new(subject, registers, told)));
    proceed(agent, vcpu, own)
}

/// Lets the instruction under a hardware breakpoint be executed, right behind the exit that it caused.
fn pass(agent: &Agent, vcpu: &Vcpu, own: &mut Own) -> Next {
    let (mut regs, sregs) = vcpu.synced();
    let done = beyond(agent, vcpu, own, &mut regs, &sregs);
    // Where KVM refuses its own registers the vCPU comes back here.
    let _ = own.set_registers(vcpu, &regs);
    if done {
        count_step(agent, vcpu, own);
    }
    Next::Again
}

/// Gets over a hardware breakpoint that was told, in `regs`; whether its instruction is done already.
pub(crate) fn beyond(agent: &Agent, vcpu: &Vcpu, own: &Own, regs: &mut kvm_regs, sregs: &kvm_sregs) -> bool {
    // KVM's own emulator would stop at it again: three more exits, and hardware breakpoints off meanwhile.
    if own.emulated && done_outside(agent, vcpu, regs, sregs) {
        return true;
    }
    regs.rflags |= RFLAGS_RF;
    false
}

/// Goes on with the event that is pending.
pub(crate) fn proceed(agent: &'static Agent, vcpu: &Vcpu, own: &mut Own) -> Next {
    let Some(mut pending) = own.pending.take() else {
        return Next::Again;
    };
    match pending.advance(agent, vcpu, own) {
        Progress::Interrupted => {
            own.pending = Some(pending);
            Next::Interrupted
        }
        Progress::Concluded(conclusion) => conclude(agent, vcpu, own, *pending, conclusion),
    }
}
