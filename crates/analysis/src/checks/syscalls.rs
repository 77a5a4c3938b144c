//! The tables of system calls.

use vmsight_arch::Gva;
use vmsight_linux::LinuxError;

use crate::{Check, Context, Finding, Findings, Owner, Severity, Technique};

/// More than any table has.
const MAX_CALLS: u64 = 1024;

/// See [`Check`].
pub(super) const SYSCALLS: Check = Check {
    name: "syscalls",
    summary: "Tables of system calls name the kernel's own handlers",
    compares: "every entry of sys_call_table, ia32_sys_call_table and x32_sys_call_table with the kernel's text and \
               with the names of its symbols: an entry must be the begin of a system call's handler",
    why: "Whoever sits in the table sees, changes and denies every such call: files, processes and connections vanish from all \
          programs at once.",
    techniques: &[Technique::ROOTKIT, Technique::HIDE_ARTIFACTS],
    blind_spots: &[
        "A handler whose own code is patched: see the check text.",
        "A kernel that dispatches by a switch (since 6.9 with the mitigation of branch history injection) does not read \
         the tables: that switch is looked at, too, by the check text.",
        "A copy of the table that entry code was patched to use instead: see the checks entry and text.",
    ],
    run,
};

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    context.symbol(&["sys_call_table"])?;
    for table in ["sys_call_table", "ia32_sys_call_table", "x32_sys_call_table"] {
        if let Some(at) = context.kernel().find_symbol(&[table]) {
            check(context, findings, table, at);
        }
    }
    Ok(())
}

fn check(context: &Context, findings: &mut Findings, table: &str, at: Gva) {
    let kernel = context.kernel();
    let linked = kernel.image().link_time(at);
    let symbols = &kernel.profile().symbols;
    let next = symbols.range(linked.saturating_add(1)..u64::MAX).next();
    let entries = next
        .map_or(MAX_CALLS, |s| s.address.wrapping_sub(linked) / 8)
        .min(MAX_CALLS);
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
        let ours = owner == Owner::Kernel && context.symbols_at(handler).any(is_handler);
        if ours {
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
