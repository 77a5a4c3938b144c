//! The checks there are.

mod credentials;
mod hidden;
mod kernel_state;
mod memory;
mod syscalls;

use crate::Check;

/// All of them, in the order in which they are shown.
pub const ALL: &[&Check] = &[
    &syscalls::SYSCALLS,
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

/// The check of this name.
pub fn named(name: &str) -> Option<&'static Check> {
    ALL.iter().copied().find(|check| check.name == name)
}
