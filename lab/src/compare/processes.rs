//! Processes, threads, mappings, control groups and the kernel's own account of itself.

use std::collections::{BTreeMap, BTreeSet};

use vmsight_linux::{Kernel, Mapping, ProcessFields, Thread};

use super::{Differences, spelt};
use crate::truth::{self, Truth};

/// Compares `Kernel::processes` with `/proc/PID/{stat,status,cmdline,environ,exe,cwd,root,ns,cgroup}`.
pub fn processes(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.processes(ProcessFields::all())?;
    out.complaints("processes", &listing.warnings);
    let rows: BTreeMap<i32, &vmsight_linux::Process> = listing.rows.iter().map(|r| (r.pid, r)).collect();
    out.same("pids that come twice", listing.rows.len() - rows.len(), 0);
    for said in truth.processes.iter().filter(|p| !p.is_transient()) {
        match rows.get(&i32::try_from(said.pid)?) {
            Some(row) => one_process(row, said, &mut out),
            None => out.differs(format!("no process {} ({})", said.pid, said.task_comm())),
        }
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
    let at = |field: &str| format!("{field} of {} ({})", said.pid, said.task_comm());
    let paged_out = |field: &str| {
        row.problems
            .iter()
            .any(|p| p.field == field && p.reason.contains("paged out"))
    };
    for problem in &row.problems {
        // The workload has some of its memory paged out after its account was taken.
        if !(said.paged_out.is_some() && problem.reason.contains("paged out")) {
            out.differs(format!("{}: vmsight complains: {problem}", at("row")));
        }
    }
    out.same(at("name"), row.name.as_str(), said.task_comm().as_str());
    out.same(at("ppid"), row.ppid, i32::try_from(said.ppid).ok());
    out.same(at("tgid"), row.tgid, row.pid);
    out.same(at("pgrp"), row.pgrp.map(i64::from), Some(said.pgrp));
    out.same(at("sid"), row.sid.map(i64::from), Some(said.sid));
    let ns_pids: Option<Vec<u32>> = row
        .ns_pids
        .as_ref()
        .map(|p| p.iter().map(|&n| n as u32).collect());
    out.same(at("ns_pids"), ns_pids.as_ref(), Some(&said.ns_pids));
    out.same(at("ns_pid"), row.ns_pid.map(|n| n as u32), Some(said.ns_pid()));
    out.same(at("kernel_thread"), row.kernel_thread, said.kthread);
    if !said.kthread {
        out.same(at("state"), row.state, said.state);
    }
    out.same(at("start_ticks"), row.start_ticks, Some(said.start_ticks));
    out.same(at("nice"), row.nice.map(i64::from), Some(said.nice));
    out.same(at("priority"), row.priority.map(i64::from), Some(said.priority));
    out.same(at("rt_priority"), row.rt_priority, Some(said.rt_priority));
    let policies = ["normal", "fifo", "rr", "batch", "", "idle", "deadline", "ext"];
    out.same(
        at("policy"),
        row.policy,
        policies.get(said.policy as usize).copied(),
    );
    out.same(
        at("oom_score_adj"),
        row.oom_score_adj.map(i32::from),
        Some(said.oom_score_adj),
    );
    out.same(
        at("threads"),
        row.threads.map(|n| n as usize),
        Some(said.threads.len()),
    );
    out.same(at("tty"), row.tty.clone(), terminal(said.tty_nr));
    out.same(at("seccomp"), row.seccomp, Some(said.seccomp));
    out.same(
        at("seccomp_filters"),
        row.seccomp_filters,
        Some(said.seccomp_filters),
    );
    out.same(at("no_new_privs"), row.no_new_privs, Some(said.no_new_privs));
    credentials(&at, row, &said.creds, out);
    for (field, seen, said) in [
        ("exe", &row.exe, &said.exe),
        ("cwd", &row.cwd, &said.cwd),
        ("root", &row.root, &said.root),
    ] {
        out.same(at(field), seen.as_deref(), said.as_ref().map(spelt).as_deref());
    }
    for (kind, seen) in [
        ("cgroup", row.cgroup_ns),
        ("ipc", row.ipc_ns),
        ("mnt", row.mnt_ns),
        ("net", row.net_ns),
        ("pid", row.pid_ns),
        ("time", row.time_ns),
        ("user", row.user_ns),
        ("uts", row.uts_ns),
    ] {
        if let Some(&said) = said.namespaces.get(kind) {
            out.same(at(&format!("{kind}_ns")), seen.map(u64::from), Some(said));
        }
    }
    out.same(
        at("cgroup"),
        row.cgroup.as_deref(),
        Some(spelt(&said.cgroup).as_str()),
    );
    if !paged_out("cmdline") {
        let cmdline: Vec<String> = said.cmdline.iter().map(spelt).collect();
        out.same(at("argv"), row.argv.clone().unwrap_or_default(), cmdline);
    }
    if !paged_out("environ") && said.vm.is_some() {
        let environ: Vec<String> = said.environ.iter().map(spelt).collect();
        out.same(at("environ"), row.environ.clone().unwrap_or_default(), environ);
    }
    match &said.vm {
        Some(vm) => sizes(&at, row, vm, said, out),
        None => out.same(at("argv"), row.argv.as_ref(), None::<&Vec<String>>),
    }
}

fn credentials(
    at: &dyn Fn(&str) -> String,
    row: &vmsight_linux::Process,
    said: &truth::Credentials,
    out: &mut Differences,
) {
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
    out.same(at("groups"), row.groups.as_ref(), Some(&said.groups));
    out.same(
        at("cap_inheritable"),
        row.cap_inheritable,
        Some(said.cap_inheritable),
    );
    out.same(at("cap_permitted"), row.cap_permitted, Some(said.cap_permitted));
    out.same(at("cap_effective"), row.cap_effective, Some(said.cap_effective));
    out.same(at("cap_bounding"), row.cap_bounding, Some(said.cap_bounding));
    out.same(at("cap_ambient"), row.cap_ambient, Some(said.cap_ambient));
}

fn sizes(
    at: &dyn Fn(&str) -> String,
    row: &vmsight_linux::Process,
    vm: &truth::VmSizes,
    said: &truth::Process,
    out: &mut Differences,
) {
    out.same(at("vm_size_kb"), row.vm_size_kb, Some(vm.size));
    out.same(at("vm_data_kb"), row.vm_data_kb, Some(vm.data));
    out.same(at("vm_stack_kb"), row.vm_stack_kb, Some(vm.stack));
    // What /proc says lags by up to a batch of 64 pages for each counter and CPU (6.2 on) or thread (before); and what was paged out
    // afterwards moves from one of our numbers to the other.
    let slack = 4 * 4 * 64 * said.threads.len().max(2) as u64;
    let (resident, swapped) = (row.vm_rss_kb.unwrap_or(0), row.vm_swap_kb.unwrap_or(0));
    if (resident + swapped).abs_diff(vm.rss + vm.swap) > slack {
        out.same(at("vm_rss_kb + vm_swap_kb"), resident + swapped, vm.rss + vm.swap);
    }
    if let Some((start, end)) = said.paged_out
        && swapped < (end - start) / 1024
    {
        let kb = (end - start) / 1024;
        out.differs(format!(
            "{}: {swapped}, although {kb} KiB were paged out",
            at("vm_swap_kb")
        ));
    }
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

/// Compares `Kernel::threads` with `/proc/PID/task`.
pub fn threads(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.threads(None)?;
    out.complaints("threads", &listing.warnings);
    let mut by_pid: BTreeMap<i32, Vec<&Thread>> = BTreeMap::new();
    for row in &listing.rows {
        by_pid.entry(row.pid).or_default().push(row);
        out.complaints(&format!("thread {}", row.tid), &row.problems);
    }
    for said in truth.processes.iter().filter(|p| !p.is_transient()) {
        let rows = by_pid
            .get(&i32::try_from(said.pid)?)
            .map_or(&[][..], Vec::as_slice);
        let at = |field: &str| format!("{field} of the threads of {} ({})", said.pid, said.task_comm());
        let seen: BTreeSet<u32> = rows.iter().map(|r| r.tid as u32).collect();
        out.same(
            at("tid"),
            seen,
            said.threads.iter().map(|t| t.tid).collect::<BTreeSet<_>>(),
        );
        for thread in &said.threads {
            let Some(row) = rows.iter().find(|r| r.tid as u32 == thread.tid) else {
                continue;
            };
            if !said.kthread {
                out.same(at("name"), row.name.clone(), spelt(&thread.comm));
                out.same(at("state"), row.state, thread.state);
            }
            out.same(at("start_ticks"), row.start_ticks, thread.start_ticks);
            out.same(at("nice"), i64::from(row.nice), thread.nice);
        }
    }
    Ok(out)
}

/// Compares `Kernel::maps` of every process with `/proc/PID/maps`.
pub fn maps(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    for said in truth.processes.iter().filter(|p| p.vm.is_some()) {
        let listing = kernel.maps(i32::try_from(said.pid)?)?;
        let at = |what: &str| format!("{what} of {} ({})", said.pid, said.task_comm());
        out.complaints(&at("mappings"), &listing.warnings);
        for row in &listing.rows {
            // What Linux itself cannot name: a path of more than a page.
            if row.path.as_ref().is_none_or(|p| p.len() < 4096) {
                out.complaints(&at("mapping"), &row.problems);
            }
        }
        out.same(at("number of mappings"), listing.rows.len(), said.maps.len());
        for (row, said) in listing.rows.iter().zip(&said.maps) {
            let place = format!("{} at {:#x}", at("mapping"), said.start);
            out.same(
                format!("{place}, bounds"),
                (row.start.0, row.end.0),
                (said.start, said.end),
            );
            out.same(format!("{place}, permissions"), &row.perms, &said.perms);
            out.same(format!("{place}, offset"), row.offset, said.offset);
            out.same(format!("{place}, device"), device(row), Some(said.dev));
            out.same(format!("{place}, inode"), row.inode, said.inode);
            let path = row.path.as_deref().unwrap_or_default().replace('\n', "\\012");
            out.same(format!("{place}, path"), path, spelt(&said.path));
        }
    }
    Ok(out)
}

fn device(row: &Mapping) -> Option<(u32, u32)> {
    let (major, minor) = row.device.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    Some((number(major)?, number(minor)?))
}

/// Compares `Kernel::cgroups` with the directories of the unified hierarchy.
pub fn cgroups(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let listing = kernel.cgroups()?;
    out.complaints("cgroups", &listing.warnings);
    for row in &listing.rows {
        out.complaints(&format!("cgroup {}", row.path), &row.problems);
    }
    let unified = || listing.rows.iter().filter(|r| r.hierarchy == 0);
    let seen: BTreeSet<String> = unified().map(|r| r.path.clone()).collect();
    out.same("cgroups", seen, truth.cgroups.iter().map(spelt).collect());
    let tasks: u64 = unified().filter_map(|r| r.tasks).sum();
    let threads: usize = truth.processes.iter().map(|p| p.threads.len()).sum();
    let said = (threads + truth.sleepers.len()) as u64;
    // Kernel workers come and go.
    if tasks.abs_diff(said) > 16 {
        out.same("tasks in all cgroups", tasks, said);
    }
    Ok(out)
}

/// Compares `Kernel::info` with what /proc and uname say.
pub fn info(kernel: &Kernel, truth: &Truth) -> anyhow::Result<Differences> {
    let mut out = Differences::default();
    let (info, said) = (kernel.info(), &truth.system);
    out.complaints("info", &info.problems);
    out.same("release", &info.release, &said.release);
    out.same("banner", info.banner.trim(), said.version.trim());
    out.same("build_id", info.build_id.as_ref(), Some(&said.build_id));
    out.same("machine", info.machine.as_ref(), Some(&said.machine));
    out.same("hostname", info.hostname.as_ref(), Some(&said.hostname));
    let domain = Some(said.domainname.as_str()).filter(|d| *d != "(none)");
    out.same("domainname", info.domainname.as_deref(), domain);
    out.same(
        "cmdline",
        info.cmdline.as_deref().map(str::trim),
        Some(said.cmdline.trim()),
    );
    out.same("cpus_online", info.cpus_online, Some(said.cpus as usize));
    out.same("taint_mask", info.taint_mask, Some(said.tainted));
    out.same(
        "five levels",
        info.paging.contains("5-level"),
        said.five_level_paging,
    );
    out.same(
        "memory_total_kb",
        info.memory_total_kb,
        said.meminfo.get("MemTotal").copied(),
    );
    // btime is cut to whole seconds, and the offset it is made from is adjusted while the guest runs.
    let boot = |nanoseconds: i64| vmsight_linux::clock::rfc3339(nanoseconds).map(|t| t[..19].to_owned());
    let said_boot = i64::try_from(said.boot_time)? * 1_000_000_000;
    let near = [said_boot - 1_000_000_000, said_boot, said_boot + 1_000_000_000].map(boot);
    let seen = info.boot_time.as_ref().map(|t| t[..19].to_owned());
    if !near.contains(&seen) {
        out.same("boot_time", seen, boot(said_boot));
    }
    let uptime = info.uptime_s.unwrap_or(0.0);
    if !(said.uptime - 1.0..said.uptime + 600.0).contains(&uptime) {
        out.same("uptime_s", uptime, said.uptime);
    }
    Ok(out)
}
