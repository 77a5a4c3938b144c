//! What a process executes, what is loaded into it, and who traces it.

use vmsight_linux::{LinuxError, Process};

use crate::{Context, Evidence, Finding, Findings, Severity};

/// Where anybody may write.
const SHARED: [&str; 3] = ["/tmp/", "/var/tmp/", "/dev/shm/"];
/// Container runtimes execute a copy of themselves that a container cannot write to.
const CLONED: &str = "runc_cloned";
const DELETED: &str = " (deleted)";

fn is_shared(path: &str) -> bool {
    SHARED.iter().any(|folder| path.starts_with(folder))
}

/// A program that is in no file any more, or never was.
pub(super) fn check(findings: &mut Findings, process: &Process) {
    let Some(path) = process
        .details()
        .exe
        .as_deref()
        .and_then(|exe| exe.strip_suffix(DELETED))
    else {
        return;
    };
    let in_memory = path.starts_with("/memfd:");
    let (severity, explanation) = if in_memory && !path.contains(CLONED) {
        (
            Severity::Medium,
            "its program was never in a file: it was executed from memory",
        )
    } else if is_shared(path) {
        (
            Severity::Medium,
            "its program was deleted, and had been where anybody may write",
        )
    } else {
        (
            Severity::Info,
            "its program was deleted: an update does that, and so does who hides",
        )
    };
    let finding = Finding::new(
        severity,
        format!("program of process {} ({})", process.pid, process.name),
        explanation,
    );
    findings.report(finding.at(process.task).with(Evidence::value("program", path)));
}

/// What the dynamic linker is told to load before all else.
pub(super) fn preload(findings: &mut Findings, process: &Process) {
    let environ = process.details().environ.iter().flatten();
    for (name, value) in environ.filter_map(|variable| variable.split_once('=')) {
        if !matches!(name, "LD_PRELOAD" | "LD_AUDIT") || value.is_empty() {
            continue;
        }
        let libraries = || value.split([' ', ':']);
        let severity = match libraries().any(|path| is_shared(path) || path.contains("/.")) {
            true => Severity::Medium,
            false => Severity::Info,
        };
        let explanation = match severity {
            Severity::Info => "a library is loaded into it before all others",
            _ => {
                "a library is loaded into it before all others, from where anybody may write or from a hidden place"
            }
        };
        let finding = Finding::new(
            severity,
            format!("{name} of process {} ({})", process.pid, process.name),
            explanation,
        );
        findings.report(finding.at(process.task).with(Evidence::value(name, value)));
    }
}

/// A process that another one traces.
pub(super) fn traced(
    context: &Context,
    findings: &mut Findings,
    process: &Process,
) -> Result<(), LinuxError> {
    let task = context.object("task_struct", process.task)?;
    if task.number("ptrace")? == 0 {
        return Ok(());
    }
    let tracer = task.moved(task.pointer("parent")?);
    let name = tracer.array_text("comm").unwrap_or_default();
    let finding = Finding::new(
        Severity::Info,
        format!("process {} ({}) is traced", process.pid, process.name),
        "another process reads and writes its memory and registers: a debugger, or who injects",
    );
    findings.report(finding.at(process.task).with(Evidence::value(
        "tracer",
        format_args!("process {} ({name})", tracer.number("pid")?),
    )));
    Ok(())
}
