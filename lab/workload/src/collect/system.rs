//! The kernel and the machine; modules, mounts, cgroups and the log.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use vmsight_workload::{
    Cgroup, Container, KmsgRecord, MemoryRange, Module, Mount, MountNamespace, Process, Slabs, System, Text,
};

use super::{files, one_per_namespace};
use crate::roles;

pub(super) fn system() -> Result<System> {
    let uname = nix::sys::utsname::uname()?;
    let stat = files::string("/proc/stat")?;
    let boot_time = stat
        .lines()
        .find_map(|l| l.strip_prefix("btime "))
        .context("no btime in /proc/stat")?;
    let cpus = stat
        .lines()
        .filter(|l| l.starts_with("cpu") && !l.starts_with("cpu "))
        .count();
    let uptime = files::string("/proc/uptime")?;
    let flags = files::string("/proc/cpuinfo")?;
    let configuration = |what| nix::unistd::sysconf(what).ok().flatten().map_or(0, |n| n as u64);
    Ok(System {
        version: files::string("/proc/version")?,
        release: uname.release().to_string_lossy().into_owned(),
        machine: uname.machine().to_string_lossy().into_owned(),
        hostname: uname.nodename().to_string_lossy().into_owned(),
        domainname: uname.domainname().to_string_lossy().into_owned(),
        cmdline: files::string("/proc/cmdline")?,
        boot_time: boot_time.trim().parse()?,
        uptime: uptime.split(' ').next().unwrap_or_default().parse()?,
        now: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs(),
        clock_ticks: configuration(nix::unistd::SysconfVar::CLK_TCK),
        page_size: configuration(nix::unistd::SysconfVar::PAGE_SIZE),
        cpus: u32::try_from(cpus)?,
        cpus_present: cpu_count("present")?,
        cpus_possible: cpu_count("possible")?,
        clocksource: files::string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?,
        lsm: files::string("/sys/kernel/security/lsm").ok(),
        // The kernel takes the flag away when it does not use 5 levels (arch/x86/mm, early paging setup).
        five_level_paging: flags.split_ascii_whitespace().any(|f| f == "la57"),
        tainted: files::string("/proc/sys/kernel/tainted")?.parse()?,
        build_id: files::build_id(&files::bytes("/sys/kernel/notes")?).unwrap_or_default(),
        iomem: String::from_utf8_lossy(&files::bytes("/proc/iomem")?)
            .lines()
            .filter_map(memory_range)
            .collect(),
        slabs: String::from_utf8_lossy(&files::bytes("/proc/slabinfo")?)
            .lines()
            .filter_map(slabs)
            .collect(),
        meminfo: files::string("/proc/meminfo")?
            .lines()
            .filter_map(|l| l.split_once(':'))
            .filter_map(|(name, value)| {
                Some((
                    name.to_owned(),
                    value.trim().trim_end_matches(" kB").parse().ok()?,
                ))
            })
            .collect(),
        swaps: files::string("/proc/swaps")?
            .lines()
            .skip(1)
            .filter_map(|line| {
                let words: Vec<&str> = line.split_ascii_whitespace().collect();
                Some((Text::from(*words.first()?), words.get(2)?.parse().ok()?))
            })
            .collect(),
        module_areas: module_areas()?,
        vmcoreinfo: files::string("/sys/kernel/vmcoreinfo").ok().and_then(|line| {
            let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
            let (address, size) = line.split_once(' ')?;
            Some((number(address)?, number(size)?))
        }),
    })
}

/// How many CPUs a list such as `0-3,8` names.
fn cpu_count(list: &str) -> Result<u32> {
    let text = files::string(format!("/sys/devices/system/cpu/{list}"))?;
    cpus_in(&text).with_context(|| format!("'{text}' is no list of CPUs"))
}

fn cpus_in(list: &str) -> Option<u32> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            (last.parse::<u32>().ok()? + 1).checked_sub(first.parse().ok()?)
        })
        .sum()
}

/// The areas of the kernel's memory in the top 2 GiB.
///
/// The file is read in pieces, each from the area of some number on: where one before that was given back meanwhile, another is left out. So it
/// is read until it says the same twice.
fn module_areas() -> Result<Vec<(u64, u64)>> {
    let read = || -> Result<Vec<(u64, u64)>> {
        let text = files::bytes("/proc/vmallocinfo")?;
        let areas = String::from_utf8_lossy(&text);
        let areas = areas.lines().filter_map(area);
        Ok(areas
            .filter(|(start, _)| *start >= 0xffff_ffff_8000_0000)
            .collect())
    };
    let mut last = read()?;
    for _ in 0..100 {
        let again = read()?;
        if again == last {
            return Ok(last);
        }
        last = again;
    }
    bail!("/proc/vmallocinfo says something else each time")
}

/// A line of /proc/vmallocinfo: `0xSTART-0xEND size caller …`.
fn area(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let address = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    Some((address(start)?, address(end)?))
}

