//! Walks over the kernel's containers: lists, trees, arrays. Each is bounded, notices cycles, and says how it ended.
//!
//! A walk never fails as a whole: it returns what it found before the trouble, and the trouble.

pub mod hlist;
pub mod list;
pub(crate) mod maple;
pub(crate) mod rbtree;
pub mod xarray;

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;
use vmsight_memory::ReadError;

/// No container of the kernel that is listed here holds more: PID_MAX_LIMIT on 64-bit is 4 Mi (include/linux/threads.h).
pub const MAX_OBJECTS: usize = 4 << 20;

/// How a walk came to its end.
#[derive(Clone, Debug, Default)]
pub enum End {
    /// At the container's own end.
    #[default]
    Complete,
    /// It came back to an element it had been at.
    Cycle {
        /// That element.
        at: Gva,
    },
    /// The bound was reached.
    Bound {
        /// Elements allowed.
        limit: usize,
    },
    /// An element could not be read.
    Unreadable {
        /// The element.
        at: Gva,
        /// Why.
        error: ReadError,
    },
    /// The structure contradicts itself.
    Broken {
        /// The element.
        at: Gva,
        /// How.
        reason: &'static str,
    },
}

impl End {
    /// The sentence for a listing's warnings, `None` where the walk was complete. `what` names the container: "task list".
    pub fn warning(&self, what: &str) -> Option<String> {
        match self {
            End::Complete => None,
            End::Cycle { at } => Some(format!("{what}: cut, it comes back to {at} (a cycle)")),
            End::Bound { limit } => Some(format!("{what}: cut after {limit} elements")),
            End::Unreadable { at, error } => Some(format!(
                "{what}: cut, the element at {at} cannot be read: {error}"
            )),
            End::Broken { at, reason } => Some(format!("{what}: cut at {at}: {reason}")),
        }
    }

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        matches!(self, End::Complete)
    }
}

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct Walk<T = Gva> {
    /// The elements in the container's order.
    pub items: Vec<T>,
    /// How it ended.
    pub end: End,
}

impl<T> Walk<T> {
    fn new() -> Self {
        Self {
            items: Vec::new(),
            end: End::Complete,
        }
    }
}

/// Elements seen so far. Most chains are short: those are searched, not hashed.
#[derive(Default)]
pub(crate) struct Seen {
    few: Vec<Gva>,
    many: FxHashSet<u64>,
}

impl Seen {
    const FEW: usize = 16;

    /// Notes `at`; false if it had been seen.
    pub(crate) fn insert(&mut self, at: Gva) -> bool {
        if self.many.is_empty() {
            if self.few.contains(&at) {
                return false;
            }
            self.few.push(at);
            if self.few.len() > Self::FEW {
                self.many.extend(self.few.drain(..).map(|g| g.0));
            }
            return true;
        }
        self.many.insert(at.0)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! An address space over a few kilobytes, mapped one to one: what the walks are tried on.

    use vmsight_arch::paging::PagingMode;
    use vmsight_arch::{Dtb, Gpa};
    use vmsight_memory::{AddressSpace, GuestMemory};

    /// Memory from address 0 on that holds these words, 64 KiB in all; the first two pages are the page tables.
    pub(crate) fn space(words: &[(u64, u64)]) -> AddressSpace {
        let mut bytes = vec![0u8; 64 << 10];
        let tables = [(0, 0x1000 | 3), (0x1000, 0x83)];
        for &(at, value) in tables.iter().chain(words) {
            bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
        }
        let memory = GuestMemory::from_bytes(vec![(Gpa(0), bytes)]).expect("one part");
        AddressSpace::new(memory, PagingMode::X86Level4, Dtb(0))
    }
}
