//! From arguments and `-readconfig` files to one description of the machine.

use super::options::{Pairs, parse_size};

const MIB: u64 = 1 << 20;
/// Most options taken from one command line and its files together.
const MAX_OPTIONS: usize = 16 * 1024;
/// Most `-readconfig` files followed.
const MAX_FILES: usize = 16;

/// What the command line says. `None` where it says nothing: QEMU's defaults are not filled in here.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct QemuConfig {
    /// `-name`: the guest's name.
    pub(crate) name: Option<String>,
    /// `-uuid`.
    pub(crate) uuid: Option<String>,
    /// `-id`: the machine's number, an option that Proxmox adds to its QEMU.
    pub(crate) id: Option<String>,
    /// `-machine type`.
    pub(crate) machine: Option<String>,
    /// The accelerators asked for, in the order QEMU tries them.
    pub(crate) accelerators: Vec<String>,
    /// `-m`: the memory present at start, in bytes.
    pub(crate) memory: Option<u64>,
    /// `-smp`: the virtual CPUs present at start.
    pub(crate) vcpus: Option<u32>,
    /// `-object memory-backend-…`.
    pub(crate) backends: Vec<Backend>,
    /// `-machine memory-backend=`: the backend that is the main memory.
    pub(crate) ram_backend: Option<String>,
    /// The backends of `-numa node,memdev=`, in node order: together they are the main memory.
    pub(crate) numa_backends: Vec<String>,
    /// `-mem-path`: the old way to a file or hugepage backend.
    pub(crate) mem_path: Option<String>,
    /// `-machine max-ram-below-4g=`, in bytes.
    pub(crate) max_ram_below_4g: Option<u64>,
    /// Monitors: QMP and human.
    pub(crate) monitors: Vec<Monitor>,
    /// A QMP socket whose first client QEMU waits for before it makes the machine (`wait=on`, the default).
    pub(crate) waits_for_qmp: bool,
    /// gdb stubs.
    pub(crate) gdb: Vec<Endpoint>,
    /// `-pidfile`.
    pub(crate) pid_file: Option<String>,
    /// Backends of pluggable memory: `-device pc-dimm|nvdimm|virtio-mem-pci|virtio-pmem-pci,memdev=`.
    pub(crate) dimms: Vec<String>,
    /// Backends that a device shows as memory of its own (`-device ivshmem-plain,memdev=`): not the machine's.
    pub(crate) device_backends: Vec<String>,
    /// `-readconfig` files that could not be read: what they say is missing above.
    pub(crate) unread_files: Vec<String>,
}

/// One memory backend object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Backend {
    pub(crate) id: String,
    /// `ram`, `memfd`, `file`, `shm`, `epc`.
    pub(crate) kind: String,
    /// In bytes; `None` where it is missing or nonsense.
    pub(crate) size: Option<u64>,
    pub(crate) share: bool,
    pub(crate) mem_path: Option<String>,
}

/// A monitor and where it is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Monitor {
    pub(crate) mode: MonitorMode,
    pub(crate) endpoint: Endpoint,
}

/// The language a monitor speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MonitorMode {
    /// JSON, `-qmp` or `mode=control`.
    Qmp,
    /// The human monitor.
    Human,
}

/// Where a character device ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Endpoint {
    /// A unix socket; the path is as given, so it may be relative to the process's working directory.
    Unix { path: String, server: bool },
    /// TCP.
    Tcp {
        host: String,
        port: String,
        server: bool,
    },
    /// A descriptor that was passed to QEMU (libvirt does).
    Fd { fd: u32, server: bool },
    /// Something that cannot be connected to: stdio, a pty, a file, null, …
    Other(String),
}

