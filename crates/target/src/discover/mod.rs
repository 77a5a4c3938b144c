//! `list`: every virtual machine of this host, from `/proc` and the sockets only.
//!
//! Nothing is connected to and no process is stopped. A process's owner writes its command line, so what
//! comes from there is what the owner says; the kernel's own words (descriptors, mappings, threads, owner,
//! start time) go before it.

mod evidence;
mod info;
mod microvm;
pub(crate) mod qemu;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub use info::{Control, ControlKind, Manager, Problem, SharedMemory, VmInfo, Vmm};

use crate::host::process::{self, Process};
use crate::host::sockets::{NetTables, Wanted};
use qemu::{QemuConfig, is_system_emulator};

/// Every virtual machine on this host that can be seen from here, ordered by pid.
///
/// # Errors
/// `/proc` itself cannot be read. What cannot be read of single processes costs only the fields in question:
/// they are `None` and [`VmInfo::problems`] says why.
pub fn list() -> io::Result<Vec<VmInfo>> {
    let mut tables = NetTables::new(Wanted::All);
    Ok(machines()?
        .iter()
        .map(|machine| machine.describe(&mut tables))
        .collect())
}

/// What one process is, if it is a virtual machine.
#[must_use]
pub fn describe(pid: u32) -> Option<VmInfo> {
    Some(identify(Process { pid }, &kvm_holders())?.describe(&mut NetTables::new(Wanted::All)))
}

/// [`describe`] without what only people want to know: TCP sockets cost milliseconds.
pub(crate) fn describe_to_attach(pid: u32) -> Option<VmInfo> {
    let process = Process { pid };
    // A machine's program is known by its name, as a rule.
    let machine = identify(process, &BTreeSet::new()).or_else(|| identify(process, &kvm_holders()))?;
    Some(machine.describe(&mut NetTables::new(Wanted::Unix)))
}

/// The longest configuration file that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// The first machine whose process is the one that is looked for.
pub(crate) fn find(is_it: impl Fn(u32) -> bool) -> Option<VmInfo> {
    let machine = machines().ok()?.into_iter().find(|m| is_it(m.process.pid))?;
    Some(machine.describe(&mut NetTables::new(Wanted::Unix)))
}

/// The QEMU that waits for its first client at the QMP socket `path` and makes its machine when that comes.
pub(crate) fn waiting_at(path: &Path) -> Option<u32> {
    let file = |path: &Path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let wanted = file(path)?;
    // Of a host's processes few are a QEMU at all, and of those hardly one waits: which of two is meant is asked of such only.
    let may_wait = |process: Process| {
        identify(process, &BTreeSet::new()).is_some_and(|machine| match machine.command_line() {
            CommandLine::Qemu(config, _) => config.waits_for_qmp,
            CommandLine::MicroVm(_) | CommandLine::Unknown => false,
        })
    };
    if !process::all().ok()?.into_iter().any(may_wait) {
        return None;
    }
    let waits = |machine: &Machine| {
        let CommandLine::Qemu(config, _) = machine.command_line() else {
            return false;
        };
        config.waits_for_qmp
            && has_no_machine_yet(machine.process)
            && config.monitors.iter().any(|monitor| match &monitor.endpoint {
                qemu::Endpoint::Unix { path, .. } => {
                    file(&machine.process.own_path(Path::new(path))) == Some(wanted)
                }
                _ => false,
            })
    };
    machines()
        .ok()?
        .into_iter()
        .filter(|machine| machine.vmm == Vmm::Qemu)
        .find(waits)
        .map(|machine| machine.process.pid)
}

/// A QEMU that waits for its first client has its main thread and one more, and makes the machine when somebody connects.
pub(crate) fn has_no_machine_yet(process: Process) -> bool {
    process.thread_names().map_or(0, |t| t.len()) <= 2
}

/// What a name means here.
pub(crate) enum Named {
    /// The machines that have it.
    Machines(Vec<VmInfo>),
    /// None has it: the pid and name of those that are there.
    Nothing(Vec<(u32, Option<String>)>),
}

/// The machines called `name` by their name, UUID or number at their manager.
pub(crate) fn named(name: &str) -> io::Result<Named> {
    let all: Vec<(Machine, CommandLine)> = machines()?
        .into_iter()
        .map(|machine| {
            let line = machine.command_line();
            (machine, line)
        })
        .collect();
    let mut tables = NetTables::new(Wanted::Unix);
    let matching: Vec<VmInfo> = all
        .iter()
        .filter(|(_, line)| {
            let uuid = line.uuid().is_some_and(|u| u.eq_ignore_ascii_case(name));
            uuid || line.name() == Some(name) || line.id() == Some(name)
        })
        .map(|(machine, _)| machine.describe(&mut tables))
        .collect();
    if matching.is_empty() {
        let known = all
            .iter()
            .map(|(m, line)| (m.process.pid, line.name().map(str::to_owned)));
        return Ok(Named::Nothing(known.collect()));
    }
    Ok(Named::Machines(matching))
}

