//! How an event ends: what the verdicts on it have decided is done.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmsight_arch::Registers;
use vmsight_arch::registers::{control, msr};
use vmsight_hooks::{Verdict, VerdictKind};

use crate::agent::Agent;
use crate::exits::{Next, beyond, count_step, raise};
use crate::kvm;
use crate::pending::{Conclusion, Otherwise, Pending, Stepping, Subject};
use crate::registers::{from_kvm, set};
use crate::step::{RFLAGS_RF, at_rip};
use crate::table::Armed;
use crate::vcpu::{Own, Vcpu};

/// Does what was decided.
pub(crate) fn conclude(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    pending: Pending,
    mut conclusion: Conclusion,
) -> Next {
    for armed in conclusion.removed.drain(..) {
        agent.disarm(&armed);
    }
    for (kind, armed) in conclusion.overruled.drain(..) {
        if !armed.overruled.swap(true, Ordering::Relaxed) {
            armed.notice(format!(
                "the verdict {kind} was not applied: another one on the same event was stricter; this is said once"
            ));
        }
    }
    if std::mem::take(&mut conclusion.pause) {
        agent.freeze();
        // It happens, or not, when the VM goes on.
        let decided = Pending::decided(pending.subject, pending.registers, conclusion);
        own.pending = Some(Box::new(decided));
        return Next::Again;
    }
    let (verdict, by) = (conclusion.verdict, conclusion.by);
    let whose = by.clone();
    let unfit = |kind: VerdictKind| {
        if let Some(armed) = &whose {
            armed.notice(format!(
                "the verdict {kind} cannot be given here; the guest went on"
            ));
        }
    };
    match pending.subject {
        Subject::Execute {
            rip, patch, resume, ..
        } => {
            let at = Executed { rip, patch, resume };
            executed(agent, vcpu, own, at, &verdict, by, &unfit)
        }
        Subject::Step { .. } => {
            match verdict {
                Verdict::SetRegisters(registers) => {
                    if let Ok((mut regs, _)) = own.registers(vcpu) {
                        for (register, value) in registers {
                            set(&mut regs, register, value);
                        }
                        let _ = own.set_registers(vcpu, &regs);
                    }
                }
                Verdict::Inject(exception) => {
                    raise(vcpu, own, exception);
                }
                Verdict::Step(count) => own.stepping = by.map(|armed| Stepping::new(armed, count)),
                Verdict::Continue | Verdict::Remove => {}
                other => unfit(other.kind()),
            }
            Next::Again
        }
        Subject::WriteMsr {
            index,
            data,
            otherwise,
            ..
        } => {
            let value = match verdict {
                Verdict::Deny => {
                    vcpu.give_msr(true, None);
                    return Next::Again;
                }
                Verdict::Skip => {
                    vcpu.give_msr(false, None);
                    return Next::Again;
                }
                Verdict::SetData(value) => value,
                Verdict::Continue | Verdict::Remove => data,
                other => {
                    unfit(other.kind());
                    data
                }
            };
            if otherwise == Otherwise::Vmm {
                vcpu.give_msr(false, Some(value));
                return Next::ToVmm;
            }
            let done = otherwise == Otherwise::Done
                && allowed(&pending.registers, index, value)
                && kvm::set_msr(vcpu.fd, index, value);
            vcpu.give_msr(!done, None);
            Next::Again
        }
        Subject::ReadMsr { index, otherwise, .. } => {
            match verdict {
                Verdict::Deny => vcpu.give_msr(true, None),
                Verdict::SetData(value) => vcpu.give_msr(false, Some(value)),
                other => {
                    if !matches!(other, Verdict::Continue | Verdict::Remove) {
                        unfit(other.kind());
                    }
                    let value = match otherwise {
                        Otherwise::Vmm => return Next::ToVmm,
                        Otherwise::Fault => None,
                        Otherwise::Done => kvm::get_msr(vcpu.fd, index),
                    };
                    vcpu.give_msr(value.is_none(), value);
                }
            }
            Next::Again
        }
        Subject::Write { gpa, len, new, .. } => {
            let value = match verdict {
                Verdict::Deny | Verdict::Skip => return Next::Again,
                Verdict::SetData(value) => value,
                Verdict::Continue | Verdict::Remove => new,
                other => {
                    unfit(other.kind());
                    new
                }
            };
            agent.with_guest(|guest, _| guest.write(gpa, len, value));
            Next::Again
        }
        Subject::Read { gpa, len, value } => {
            let value = match verdict {
                Verdict::SetData(value) => value,
                other => {
                    if !matches!(other, Verdict::Continue | Verdict::Remove) {
                        unfit(other.kind());
                    }
                    // Read now: it may have changed while the verdict was awaited.
                    agent.with_guest(|guest, _| guest.read(gpa, len)).unwrap_or(value)
                }
            };
            vcpu.give_mmio(value);
            Next::Again
        }
        Subject::Port {
            out,
            size,
            count,
            offset,
            ..
        } => {
            match verdict {
                Verdict::Deny | Verdict::Skip if out => return Next::Again,
                // What nobody answers reads as all ones.
                Verdict::Deny | Verdict::Skip => vcpu.give_io(offset, size, count, u32::MAX),
                Verdict::SetData(value) => {
                    vcpu.give_io(offset, size, count, value as u32);
                    if out {
                        return Next::ToVmm;
                    }
                }
                Verdict::Continue | Verdict::Remove => return Next::ToVmm,
                other => {
                    unfit(other.kind());
                    return Next::ToVmm;
                }
            }
            Next::Again
        }
    }
}