/// Options that take no argument (`HAS_ARG` missing in `qemu-options.hx`, QEMU 2.x to 10.x). All others take one.
const FLAGS: &[&str] = &[
    "h",
    "help",
    "version",
    "snapshot",
    "enable-fips",
    "no-fd-bootchk",
    "no-acpi",
    "no-hpet",
    "mem-prealloc",
    "usb",
    "nographic",
    "portrait",
    "curses",
    "sdl",
    "no-frame",
    "alt-grab",
    "ctrl-grab",
    "no-quit",
    "full-screen",
    "win2k-hack",
    "rtc-td-hack",
    "audio-help",
    "soundhw-help",
    "s",
    "S",
    "singlestep",
    "one-insn-per-tb",
    "enable-kvm",
    "no-kvm",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "no-kvm-irqchip",
    "enable-nesting",
    "xen-attach",
    "xen-domid-restrict",
    "no-reboot",
    "no-shutdown",
    "daemonize",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "semihosting",
    "old-param",
    "only-migratable",
    "preconfig",
    "enable-sync-profile",
    "show-cursor",
    "no-hax",
    "enable-hax",
    "tdf",
    "no-opengl",
    "mtdblock-help",
];

/// An option of a group, before it is understood.
struct Item {
    group: String,
    value: String,
    pairs: Pairs,
}

impl Item {
    fn id(&self) -> Option<&str> {
        self.pairs.get("id")
    }
}

impl QemuConfig {
    /// Reads the arguments (the first, the program's name, is passed over). `read_file` gets the text of a
    /// `-readconfig` file as that process means the path.
    pub(crate) fn parse(args: &[String], read_file: &dyn Fn(&str) -> Option<String>) -> Self {
        let mut config = Self::default();
        let items = config.collect(args, read_file);
        config.interpret(&items);
        config
    }

