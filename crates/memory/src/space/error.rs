//! Why virtual memory could not be read.

use vmsight_arch::Gva;
use vmsight_arch::paging::PageFault;

use crate::MemoryError;

/// A read or write of virtual memory that failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot access {gva}: {cause}")]
pub struct ReadError {
    /// The first byte that could not be accessed.
    pub gva: Gva,
    /// Why.
    pub cause: ReadCause,
}

/// Why an access failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadCause {
    /// The page tables lead nowhere. Boxed, so that results stay small.
    #[error("{0}")]
    Fault(Box<PageFault>),
    /// The page tables lead to memory that could not be accessed.
    #[error("{0}")]
    Memory(MemoryError),
    /// The guest changed the page tables on the way each time it was tried.
    #[error("the page tables kept changing while they were read")]
    Unstable,
}

impl ReadError {
    pub(super) fn fault(fault: PageFault) -> Self {
        Self {
            gva: fault.gva,
            cause: ReadCause::Fault(Box::new(fault)),
        }
    }

    /// The page fault, where that is why.
    pub fn page_fault(&self) -> Option<&PageFault> {
        match &self.cause {
            ReadCause::Fault(fault) => Some(fault),
            ReadCause::Memory(_) | ReadCause::Unstable => None,
        }
    }

    /// Whether the page was there and the guest has put it elsewhere (its entry is not present, yet not zero).
    pub fn is_paged_out(&self) -> bool {
        self.page_fault().is_some_and(PageFault::is_paged_out)
    }
}
