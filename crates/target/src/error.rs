//! What goes wrong when a target is found, attached to and used.

use std::io;
use std::path::PathBuf;

use vmsight_memory::BuildError;

use crate::gdb::GdbError;
use crate::qmp::QmpError;

/// Why a target cannot be attached to or used. The messages say what to try.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The target's name has a form that means nothing.
    #[error("{spec:?} is no target: {reason}")]
    BadSpec {
        /// What was given.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `/proc` cannot be read.
    #[error("cannot list the processes of this host: {0}")]
    List(#[source] io::Error),
    /// No running VM and no file has this name.
    #[error("no VM and no file is called {name:?}{}", known_text(known))]
    NotFound {
        /// The name.
        name: String,
        /// The VMs there are, as target and name.
        known: Vec<String>,
    },
    /// Several VMs have this name.
    #[error("{} VMs are called {name:?}: say which by its process, {}", pids.len(), pid_list(pids))]
    Ambiguous {
        /// The name.
        name: String,
        /// Their processes.
        pids: Vec<u32>,
    },
    /// No such process.
    #[error("there is no process {pid}")]
    NoProcess {
        /// The pid.
        pid: u32,
    },
    /// The process is there and is no VM.
    #[error("process {pid} ({comm}) is no virtual machine that vmsight knows")]
    NotAVm {
        /// The pid.
        pid: u32,
        /// Its name, escaped.
        comm: String,
    },
    /// The VM's process ended while it was worked with.
    #[error("the VM exited: its process {pid} is gone")]
    Exited {
        /// The pid.
        pid: u32,
    },
    /// The kernel refuses.
    #[error("no permission to {doing} of process {pid}: {hint}")]
    NoPermission {
        /// The pid.
        pid: u32,
        /// What was tried.
        doing: &'static str,
        /// What would help.
        hint: String,
    },
    /// A QMP socket does not help.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A gdb stub does not help.
    #[error(transparent)]
    Gdb(#[from] GdbError),
    /// libvirt, which holds the VM's monitor, does not help.
    #[error("virsh {doing}: {reason}")]
    Virsh {
        /// What it was told to do.
        doing: String,
        /// What it said.
        reason: String,
    },
    /// What lies where in the machine cannot be learnt through its gdb stub.
    #[error("gdb stub {address}: {reason}, and without that its memory would have to be guessed at")]
    NoMemoryMap {
        /// The stub.
        address: String,
        /// What is missing.
        reason: String,
    },
    /// The process that listens on a socket cannot be seen.
    #[error(
        "the process behind {} cannot be seen from here (another pid namespace or host): its memory cannot be reached",
        path.display()
    )]
    NoProcessOfSocket {
        /// The socket.
        path: PathBuf,
    },
    /// No layout could be made of what the process shows.
    #[error("where process {pid} has its guest's memory cannot be told: {reason}{}", monitor_text(monitor.as_ref()))]
    NoLayout {
        /// The pid.
        pid: u32,
        /// What is missing.
        reason: String,
        /// Why its monitor was of no help.
        monitor: Option<String>,
    },
    /// Layouts were made, and none could be proven right.
    #[error(
        "where process {pid} has its guest's memory could not be proven, and a guess is not good enough{}; tried:{}",
        monitor_text(monitor.as_ref()),
        tried_text(tried)
    )]
    Unproven {
        /// The pid.
        pid: u32,
        /// Each layout with the reason why it was given up.
        tried: Vec<String>,
        /// Why its monitor was of no help.
        monitor: Option<String>,
    },
    /// The guest memory could not be put together.
    #[error(transparent)]
    Memory(#[from] BuildError),
    /// A dump could not be opened.
    #[error(transparent)]
    Dump(#[from] vmsight_memory::dump::DumpError),
    /// A dump is a file that nobody writes to.
    #[error("{} is a dump: only running VMs can be written to", path.display())]
    DumpWrite {
        /// The file.
        path: PathBuf,
    },
    /// There is nothing that could tell the registers.
    #[error("the registers of {target} cannot be read: {why}")]
    NoRegisters {
        /// The target.
        target: String,
        /// What is missing.
        why: String,
    },
    /// There is no such vCPU.
    #[error("{target} has no vCPU {vcpu}: it has {count}")]
    NoVcpu {
        /// The target.
        target: String,
        /// The number asked for.
        vcpu: u32,
        /// How many it has.
        count: usize,
    },
    /// Nothing tells where its devices' memory lies.
    #[error("the memory of {target}'s devices cannot be read: {why}")]
    NoDeviceMemory {
        /// The target.
        target: String,
        /// What is missing.
        why: String,
    },
    /// There is nothing that could pause it.
    #[error("{target} cannot be paused: {why}")]
    NoPause {
        /// The target.
        target: String,
        /// What is missing.
        why: String,
    },
    /// There is no gdb stub to be had.
    #[error("{target} has no gdb stub to be used: {why}")]
    NoStub {
        /// The target.
        target: String,
        /// What is missing, or who stands in the way.
        why: String,
    },
    /// The process that would let the VM go on if we died could not be started, so the VM was not paused.
    #[error("the VM was not paused: {what}: {source}")]
    Guard {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl TargetError {
    /// Whether the VM is gone, so that nothing more can be expected from it.
    #[must_use]
    pub fn is_exit(&self) -> bool {
        match self {
            Self::Exited { .. } => true,
            Self::Qmp(e) => e.is_exit(),
            Self::Gdb(e) => e.is_exit(),
            _ => false,
        }
    }

    /// The error of the system when a process was looked at.
    pub(crate) fn of_process(pid: u32, doing: &'static str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Exited { pid },
            _ if error.raw_os_error() == Some(3) => Self::Exited { pid },
            io::ErrorKind::PermissionDenied => Self::NoPermission {
                pid,
                doing,
                hint: permission_hint(),
            },
            _ => Self::NoPermission {
                pid,
                doing,
                hint: error.to_string(),
            },
        }
    }
}

/// What helps when a process may not be looked into.
fn permission_hint() -> String {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let yama = match scope.trim() {
        "1" | "2" => {
            ", and /proc/sys/kernel/yama/ptrace_scope forbids looking into processes that are not one's own children"
        }
        "3" => {
            ", and /proc/sys/kernel/yama/ptrace_scope is 3, which forbids it to everybody until the next boot"
        }
        _ => "",
    };
    let user = if rustix::process::geteuid().is_root() {
        "root alone is not enough here, CAP_SYS_PTRACE is missing (a container?)"
    } else {
        "run as root or with CAP_SYS_PTRACE"
    };
    format!("{user}{yama}")
}

fn known_text(known: &[String]) -> String {
    if known.is_empty() {
        "; no VM runs here".to_owned()
    } else {
        format!("; there are {}", known.join(", "))
    }
}

fn pid_list(pids: &[u32]) -> String {
    pids.iter()
        .map(|p| format!("pid:{p}"))
        .collect::<Vec<_>>()
        .join(" or ")
}

fn monitor_text(monitor: Option<&String>) -> String {
    monitor
        .map(|m| format!("; its monitor did not help: {m}"))
        .unwrap_or_default()
}

fn tried_text(tried: &[String]) -> String {
    tried.iter().map(|t| format!("\n  {t}")).collect()
}
