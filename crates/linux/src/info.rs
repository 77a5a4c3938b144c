//! What a kernel says of itself and its machine, cheaply read.

use std::sync::Arc;

use serde::Serialize;
use vmsight_arch::{Dtb, Gva};

use crate::clock::{Clock, SECOND, rfc3339};
use crate::layout::{Place, layout};
use crate::listing::address;
use crate::percpu::cpu_mask;
use crate::{Kernel, LinuxError, Vmcoreinfo};

layout! {
    /// `struct uts_namespace`.
    struct UtsNamespaceLayout = "uts_namespace" {
        hostname: Place = "name.nodename",
        domainname: Place = "name.domainname",
        machine: Place = "name.machine",
    }
}

/// The longest kernel command line: COMMAND_LINE_SIZE is 2048 on x86 and arm64, and boot configurations may add to it.
const MAX_CMDLINE: usize = 64 << 10;

/// A guest at a glance. `None` where the kernel does not say, or not readably; `problems` tells the latter.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// As `uname -r`.
    pub release: String,
    /// `linux_banner`.
    pub banner: String,
    /// The GNU build-id in hex.
    pub build_id: Option<String>,
    /// As `uname -m`.
    pub machine: Option<String>,
    /// The initial UTS namespace's host name.
    pub hostname: Option<String>,
    /// Its NIS domain name, where one is set.
    pub domainname: Option<String>,
    /// Run-time address of the image's start (`_text`).
    #[serde(serialize_with = "address::gva")]
    pub text: Gva,
    /// The same in physical memory.
    pub text_physical: String,
    /// How far KASLR moved the image in virtual memory.
    pub kaslr_offset: String,
    /// How virtual addresses are translated.
    pub paging: String,
    /// The kernel's own top-level page table.
    pub dtb: String,
    /// When the guest booted, by its own wall clock.
    pub boot_time: Option<String>,
    /// Its wall clock at the last tick.
    pub time: Option<String>,
    /// Seconds since boot at the last tick.
    pub uptime_s: Option<f64>,
    /// Where its time comes from.
    pub clocksource: Option<String>,
    /// CPUs that run.
    pub cpus_online: Option<usize>,
    /// CPUs that are there.
    pub cpus_present: Option<usize>,
    /// CPUs that room was made for.
    pub cpus_possible: Option<usize>,
    /// Memory that the guest's kernel manages (MemTotal of /proc/meminfo), KiB.
    pub memory_total_kb: Option<u64>,
    /// Memory that the machine has, as the target says, KiB.
    pub memory_physical_kb: u64,
    /// The command line that the kernel was booted with.
    pub cmdline: Option<String>,
    /// Why the kernel is tainted, as the letters of /proc/sys/kernel/tainted's documentation; empty where it is not.
    pub taint: Option<String>,
    /// The number in /proc/sys/kernel/tainted.
    pub taint_mask: Option<u64>,
    /// Security modules in force, in order.
    pub lsm: Option<Vec<String>>,
    /// What the kernel keeps ready about itself for a crash; `None` where it keeps nothing.
    pub vmcoreinfo: Option<Vmcoreinfo>,
    /// Why this is believed to be the running kernel.
    pub evidence: Vec<String>,
    /// What could not be read.
    pub problems: Vec<String>,
}

