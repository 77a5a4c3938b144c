//! Reads where all memory is mapped in this process: the fast way.

use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

use vmsight_arch::paging::{self, PagingMode, Resolved, TableMemory};
use vmsight_arch::{Dtb, Gpa, Gva};

use super::hot::{Hot, Place, STRETCH, Seen, Shape, UPPER, USUAL, Way};
use super::{Backend, Inner, ReadCause, ReadError, TRIES};
use crate::{GuestMemory, copy, fault};

/// What a space over mapped memory keeps at hand.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) hot: Hot,
    /// The two longest ranges of the memory once more, by address, for accesses that do not leave their page.
    windows: [Window; 2],
    /// The length of the first of them, if it begins with address 0 and is as good as all there is: of a guest without memory above
    /// 4 GiB. Then most is found with half of the instructions. Else 0.
    alone: u64,
    /// Where the second starts.
    split: u64,
    /// Where the root is mapped, 4 KiB; null unless the mode is x86-64's.
    root: *const u8,
}

// SAFETY: as for `Window`.
unsafe impl Send for Mapped {}
// SAFETY: as for `Window`.
unsafe impl Sync for Mapped {}

/// A mapped range of guest-physical memory.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: u64,
    /// Whole pages in it, in bytes; 0 where it does not begin with one.
    len: u64,
    base: *const u8,
}

impl Window {
    /// No memory.
    const NONE: Self = Self {
        start: 0,
        len: 0,
        base: std::ptr::null(),
    };
}

// SAFETY: `base` points into a mapping that the space's memory keeps alive, and is only used for volatile copies, which
// any thread may make.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Mapped {
    pub(super) fn new(memory: &GuestMemory, mode: PagingMode, dtb: Dtb, bits: u8) -> Self {
        let long = matches!(mode, PagingMode::X86Level4 | PagingMode::X86Level5);
        let root = Gpa(dtb.0 & 0x000f_ffff_ffff_f000);
        let root = memory
            .mapped(root, 0x1000)
            .filter(|_| long)
            .unwrap_or(std::ptr::null());
        let mut all: Vec<Window> = memory
            .slots()
            .iter()
            .filter(|slot| slot.region.start.0 & 0xfff == 0)
            .filter_map(|slot| {
                let len = slot.region.len & !0xfff;
                let base = memory.mapped(slot.region.start, usize::try_from(len).ok()?)?;
                Some(Window {
                    start: slot.region.start.0,
                    len,
                    base,
                })
            })
            .collect();
        all.sort_by_key(|window| std::cmp::Reverse(window.len));
        all.truncate(2);
        all.sort_by_key(|window| window.start);
        let alone = match all.as_slice() {
            [first] if first.start == 0 => first.len,
            [first, second] if first.start == 0 && first.len / 16 > second.len => first.len,
            _ => 0,
        };
        let mut windows = [Window::NONE; 2];
        windows.iter_mut().zip(&all).for_each(|(to, from)| *to = *from);
        Self {
            root,
            hot: Hot::new(bits),
            alone,
            split: all.get(1).map_or(u64::MAX, |second| second.start),
            windows,
        }
    }

    /// Where the byte at `gpa` is mapped, with the `len` bytes from there on, which do not leave its 4 KiB page.
    #[inline(always)]
    pub(super) fn window(&self, memory: &GuestMemory, gpa: u64, len: usize) -> Option<*const u8> {
        match self.near(gpa) {
            Some(ptr) => Some(ptr),
            None => other_window(memory, gpa, len),
        }
    }

    /// The same, if it is in the two windows.
    #[inline(always)]
    fn near(&self, gpa: u64) -> Option<*const u8> {
        let [low, high] = &self.windows;
        if gpa < self.alone {
            // SAFETY: inside the mapped range, which begins with address 0.
            return Some(unsafe { low.base.add(gpa as usize) });
        }
        // No branch: which of the two it is cannot be foreseen.
        let window = std::hint::select_unpredictable(gpa >= self.split, high, low);
        let at = gpa.wrapping_sub(window.start);
        // SAFETY: inside the mapped range.
        (at < window.len).then(|| unsafe { window.base.add(at as usize) })
    }
}

/// The same in the other slots.
#[inline(never)]
fn other_window(memory: &GuestMemory, gpa: u64, len: usize) -> Option<*const u8> {
    memory.mapped(Gpa(gpa), len)
}

/// Whether `len` bytes are within one page of 4 KiB.
#[inline(always)]
fn is_within_page(gva: Gva, len: usize) -> bool {
    len <= 0x1000 && (gva.0 & 0xfff) as usize <= 0x1000 - len
}

