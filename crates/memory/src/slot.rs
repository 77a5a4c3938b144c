//! The parts a guest's memory is made of.

use crate::fault::Watch;
use crate::mapping::{Mapping, MappingKind};
use crate::process::{ProcessError, ProcessMemory};
use crate::source::Source;
use crate::{MemoryError, Region, copy};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vmsight_arch::Gpa;

/// Where the bytes of a slot come from.
#[derive(Clone, Debug)]
pub(crate) enum Backing {
    Mapped {
        mapping: Arc<Mapping>,
        offset: u64,
    },
    Process {
        process: Arc<ProcessMemory>,
        hva: u64,
        writable: bool,
    },
    Custom {
        source: Arc<dyn Source>,
        offset: u64,
    },
}

/// A range of guest-physical memory with one source. Its end never passes 2^64 − 1.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) region: Region,
    pub(crate) backing: Backing,
}

impl Slot {
    /// Bytes its source has from where the slot starts on, `None` where nobody knows.
    pub(crate) fn available(&self) -> Option<u64> {
        match &self.backing {
            Backing::Mapped { mapping, offset } => Some(mapping.len().saturating_sub(*offset)),
            Backing::Process { .. } => None,
            Backing::Custom { source, offset } => Some(source.len().saturating_sub(*offset)),
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        match &self.backing {
            Backing::Mapped { mapping, .. } => mapping.kind() != MappingKind::Frozen,
            Backing::Process { .. } => true,
            Backing::Custom { source, .. } => source.is_live(),
        }
    }

    pub(crate) fn is_writable(&self) -> bool {
        match &self.backing {
            Backing::Mapped { mapping, .. } => mapping.kind() == MappingKind::Live { writable: true },
            Backing::Process { writable, .. } => *writable,
            Backing::Custom { source, .. } => source.is_writable(),
        }
    }

    /// The slot that covers both where `next` goes on exactly where this one ends, in the guest and in the source.
    pub(crate) fn joined(&self, next: &Slot) -> Option<Slot> {
        if self.region.end() != next.region.start || !self.goes_on_in(next) {
            return None;
        }
        let region = Region {
            start: self.region.start,
            len: self.region.len.checked_add(next.region.len)?,
        };
        Some(Slot {
            region,
            backing: self.backing.clone(),
        })
    }

    /// Whether `next` begins in its source where this one ends in the same source, wherever the two are in the guest.
    pub(crate) fn goes_on_in(&self, next: &Slot) -> bool {
        let len = self.region.len;
        match (&self.backing, &next.backing) {
            (
                Backing::Mapped {
                    mapping: a,
                    offset: x,
                },
                Backing::Mapped {
                    mapping: b,
                    offset: y,
                },
            ) => Arc::ptr_eq(a, b) && x.checked_add(len) == Some(*y),
            (
                Backing::Process {
                    process: a,
                    hva: x,
                    writable: v,
                },
                Backing::Process {
                    process: b,
                    hva: y,
                    writable: w,
                },
            ) => Arc::ptr_eq(a, b) && x.checked_add(len) == Some(*y) && v == w,
            (Backing::Custom { source: a, offset: x }, Backing::Custom { source: b, offset: y }) => {
                Arc::ptr_eq(a, b) && x.checked_add(len) == Some(*y)
            }
            _ => false,
        }
    }

    /// Fills `buf` from `at` bytes into the slot, which has that many.
    pub(crate) fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let gpa = Gpa(self.region.start.0.wrapping_add(at));
        match &self.backing {
            Backing::Mapped { .. } => {
                let direct = self
                    .direct(at, buf.len() as u64)
                    .ok_or(MemoryError::Lost { gpa })?;
                // SAFETY: `direct` checked that so many bytes are mapped there; `buf` is ours alone.
                unsafe { copy::copy(direct.ptr, buf.as_mut_ptr(), buf.len()) };
                direct.check(buf.len(), gpa)
            }
            Backing::Process { process, hva, .. } => {
                let hva = hva.wrapping_add(at);
                process
                    .read(hva, buf)
                    .map_err(|(done, error)| process_error(error, process, gpa, hva, done))
            }
            Backing::Custom { source, offset } => {
                source
                    .read(offset.wrapping_add(at), buf)
                    .map_err(|reason| MemoryError::Source {
                        gpa,
                        reason: reason.into(),
                    })
            }
        }
    }

