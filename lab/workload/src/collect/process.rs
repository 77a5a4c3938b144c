//! Processes, out of /proc/PID.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use vmsight_workload::{Credentials, Fd, KernelStack, Map, Process, Text, Thread, VmSizes};

use super::{SLEEPER, files, memory};

/// `PF_KTHREAD`, include/linux/sched.h.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Every process but this one, and the pids of the sleepers.
pub(super) fn all() -> Result<(Vec<Process>, Vec<u32>)> {
    let (mut processes, mut sleepers) = (Vec::new(), Vec::new());
    for pid in files::numbers("/proc")? {
        if pid == std::process::id() {
            continue;
        }
        match one(pid) {
            Ok(process) if process.comm == SLEEPER => sleepers.push(pid),
            Ok(process) => processes.push(process),
            // A kernel worker that has just ended; anything else makes the caller try again.
            Err(_) if !std::path::Path::new(&format!("/proc/{pid}")).exists() => {}
            Err(error) => return Err(error.context(format!("pid {pid}"))),
        }
    }
    Ok((processes, sleepers))
}

/// The fields of a `stat` file after the name, from the state on (field 3 of proc(5)), and the name.
pub(super) struct Stat {
    pub(super) comm: Text,
    fields: Vec<String>,
}

impl Stat {
    pub(super) fn read(path: &str) -> Result<Stat> {
        let raw = files::bytes(path)?;
        let open = raw
            .iter()
            .position(|b| *b == b'(')
            .context("stat without a name")?;
        let close = raw
            .iter()
            .rposition(|b| *b == b')')
            .context("stat without a name")?;
        let rest = String::from_utf8_lossy(&raw[close + 1..]).into_owned();
        Ok(Stat {
            comm: Text::from(&raw[open + 1..close]),
            fields: rest.split_ascii_whitespace().map(str::to_owned).collect(),
        })
    }

    /// Field `number` as proc(5) counts them.
    pub(super) fn get<T: std::str::FromStr>(&self, number: usize) -> Result<T> {
        let field = self
            .fields
            .get(number - 3)
            .with_context(|| format!("stat has no field {number}"))?;
        field
            .parse()
            .ok()
            .with_context(|| format!("stat field {number} is '{field}'"))
    }
}

/// `Name:\tvalue` lines.
pub(super) fn status(path: &str) -> Result<BTreeMap<String, String>> {
    let text = String::from_utf8_lossy(&files::bytes(path)?).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect())
}

