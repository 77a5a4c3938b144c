//! Who is told when programs reach an instruction, or when the processor or the kernel counts something.

use vmsight_arch::Gva;
use vmsight_linux::structures::{hlist, list, rbtree};
use vmsight_linux::{LinuxError, ProcessFields};

use super::pointers::Pointers;
use crate::{Check, Context, Findings, Object, Technique};

/// Probes, consumers of one, events of one context that are looked at.
const MAX_PROBES: usize = 1 << 14;

pub(super) const UPROBES: Check = Check {
    name: "uprobes",
    summary: "Functions that are called when programs reach a probe",
    compares: "the handlers of every consumer of every uprobe with the code that the kernel knows",
    why: "A uprobe on a library sees passwords and keys as programs hand them over, in every process at once, without touching one.",
    techniques: &[
        Technique::ROOTKIT,
        Technique::new("T1056.004", "Input Capture: Credential API Hooking"),
    ],
    blind_spots: &[
        "Uprobes of tracefs, perf and BPF have handlers in the kernel; what they do there is not judged.",
    ],
    run: uprobes,
};

fn uprobes(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let mut pointers = Pointers::new(context);
    let Some(root) = context.kernel().find_symbol(&["uprobes_tree"]) else {
        findings.note("the kernel has no uprobes, or hides them");
        return Ok(());
    };
    let node = context.kernel().offset("uprobe", "rb_node")?;
    let found = rbtree::walk(context.space(), root, MAX_PROBES.min(findings.left()));
    for at in findings.complete("tree of uprobes", found) {
        let uprobe = context.object("uprobe", at.wrapping_sub(node))?;
        let looked = consumers(context, findings, &mut pointers, &uprobe);
        findings.or_note("a uprobe", looked);
    }
    Ok(())
}

fn consumers(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    uprobe: &Object<'_>,
) -> Result<(), LinuxError> {
    let consumer = context.object("uprobe_consumer", Gva(0))?;
    let limit = MAX_PROBES.min(findings.left());
    // Chained by a pointer up to 6.11, by a node since.
    let (walk, offset) = if consumer.has("next") {
        let next = consumer.member("next")?.0;
        let first = uprobe.pointer("consumers")?;
        (hlist::walk_next(context.space(), first, next, limit), 0)
    } else {
        let head = uprobe.member("consumers")?;
        let node = consumer.member("cons_node")?.0;
        (list::walk(context.space(), head, limit).walk, node)
    };
    let inode = context
        .object("inode", uprobe.pointer("inode")?)?
        .number("i_ino")?;
    let subject = format!("uprobe at {:#x} of inode {inode}", uprobe.number("offset")?);
    for at in findings.complete("consumers of a uprobe", walk) {
        for (member, slot) in consumer.moved(at.wrapping_sub(offset)).function_pointers() {
            pointers.hook(findings, &subject, &member, slot);
        }
    }
    Ok(())
}

pub(super) const PERF: Check = Check {
    name: "perf",
    summary: "Functions that perf events call, and those of their sources",
    compares: "the functions of every perf event of each CPU and task, and of every registered source of events, with the code that the \
               kernel knows",
    why: "An event's function is called on a hardware breakpoint or a count: a hook on any address, with nothing patched.",
    techniques: &[Technique::ROOTKIT],
    blind_spots: &[
        "Debug registers that were written past the kernel: see what the vCPUs' registers say (vmsight regs).",
        "Events of perf and BPF have functions in the kernel; what they do there is not judged.",
    ],
    run: perf,
};

fn perf(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let mut pointers = Pointers::new(context);
    let entry = kernel.offset("pmu", "entry")?;
    let sources = list::walk(context.space(), context.symbol(&["pmus"])?, MAX_PROBES).walk;
    let mut contexts: Vec<(String, Gva)> = Vec::new();
    let of_cpu = context.object("perf_cpu_context", Gva(0))?;
    for node in findings.complete("list of sources of perf events", sources) {
        let source = context.object("pmu", node.wrapping_sub(entry))?;
        // That of breakpoints has no name.
        let name = source.text("name", 64).unwrap_or_else(|_| "?".to_owned());
        pointers.table(findings, &format!("perf source {name}"), "pmu", source.address());
        // Up to 6.1 each source has its contexts; since then there is one for each CPU.
        if source.has("pmu_cpu_context") {
            let base = source.pointer("pmu_cpu_context")?;
            // Several sources of one kind share them.
            if !base.is_null() {
                for (cpu, at) in kernel.per_cpu()?.copies(base) {
                    if !findings.go_on() {
                        return Ok(());
                    }
                    contexts.push((format!("CPU {cpu}"), of_cpu.moved(at).member("ctx")?));
                }
            }
        }
    }
    if let Ok(base) = kernel.per_cpu_symbol("perf_cpu_context") {
        for (cpu, at) in kernel.per_cpu()?.copies(base) {
            contexts.push((format!("CPU {cpu}"), of_cpu.moved(at).member("ctx")?));
        }
    }
    let task = context.object("task_struct", Gva(0))?;
    let many = (task.size_of("perf_event_ctxp")? / 8).clamp(1, 4);
    for process in kernel.processes(ProcessFields::empty())?.rows {
        let first = task.moved(process.task).member("perf_event_ctxp")?;
        for index in 0..many {
            let at = context.pointer("perf_event_ctxp", first.wrapping_add(index * 8));
            if let Ok(at) = at
                && !at.is_null()
            {
                contexts.push((format!("process {} ({})", process.pid, process.name), at));
            }
        }
    }
    contexts.sort_by_key(|(_, at)| *at);
    contexts.dedup_by_key(|(_, at)| *at);
    for (whose, at) in contexts {
        let looked = events(context, findings, &mut pointers, &whose, at);
        findings.or_note(&format!("perf events of {whose}"), looked);
    }
    Ok(())
}

fn events(
    context: &Context,
    findings: &mut Findings,
    pointers: &mut Pointers<'_>,
    whose: &str,
    at: Gva,
) -> Result<(), LinuxError> {
    let head = context.object("perf_event_context", at)?.member("event_list")?;
    let entry = context.kernel().offset("perf_event", "event_entry")?;
    let event = context.object("perf_event", Gva(0))?;
    let limit = MAX_PROBES.min(findings.left());
    let walk = list::walk(context.space(), head, limit).walk;
    for node in findings.complete(&format!("perf events of {whose}"), walk) {
        let event = event.moved(node.wrapping_sub(entry));
        for (member, slot) in event.function_pointers() {
            pointers.hook(findings, &format!("perf event of {whose}"), &member, slot);
        }
    }
    Ok(())
}
