//! Guest-physical memory, whatever it comes from.

use crate::batch::{self, ReadOp};
use crate::fault;
use crate::prefetch::prefetch;
use crate::slot::{Backing, Slot};
use crate::{MemoryError, Region, copy};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use vmsight_arch::Gpa;
use vmsight_arch::paging::TableMemory;

/// The physical memory of one guest, live or from a dump. Clones share the memory and cost nothing; all methods may
/// be called from many threads at once.
///
/// Memory of a running guest changes while it is read: two reads of one address may differ, and a read of more than
/// eight aligned bytes may see a mix of old and new.
#[derive(Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

struct Inner {
    pair: Pair,
    /// All mapped slots, sorted by address.
    mapped: Box<[FastSlot]>,
    slots: Box<[Slot]>,
    regions: Box<[Region]>,
    missing: Box<[Region]>,
    notes: Box<[String]>,
}

/// The two longest mapped slots: nearly all of a guest, whose other slots are firmware. Which of them an address lies in
/// is found without a branch, for on random addresses above and below 4 GiB a mispredicted one would cost as much as
/// the read; and in few instructions, so that the processor looks further ahead and has more reads under way.
struct Pair {
    slots: [FastSlot; 2],
    /// Where the second starts.
    split: u64,
}

/// A mapped slot, with only what a small read needs.
#[derive(Clone, Copy)]
struct FastSlot {
    start: u64,
    /// Eight bytes fit at offsets below this.
    words: u64,
    len: u64,
    base: *const u8,
}

impl FastSlot {
    /// No slot: nothing fits in it.
    const NONE: Self = Self {
        start: 0,
        words: 0,
        len: 0,
        base: std::ptr::null(),
    };
}

impl Pair {
    /// `all` sorted by address.
    fn of(all: &[FastSlot]) -> Self {
        let mut longest: Vec<FastSlot> = all.to_vec();
        longest.sort_by_key(|slot| std::cmp::Reverse(slot.len));
        longest.truncate(2);
        longest.sort_by_key(|slot| slot.start);
        let mut slots = [FastSlot::NONE; 2];
        for (place, slot) in slots.iter_mut().zip(&longest) {
            *place = *slot;
        }
        Self {
            slots,
            split: longest.get(1).map_or(u64::MAX, |slot| slot.start),
        }
    }

    /// The only one of the two that can hold `gpa`.
    #[inline(always)]
    fn candidate(&self, gpa: Gpa) -> &FastSlot {
        let [low, high] = &self.slots;
        std::hint::select_unpredictable(gpa.0 >= self.split, high, low)
    }
}

// SAFETY: `base` points into a mapping that a slot of the same `Inner` keeps alive; it is only used for volatile copies,
// which any thread may make.
unsafe impl Send for FastSlot {}
// SAFETY: as above.
unsafe impl Sync for FastSlot {}

impl GuestMemory {
    /// `slots` must be sorted, disjoint, not empty, and within their sources: [`crate::Builder`] checks.
    pub(crate) fn of_slots(slots: Vec<Slot>, missing: Vec<Region>, notes: Vec<String>) -> Self {
        let mapped: Box<[FastSlot]> = slots
            .iter()
            .filter_map(|slot| {
                let Region { start, len } = slot.region;
                let base: *const u8 = slot.direct(0, len)?.ptr;
                Some(FastSlot {
                    start: start.0,
                    words: len.saturating_sub(7),
                    len,
                    base,
                })
            })
            .collect();
        let mut regions: Vec<Region> = Vec::new();
        for Slot { region, .. } in &slots {
            match regions.last_mut() {
                Some(last) if last.end() == region.start => last.len = last.len.saturating_add(region.len),
                _ => regions.push(*region),
            }
        }
        let inner = Inner {
            pair: Pair::of(&mapped),
            mapped,
            slots: slots.into(),
            regions: regions.into(),
            missing: missing.into(),
            notes: notes.into(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Fills `buf` from `gpa` on. Crosses from one slot into the next where they touch.
    ///
    /// # Errors
    /// The first address that could not be read, and why. `buf` may then be filled in part.
    #[inline]
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        if let Some(ptr) = self.inner.mapped(gpa, buf.len()) {
            // SAFETY: `mapped` found that many mapped bytes at `ptr`; `buf` is ours alone.
            unsafe { copy::copy(ptr, buf.as_mut_ptr(), buf.len()) };
            if fault::all_is_well() {
                return Ok(());
            }
        }
        self.inner.read_slow(gpa, buf)
    }

    /// The little-endian 8-byte integer at `gpa`. Read at once where it is aligned and mapped.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u64(&self, gpa: Gpa) -> Result<u64, MemoryError> {
        match self.inner.load::<u64>(gpa) {
            Some(value) => Ok(u64::from_le(value)),
            None => self.inner.read_array(gpa).map(u64::from_le_bytes),
        }
    }

    /// The little-endian 4-byte integer at `gpa`.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u32(&self, gpa: Gpa) -> Result<u32, MemoryError> {
        match self.inner.load::<u32>(gpa) {
            Some(value) => Ok(u32::from_le(value)),
            None => self.inner.read_array(gpa).map(u32::from_le_bytes),
        }
    }

