//! Programs that the kernel starts on its own, as root.

use vmsight_linux::LinuxError;

use crate::{Check, Context, Evidence, Finding, Findings, Severity, Technique};

/// See [`Check`].
pub(crate) const HELPERS: Check = Check {
    name: "kernel-helpers",
    summary: "The programs that the kernel starts as root are the system's own",
    compares: "modprobe_path, core_pattern, the helper of device events and that of switching off with where a \
               system has such programs",
    why: "Whoever can write to one of them has his program started as root, outside all containers, by a file of \
          unknown kind or a process that crashes.",
    techniques: &[
        Technique::PRIVILEGE_ESCALATION,
        Technique::new("T1611", "Escape to Host"),
        Technique::new("T1546", "Event Triggered Execution"),
    ],
    blind_spots: &["Another program under the name of the system's own."],
    run,
};

/// `KMOD_PATH_LEN` and the like; `core_pattern` has 128.
const MAX_PATH: usize = 256;
/// Where systems have their programs. A system's own files are nobody's to write to there.
const SYSTEM: [&str; 9] = [
    "/sbin/",
    "/bin/",
    "/usr/",
    "/lib/",
    "/lib64/",
    "/opt/",
    "/snap/",
    "/nix/store/",
    "/run/current-system/",
];

/// A text that names a program.
struct Helper {
    symbol: &'static str,
    /// What it is for.
    purpose: &'static str,
    /// Names that the program may have; any, where there are none.
    names: &'static [&'static str],
}

const ALL: [Helper; 3] = [
    Helper {
        symbol: "modprobe_path",
        purpose: "it is started to load a module, which whoever executes a file of unknown kind brings about",
        names: &["modprobe", "true", "false"],
    },
    Helper {
        symbol: "uevent_helper",
        purpose: "it is started at each device event",
        names: &[],
    },
    Helper {
        symbol: "poweroff_cmd",
        purpose: "it is started to switch the machine off",
        names: &[],
    },
];

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    for helper in &ALL {
        let Some(at) = context.kernel().find_symbol(&[helper.symbol]) else {
            continue;
        };
        findings.looked_at(1);
        let Some(path) = findings.or_note(helper.symbol, context.text(helper.symbol, at, MAX_PATH)) else {
            continue;
        };
        // Empty, none is started.
        if path.is_empty() || is_system(&path, helper.names) {
            continue;
        }
        let finding = Finding::new(
            Severity::Critical,
            helper.symbol,
            format!(
                "the program {} , and it is not one of the system's",
                helper.purpose
            )
            .replace(" ,", ","),
        );
        findings.report(finding.at(at).with(Evidence::value("program", path)));
    }
    let at = context.symbol(&["core_pattern"])?;
    findings.looked_at(1);
    let pattern = context.text("core_pattern", at, MAX_PATH)?;
    let program = pattern.strip_prefix('|').map(str::trim_start);
    let program = program.map(|line| line.split(' ').next().unwrap_or_default());
    if program.is_some_and(|program| !is_system(program, &[])) {
        let finding = Finding::new(
            Severity::Critical,
            "core_pattern",
            "the program is started whenever a process crashes, and it is not one of the system's",
        );
        findings.report(finding.at(at).with(Evidence::value("pattern", pattern)));
    }
    Ok(())
}

fn is_system(path: &str, names: &[&str]) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    SYSTEM.iter().any(|folder| path.starts_with(folder))
        && !path.split('/').any(|part| part == "..")
        && (names.is_empty() || names.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_systems_are_known() {
        for path in [
            "/sbin/modprobe",
            "/usr/bin/modprobe",
            "/run/current-system/sw/bin/modprobe",
        ] {
            assert!(is_system(path, &["modprobe"]), "{path}");
        }
        for path in [
            "/tmp/modprobe",
            "/usr/../tmp/modprobe",
            "modprobe",
            "/bin/sh",
            "/proc/self/exe",
        ] {
            assert!(!is_system(path, &["modprobe"]), "{path}");
        }
        assert!(is_system("/usr/lib/systemd/systemd-coredump", &[]));
    }
}