/// What a processor checks of a guest's WRMSR, and KVM not of a write from outside: LME does not change while
/// paging is on (SDM vol. 3A 4.1.1).
fn allowed(registers: &Registers, index: u32, value: u64) -> bool {
    let paging = registers.cr0 & control::CR0_PG != 0;
    index != msr::EFER || !paging || (registers.efer ^ value) & control::EFER_LME == 0
}

/// An instruction that is about to be executed.
#[derive(Clone, Copy, Debug)]
struct Executed {
    rip: u64,
    /// The physical address of the INT3 on it.
    patch: Option<u64>,
    /// Where code of ours does it in its place.
    resume: Option<u64>,
}

fn executed(
    agent: &'static Agent,
    vcpu: &Vcpu,
    own: &mut Own,
    at: Executed,
    verdict: &Verdict,
    by: Option<Arc<Armed>>,
    unfit: &dyn Fn(VerdictKind),
) -> Next {
    let Ok((mut regs, sregs)) = own.registers(vcpu) else {
        return Next::Again;
    };
    let Executed { rip, patch, resume } = at;
    // The VMM has loaded another state meanwhile (a reset, a snapshot): nothing of this is true any more.
    if regs.rip != rip {
        return Next::Again;
    }
    let registers = from_kvm(vcpu.index, &regs, &sregs);
    let mut elsewhere = false;
    match verdict {
        Verdict::Skip => match agent.with_guest(|guest, table| at_rip(guest, table, &registers)) {
            Some(decoded) => {
                regs.rip = rip.wrapping_add(decoded.len);
                elsewhere = true;
            }
            None => unfit(VerdictKind::Skip),
        },
        Verdict::Return(value) => {
            let to = agent.with_guest(|guest, _| guest.read_virtual_u64(&registers, regs.rsp));
            match to {
                Some(to) if registers.cs.attributes & 1 << 13 != 0 => {
                    regs.rip = to;
                    regs.rsp = regs.rsp.wrapping_add(8);
                    regs.rax = *value;
                    elsewhere = true;
                }
                _ => unfit(VerdictKind::Return),
            }
        }
        Verdict::SetRegisters(list) => {
            for (register, value) in list {
                set(&mut regs, *register, *value);
            }
            elsewhere = regs.rip != rip;
        }
        Verdict::Inject(exception) => {
            if raise(vcpu, own, *exception) {
                return Next::Again;
            }
            unfit(VerdictKind::Inject);
        }
        Verdict::Step(count) => own.stepping = by.map(|armed| Stepping::new(armed, *count)),
        Verdict::Continue | Verdict::Remove | Verdict::Pause => {}
        other => unfit(other.kind()),
    }
    let mut done = false;
    if elsewhere {
        regs.rflags &= !RFLAGS_RF;
    } else if let Some(resume) = resume {
        regs.rip = resume;
    } else if patch.is_none() {
        done = beyond(agent, vcpu, own, &mut regs, &sregs);
    } else {
        own.over = Some(rip);
    }
    let changed = elsewhere || patch.is_none() || matches!(verdict, Verdict::SetRegisters(_));
    if changed && own.set_registers(vcpu, &regs).is_err() {
        unfit(verdict.kind());
    }
    if done {
        count_step(agent, vcpu, own);
    }
    Next::Again
}