/// A process that runs a machine, before anything is asked of it.
struct Machine {
    process: Process,
    vmm: Vmm,
    program: String,
    comm: String,
    args: Vec<String>,
}

/// A command line that was understood.
enum CommandLine {
    Qemu(Box<QemuConfig>, Option<String>),
    MicroVm(microvm::MicroVm),
    Unknown,
}

impl CommandLine {
    fn name(&self) -> Option<&str> {
        match self {
            Self::Qemu(config, _) => config.name.as_deref(),
            Self::MicroVm(machine) => machine.name.as_deref(),
            Self::Unknown => None,
        }
    }

    /// Proxmox's number of the machine.
    fn id(&self) -> Option<&str> {
        match self {
            Self::Qemu(config, _) => config.id.as_deref(),
            Self::MicroVm(_) | Self::Unknown => None,
        }
    }

    fn uuid(&self) -> Option<&str> {
        match self {
            Self::Qemu(config, smbios) => config.uuid.as_deref().or(smbios.as_deref()),
            Self::MicroVm(machine) => machine.uuid.as_deref(),
            Self::Unknown => None,
        }
    }
}

/// Every process that runs a machine.
fn machines() -> io::Result<Vec<Machine>> {
    let holders = kvm_holders();
    let all: Vec<Machine> = process::all()?
        .into_iter()
        .filter_map(|process| identify(process, &holders))
        .collect();
    // crosvm forks its devices and a QEMU on its way into the background forks itself: the same command line
    // in parent and child is one machine. It lives in crosvm's parent and in QEMU's child.
    let parents: Vec<Option<u32>> = all.iter().map(|m| Some(m.process.stat().ok()?.parent)).collect();
    let mut superseded = BTreeSet::new();
    for (child, parent_pid) in all.iter().zip(parents) {
        let twin =
            |m: &&Machine| Some(m.process.pid) == parent_pid && m.vmm == child.vmm && m.args == child.args;
        if let Some(parent) = all.iter().find(twin) {
            superseded.insert(if child.vmm == Vmm::Qemu {
                parent.process.pid
            } else {
                child.process.pid
            });
        }
    }
    Ok(all
        .into_iter()
        .filter(|m| !superseded.contains(&m.process.pid))
        .collect())
}

/// Whether a process runs a machine, and which program it is. `kvm_holders` are the processes known to hold one.
fn identify(process: Process, kvm_holders: &BTreeSet<u32>) -> Option<Machine> {
    let file_name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let holds_kvm = kvm_holders.contains(&process.pid);
    // The executable is the truth where we may see it, and nearly every process is told by it to be no machine:
    // a host has hundreds, and each file of /proc that is read costs as much as this link.
    let seen = match process.exe() {
        Ok(path) => Some(file_name(&path.to_string_lossy())).filter(|name| holds_kvm || is_vmm(name)),
        // Zombies and kernel threads have none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(_) => Some(String::new()),
    }?;
    // Zombies have no command line, kernel threads neither.
    let args = process.cmdline().ok().filter(|a| !a.is_empty())?;
    let comm = process.comm().ok()?;
    // Where it may not be seen, the first argument must fit the short name: each alone is easily set to anything.
    let program = match seen {
        name if !name.is_empty() => name,
        _ => {
            let first = file_name(args.first().map(String::as_str).unwrap_or_default());
            let short: String = first.chars().take(comm.len().max(1)).collect();
            // QEMU's `-name process=` renames the process, so an emulator's name as first argument is enough.
            if short == comm || is_system_emulator(&first) {
                first
            } else {
                comm.clone()
            }
        }
    };
    let vmm = match program.as_str() {
        name if is_system_emulator(name) => Vmm::Qemu,
        name if is_release_of(name, "firecracker") => Vmm::Firecracker,
        name if is_release_of(name, "cloud-hypervisor") => Vmm::CloudHypervisor,
        "crosvm" if args.get(1..).is_some_and(|a| a.iter().any(|a| a == "run")) => Vmm::Crosvm,
        _ if holds_kvm => Vmm::Other,
        _ => return None,
    };
    Some(Machine {
        process,
        vmm,
        program,
        comm,
        args,
    })
}

