//! Where in the kernel threads sleep.

use vmsight_arch::Gva;
use vmsight_linux::{LinuxError, StackFrame};

use crate::{Check, Context, Evidence, Finding, Findings, Owner, Severity, Technique};

/// Frames of one stack that are evidence.
const SHOWN: usize = 16;

/// See [`Check`].
pub(super) const STACKS: Check = Check {
    name: "stacks",
    summary: "Return addresses on the kernel stacks of threads that sleep",
    compares: "each return address, as the kernel's own tables find it, with the code that the kernel knows",
    why: "Whoever hides a module still has to wait somewhere: a thread that sleeps in its code has the way back into it on its stack.",
    techniques: &[Technique::ROOTKIT, Technique::new("T1564", "Hide Artifacts")],
    blind_spots: &[
        "Threads on a CPU, whose stacks change, and code that never sleeps.",
        "Threads that are in no list: see the check hidden-processes.",
        "Frames that can only be guessed: what lies on a stack may be left over from earlier calls.",
        "Up to 6.12 the kernel keeps no list of the code with which BPF's struct_ops are called: a thread that sleeps in such is told.",
    ],
    run,
};

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let threads = kernel.threads(None)?;
    let generated = |at: Gva| match context.owner(at) {
        Owner::Generated(what) => Some(what.to_string()),
        _ => None,
    };
    let stacks = kernel.stacks(&threads.rows, &generated)?;
    for warning in threads.warnings.into_iter().chain(stacks.warnings) {
        findings.note(warning);
    }
    for stack in stacks.rows.chunk_by(|a, b| a.task == b.task) {
        if !findings.go_on() {
            break;
        }
        findings.looked_at(1);
        // The innermost is enough of one stack; the others are in the evidence.
        let nobodys =
            |row: &&StackFrame| row.how.is_sure() && row.address.is_some_and(|at| is_nobodys(context, at));
        let Some((row, at)) = stack
            .iter()
            .find(nobodys)
            .and_then(|row| Some((row, row.address?)))
        else {
            continue;
        };
        let kind = if row.kernel_thread {
            "kernel thread"
        } else {
            "thread"
        };
        let finding = Finding::new(
            Severity::Critical,
            format!("{kind} {} ({})", row.tid, row.name),
            "it sleeps in code that is neither the kernel's nor that of a module it knows",
        )
        .at(at)
        .with(context.evidence("returns to", at))
        .with(context.code("code there", at, 4))
        .with(Evidence::value("its stack", spelt(stack)));
        findings.report(finding);
    }
    Ok(())
}

fn is_nobodys(context: &Context, at: Gva) -> bool {
    let owner = context.owner(at);
    // What was there while the kernel booted is not mapped any more when it has.
    !owner.is_code() && owner != Owner::KernelInit
}

/// The frames in a line, the innermost first.
fn spelt(stack: &[StackFrame]) -> String {
    let names = stack
        .iter()
        .take(SHOWN)
        .map(|row| match (&row.symbol, row.address) {
            (Some(symbol), _) => symbol.to_string(),
            (None, Some(at)) => at.to_string(),
            (None, None) => "?".to_owned(),
        });
    let mut text = names.collect::<Vec<_>>().join(" < ");
    if stack.len() > SHOWN {
        text.push_str(" < …");
    }
    text
}
