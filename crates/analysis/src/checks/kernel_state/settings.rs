//! Settings that make a kernel harder to attack.

use vmsight_linux::LinuxError;

use super::command_line;
use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const SETTINGS: Check = Check {
    name: "kernel-settings",
    summary: "Settings that harden the kernel are as they were booted, and none is off that should be on",
    compares: "the enforcement of module signatures with the command line; a kernel that is loaded for kexec; \
               settings of hardening with what is weak",
    why: "An attacker who has the kernel turns off what is in his way.",
    techniques: &[Technique::IMPAIR_DEFENSES],
    blind_spots: &[
        "Settings are what the kernel's variables say: a kernel that was patched not to look at them looks the same.",
    ],
    run,
};

/// A setting: its variable, and when it is weak.
struct Setting {
    symbols: &'static [&'static str],
    width: usize,
    weak: fn(i64) -> bool,
    meaning: &'static str,
}

const fn setting(symbols: &'static [&'static str], weak: fn(i64) -> bool, meaning: &'static str) -> Setting {
    Setting {
        symbols,
        width: 4,
        weak,
        meaning,
    }
}

const ALL: [Setting; 7] = [
    setting(
        &["randomize_va_space"],
        |v| v < 2,
        "addresses of programs are not, or not all, chosen at random",
    ),
    Setting {
        width: 8,
        ..setting(
            &["mmap_min_addr"],
            |v| v == 0,
            "programs may map the page at address 0",
        )
    },
    setting(
        &["suid_dumpable"],
        |v| v == 1,
        "programs with raised rights leave core dumps",
    ),
    setting(
        &["sysctl_unprivileged_bpf_disabled"],
        |v| v == 0,
        "any user may load BPF programs",
    ),
    setting(
        &["sysctl_perf_event_paranoid"],
        |v| v < 0,
        "any user may watch the kernel by perf events",
    ),
    setting(
        &["sysctl_protected_symlinks"],
        |v| v == 0,
        "symbolic links in shared folders are followed",
    ),
    setting(
        &["sysctl_protected_hardlinks"],
        |v| v == 0,
        "users may make links to others' files",
    ),
];

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    hardening(context, findings);
    signatures(context, findings);
    kexec(context, findings);
    Ok(())
}

fn value(context: &Context, setting: &Setting) -> Option<i64> {
    let at = context.kernel().find_symbol(setting.symbols)?;
    let mut bytes = [0; 8];
    let read = context.space().read(at, bytes.get_mut(..setting.width)?);
    read.ok()?;
    Some(match setting.width {
        4 => i64::from(i64::from_le_bytes(bytes) as i32),
        _ => i64::from_le_bytes(bytes),
    })
}

fn hardening(context: &Context, findings: &mut Findings) {
    let mut weak = Vec::new();
    let mut known = 0;
    for setting in &ALL {
        let Some(value) = value(context, setting) else {
            continue;
        };
        known += 1;
        if (setting.weak)(value) {
            let name = setting.symbols.first().copied().unwrap_or_default();
            weak.push(Evidence::value(
                name,
                format_args!("{value}: {}", setting.meaning),
            ));
        }
    }
    findings.looked_at(known);
    if known == 0 {
        findings.note("the kernel has none of the settings that are looked at");
    }
    if weak.is_empty() {
        return;
    }
    let finding = Finding::new(
        Severity::Info,
        "settings that harden the kernel",
        "some are off that most systems have on",
    );
    findings.report(weak.into_iter().fold(finding, Finding::with));
}

/// Modules without a valid signature are refused (`sig_enforce`, kernel/module/signing.c). It can be turned on, and never off.
fn signatures(context: &Context, findings: &mut Findings) {
    let Some(at) = context.kernel().find_symbol(&["sig_enforce"]) else {
        return;
    };
    let Some(enforced) = findings.or_note("sig_enforce", context.space().read_u8(at)) else {
        return;
    };
    findings.looked_at(1);
    let words = command_line::words(context);
    let asked = command_line::parameter(&words, "module.sig_enforce");
    let on = asked.is_some_and(|value| matches!(value, "" | "1" | "y" | "Y" | "on"));
    if on && enforced == 0 {
        let finding = Finding::new(
            Severity::High,
            "enforcement of module signatures",
            "the kernel was booted to load signed modules only, and does not any more",
        );
        findings.report(
            finding
                .at(at)
                .with(Evidence::value("on the command line", "module.sig_enforce"))
                .with(Evidence::value("sig_enforce", enforced)),
        );
    }
}

/// A kernel that is started in place of this one, without the firmware (`kexec_image`, kernel/kexec_core.c).
fn kexec(context: &Context, findings: &mut Findings) {
    let Some(at) = context.kernel().find_symbol(&["kexec_image"]) else {
        return;
    };
    findings.looked_at(1);
    if let Ok(image) = context.pointer("kexec_image", at)
        && !image.is_null()
    {
        let finding = Finding::new(
            Severity::Info,
            "a kernel is loaded for kexec",
            "it is started in place of this one at the next restart: updates do that, and so does who changes the kernel",
        );
        findings.report(finding.at(image));
    }
}