    /// The little-endian 2-byte integer at `gpa`.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u16(&self, gpa: Gpa) -> Result<u16, MemoryError> {
        match self.inner.load::<u16>(gpa) {
            Some(value) => Ok(u16::from_le(value)),
            None => self.inner.read_array(gpa).map(u16::from_le_bytes),
        }
    }

    /// The byte at `gpa`.
    ///
    /// # Errors
    /// Why it could not be read.
    #[inline]
    pub fn read_u8(&self, gpa: Gpa) -> Result<u8, MemoryError> {
        match self.inner.load::<u8>(gpa) {
            Some(value) => Ok(u8::from_le(value)),
            None => self.inner.read_array(gpa).map(u8::from_le_bytes),
        }
    }

    /// Sends for the cache line at `gpa` and does not wait for it: see [`AddressSpace::prefetch`](crate::AddressSpace::prefetch).
    #[inline]
    pub fn prefetch(&self, gpa: Gpa) {
        if let Some(ptr) = self.inner.mapped(gpa, 1) {
            prefetch(ptr);
        }
    }

    /// Does all of `ops`, each with a result of its own. For memory of another process this takes one system call for
    /// about a thousand of them instead of one for each.
    pub fn read_batch(&self, ops: &mut [ReadOp<'_>]) {
        batch::read(self, ops);
    }

    /// Writes `data` at `gpa`. Whether all of it may be written is found out first; a hole or a read-only slot
    /// fails before anything is changed.
    ///
    /// # Errors
    /// The first address that cannot be written, and why.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        for part in self.inner.parts(gpa, data.len()) {
            let (slot, at, _) = part?;
            if !slot.is_writable() {
                return Err(MemoryError::ReadOnly {
                    gpa: Gpa(slot.region.start.0.wrapping_add(at)),
                });
            }
        }
        for part in self.inner.parts(gpa, data.len()) {
            let (slot, at, range) = part?;
            slot.write(at, data.get(range).unwrap_or_default())?;
        }
        Ok(())
    }

    /// The bytes themselves, without a copy: only for a dump, and only where one mapping holds the whole range.
    ///
    /// A file that is cut while it is looked at reads as zeros from there on; [`read`](Self::read) would tell.
    pub fn frozen(&self, gpa: Gpa, len: usize) -> Option<&[u8]> {
        let slot = self.inner.slot(gpa)?;
        if slot.is_live() {
            return None;
        }
        let at = gpa.0.wrapping_sub(slot.region.start.0);
        let direct = slot.direct(at, len as u64)?;
        if !direct.is_intact(len) {
            return None;
        }
        // SAFETY: so many bytes are mapped there, read-only (or private to us), for as long as `self` lives. That
        // nobody rewrites a dump while it is looked at is the promise `MappingKind::Frozen` asks for.
        Some(unsafe { std::slice::from_raw_parts(direct.ptr, len) })
    }

    /// The memory that is backed: sorted, disjoint, neighbours joined.
    pub fn regions(&self) -> &[Region] {
        &self.inner.regions
    }

    /// The pieces of the source (of the VM's process, of the file) that the memory is made of, each with the guest-physical
    /// ranges it lies behind, in order of address. A piece that goes on above a hole is one: who has seen that one byte
    /// of it is in its place has seen it of all.
    pub fn pieces(&self) -> Vec<Vec<Region>> {
        let mut pieces: Vec<(&Slot, Vec<Region>)> = Vec::new();
        for slot in &self.inner.slots {
            match pieces.iter_mut().find(|(last, _)| last.goes_on_in(slot)) {
                Some((last, regions)) => {
                    *last = slot;
                    match regions.last_mut() {
                        Some(region) if region.end() == slot.region.start => region.len += slot.region.len,
                        _ => regions.push(slot.region),
                    }
                }
                None => pieces.push((slot, vec![slot.region])),
            }
        }
        pieces.into_iter().map(|(_, regions)| regions).collect()
    }

    /// The backed region `gpa` lies in.
    pub fn region_of(&self, gpa: Gpa) -> Option<Region> {
        let after = self.inner.regions.partition_point(|region| region.start <= gpa);
        self.inner
            .regions
            .get(after.checked_sub(1)?)
            .copied()
            .filter(|region| region.contains(gpa))
    }

    /// Bytes backed in all.
    pub fn size(&self) -> u64 {
        self.inner
            .regions
            .iter()
            .fold(0, |sum, region| sum.saturating_add(region.len))
    }

    /// The first address after all memory; 0 where there is none.
    pub fn end(&self) -> Gpa {
        self.inner.regions.last().map_or(Gpa(0), Region::end)
    }

    /// Whether any of it can change by itself.
    pub fn is_live(&self) -> bool {
        self.inner.slots.iter().any(Slot::is_live)
    }

    /// Whether any of it can be written.
    pub fn is_writable(&self) -> bool {
        self.inner.slots.iter().any(Slot::is_writable)
    }

    /// Ranges the machine has but the dump lacks.
    pub fn missing(&self) -> &[Region] {
        &self.inner.missing
    }

    /// Remarks of whoever put the memory together: what is missing, what was guessed.
    pub fn notes(&self) -> &[String] {
        &self.inner.notes
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.inner.slots
    }

    /// Where `len` bytes at `gpa` are mapped in one piece, for as long as `self` or a clone lives. `None` where not mapped
    /// or not in one piece. Ask [`fault::all_is_well`] after the access.
    #[inline(always)]
    pub(crate) fn mapped(&self, gpa: Gpa, len: usize) -> Option<*const u8> {
        self.inner.mapped(gpa, len)
    }

    /// Whether a batch is read in the order of its reads: where one process holds all of it, or all is mapped. In between,
    /// what is mapped comes before what must be asked for.
    pub(crate) fn keeps_order(&self) -> bool {
        let mut slots = self.inner.slots.iter();
        let Some(first) = slots.next() else { return true };
        slots.all(|slot| match (&first.backing, &slot.backing) {
            (Backing::Process { process: a, .. }, Backing::Process { process: b, .. }) => Arc::ptr_eq(a, b),
            (Backing::Process { .. }, _) | (_, Backing::Process { .. }) => false,
            _ => true,
        })
    }

    /// Whether all of it is mapped in this process.
    pub fn is_all_mapped(&self) -> bool {
        self.inner
            .slots
            .iter()
            .all(|slot| matches!(slot.backing, Backing::Mapped { .. }))
    }

    pub(crate) fn parts(&self, gpa: Gpa, len: usize) -> Parts<'_> {
        self.inner.parts(gpa, len)
    }
}

