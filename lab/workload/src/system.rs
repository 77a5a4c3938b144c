//! The kernel itself: version, memory, modules, mounts, log and symbols.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Text;

/// The kernel and the machine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct System {
    /// `/proc/version`, without the line break.
    pub version: String,
    /// Kernel release (`uname -r`).
    pub release: String,
    /// Machine (`uname -m`).
    pub machine: String,
    /// Host name in the initial UTS namespace.
    pub hostname: String,
    /// Domain name there.
    pub domainname: String,
    /// Kernel command line.
    pub cmdline: String,
    /// Boot time, seconds since 1970 (`btime`).
    pub boot_time: u64,
    /// Uptime when this was taken, seconds.
    pub uptime: f64,
    /// Wall clock when this was taken, seconds since 1970.
    pub now: u64,
    /// Clock ticks a second in the `*_ticks` fields.
    pub clock_ticks: u64,
    /// Page size, bytes.
    pub page_size: u64,
    /// Processors online.
    pub cpus: u32,
    /// Processors that are there (`/sys/devices/system/cpu/present`).
    pub cpus_present: u32,
    /// Processors that the kernel made room for.
    pub cpus_possible: u32,
    /// What the clock is made of: `tsc`, `hpet`, …
    pub clocksource: String,
    /// Security modules in force, in order, where securityfs is mounted to tell.
    pub lsm: Option<String>,
    /// Whether the kernel runs with 5-level page tables.
    pub five_level_paging: bool,
    /// `/proc/sys/kernel/tainted`.
    pub tainted: u64,
    /// Build id of the kernel: hex from the notes in /sys/kernel/notes.
    pub build_id: String,
    /// `/proc/iomem` in order.
    pub iomem: Vec<MemoryRange>,
    /// `/proc/slabinfo` in order.
    pub slabs: Vec<Slabs>,
    /// `/proc/meminfo`: name, KiB (or a count).
    pub meminfo: BTreeMap<String, u64>,
    /// Active swap devices: path, size in KiB.
    pub swaps: Vec<(Text, u64)>,
    /// The areas of `/proc/vmallocinfo` in the top 2 GiB of the address space, where modules are: first address, address
    /// after the last. Each ends with a page that is never mapped.
    pub module_areas: Vec<(u64, u64)>,
    /// `/sys/kernel/vmcoreinfo`: where in physical memory the note is, and how many bytes are kept for it.
    pub vmcoreinfo: Option<(u64, u64)>,
}

/// One line of `/proc/iomem`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
    /// What is there.
    pub name: String,
    /// Depth in the tree, from 0.
    pub depth: u32,
}

/// One line of `/proc/slabinfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slabs {
    /// Name of the cache.
    pub name: Text,
    /// Objects in use.
    pub active: u64,
    /// Objects that there is room for.
    pub objects: u64,
    /// Bytes from one object to the next.
    pub size: u32,
    /// Objects in one slab.
    pub objects_per_slab: u32,
    /// Pages in one slab.
    pub pages_per_slab: u32,
    /// Slabs.
    pub slabs: u64,
}

/// One loaded module.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Module {
    /// Name.
    pub name: String,
    /// Size in memory, bytes, as `/proc/modules` counts it.
    pub size: u64,
    /// Reference count.
    pub refs: i64,
    /// Modules that use it.
    pub used_by: Vec<String>,
    /// Whether it can never be unloaded (`[permanent]`).
    pub permanent: bool,
    /// `Live`, `Loading` or `Unloading`.
    pub state: String,
    /// Base address of its code.
    pub address: u64,
    /// Taint letters, empty for none.
    pub taint: String,
    /// `MODULE_VERSION`, empty where it has none.
    pub version: String,
    /// Checksum of its source, empty where it has none.
    pub srcversion: String,
    /// The parameters that the workload gave when it loaded the module; nothing in /proc or /sys repeats them.
    pub arguments: String,
    /// Readable parameters and their values.
    pub parameters: BTreeMap<String, Text>,
    /// Its sections and their addresses.
    pub sections: BTreeMap<String, u64>,
    /// Hex of its GNU build id, empty where it has none.
    pub build_id: String,
}

/// One control group of the unified hierarchy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its path below the mount; `/` is the root.
    pub path: Text,
    /// Inode number of its directory.
    pub inode: u64,
    /// Threads in this very group (`cgroup.threads`).
    pub threads: u64,
}

/// A container that the workload has made, as a container runtime would have it in its books.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// The runtime in whose manner it was made.
    pub runtime: String,
    /// Its control group.
    pub cgroup: Text,
    /// The processes in it (`cgroup.procs`).
    pub pids: Vec<u32>,
}

/// The mounts of one mount namespace.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MountNamespace {
    /// Its inode number.
    pub inode: u64,
    /// The process through whose /proc entry it was read; its root is the namespace's root.
    pub pid: u32,
    /// The mounts it sees, in the kernel's order.
    pub mounts: Vec<Mount>,
}

/// One mount, from `/proc/PID/mountinfo` with its escapes undone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Mount id.
    pub id: i64,
    /// Id of the parent mount.
    pub parent: i64,
    /// Device: major, minor.
    pub dev: (u32, u32),
    /// The part of the file system that is mounted.
    pub root: Text,
    /// Where.
    pub mount_point: Text,
    /// Options of the mount.
    pub options: String,
    /// Propagation: `shared:N`, `master:N`, …
    pub propagation: Vec<String>,
    /// File system type.
    pub fstype: Text,
    /// Source.
    pub source: Text,
    /// Options of the file system.
    pub super_options: Text,
}

/// One record of the kernel log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KmsgRecord {
    /// Sequence number.
    pub seq: u64,
    /// Time after boot, microseconds.
    pub time_us: u64,
    /// Level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Facility: 0 kernel, 1 user, …
    pub facility: u32,
    /// The message as stored.
    pub text: Text,
    /// Its `KEY=value` lines.
    pub dict: Vec<Text>,
}

/// The kernel's symbol table.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Kallsyms {
    /// Symbols of the kernel proper.
    pub count: u64,
    /// SHA-256 of the kernel proper's lines `address type name\n` (16 hex digits, as printed), sorted by byte.
    pub sha256: String,
    /// By module.
    pub modules: BTreeMap<String, ModuleSymbols>,
    /// Some hundred entries of the kernel proper, spread evenly, and the well-known ones.
    pub samples: Vec<Symbol>,
}

/// The symbols of one module.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleSymbols {
    /// How many.
    pub count: u64,
    /// SHA-256 as above, of lines `address type name\n` with the type in lower case: a capital says that the symbol is
    /// exported, which the kernel looks up for each line and keeps in no symbol table.
    pub sha256: String,
}

/// One symbol.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Symbol {
    /// Address.
    pub address: u64,
    /// Type letter.
    pub kind: char,
    /// Name.
    pub name: String,
}
