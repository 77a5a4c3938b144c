//! What processes may do, and whether the kernel has given it to them.

use std::collections::BTreeMap;

use vmsight_arch::Gva;
use vmsight_linux::{LinuxError, Process, ProcessFields};

use crate::{Check, Context, Evidence, Finding, Findings, Object, Severity, Technique};

/// See [`Check`].
pub(crate) const CREDENTIALS: Check = Check {
    name: "credentials",
    summary: "Processes have the rights that the kernel itself would have given them",
    compares: "the user id in each process's cred with that of the user it is accounted to; its capabilities \
               with each other; creds that several processes share; the kernel's own cred; root processes with \
               their parents",
    why: "Whoever can write to the kernel's memory makes a process root by changing its cred, or by giving it \
          another's.",
    techniques: &[Technique::PRIVILEGE_ESCALATION],
    blind_spots: &[
        "A cred that was made by commit_creds(prepare_kernel_cred()): it is as whole as one that was come by honestly.",
        "Rights that a process had and gave back.",
    ],
    run,
};

/// A program was executed with the rights of its file's owner: its file has this bit (`S_ISUID`).
const SET_USER_ID: u64 = 0o4000;
/// Processes that are named as sharing a cred.
const SHOWN: usize = 8;

fn run(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let kernel = context.kernel();
    let listing = kernel.processes(ProcessFields::CREDENTIALS | ProcessFields::EXE)?;
    for warning in listing.warnings {
        findings.note(warning);
    }
    let processes = listing.rows;
    let initial = kernel.find_symbol(&["init_user_ns"]);
    let by_pid: BTreeMap<i32, &Process> = processes.iter().map(|p| (p.pid, p)).collect();
    let mut holders: BTreeMap<Gva, Vec<&Process>> = BTreeMap::new();
    let real = kernel.offset("task_struct", "real_cred")?;
    for process in &processes {
        findings.looked_at(1);
        let Ok(at) = context.pointer("real_cred", process.task.wrapping_add(real)) else {
            continue;
        };
        holders.entry(at).or_default().push(process);
        let Ok(cred) = context.object("cred", at) else {
            continue;
        };
        // What cannot be read says nothing.
        let _ = user(findings, process, &cred);
        let _ = capabilities(findings, process, &cred);
        if cred.pointer("user_ns").ok() == initial {
            let _ = raised(context, findings, process, &by_pid, &cred);
        }
    }
    for (at, shared) in holders.iter().filter(|(_, shared)| shared.len() > 1) {
        sharing(context, findings, *at, shared);
    }
    initial_cred(context, findings)
}

fn subject(process: &Process) -> String {
    format!("process {} ({})", process.pid, process.name)
}

fn ids(cred: &Object<'_>) -> Result<Evidence, LinuxError> {
    Ok(Evidence::value(
        "uid, euid, suid, fsuid",
        format_args!(
            "{}, {}, {}, {}",
            cred.number("uid.val")?,
            cred.number("euid.val")?,
            cred.number("suid.val")?,
            cred.number("fsuid.val")?
        ),
    ))
}

/// The kernel changes a cred's user id and the user that it is accounted to together (`set_user`, kernel/sys.c).
fn user(findings: &mut Findings, process: &Process, cred: &Object<'_>) -> Result<(), LinuxError> {
    let uid = cred.number("uid.val")?;
    let at = cred.pointer("user")?;
    let accounted = cred.of("user_struct", at)?.number("uid.val")?;
    if uid == accounted {
        return Ok(());
    }
    let finding = Finding::new(
        Severity::Critical,
        subject(process),
        format!(
            "its user id is {uid}, but the kernel accounts for it as user {accounted}: the cred was written to"
        ),
    );
    findings.report(
        finding
            .at(cred.address())
            .with(ids(cred)?)
            .with(Evidence::value("accounted to user", accounted))
            .with(capability_evidence(cred)?),
    );
    Ok(())
}

fn capability_evidence(cred: &Object<'_>) -> Result<Evidence, LinuxError> {
    Ok(Evidence::value(
        "capabilities (effective, permitted, ambient)",
        format_args!(
            "{:#x}, {:#x}, {:#x}",
            set(cred, "cap_effective")?,
            set(cred, "cap_permitted")?,
            set(cred, "cap_ambient")?
        ),
    ))
}

/// A set of capabilities: two words of 32 bits up to 6.2, one of 64 since 6.3.
fn set(cred: &Object<'_>, name: &str) -> Result<u64, LinuxError> {
    if cred.has(&format!("{name}.cap")) {
        let low = cred.number(&format!("{name}.cap[0]"))?;
        return Ok(low | cred.number(&format!("{name}.cap[1]"))? << 32);
    }
    cred.number(&format!("{name}.val"))
}