fn one(pid: u32) -> Result<Process> {
    let at = format!("/proc/{pid}");
    let stat = Stat::read(&format!("{at}/stat"))?;
    if stat.comm == SLEEPER {
        return Ok(Process {
            pid,
            comm: stat.comm,
            ..Process::default()
        });
    }
    let status = status(&format!("{at}/status"))?;
    let field = |name: &str| status.get(name).map(String::as_str).unwrap_or_default();
    let numbers = |name: &str| {
        field(name)
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect::<Vec<u32>>()
    };
    let flags: u32 = stat.get(9)?;
    let kthread = flags & PF_KTHREAD != 0;
    let fds = fds(&at)?;
    let (cwd, root) = (
        files::link(format!("{at}/cwd")),
        files::link(format!("{at}/root")),
    );
    Ok(Process {
        pid,
        ns_pids: numbers("NSpid"),
        ppid: stat.get(4)?,
        pgrp: stat.get(5)?,
        sid: stat.get(6)?,
        cmdline: strings(&files::bytes(format!("{at}/cmdline"))?),
        environ: strings(&files::bytes(format!("{at}/environ")).unwrap_or_default()),
        exe: files::link(format!("{at}/exe")),
        creds: credentials(&status)?,
        seccomp: field("Seccomp").parse().unwrap_or_default(),
        seccomp_filters: field("Seccomp_filters").parse().unwrap_or_default(),
        no_new_privs: field("NoNewPrivs") == "1",
        state: stat.get(3)?,
        start_ticks: stat.get(22)?,
        nice: stat.get(19)?,
        priority: stat.get(18)?,
        rt_priority: stat.get(40)?,
        policy: stat.get(41)?,
        flags,
        utime_ticks: stat.get(14)?,
        stime_ticks: stat.get(15)?,
        tty_nr: stat.get(7)?,
        tpgid: stat.get(8)?,
        tracer: field("TracerPid").parse().unwrap_or_default(),
        umask: u32::from_str_radix(field("Umask"), 8).ok(),
        oom_score_adj: files::string(format!("{at}/oom_score_adj"))?.parse()?,
        login_uid: files::string(format!("{at}/loginuid"))
            .ok()
            .and_then(|s| s.parse().ok())
            .unwrap_or(u32::MAX),
        kthread,
        vm: if status.contains_key("VmSize") {
            Some(vm(&status, &stat)?)
        } else {
            None
        },
        namespaces: namespaces(&at)?,
        cgroup: cgroup(&at)?,
        cgroups: files::lines(format!("{at}/cgroup"))?,
        threads: threads(&at, (&cwd, &root), &fds)?,
        maps: maps(&at)?,
        frames: if field("VmLck").starts_with(|c: char| matches!(c, '1'..='9')) {
            memory::frames(pid)?
        } else {
            Vec::new()
        },
        fds,
        cwd,
        root,
        comm: Text(
            files::bytes(format!("{at}/comm"))?
                .strip_suffix(b"\n")
                .unwrap_or_default()
                .to_vec(),
        ),
        paged_out: None,
    })
}

/// Splits at NUL; the last one ends the last string.
pub(super) fn strings(raw: &[u8]) -> Vec<Text> {
    if raw.is_empty() {
        return Vec::new();
    }
    raw.strip_suffix(b"\0")
        .unwrap_or(raw)
        .split(|b| *b == 0)
        .map(Text::from)
        .collect()
}

fn credentials(status: &BTreeMap<String, String>) -> Result<Credentials> {
    let line = |name: &str| status.get(name).with_context(|| format!("no {name} in status"));
    let four = |name: &str| -> Result<[u32; 4]> {
        let ids: Vec<u32> = line(name)?
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        ids.try_into()
            .ok()
            .with_context(|| format!("{name} is not four numbers"))
    };
    let caps = |name: &str| -> Result<u64> { Ok(u64::from_str_radix(line(name)?, 16)?) };
    Ok(Credentials {
        uids: four("Uid")?,
        gids: four("Gid")?,
        groups: line("Groups")?
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect(),
        cap_inheritable: caps("CapInh")?,
        cap_permitted: caps("CapPrm")?,
        cap_effective: caps("CapEff")?,
        cap_bounding: caps("CapBnd")?,
        cap_ambient: caps("CapAmb")?,
    })
}

fn vm(status: &BTreeMap<String, String>, stat: &Stat) -> Result<VmSizes> {
    let kib = |name: &str| -> u64 {
        let text = status.get(name).map(String::as_str).unwrap_or_default();
        text.trim_end_matches("kB").trim().parse().unwrap_or_default()
    };
    Ok(VmSizes {
        peak: kib("VmPeak"),
        size: kib("VmSize"),
        locked: kib("VmLck"),
        rss_peak: kib("VmHWM"),
        rss: kib("VmRSS"),
        rss_anon: kib("RssAnon"),
        rss_file: kib("RssFile"),
        rss_shmem: kib("RssShmem"),
        data: kib("VmData"),
        stack: kib("VmStk"),
        exe: kib("VmExe"),
        lib: kib("VmLib"),
        pte: kib("VmPTE"),
        swap: kib("VmSwap"),
        start_code: stat.get(26)?,
        end_code: stat.get(27)?,
        start_stack: stat.get(28)?,
        start_data: stat.get(45)?,
        end_data: stat.get(46)?,
        start_brk: stat.get(47)?,
        arg_start: stat.get(48)?,
        arg_end: stat.get(49)?,
        env_start: stat.get(50)?,
        env_end: stat.get(51)?,
    })
}

