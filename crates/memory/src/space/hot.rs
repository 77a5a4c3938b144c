//! What is remembered of mapped memory, laid out for the shortest way from an address to its bytes.
//!
//! One slot serves one 2 MiB stretch, whether a table of small pages maps it or a large page: both are read as "an entry,
//! found so, tested so, taken apart so", without a branch between them. The modes that fit are those with small pages of
//! 4 KiB and tables of 512 entries: x86-64, PAE and AArch64's usual ones. The few others walk each time.
//!
//! Why every instruction counts: a read that misses the processor's caches waits 100 to 400 ns, and what hides that is the
//! reads behind it that the processor starts meanwhile. It looks ahead a fixed number of instructions, so twice the
//! instructions a read is half the reads under way.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use vmsight_arch::paging::{Granule, PagingMode};

use crate::copy;

/// log2 of what a slot serves.
pub(super) const STRETCH: u32 = 21;

/// Upper entries that a slot holds: all of five levels but the last.
pub(super) const UPPER: usize = 4;

/// Upper entries that [`Hot::get`] compares where not told otherwise: all of four levels but the last.
pub(super) const USUAL: usize = 3;

/// No stretch begins there.
const NOWHERE: u64 = 1;

/// Evidence of what never changes.
static ALWAYS: AtomicU64 = AtomicU64::new(0);

/// An entry that was read: its address in this process and its value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    pub(super) place: *const u8,
    pub(super) value: u64,
}

impl Seen {
    /// Nothing yet.
    pub(super) const NONE: Self = Self {
        place: std::ptr::null(),
        value: 0,
    };

    /// Holds always: for tables that cannot change.
    pub(super) fn always() -> Self {
        Self {
            place: std::ptr::from_ref(&ALWAYS).cast(),
            value: 0,
        }
    }

    /// Whether the entry still holds what it held.
    ///
    /// # Safety
    /// `place` must be readable for 8 bytes.
    #[inline(always)]
    pub(super) unsafe fn holds(self) -> bool {
        // SAFETY: the caller's promise.
        u64::from_le(unsafe { copy::load::<u64>(self.place) }) == self.value
    }
}

/// How the last entry of a stretch is found and taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// `(gva >> 9) & index` is where in the table the entry lies, in bytes: 0 for a large page, whose "table" is its entry.
    pub(super) index: u64,
    /// The bits of an entry that are an address …
    pub(super) address: u64,
    /// … and those of a virtual address that are the offset in the page.
    pub(super) offset: u64,
    /// An entry is a page of this size if `entry & test == want`.
    pub(super) test: u64,
    pub(super) want: u64,
}

impl Shape {
    /// The shape of pages of 2^`page_shift` bytes, `None` for modes that do not fit.
    pub(super) fn of(mode: PagingMode, page_shift: u8) -> Option<Self> {
        const X86_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        const ARM_ADDRESS: u64 = 0x0000_ffff_ffff_f000;
        let offset = (1u64 << page_shift) - 1;
        let small = page_shift == 12;
        let index = if small { 511 << 3 } else { 0 };
        let (address, test, want) = match mode {
            // A large page: present, PS, and no reserved bits between PAT (12) and the page's size.
            PagingMode::X86Level4 | PagingMode::X86Level5 if small => (X86_ADDRESS, 1, 1),
            PagingMode::X86Level4 | PagingMode::X86Level5 => {
                (X86_ADDRESS & !offset, 0x81 | (offset & !0x1fff), 0x81)
            }
            PagingMode::X86Pae if small => (X86_ADDRESS, 0x7ff0_0000_0000_0001, 1),
            PagingMode::X86Pae => (
                X86_ADDRESS & !offset,
                0x7ff0_0000_0000_0081 | (offset & !0x1fff),
                0x81,
            ),
            PagingMode::Arm64 {
                granule: Granule::K4,
                lpa2: false,
                ..
            } => (ARM_ADDRESS & !offset, 3, if small { 3 } else { 1 }),
            PagingMode::Arm64 { .. } | PagingMode::X86_32 { .. } => return None,
        };
        Some(Self {
            index,
            address,
            offset,
            test,
            want,
        })
    }
}

