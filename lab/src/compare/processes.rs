//! Processes.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::{Kernel, ProcessFields};

use super::times::{self, Used};
use super::{Differences, spelt};
use crate::truth::{self, Text, Truth};

/// Compares `Kernel::processes` with `/proc/PID/{stat,status,cmdline,environ,exe,cwd,root,ns,cgroup}`, and the containers with what
/// the workload has made.
pub fn processes(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.processes(ProcessFields::all())?;
    out.complaints("processes", &listing.warnings);
    let rows: BTreeMap<i32, &vmsight_linux::Process> = listing.rows.iter().map(|r| (r.pid, r)).collect();
    out.same("pids that come twice", listing.rows.len() - rows.len(), 0);
    let passed = times::passed(kernel, truth);
    for said in truth.processes.iter().filter(|p| !p.is_transient()) {
        match rows.get(&i32::try_from(said.pid)?) {
            Some(row) => {
                one_process(row, said, &mut out);
                container(row, truth, &mut out);
                times(row, said, truth, passed, &mut out);
            }
            None => out.differs(format!("no process {} ({})", said.pid, said.task_comm())),
        }
    }
    if !truth.processes.iter().any(|p| p.paged_out.is_some()) {
        out.differs("no process has its arguments paged out");
    }
    for pid in &truth.sleepers {
        let row = rows.get(&i32::try_from(*pid)?);
        out.same(format!("sleeper {pid}"), row.map(|r| r.state), Some('S'));
    }
    let said = truth.processes.iter().map(|p| p.pid);
    let known: BTreeSet<u32> = said.chain(truth.sleepers.iter().copied()).collect();
    for row in listing.rows.iter().filter(|r| !known.contains(&(r.pid as u32))) {
        // Kernel workers come and go.
        if !(row.kernel_thread && row.name.starts_with("kworker/")) {
            out.differs(format!(
                "process {} ({}), which the guest does not know",
                row.pid, row.name
            ));
        }
    }
    Ok(out)
}

fn one_process(row: &vmsight_linux::Process, said: &truth::Process, out: &mut Differences) {
    let details = row.details();
    let at = |field: &str| format!("{field} of {} ({})", said.pid, said.task_comm());
    out.same(at("name"), row.name.as_str(), said.task_comm().as_str());
    out.same(at("ppid"), row.ppid, i32::try_from(said.ppid).ok());
    out.same(at("tgid"), row.tgid, row.pid);
    out.same(at("pgrp"), details.pgrp.map(i64::from), Some(said.pgrp));
    out.same(at("sid"), details.sid.map(i64::from), Some(said.sid));
    let ns_pids: Option<Vec<u32>> = details
        .ns_pids
        .as_ref()
        .map(|p| p.iter().map(|&n| n as u32).collect());
    out.same(at("ns_pids"), ns_pids.as_ref(), Some(&said.ns_pids));
    out.same(
        at("ns_pid"),
        details.ns_pid.map(|n| n as u32),
        Some(said.ns_pid()),
    );
    out.same(at("kernel_thread"), row.kernel_thread, said.kthread);
    if !said.kthread {
        out.same(at("state"), row.state, said.state);
    }
    out.same(at("start_ticks"), row.start_ticks, Some(said.start_ticks));
    out.same(at("nice"), details.nice.map(i64::from), Some(said.nice));
    out.same(
        at("priority"),
        details.priority.map(i64::from),
        Some(said.priority),
    );
    out.same(at("rt_priority"), details.rt_priority, Some(said.rt_priority));
    out.same(at("policy"), details.policy, policy(said.policy));
    out.same(
        at("oom_score_adj"),
        details.oom_score_adj.map(i32::from),
        Some(said.oom_score_adj),
    );
    out.same(
        at("threads"),
        row.threads.map(|n| n as usize),
        Some(said.threads.len()),
    );
    out.same(at("tty"), details.tty.clone(), terminal(said.tty_nr));
    out.same(at("seccomp"), details.seccomp, Some(said.seccomp));
    out.same(
        at("seccomp_filters"),
        details.seccomp_filters,
        Some(said.seccomp_filters),
    );
    out.same(at("no_new_privs"), details.no_new_privs, Some(said.no_new_privs));
    credentials(&at, row, &said.creds, out);
    for (field, seen, said) in [
        ("exe", &details.exe, &said.exe),
        ("cwd", &details.cwd, &said.cwd),
        ("root", &details.root, &said.root),
    ] {
        out.same(at(field), seen.as_deref(), said.as_ref().map(spelt).as_deref());
    }
    for (kind, seen) in [
        ("cgroup", details.cgroup_ns),
        ("ipc", details.ipc_ns),
        ("mnt", details.mnt_ns),
        ("net", details.net_ns),
        ("pid", details.pid_ns),
        ("time", details.time_ns),
        ("user", details.user_ns),
        ("uts", details.uts_ns),
    ] {
        if let Some(&said) = said.namespaces.get(kind) {
            out.same(at(&format!("{kind}_ns")), seen.map(u64::from), Some(said));
        }
    }
    out.same(
        at("cgroup"),
        details.cgroup.as_deref(),
        Some(spelt(&said.cgroup).as_str()),
    );
    let lines: Vec<String> = said.cgroups.iter().map(spelt).collect();
    out.same(at("cgroups"), details.cgroups.as_deref(), Some(&lines[..]));
    strings(&at, row, said, out);
    match &said.vm {
        Some(vm) => sizes(&at, row, vm, said, out),
        None => {
            out.same(at("argv"), row.argv.as_ref(), None);
            out.same(at("vm_size_kb"), details.vm_size_kb, None);
        }
    }
}