/// What [`Inner::load`] may load.
trait Integer: Copy {}
impl Integer for u64 {}
impl Integer for u32 {}
impl Integer for u16 {}
impl Integer for u8 {}

impl Inner {
    /// Where `len` bytes at `gpa` are mapped in one piece.
    #[inline(always)]
    fn mapped(&self, gpa: Gpa, len: usize) -> Option<*const u8> {
        let slot = self.pair.candidate(gpa);
        // Below the slot's start this is huge, and no slot is: they end before 2^64.
        let at = gpa.0.wrapping_sub(slot.start);
        // Not `at + len <= slot.len`: that could wrap.
        if at < slot.len && slot.len - at >= len as u64 {
            // SAFETY: `at` is inside the slot, all of which is mapped from `base` on (so it fits a usize).
            Some(unsafe { slot.base.add(at as usize) })
        } else {
            self.mapped_elsewhere(gpa, len)
        }
    }

    /// [`Self::mapped`] for all slots.
    #[cold]
    fn mapped_elsewhere(&self, gpa: Gpa, len: usize) -> Option<*const u8> {
        let after = self.mapped.partition_point(|slot| slot.start <= gpa.0);
        let slot = self.mapped.get(after.checked_sub(1)?)?;
        let at = gpa.0.wrapping_sub(slot.start);
        let fits = at < slot.len && slot.len - at >= len as u64;
        // SAFETY: as above.
        fits.then(|| unsafe { slot.base.add(at as usize) })
    }

    /// The integer (of up to eight bytes) at `gpa` in the guest's byte order, `None` where that takes more than a look.
    #[inline(always)]
    fn load<T: Integer>(&self, gpa: Gpa) -> Option<T> {
        let slot = self.pair.candidate(gpa);
        let at = gpa.0.wrapping_sub(slot.start);
        let ptr = if at < slot.words {
            // SAFETY: eight bytes are mapped there.
            unsafe { slot.base.add(at as usize) }
        } else {
            self.mapped_elsewhere(gpa, size_of::<T>())?
        };
        // SAFETY: so many bytes are mapped there, and any bytes make an integer.
        let value = unsafe { copy::load::<T>(ptr) };
        fault::all_is_well().then_some(value)
    }

