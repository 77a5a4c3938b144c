//! The rule for pointers to functions: where they may lead by where they lie.

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;

use crate::{Context, Finding, Findings, Owner, Severity};

/// Looks at pointers, each table of them once.
pub(super) struct Pointers<'c> {
    context: &'c Context,
    seen: FxHashSet<(u64, &'static str)>,
}

impl<'c> Pointers<'c> {
    pub(super) fn new(context: &'c Context) -> Self {
        Self {
            context,
            seen: FxHashSet::default(),
        }
    }

    /// What they are looked at through.
    pub(super) fn context(&self) -> &'c Context {
        self.context
    }

    /// All pointers to functions in the structure at `at`, a table of operations. `subject` says whose it is: a path, a name.
    pub(super) fn table(&mut self, findings: &mut Findings, subject: &str, structure: &'static str, at: Gva) {
        if at.is_null() || !self.seen.insert((at.0, structure)) {
            return;
        }
        let context = self.context;
        let holder = context.owner(at);
        if matches!(holder, Owner::ModuleArea | Owner::User | Owner::Null) || holder.is_code() {
            findings.looked_at(1);
            findings.report_with(|_| {
                Finding::new(
                    Severity::High,
                    subject,
                    format!("its {structure} lies where no such table can be"),
                )
                .at(at)
                .with(context.evidence("table", at))
            });
            return;
        }
        let Some(object) = findings.or_note(subject, context.object(structure, at)) else {
            return;
        };
        for (member, slot) in object.function_pointers() {
            self.slot(findings, subject, &format!("{structure}.{member}"), slot);
        }
    }

    /// The pointer to a function that lies at `slot`.
    pub(super) fn slot(&mut self, findings: &mut Findings, subject: &str, what: &str, slot: Gva) {
        if let Some(value) = findings.or_note(subject, self.context.pointer(what, slot)) {
            self.value(findings, subject, what, slot, value);
        }
    }

    /// A pointer to a function in an object of the heap that modules may register. What one from out of tree has put there
    /// is told, too: such are rare, and it is what rootkits are.
    pub(super) fn hook(&mut self, findings: &mut Findings, subject: &str, what: &str, slot: Gva) {
        let context = self.context;
        let Some(value) = findings.or_note(subject, context.pointer(what, slot)) else {
            return;
        };
        let before = findings.found().len();
        self.value(findings, subject, what, slot, value);
        let owner = context.owner(value);
        if findings.found().len() > before || !foreign(context, &owner) {
            return;
        }
        let finding = Finding::new(
            Severity::Medium,
            format!("{subject} {what}"),
            "a module from out of the kernel's tree is called here",
        )
        .at(slot)
        .by(owner.module().map(str::to_owned))
        .with(context.evidence("leads to", value))
        .with(context.code("code there", value, 4));
        findings.report(finding);
    }

    /// A pointer to a function, `value`, that was read at `slot`.
    pub(super) fn value(
        &mut self,
        findings: &mut Findings,
        subject: &str,
        what: &str,
        slot: Gva,
        value: Gva,
    ) {
        let context = self.context;
        findings.looked_at(1);
        let to = context.owner(value);
        let holder = context.owner(slot);
        let explanation = match (&holder, &to) {
            (_, Owner::Null) => return,
            // What is in the image is the kernel's own, and does not need a module's help.
            (Owner::KernelData | Owner::Kernel, Owner::Module { .. }) => {
                "a function pointer of the kernel's own leads into a module"
            }
            (Owner::Module { name: a, .. }, Owner::Module { name: b, code: true }) if a != b => {
                "a function pointer of one module leads into another"
            }
            (_, Owner::Kernel) if context.symbols_at(value).next().is_none() => {
                "a function pointer leads into the middle of a function"
            }
            (_, to) if to.is_code() => return,
            _ => "a function pointer leads to what is no code of the kernel or a module it knows",
        };
        let severity = match to {
            Owner::Module { code: true, .. } => Severity::High,
            _ => Severity::Critical,
        };
        findings.report_with(|_| {
            let finding = Finding::new(severity, format!("{subject} {what}"), explanation)
                .at(slot)
                .by(to.module().map(str::to_owned))
                .with(context.evidence("pointer at", slot))
                .with(context.evidence("leads to", value))
                .with(context.code("code there", value, 4));
            let doubts = context.doubts();
            doubts.iter().fold(finding, |finding, doubt| {
                finding.with(crate::Evidence::value("in doubt", doubt))
            })
        });
    }
}

/// Whether the kernel says of the module that it is out of tree, or that it is not signed (taints O, E; kernel/panic.c). One that
/// was loaded by force (F) is its distribution's own in another version, and has lost its signature with that.
fn foreign(context: &Context, owner: &Owner) -> bool {
    let Some(name) = owner.module() else { return false };
    let modules = context.modules().iter().filter(|m| m.name == name);
    modules
        .map(|m| m.taints.as_str())
        .any(|taints| taints.contains('O') || taints.contains('E') && !taints.contains('F'))
}