/// The strings of a row, if it has them.
fn all(strings: Option<&[impl ToString]>) -> Option<Vec<String>> {
    strings.map(|strings| strings.iter().map(ToString::to_string).collect())
}

/// Arguments and environment, which lie in the process's own memory. The workload has the whole pages of one process's arguments paged
/// out after its account was taken: of these what comes before is shown, and why there is no more. Nothing else may be missing.
fn strings(
    at: &dyn Fn(&str) -> String,
    row: &vmsight_linux::Process,
    said: &truth::Process,
    out: &mut Differences,
) {
    let (argv, reason) = match (said.paged_out, &said.vm) {
        (Some((start, _)), Some(vm)) => {
            let bytes = joined(&said.cmdline);
            let before = usize::try_from(start - vm.arg_start).unwrap_or(usize::MAX);
            let shown = bytes.get(..before).unwrap_or_default();
            let pieces = shown.strip_suffix(b"\0").unwrap_or(shown).split(|b| *b == 0);
            if shown.is_empty() {
                (None, Some("paged out".to_owned()))
            } else {
                let argv = pieces.map(vmsight_linux::text::guest_text).collect();
                let reason = format!("cut after {before} of {} bytes: paged out", bytes.len());
                (Some(argv), Some(reason))
            }
        }
        (_, vm) => {
            let argv: Vec<String> = said.cmdline.iter().map(spelt).collect();
            (vm.is_some().then_some(argv), None)
        }
    };
    let seen: Vec<String> = row.problems.iter().map(ToString::to_string).collect();
    // Of every field that is not whole.
    let fields = ["argv", "cmdline"].into_iter();
    let missing: Vec<String> = reason
        .iter()
        .flat_map(|reason| fields.clone().map(move |field| format!("{field}: {reason}")))
        .collect();
    out.same(at("problems"), seen, missing);
    let cmdline = argv.as_ref().map(|argv| argv.join(" "));
    out.same(at("argv"), all(row.argv.as_deref()), argv);
    out.same(at("cmdline"), row.cmdline.as_deref(), cmdline.as_deref());
    let environ: Vec<String> = said.environ.iter().map(spelt).collect();
    let environ = said.vm.is_some().then_some(environ);
    out.same(at("environ"), all(row.details().environ.as_deref()), environ);
}

/// Strings as they lie in memory, each with its NUL.
fn joined(strings: &[Text]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in strings {
        bytes.extend_from_slice(text.bytes());
        bytes.push(0);
    }
    bytes
}

fn container(row: &vmsight_linux::Process, truth: &Truth, out: &mut Differences) {
    let details = row.details();
    let pid = row.pid as u32;
    let said = truth.containers.iter().find(|c| c.pids.contains(&pid));
    let at = |field: &str| format!("{field} of {} ({})", row.pid, row.name);
    out.same(at("container"), details.container.as_ref(), said.map(|c| &c.id));
    out.same(
        at("container_runtime"),
        details.container_runtime.as_ref(),
        said.map(|c| &c.runtime),
    );
}

