//! The checks there are.

mod callbacks;
mod credentials;
mod entry;
mod golden;
mod hidden;
mod kernel_state;
mod memory;
mod pointers;
mod sites;
mod switch;
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
    &callbacks::TIMERS,
    &callbacks::BPF,
    &hidden::MODULES,
    &hidden::PROCESSES,
    &hidden::SOCKETS,
    &credentials::CREDENTIALS,
    &memory::KERNEL_PAGES,
    &memory::PROCESS_MEMORY,
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
