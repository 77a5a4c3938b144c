//! The preemption timer: no handler runs for ever, and what is to be done from time to time is.

use core::mem::offset_of;
use core::sync::atomic::Ordering;

use vmsight_sim_abi::State;
use vmsight_sim_hypervisor::vmx;

use crate::boot::Registers;
use crate::exits::Outcome;
use crate::guest::Hypervisor;
use crate::machine::rdmsr;
use crate::processor::Processor;
use crate::vmcs;

/// Cycles of the time-stamp counter from one exit for the timer to the next.
pub(crate) const PERIOD: u64 = 1 << 26;
/// A handler that has run for so many cycles since an exit for the timer is ended.
const BOUND: u64 = 1 << 22;
/// How long a call through the gate takes, about.
const CALL: u64 = 512;

/// Has the guest leave when so many cycles are over.
pub(crate) fn start(cycles: u64) {
    let slower_by = rdmsr(vmx::msr::MISC) & 31;
    vmcs::write(
        vmcs::PREEMPTION_TIMER,
        (cycles >> slower_by).clamp(2, u32::MAX.into()),
    );
}

/// Has it leave as soon as what it is in may be over.
pub(crate) fn soon() {
    start(CALL);
}

impl Hypervisor {
    /// The timer has run down. In the guest's own view, all that comes of it is what is done from time to time; in the
    /// monitor's, a handler may be one that does not end.
    pub(crate) fn timer(&mut self, registers: &mut Registers, processor: &Processor) -> Outcome {
        if !self.in_monitor(processor) {
            processor.running.store(0, Ordering::Relaxed);
            start(PERIOD);
            return Outcome::Again;
        }
        let handled = self.views.as_ref().and_then(|views| {
            let mut word = |offset| views.state(&mut self.pool, processor.number(), offset).copied();
            let progress = word(offset_of!(State, progress))?;
            Some(word(offset_of!(State, handled))?.wrapping_add(progress))
        });
        // Each call counts itself in its first instructions, and counts on while it gets on: the same count is the same call,
        // which hangs.
        let same = processor.handling.swap(handled.unwrap_or(0), Ordering::Relaxed) == handled.unwrap_or(0);
        let before = processor.running.load(Ordering::Relaxed);
        if !same || before == 0 {
            processor.running.store(1, Ordering::Relaxed);
        } else if before > BOUND {
            processor.running.store(0, Ordering::Relaxed);
            self.ended += 1;
            start(PERIOD);
            return self.recover(registers, processor);
        } else {
            processor.running.store(before + BOUND / 4, Ordering::Relaxed);
        }
        start(BOUND / 4);
        Outcome::Again
    }
}
