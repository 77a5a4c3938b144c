//! The ground truth of a lab guest: what its own /proc and /sys say of it, as one document that the workload
//! writes inside the guest and the tests read outside.
//!
//! Both sides share these types, so they cannot drift apart. Numbers are as the guest's kernel prints them (units in
//! each field's doc); nothing here is derived from what vmsight sees.

pub mod bpf;
pub mod frame;
pub mod logins;
pub mod net;
pub mod orders;
pub mod perf;
pub mod poke;
pub mod process;
pub mod system;
pub mod tamper;
pub mod text;

use serde::{Deserialize, Serialize};

pub use net::{
    InetSocket, Interface, Neighbour, NetNamespace, NetlinkSocket, PacketSocket, Route, UnixSocket,
    VsockSocket,
};
pub use process::{Credentials, Fd, Frame, KernelStack, Map, Process, Thread, VmSizes};
pub use system::{
    Cgroup, Container, Kallsyms, KmsgRecord, MemoryRange, Module, ModuleSymbols, Mount, MountNamespace,
    Slabs, Symbol, System,
};
pub use text::Text;

/// Everything the guest says of itself, taken at one quiet moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Truth {
    /// The kernel and the machine.
    pub system: System,
    /// Every process, kernel threads included, by pid; the [sleepers](Truth::sleepers) and the process that took this
    /// account excepted.
    pub processes: Vec<Process>,
    /// Pids of the extra processes asked for with `vmsight.procs=N`, which have no entry in `processes`.
    pub sleepers: Vec<u32>,
    /// Every network namespace that a process lives in.
    pub net: Vec<NetNamespace>,
    /// AF_VSOCK sockets (the family knows no namespaces up to 6.x), from `vsock_diag`.
    pub vsock: Vec<VsockSocket>,
    /// Loaded modules, newest first, as `/proc/modules` has them.
    pub modules: Vec<Module>,
    /// The mounts of every mount namespace that a process lives in.
    pub mounts: Vec<MountNamespace>,
    /// The kernel log from its first record still there.
    pub kmsg: Vec<KmsgRecord>,
    /// Every cgroup of the unified hierarchy.
    pub cgroups: Vec<Cgroup>,
    /// The containers.
    pub containers: Vec<Container>,
    /// The kernel's symbols: counts, digests and samples.
    pub kallsyms: Kallsyms,
    /// What is loaded with bpf(2).
    pub bpf: bpf::Bpf,
    /// Perf events that are open.
    pub perf: Vec<perf::PerfEvent>,
    /// What the workload could not do on this kernel, and why: a feature the kernel lacks.
    pub lacking: Vec<String>,
}

impl Truth {
    /// The process with this pid in the initial namespace.
    pub fn process(&self, pid: u32) -> Option<&Process> {
        self.processes.iter().find(|p| p.pid == pid)
    }

    /// The first process whose thread name is `comm`.
    pub fn named(&self, comm: &str) -> Option<&Process> {
        self.processes.iter().find(|p| p.comm == comm)
    }

    /// The module of this name.
    pub fn module(&self, name: &str) -> Option<&Module> {
        self.modules.iter().find(|m| m.name == name)
    }

    /// The network namespace that pid 1 lives in.
    pub fn init_net(&self) -> Option<&NetNamespace> {
        let inode = self.process(1)?.namespaces.get("net")?;
        self.net.iter().find(|n| n.inode == *inode)
    }
}