/// A line of /proc/slabinfo: `name active objects size per-slab pages : tunables … : slabdata active-slabs slabs shared`. The lines
/// of the head have words where numbers are.
fn slabs(line: &str) -> Option<Slabs> {
    let (name, numbers) = line.split_once(' ')?;
    let words: Vec<&str> = numbers.split_ascii_whitespace().collect();
    let number = |nth: usize| words.get(nth)?.parse::<u64>().ok();
    let small = |nth: usize| number(nth).and_then(|n| u32::try_from(n).ok());
    let of_slabs = words.iter().position(|word| *word == "slabdata")?;
    Some(Slabs {
        name: name.into(),
        active: number(0)?,
        objects: number(1)?,
        size: small(2)?,
        objects_per_slab: small(3)?,
        pages_per_slab: small(4)?,
        slabs: number(of_slabs + 2)?,
    })
}

fn memory_range(line: &str) -> Option<MemoryRange> {
    let (range, name) = line.split_once(" : ")?;
    let (start, end) = range.trim().split_once('-')?;
    Some(MemoryRange {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        name: name.to_owned(),
        depth: u32::try_from(range.len() - range.trim_start().len()).ok()? / 2,
    })
}

pub(super) fn modules() -> Result<Vec<Module>> {
    let arguments = crate::modules::arguments()?;
    files::string("/proc/modules")?
        .lines()
        .map(|line| {
            let mut module = module(line).with_context(|| format!("module '{line}'"))?;
            module.arguments = arguments.get(&module.name).cloned().unwrap_or_default();
            Ok(module)
        })
        .collect()
}

/// `name size refs users state address (taint)`
fn module(line: &str) -> Result<Module> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    let name = word(0).to_owned();
    let at = format!("/sys/module/{name}");
    let parameters = each(&format!("{at}/parameters"))
        .into_iter()
        // Some can only be written.
        .filter_map(|(name, path)| {
            let value = files::bytes(path).ok()?;
            Some((name, Text::from(value.strip_suffix(b"\n").unwrap_or(&value))))
        })
        .collect();
    let sections = each(&format!("{at}/sections"))
        .into_iter()
        .filter_map(|(name, path)| {
            let value = files::string(path).ok()?;
            Some((
                name,
                u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()?,
            ))
        })
        .collect();
    Ok(Module {
        size: word(1).parse()?,
        refs: word(2).parse().unwrap_or(-1),
        used_by: word(3)
            .split(',')
            .filter(|m| !matches!(*m, "" | "-" | "[permanent]"))
            .map(str::to_owned)
            .collect(),
        permanent: word(3).contains("[permanent]"),
        state: word(4).to_owned(),
        address: u64::from_str_radix(word(5).trim_start_matches("0x"), 16)?,
        taint: word(6).trim_matches(['(', ')']).to_owned(),
        version: files::string(format!("{at}/version")).unwrap_or_default(),
        srcversion: files::string(format!("{at}/srcversion")).unwrap_or_default(),
        arguments: String::new(),
        parameters,
        sections,
        build_id: files::bytes(format!("{at}/notes/.note.gnu.build-id"))
            .ok()
            .and_then(|notes| files::build_id(&notes))
            .unwrap_or_default(),
        name,
    })
}

/// The files in a folder by name; none where there is no such folder.
fn each(folder: &str) -> BTreeMap<String, String> {
    let names = files::names(folder).unwrap_or_default();
    names
        .iter()
        .filter_map(|n| n.to_str())
        .map(|n| (n.to_owned(), format!("{folder}/{n}")))
        .collect()
}

pub(super) fn mounts(processes: &[Process]) -> Result<Vec<MountNamespace>> {
    let mut found = Vec::new();
    // A process that has changed its root sees only what is below it.
    for (inode, process) in
        one_per_namespace(processes, "mnt", |p| p.root.as_ref().is_some_and(|r| *r == "/"))
    {
        let raw = files::bytes(format!("/proc/{}/mountinfo", process.pid))?;
        let mounts = raw
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| mount(line).with_context(|| format!("mount '{}'", String::from_utf8_lossy(line))))
            .collect::<Result<_>>()?;
        found.push(MountNamespace {
            inode,
            pid: process.pid,
            mounts,
        });
    }
    Ok(found)
}

/// `id parent major:minor root point options [propagation…] - type source super-options`
fn mount(line: &[u8]) -> Result<Mount> {
    let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let raw = |at: usize| words.get(at).copied().unwrap_or_default();
    let string = |at: usize| String::from_utf8_lossy(raw(at)).into_owned();
    let text = |at: usize| Text(files::unescape_octal(raw(at)));
    let dash = words
        .iter()
        .skip(6)
        .position(|w| *w == b"-")
        .context("no separator")?
        + 6;
    let dev = string(2);
    let (major, minor) = dev.split_once(':').context("no device")?;
    Ok(Mount {
        id: string(0).parse()?,
        parent: string(1).parse()?,
        dev: (major.parse()?, minor.parse()?),
        root: text(3),
        mount_point: text(4),
        options: string(5),
        propagation: (6..dash).map(string).collect(),
        fstype: text(dash + 1),
        source: text(dash + 2),
        super_options: text(dash + 3),
    })
}

