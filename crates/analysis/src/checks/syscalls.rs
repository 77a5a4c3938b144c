//! The tables of system calls.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;
use vmsight_linux::syscall::Switch;

use crate::{Check, Context, Finding, Findings, Owner, Severity, Technique};

/// More than any table has.
const MAX_CALLS: u64 = 1024;

/// See [`Check`].
pub(super) const SYSCALLS: Check = Check {
    name: "syscalls",
    summary: "Tables of system calls name the kernel's own handlers",
    compares: "every entry of sys_call_table, ia32_sys_call_table and x32_sys_call_table with the kernel's text and \
               with the names of its symbols: an entry must be the begin of a system call's handler. Where the kernel dispatches by \
               a switch, each number is followed through it, and must come to the same handler",
    why: "Whoever sits in the table sees, changes and denies every such call: files, processes and connections vanish from all \
          programs at once.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A handler whose own code is patched: see the check text.",
        "A copy of the table that entry code was patched to use instead: see the checks entry and text.",
    ],
    run,
};

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    context.symbol(&["sys_call_table"])?;
    for (table, switch) in [
        ("sys_call_table", "x64_sys_call"),
        ("ia32_sys_call_table", "ia32_sys_call"),
        ("x32_sys_call_table", "x32_sys_call"),
    ] {
        let table = context.kernel().find_symbol(&[table]).map(|at| (table, at));
        if let Some((name, at)) = table {
            entries(context, findings, name, at);
        }
        if let Some(at) = context.kernel().find_symbol(&[switch]) {
            dispatch(context, findings, switch, at, table);
        }
    }
    Ok(())
}

/// Where each number goes by the switch: to a handler, and to the one that the table names too.
fn dispatch(context: &Context, findings: &mut Findings, name: &str, at: Gva, table: Option<(&str, Gva)>) {
    let Some(switch) = findings.or_note(name, Switch::read(context.kernel(), at)) else {
        return;
    };
    let known = table.map_or(0, |(_, at)| context.entries(at, MAX_CALLS));
    for number in 0..MAX_CALLS {
        let subject = format!("{name}({number})");
        findings.looked_at(1);
        let (handler, jump) = match switch.target(number as u32) {
            Ok(found) => found,
            Err(why) => {
                // One way out of the tree is common to many numbers: told once.
                if !findings.has(name, Some(at)) {
                    let what = format!("call {number} cannot be followed through the switch: {why}");
                    let finding = Finding::new(Severity::High, name, what).at(at).with(context.code(
                        "its begin",
                        at,
                        8,
                    ));
                    findings.report(finding);
                }
                continue;
            }
        };
        let mut expected = None;
        let explanation = if !is_ours(context, handler) {
            "the switch leads to what is no system call's handler"
        } else if let Some((table, start)) = table.filter(|_| number < known) {
            let slot = start.wrapping_add(number * 8);
            let Some(entry) = findings.or_note(table, context.pointer(table, slot)) else {
                return;
            };
            // A number whose entry is wrong is told of by the table; numbers of the other ABI share the table.
            if entry == handler || !is_ours(context, entry) {
                continue;
            }
            expected = Some(context.evidence("the table's handler", entry));
            "the switch and the table name different handlers"
        } else {
            continue;
        };
        let owner = context.owner(handler);
        let mut finding = Finding::new(Severity::Critical, subject, explanation)
            .at(jump)
            .by(owner.module().map(str::to_owned))
            .with(context.evidence("handler", handler))
            .with(context.code("the jump to it", jump, 1));
        finding.evidence.extend(expected);
        findings.report(finding);
    }
}

fn is_ours(context: &Context, handler: Gva) -> bool {
    context.owner(handler) == Owner::Kernel && context.symbols_at(handler).any(is_handler)
}

fn entries(context: &Context, findings: &mut Findings, table: &str, at: Gva) {
    let entries = context.entries(at, MAX_CALLS);
    for number in 0..entries {
        let slot = at.wrapping_add(number * 8);
        let Some(handler) = findings.or_note(table, context.pointer(table, slot)) else {
            return;
        };
        // What pads the table to the next symbol.
        if handler.is_null() && (number..entries).all(|n| is_null(context, at, n)) {
            break;
        }
        findings.looked_at(1);
        let owner = context.owner(handler);
        if is_ours(context, handler) {
            continue;
        }
        let (severity, explanation) = match &owner {
            Owner::Kernel => (
                Severity::High,
                "the entry leads into the kernel's text, but not to a system call's handler",
            ),
            Owner::Module { .. } => (Severity::Critical, "a module has put itself into the table"),
            _ => (Severity::Critical, "the entry leads out of the kernel's text"),
        };
        let finding = Finding::new(severity, format!("{table}[{number}]"), explanation)
            .at(slot)
            .by(owner.module().map(str::to_owned))
            .with(context.evidence("handler", handler))
            .with(context.code("handler's code", handler, 4));
        findings.report(finding);
    }
}

fn is_null(context: &Context, table: Gva, number: u64) -> bool {
    context
        .space()
        .read_u64(table.wrapping_add(number * 8))
        .is_ok_and(|value| value == 0)
}

/// `__x64_sys_openat`, `__ia32_compat_sys_openat`, `__do_sys_…` and the like.
fn is_handler(symbol: &str) -> bool {
    symbol.contains("sys_") && (symbol.starts_with("__") || symbol.starts_with("sys_"))
}