impl Inner {
    /// One access in one page by what is remembered: `access` gets the mapped address. `None` where nothing is, or it is kept
    /// in an unusual way or place, or the guest changed the tables.
    #[inline(always)]
    fn by_memory<const N: usize, T>(
        &self,
        mapped: &Mapped,
        gva: Gva,
        access: impl FnOnce(*const u8) -> T,
    ) -> Option<T> {
        let hit = mapped.hot.get(gva.0)?;
        let (ptr, leaf) = match hit.usual(gva.0)? {
            Place::Here(ptr) => (ptr, None),
            Place::At(gpa, leaf) => (mapped.near(gpa)?, Some(leaf)),
        };
        let value = access(ptr);
        // The proof is read after the bytes. SAFETY: what `leaf` says was read above.
        (fault::all_is_well() && unsafe { hit.holds::<N>(leaf) }).then_some(value)
    }

    /// The same for what is remembered in an unusual way, or of unusual memory.
    #[inline(never)]
    fn by_odd_memory<T>(
        &self,
        mapped: &Mapped,
        gva: Gva,
        len: usize,
        access: impl FnOnce(*const u8) -> T,
    ) -> Option<T> {
        let hit = mapped.hot.get(gva.0)?;
        let Place::At(gpa, leaf) = hit.usual(gva.0).or_else(|| hit.other(gva.0))? else {
            return None;
        };
        let ptr = mapped.window(&self.memory, gpa, len)?;
        let value = access(ptr);
        // SAFETY: as in `by_memory`.
        (fault::all_is_well() && unsafe { hit.holds::<UPPER>(Some(leaf)) }).then_some(value)
    }

    /// The same by a walk. `None` also where the walk ends in a fault.
    #[inline(always)]
    fn by_walk<T>(
        &self,
        (mapped, five): (&Mapped, bool),
        gva: Gva,
        len: usize,
        access: impl Fn(*const u8) -> T,
    ) -> Option<T> {
        if mapped.hot.get(gva.0).is_some()
            && let Some(value) = self.by_odd_memory(mapped, gva, len, &access)
        {
            return Some(value);
        }
        if !mapped.root.is_null() && !mapped.hot.is_second_miss(gva.0) {
            let value = if five {
                self.by_short_walk::<5, T>(mapped, gva, len, &access)
            } else {
                self.by_short_walk::<4, T>(mapped, gva, len, &access)
            };
            if value.is_some() {
                return value;
            }
        }
        self.by_trail(mapped, gva, len, access)
    }

    /// A walk of x86-64 that keeps nothing, with as few instructions as it can be (see [`hot`](super::hot) for why).
    /// `None` for all that is out of the ordinary, for [`Self::by_trail`] to see.
    #[inline(always)]
    fn by_short_walk<const LEVELS: usize, T>(
        &self,
        mapped: &Mapped,
        gva: Gva,
        len: usize,
        access: impl FnOnce(*const u8) -> T,
    ) -> Option<T> {
        const PRESENT: u64 = 1;
        const PAGE_SIZE: u64 = 1 << 7;
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let unused = 64 - 12 - 9 * LEVELS;
        if ((gva.0 << unused) as i64 >> unused) as u64 != gva.0 {
            return None;
        }
        let mut seen = [Seen::always(); LEVELS];
        let (mut table, mut offset) = (0, 0xfff);
        for (i, seen) in seen.iter_mut().enumerate() {
            let below = LEVELS - 1 - i;
            let index = (gva.0 >> (9 + 9 * below)) & 0xff8;
            let place = if i == 0 {
                mapped.root.wrapping_add(index as usize)
            } else {
                mapped.window(&self.memory, table + index, 8)?
            };
            // SAFETY: `window` found 8 mapped bytes, and the root is mapped whole: `by_walk` asked. Should they be lost
            // they are zeros, which is no page.
            let value = u64::from_le(unsafe { copy::load::<u64>(place) });
            if value & PRESENT == 0 {
                return None;
            }
            *seen = Seen { place, value };
            table = value & ADDRESS;
            if below > 0 && value & PAGE_SIZE != 0 {
                // 2 MiB or 1 GiB; bit 12 is PAT, the bits up to the page's size are reserved.
                offset = (1u64 << (12 + 9 * below)) - 1;
                if below > 2 || value & offset & !0x1fff != 0 {
                    return None;
                }
                table &= !offset;
                break;
            }
        }
        let ptr = mapped.window(&self.memory, table | (gva.0 & offset), len)?;
        let value = access(ptr);
        if !fault::all_is_well() {
            return None;
        }
        if self.live {
            for seen in seen {
                // SAFETY: it was read above.
                if !unsafe { seen.holds() } {
                    return None;
                }
                fence(Ordering::Acquire);
            }
        }
        Some(value)
    }