    fn collect(&mut self, args: &[String], read_file: &dyn Fn(&str) -> Option<String>) -> Vec<Item> {
        let mut items: Vec<Item> = Vec::new();
        let mut files = 0;
        let mut args = args.iter().skip(1);
        while let Some(arg) = args.next() {
            if items.len() >= MAX_OPTIONS {
                break;
            }
            // Anything else is a disk image.
            let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                continue;
            };
            if FLAGS.contains(&name) {
                items.push(Item {
                    group: name.to_owned(),
                    value: String::new(),
                    pairs: Pairs::default(),
                });
                continue;
            }
            let Some(value) = args.next() else { break };
            match name {
                "readconfig" => {
                    files += 1;
                    match read_file(value).filter(|_| files <= MAX_FILES) {
                        Some(text) => items.extend(parse_file(&text)),
                        None => self.unread_files.push(value.clone()),
                    }
                }
                "set" => apply_set(&mut items, value),
                _ => items.push(Item {
                    group: group_of(name).to_owned(),
                    value: value.clone(),
                    pairs: Pairs::parse(value, implied_key(name)),
                }),
            }
        }
        items
    }

    fn interpret(&mut self, items: &[Item]) {
        let mut smp = Pairs::default();
        let mut numa: Vec<(Option<u64>, String)> = Vec::new();
        for item in items {
            let pairs = &item.pairs;
            let text = |key: &str| pairs.get(key).filter(|v| !v.is_empty()).map(str::to_owned);
            match item.group.as_str() {
                "name" => self.name = text("guest").or(self.name.take()),
                "uuid" => self.uuid = Some(item.value.clone()),
                "id" => self.id = Some(item.value.clone()),
                "machine" => {
                    self.machine = text("type").or(self.machine.take());
                    self.ram_backend = text("memory-backend").or(self.ram_backend.take());
                    if let Some(size) = pairs.get("max-ram-below-4g") {
                        self.max_ram_below_4g = parse_size(size, 1);
                    }
                    if let Some(list) = pairs.get("accel") {
                        self.accelerators.extend(list.split(':').map(str::to_owned));
                    }
                }
                "accel" => self.accelerators.extend(text("accel")),
                "enable-kvm" => self.accelerators.push("kvm".into()),
                "memory" => {
                    // A bare number is MiB on the command line and in a file alike.
                    if let Some(size) = pairs.get("size") {
                        self.memory = parse_size(size, MIB);
                    }
                }
                "smp-opts" => smp.merge(pairs.clone()),
                "object" => self.object(pairs),
                "device" => {
                    let driver = pairs.get("driver").unwrap_or_default();
                    if matches!(driver, "pc-dimm" | "nvdimm")
                        || driver.starts_with("virtio-mem")
                        || driver.starts_with("virtio-pmem")
                    {
                        self.dimms.extend(text("memdev"));
                    } else {
                        self.device_backends.extend(text("memdev"));
                    }
                }
                "numa" if pairs.get("type").is_none_or(|t| t == "node") => {
                    if let Some(memdev) = text("memdev") {
                        numa.push((pairs.get("nodeid").and_then(|n| n.parse().ok()), memdev));
                    }
                }
                "mem-path" => self.mem_path = Some(item.value.clone()),
                "pidfile" => self.pid_file = Some(item.value.clone()),
                "qmp" | "qmp-pretty" => self.monitor(items, MonitorMode::Qmp, &item.value),
                "monitor" => self.monitor(items, MonitorMode::Human, &item.value),
                "mon" => {
                    let mode = if pairs.get("mode") == Some("control") {
                        MonitorMode::Qmp
                    } else {
                        MonitorMode::Human
                    };
                    if let Some(id) = pairs.get("chardev") {
                        if let Some(socket) =
                            items.iter().find(|i| i.group == "chardev" && i.id() == Some(id))
                        {
                            self.waits_for_qmp |= mode == MonitorMode::Qmp && waits(&socket.pairs);
                        }
                        self.monitors.push(Monitor {
                            mode,
                            endpoint: chardev(items, id),
                        });
                    }
                }
                "gdb" => match item.value.as_str() {
                    "none" => {}
                    value => self.gdb.push(device(items, value)),
                },
                "s" => self.gdb.push(device(items, "tcp::1234")),
                _ => {}
            }
        }
        self.vcpus = vcpus(&smp);
        // Nodes without a number take the next free one, that is: they keep their order.
        numa.sort_by_key(|(node, _)| node.unwrap_or(u64::MAX));
        self.numa_backends = numa.into_iter().map(|(_, id)| id).collect();
    }

    fn object(&mut self, pairs: &Pairs) {
        let Some(kind) = pairs
            .get("qom-type")
            .and_then(|t| t.strip_prefix("memory-backend-"))
        else {
            return;
        };
        let Some(id) = pairs.get("id") else { return };
        self.backends.push(Backend {
            id: id.to_owned(),
            kind: kind.to_owned(),
            size: pairs.get("size").and_then(|s| parse_size(s, 1)),
            // memory-backend-memfd is shared unless told otherwise; shm always is.
            share: pairs.switch("share").unwrap_or(matches!(kind, "memfd" | "shm")),
            mem_path: pairs.get("mem-path").map(str::to_owned),
        });
    }

    fn monitor(&mut self, items: &[Item], mode: MonitorMode, value: &str) {
        if value != "none" {
            self.waits_for_qmp |= mode == MonitorMode::Qmp && waits(&Pairs::parse(value, Some("address")));
            self.monitors.push(Monitor {
                mode,
                endpoint: device(items, value),
            });
        }
    }
}

/// Options that are shorthands share the group of the long form.
fn group_of(name: &str) -> &str {
    match name {
        "M" => "machine",
        "m" => "memory",
        "smp" => "smp-opts",
        other => other,
    }
}

/// The key of a first item that has none.
fn implied_key(name: &str) -> Option<&'static str> {
    Some(match name {
        "machine" | "M" | "numa" => "type",
        "accel" => "accel",
        "m" => "size",
        "smp" => "cpus",
        "name" => "guest",
        "object" => "qom-type",
        "device" => "driver",
        "mon" => "chardev",
        "chardev" => "backend",
        _ => return None,
    })
}

/// `-set group.id.key=value` changes an option that was given before.
fn apply_set(items: &mut [Item], text: &str) {
    let mut parts = text.splitn(3, '.');
    let (Some(group), Some(id), Some((key, value))) = (
        parts.next(),
        parts.next(),
        parts.next().and_then(|r| r.split_once('=')),
    ) else {
        return;
    };
    if let Some(item) = items.iter_mut().find(|i| i.group == group && i.id() == Some(id)) {
        item.pairs.set(key, value);
    }
}

