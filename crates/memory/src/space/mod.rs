//! Virtual memory of a guest: an address space over its physical memory.
//!
//! A read goes through the guest's own page tables. What was learnt on the way is remembered, one slot for each
//! stretch of 2 MiB: either where the large page there is mapped, or where its table of small pages lies. Of a table the last
//! entry is always read anew, so that slot is all a read of any of its 512 pages needs.
//!
//! **Live memory.** The guest may rewrite its tables at any moment. A result counts only if, after the bytes were copied, every
//! entry on the way still holds what it held before: then the tables led there while the copy was made. Otherwise the read is made
//! again, and after a number of tries fails as [`ReadCause::Unstable`]. So a remembered stretch is dropped by evidence and
//! never by a timer. Dumps do not change and need no second look.
//!
//! **Memory of another process** costs a system call a read. There, pages are remembered one by one, and the bytes and
//! the entries that prove them are fetched in one call.

mod batch;
mod cache;
mod error;
mod hot;
mod look;
mod mapped;
mod partial;
mod remote;
mod walk;

pub use batch::GvaReadOp;
pub use error::{ReadCause, ReadError};

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use vmsight_arch::paging::{self, Absent, Mappings, PageFault, PagingMode, Translation};
use vmsight_arch::{Dtb, Gva};

use crate::GuestMemory;
use cache::Cache;
use mapped::Mapped;

/// How often a read is tried while the guest rewrites the tables under it.
const TRIES: usize = 16;

/// Slots of the space that is read most, the kernel's: 128 KiB, 2 GiB of addresses.
const SLOTS_BITS: u8 = 10;

/// Slots of a space made by [`AddressSpace::with_dtb`]: there is one for each process, 2 KiB.
const FEW_SLOTS_BITS: u8 = 4;

/// The virtual memory behind one page-table root. Clones share everything and cost nothing; all methods may be called
/// from many threads at once.
#[derive(Clone)]
pub struct AddressSpace {
    inner: Arc<Inner>,
}

struct Inner {
    memory: GuestMemory,
    mode: PagingMode,
    dtb: Dtb,
    /// What an entry that is not present means.
    absent: Absent,
    /// Whether tables can change.
    live: bool,
    /// See [`GuestMemory::keeps_order`].
    ordered: bool,
    /// log2 of the smallest page.
    page_shift: u8,
    /// log2 of what an entry above the last table spans.
    span_shift: u8,
    backend: Backend,
}

/// How the memory is reached, and what is remembered there.
enum Backend {
    /// All of it is mapped here; up to four levels of tables.
    Mapped(Mapped),
    /// All of it is mapped here; five levels.
    MappedFive(Mapped),
    /// Some of it must be asked for.
    Remote(Cache),
}

impl AddressSpace {
    /// The address space of the tables at `dtb`. Nothing is read yet.
    pub fn new(memory: GuestMemory, mode: PagingMode, dtb: Dtb) -> Self {
        Self::with_slots(memory, mode, dtb, SLOTS_BITS)
    }

    /// The same with 2^`bits` slots (128 bytes each, at most 2^20) to remember walks in.
    pub fn with_slots(memory: GuestMemory, mode: PagingMode, dtb: Dtb, bits: u8) -> Self {
        Self::make(memory, mode, dtb, Absent::NoPage, bits)
    }

    fn make(memory: GuestMemory, mode: PagingMode, dtb: Dtb, absent: Absent, bits: u8) -> Self {
        let inner = Inner {
            live: memory.is_live(),
            ordered: memory.keeps_order(),
            page_shift: mode.span_shift(1),
            span_shift: mode.span_shift(2),
            backend: match (memory.is_all_mapped(), mode.levels()) {
                (true, 0..=4) => Backend::Mapped(Mapped::new(&memory, mode, dtb, bits)),
                (true, _) => Backend::MappedFive(Mapped::new(&memory, mode, dtb, bits)),
                (false, _) => Backend::Remote(Cache::new(bits)),
            },
            memory,
            mode,
            dtb,
            absent,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Another address space of the same guest: that of a process. Shares the memory and nothing else; cheap enough
    /// to make one for each process of a listing.
    pub fn with_dtb(&self, dtb: Dtb) -> Self {
        self.with_absent(dtb, Absent::NoPage)
    }

    /// The same, with the pages that the guest's system keeps behind entries that are not present: `absent` says how.
    pub fn with_absent(&self, dtb: Dtb, absent: Absent) -> Self {
        let memory = self.inner.memory.clone();
        Self::make(memory, self.inner.mode, dtb, absent, FEW_SLOTS_BITS)
    }

    /// The root of the tables.
    pub fn dtb(&self) -> Dtb {
        self.inner.dtb
    }

    /// How addresses are translated.
    pub fn mode(&self) -> PagingMode {
        self.inner.mode
    }

    /// The physical memory underneath.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// Where `gva` lies, with the rights on it and the entries that say so. Always walks the tables.
    ///
    /// # Errors
    /// The page fault. On live memory that changes during the walk, what the last try found.
    pub fn translate(&self, gva: Gva) -> Result<Translation, PageFault> {
        self.inner.translate(gva)
    }

    /// The pages that `range` touches, in address order, holes skipped. `max_tables` bounds the tables visited, see
    /// [`paging::mappings`].
    pub fn mappings(&self, range: RangeInclusive<Gva>, max_tables: u64) -> Mappings<'_, GuestMemory> {
        paging::mappings(
            self.inner.mode,
            &self.inner.memory,
            self.inner.dtb,
            range,
            max_tables,
        )
        .with_absent(self.inner.absent)
    }

    /// Fills `buf` from `gva` on, across pages.
    ///
    /// # Errors
    /// The first address that could not be read, and why. `buf` may then be filled in part.
    #[inline]
    pub fn read(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        if self.inner.read_within(gva, buf) {
            Ok(())
        } else {
            self.inner.read_slow(gva, buf)
        }
    }

    /// The little-endian 8-byte integer at `gva`. Read at once where it is aligned and mapped.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u64(&self, gva: Gva) -> Result<u64, ReadError> {
        match self.inner.load::<u64>(gva) {
            Some(value) => Ok(u64::from_le(value)),
            None => self.inner.load_again(gva, u64::from_ne_bytes).map(u64::from_le),
        }
    }

