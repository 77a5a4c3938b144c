//! What processes call themselves.

use rustc_hash::FxHashSet;
use vmsight_linux::{LinuxError, Process, ProcessFields};

use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(super) const PROCESS_NAMES: Check = Check {
    name: "process-names",
    summary: "No program calls itself as the kernel's own threads are called",
    compares: "the name and the first argument of every process that has memory of its own with the names that the kernel gives its \
               threads, and those that its threads have",
    why: "ps shows the kernel's threads in brackets, and nobody looks at them twice: a program that takes such a name hides in plain \
          sight.",
    techniques: &[
        Technique::new("T1036.005", "Masquerading: Match Legitimate Name or Location"),
        Technique::new("T1036.011", "Masquerading: Overwrite Process Arguments"),
    ],
    blind_spots: &[
        "A program that poses as another program: names, arguments and files differ in many honest processes. They are side by side in \
         vmsight ps --columns pid,name,exe,cmdline; programs that were deleted or replaced are told of by the check process-memory.",
        "A thread of the kernel's that runs what is not the kernel's: see the check kernel-threads.",
        "Arguments that are paged out, and threads of a process that call themselves otherwise than it does.",
    ],
    run,
};

/// What only the kernel's threads are called, up to a number or a device. Programs get the name of their file, which has no slash.
const PREFIXES: &[&str] = &[
    "kworker/",
    "ksoftirqd/",
    "migration/",
    "cpuhp/",
    "idle_inject/",
    "rcuop/",
    "rcuos/",
    "rcuog/",
    "rcuc/",
    "rcub/",
    "irq/",
    "jbd2/",
    "kthrotld/",
    "watchdog/",
];
/// Whole names; a number may follow.
const NAMES: &[&str] = &[
    "kthreadd",
    "kswapd",
    "kcompactd",
    "khugepaged",
    "khungtaskd",
    "kauditd",
    "kdevtmpfs",
    "kblockd",
    "kintegrityd",
    "oom_reaper",
    "rcu_sched",
    "rcu_preempt",
    "rcu_tasks_kthread",
];

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let listing = context
        .kernel()
        .processes(ProcessFields::CMDLINE | ProcessFields::EXE | ProcessFields::MEMORY)?;
    for warning in listing.warnings {
        findings.note(warning);
    }
    let threads: FxHashSet<&str> = listing
        .rows
        .iter()
        .filter(|process| process.kernel_thread)
        .map(|process| process.name.as_str())
        .collect();
    for process in &listing.rows {
        findings.looked_at(1);
        // A helper that the kernel is about to execute has its maker's name, and no memory yet.
        if process.kernel_thread || process.mm.is_none() {
            continue;
        }
        let argument = process.argv.as_ref().and_then(|argv| argv.first());
        let argument = argument.map_or("", |argument| argument.as_str());
        let explanation = if is_kernels(&process.name) || is_thread(&threads, &process.name) {
            "a program has the name of a thread of the kernel's"
        } else if poses(&threads, argument) {
            "a program's arguments are what ps shows of a thread of the kernel's"
        } else {
            continue;
        };
        findings.report(finding(process, explanation, argument));
    }
    Ok(())
}

fn finding(process: &Process, explanation: &str, argument: &str) -> Finding {
    let mut finding = Finding::new(
        Severity::High,
        format!("name of process {} ({})", process.pid, process.name),
        explanation,
    )
    .at(process.task)
    .with(Evidence::value("name", &process.name))
    .with(Evidence::value("first argument", argument));
    if let Some(exe) = &process.details().exe {
        finding = finding.with(Evidence::value("program", exe));
    }
    finding
}

/// Whether it is what the kernel calls threads of its own.
fn is_kernels(name: &str) -> bool {
    let whole = |known: &str| {
        let rest = name.strip_prefix(known);
        rest.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || NAMES.iter().any(|known| whole(known))
}

/// Whether a thread of this guest's kernel is called so, by a name that no file can have.
fn is_thread(threads: &FxHashSet<&str>, name: &str) -> bool {
    name.contains('/') && threads.contains(name)
}

/// Whether a first argument is what ps makes of a kernel thread's name, or that itself. Behind it may be what was written over.
fn poses(threads: &FxHashSet<&str>, argument: &str) -> bool {
    let argument = argument.trim_end();
    let inside = argument.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match inside {
        Some(name) => is_kernels(name) || threads.contains(name),
        None => is_kernels(argument),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_kernels_threads_are_known_and_programs_are_not_among_them() {
        for name in [
            "kworker/0:1",
            "kworker/u4:0-events_unbound",
            "kworker/R-rcu_gp",
            "ksoftirqd/1",
            "migration/0",
            "kthreadd",
            "kswapd0",
            "kcompactd12",
            "rcu_preempt",
            "irq/24-pciehp",
            "jbd2/vda1-8",
        ] {
            assert!(is_kernels(name), "{name}");
        }
        for name in [
            "",
            "kworker",
            "watchdog",
            "irqbalance",
            "kswapd-exporter",
            "kthreadd2x",
            "kubelet",
            "nginx: worker process",
            "migration",
            "systemd",
        ] {
            assert!(!is_kernels(name), "{name}");
        }
    }

    #[test]
    fn brackets_alone_are_no_pose() {
        let threads: FxHashSet<&str> = ["kworker/3:7", "netns", "irq/9-acpi"].into_iter().collect();
        for argument in [
            "[kworker/0:1]",
            "[kthreadd]",
            "[netns]",
            "[kworker/u8:2]   ",
            "kworker/0:0",
        ] {
            assert!(poses(&threads, argument), "{argument}");
        }
        for argument in [
            "",
            "[",
            "[]",
            "netns",
            "[celeryd: worker]",
            "[lxc monitor] /var/lib/lxc web",
            "/usr/bin/[",
            "(sd-pam)",
            "-bash",
        ] {
            assert!(!poses(&threads, argument), "{argument}");
        }
        assert!(is_thread(&threads, "irq/9-acpi") && !is_thread(&threads, "netns"));
    }
}
