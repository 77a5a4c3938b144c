//! `list`: every virtual machine of this host, from `/proc` and the sockets only.
//!
//! Nothing is connected to and no process is stopped. A process's owner writes its command line, so what
//! comes from there is what the owner says; the kernel's own words (descriptors, mappings, threads, owner,
//! start time) go before it.

mod evidence;
mod info;
mod microvm;
pub(crate) mod qemu;

use std::fs;
use std::io;

pub use info::{Control, ControlKind, Manager, Problem, SharedMemory, VmInfo, Vmm};

use crate::host::process::{self, Process};
use qemu::is_system_emulator;

/// Every virtual machine on this host that can be seen from here, ordered by pid.
///
/// # Errors
/// `/proc` itself cannot be read. What cannot be read of single processes costs only the fields in question:
/// they are `None` and [`VmInfo::problems`] says why.
pub fn list() -> io::Result<Vec<VmInfo>> {
    let mut found: Vec<(VmInfo, Vec<String>, Option<u32>)> = Vec::new();
    for process in process::all()? {
        if let Some((info, args)) = examine(process) {
            found.push((info, args, process.stat().ok().map(|s| s.parent)));
        }
    }
    // crosvm forks its devices and a QEMU on its way into the background forks itself: the same command line
    // in parent and child is one machine. It lives in crosvm's parent and in QEMU's child.
    let twin_of = |child: &(VmInfo, Vec<String>, Option<u32>),
                   parent: &(VmInfo, Vec<String>, Option<u32>)| {
        child.2 == Some(parent.0.pid) && child.1 == parent.1 && child.0.vmm == parent.0.vmm
    };
    let superseded: Vec<u32> = found
        .iter()
        .flat_map(|child| {
            found
                .iter()
                .filter(move |parent| twin_of(child, parent))
                .map(move |parent| (child, parent))
        })
        .map(|(child, parent)| {
            if child.0.vmm == Vmm::Qemu {
                parent.0.pid
            } else {
                child.0.pid
            }
        })
        .collect();
    Ok(found
        .into_iter()
        .map(|(info, ..)| info)
        .filter(|info| !superseded.contains(&info.pid))
        .collect())
}

/// What one process is, if it is a virtual machine.
#[must_use]
pub fn describe(pid: u32) -> Option<VmInfo> {
    examine(Process { pid }).map(|(info, _)| info)
}

fn examine(process: Process) -> Option<(VmInfo, Vec<String>)> {
    let comm = process.comm().ok()?;
    let exe = process.exe();
    // Threads, zombies and kernel threads have no command line.
    let args = process.cmdline().ok().filter(|a| !a.is_empty())?;
    let file_name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    // The executable is the truth where we may see it. Where not, the first argument must fit the short name:
    // each alone is easily set to anything.
    let program = match &exe {
        Ok(path) => file_name(&path.to_string_lossy()),
        Err(_) => {
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
    let vmm = if is_system_emulator(&program) {
        Vmm::Qemu
    } else {
        match program.as_str() {
            "firecracker" => Vmm::Firecracker,
            "cloud-hypervisor" | "cloud-hypervisor-static" => Vmm::CloudHypervisor,
            "crosvm" if args.get(1..).is_some_and(|a| a.iter().any(|a| a == "run")) => Vmm::Crosvm,
            _ if has_kvm_debugfs(process.pid) => Vmm::Other,
            _ => return None,
        }
    };
    // `qemu-system-x86_64 --version` and its like are no machines; they are gone in a moment anyway.
    let evidence = evidence::gather(process);
    let mut info = VmInfo::new(vmm, process.pid, &program);
    evidence::fill_process(&mut info, process);
    match vmm {
        Vmm::Qemu => {
            let read = |path: &str| {
                let path = process.own_path(path.as_ref());
                Some(String::from_utf8_lossy(&process::read_bounded(&path, 1 << 20).ok()?).into_owned())
            };
            let config = qemu::QemuConfig::parse(&args, &read);
            evidence::fill_qemu(&mut info, process, &args, config, &evidence);
        }
        Vmm::Firecracker | Vmm::CloudHypervisor | Vmm::Crosvm => {
            let read = |path: &str| {
                let path = process.own_path(path.as_ref());
                Some(String::from_utf8_lossy(&process::read_bounded(&path, 1 << 20).ok()?).into_owned())
            };
            let machine = microvm::parse(vmm, &args, &read);
            evidence::fill_microvm(&mut info, process, machine, &evidence);
        }
        Vmm::Other => evidence::fill_other(&mut info, &comm, &evidence),
    }
    Some((info, args))
}

/// Whether the kernel's KVM statistics name this process: they do for every KVM machine, where debugfs is
/// mounted and may be read (`/sys/kernel/debug/kvm/PID-FD`).
fn has_kvm_debugfs(pid: u32) -> bool {
    let prefix = format!("{pid}-");
    fs::read_dir("/sys/kernel/debug/kvm").is_ok_and(|dir| {
        dir.flatten()
            .any(|e| e.file_name().to_string_lossy().starts_with(&prefix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_no_machine() {
        assert!(describe(std::process::id()).is_none());
        assert!(list().unwrap().iter().all(|vm| vm.pid != std::process::id()));
    }
}
