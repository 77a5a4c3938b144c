//! What a hook costs: exits, and instructions or on hardware time, through the gate and by VMCALL.

use vmsight_sim_abi::Call;

use crate::clock::Clock;
use crate::start::{copy_call, hook_call, ticks, vmcall};
use crate::tables::STUB;
use crate::{Trial, call};

const CALLS: u64 = 1000;
/// Where hooks call the stub, in its first page: see `vmsight_sim_hypervisor::gate`.
pub(crate) const ENTRY: u64 = STUB + 4096 - 17;

/// The timer's exits: they come from time to time, whatever the guest does.
const TIMER: u64 = 52;

/// Exits so far, all other reasons.
pub(crate) fn exits() -> u64 {
    (0..80)
        .filter(|&reason| reason != TIMER)
        .map(|reason| call(Call::Exits, reason))
        .sum()
}

/// What the time-stamp counter counts in a loop of [`CALLS`] turns.
pub(crate) fn counted(mut turn: impl FnMut()) -> u64 {
    let begin = ticks();
    for _ in 0..CALLS {
        turn();
    }
    ticks() - begin
}

/// Measures both ways; in microseconds where `hardware` is said and true.
pub(crate) fn measure(trial: &mut Trial, site: u64, hardware: bool) {
    let clock = Clock::find(hardware);
    // What asking costs: 80 calls for each sum.
    let before = exits();
    let asking = exits() - before;
    let handled = call(Call::Handled, 0);

    let before = exits();
    // SAFETY: the stub is there.
    let gate = counted(|| unsafe { hook_call(ENTRY) });
    let left = exits() - before - asking;
    let through_gate = call(Call::Handled, 0) - handled;
    // The same but for the stub, whose place is taken by a function that returns at once.
    let nothing = tables_ret();
    // SAFETY: a function.
    let empty = counted(|| unsafe { hook_call(nothing) });

    let before = exits();
    let invoked = counted(|| {
        vmcall(Call::Invoke as u64, site);
    });
    let by_call = exits() - before - asking;
    let all = call(Call::Handled, 0) - handled - through_gate;
    let turn = counted(|| core::hint::black_box(()));
    copying(trial);

    // Hook to return: all but the call of `hook_call` and the loop; of that, the stub's CALL and the RET that answers it are in
    // both, and are two instructions.
    let (gate, invoked) = (gate.saturating_sub(empty), invoked.saturating_sub(turn));
    let gate = match clock {
        Clock::Instructions => gate + 2 * CALLS,
        _ => gate,
    };
    trial.check(
        "null handler through the gate",
        through_gate == CALLS,
        format_args!("{through_gate} of {CALLS} handled"),
    );
    trial.check(
        "exits through the gate",
        left == 0,
        format_args!("{left} in {CALLS} calls"),
    );
    trial.check(
        "round trip through the gate",
        clock != Clock::Instructions || gate / CALLS <= 60,
        format_args!("{}", clock.each(gate, CALLS)),
    );
    trial.check(
        "null handler by VMCALL",
        all == CALLS,
        format_args!("{all} of {CALLS} handled"),
    );
    trial.check(
        "exits by VMCALL",
        by_call == CALLS,
        format_args!("{by_call} in {CALLS} calls"),
    );
    trial.check(
        "round trip by VMCALL",
        clock == Clock::Unknown || invoked > gate,
        format_args!("{}", clock.each(invoked, CALLS)),
    );
}

/// The monitor reads and writes the guest's memory by the guest's own addresses.
pub(crate) fn copying(trial: &mut Trial) {
    let words = core::cell::UnsafeCell::new([0x0123_4567_89ab_cdefu64, 0]);
    let address = crate::tables::at(words.get());
    let before = exits();
    let asking = exits() - before;
    let before = exits();
    // SAFETY: the stub is there; the words are written by the monitor.
    unsafe { copy_call(ENTRY, address, address + 8) };
    let left = exits() - before - asking;
    // SAFETY: nobody else has them.
    let [from, to] = unsafe { words.get().read_volatile() };
    trial.check(
        "the monitor reads and writes guest memory",
        from == to && left == 0,
        format_args!("{to:#x}; {left} exits"),
    );
}

/// The address of a RET.
fn tables_ret() -> u64 {
    crate::tables::at(&raw const crate::start::hook_site)
}
