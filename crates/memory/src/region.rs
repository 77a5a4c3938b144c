//! Ranges of guest-physical memory.

use std::fmt;
use vmsight_arch::Gpa;

/// A range of guest-physical memory in bytes. Its end never passes 2^64 − 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Region {
    /// The first byte.
    pub start: Gpa,
    /// Length in bytes.
    pub len: u64,
}

impl Region {
    /// The first byte after the region.
    pub fn end(&self) -> Gpa {
        Gpa(self.start.0.saturating_add(self.len))
    }

    /// Whether the byte at `gpa` lies in it.
    pub fn contains(&self, gpa: Gpa) -> bool {
        gpa.0.wrapping_sub(self.start.0) < self.len
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end())
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({self})")
    }
}