fn namespaces(at: &str) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for name in files::names(format!("{at}/ns"))? {
        let name = name.to_string_lossy().into_owned();
        // `net:[4026531840]`; no link at all in a zombie.
        let Some(target) = files::link(format!("{at}/ns/{name}")) else {
            continue;
        };
        let target = target.lossy();
        let inode = target
            .split_once('[')
            .and_then(|(_, rest)| rest.trim_end_matches(']').parse().ok());
        found.insert(name, inode.with_context(|| format!("namespace link '{target}'"))?);
    }
    Ok(found)
}

fn cgroup(at: &str) -> Result<Text> {
    let raw = files::bytes(format!("{at}/cgroup"))?;
    let unified = raw
        .split(|b| *b == b'\n')
        .find_map(|line| line.strip_prefix(b"0::"));
    Ok(Text::from(unified.unwrap_or_default()))
}

/// The threads; their directories and open files where they are not the leader's.
fn threads(at: &str, places: (&Option<Text>, &Option<Text>), leaders: &[Fd]) -> Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for tid in files::numbers(format!("{at}/task"))? {
        let at = format!("{at}/task/{tid}");
        let stat = Stat::read(&format!("{at}/stat"))?;
        let comm = files::bytes(format!("{at}/comm"))?;
        let (cwd, root) = (
            files::link(format!("{at}/cwd")),
            files::link(format!("{at}/root")),
        );
        let elsewhere = (&cwd, &root) != places;
        let own = fds(&at)?;
        let same = |(a, b): (&Fd, &Fd)| {
            (a.fd, &a.link, a.flags, a.pos, a.inode) == (b.fd, &b.link, b.flags, b.pos, b.inode)
        };
        let shared = own.len() == leaders.len() && own.iter().zip(leaders).all(same);
        threads.push(Thread {
            tid,
            comm: Text::from(comm.strip_suffix(b"\n").unwrap_or(&comm)),
            state: stat.get(3)?,
            start_ticks: stat.get(22)?,
            nice: stat.get(19)?,
            priority: stat.get(18)?,
            policy: stat.get(41)?,
            cpu: stat.get(39)?,
            utime_ticks: stat.get(14)?,
            stime_ticks: stat.get(15)?,
            cwd: cwd.filter(|_| elsewhere),
            root: root.filter(|_| elsewhere),
            fds: if shared { Vec::new() } else { own },
            stack: kernel_stack(&at),
        });
    }
    Ok(threads)
}

/// What it is doing, and how often it was switched away from. Both are the same before and after, or it ran meanwhile.
fn sleep(at: &str) -> Option<(String, u64)> {
    let mut status = status(&format!("{at}/status")).ok()?;
    let count = |name: &str| status.get(name)?.parse::<u64>().ok();
    let switches = count("voluntary_ctxt_switches")? + count("nonvoluntary_ctxt_switches")?;
    let state = status.remove("State")?;
    (!state.starts_with('R')).then_some((state, switches))
}

fn kernel_stack(at: &str) -> Option<KernelStack> {
    let before = sleep(at)?;
    let text = files::bytes(format!("{at}/stack")).ok()?;
    (sleep(at)? == before).then(|| KernelStack {
        switches: before.1,
        frames: String::from_utf8_lossy(&text)
            .lines()
            .map(|line| line.trim_start_matches("[<0>]").trim().to_owned())
            .collect(),
    })
}

fn maps(at: &str) -> Result<Vec<Map>> {
    let raw = files::bytes(format!("{at}/maps"))?;
    raw.split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .map(map)
        .collect()
}

