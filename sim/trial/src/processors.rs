//! Two processors: what one of them does while the other is on its way through the gate.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmsight_sim_abi::{Call, Part};

use crate::attacks::{
    function_and_index, handled, hook, monitor_pages, past_the_arming, prepare_past_the_arming, write,
};
use crate::cost::ENTRY;
use crate::start::{attempt, copy_call, cr3, hook_call, nmi_count, set_cr3, startup, startup_end};
use crate::tables::{self, at, map};
use crate::{Trial, call};

/// Exit reasons.
const INIT: u64 = 3;
const SIPI: u64 = 4;
const EPT_VIOLATION: u64 = 48;
const VMFUNC: u64 = 59;
/// How an attempt ends.
const INVALID_OPCODE: u64 = 1 + 6;
const PROTECTION: u64 = 1 + 13;

/// The page of the first megabyte that the other processor starts in.
const STARTUP: u64 = 0x8000;
/// The local APIC.
const APIC: u64 = 0xfee0_0000;
const COMMAND: u64 = APIC + 0x300;
const COMMAND_HIGH: u64 = APIC + 0x310;
const ASSERT: u32 = 1 << 14;
const SEND_NMI: u32 = 4 << 8 | ASSERT;
const SEND_INIT: u32 = 5 << 8 | ASSERT;
const SEND_STARTUP: u32 = 6 << 8 | ASSERT;

/// What the other processor is to do, as the address of a function, and nothing: 0.
static JOB: AtomicU64 = AtomicU64::new(0);
/// How often it has done it.
static DONE: AtomicU64 = AtomicU64::new(0);
/// How often it did not end as it must.
static WRONG: AtomicU64 = AtomicU64::new(0);
/// How often it was started.
static STARTS: AtomicU64 = AtomicU64::new(0);
/// Where the alias of the first processor's entry of the list is.
static ARMED: AtomicU64 = AtomicU64::new(0);
/// Page tables for landing after the arming.
static FORGED: AtomicU64 = AtomicU64::new(0);
static BUSY: AtomicBool = AtomicBool::new(false);

/// Where the boot code of the other processor goes on.
#[unsafe(no_mangle)]
extern "C" fn second() -> ! {
    tables::load(1);
    STARTS.fetch_add(1, Ordering::SeqCst);
    loop {
        let job = JOB.load(Ordering::SeqCst);
        if job == 0 {
            BUSY.store(false, Ordering::SeqCst);
            core::hint::spin_loop();
            continue;
        }
        BUSY.store(true, Ordering::SeqCst);
        // SAFETY: the address of a function of this kind, stored by `begin`.
        let job: fn(u64) -> bool = unsafe { core::mem::transmute(job) };
        if !job(DONE.load(Ordering::SeqCst)) {
            WRONG.fetch_add(1, Ordering::SeqCst);
        }
        DONE.fetch_add(1, Ordering::SeqCst);
    }
}

/// Has the other processor do something over and over; it gets how often it has done so.
fn begin(job: fn(u64) -> bool) {
    DONE.store(0, Ordering::SeqCst);
    WRONG.store(0, Ordering::SeqCst);
    JOB.store(job as usize as u64, Ordering::SeqCst);
}

/// Has it stop: how often it has done so, and how often not as it must.
fn end() -> (u64, u64) {
    JOB.store(0, Ordering::SeqCst);
    until(|| !BUSY.load(Ordering::SeqCst));
    (DONE.load(Ordering::SeqCst), WRONG.load(Ordering::SeqCst))
}

/// Waits, but not for ever.
fn until(done: impl Fn() -> bool) -> bool {
    (0..50_000_000).any(|_| {
        core::hint::spin_loop();
        done()
    })
}

/// Sends an interrupt to the processor of this APIC number.
fn send(to: u32, command: u32) {
    // SAFETY: registers of the local APIC.
    unsafe {
        (COMMAND_HIGH as *mut u32).write_volatile(to << 24);
        (COMMAND as *mut u32).write_volatile(command);
    }
}

/// Starts the other processor; whether it came.
fn start() -> bool {
    let before = STARTS.load(Ordering::SeqCst);
    JOB.store(0, Ordering::SeqCst);
    let begin = at(&raw const startup);
    let length = at(&raw const startup_end) - begin;
    // SAFETY: the page is RAM that nobody uses.
    unsafe { core::ptr::copy_nonoverlapping(begin as *const u8, STARTUP as *mut u8, length as usize) };
    send(1, SEND_INIT);
    for _ in 0..2 {
        for _ in 0..20_000 {
            core::hint::spin_loop();
        }
        send(1, SEND_STARTUP | (STARTUP >> 12) as u32);
    }
    until(|| STARTS.load(Ordering::SeqCst) != before)
}

fn call_hook(_: u64) -> bool {
    // SAFETY: the stub is there.
    unsafe { hook_call(ENTRY) };
    true
}

/// One of three attempts on what the first processor is arming.
fn race(turn: u64) -> bool {
    let armed = ARMED.load(Ordering::Relaxed);
    let real = cr3();
    // SAFETY: attacks.
    unsafe {
        match turn % 3 {
            0 => attempt(function_and_index, 2) == INVALID_OPCODE,
            1 => attempt(write, armed) == PROTECTION,
            _ => {
                let ended = attempt(past_the_arming, FORGED.load(Ordering::Relaxed));
                set_cr3(real);
                ended == INVALID_OPCODE
            }
        }
    }
}

