//! The Linux view of a guest: processes, modules, sockets, files.

#![forbid(unsafe_code)]

mod attach;
pub mod bpf;
pub(crate) mod budget;
pub mod clock;
mod error;
pub mod file;
pub mod iface;
mod info;
mod kernel;
pub mod kmsg;
pub(crate) mod layout;
pub mod listing;
pub mod maps;
pub mod module;
mod module_types;
pub mod mount;
pub mod neighbour;
pub mod path;
mod percpu;
pub mod perf;
mod resource;
pub mod route;
mod slab;
pub mod socket;
pub mod stack;
pub mod structures;
pub mod syscall;
pub mod task;
pub mod text;
mod vmcoreinfo;
mod warnings;

pub use attach::{AttachError, AttachOptions, Foreseen};
pub use error::LinuxError;
pub use info::Info;
pub use kernel::Kernel;
pub use listing::{Listing, Problem};
pub use maps::{Mapping, ProcessMaps};
pub use percpu::PerCpu;
pub use resource::Resource;
pub use slab::SlabCache;
pub use stack::StackFrame;
pub use task::{
    Cgroup, Current, CurrentReader, PidChain, Process, ProcessDetails, ProcessFields, Thread, TreeNode,
    process_tree,
};
pub use vmcoreinfo::Vmcoreinfo;
