//! What the kernel shows of a process, and how it and the command line become one description.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::info::{Control, ControlKind, Manager, SharedMemory, VmInfo, bounded};
use super::microvm::MicroVm;
use super::qemu::{self, Endpoint, MonitorMode, QemuConfig};
use crate::host::maps;
use crate::host::process::{self, Descriptor, Process};
use crate::host::sockets::{ListenAddress, Listener, NetTables};

/// Memory given to a machine where `-m` is missing (`default_ram_size` of hw/core/machine.c).
const QEMU_DEFAULT_MEMORY: u64 = 128 << 20;
/// Shared mappings below this are no guest memory: QEMU maps small files shared as well.
const MIN_SHARED: u64 = 1 << 20;

/// The kernel's view of a process. What may not be read is the error that said so.
pub(super) struct Evidence {
    descriptors: io::Result<Vec<Descriptor>>,
    listeners: io::Result<Vec<Listener>>,
    /// Whether TCP sockets are among them.
    tcp: bool,
    threads: Vec<String>,
}

pub(super) fn gather(process: Process, tables: &mut NetTables) -> Evidence {
    let descriptors = process.descriptors();
    let listeners = match &descriptors {
        Ok(all) => tables.listeners(process, all),
        Err(e) => Err(io::Error::from(e.kind())),
    };
    let threads = process.thread_names().unwrap_or_default();
    Evidence {
        descriptors,
        listeners,
        tcp: tables.has_tcp(),
        threads,
    }
}

impl Evidence {
    fn has_kvm(&self) -> Option<bool> {
        self.descriptors
            .as_ref()
            .ok()
            .map(|all| all.iter().any(|d| d.link == "anon_inode:kvm-vm"))
    }

    /// vCPUs with a descriptor (KVM) or a thread of their own.
    fn vcpus(&self, thread_prefixes: &[&str]) -> Option<u32> {
        if let Ok(all) = &self.descriptors {
            let count = all
                .iter()
                .filter(|d| d.link.starts_with("anon_inode:kvm-vcpu"))
                .count();
            if count > 0 {
                return u32::try_from(count).ok();
            }
        }
        let count = self
            .threads
            .iter()
            .filter(|t| {
                thread_prefixes.iter().any(|p| {
                    t.strip_prefix(p)
                        .is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()))
                })
            })
            .count();
        u32::try_from(count).ok().filter(|n| *n > 0)
    }

    /// What QEMU's named threads (`CPU 0/KVM`) say.
    fn accelerator_of_threads(&self) -> Option<&'static str> {
        let ends = |end: &str| {
            self.threads
                .iter()
                .any(|t| t.starts_with("CPU ") && t.ends_with(end))
        };
        if ends("/KVM") {
            Some("kvm")
        } else if ends("/TCG") || self.threads.iter().any(|t| t == "ALL CPUs/TCG") {
            Some("tcg")
        } else {
            None
        }
    }
}

/// The fields that every process has.
pub(super) fn fill_process(info: &mut VmInfo, process: Process, keep_maps: bool) {
    match process.uid() {
        Ok(uid) => info.uid = Some(uid),
        Err(e) => info.problem("uid", e.to_string()),
    }
    let stat = process.stat();
    info.start_ticks = stat.as_ref().ok().map(|s| s.start_ticks);
    let started = stat.and_then(|stat| {
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        Ok(process::boot_time()?.saturating_add(stat.start_ticks / ticks))
    });
    match started {
        Ok(time) => info.started = Some(time),
        Err(e) => info.problem("started", e.to_string()),
    }
    if let Ok(exe) = process.exe() {
        info.exe = bounded(&exe.to_string_lossy());
    }
    match process.memory_readable() {
        Ok(()) => info.process_memory = true,
        Err(e) => info.problem(
            "process_memory",
            format!("{e}; run as root or with CAP_SYS_PTRACE"),
        ),
    }
    match maps::of(process) {
        Ok(all) => {
            let mut files: BTreeMap<String, u64> = BTreeMap::new();
            for m in all
                .iter()
                .filter(|m| m.shared && m.write && m.inode != 0 && m.path.starts_with('/'))
            {
                // Character devices mapped by a machine (vfio, kvm's own pages) are not its memory.
                if !m.path.starts_with("/dev/")
                    || m.path.starts_with("/dev/shm/")
                    || m.path.starts_with("/dev/huge")
                {
                    let bytes = files.entry(m.path.clone()).or_default();
                    *bytes = bytes.saturating_add(m.len());
                }
            }
            info.shared_memory = Some(
                files
                    .into_iter()
                    .filter(|(_, bytes)| *bytes >= MIN_SHARED)
                    .map(|(path, bytes)| SharedMemory {
                        path: bounded(&path),
                        bytes,
                    })
                    .collect(),
            );
            info.maps = keep_maps.then_some(all);
        }
        Err(e) => info.problem(
            "shared_memory",
            format!("{e}; run as root or with CAP_SYS_PTRACE"),
        ),
    }
}