fn times(
    row: &vmsight_linux::Process,
    said: &truth::Process,
    truth: &Truth,
    passed: u64,
    out: &mut Differences,
) {
    let details = row.details();
    let at = |field: &str| format!("{field} of {} ({})", said.pid, said.task_comm());
    times::start(&at, row.start_time.as_deref(), said.start_ticks, truth, out);
    let seen = Used {
        user: details.utime_ticks.unwrap_or(u64::MAX),
        system: details.stime_ticks.unwrap_or(u64::MAX),
    };
    let account = Used {
        user: said.utime_ticks,
        system: said.stime_ticks,
    };
    times::used(&at, seen, account, times::may_run(said).then_some(passed), out);
    if let Some(leader) = said.threads.first().filter(|_| !times::may_run(said)) {
        out.same(at("cpu"), details.cpu, Some(leader.cpu));
    }
}

fn credentials(
    at: &dyn Fn(&str) -> String,
    row: &vmsight_linux::Process,
    said: &truth::Credentials,
    out: &mut Differences,
) {
    let details = row.details();
    out.same(
        at("uids"),
        [row.uid, row.euid, row.suid, row.fsuid],
        said.uids.map(Some),
    );
    out.same(
        at("gids"),
        [row.gid, row.egid, row.sgid, row.fsgid],
        said.gids.map(Some),
    );
    out.same(at("groups"), details.groups.as_ref(), Some(&said.groups));
    out.same(
        at("cap_inheritable"),
        details.cap_inheritable,
        Some(said.cap_inheritable),
    );
    out.same(
        at("cap_permitted"),
        details.cap_permitted,
        Some(said.cap_permitted),
    );
    out.same(
        at("cap_effective"),
        details.cap_effective,
        Some(said.cap_effective),
    );
    out.same(at("cap_bounding"), details.cap_bounding, Some(said.cap_bounding));
    out.same(at("cap_ambient"), details.cap_ambient, Some(said.cap_ambient));
}

fn sizes(
    at: &dyn Fn(&str) -> String,
    row: &vmsight_linux::Process,
    vm: &truth::VmSizes,
    said: &truth::Process,
    out: &mut Differences,
) {
    let details = row.details();
    out.same(at("vm_size_kb"), details.vm_size_kb, Some(vm.size));
    out.same(at("vm_data_kb"), details.vm_data_kb, Some(vm.data));
    out.same(at("vm_stack_kb"), details.vm_stack_kb, Some(vm.stack));
    // /proc divides it between the executable and all else, by the addresses of the code.
    out.same(at("vm_exec_kb"), details.vm_exec_kb, Some(vm.exe + vm.lib));
    // What /proc says lags by up to a batch of 64 pages for each counter and CPU (6.2 on) or thread (before); and what was paged out
    // afterwards moves from one of our numbers to the other.
    let slack = 4 * 4 * 64 * said.threads.len().max(2) as u64;
    let (resident, swapped) = (details.vm_rss_kb.unwrap_or(0), details.vm_swap_kb.unwrap_or(0));
    let (seen, account) = (resident + swapped, vm.rss + vm.swap);
    out.near(
        at("vm_rss_kb + vm_swap_kb"),
        seen.abs_diff(account) <= slack,
        seen,
        account,
    );
    if let Some((start, end)) = said.paged_out {
        let kb = (end - start) / 1024;
        out.near(at("vm_swap_kb"), swapped >= kb, swapped, kb);
    }
}

/// A scheduling policy by its number (include/uapi/linux/sched.h).
pub(super) fn policy(number: u32) -> Option<&'static str> {
    let names = ["normal", "fifo", "rr", "batch", "", "idle", "deadline", "ext"];
    names.get(number as usize).copied()
}

/// The name of a terminal by its number in /proc/PID/stat.
fn terminal(number: i64) -> Option<String> {
    let (major, minor) = (
        (number >> 8) & 0xfff,
        (number & 0xff) | ((number >> 12) & 0xfff00),
    );
    match major {
        0 => None,
        4 if minor >= 64 => Some(format!("ttyS{}", minor - 64)),
        4 => Some(format!("tty{minor}")),
        136..=143 => Some(format!("pts/{}", (major - 136) * 256 + minor)),
        _ => Some(format!("{major}:{minor}")),
    }
}