    fn slot(&self, gpa: Gpa) -> Option<&Slot> {
        let after = self.slots.partition_point(|slot| slot.region.start <= gpa);
        self.slots
            .get(after.checked_sub(1)?)
            .filter(|slot| slot.region.contains(gpa))
    }

    fn parts(&self, gpa: Gpa, len: usize) -> Parts<'_> {
        Parts {
            inner: self,
            gpa,
            len,
            done: 0,
            failed: false,
        }
    }

    #[cold]
    fn read_slow(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        for part in self.parts(gpa, buf.len()) {
            let (slot, at, range) = part?;
            slot.read(at, buf.get_mut(range).unwrap_or_default())?;
        }
        Ok(())
    }

    #[cold]
    fn read_array<const N: usize>(&self, gpa: Gpa) -> Result<[u8; N], MemoryError> {
        let mut bytes = [0; N];
        self.read_slow(gpa, &mut bytes)?;
        Ok(bytes)
    }

    #[cold]
    fn no_memory(&self, gpa: Gpa) -> MemoryError {
        let after = self.missing.partition_point(|region| region.start <= gpa);
        let missing = after.checked_sub(1).and_then(|i| self.missing.get(i));
        if let Some(&missing) = missing.filter(|region| region.contains(gpa)) {
            return MemoryError::Missing { gpa, missing };
        }
        let after = self.regions.partition_point(|region| region.start <= gpa);
        let below = after.checked_sub(1).and_then(|i| self.regions.get(i));
        let above = self.regions.get(after);
        let nearest = match (below, above) {
            (Some(below), Some(above)) => {
                let (down, up) = (
                    gpa.0.saturating_sub(below.end().0),
                    above.start.0.saturating_sub(gpa.0),
                );
                Some(if up <= down { *above } else { *below })
            }
            (one, other) => one.or(other).copied(),
        };
        MemoryError::Unbacked { gpa, nearest }
    }
}

/// The pieces of a range, slot by slot: the slot, where in it, and which bytes of the range. Ends at the first hole with
/// an error.
pub(crate) struct Parts<'a> {
    inner: &'a Inner,
    gpa: Gpa,
    len: usize,
    done: usize,
    failed: bool,
}

impl<'a> Iterator for Parts<'a> {
    type Item = Result<(&'a Slot, u64, Range<usize>), MemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self
            .len
            .checked_sub(self.done)
            .filter(|&rest| rest > 0 && !self.failed)?;
        let found = self
            .gpa
            .checked_add(self.done as u64)
            .map(|gpa| (gpa, self.inner.slot(gpa)));
        let Some((gpa, Some(slot))) = found else {
            self.failed = true;
            // Past 2^64 nothing is, and the error names the last address there is.
            return Some(Err(self
                .inner
                .no_memory(found.map_or(Gpa(u64::MAX), |(gpa, _)| gpa))));
        };
        let at = gpa.0.wrapping_sub(slot.region.start.0);
        let len = usize::try_from(slot.region.len - at)
            .unwrap_or(usize::MAX)
            .min(rest);
        let range = self.done..self.done + len;
        self.done += len;
        Some(Ok((slot, at, range)))
    }
}

impl TableMemory for GuestMemory {
    #[inline]
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        self.read_u64(gpa).ok()
    }

    #[inline]
    fn entry_u32(&self, gpa: Gpa) -> Option<u32> {
        self.read_u32(gpa).ok()
    }

    fn entries_u64(&self, gpa: Gpa, out: &mut [u64]) -> usize {
        // One read for all; only where it fails is the place looked for.
        let mut bytes = [0u8; 512];
        let mut done = 0;
        for chunk in out.chunks_mut(bytes.len() / 8) {
            let at = Gpa(gpa.0.wrapping_add(8 * done as u64));
            let Some(bytes) = bytes.get_mut(..8 * chunk.len()) else {
                break;
            };
            if self.read(at, bytes).is_ok() {
                for (to, from) in chunk.iter_mut().zip(bytes.as_chunks().0) {
                    *to = u64::from_le_bytes(*from);
                }
                done += chunk.len();
                continue;
            }
            for (i, to) in chunk.iter_mut().enumerate() {
                let Some(value) = self.entry_u64(Gpa(at.0.wrapping_add(8 * i as u64))) else {
                    return done;
                };
                *to = value;
                done += 1;
            }
        }
        done
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("regions", &self.inner.regions)
            .field("live", &self.is_live())
            .finish()
    }
}
