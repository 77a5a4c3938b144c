//! The checks there are.

mod syscalls;

use crate::Check;

/// All of them, in the order in which they are shown.
pub const ALL: &[&Check] = &[&syscalls::SYSCALLS];

/// The check of this name.
pub fn named(name: &str) -> Option<&'static Check> {
    ALL.iter().copied().find(|check| check.name == name)
}