fn nmi(_: u64) -> bool {
    send(0, SEND_NMI);
    // As many as there is time for beside what the hypervisor does for each.
    for _ in 0..1500 {
        core::hint::spin_loop();
    }
    true
}

/// Before there is a monitor: starting it. Starting it once more before the lockdown would be a matter of Bochs 2.7: see
/// `vmsight-hypervisor`'s `apic`.
pub(crate) fn come(trial: &mut Trial) {
    let came = start();
    let [inits, sipis] = [INIT, SIPI].map(|reason| call(Call::Exits, reason));
    trial.check(
        "the other processor starts",
        came && sipis == 1,
        format_args!("exit {INIT}: {inits}; exit {SIPI}: {sipis}"),
    );
}

/// What they do to each other after the lockdown.
pub(crate) fn all(trial: &mut Trial) {
    both(trial);
    rearm(trial);
    storm(trial);
    endless(trial);
    restart(trial);
}

/// Calls on both at once.
fn both(trial: &mut Trial) {
    const CALLS: u64 = 10_000;
    let before = handled();
    begin(call_hook);
    for _ in 0..CALLS {
        call_hook(0);
    }
    let (others, _) = end();
    let handled = handled() - before;
    trial.check(
        "calls on both processors at once",
        handled == CALLS + others && others > CALLS / 10,
        format_args!("{CALLS} and {others} calls, {handled} handled"),
    );
}

/// The race to re-arm: one goes through the gate all the time, the other uses, writes, and lands behind, what it arms.
fn rearm(trial: &mut Trial) {
    const ROUNDS: u64 = 6000;
    let before = handled();
    let exits = [VMFUNC, EPT_VIOLATION].map(|reason| call(Call::Exits, reason));
    let Some(list) = monitor_pages(Part::Lists).next() else {
        return;
    };
    let alias = tables::STUB - 0x1000;
    let _list = map(alias, list);
    FORGED.store(prepare_past_the_arming(), Ordering::Relaxed);
    ARMED.store(alias + 16, Ordering::Relaxed);
    begin(race);
    let mut calls = 0;
    while DONE.load(Ordering::SeqCst) < ROUNDS {
        call_hook(0);
        calls += 1;
    }
    let (rounds, wrong) = end();
    let [functions, violations] = [VMFUNC, EPT_VIOLATION].map(|reason| call(Call::Exits, reason));
    let stopped = functions - exits[0] + violations - exits[1];
    let handled = handled() - before;
    trial.check(
        "the race to re-arm",
        wrong == 0 && handled == calls && stopped == rounds,
        format_args!(
            "{rounds} rounds, {stopped} stopped, {wrong} not; {calls} calls beside, {handled} handled"
        ),
    );
}

/// NMIs all the time: from the other processor, and from itself.
fn storm(trial: &mut Trial) {
    const CALLS: u64 = 2000;
    let before = handled();
    let came = nmi_count.load(Ordering::SeqCst);
    begin(nmi);
    for _ in 0..CALLS {
        call_hook(0);
    }
    let (sent, _) = end();
    for _ in 0..CALLS / 10 {
        send(0, SEND_NMI);
        call_hook(0);
    }
    let came = nmi_count.load(Ordering::SeqCst) - came;
    let handled = handled() - before;
    trial.check(
        "hooks in a storm of NMIs",
        handled == CALLS + CALLS / 10 && came > CALLS / 10,
        format_args!(
            "{handled} of {} handled; {came} NMIs came, {sent} were sent by the other",
            CALLS + CALLS / 10
        ),
    );
}

/// A handler that does not end, which the monitor of this run has for an argument of all ones.
fn endless(trial: &mut Trial) {
    let before = handled();
    let ended = call(Call::Ended, 0);
    begin(call_hook);
    // SAFETY: the stub is there.
    unsafe { copy_call(ENTRY, u64::MAX, 0) };
    let (others, _) = end();
    let ended = call(Call::Ended, 0) - ended;
    let calls = handled() - before;
    // SAFETY: an attack; a hook afterwards.
    let unarmed = unsafe { attempt(function_and_index, 2) == INVALID_OPCODE && attempt(hook, 0) == 0 };
    trial.check(
        "a handler without an end",
        ended == 1 && calls == others + 1 && unarmed,
        format_args!("{ended} ended; {others} calls of the other beside"),
    );
}

/// A processor that gets an INIT after the lockdown.
fn restart(trial: &mut Trial) {
    let before = handled();
    let exits = [INIT, SIPI].map(|reason| call(Call::Exits, reason));
    begin(call_hook);
    until(|| DONE.load(Ordering::SeqCst) > 100);
    let came = start();
    let done = DONE.load(Ordering::SeqCst);
    let beside = handled() - before;
    let [inits, sipis] = [INIT, SIPI].map(|reason| call(Call::Exits, reason));
    // It may have been anywhere on its way, but counted what it was through with.
    let good = !came && inits > exits[0] && sipis > exits[1] && beside.abs_diff(done) <= 1;
    // SAFETY: the stub is there.
    let hooks = unsafe { attempt(hook, 0) == 0 };
    trial.check(
        "a processor restarted after the lockdown",
        good && hooks,
        format_args!("came again: {came}; {done} calls, {beside} handled"),
    );
}
