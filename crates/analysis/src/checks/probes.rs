//! Who is told when programs reach an instruction, or when the processor or the kernel counts something.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::perf::Watched;
use vmsight_linux::structures::{hlist, list, rbtree};

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
    compares: "the functions of every perf event of each CPU and thread, and of every registered source of events, with the code that the \
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
    let sources = kernel.perf_sources()?;
    let of_source = context.object("pmu", Gva(0))?;
    for at in findings.complete("list of sources of perf events", sources) {
        // That of breakpoints has no name.
        let name = of_source.moved(at).text("name", 64);
        let name = name.unwrap_or_else(|_| "?".to_owned());
        pointers.table(findings, &format!("perf source {name}"), "pmu", at);
    }
    let contexts = kernel.perf_contexts()?;
    for warning in contexts.warnings {
        findings.note(warning);
    }
    for row in contexts.rows {
        if !findings.go_on() {
            break;
        }
        let whose = match row.watched {
            Watched::Cpu(cpu) => format!("CPU {cpu}"),
            Watched::Thread { pid, tid, name } if pid == tid => format!("process {pid} ({name})"),
            Watched::Thread { pid, tid, name } => format!("thread {tid} ({name}) of process {pid}"),
        };
        let looked = events(context, findings, &mut pointers, &whose, row.address);
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
    let event = context.object("perf_event", Gva(0))?;
    let limit = MAX_PROBES.min(findings.left());
    let walk = context.kernel().perf_events_of(at, limit)?;
    for at in findings.complete(&format!("perf events of {whose}"), walk) {
        for (member, slot) in event.moved(at).function_pointers() {
            pointers.hook(findings, &format!("perf event of {whose}"), &member, slot);
        }
    }
    Ok(())
}