pub(super) fn kmsg() -> Result<Vec<KmsgRecord>> {
    let mut device = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut records = Vec::new();
    let mut buffer = vec![0u8; 16 << 10];
    loop {
        match device.read(&mut buffer) {
            Ok(0) => return Ok(records),
            Ok(length) => records.push(kmsg_record(&buffer[..length]).context("a record of /dev/kmsg")?),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(records),
            // Overwritten while being read: go on with the next one.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) => return Err(error).context("read /dev/kmsg"),
        }
    }
}

/// `priority,sequence,time,flags[,…];text\n` and then ` KEY=value\n` lines.
fn kmsg_record(raw: &[u8]) -> Option<KmsgRecord> {
    let semicolon = raw.iter().position(|b| *b == b';')?;
    let head = std::str::from_utf8(&raw[..semicolon]).ok()?;
    let mut head = head.split(',');
    let priority: u32 = head.next()?.parse().ok()?;
    let mut lines = raw[semicolon + 1..].split(|b| *b == b'\n');
    Some(KmsgRecord {
        seq: head.next()?.parse().ok()?,
        time_us: head.next()?.parse().ok()?,
        level: (priority & 7) as u8,
        facility: priority >> 3,
        text: Text(files::unescape_hex(lines.next()?)),
        dict: lines
            .filter_map(|line| line.strip_prefix(b" "))
            .map(|line| Text(files::unescape_hex(line)))
            .collect(),
    })
}

pub(super) fn cgroups() -> Result<Vec<Cgroup>> {
    let top = Path::new("/sys/fs/cgroup");
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    let mut open = vec![top.to_path_buf()];
    while let Some(folder) = open.pop() {
        let below = folder.strip_prefix(top)?.as_os_str();
        found.push(Cgroup {
            path: Text([b"/", below.as_bytes()].concat()),
            inode: folder.metadata()?.ino(),
            threads: files::lines(folder.join("cgroup.threads"))?
                .iter()
                .filter(|tid| **tid != own.as_str())
                .count() as u64,
        });
        for name in files::names(&folder)? {
            let path = folder.join(&name);
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// The containers that were made, and who is in them.
pub(super) fn containers() -> Result<Vec<Container>> {
    roles::containers()
        .into_iter()
        .filter(|(_, _, cgroup)| Path::new(&format!("/sys/fs/cgroup{cgroup}")).exists())
        .map(|(runtime, id, cgroup)| {
            let pids = files::string(format!("/sys/fs/cgroup{cgroup}/cgroup.procs"))?;
            Ok(Container {
                id,
                runtime: runtime.to_owned(),
                cgroup: Text::from(cgroup.as_str()),
                pids: pids.lines().map(str::parse).collect::<Result<_, _>>()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_with_odd_names() {
        let line =
            b"40 24 0:35 /sub /mnt/a\\040b rw,nosuid shared:3 master:1 - tmpfs my\\011source rw,size=1k";
        let mount = mount(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.dev), (40, 24, (0, 35)));
        assert_eq!(mount.mount_point, "/mnt/a b");
        assert_eq!(mount.propagation, ["shared:3", "master:1"]);
        assert_eq!(
            (mount.fstype, mount.source),
            (Text::from("tmpfs"), Text::from("my\tsource"))
        );
    }

    #[test]
    fn a_log_record_with_a_dictionary() {
        let record = kmsg_record(b"12,345,6789,-;odd \\x1b[31m\n SUBSYSTEM=pci\n DEVICE=+pci:0\n").unwrap();
        assert_eq!(
            (record.level, record.facility, record.seq, record.time_us),
            (4, 1, 345, 6789)
        );
        assert_eq!(record.text.bytes(), b"odd \x1b[31m");
        assert_eq!(
            record.dict,
            [Text::from("SUBSYSTEM=pci"), Text::from("DEVICE=+pci:0")]
        );
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(cpus_in("0"), Some(1));
        assert_eq!(cpus_in("0-3,8,10-11"), Some(7));
        assert_eq!(cpus_in("3-0"), None);
    }

    #[test]
    fn an_area_of_kernel_memory() {
        let line =
            "0xffffffffc0000000-0xffffffffc0005000   20480 move_module+0x2a/0x1d0 pages=4 vmalloc N0=4";
        assert_eq!(area(line), Some((0xffff_ffff_c000_0000, 0xffff_ffff_c000_5000)));
        assert_eq!(area("hashed"), None);
    }

    #[test]
    fn memory_ranges_have_a_depth() {
        let range = memory_range("  0bc00000-0ca01d31 : Kernel code").unwrap();
        assert_eq!((range.start, range.end, range.depth), (0xbc0_0000, 0xca0_1d31, 1));
        assert_eq!(range.name, "Kernel code");
    }
}
