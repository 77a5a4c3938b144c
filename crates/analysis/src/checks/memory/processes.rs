//! The memory of processes.

use vmsight_arch::Gva;
use vmsight_linux::maps::ProcessMaps;
use vmsight_linux::{LinuxError, Mapping, Process, ProcessFields};
use vmsight_memory::AddressSpace;

use super::program;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const PROCESS_MEMORY: Check = Check {
    name: "process-memory",
    summary: "Processes execute files that can be seen, and nothing makes system calls from elsewhere",
    compares: "every executable mapping with the file that it is of; the places from which threads made the \
               system call that they are in; the program of each process; LD_PRELOAD; who traces whom; \
               userfaultfd",
    why: "Code that is put into a process, or that never was in a file, leaves nothing on disk to be found.",
    techniques: &[
        Technique::PROCESS_INJECTION,
        Technique::new("T1620", "Reflective Code Loading"),
        Technique::new("T1574.006", "Hijack Execution Flow: Dynamic Linker Hijacking"),
        Technique::new("T1070.004", "Indicator Removal: File Deletion"),
    ],
    blind_spots: &[
        "Code in a file's mapping that was written over: a process's text is not held against its file here.",
        "Programs that compile as they run have executable memory without a file, too: without a system call made from there it is \
         only worth knowing.",
    ],
    run,
};

/// What is read of a mapping.
const SAMPLE: usize = 4096;
/// `SYSCALL`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Processes whose executable memory is looked into: each costs a walk of all.
const MAX_LOOKED_INTO: usize = 1 << 10;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let processes = kernel
        .processes(ProcessFields::EXE | ProcessFields::ENVIRON)?
        .rows;
    for process in &processes {
        findings.looked_at(1);
        program::check(findings, process);
        program::preload(findings, process);
        if let Err(error) = program::traced(context, findings, process) {
            findings.note(format!("who traces: {error}"));
        }
    }
    let maps = context.maps()?;
    for warning in &maps.warnings {
        findings.note(warning.clone());
    }
    let mut looked_into = 0;
    for process in &maps.rows {
        let odd: Vec<&Mapping> = process.maps.rows.iter().filter(|m| is_odd(m)).collect();
        userfaultfd(context, findings, process);
        if odd.is_empty() {
            continue;
        }
        looked_into += 1;
        if looked_into > MAX_LOOKED_INTO {
            findings.note(format!(
                "executable memory without a file: no more looked at after {MAX_LOOKED_INTO} processes"
            ));
            break;
        }
        let row = processes.iter().find(|p| p.task == process.task);
        let space = kernel.process_space(process.pid).ok().flatten();
        let callers = callers(context, process, space.as_ref(), &odd);
        for mapping in odd {
            report(findings, process, row, mapping, space.as_ref(), &callers);
        }
    }
    Ok(())
}

/// Executable, and of no file that has a name.
fn is_odd(mapping: &Mapping) -> bool {
    if mapping.perms.as_bytes().get(2) != Some(&b'x') {
        return false;
    }
    match mapping.path.as_deref() {
        None => true,
        Some("[heap]" | "[stack]") => true,
        // The kernel's own, and memory that the process has given a name.
        Some(path) if path.starts_with('[') => path.starts_with("[anon"),
        Some(_) => mapping.deleted,
    }
}

/// Where threads made the system calls that they are in, if that is in one of these mappings.
fn callers(
    context: &Context,
    process: &ProcessMaps,
    space: Option<&AddressSpace>,
    odd: &[&Mapping],
) -> Vec<(i32, Gva)> {
    let Some(space) = space else { return Vec::new() };
    let threads = context.kernel().threads(Some(process.pid));
    let mut found = Vec::new();
    for thread in threads.map(|listing| listing.rows).unwrap_or_default() {
        let Ok(Some(registers)) = context.kernel().user_registers(thread.task) else {
            continue;
        };
        let at = Gva(registers.rip.wrapping_sub(SYSCALL.len() as u64));
        let mut bytes = [0; SYSCALL.len()];
        if odd.iter().any(|m| (m.start..m.end).contains(&at))
            && space.read(at, &mut bytes).is_ok()
            && bytes == SYSCALL
        {
            found.push((thread.tid, at));
        }
    }
    found
}

