//! The checks there are.

mod entry;
mod switch;
mod syscalls;

use crate::Check;

/// All of them, in the order in which they are shown.
pub const ALL: &[&Check] = &[&syscalls::SYSCALLS, &entry::ENTRY, &entry::IDT, &entry::GDT];

/// The check of this name.
pub fn named(name: &str) -> Option<&'static Check> {
    ALL.iter().copied().find(|check| check.name == name)
}