/// One stretch, two cache lines.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Slot {
    /// Odd while somebody writes.
    sequence: AtomicU64,
    /// The first address of the stretch.
    base: AtomicU64,
    /// Where the table of last entries is mapped, or the entry of a large page.
    table: AtomicU64,
    index: AtomicU64,
    address: AtomicU64,
    offset: AtomicU64,
    test: AtomicU64,
    want: AtomicU64,
    /// Root first. Unused ones repeat the first. Each place is at any time that of 8 readable bytes.
    upper: [(AtomicU64, AtomicU64); UPPER],
}

impl Slot {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        let always = || {
            (
                AtomicU64::new(std::ptr::from_ref(&ALWAYS).expose_provenance() as u64),
                zero(),
            )
        };
        Self {
            sequence: zero(),
            base: AtomicU64::new(NOWHERE),
            table: zero(),
            index: zero(),
            address: zero(),
            offset: zero(),
            test: zero(),
            want: zero(),
            upper: [always(), always(), always(), always()],
        }
    }
}

/// Where an address lies, with what proves it.
#[derive(Clone, Copy)]
pub(super) struct Hit<'s> {
    pub(super) gpa: u64,
    slot: &'s Slot,
    sequence: u64,
    /// The last entry.
    pub(super) leaf: Seen,
}

impl Hit<'_> {
    /// Whether every entry still holds what it held, the first `N` of the upper ones looked at. To be asked after the
    /// bytes were copied.
    ///
    /// Root first, the last entry last: if none differs, all of them held at once when the root's was looked at.
    #[inline(always)]
    pub(super) fn holds<const N: usize>(&self) -> bool {
        for (place, value) in self.slot.upper.iter().take(N) {
            let place = std::ptr::with_exposed_provenance(place.load(Ordering::Relaxed) as usize);
            // SAFETY: whoever wrote the slot gave places that are readable as long as the slot is; that it is not that
            // of `value` if somebody writes just now is noticed below.
            if unsafe { copy::load::<u64>(place) } != value.load(Ordering::Relaxed).to_le() {
                return false;
            }
            // In this order, also off x86, where this costs nothing.
            fence(Ordering::Acquire);
        }
        // SAFETY: `Hot::get` has read from there.
        let leaf = unsafe { self.leaf.holds() };
        fence(Ordering::Acquire);
        leaf && self.slot.sequence.load(Ordering::Relaxed) == self.sequence
    }
}

/// The slots of one address space.
#[derive(Debug)]
pub(super) struct Hot {
    /// A power of two of them.
    slots: Box<[Slot]>,
    /// The stretch that last missed, for each slot: see [`Self::is_second_miss`].
    missed: Box<[AtomicU64]>,
    mask: usize,
}

impl Hot {
    /// 2^`bits` slots of 128 bytes, `bits` up to 20.
    pub(super) fn new(bits: u8) -> Self {
        let n = 1usize << bits.min(20);
        Self {
            slots: (0..n).map(|_| Slot::new()).collect(),
            missed: (0..n).map(|_| AtomicU64::new(NOWHERE)).collect(),
            mask: n - 1,
        }
    }

    #[inline(always)]
    fn index(&self, gva: u64) -> usize {
        // The ranges of a kernel are few and long: neighbours never meet, and that suffices.
        (gva >> STRETCH) as usize & self.mask
    }

