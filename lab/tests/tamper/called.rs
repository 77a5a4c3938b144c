//! A module that is called again: by timers, by work, in a thread of its own, on keys, probes and breakpoints; a process that is not
//! confined any more, and one whose code was written over; files that are hidden.

use vmsight_lab::Work;
use vmsight_lab::orders::{OVERWRITTEN, Tamper};

use super::files::Hidden;
use super::{Lab, expect, hex};

/// Nothing halts the kernel, and no program is started, while this is looked at.
const FUNCTION: &str = "kernel_halt";
const PROGRAM: &str = "/bin/busybox";

pub(super) fn check(lab: &Lab) {
    let confined = lab.guest.prepare(Work::Confine).unwrap();
    let victim = lab.stand(0);
    let ring = lab.guest.prepare(Work::Ring).unwrap();
    let tampers = [
        Tamper::Timer,
        Tamper::HrTimer,
        Tamper::DelayedWork,
        Tamper::KernelThread,
        Tamper::Keyboard,
        Tamper::Uprobe {
            program: PROGRAM.into(),
        },
        Tamper::Breakpoint {
            symbol: FUNCTION.into(),
        },
        Tamper::Seccomp { pid: confined.pid() },
    ];
    let done = lab.do_all(&tampers);
    let [timer, fine, work, thread, keys, probe, stop, free] = done.as_slice() else {
        panic!("{done:?}")
    };
    let overwritten = lab.guest.order(Work::Overwrite { pid: victim.pid() }).unwrap();
    let code = overwritten.address.unwrap();
    // The uprobe is on its first instruction, too, and its file is what it always was.
    lab.run(&["true"]);
    let hidden = Hidden::hide(lab);
    // The last bytes of what is written: the first may be those that were there.
    let bytes: Vec<String> = OVERWRITTEN[3..]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut expected = hidden.expected();
    expected.extend([
        expect("timers", "timer of CPU 0 function", [hex(timer.hook)]),
        expect(
            "hrtimers",
            "high-resolution timer of CPU 0 function",
            [hex(fine.hook)],
        ),
        expect("workqueues", "delayed work func", [hex(work.hook)]),
        expect(
            "kernel-threads",
            "(kworker/0:9) threadfn",
            [hex(thread.hook), "vmsight_tamper".to_owned()],
        ),
        expect("notifiers", "keyboard_notifier_list", [hex(keys.hook)]),
        expect("uprobes", "handler", [hex(probe.hook)]),
        expect("perf", "perf event of CPU 0 overflow_handler", [hex(stop.hook)]),
        expect(
            "io-uring",
            format!("io_uring in process {} (", ring.pid()),
            ["rings: 1".to_owned()],
        ),
        expect(
            "seccomp",
            format!("of process {}", confined.pid()),
            [hex(free.object), "mode: 0".to_owned()],
        ),
        expect(
            "process-code",
            format!("in process {} (", victim.pid()),
            [
                hex(code & !0xfff).trim_end_matches("000").to_owned(),
                bytes.join(" "),
            ],
        ),
    ]);
    lab.tells("what is called", &expected);
    hidden.show();
    lab.undo_all(&tampers);
    lab.kill(victim.pid());
    lab.is_clean("after what is called");
}
