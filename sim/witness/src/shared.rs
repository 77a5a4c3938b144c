//! What all processes share: how many calls were made, and who made whom. A file of the root, mapped by each of them.

use core::ffi::CStr;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};

use vmsight_sim_witness::{NAME, PROGRAM, SETUID};

use crate::call::{call, number};
use crate::text::Text;

const NUMBERS: usize = 512;
const ENTRIES: usize = 64;
/// Where it is mapped.
const AT: u64 = 0x7000_0000;

#[repr(C)]
struct Shared {
    calls: [AtomicU64; NUMBERS],
    /// How many have come to where they wait for one another.
    met: AtomicU64,
    used: AtomicU64,
    entries: [[AtomicU64; 3]; ENTRIES],
}

/// Counts before it is mapped.
static EARLY: [AtomicU64; NUMBERS] = [const { AtomicU64::new(0) }; NUMBERS];
static IS_MAPPED: AtomicU64 = AtomicU64::new(0);

/// What is remembered.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Created = 1,
    Thread = 2,
    Executed = 3,
    ExecutedSetuid = 4,
    Root = 5,
    Made = 6,
    Loaded = 7,
    On = 8,
}

/// By whom, and what: a process's id, a result, or a processor.
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) who: u64,
    pub(crate) what: u64,
}

fn shared() -> Option<&'static Shared> {
    // SAFETY: mapped for as long as the process lives, zeros at first, and all of it atomic.
    (IS_MAPPED.load(Relaxed) != 0).then(|| unsafe { &*(AT as *const Shared) })
}

/// Maps it; the calls that this takes are counted.
pub(crate) fn map() {
    let path = c"/shared".as_ptr() as u64;
    let length = size_of::<Shared>() as u64;
    // Read, write, create; whoever the process is by then.
    let file = call(number::OPEN, [path, 0o102, 0o666, 0, 0, 0]) as u64;
    call(number::FTRUNCATE, [file, length, 0, 0, 0, 0]);
    // Readable and writable; shared, at this address.
    call(number::MMAP, [AT, length, 3, 0x11, file, 0]);
    IS_MAPPED.store(1, Relaxed);
    for (number, early) in EARLY.iter().enumerate() {
        add(number, early.swap(0, Relaxed));
    }
    call(number::CLOSE, [file, 0, 0, 0, 0, 0]);
}

fn add(number: usize, times: u64) {
    let counts = shared().map_or(&EARLY, |shared| &shared.calls);
    if let Some(count) = counts.get(number) {
        count.fetch_add(times, Relaxed);
    }
}

/// Counts a call.
pub(crate) fn count(number: usize) {
    add(number, 1);
}

/// All calls so far.
pub(crate) fn total() -> u64 {
    let counts = shared().map_or(&EARLY, |shared| &shared.calls);
    counts.iter().map(|count| count.load(Relaxed)).sum()
}

/// Remembers.
pub(crate) fn record(entry: Entry) {
    let Some(shared) = shared() else { return };
    let at = shared.used.fetch_add(1, Relaxed) as usize;
    if let Some([kind, who, what]) = shared.entries.get(at) {
        kind.store(entry.kind as u64, Relaxed);
        who.store(entry.who, Relaxed);
        what.store(entry.what, Relaxed);
    }
}

/// Waits until so many are here: without a system call, so that they go on at once.
pub(crate) fn meet(all: u64) {
    let Some(shared) = shared() else { return };
    shared.met.fetch_add(1, AcqRel);
    while shared.met.load(Acquire) < all {
        core::hint::spin_loop();
    }
}

/// Says what is remembered.
pub(crate) fn report(text: &mut Text) {
    let Some(shared) = shared() else { return };
    for entry in &shared.entries {
        let [kind, who, what] = [0, 1, 2].map(|n| entry.get(n).map_or(0, |word| word.load(Relaxed)));
        match kind {
            1 => text.line("created", &[&who, &what, &name(NAME)]),
            2 => text.line("thread", &[&who, &what, &name(NAME)]),
            3 => text.line("executed", &[&who, &name(PROGRAM)]),
            4 => text.line("executed", &[&who, &name(SETUID)]),
            5 => text.line("result", &[&"setuid", &(what as i64)]),
            6 => text.line("result", &[&"mkdir", &(what as i64)]),
            7 => text.line("result", &[&"unknown_module", &(what as i64)]),
            8 => text.line("on", &[&what, &who]),
            _ => break,
        };
    }
}

fn name(text: &'static CStr) -> &'static str {
    text.to_str().unwrap_or_default()
}

/// Says how many calls there were.
pub(crate) fn calls(text: &mut Text) {
    let Some(shared) = shared() else { return };
    for (number, count) in shared.calls.iter().enumerate() {
        let count = count.load(Relaxed);
        if count != 0 {
            text.line("calls", &[&number, &count]);
        }
    }
}
