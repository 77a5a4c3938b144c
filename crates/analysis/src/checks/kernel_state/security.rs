//! The kernel's security modules.

use vmsight_linux::LinuxError;

use super::command_line;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const SECURITY_MODULES: Check = Check {
    name: "security-modules",
    summary: "SELinux, AppArmor and lockdown are on where the kernel was booted with them",
    compares: "the state of each with the list of security modules that the kernel started, and with the command \
               line",
    why: "Switched off in memory, they allow everything, and the guest's files still say that they are on.",
    techniques: &[Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "A policy that allows everything.",
        "Hooks that were taken out: see the checks of function pointers.",
    ],
    run,
};

/// Names of security modules, joined by commas.
const MAX_NAMES: usize = 512;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let words = command_line::words(context);
    let names = active(context);
    let is_active = |name: &str| names.iter().any(|active| active == name);
    // Not every kernel keeps the names.
    if is_active("apparmor") || number(context, "apparmor_initialized") == Some(1) {
        apparmor(context, findings);
    }
    if is_active("selinux") {
        selinux(context, findings)?;
    }
    let known = lockdown(context, findings, command_line::parameter(&words, "lockdown"));
    if names.is_empty() && !known {
        findings.note("the kernel has no security modules, or does not say");
    }
    findings.looked_at(names.len());
    Ok(())
}

/// Those that the kernel has started (`lsm_names`, security/security.c); none where it does not say.
fn active(context: &Context) -> Vec<String> {
    let names = context
        .symbol(&["lsm_names"])
        .and_then(|at| context.pointer("lsm_names", at))
        .and_then(|at| context.text("lsm_names", at, MAX_NAMES))
        .unwrap_or_default();
    let names = names.split(',').filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

fn number(context: &Context, symbol: &str) -> Option<u32> {
    let at = context.kernel().find_symbol(&[symbol])?;
    context.space().read_u32(at).ok()
}

fn apparmor(context: &Context, findings: &mut Findings) {
    findings.looked_at(1);
    // Both are set once, at boot.
    for symbol in ["apparmor_enabled", "apparmor_initialized"] {
        if number(context, symbol) == Some(0) {
            let finding = Finding::new(
                Severity::High,
                "AppArmor",
                "the kernel was booted with it, and it is switched off in memory",
            );
            findings.report(finding.with(Evidence::value(symbol, 0)));
        }
    }
}

/// `selinux_state` (security/selinux/include/security.h).
fn selinux(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let state = context.object("selinux_state", context.symbol(&["selinux_state"])?)?;
    findings.looked_at(1);
    if state.number("initialized")? != 0 && state.has("enforcing") && state.number("enforcing")? == 0 {
        let finding = Finding::new(
            Severity::Info,
            "SELinux",
            "it is permissive: what its policy denies is written down and allowed",
        );
        findings.report(finding.at(state.address()));
    }
    if state.number("initialized")? == 0 && state.has("policy") && !state.pointer("policy")?.is_null() {
        let finding = Finding::new(
            Severity::High,
            "SELinux",
            "it has a policy, and is marked as one that has none: it allows everything",
        );
        findings.report(finding.at(state.address()));
    }
    Ok(())
}

/// `kernel_locked_down` (security/lockdown/lockdown.c) can only rise. False where the kernel has none.
fn lockdown(context: &Context, findings: &mut Findings, asked: Option<&str>) -> bool {
    let Some(level) = number(context, "kernel_locked_down") else {
        return false;
    };
    findings.looked_at(1);
    if level == 0
        && let Some(asked @ ("integrity" | "confidentiality")) = asked
    {
        let finding = Finding::new(
            Severity::High,
            "lockdown",
            "the kernel was booted locked down, and is not any more",
        );
        findings.report(
            finding
                .with(Evidence::value("on the command line", asked))
                .with(Evidence::value("kernel_locked_down", level)),
        );
    }
    true
}
