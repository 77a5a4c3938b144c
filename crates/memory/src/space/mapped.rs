//! Reads where all memory is mapped in this process: the fast way.

use std::sync::atomic::{Ordering, fence};

use vmsight_arch::paging::Resolved;
use vmsight_arch::{Gpa, Gva};

use super::cache::{DEPTH, Found, NO_PAGE};
use super::{Inner, Method, ReadCause, ReadError, TRIES};
use crate::copy;
use crate::fault;

/// Bits 51:12 of an x86-64 entry.
const LONG_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The entry of a small page: where it is mapped and what it held.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    place: *const u8,
    value: u64,
}

impl Inner {
    /// Whether the first `N` entries of the evidence are what they were.
    #[inline(always)]
    fn upper<const N: usize>(found: &Found) -> bool {
        // All are compared, without a branch between: the loads overlap.
        let mut differs = 0;
        for e in found.evidence.iter().take(N) {
            // SAFETY: the slot was filled by `found_of` with places of 8 mapped bytes of our own memory, which
            // stays mapped as long as `self`; `Cache::get` gives only what one call of `put` stored.
            let now = unsafe { copy::load::<u64>(std::ptr::with_exposed_provenance(e.place as usize)) };
            differs |= u64::from_le(now) ^ e.value;
            // In this order, also off x86, where this costs nothing.
            fence(Ordering::Acquire);
        }
        differs == 0
    }

    /// Where `gva` lies by what is remembered of its stretch, and for a small page the entry that says so.
    #[inline(always)]
    pub(super) fn hit_of(&self, found: &Found, gva: Gva) -> Option<(Gpa, Option<Leaf>)> {
        if found.page != NO_PAGE {
            return Some((Gpa(found.page | (gva.0 & ((1 << self.span_shift) - 1))), None));
        }
        let place = self.leaf_place(found, gva);
        // SAFETY: the whole table is mapped: `found_of` looked.
        let value = u64::from_le(unsafe { copy::load::<u64>(place) });
        let page = if self.long {
            if value & 1 == 0 {
                return None;
            }
            Gpa(value & LONG_ADDRESS)
        } else {
            self.mode.last_level_page(value)?
        };
        Some((
            Gpa(page.0 | (gva.0 & ((1 << self.page_shift) - 1))),
            Some(Leaf { place, value }),
        ))
    }

    /// Where the last entry for `gva` is mapped.
    #[inline(always)]
    pub(super) fn leaf_place(&self, found: &Found, gva: Gva) -> *const u8 {
        let index = (gva.0 >> self.page_shift) & self.last_index_mask();
        std::ptr::with_exposed_provenance((found.table + (index << 3)) as usize)
    }

    /// Whether every entry behind a hit still holds what it held. To be asked after the bytes were copied.
    #[inline(always)]
    pub(super) fn holds<const N: usize>(&self, found: &Found, leaf: Option<Leaf>) -> bool {
        if !self.live {
            return true;
        }
        // Root first, the last entry last: if none differs, all of them held at once when the root's was looked at.
        if !Self::upper::<N>(found) {
            return false;
        }
        match leaf {
            // SAFETY: as when it was read.
            Some(Leaf { place, value }) => u64::from_le(unsafe { copy::load::<u64>(place) }) == value,
            None => true,
        }
    }

    /// One access of `len` bytes in one page, if what is remembered serves: `access` gets the mapped address.
    #[inline(always)]
    fn quick<const N: usize, T>(
        &self,
        gva: Gva,
        len: usize,
        access: impl FnOnce(*const u8) -> T,
    ) -> Option<T> {
        let found = self.cache.get::<N>(gva.0 >> self.span_shift)?;
        let (gpa, leaf) = self.hit_of(&found, gva)?;
        let ptr = self.memory.mapped(gpa, len)?;
        let value = access(ptr);
        // A compiler and, off x86, a processor fence is in `all_is_well`: the proof is read after the bytes.
        (fault::all_is_well() && self.holds::<N>(&found, leaf)).then_some(value)
    }

    /// [`Self::quick`] with as much evidence as the mode has levels above the last, none for a dump.
    #[inline(always)]
    fn quick_any<T>(&self, gva: Gva, len: usize, access: impl FnOnce(*const u8) -> T) -> Option<T> {
        if self.method != Method::Mapped {
            return None;
        }
        match self.evidence {
            0 => self.quick::<0, T>(gva, len, access),
            3 => self.quick::<3, T>(gva, len, access),
            _ => self.quick::<DEPTH, T>(gva, len, access),
        }
    }

    /// An integer in one page, `None` where that takes more than a look.
    #[inline(always)]
    pub(super) fn load<T: Copy>(&self, gva: Gva) -> Option<T> {
        let size = size_of::<T>();
        if (gva.0 & 0xfff) as usize + size > 0x1000 {
            return None;
        }
        // SAFETY: `quick` gives an address with `size` mapped bytes; `T` is an integer.
        self.quick_any(gva, size, |ptr| unsafe { copy::load::<T>(ptr) })
    }

    /// Fills `buf` if it lies in one page and what is remembered serves.
    #[inline(always)]
    pub(super) fn read_within(&self, gva: Gva, buf: &mut [u8]) -> bool {
        let len = buf.len();
        if len > 0x1000 || (gva.0 & 0xfff) as usize + len > 0x1000 {
            return false;
        }
        // SAFETY: `quick` gives an address with `len` mapped bytes; `buf` is ours alone.
        self.quick_any(gva, len, |ptr| unsafe { copy::copy(ptr, buf.as_mut_ptr(), len) })
            .is_some()
    }

    #[cold]
    pub(super) fn read_array<const N: usize>(&self, gva: Gva) -> Result<[u8; N], ReadError> {
        let mut bytes = [0; N];
        self.read_slow(gva, &mut bytes)?;
        Ok(bytes)
    }

    /// Any read, page by page.
    pub(super) fn read_slow(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        if self.method == Method::Remote && buf.len() > self.left_in_page(gva) {
            return self.read_remote_pages(gva, buf);
        }
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = self.advance(gva, done)?;
            let len = self.left_in_page(at).min(rest.len());
            self.read_in_page(at, rest.get_mut(..len).unwrap_or_default())?;
            done += len;
        }
        Ok(())
    }

    /// A read within one page, by what is remembered or else by a walk.
    pub(super) fn read_in_page(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        match self.method {
            Method::Mapped => {
                if self.read_within(gva, buf) {
                    return Ok(());
                }
                self.read_by_walk(gva, buf)
            }
            Method::Remote => self.read_remote(gva, buf),
        }
    }

    /// Walks, reads, proves and remembers; again while the guest changes the tables.
    #[inline(never)]
    fn read_by_walk(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        for _ in 0..TRIES {
            let page = match self.walk(gva) {
                Ok(page) => page,
                Err(fault) if !self.live || self.unchanged(&fault.steps) => {
                    return Err(ReadError::fault(fault));
                }
                Err(_) => continue,
            };
            let result = self.memory.read(page.gpa, buf);
            if !self.live || self.unchanged(&page.steps) {
                self.remember(
                    gva,
                    Resolved {
                        gpa: page.gpa,
                        page_shift: page.page_shift,
                    },
                    &page.steps,
                );
                return result.map_err(|error| ReadError {
                    gva,
                    cause: ReadCause::Memory(error),
                });
            }
        }
        Err(ReadError {
            gva,
            cause: ReadCause::Unstable,
        })
    }
}
