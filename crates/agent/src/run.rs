//! KVM_RUN, as the VMM calls it.

use std::sync::PoisonError;

use libc::c_int;
use vmsight_arch::Registers;

use crate::agent::Agent;
use crate::debug::Applied;
use crate::errno;
use crate::exits::{Next, count_step, handle, proceed};
use crate::instruction::Decoded;
use crate::pending::Stepping;
use crate::registers::from_kvm;
use crate::step::{Over, at_rip, over};
use crate::table::Table;
use crate::vcpu::{Own, Vcpu};

/// Runs the guest until the VMM is needed. The answer is that of ioctl(2).
pub(crate) fn run(agent: &'static Agent, vcpu: &Vcpu) -> c_int {
    let mut own = vcpu.own.lock().unwrap_or_else(PoisonError::into_inner);
    let result = until_needed(agent, vcpu, &mut own);
    let error = errno::get();
    own.flush(vcpu);
    own.known = false;
    errno::set(error);
    result
}

fn until_needed(agent: &'static Agent, vcpu: &Vcpu, own: &mut Own) -> c_int {
    loop {
        if agent.world.is_frozen() {
            own.flush(vcpu);
            if !agent.world.enter(vcpu) {
                return interrupted(vcpu);
            }
            agent.world.leave(vcpu);
        }
        if own.pending.is_some() {
            match proceed(agent, vcpu, own) {
                Next::Again => continue,
                Next::ToVmm => return 0,
                Next::Interrupted => return interrupted(vcpu),
            }
        }
        if let Some(rip) = own.over {
            let table = match over(agent, vcpu, own, rip) {
                Over::Done { executed } => {
                    own.over = None;
                    if executed {
                        count_step(agent, vcpu, own);
                    }
                    continue;
                }
                Over::Interrupted => return interrupted(vcpu),
                Over::Exit(table) => {
                    own.over = None;
                    table
                }
            };
            match handle(agent, vcpu, own, &table) {
                Next::Again => continue,
                Next::ToVmm => return 0,
                Next::Interrupted => return interrupted(vcpu),
            }
        }
        if !agent.world.enter(vcpu) {
            return interrupted(vcpu);
        }
        // From here on no table is replaced until this vCPU has come out.
        let table = agent.table();
        let ours = prepare(agent, vcpu, own, &table);
        let result = vcpu.enter_guest();
        let error = errno::get();
        agent.world.leave(vcpu);
        if result < 0 {
            vcpu.settle();
            errno::set(error);
            return result;
        }
        if !ours {
            return result;
        }
        own.known = true;
        match handle(agent, vcpu, own, &table) {
            Next::Again => {}
            Next::ToVmm => return 0,
            Next::Interrupted => return interrupted(vcpu),
        }
    }
}

/// Tells KVM what this vCPU is debugged for; whether its next exit may be ours.
fn prepare(agent: &Agent, vcpu: &Vcpu, own: &mut Own, table: &Table) -> bool {
    if own.stepping.as_ref().is_some_and(|s| s.armed.is_removed()) {
        own.stepping = None;
    }
    if own.stepping.is_none() && own.last_step < table.last_step {
        let next = table
            .steps
            .iter()
            .find(|(index, _, armed)| *index == vcpu.index && armed.id.0 > own.last_step);
        match next {
            Some((_, count, armed)) => {
                own.last_step = armed.id.0;
                own.stepping = Some(Stepping::new(armed.clone(), *count));
            }
            None => own.last_step = table.last_step,
        }
    }
    // Done without a step being told, where the VMM or a hook had to help.
    let breakpoints = table.hardware.iter().any(Option::is_some);
    if own.past.is_some() && !breakpoints {
        own.past = None;
    }
    if own.past.is_some() && own.registers(vcpu).map(|(r, _)| r.rip).ok() != own.past {
        own.past = None;
    }
    let past = own.past.is_some();
    let wanted = Applied {
        hardware: if past { [None; 4] } else { table.hardware },
        software: !table.patches.is_empty() || !table.inside.is_empty(),
        step: past || own.stepping.is_some(),
    };
    if own.debug != wanted {
        own.flush(vcpu);
        match wanted.apply(vcpu, agent.kernel.block_interrupts) {
            Ok(()) => own.debug = wanted,
            Err(error) => agent.tell_all(&format!("vCPU {} cannot be debugged: {error}", vcpu.index)),
        }
    }
    own.stepped = if own.debug.step {
        before(agent, vcpu, own)
    } else {
        None
    };
    // What KVM could not be told stays as it was, and its exits with it.
    let ours = table.active || own.debug != Applied::default();
    own.sync_registers(vcpu, ours);
    ours
}

/// What is about to be stepped: afterwards nobody can tell what it was.
fn before(agent: &Agent, vcpu: &Vcpu, own: &Own) -> Option<(Registers, Option<Decoded>)> {
    let (regs, sregs) = own.registers(vcpu).ok()?;
    let registers = from_kvm(vcpu.index, &regs, &sregs);
    let decoded = agent.with_guest(|guest, table| at_rip(guest, table, &registers));
    Some((registers, decoded))
}

fn interrupted(vcpu: &Vcpu) -> c_int {
    vcpu.settle();
    errno::set(libc::EINTR);
    -1
}
