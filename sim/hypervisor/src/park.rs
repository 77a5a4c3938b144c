//! One processor at a time in the hypervisor, and all others stopped while it changes what they use.
//!
//! Who wants to change extended page tables, the list, or what a VMCS says, has the others [`alone`](Hypervisor::alone):
//! each gets an NMI, comes out of its guest, and waits; before it goes on, it does in its own VMCS what has changed, and
//! forgets its translations. An NMI that reaches it inside the hypervisor stops it right there, which is before or after
//! its turn with the [`Turn`], never during.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::guest::Hypervisor;
use crate::processor::Processor;
use crate::{apic, calls, stop};

/// Turns of a wait for other processors, each of a few instructions, before something is wrong.
const PATIENCE: u64 = 1 << 32;

static TAKEN: AtomicBool = AtomicBool::new(false);
/// All but one are to wait.
static ASKED: AtomicBool = AtomicBool::new(false);
/// What the guest's processors are to be set to: a new version with each change.
static VERSION: AtomicU64 = AtomicU64::new(0);

/// The hypervisor is one processor's until this is dropped.
pub(crate) struct Turn(());

impl Turn {
    /// Waits for it.
    pub(crate) fn wait(processor: &Processor) -> Self {
        loop {
            park_if_asked(processor);
            let free = TAKEN.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed);
            if free.is_ok() {
                return Self(());
            }
            core::hint::spin_loop();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

/// Waits until the processor that asked for it is done, and does what it has changed.
pub(crate) fn park_if_asked(processor: &Processor) {
    if !ASKED.load(Ordering::SeqCst) {
        return;
    }
    processor.parked.store(true, Ordering::SeqCst);
    while ASKED.load(Ordering::SeqCst) {
        core::hint::spin_loop();
    }
    settle(processor);
    processor.parked.store(false, Ordering::SeqCst);
}

/// Has the processor's VMCS say what all are to say.
pub(crate) fn settle(processor: &Processor) {
    let version = VERSION.load(Ordering::SeqCst);
    if processor.settings.swap(version, Ordering::Relaxed) != version {
        calls::settle(processor);
    }
}

impl Hypervisor {
    /// Does something while no other processor runs.
    pub(crate) fn alone<T>(&mut self, processor: &Processor, what: impl FnOnce(&mut Self) -> T) -> T {
        ASKED.store(true, Ordering::SeqCst);
        let others = || Processor::all().filter(|p| !core::ptr::eq(*p, processor));
        for other in others() {
            // One that is still on its way will do, and who waits for a SIPI gets none.
            if !other.waiting.load(Ordering::SeqCst) && other.ours.load(Ordering::SeqCst) == 0 {
                other.ours.store(1, Ordering::SeqCst);
                apic::send(other.apic.load(Ordering::Relaxed), apic::NMI);
            }
        }
        for other in others() {
            // Its first exit is the SIPI, after which it waits for its turn.
            until(other, || {
                other.parked.load(Ordering::SeqCst) || other.waiting.load(Ordering::SeqCst)
            });
        }
        let result = what(self);
        VERSION.fetch_add(1, Ordering::SeqCst);
        settle(processor);
        ASKED.store(false, Ordering::SeqCst);
        for other in others() {
            until(other, || !other.parked.load(Ordering::SeqCst));
        }
        result
    }
}

fn until(other: &Processor, done: impl Fn() -> bool) {
    for _ in 0..PATIENCE {
        if done() {
            return;
        }
        core::hint::spin_loop();
    }
    stop(format_args!("processor {} does not stop", other.number()))
}

/// Whether an NMI that came is one of ours.
pub(crate) fn is_ours(processor: &Processor) -> bool {
    processor
        .ours
        .compare_exchange(1, 0, Ordering::SeqCst, Ordering::SeqCst)
        .is_ok()
}

/// An NMI while the hypervisor runs. That of the guest is kept, to which it goes on the next exit.
#[unsafe(no_mangle)]
extern "C" fn host_nmi(processor: &'static Processor) {
    if is_ours(processor) {
        park_if_asked(processor);
    } else {
        processor.nmis.store(1, Ordering::Relaxed);
    }
}