/// A `-readconfig` file: `[group "id"]` and `key = "value"` lines.
fn parse_file(text: &str) -> Vec<Item> {
    let mut items: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(head) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if items.len() >= MAX_OPTIONS {
                break;
            }
            let (group, id) = head.trim().split_once(' ').unwrap_or((head.trim(), ""));
            let id = id.trim().trim_matches('"');
            let pairs = if id.is_empty() {
                Vec::new()
            } else {
                vec![("id".to_owned(), id.to_owned())]
            };
            items.push((group.to_owned(), pairs));
        } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#'))
            && let Some((_, pairs)) = items.last_mut()
        {
            pairs.push((key.trim().to_owned(), value.trim().trim_matches('"').to_owned()));
        }
    }
    items
        .into_iter()
        .map(|(group, pairs)| Item {
            group,
            value: String::new(),
            pairs: Pairs::from_pairs(pairs),
        })
        .collect()
}

/// The CPUs present at start, as `machine_parse_smp_config` (hw/core/machine-smp.c) counts them.
fn vcpus(smp: &Pairs) -> Option<u32> {
    let number = |key: &str| {
        smp.get(key)
            .and_then(|v| v.parse::<u32>().ok())
            .filter(|n| *n > 0)
    };
    if let Some(cpus) = number("cpus").or_else(|| number("maxcpus")) {
        return Some(cpus);
    }
    let levels = [
        "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads",
    ];
    if levels.iter().all(|l| number(l).is_none()) {
        return None;
    }
    levels
        .iter()
        .try_fold(1_u32, |n, level| n.checked_mul(number(level).unwrap_or(1)))
}

/// Whether QEMU stops at this socket until somebody connects.
fn waits(pairs: &Pairs) -> bool {
    pairs.switch("server") == Some(true) && pairs.switch("wait") != Some(false)
}

/// A device in the old short form of `-monitor`, `-qmp`, `-gdb`.
fn device(items: &[Item], text: &str) -> Endpoint {
    if let Some(id) = text.strip_prefix("chardev:") {
        return chardev(items, id);
    }
    let (address, rest) = text.split_once(',').unwrap_or((text, ""));
    let pairs = Pairs::parse(rest, None);
    if let Some(path) = address.strip_prefix("unix:") {
        // In this form `,,` is a comma of the path.
        let whole = Pairs::parse(text, Some("path"));
        let path = whole
            .get("path")
            .and_then(|p| p.strip_prefix("unix:"))
            .unwrap_or(path);
        return Endpoint::Unix {
            path: path.to_owned(),
            server: pairs.switch("server").unwrap_or(false),
        };
    }
    if let Some((host, port)) = ["tcp:", "telnet:", "websocket:", "tn3270:"]
        .iter()
        .find_map(|p| address.strip_prefix(p))
        .and_then(|a| a.rsplit_once(':'))
    {
        return Endpoint::Tcp {
            host: host.to_owned(),
            port: port.to_owned(),
            server: pairs.switch("server").unwrap_or(false),
        };
    }
    Endpoint::Other(address.to_owned())
}

/// What `-chardev …,id=ID` says.
fn chardev(items: &[Item], id: &str) -> Endpoint {
    let Some(item) = items.iter().find(|i| i.group == "chardev" && i.id() == Some(id)) else {
        return Endpoint::Other(format!("chardev {id}, which is not on the command line"));
    };
    let pairs = &item.pairs;
    let server = pairs.switch("server").unwrap_or(false);
    let backend = pairs.get("backend").unwrap_or_default();
    if backend != "socket" {
        return Endpoint::Other(backend.to_owned());
    }
    if let Some(path) = pairs.get("path") {
        Endpoint::Unix {
            path: path.to_owned(),
            server,
        }
    } else if let Some(fd) = pairs.get("fd").and_then(|f| f.parse().ok()) {
        Endpoint::Fd { fd, server }
    } else if let Some(port) = pairs.get("port") {
        Endpoint::Tcp {
            host: pairs.get("host").unwrap_or_default().to_owned(),
            port: port.to_owned(),
            server,
        }
    } else {
        Endpoint::Other("socket".to_owned())
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