impl Kernel {
    /// What the kernel says of itself.
    pub fn info(&self) -> Info {
        let mut problems = Vec::new();
        let clock = note(&mut problems, "boot_time", Clock::read(self));
        let uts = note(&mut problems, "hostname", self.uts());
        let image = self.image();
        let Dtb(dtb) = image.dtb;
        let taint_mask = note(&mut problems, "taint", self.number("tainted_mask"));
        Info {
            release: self.release().to_owned(),
            banner: self.profile().banner.clone(),
            build_id: self.profile().build_id.as_deref().map(hex),
            machine: uts.as_ref().map(|u| u.machine.clone()),
            domainname: uts
                .as_ref()
                .map(|u| u.domainname.clone())
                .filter(|d| !d.is_empty() && d != "(none)"),
            hostname: uts.map(|u| u.hostname),
            text: image.text,
            text_physical: image.phys.to_string(),
            kaslr_offset: format!("{:#x}", image.slide),
            paging: image.mode.to_string(),
            dtb: format!("{dtb:#x}"),
            boot_time: clock.as_ref().and_then(|c| rfc3339(c.boot)),
            time: clock
                .as_ref()
                .and_then(|c| rfc3339(c.boot.checked_add(c.uptime)?)),
            uptime_s: clock.as_ref().map(|c| c.uptime as f64 / SECOND as f64),
            clocksource: clock.and_then(|c| c.source),
            cpus_online: note(&mut problems, "cpus_online", cpu_mask(self, "__cpu_online_mask"))
                .map(|c| c.len()),
            cpus_present: note(
                &mut problems,
                "cpus_present",
                cpu_mask(self, "__cpu_present_mask"),
            )
            .map(|c| c.len()),
            cpus_possible: note(
                &mut problems,
                "cpus_possible",
                cpu_mask(self, "__cpu_possible_mask"),
            )
            .map(|c| c.len()),
            memory_total_kb: note(&mut problems, "memory_total_kb", self.number("_totalram_pages"))
                .map(|p| p.saturating_mul(4)),
            memory_physical_kb: self.memory().size() / 1024,
            cmdline: note(&mut problems, "cmdline", self.boot_text("saved_command_line")),
            taint: taint_mask.map(taint_letters),
            taint_mask,
            lsm: self.security_modules(),
            vmcoreinfo: match self.vmcoreinfo() {
                Err(LinuxError::NoSymbol { .. } | LinuxError::NotFound(_)) => None,
                read => note(&mut problems, "vmcoreinfo", read),
            },
            evidence: image.evidence.clone(),
            problems,
        }
    }

    fn uts(&self) -> Result<Uts, LinuxError> {
        let layout: Arc<UtsNamespaceLayout> = self.layout()?;
        let at = self.symbol("init_uts_ns")?;
        let text = |place: &Place| {
            let mut bytes = vec![0u8; place.size().min(256) as usize];
            self.space()
                .read(place.at(at), &mut bytes)
                .map_err(LinuxError::read("init_uts_ns", at))?;
            Ok::<_, LinuxError>(crate::text::guest_array_text(&bytes))
        };
        Ok(Uts {
            hostname: text(&layout.hostname)?,
            domainname: text(&layout.domainname)?,
            machine: text(&layout.machine)?,
        })
    }

    /// A variable of 8 bytes.
    fn number(&self, symbol: &str) -> Result<u64, LinuxError> {
        let at = self.symbol(symbol)?;
        self.space().read_u64(at).map_err(LinuxError::read(symbol, at))
    }

    /// The string that a `char *` variable points to.
    fn boot_text(&self, symbol: &str) -> Result<String, LinuxError> {
        let at = self.symbol_pointer(symbol)?;
        let text = self.text(at, MAX_CMDLINE).map_err(LinuxError::read(symbol, at))?;
        Ok(text.trim_end_matches('\n').to_owned())
    }

    /// The list of active security modules (`lsm_names`, gone from some builds: then `None`).
    fn security_modules(&self) -> Option<Vec<String>> {
        let names = self.boot_text("lsm_names").ok()?;
        Some(
            names
                .split(',')
                .filter(|n| !n.is_empty())
                .map(str::to_owned)
                .collect(),
        )
    }
}

struct Uts {
    hostname: String,
    domainname: String,
    machine: String,
}

fn note<T>(problems: &mut Vec<String>, field: &str, result: Result<T, LinuxError>) -> Option<T> {
    result
        .map_err(|error| problems.push(format!("{field}: {error}")))
        .ok()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The letters of the taint flags by bit (Documentation/admin-guide/tainted-kernels.rst).
pub(crate) fn taint_letters(mask: u64) -> String {
    const LETTERS: &[u8] = b"PFSRMBUDAWCIOELKXTNJ";
    (0..64)
        .filter(|bit| mask >> bit & 1 == 1)
        .map(|bit| LETTERS.get(bit).map_or('?', |&letter| char::from(letter)))
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn taint_has_its_letters() {
        assert_eq!(super::taint_letters(0), "");
        assert_eq!(super::taint_letters(1 << 12 | 1 << 13), "OE");
        assert_eq!(super::taint_letters(1 << 63), "?");
    }
}