    /// The little-endian 4-byte integer at `gva`.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u32(&self, gva: Gva) -> Result<u32, ReadError> {
        match self.inner.load::<u32>(gva) {
            Some(value) => Ok(u32::from_le(value)),
            None => self.inner.load_again(gva, u32::from_ne_bytes).map(u32::from_le),
        }
    }

    /// The little-endian 2-byte integer at `gva`.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u16(&self, gva: Gva) -> Result<u16, ReadError> {
        match self.inner.load::<u16>(gva) {
            Some(value) => Ok(u16::from_le(value)),
            None => self.inner.load_again(gva, u16::from_ne_bytes).map(u16::from_le),
        }
    }

    /// The byte at `gva`.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u8(&self, gva: Gva) -> Result<u8, ReadError> {
        match self.inner.load::<u8>(gva) {
            Some(value) => Ok(u8::from_le(value)),
            None => self.inner.load_again(gva, u8::from_ne_bytes).map(u8::from_le),
        }
    }

    /// The bytes from `gva` up to, not including, the first zero byte, or `max` bytes where none comes before. Crosses
    /// pages; memory grows with the bytes found, not with `max`.
    ///
    /// # Errors
    /// Where a page on the way could not be read. What came before it is lost: use [`Self::read_partial`] to have it.
    pub fn read_cstr(&self, gva: Gva, max: usize) -> Result<Vec<u8>, ReadError> {
        // Names are short: first little, then up to the end of each page.
        const FIRST: usize = 64;
        let mut text = Vec::new();
        let mut want = FIRST;
        while text.len() < max {
            let at = gva.wrapping_add(text.len() as u64);
            let to_page_end =
                (1 << self.inner.page_shift) - (at.0 as usize & ((1 << self.inner.page_shift) - 1));
            let len = want.min(to_page_end).min(max - text.len());
            let old = text.len();
            text.resize(old + len, 0);
            let new = text.get_mut(old..).unwrap_or_default();
            self.read(at, new)?;
            if let Some(end) = new.iter().position(|&b| b == 0) {
                text.truncate(old + end);
                return Ok(text);
            }
            want = usize::MAX;
        }
        Ok(text)
    }

    /// Writes `data` at `gva`, whatever rights the guest's tables give. Whether every page is there is found out
    /// first: a hole fails before anything is changed.
    ///
    /// # Errors
    /// The first address that cannot be written, and why.
    pub fn write(&self, gva: Gva, data: &[u8]) -> Result<(), ReadError> {
        let mut pieces = Vec::new();
        let mut done = 0usize;
        while done < data.len() {
            let at = self.inner.advance(gva, done)?;
            let page = self.translate(at).map_err(ReadError::fault)?;
            let left = page.page_size() - (page.gpa.0 & (page.page_size() - 1));
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(data.len() - done);
            pieces.push((at, page.gpa, done..done + len));
            done += len;
        }
        for (gva, gpa, range) in pieces {
            self.inner
                .memory
                .write(gpa, data.get(range).unwrap_or_default())
                .map_err(|error| ReadError {
                    gva,
                    cause: ReadCause::Memory(error),
                })?;
        }
        Ok(())
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace")
            .field("dtb", &self.inner.dtb)
            .field("mode", &self.inner.mode)
            .field("memory", &self.inner.memory)
            .finish()
    }
}