/// Whether a program of this name may run a machine. crosvm's does so only with some arguments.
fn is_vmm(program: &str) -> bool {
    is_system_emulator(program)
        || is_release_of(program, "firecracker")
        || is_release_of(program, "cloud-hypervisor")
        || program == "crosvm"
}

/// Whether a program is `name` as it is installed or as its releases are called: `firecracker-v1.7.0-x86_64`,
/// `cloud-hypervisor-static-aarch64`; and not one of its tools (`firecracker-containerd`).
fn is_release_of(program: &str, name: &str) -> bool {
    let Some(rest) = program.strip_prefix(name) else {
        return false;
    };
    let mut words = rest.split('-');
    words.next() == Some("")
        && words.all(|word| {
            let version = word.strip_prefix('v').unwrap_or(word);
            matches!(word, "static" | "x86_64" | "aarch64" | "debug" | "release")
                || version.starts_with(|c: char| c.is_ascii_digit())
        })
}

impl Machine {
    fn command_line(&self) -> CommandLine {
        let read = |path: &str| self.process.own_text(path.as_ref(), MAX_CONFIG).ok();
        match self.vmm {
            Vmm::Qemu => {
                let config = QemuConfig::parse(&self.args, &read);
                CommandLine::Qemu(Box::new(config), evidence::smbios_uuid(&self.args))
            }
            Vmm::Firecracker | Vmm::CloudHypervisor | Vmm::Crosvm => {
                CommandLine::MicroVm(microvm::parse(self.vmm, &self.args, &read))
            }
            Vmm::Other => CommandLine::Unknown,
        }
    }

    fn describe(&self, tables: &mut NetTables) -> VmInfo {
        let evidence = evidence::gather(self.process, tables);
        let mut info = VmInfo::new(self.vmm, self.process.pid, &self.program);
        evidence::fill_process(&mut info, self.process, !tables.has_tcp());
        match self.command_line() {
            CommandLine::Qemu(config, smbios) => {
                info.uuid = smbios;
                evidence::fill_qemu(&mut info, self.process, &self.args, *config, &evidence);
            }
            CommandLine::MicroVm(machine) => {
                evidence::fill_microvm(&mut info, self.process, machine, &evidence);
            }
            CommandLine::Unknown => evidence::fill_other(&mut info, &self.comm, &evidence),
        }
        info
    }
}

/// The processes that the kernel's KVM statistics name: they do for every KVM machine, where debugfs is
/// mounted and may be read (`/sys/kernel/debug/kvm/PID-FD`).
fn kvm_holders() -> BTreeSet<u32> {
    let Ok(dir) = fs::read_dir("/sys/kernel/debug/kvm") else {
        return BTreeSet::new();
    };
    dir.flatten()
        .filter_map(|e| e.file_name().to_str()?.split_once('-')?.0.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_under_the_names_of_their_releases() {
        for yes in [
            "firecracker",
            "firecracker-v1.7.0-x86_64",
            "firecracker-v1.13.1-aarch64",
        ] {
            assert!(is_release_of(yes, "firecracker"), "{yes}");
        }
        for yes in [
            "cloud-hypervisor",
            "cloud-hypervisor-static",
            "cloud-hypervisor-static-aarch64",
            "cloud-hypervisor-v45.0",
        ] {
            assert!(is_release_of(yes, "cloud-hypervisor"), "{yes}");
        }
        for no in [
            "firecracker-containerd",
            "firecrackers",
            "firecracker-",
            "my-firecracker",
        ] {
            assert!(!is_release_of(no, "firecracker"), "{no}");
        }
    }

    #[test]
    fn most_processes_are_told_by_their_program() {
        for yes in [
            "qemu-system-x86_64",
            "firecracker-v1.7.0-x86_64",
            "cloud-hypervisor",
            "crosvm",
        ] {
            assert!(is_vmm(yes), "{yes}");
        }
        for no in ["bash", "qemu-img", "firecracker-containerd", ""] {
            assert!(!is_vmm(no), "{no}");
        }
        // A program of any name is one where the kernel says so.
        let me = Process {
            pid: std::process::id(),
        };
        assert!(identify(me, &BTreeSet::new()).is_none());
        assert!(identify(me, &BTreeSet::from([me.pid])).is_some_and(|m| m.vmm == Vmm::Other));
    }

    #[test]
    fn this_test_is_no_machine() {
        assert!(describe(std::process::id()).is_none());
        assert!(list().unwrap().iter().all(|vm| vm.pid != std::process::id()));
    }
}
