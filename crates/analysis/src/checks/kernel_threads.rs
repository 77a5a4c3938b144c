//! The kernel's own threads.

use vmsight_arch::Gva;
use vmsight_linux::{LinuxError, ProcessFields};

use super::pointers::Pointers;
use crate::{Check, Context, Findings, Technique};

/// See [`Check`].
pub(super) const KERNEL_THREADS: Check = Check {
    name: "kernel-threads",
    summary: "Functions that the kernel's threads run",
    compares: "the function that each kernel thread was made with with the code that the kernel knows",
    why: "A thread of its own is the plainest way for a rootkit to go on working; it takes the name of a worker of the kernel's.",
    techniques: &[
        Technique::ROOTKIT,
        Technique::new("T1036.005", "Masquerading: Match Legitimate Name or Location"),
    ],
    blind_spots: &[
        "Threads that are in no list: see the check hidden-processes.",
        "A thread whose function is a known module's: what it does is not judged.",
        "The few threads that the kernel makes without this mechanism, such as kthreadd itself.",
    ],
    run,
};

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let mut pointers = Pointers::new(context);
    let task = context.object("task_struct", Gva(0))?;
    // Up to 5.16 where user threads have the place that their pid is written to.
    let data = match task.has("worker_private") {
        true => "worker_private",
        false => "set_child_tid",
    };
    let thread = context.object("kthread", Gva(0))?;
    let listing = kernel.processes(ProcessFields::empty())?;
    for warning in listing.warnings {
        findings.note(warning);
    }
    for process in listing.rows.iter().filter(|p| p.kernel_thread) {
        if !findings.go_on() {
            break;
        }
        findings.looked_at(1);
        // It may have ended meanwhile.
        let Ok(at) = task.moved(process.task).pointer(data) else {
            continue;
        };
        if at.is_null() {
            continue;
        }
        let slot = thread.moved(at).member("threadfn")?;
        if context.space().read_u64(slot).is_ok() {
            let subject = format!("kernel thread {} ({})", process.pid, process.name);
            pointers.hook(findings, &subject, "threadfn", slot);
        }
    }
    Ok(())
}
