//! A fixed workload, measured by the time-stamp counter: first in a kernel without hooks, then in one with them.

use core::arch::x86_64::{__cpuid, _rdtsc};

use vmsight_sim_witness::{NAME, PROGRAM, ROUNDS};

use crate::call::{call, number};
use crate::text::Text;
use crate::{O_RDWR_CREAT, PR_SET_NAME, end, shared};

/// The argument of the program that children execute.
pub(crate) const PART: &core::ffi::CStr = c"part";
/// What it ends with: nothing that another end could be taken for.
const EXECUTED: u64 = 77;
/// Files that are opened, written, read and closed in a round, with two calls that do next to nothing.
const FILES: usize = 400;
/// Processes that are made and waited for in a round; each second one executes a program. What a monitor tells of them has
/// room in its ring.
const PROCESSES: usize = 16;
/// The leaf by which a program has the hypervisor say how things are, where it was told to.
const ACCOUNT: u32 = 0x4000_0000;

/// Processes that were made in a round, and programs that were executed.
#[derive(Clone, Copy, Default)]
struct Done {
    processes: u64,
    programs: u64,
}

/// Measures, and says what was measured.
pub(crate) fn measure(text: &mut Text) {
    call(number::PRCTL, [PR_SET_NAME, NAME.as_ptr() as u64, 0, 0, 0, 0]);
    for way in ["none", "hooked"] {
        // What a kernel does when something is done for the first time is not the workload's.
        files();
        processes();
        for _ in 0..ROUNDS {
            round(text, way, "files", files);
            round(text, way, "processes", processes);
        }
        // By which the hypervisor knows that the kernel is up, and puts the hooks in.
        __cpuid(0);
    }
}

fn round(text: &mut Text, way: &str, what: &str, act: fn() -> Done) {
    let before = shared::total();
    __cpuid(ACCOUNT);
    // SAFETY: every processor of 64 bits has it, and the kernel lets programs use it.
    let begin = unsafe { _rdtsc() };
    let done = act();
    // SAFETY: as above.
    let instructions = unsafe { _rdtsc() }.wrapping_sub(begin);
    __cpuid(ACCOUNT);
    let calls = shared::total() - before;
    text.line(
        "round",
        &[
            &way,
            &what,
            &instructions,
            &calls,
            &done.processes,
            &done.programs,
        ],
    );
}

fn processes() -> Done {
    let mut done = Done::default();
    for n in 0..PROCESSES {
        let child = call(number::FORK, [0; 6]);
        if child == 0 {
            if n % 2 == 1 {
                execute();
            }
            end(0)
        }
        let mut status = 0u32;
        let at = (&raw mut status) as u64;
        let waited = call(number::WAIT4, [child as u64, at, 0, 0, 0, 0]);
        done.processes += u64::from(child > 0 && waited == child);
        // The second byte is what it ended with.
        done.programs += u64::from(u64::from(status >> 8 & 0xff) == EXECUTED);
    }
    done
}

fn files() -> Done {
    let path = c"/file".as_ptr() as u64;
    let mut bytes = [7u8; 64];
    for _ in 0..FILES {
        let file = call(number::OPEN, [path, O_RDWR_CREAT, 0o644, 0, 0, 0]) as u64;
        let at = bytes.as_mut_ptr() as u64;
        call(number::WRITE, [file, at, 64, 0, 0, 0]);
        call(number::GETPID, [0; 6]);
        call(number::PREAD64, [file, at, 64, 0, 0, 0]);
        call(number::CLOSE, [file, 0, 0, 0, 0, 0]);
        call(number::GETPID, [0; 6]);
    }
    call(number::UNLINK, [path, 0, 0, 0, 0, 0]);
    Done::default()
}

fn execute() {
    let path = PROGRAM.as_ptr() as u64;
    let arguments = [path, PART.as_ptr() as u64, 0];
    let nothing = [0u64];
    call(
        number::EXECVE,
        [path, arguments.as_ptr() as u64, nothing.as_ptr() as u64, 0, 0, 0],
    );
}

/// What the program does that children execute: it counts its calls, and ends.
pub(crate) fn part() -> ! {
    shared::map();
    end(EXECUTED)
}
