//! What is known of one virtual machine on the host.

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::qemu::QemuConfig;
use crate::host::maps::Mapping;
use crate::host::process::Identity;

/// The program that runs a machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Vmm {
    /// QEMU, started by hand or by a manager.
    Qemu,
    /// Firecracker, with or without its jailer.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// crosvm.
    Crosvm,
    /// A process that holds a KVM machine and is none of the above.
    Other,
}

impl fmt::Display for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Crosvm => "crosvm",
            Self::Other => "other",
        })
    }
}

/// Who started and controls a machine, as its command line says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Manager {
    /// libvirt (virsh, virt-manager, OpenStack, KubeVirt).
    Libvirt,
    /// Proxmox VE's qemu-server.
    Proxmox,
}

/// What a socket of a machine is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum ControlKind {
    /// QEMU's JSON monitor.
    Qmp,
    /// QEMU's human monitor.
    Hmp,
    /// A gdb stub.
    Gdb,
    /// The HTTP API of Firecracker or Cloud Hypervisor, or crosvm's control socket.
    Api,
    /// The process listens there; what it speaks is not known.
    Unknown,
}

/// One way to control a machine. Its text form is a target where vmsight can use it (`qmp:/run/x.qmp`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Control {
    /// What it speaks.
    pub kind: ControlKind,
    /// Where: a path as seen from here, or `HOST:PORT`.
    pub address: String,
    /// Whether the process was seen to listen there; `None` where its sockets may not be read.
    pub listening: Option<bool>,
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ControlKind::Qmp => "qmp",
            ControlKind::Hmp => "hmp",
            ControlKind::Gdb => "gdb",
            ControlKind::Api => "api",
            ControlKind::Unknown => "socket",
        };
        write!(f, "{kind}:{}", self.address)
    }
}

impl Serialize for Control {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Guest memory that others can map too: a memfd, a file, hugepages.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SharedMemory {
    /// The file as the kernel names it (`/memfd:pc.ram (deleted)`, `/dev/hugepages/…`).
    pub path: String,
    /// Bytes of it that are mapped.
    pub bytes: u64,
}

/// A field that is missing or doubtful, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The field's name, as in the JSON form.
    pub field: &'static str,
    /// What went wrong, for people.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.reason)
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One virtual machine. Text fields come from the process's owner: escape them before a terminal.
#[derive(Clone, Debug, Serialize)]
pub struct VmInfo {
    /// The program that runs it.
    pub vmm: Vmm,
    /// Its process id.
    pub pid: u32,
    /// The name its owner gave it (QEMU's `-name`, Firecracker's `--id`, crosvm's `--name`).
    pub name: Option<String>,
    /// Its UUID as text.
    pub uuid: Option<String>,
    /// QEMU's machine type (`q35`, `pc-i440fx-7.2`, …); `pc` where none was asked for on x86.
    pub machine: Option<String>,
    /// `kvm`, `tcg`, `xen`, …
    pub accelerator: Option<String>,
    /// Its memory in bytes, as given at its start.
    pub memory_bytes: Option<u64>,
    /// Its virtual CPUs: those that run where the kernel shows them, else those given at its start.
    pub vcpus: Option<u32>,
    /// Who manages it; `None` where nothing says that anybody does.
    pub managed_by: Option<Manager>,
    /// Guest memory that is mapped shared; `None` where the mappings may not be read.
    pub shared_memory: Option<Vec<SharedMemory>>,
    /// Whether we may read the process's memory.
    pub process_memory: bool,
    /// Monitors, stubs and sockets.
    pub control: Vec<Control>,
    /// The effective user id of the process.
    pub uid: Option<u32>,
    /// When the process was started, in seconds since 1970.
    pub started: Option<u64>,
    /// The executable, where it may be seen; else the name found.
    pub exe: String,
    /// What is missing and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// The kernel's start time, by which a process is told from a later one with its pid.
    #[serde(skip)]
    pub(crate) start_ticks: Option<u64>,
    /// The parsed command line of a QEMU.
    #[serde(skip)]
    pub(crate) qemu: Option<QemuConfig>,
    /// Its mappings when it was described, where that was to attach to it: [`crate::attach`] takes them.
    #[serde(skip)]
    pub(crate) maps: Option<Vec<Mapping>>,
}

/// Longest text taken over from a command line, in bytes.
const MAX_TEXT: usize = 1024;

impl VmInfo {
    pub(crate) fn new(vmm: Vmm, pid: u32, program: &str) -> Self {
        Self {
            vmm,
            pid,
            name: None,
            uuid: None,
            machine: None,
            accelerator: None,
            memory_bytes: None,
            vcpus: None,
            managed_by: None,
            shared_memory: None,
            process_memory: false,
            control: Vec::new(),
            uid: None,
            started: None,
            exe: bounded(program),
            problems: Vec::new(),
            start_ticks: None,
            qemu: None,
            maps: None,
        }
    }

    /// Its process, told from a later one with the same pid.
    pub(crate) fn identity(&self) -> Identity {
        Identity {
            pid: self.pid,
            start_ticks: self.start_ticks,
        }
    }

    pub(crate) fn problem(&mut self, field: &'static str, reason: impl Into<String>) {
        self.problems.push(Problem {
            field,
            reason: reason.into(),
        });
    }

    /// The paths of its QMP sockets, those seen to listen first.
    #[must_use]
    pub fn qmp_sockets(&self) -> Vec<PathBuf> {
        let mut all: Vec<&Control> = self
            .control
            .iter()
            .filter(|c| c.kind == ControlKind::Qmp && c.address.contains('/'))
            .collect();
        all.sort_by_key(|c| c.listening != Some(true));
        all.into_iter().map(|c| PathBuf::from(&c.address)).collect()
    }
}

/// The text, cut to a length that no listing chokes on.
pub(crate) fn bounded(text: &str) -> String {
    if text.len() <= MAX_TEXT {
        return text.to_owned();
    }
    let end = (0..=MAX_TEXT)
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0);
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_at_a_character() {
        assert_eq!(bounded("short"), "short");
        let cut = bounded(&"é".repeat(4000));
        assert!(cut.len() <= MAX_TEXT + '…'.len_utf8());
        assert!(cut.ends_with('…'));
    }

    #[test]
    fn json_is_flat_text() {
        let mut vm = VmInfo::new(Vmm::Qemu, 7, "qemu-system-x86_64");
        vm.control.push(Control {
            kind: ControlKind::Qmp,
            address: "/run/q".into(),
            listening: Some(true),
        });
        vm.problem("uuid", "not given");
        let json = serde_json::to_value(&vm).unwrap();
        assert_eq!(json["vmm"], "qemu");
        assert_eq!(json["control"][0], "qmp:/run/q");
        assert_eq!(json["problems"][0], "uuid: not given");
        assert_eq!(json["name"], serde_json::Value::Null);
    }
}
