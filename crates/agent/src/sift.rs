//! Which of those who watch are told of an event: their filters are asked, here where it happens.

use std::sync::atomic::Ordering;
use std::time::Instant;

use vmsight_arch::paging::TableMemory;
use vmsight_arch::registers::msr;
use vmsight_arch::{Gpa, Registers};
use vmsight_hooks::{FilterMemory, Moment, Passage};

use crate::agent::Agent;
use crate::guest::Guest;
use crate::kvm;
use crate::pending::{Subject, Told};
use crate::vcpu::Vcpu;

/// The guest's memory as filters read it.
struct Seen<'g> {
    guest: &'g Guest<'g>,
    vcpu: &'g Vcpu,
}

impl TableMemory for Seen<'_> {
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        self.guest.entry_u64(gpa)
    }

    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.guest.entry_u32(gpa)
    }
}

impl FilterMemory for Seen<'_> {
    fn read_physical(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        let mut at = gpa.0;
        for part in out.chunks_mut(8) {
            let Some(value) = u8::try_from(part.len())
                .ok()
                .and_then(|len| self.guest.read(at, len))
            else {
                return false;
            };
            for (to, from) in part.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
            at = at.wrapping_add(8);
        }
        true
    }

    fn kernel_gs_base(&self) -> Option<u64> {
        kvm::get_msr(self.vcpu.fd, msr::KERNEL_GS_BASE)
    }
}

/// Counts the event for each of these hooks, and leaves those that want to be told of it.
pub(crate) fn sift(
    agent: &Agent,
    vcpu: &Vcpu,
    subject: &Subject,
    registers: &Registers,
    mut told: Vec<Told>,
) -> Vec<Told> {
    for told in &told {
        told.armed.occurred.fetch_add(1, Ordering::Relaxed);
    }
    if told.iter().all(|t| t.armed.sieve.is_open()) {
        return told;
    }
    agent.with_guest(|guest, _| {
        let memory = Seen { guest, vcpu };
        told.retain(|told| {
            let detail = subject.detail(told);
            let moment = Moment {
                registers,
                detail: &detail,
            };
            told.armed.sieve.is_open()
                || told.armed.sieve.pass(moment, &memory, Instant::now) == Passage::Wanted
        });
    });
    told
}
