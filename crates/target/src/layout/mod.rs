//! Where guest-physical memory lies in the VMM's process, and how it is reached there.
//!
//! [`from_monitor`] asks QEMU; [`deduce`] works without anybody's help and gives candidates that must be proven
//! before they are believed; [`backing`] turns either into [`vmsight_memory::GuestMemory`], mapped where the
//! memory is shared and through the process where it is not.

pub(crate) mod backing;
pub(crate) mod deduce;
pub(crate) mod from_monitor;
pub(crate) mod machine;

use std::fmt;

/// A range of guest-physical memory and where the VMM's process has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HostRange {
    /// Its first guest-physical address.
    pub(crate) gpa: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Its address in the process.
    pub(crate) hva: u64,
}

impl fmt::Display for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x}-{:#x} at {:#x}",
            self.gpa,
            self.gpa.saturating_add(self.len),
            self.hva
        )
    }
}

/// Neighbours in both address spaces joined, in order of guest-physical address.
pub(crate) fn joined(mut ranges: Vec<HostRange>) -> Vec<HostRange> {
    ranges.sort_by_key(|r| r.gpa);
    let mut all: Vec<HostRange> = Vec::with_capacity(ranges.len());
    for next in ranges {
        match all.last_mut() {
            Some(last)
                if last.gpa.checked_add(last.len) == Some(next.gpa)
                    && last.hva.checked_add(last.len) == Some(next.hva) =>
            {
                last.len = last.len.saturating_add(next.len);
            }
            _ => all.push(next),
        }
    }
    all
}