    /// A walk of any mode, which is remembered.
    #[inline(never)]
    fn by_trail<T>(
        &self,
        mapped: &Mapped,
        gva: Gva,
        len: usize,
        access: impl FnOnce(*const u8) -> T,
    ) -> Option<T> {
        let trail = Trail::new(&self.memory, mapped);
        let page = paging::resolve(self.mode, &trail, self.dtb, gva)?;
        let ptr = mapped.window(&self.memory, page.gpa.0, len)?;
        let value = access(ptr);
        if !fault::all_is_well() || (self.live && !trail.holds()) {
            return None;
        }
        self.remember_mapped(mapped, gva, page, &trail);
        Some(value)
    }

    /// An integer in one page, `None` where that takes more than a look.
    #[inline(always)]
    pub(super) fn load<T: Copy>(&self, gva: Gva) -> Option<T> {
        let Backend::Mapped(mapped) = &self.backend else {
            return None;
        };
        let size = size_of::<T>();
        if gva.0 as usize & (size - 1) != 0 {
            // What is aligned does not cross a page: the usual case needs no more than this one test.
            return None;
        }
        // SAFETY: an address with `size` mapped bytes; `T` is an integer.
        self.by_memory::<USUAL, T>(mapped, gva, |ptr| unsafe { copy::load::<T>(ptr) })
    }

    /// [`Self::load`] where that had no answer: by a walk, or for what is not aligned, or in any other way.
    #[inline(never)]
    pub(super) fn load_again<T: Copy, const SIZE: usize>(
        &self,
        gva: Gva,
        of: impl FnOnce([u8; SIZE]) -> T,
    ) -> Result<T, ReadError> {
        match self.load_cold::<T>(gva) {
            Some(value) => Ok(value),
            None => self.load_slow(gva).map(of),
        }
    }

    /// [`Self::load`] by a walk, or for what is not aligned.
    #[inline(always)]
    fn load_cold<T: Copy>(&self, gva: Gva) -> Option<T> {
        let (mapped, five) = self.mapped()?;
        let size = size_of::<T>();
        let aligned = gva.0 as usize & (size - 1) == 0;
        if !aligned && !is_within_page(gva, size) {
            return None;
        }
        // SAFETY: an address with `size` mapped bytes; `T` is an integer.
        let access = |ptr| unsafe { copy::load::<T>(ptr) };
        if five || !aligned {
            // Not asked yet.
            if let Some(value) = self.by_memory::<UPPER, T>(mapped, gva, access) {
                return Some(value);
            }
        }
        self.by_walk((mapped, five), gva, size, access)
    }

    /// [`Self::load`] across pages, in remote memory, or the reason why not.
    #[cold]
    #[inline(never)]
    fn load_slow<const SIZE: usize>(&self, gva: Gva) -> Result<[u8; SIZE], ReadError> {
        let mut bytes = [0; SIZE];
        self.read_slow(gva, &mut bytes)?;
        Ok(bytes)
    }

    /// The mapped memory, and whether there are five levels of tables.
    #[inline(always)]
    fn mapped(&self) -> Option<(&Mapped, bool)> {
        match &self.backend {
            Backend::Mapped(mapped) => Some((mapped, false)),
            Backend::MappedFive(mapped) => Some((mapped, true)),
            Backend::Remote(_) => None,
        }
    }

    /// Fills `buf` if it lies in one page and what is remembered, or a walk that finds all at rest, serves.
    #[inline]
    pub(super) fn read_within(&self, gva: Gva, buf: &mut [u8]) -> bool {
        let Some((mapped, five)) = self.mapped() else {
            return false;
        };
        let len = buf.len();
        if !is_within_page(gva, len) {
            return false;
        }
        let to = buf.as_mut_ptr();
        // SAFETY: an address with `len` mapped bytes; `buf` is ours alone.
        let access = |ptr| unsafe { copy::copy(ptr, to, len) };
        let known = if five {
            self.by_memory::<UPPER, ()>(mapped, gva, access)
        } else {
            self.by_memory::<USUAL, ()>(mapped, gva, access)
        };
        known
            .or_else(|| self.by_walk((mapped, five), gva, len, access))
            .is_some()
    }