    /// As [`read`](Self::read), the way that is best for going over everything once.
    pub(crate) fn read_once(&self, at: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        match &self.backing {
            Backing::Mapped { mapping, offset } if mapping.read_file(offset.wrapping_add(at), buf) => Ok(()),
            _ => self.read(at, buf),
        }
    }

    /// Writes `data` at `at` bytes into the slot, which has that many and is writable.
    pub(crate) fn write(&self, at: u64, data: &[u8]) -> Result<(), MemoryError> {
        let gpa = Gpa(self.region.start.0.wrapping_add(at));
        match &self.backing {
            Backing::Mapped { mapping, .. } => {
                if mapping.kind() != (MappingKind::Live { writable: true }) {
                    return Err(MemoryError::ReadOnly { gpa });
                }
                let direct = self
                    .direct(at, data.len() as u64)
                    .ok_or(MemoryError::Lost { gpa })?;
                // SAFETY: `direct` checked that so many bytes are mapped there, the kind says that they may be
                // written, and nobody has a Rust reference to live memory.
                unsafe { copy::copy(data.as_ptr(), direct.ptr, data.len()) };
                direct.check(data.len(), gpa)
            }
            Backing::Process {
                process,
                hva,
                writable: true,
            } => {
                let hva = hva.wrapping_add(at);
                process
                    .write(hva, data)
                    .map_err(|(done, error)| process_error(error, process, gpa, hva, done))
            }
            Backing::Process { writable: false, .. } => Err(MemoryError::ReadOnly { gpa }),
            Backing::Custom { source, offset } => {
                source
                    .write(offset.wrapping_add(at), data)
                    .map_err(|reason| MemoryError::Source {
                        gpa,
                        reason: reason.into(),
                    })
            }
        }
    }

    /// Where the bytes `[at, at + len)` of the slot are mapped, if they are.
    pub(crate) fn direct(&self, at: u64, len: u64) -> Option<Direct<'_>> {
        let Backing::Mapped { mapping, offset } = &self.backing else {
            return None;
        };
        let start = offset.checked_add(at)?;
        if at.checked_add(len)? > self.region.len || start.checked_add(len)? > mapping.len() {
            return None;
        }
        // SAFETY: `start` is inside the mapping, or its end for an empty range.
        let ptr = unsafe { mapping.as_ptr().add(usize::try_from(start).ok()?) };
        Some(Direct {
            ptr,
            watch: mapping.watch(),
        })
    }
}

/// A place in a mapping of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Direct<'a> {
    pub(crate) ptr: *mut u8,
    watch: &'a Watch,
}

impl Direct<'_> {
    /// After an access of `len` bytes: was it real, or did the file behind it go away?
    pub(crate) fn is_intact(&self, len: usize) -> bool {
        // The access before must not be moved behind the loads.
        fence(Ordering::Acquire);
        let start = self.ptr as usize;
        self.watch
            .lost()
            .is_none_or(|lost| start.wrapping_add(len) <= lost.start || lost.end <= start)
    }

    /// The same as an error.
    fn check(&self, len: usize, gpa: Gpa) -> Result<(), MemoryError> {
        if self.is_intact(len) {
            Ok(())
        } else {
            Err(MemoryError::Lost { gpa })
        }
    }
}

/// Gives the guest's address to an error of the process that holds the memory.
pub(crate) fn process_error(
    error: ProcessError,
    process: &ProcessMemory,
    gpa: Gpa,
    hva: u64,
    done: usize,
) -> MemoryError {
    let pid = process.pid();
    let gpa = Gpa(gpa.0.wrapping_add(done as u64));
    match error {
        ProcessError::Exited => MemoryError::Exited { pid },
        ProcessError::NoPermission => MemoryError::NoPermission { pid },
        ProcessError::NotMapped => MemoryError::NotMapped {
            gpa,
            pid,
            hva: hva.wrapping_add(done as u64),
        },
        ProcessError::System(errno) => MemoryError::System { gpa, errno },
    }
}