/// The fields of a QEMU.
pub(super) fn fill_qemu(
    info: &mut VmInfo,
    process: Process,
    args: &[String],
    config: QemuConfig,
    seen: &Evidence,
) {
    let file_name = info.exe.rsplit('/').next().unwrap_or_default().to_owned();
    let x86 = qemu::architecture(&file_name).is_none_or(|a| matches!(a, "x86_64" | "i386"));
    let complete = config.unread_files.is_empty();
    for file in &config.unread_files {
        info.problem(
            "machine",
            format!(
                "-readconfig {} cannot be read: settings may be missing",
                bounded(file)
            ),
        );
    }
    info.name = config.name.as_deref().map(bounded);
    info.uuid = config.uuid.as_deref().or(info.uuid.as_deref()).map(bounded);
    info.machine = config
        .machine
        .as_deref()
        .or((x86 && complete).then_some("pc"))
        .map(bounded);
    info.memory_bytes = config.memory;
    if config.memory.is_none() && complete && config.machine.as_deref() != Some("none") {
        info.memory_bytes = Some(QEMU_DEFAULT_MEMORY);
    }
    info.vcpus = seen.vcpus(&["CPU "]).or(config.vcpus).or(complete.then_some(1));
    match accelerator(&config, seen, &file_name) {
        Ok(name) => info.accelerator = Some(name),
        Err(reason) => info.problem("accelerator", reason),
    }
    // Paths of the managers' own run-time folders.
    let mentions = |needles: &[&str]| args.iter().any(|a| needles.iter().any(|n| a.contains(n)));
    info.managed_by = if mentions(&["/qemu-server/"]) {
        Some(Manager::Proxmox)
    } else if mentions(&["/var/lib/libvirt/", "/run/libvirt/", "/libvirt/qemu/"]) {
        Some(Manager::Libvirt)
    } else {
        None
    };
    let mut sockets = Sockets::new(process, seen);
    for monitor in &config.monitors {
        let kind = if monitor.mode == MonitorMode::Qmp {
            ControlKind::Qmp
        } else {
            ControlKind::Hmp
        };
        sockets.add(kind, &monitor.endpoint);
    }
    for stub in &config.gdb {
        // A stub always listens, whatever its options say.
        let mut stub = stub.clone();
        if let Endpoint::Unix { server, .. } | Endpoint::Tcp { server, .. } | Endpoint::Fd { server, .. } =
            &mut stub
        {
            *server = true;
        }
        sockets.add(ControlKind::Gdb, &stub);
    }
    sockets.finish(info, seen);
    info.qemu = Some(config);
}

/// The fields of a Firecracker, Cloud Hypervisor or crosvm.
pub(super) fn fill_microvm(info: &mut VmInfo, process: Process, machine: MicroVm, seen: &Evidence) {
    info.name = machine.name.as_deref().map(bounded);
    info.uuid = machine.uuid.as_deref().map(bounded);
    info.memory_bytes = machine.memory;
    if machine.memory.is_none() {
        info.problem(
            "memory_bytes",
            "not on the command line: it was set through the API",
        );
    }
    info.vcpus = seen
        .vcpus(&["fc_vcpu ", "fc_vcpu", "vcpu", "crosvm_vcpu"])
        .or(machine.vcpus);
    if info.vcpus.is_none() {
        info.problem("vcpus", "not on the command line: they were set through the API");
    }
    // These three need a hardware hypervisor and on Linux stock builds use KVM only.
    match seen.has_kvm() {
        Some(true) => info.accelerator = Some("kvm".into()),
        Some(false) => info.problem("accelerator", "no machine is running in it yet"),
        None => info.problem("accelerator", "the process's descriptors may not be read"),
    }
    let mut sockets = Sockets::new(process, seen);
    if let Some(path) = machine.api_socket {
        sockets.add(ControlKind::Api, &Endpoint::Unix { path, server: true });
    }
    for stub in machine.gdb {
        sockets.add(ControlKind::Gdb, &stub);
    }
    sockets.finish(info, seen);
}

/// The fields of a KVM machine that no known program runs.
pub(super) fn fill_other(info: &mut VmInfo, comm: &str, seen: &Evidence) {
    info.name = Some(bounded(comm));
    info.accelerator = Some("kvm".into());
    info.vcpus = seen.vcpus(&[]);
    info.problem(
        "memory_bytes",
        "the program is not one whose command line is known",
    );
}

