//! Whether processes are confined as the kernel confined them.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(super) const SECCOMP: Check = Check {
    name: "seccomp",
    summary: "Threads that were confined by seccomp still are",
    compares: "the mode of seccomp of every thread with its filters, and with the flag that makes the kernel look at them at each system call",
    why: "An exploit that breaks out of a container or a browser first turns off the filter that stands in its way.",
    techniques: &[
        Technique::IMPAIR_DEFENSES,
        Technique::new("T1611", "Escape to Host"),
    ],
    blind_spots: &[
        "A thread whose filters were taken away altogether: it looks like one that never had any.",
        "What filters allow.",
    ],
    run,
};

/// `SECCOMP_MODE_FILTER`; one that was killed by its filter has 3 since 5.17 (include/linux/seccomp.h).
const FILTER: u64 = 2;
/// `TIF_SECCOMP` up to 5.10, and the bit of `syscall_work` since (arch/x86/include/asm/thread_info.h,
/// include/linux/thread_info.h).
const OLD_FLAG: u64 = 1 << 8;
const FLAG: u64 = 1 << 0;
/// `PF_EXITING`: its filters are given back before it is gone.
const EXITING: u64 = 4;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let task = context.object("task_struct", Gva(0))?;
    if !task.has("seccomp.filter") {
        findings.note("the kernel has no seccomp filters");
        return Ok(());
    }
    let (flags, flag) = match task.has("thread_info.syscall_work") {
        true => ("thread_info.syscall_work", FLAG),
        false => ("thread_info.flags", OLD_FLAG),
    };
    let listing = context.kernel().threads(None)?;
    for warning in listing.warnings {
        findings.note(warning);
    }
    for thread in listing.rows.iter().filter(|t| !t.kernel_thread) {
        if !findings.go_on() {
            break;
        }
        findings.looked_at(1);
        let task = task.moved(thread.task);
        let read = || -> Result<_, LinuxError> {
            Ok((
                task.number("seccomp.mode")?,
                task.pointer("seccomp.filter")?,
                task.number(flags)? & flag != 0,
                task.number("flags")?,
            ))
        };
        let Ok((mode, filter, asked, state)) = read() else {
            continue;
        };
        if state & EXITING != 0 {
            continue;
        }
        let explanation = match (mode, filter.is_null(), asked) {
            (0, false, _) => "it has filters, and its mode says that it has none: nobody asks them",
            (FILTER, true, _) => "its mode says that it has filters, and it has none",
            (1.., _, false) => "it is confined, and the flag is gone by which the kernel would see to it",
            _ => continue,
        };
        let finding = Finding::new(
            Severity::Critical,
            format!(
                "thread {} ({}) of process {}",
                thread.tid, thread.name, thread.pid
            ),
            explanation,
        );
        findings.report(
            finding
                .at(thread.task)
                .with(Evidence::value("mode", mode))
                .with(Evidence::value("filter", filter))
                .with(Evidence::value(
                    "asked at each system call",
                    if asked { "yes" } else { "no" },
                )),
        );
    }
    Ok(())
}