fn report(
    findings: &mut Findings,
    process: &ProcessMaps,
    row: Option<&Process>,
    mapping: &Mapping,
    space: Option<&AddressSpace>,
    callers: &[(i32, Gva)],
) {
    let sample = space.map(|space| sample(space, mapping)).unwrap_or_default();
    let inside = |at: &Gva| (mapping.start..mapping.end).contains(at);
    let calls: Vec<String> = callers
        .iter()
        .filter(|(_, at)| inside(at))
        .map(|(tid, at)| format!("thread {tid} at {at}"))
        .collect();
    let anonymous = mapping.inode == 0;
    let image = sample.starts_with(b"\x7fELF");
    let (severity, explanation) = if !calls.is_empty() && anonymous {
        (
            Severity::High,
            "a thread is in a system call that it made from memory that is of no file: code was put there",
        )
    } else if image && anonymous {
        (
            Severity::Medium,
            "executable memory of no file holds an ELF image: it was loaded from memory",
        )
    } else if anonymous {
        (
            Severity::Info,
            "executable memory of no file: programs that compile as they run have it, and so has injected code",
        )
    } else {
        (
            Severity::Info,
            "executable memory of a file that was deleted: an update does that, and so does who hides",
        )
    };
    let mut finding = Finding::new(
        severity,
        format!("process {} ({}): {}", process.pid, process.name, mapping.start),
        explanation,
    )
    .at(mapping.start)
    .with(Evidence::value(
        "mapping",
        format_args!(
            "{}-{} {} {}",
            mapping.start,
            mapping.end,
            mapping.perms,
            mapping.path.as_deref().unwrap_or("(no file)")
        ),
    ));
    if let Some(exe) = row.and_then(|row| row.details().exe.as_deref()) {
        finding = finding.with(Evidence::value("program", exe));
    }
    if !calls.is_empty() {
        finding = finding.with(Evidence::value("system calls made from here", calls.join(", ")));
    }
    if !sample.is_empty() {
        finding = finding
            .with(Evidence::Bytes {
                what: "first bytes".to_owned(),
                at: mapping.start,
                bytes: sample.iter().take(32).copied().collect(),
            })
            .with(Evidence::value(
                "entropy of the first page",
                format_args!("{:.2} bits per byte", entropy(&sample)),
            ))
            .with(Evidence::value("ELF header", if image { "yes" } else { "no" }));
    }
    findings.report(finding);
}

/// The first page that is there.
fn sample(space: &AddressSpace, mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; SAMPLE];
    match space.read(mapping.start, &mut bytes) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

/// Bits of information in each byte: 0 of one value, 8 of noise; code has 5 to 6.5.
fn entropy(bytes: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    for byte in bytes {
        if let Some(count) = counts.get_mut(usize::from(*byte)) {
            *count += 1;
        }
    }
    let all = bytes.len() as f64;
    let bits = counts.iter().filter(|count| **count > 0).map(|count| {
        let share = f64::from(*count) / all;
        -share * share.log2()
    });
    bits.sum::<f64>().abs()
}

/// Mappings whose page faults another thread or process answers (`vm_userfaultfd_ctx`).
fn userfaultfd(context: &Context, findings: &mut Findings, process: &ProcessMaps) {
    let Ok(offset) = context
        .kernel()
        .offset("vm_area_struct", "vm_userfaultfd_ctx.ctx")
    else {
        return;
    };
    let watched = process.maps.rows.iter().find(|mapping| {
        let ctx = context.space().read_u64(mapping.vma.wrapping_add(offset));
        ctx.is_ok_and(|ctx| ctx != 0)
    });
    if let Some(mapping) = watched {
        let finding = Finding::new(
            Severity::Info,
            format!("userfaultfd in process {} ({})", process.pid, process.name),
            "user mode answers its page faults: virtual machines that move do that, and exploits that hold the kernel up",
        );
        findings.report(finding.at(mapping.start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_of_bytes() {
        assert_eq!(entropy(&[7; 100]), 0.0);
        assert_eq!(entropy(&[0, 1, 0, 1]), 1.0);
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(entropy(&all), 8.0);
    }
}
