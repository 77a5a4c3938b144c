//! Processes that have the kernel work for them past system calls.

use vmsight_arch::Gva;
use vmsight_linux::structures::xarray;
use vmsight_linux::{LinuxError, ProcessFields};

use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(super) const IO_URING: Check = Check {
    name: "io-uring",
    summary: "Processes that use io_uring",
    compares: "what each process has of io_uring with nothing: that it is used is worth knowing",
    why: "What is asked for by io_uring (opening, reading, sending) is no system call: whoever watches those does not see it, and some \
          rootkits do all their work this way.",
    techniques: &[Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "What is in the rings is not looked at.",
        "Threads of a process that use a ring which its first thread does not.",
    ],
    run,
};

/// Rings of one process that are counted.
const MAX_RINGS: usize = 1 << 10;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let task = context.object("task_struct", Gva(0))?;
    if !task.has("io_uring") {
        findings.note("the kernel has no io_uring");
        return Ok(());
    }
    for process in kernel.processes(ProcessFields::EXE)?.rows {
        findings.looked_at(1);
        let Ok(of_task) = task.moved(process.task).pointer("io_uring") else {
            continue;
        };
        if of_task.is_null() {
            continue;
        }
        let table = context.object("io_uring_task", of_task)?;
        let mut rings = Vec::new();
        if let Ok(head) = table.number("xa.xa_head") {
            let walk = xarray::walk_head(kernel, head, MAX_RINGS)?;
            rings.extend(walk.items.iter().filter_map(xarray::Entry::pointer));
        }
        let finding = Finding::new(
            Severity::Info,
            format!("io_uring in process {} ({})", process.pid, process.name),
            "what it asks of the kernel this way is no system call, and is not seen where system calls are watched",
        );
        findings.report(
            finding
                .at(of_task)
                .with(Evidence::value("rings", rings.len()))
                .with(Evidence::value(
                    "program",
                    process.details().exe.as_deref().unwrap_or("?"),
                )),
        );
    }
    Ok(())
}
