//! Puts a guest's memory together from its parts.

use crate::guest::GuestMemory;
use crate::mapping::{Mapping, MappingKind};
use crate::process::ProcessMemory;
use crate::slot::{Backing, Slot};
use crate::source::Source;
use crate::{BuildError, Region};
use std::sync::Arc;
use vmsight_arch::Gpa;

/// Collects the slots of a guest's memory. Order does not matter; overlaps are refused.
#[derive(Debug, Default)]
pub struct Builder {
    slots: Vec<Slot>,
    missing: Vec<Region>,
    notes: Vec<String>,
}

impl Builder {
    /// `len` bytes at `gpa` are those of `mapping` from `offset` on.
    #[must_use]
    pub fn mapped(mut self, gpa: Gpa, len: u64, mapping: &Arc<Mapping>, offset: u64) -> Self {
        let backing = Backing::Mapped {
            mapping: Arc::clone(mapping),
            offset,
        };
        self.slots.push(Slot {
            region: Region { start: gpa, len },
            backing,
        });
        self
    }

    /// `len` bytes at `gpa` lie at `hva` in another process. Writes go there only where `writable`.
    #[must_use]
    pub fn process(
        mut self,
        gpa: Gpa,
        len: u64,
        process: &Arc<ProcessMemory>,
        hva: u64,
        writable: bool,
    ) -> Self {
        let backing = Backing::Process {
            process: Arc::clone(process),
            hva,
            writable,
        };
        self.slots.push(Slot {
            region: Region { start: gpa, len },
            backing,
        });
        self
    }

    /// `len` bytes at `gpa` are those of `source` from `offset` on.
    #[must_use]
    pub fn custom(mut self, gpa: Gpa, len: u64, source: Arc<dyn Source>, offset: u64) -> Self {
        self.slots.push(Slot {
            region: Region { start: gpa, len },
            backing: Backing::Custom { source, offset },
        });
        self
    }

    /// The machine has memory in `region`, but nobody knows its contents. Reads there say so.
    #[must_use]
    pub fn missing(mut self, region: Region) -> Self {
        self.missing.push(region);
        self
    }

    /// A remark for whoever uses the memory: what is missing, what was guessed.
    #[must_use]
    pub fn note(mut self, note: String) -> Self {
        self.notes.push(note);
        self
    }

    /// Checks the parts and makes the memory of them. No slots at all is a memory in which nothing is backed.
    pub fn build(self) -> Result<GuestMemory, BuildError> {
        let Self {
            mut slots,
            mut missing,
            notes,
        } = self;
        for slot in &slots {
            let Region { start, len } = slot.region;
            if len == 0 || start.checked_add(len).is_none() {
                return Err(BuildError::BadRange { start, len });
            }
            if let Some(have) = slot.available()
                && have < len
            {
                return Err(BuildError::TooShort {
                    region: slot.region,
                    need: len,
                    have,
                });
            }
        }
        slots.sort_by_key(|slot| slot.region.start);
        let mut joined: Vec<Slot> = Vec::with_capacity(slots.len());
        for slot in slots {
            match joined.last_mut() {
                Some(last) if last.region.end() > slot.region.start => {
                    return Err(BuildError::Overlap {
                        first: last.region,
                        second: slot.region,
                    });
                }
                Some(last) => match last.joined(&slot) {
                    // QEMU shows one block as several ranges (ROM shadows): one slot again.
                    Some(both) => *last = both,
                    None => joined.push(slot),
                },
                None => joined.push(slot),
            }
        }
        missing.retain(|region| region.len > 0);
        missing.sort_by_key(|region| region.start);
        missing.dedup_by(|next, last| {
            let joins = next.start <= last.end();
            if joins {
                last.len = last.len.max(next.end().0.saturating_sub(last.start.0));
            }
            joins
        });
        Ok(GuestMemory::of_slots(joined, missing, notes))
    }
}

impl GuestMemory {
    /// Starts with no memory at all.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A dump made of these bytes.
    ///
    /// # Errors
    /// Parts that are empty or overlap.
    pub fn from_bytes(parts: Vec<(Gpa, Vec<u8>)>) -> Result<Self, BuildError> {
        Self::of_copies(parts, MappingKind::Frozen)
    }

    /// Memory of a running, writable guest that starts with these bytes.
    ///
    /// # Errors
    /// Parts that are empty or overlap.
    pub fn live_from_bytes(parts: Vec<(Gpa, Vec<u8>)>) -> Result<Self, BuildError> {
        Self::of_copies(parts, MappingKind::Live { writable: true })
    }

    fn of_copies(parts: Vec<(Gpa, Vec<u8>)>, kind: MappingKind) -> Result<Self, BuildError> {
        let mut builder = Self::builder();
        for (gpa, bytes) in parts {
            let len = bytes.len() as u64;
            let mapping =
                Mapping::of_bytes(&bytes, kind).map_err(|_| BuildError::BadRange { start: gpa, len })?;
            builder = builder.mapped(gpa, len, &mapping, 0);
        }
        builder.build()
    }
}