/// One line: `start-end perms offset major:minor inode    path`, where the path may hold spaces.
fn map(line: &[u8]) -> Result<Map> {
    let mut rest = line;
    let mut word = || -> Result<String> {
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let word = String::from_utf8_lossy(&rest[..end]).into_owned();
        rest = rest.get(end + 1..).unwrap_or_default();
        Ok(word)
    };
    let (range, perms, offset, dev, inode) = (word()?, word()?, word()?, word()?, word()?);
    let blanks = rest.iter().take_while(|b| **b == b' ').count();
    let (start, end) = range.split_once('-').context("mapping without a range")?;
    let (major, minor) = dev.split_once(':').context("mapping without a device")?;
    Ok(Map {
        start: u64::from_str_radix(start, 16)?,
        end: u64::from_str_radix(end, 16)?,
        perms,
        offset: u64::from_str_radix(&offset, 16)?,
        dev: (u32::from_str_radix(major, 16)?, u32::from_str_radix(minor, 16)?),
        inode: inode.parse()?,
        path: Text::from(&rest[blanks..]),
    })
}

fn fds(at: &str) -> Result<Vec<Fd>> {
    let mut found = Vec::new();
    for number in files::numbers(format!("{at}/fd"))? {
        found.push(fd(at, number).with_context(|| format!("fd {number}"))?);
    }
    Ok(found)
}

fn fd(at: &str, number: u32) -> Result<Fd> {
    let path = format!("{at}/fd/{number}");
    let link = files::link(&path).context("its link cannot be read")?;
    let stat = nix::sys::stat::stat(path.as_str())?;
    let split = |dev: u64| {
        (
            nix::sys::stat::major(dev) as u32,
            nix::sys::stat::minor(dev) as u32,
        )
    };
    let mut fd = Fd {
        fd: number,
        link,
        dev: split(stat.st_dev),
        inode: stat.st_ino,
        mode: stat.st_mode,
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        links: stat.st_nlink,
        uid: stat.st_uid,
        rdev: split(stat.st_rdev),
        ..Fd::default()
    };
    let info = String::from_utf8_lossy(&files::bytes(format!("{at}/fdinfo/{number}"))?).into_owned();
    for line in info.lines() {
        match line.split_once(":\t") {
            Some(("pos", value)) => fd.pos = value.trim().parse()?,
            Some(("flags", value)) => fd.flags = u32::from_str_radix(value.trim(), 8)?,
            Some(("mnt_id", value)) => fd.mnt_id = value.trim().parse()?,
            Some(("ino", _)) => {}
            _ => fd.details.push(line.to_owned()),
        }
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_keep_their_empty_ones() {
        assert_eq!(
            strings(b"a\0\0b\0"),
            [Text::from("a"), Text::from(""), Text::from("b")]
        );
        assert!(strings(b"").is_empty());
        assert_eq!(strings(b"\0"), [Text::from("")]);
        assert_eq!(strings(b"title"), [Text::from("title")]);
    }

    #[test]
    fn a_mapping_line_with_blanks_in_its_path() {
        let map = map(b"7f00000000-7f00001000 rw-s 0002a000 00:1f 42                     /tmp/a b (deleted)")
            .unwrap();
        assert_eq!(
            (map.start, map.end, map.offset),
            (0x7f_0000_0000, 0x7f_0000_1000, 0x2a000)
        );
        assert_eq!((map.dev, map.inode), ((0, 31), 42));
        assert_eq!(map.path, "/tmp/a b (deleted)");
    }

    #[test]
    fn a_process_of_the_host_reads_well() {
        // Not our own, whose other tests open and close files meanwhile.
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let cmdline = format!("/proc/{}/cmdline", child.id());
        while files::bytes(&cmdline).is_ok_and(|line| line != b"sleep\x00100\0") {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let process = one(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        let process = process.unwrap();
        assert_eq!((process.pid, process.ppid), (child.id(), std::process::id()));
        assert_eq!(process.cmdline, [Text::from("sleep"), Text::from("100")]);
        assert!(!process.kthread && !process.maps.is_empty() && process.threads.len() == 1);
        assert_eq!(process.fd(0).map(|fd| fd.fd), Some(0));
        assert_eq!(process.vm.as_ref().map(|vm| vm.size > 0), Some(true));
    }
}
