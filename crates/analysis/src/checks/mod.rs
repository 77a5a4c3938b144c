//! The checks there are.

mod bpf;
mod callbacks;
mod credentials;
mod deferred;
mod entry;
mod golden;
mod hidden;
mod io_uring;
mod kernel_state;
mod kernel_threads;
mod memory;
mod pointers;
mod probes;
mod process_names;
mod seccomp;
mod sites;
mod stacks;
mod syscalls;
mod tables;
mod text;
mod tracing;

use crate::Check;

/// All of them, in the order in which they are shown.
pub const ALL: &[&Check] = &[
    &syscalls::SYSCALLS,
    &entry::ENTRY,
    &entry::IDT,
    &entry::GDT,
    &text::TEXT,
    &tracing::FTRACE,
    &tracing::KPROBES,
    &tracing::STATIC_CALLS,
    &tables::RODATA,
    &tables::PROC,
    &tables::SEQ_OPS,
    &tables::FILESYSTEMS,
    &tables::TTY,
    &callbacks::NOTIFIERS,
    &callbacks::NETFILTER,
    &callbacks::LSM,
    &callbacks::BINFMT,
    &callbacks::INPUT,
    &deferred::TIMERS,
    &deferred::HRTIMERS,
    &deferred::WORKQUEUES,
    &kernel_threads::KERNEL_THREADS,
    &stacks::STACKS,
    &probes::UPROBES,
    &probes::PERF,
    &bpf::BPF,
    &io_uring::IO_URING,
    &hidden::MODULES,
    &hidden::PROCESSES,
    &hidden::THREADS,
    &hidden::SOCKETS,
    &hidden::FILES,
    &credentials::CREDENTIALS,
    &seccomp::SECCOMP,
    &memory::KERNEL_PAGES,
    &memory::PROCESS_MEMORY,
    &memory::PROCESS_CODE,
    &process_names::PROCESS_NAMES,
    &kernel_state::HELPERS,
    &kernel_state::SECURITY_MODULES,
    &kernel_state::SETTINGS,
    &kernel_state::PROCESSOR,
    &kernel_state::TAINT,
];

pub use golden::GOLDEN;

/// Those of [`ALL`], and [`GOLDEN`], which needs a baseline.
pub fn known() -> impl Iterator<Item = &'static Check> {
    ALL.iter().copied().chain([&GOLDEN])
}

/// The check of this name.
pub fn named(name: &str) -> Option<&'static Check> {
    known().find(|check| check.name == name)
}