    /// What is remembered of `gva`, with its last entry as it is now. Nothing is proven yet: see [`Hit::holds`].
    #[inline(always)]
    pub(super) fn get(&self, gva: u64) -> Option<Hit<'_>> {
        let (slot, place, sequence) = self.place(gva)?;
        // SAFETY: `place` promises 8 readable bytes.
        let value = u64::from_le(unsafe { copy::load::<u64>(place) });
        if value & slot.test.load(Ordering::Relaxed) != slot.want.load(Ordering::Relaxed) {
            return None;
        }
        let gpa =
            (value & slot.address.load(Ordering::Relaxed)) | (gva & slot.offset.load(Ordering::Relaxed));
        Some(Hit {
            gpa,
            slot,
            sequence,
            leaf: Seen { place, value },
        })
    }

    /// Where the last entry of `gva` is mapped: 8 readable bytes.
    #[inline(always)]
    pub(super) fn place(&self, gva: u64) -> Option<(&Slot, *const u8, u64)> {
        // SAFETY: `index` is at most `mask`, and there are `mask + 1` slots.
        let slot = unsafe { self.slots.get_unchecked(self.index(gva)) };
        // Odd or not, the even number is what it must be below.
        let sequence = slot.sequence.load(Ordering::Acquire) & !1;
        let table = slot.table.load(Ordering::Relaxed);
        let index = slot.index.load(Ordering::Relaxed);
        if slot.base.load(Ordering::Relaxed) != gva & !((1 << STRETCH) - 1) {
            return None;
        }
        // The table must belong to the index and both to the stretch before anything is read from there.
        fence(Ordering::Acquire);
        if slot.sequence.load(Ordering::Relaxed) != sequence {
            return None;
        }
        let place = table.wrapping_add((gva >> 9) & index) as usize;
        Some((slot, std::ptr::with_exposed_provenance(place), sequence))
    }

    /// Notes that `gva` was not found, and says whether its stretch was the last that was missed in its slot.
    ///
    /// Only a stretch that is asked for again is worth remembering: a read here and there costs a walk and nothing more,
    /// and does not push out what is in use.
    #[inline(always)]
    pub(super) fn is_second_miss(&self, gva: u64) -> bool {
        let stretch = gva >> STRETCH << STRETCH;
        let Some(missed) = self.missed.get(self.index(gva)) else {
            return false;
        };
        if missed.load(Ordering::Relaxed) == stretch {
            return true;
        }
        missed.store(stretch, Ordering::Relaxed);
        false
    }

    /// Remembers the stretch of `gva`, unless somebody else writes the slot just now.
    ///
    /// # Safety
    /// As long as `self` lives, there must be 8 readable bytes at each of `upper`, and at `table + i` for each `i` that is a
    /// multiple of 8 up to `shape.index`.
    pub(super) unsafe fn put(&self, gva: u64, table: *const u8, shape: &Shape, upper: &[Seen; UPPER]) {
        let Some(slot) = self.slots.get(self.index(gva)) else {
            return;
        };
        let sequence = slot.sequence.load(Ordering::Relaxed);
        if sequence & 1 != 0
            || slot
                .sequence
                .compare_exchange(
                    sequence,
                    sequence.wrapping_add(1),
                    Ordering::Acquire,
                    Ordering::Relaxed,
                )
                .is_err()
        {
            return;
        }
        // A reader that sees any of the stores below sees the odd number too.
        fence(Ordering::Release);
        slot.base.store(gva & !((1 << STRETCH) - 1), Ordering::Relaxed);
        slot.table
            .store(table.expose_provenance() as u64, Ordering::Relaxed);
        slot.index.store(shape.index, Ordering::Relaxed);
        slot.address.store(shape.address, Ordering::Relaxed);
        slot.offset.store(shape.offset, Ordering::Relaxed);
        slot.test.store(shape.test, Ordering::Relaxed);
        slot.want.store(shape.want, Ordering::Relaxed);
        for ((place, value), seen) in slot.upper.iter().zip(upper) {
            place.store(seen.place.expose_provenance() as u64, Ordering::Relaxed);
            value.store(seen.value, Ordering::Relaxed);
        }
        slot.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }
}
