//! The kernel's account of itself.

use std::sync::atomic::AtomicBool;

use vmsight_linux::{Info, Kernel};
use vmsight_memory::dump::write::find_vmcoreinfo;

use super::Differences;
use crate::truth::Truth;

/// Compares `Kernel::info` with what /proc, /sys and uname say.
///
/// The guest does not say how far the image was moved, only where it is, nor which page tables it uses; what vmsight gives as
/// evidence is its own.
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
    out.same(
        "cpus_present",
        info.cpus_present,
        Some(said.cpus_present as usize),
    );
    out.same(
        "cpus_possible",
        info.cpus_possible,
        Some(said.cpus_possible as usize),
    );
    out.same("clocksource", info.clocksource.as_ref(), Some(&said.clocksource));
    let lsm = said
        .lsm
        .as_ref()
        .map(|l| l.split(',').map(str::to_owned).collect::<Vec<_>>());
    // The newest of the lab's kernels has no variable any more that holds their names; and a guest without a workload has
    // nothing mounted that would say.
    if lsm.is_some() && kernel.find_symbol(&["lsm_names"]).is_some() {
        out.same("lsm", info.lsm.as_ref(), lsm.as_ref());
    }
    out.same("taint_mask", info.taint_mask, Some(said.tainted));
    out.same("taint", info.taint.as_ref(), Some(&taint(said.tainted)));
    image(&info, truth, &mut out);
    out.same(
        "five levels",
        info.paging.contains("5-level"),
        said.five_level_paging,
    );
    vmcoreinfo(kernel, &info, truth, &mut out)?;
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
    out.near("boot_time", near.contains(&seen), &seen, boot(said_boot));
    // The clock at the last tick, which came after the account and before now.
    let clock = |seconds: u64| {
        let nanoseconds = i64::try_from(seconds).ok()?.checked_mul(1_000_000_000)?;
        vmsight_linux::clock::rfc3339(nanoseconds)
    };
    let (from, to) = (clock(said.now - 1), clock(said.now + 600));
    out.near(
        "time",
        (from..to).contains(&info.time),
        &info.time,
        clock(said.now),
    );
    let uptime = info.uptime_s.unwrap_or(0.0);
    let near = (said.uptime - 1.0..said.uptime + 600.0).contains(&uptime);
    out.near("uptime_s", near, uptime, said.uptime);
    Ok(out)
}

/// The note for a crash: where the guest says that it is, and with what the guest says of itself elsewhere.
fn vmcoreinfo(kernel: &Kernel, info: &Info, truth: &Truth, out: &mut Differences) -> anyhow::Result<()> {
    let said = &truth.system;
    let note = kernel.vmcoreinfo()?;
    let place = said.vmcoreinfo.map(|(address, _)| address);
    out.same("vmcoreinfo", Some(note.physical.0), place);
    let size: usize = note
        .lines
        .iter()
        .map(|(key, value)| key.len() + value.len() + 2)
        .sum();
    let room = said.vmcoreinfo.map_or(0, |(_, size)| size as usize);
    out.near("size of vmcoreinfo", (1024..room).contains(&size), size, room);
    let symbol = |name: &str| {
        let sample = truth.kallsyms.samples.iter().find(|s| s.name == name);
        sample.map(|s| format!("{:x}", s.address))
    };
    for (key, value) in [
        ("OSRELEASE", Some(said.release.clone())),
        ("PAGESIZE", Some(said.page_size.to_string())),
        (
            "KERNELOFFSET",
            info.kaslr_offset.strip_prefix("0x").map(str::to_owned),
        ),
        ("SYMBOL(init_uts_ns)", symbol("init_uts_ns")),
        ("BUILD-ID", Some(said.build_id.clone())),
    ] {
        let mut lines = note.lines.iter().filter(|(k, _)| k == key);
        let line = lines.next().map(|(_, value)| value);
        // What a kernel does not put there, or the guest says nowhere else, cannot be compared.
        if value.is_some() && (line.is_some() || key != "BUILD-ID") {
            out.same(format_args!("{key} in vmcoreinfo"), line, value.as_ref());
        }
    }
    // The search of all memory that `dump` makes finds the same, by other means.
    let found = find_vmcoreinfo(kernel.memory(), &AtomicBool::new(false));
    let lines = note.lines.iter().map(|(key, value)| format!("{key}={value}\n"));
    out.same(
        "text of vmcoreinfo",
        Some(lines.collect::<String>()),
        found.map(|found| found.text),
    );
    Ok(())
}

/// Where the kernel's image is: its symbols say where in virtual memory, `/proc/iomem` says where in physical memory. And how much
/// memory there is: firmware keeps some for itself.
fn image(info: &Info, truth: &Truth, out: &mut Differences) {
    const FIRMWARE: u64 = 16 << 20;
    let text = truth.kallsyms.samples.iter().find(|s| s.name == "_text");
    out.same("text", Some(info.text.0), text.map(|s| s.address));
    let ranges = |name: &'static str| truth.system.iomem.iter().filter(move |r| r.name == name);
    let code = ranges("Kernel code").next().map(|r| format!("{:#x}", r.start));
    out.same("text_physical", Some(&info.text_physical), code.as_ref());
    let ram: u64 = ranges("System RAM").map(|r| r.end + 1 - r.start).sum();
    let seen = info.memory_physical_kb * 1024;
    out.near(
        "memory_physical_kb",
        (ram..ram + FIRMWARE).contains(&seen),
        seen,
        ram,
    );
}

/// The letters of Documentation/admin-guide/tainted-kernels.rst, as far as lab guests can come by them: a module loaded by force,
/// a warning, a module without a signature.
fn taint(mask: u64) -> String {
    let letters = [(1, 'F'), (9, 'W'), (13, 'E')];
    letters
        .iter()
        .filter(|(bit, _)| mask >> bit & 1 == 1)
        .map(|(_, letter)| *letter)
        .collect()
}
