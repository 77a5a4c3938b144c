//! Work on two processors at once: on each, that of a process which stays there, as do its children.

use vmsight_sim_witness::{REFUSED, TOLD, TOLD_ARGUMENT, UNKNOWN_ON};

use crate::call::{call, number};
use crate::shared::{self, Entry, Kind, record};
use crate::{become_root, become_setuid, begin, execute_again, files, process, wait};

const PROCESSORS: [u64; 2] = [0, 1];
/// How often each makes a process beside other calls.
const ROUNDS: usize = 6;

/// Has them work; nothing where there is but one.
pub(crate) fn work() {
    if !PROCESSORS.iter().all(|&processor| stay_on(1 << processor)) {
        return;
    }
    stay_on(PROCESSORS.iter().map(|processor| 1 << processor).sum());
    PROCESSORS
        .map(|processor| begin(|| work_on(processor)))
        .into_iter()
        .for_each(wait);
}

/// Whether the process runs on the processors of this mask alone from now on.
fn stay_on(mask: u64) -> bool {
    let at = &raw const mask as u64;
    call(
        number::SCHED_SETAFFINITY,
        [0, size_of::<u64>() as u64, at, 0, 0, 0],
    ) == 0
}

/// All that a monitor has a handler for, while the other does the same.
fn work_on(processor: u64) {
    stay_on(1 << processor);
    let who = call(number::GETPID, [0; 6]) as u64;
    let kind = Kind::On;
    record(Entry {
        kind,
        who,
        what: processor,
    });
    shared::meet(PROCESSORS.len() as u64);
    for _ in 0..ROUNDS {
        files();
        process(|| {});
    }
    call(TOLD, [TOLD_ARGUMENT, 0, 0, 0, 0, 0]);
    let made = call(REFUSED, [c"/made".as_ptr() as u64, 0o755, 0, 0, 0, 0]);
    let file = UNKNOWN_ON[processor as usize].as_ptr() as u64;
    let file = call(number::OPEN, [file, 0, 0, 0, 0, 0]) as u64;
    let loaded = call(number::FINIT_MODULE, [file, c"".as_ptr() as u64, 0, 0, 0, 0]);
    for (kind, result) in [(Kind::Made, made), (Kind::Loaded, loaded)] {
        record(Entry {
            kind,
            who,
            what: result as u64,
        });
    }
    process(execute_again);
    process(become_setuid);
    process(become_root);
}