/// Proxmox names the machine's UUID in its SMBIOS table only.
pub(super) fn smbios_uuid(args: &[String]) -> Option<String> {
    args.windows(2)
        .filter(|w| w[0].trim_start_matches('-') == "smbios")
        .find_map(|w| {
            let pairs = qemu::options::Pairs::parse(&w[1], None);
            if pairs.get("type") == Some("1") {
                pairs.get("uuid").map(str::to_owned)
            } else {
                None
            }
        })
}

fn accelerator(config: &QemuConfig, seen: &Evidence, file_name: &str) -> Result<String, String> {
    if seen.has_kvm() == Some(true) {
        return Ok("kvm".into());
    }
    if let Some(name) = seen.accelerator_of_threads() {
        return Ok(name.into());
    }
    let may_be_kvm = seen.has_kvm().is_none();
    let mut named: Vec<&str> = config
        .accelerators
        .iter()
        .map(String::as_str)
        .filter(|a| may_be_kvm || *a != "kvm")
        .collect();
    named.dedup();
    match named[..] {
        [one] => Ok(one.into()),
        [] if !config.accelerators.is_empty() => {
            Err("asked for KVM, but the process holds no KVM machine".into())
        }
        [] if may_be_kvm && !file_name.starts_with("qemu-system-") => {
            Err("the process's descriptors may not be read, and this program's default is not known".into())
        }
        [] if config.unread_files.is_empty() => Ok("tcg".into()),
        _ => Err(format!(
            "one of {}; the process's descriptors may not be read",
            bounded(&named.join(", "))
        )),
    }
}

/// Collects the sockets of a process, those named on the command line first.
struct Sockets<'a> {
    process: Process,
    listeners: Option<&'a [Listener]>,
    tcp: bool,
    used: Vec<u32>,
    found: Vec<Control>,
}

impl<'a> Sockets<'a> {
    fn new(process: Process, seen: &'a Evidence) -> Self {
        Self {
            process,
            listeners: seen.listeners.as_deref().ok(),
            tcp: seen.tcp,
            used: Vec::new(),
            found: Vec::new(),
        }
    }

    fn add(&mut self, kind: ControlKind, endpoint: &Endpoint) {
        if let Endpoint::Tcp { port, .. } = endpoint
            && port == "0"
        {
            return; // the kernel chose a port, and only the listening socket tells which
        }
        let matches = |l: &&Listener| match (endpoint, &l.address) {
            (Endpoint::Unix { path, .. }, ListenAddress::Unix(bound)) => bound == path,
            (Endpoint::Tcp { port, .. }, ListenAddress::Tcp(bound)) => port.parse() == Ok(bound.port()),
            (Endpoint::Fd { fd, .. }, _) => l.fd == *fd,
            _ => false,
        };
        let listener = self.listeners.and_then(|all| all.iter().find(matches));
        if let Some(listener) = listener {
            self.used.push(listener.fd);
        }
        let address = match endpoint {
            Endpoint::Unix { path, server: true } => self.own(path),
            Endpoint::Tcp {
                host,
                port,
                server: true,
            } => {
                let host = if host.is_empty() || host == "0.0.0.0" {
                    "127.0.0.1"
                } else {
                    host
                };
                format!("{host}:{port}")
            }
            Endpoint::Fd { .. } => match listener.map(|l| &l.address) {
                Some(address) => self.shown(address),
                None => return,
            },
            // The machine dials out, or it is no socket: nobody else can connect.
            Endpoint::Unix { .. } | Endpoint::Tcp { .. } | Endpoint::Other(_) => return,
        };
        let looked_for = self.tcp || !matches!(endpoint, Endpoint::Tcp { .. });
        let listening = self.listeners.filter(|_| looked_for).map(|_| listener.is_some());
        self.found.push(Control {
            kind,
            address: bounded(&address),
            listening,
        });
    }

    fn finish(mut self, info: &mut VmInfo, seen: &Evidence) {
        for listener in self.listeners.unwrap_or_default() {
            if !self.used.contains(&listener.fd) {
                let address = bounded(&self.shown(&listener.address));
                self.found.push(Control {
                    kind: ControlKind::Unknown,
                    address,
                    listening: Some(true),
                });
            }
        }
        if let Err(e) = &seen.listeners {
            info.problem(
                "control",
                format!("its sockets may not be read ({e}): only what its command line names"),
            );
        }
        info.control = self.found;
    }

    fn shown(&self, address: &ListenAddress) -> String {
        match address {
            ListenAddress::Unix(path) => self.own(path),
            ListenAddress::Tcp(address) => address.to_string(),
        }
    }

    fn own(&self, path: &str) -> String {
        if path.starts_with('@') {
            return path.to_owned();
        }
        self.process
            .own_path(Path::new(path))
            .to_string_lossy()
            .into_owned()
    }
}