    /// Any read, page by page.
    pub(super) fn read_slow(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        if let Backend::Remote(cache) = &self.backend
            && buf.len() > self.left_in_page(gva)
        {
            return self.read_remote_pages(cache, gva, buf);
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

    /// A read within one page.
    pub(super) fn read_in_page(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        match &self.backend {
            Backend::Remote(cache) => self.read_remote(cache, gva, buf),
            _ if self.read_within(gva, buf) => Ok(()),
            _ => self.read_or_say_why(gva, buf),
        }
    }

    /// Walks, reads and proves, again while the guest changes the tables; or finds the reason why it cannot be.
    #[cold]
    fn read_or_say_why(&self, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
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

    /// Keeps what a walk has seen, where the mode and the memory allow it.
    #[inline(never)]
    pub(super) fn remember_mapped(&self, mapped: &Mapped, gva: Gva, page: Resolved, trail: &Trail<'_>) {
        let Some(shape) = Shape::of(self.mode, page.page_shift) else {
            return;
        };
        // A root that is also the last table may have fewer entries than a shape counts on.
        let Some((leaf, above)) = trail.seen().split_last().filter(|(_, above)| !above.is_empty()) else {
            return;
        };
        let leaf = leaf.get();
        let stretch = Gpa(page.gpa.0 >> STRETCH << STRETCH);
        let (way, entries) = if shape.is_small() {
            let table = leaf.place.wrapping_sub((gva.0 >> 9) as usize & 0xff8);
            // The whole table must be mapped in one piece, not this entry alone.
            let Some(parent) = above.last() else { return };
            let gpa = Gpa(parent.get().value & shape.address);
            if mapped.window(&self.memory, gpa.0, 0x1000) != Some(table) {
                return;
            }
            (Way::Table(table, shape), above)
        } else {
            // All of the stretch, and not the bytes alone that were read.
            match self.memory.mapped(stretch, 1 << STRETCH) {
                Some(bytes) => (Way::Here(bytes), trail.seen()),
                None => (Way::Table(leaf.place, shape), above),
            }
        };
        let first = entries.first().map_or(Seen::always(), Cell::get);
        let mut evidence = [first; UPPER];
        evidence
            .iter_mut()
            .zip(entries)
            .for_each(|(to, from)| *to = from.get());
        // SAFETY: the places are those the walk read through `window`; the table was looked up whole, and so was the stretch.
        // They are mapped as long as the memory, which `self` holds as long as its slots.
        unsafe { mapped.hot.put(gva.0, &way, self.live.then_some(&evidence)) };
    }
}

/// The entries that a walk reads, where they are mapped, root first.
pub(super) struct Trail<'m> {
    memory: &'m GuestMemory,
    mapped: &'m Mapped,
    seen: [Cell<Seen>; UPPER + 1],
    len: Cell<usize>,
}

impl<'m> Trail<'m> {
    #[inline(always)]
    pub(super) fn new(memory: &'m GuestMemory, mapped: &'m Mapped) -> Self {
        let seen = [const { Cell::new(Seen::NONE) }; UPPER + 1];
        Self {
            memory,
            mapped,
            seen,
            len: Cell::new(0),
        }
    }

    #[inline(always)]
    fn seen(&self) -> &[Cell<Seen>] {
        self.seen.get(..self.len.get()).unwrap_or_default()
    }

    /// Whether all of them still hold what they held, root first (see [`Hit::holds`]).
    ///
    /// [`Hit::holds`]: super::hot::Hit::holds
    #[inline(always)]
    pub(super) fn holds(&self) -> bool {
        self.seen().iter().all(|seen| {
            // SAFETY: `entry_u64` has read from there, and the memory is still there.
            let holds = unsafe { seen.get().holds() };
            fence(Ordering::Acquire);
            holds
        })
    }
}

impl TableMemory for Trail<'_> {
    #[inline(always)]
    fn entry_u64(&self, gpa: Gpa) -> Option<u64> {
        // Entries are aligned and do not cross pages.
        let place = self.mapped.window(self.memory, gpa.0, 8)?;
        // SAFETY: `window` found 8 mapped bytes. Should they be lost they are zeros, which is no page.
        let value = u64::from_le(unsafe { copy::load::<u64>(place) });
        let n = self.len.get();
        self.seen.get(n)?.set(Seen { place, value });
        self.len.set(n + 1);
        Some(value)
    }

    /// 32-bit guests have two levels and are rare: they go the other way.
    fn entry_u32(&self, _gpa: Gpa) -> Option<u32> {
        None
    }
}