/// What the kernel keeps true of every cred (`cap_capset`, `cap_bprm_creds_from_file`; security/commoncap.c).
fn capabilities(findings: &mut Findings, process: &Process, cred: &Object<'_>) -> Result<(), LinuxError> {
    let (effective, permitted) = (set(cred, "cap_effective")?, set(cred, "cap_permitted")?);
    let (ambient, inheritable) = (set(cred, "cap_ambient")?, set(cred, "cap_inheritable")?);
    let wrong = if effective & !permitted != 0 {
        "it has capabilities in effect that it is not permitted"
    } else if ambient & !(permitted & inheritable) != 0 {
        "it has ambient capabilities that it is not permitted, or that are not inheritable"
    } else {
        return Ok(());
    };
    let finding = Finding::new(
        Severity::High,
        format!("capabilities of {}", subject(process)),
        format!("{wrong}: the kernel allows no such cred"),
    );
    findings.report(
        finding
            .at(cred.address())
            .with(ids(cred)?)
            .with(capability_evidence(cred)?),
    );
    Ok(())
}

/// A root process whose parent is not root, and whose program has no set-user-id bit.
fn raised(
    context: &Context,
    findings: &mut Findings,
    process: &Process,
    by_pid: &BTreeMap<i32, &Process>,
    cred: &Object<'_>,
) -> Result<(), LinuxError> {
    if process.kernel_thread || process.euid != Some(0) {
        return Ok(());
    }
    let parent = process.ppid.and_then(|pid| by_pid.get(&pid));
    let Some(parent) = parent.filter(|p| {
        [p.uid, p.euid, p.suid]
            .iter()
            .all(|id| id.is_some_and(|id| id != 0))
    }) else {
        return Ok(());
    };
    let mm = context.object("task_struct", process.task)?.pointer("mm")?;
    if mm.is_null() {
        return Ok(());
    }
    let file = context.object("mm_struct", mm)?.pointer("exe_file")?;
    let inode = context.object("file", file)?.pointer("f_inode")?;
    let mode = context.object("inode", inode)?.number("i_mode")?;
    if mode & SET_USER_ID != 0 {
        return Ok(());
    }
    let finding = Finding::new(
        Severity::Info,
        format!("root below a user: {}", subject(process)),
        "it is root, its parent is not, and its program has no set-user-id bit: started by one that has (pkexec, doas), or raised",
    );
    findings.report(
        finding
            .at(cred.address())
            .with(ids(cred)?)
            .with(Evidence::value("parent", subject(parent)))
            .with(Evidence::value(
                "program",
                process.details().exe.as_deref().unwrap_or("?"),
            ))
            .with(Evidence::value("mode of its file", format_args!("{mode:o}"))),
    );
    Ok(())
}

/// fork(2) gives each process a cred of its own; only threads share (`copy_creds`, kernel/cred.c).
fn sharing(context: &Context, findings: &mut Findings, at: Gva, holders: &[&Process]) {
    let names: Vec<String> = holders.iter().take(SHOWN).map(|p| subject(p)).collect();
    let youngest = holders.iter().rfind(|p| !p.kernel_thread).or(holders.last());
    let finding = Finding::new(
        Severity::Critical,
        format!("cred of {}", youngest.map_or_else(String::new, |p| subject(p))),
        "several processes have one and the same cred: one was given another's",
    );
    findings.report(
        finding
            .at(at)
            .with(Evidence::value("shared by", names.join(", ")))
            .with(Evidence::value("how many share it", holders.len()))
            .with(context.evidence("cred", at)),
    );
}

/// The cred that the kernel itself starts with, and that processes are given who are to have all rights.
fn initial_cred(context: &Context, findings: &mut Findings) -> Result<(), LinuxError> {
    let init = context.object("task_struct", context.symbol(&["init_task"])?)?;
    let (real, acting) = (init.pointer("real_cred")?, init.pointer("cred")?);
    let Some(built_in) = context.kernel().find_symbol(&["init_cred"]) else {
        return Ok(());
    };
    findings.looked_at(1);
    if real != built_in || acting != built_in {
        let finding = Finding::new(
            Severity::High,
            "cred of init_task",
            "the kernel's first task has another cred than the one that it was built with",
        );
        findings.report(
            finding
                .at(init.address())
                .with(context.evidence("real_cred", real))
                .with(context.evidence("cred", acting)),
        );
    }
    let cred = context.object("cred", built_in)?;
    let mut odd = Vec::new();
    for id in ["uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"] {
        if cred.number(&format!("{id}.val"))? != 0 {
            odd.push(id);
        }
    }
    if set(&cred, "cap_effective")? != set(&cred, "cap_permitted")? {
        odd.push("cap_effective");
    }
    // A process with this very cred is told of by who shares it; this one is shared with the first task, which is in no list.
    let kernel = context.kernel();
    let offset = kernel.offset("task_struct", "real_cred")?;
    for process in kernel.processes(ProcessFields::empty())?.rows {
        let has = context
            .pointer("real_cred", process.task.wrapping_add(offset))
            .ok()
            == Some(built_in);
        if has {
            let finding = Finding::new(
                Severity::Critical,
                format!("cred of {}", subject(&process)),
                "the process has the kernel's own cred: it was given to it",
            );
            findings.report(finding.at(built_in).with(context.evidence("cred", built_in)));
        }
    }
    if !odd.is_empty() {
        let finding = Finding::new(
            Severity::High,
            "init_cred",
            format!("the kernel's own cred was changed: {}", odd.join(", ")),
        );
        findings.report(
            finding
                .at(built_in)
                .with(ids(&cred)?)
                .with(capability_evidence(&cred)?),
        );
    }
    Ok(())
}
