//! What is remembered of mapped memory, laid out for the shortest way from an address to its bytes.
//!
//! One slot serves one 2 MiB stretch. Where that is a large page which is mapped here in one piece, the slot says where, and
//! no entry is needed to find the bytes, only to prove them. Where a table of small pages maps it, the slot says where the
//! table is. All else is read as "an entry, found so, tested so, taken apart so". The modes that fit are those with small
//! pages of 4 KiB and tables of 512 entries: x86-64, PAE and AArch64's usual ones. The few others walk each time.
//!
//! Why every instruction counts: a read that misses the processor's caches waits 100 to 400 ns, and what hides that is the
//! reads behind it that the processor starts meanwhile. It looks ahead a fixed number of instructions, and of loads still
//! fewer, so twice the instructions a read is half the reads under way.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use vmsight_arch::paging::{Granule, PagingMode};

use super::look;
use crate::copy;

/// log2 of what a slot serves.
pub(super) const STRETCH: u32 = 21;

/// Entries that a slot holds: all of five levels but the last.
pub(super) const UPPER: usize = 4;

/// Entries that are compared where not told otherwise: all of four levels but the last.
pub(super) const USUAL: usize = 3;

/// A tag of no stretch.
const NOWHERE: u64 = 1 << 62;

/// What is read where nothing was written yet, and evidence of what never changes: no page, wherever in it one looks.
static NOTHING: [AtomicU64; 512] = [const { AtomicU64::new(0) }; 512];

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
            place: NOTHING.as_ptr().cast(),
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
        unsafe { look::holds_u64(self.place, self.value.to_le()) }
    }
}

/// How the last entry of a stretch is found and taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// The bits of an entry that are an address …
    pub(super) address: u64,
    /// … and those of a virtual address that are the offset in the page.
    pub(super) offset: u64,
    /// An entry is a page of this size if `entry & test == want`.
    pub(super) test: u64,
    pub(super) want: u64,
}

impl Shape {
    /// That of x86-64's small pages.
    pub(super) const SMALL: Self = Self {
        address: 0x000f_ffff_ffff_f000,
        offset: 0xfff,
        test: 1,
        want: 1,
    };

    /// Whether there is a table of 512 entries, rather than the entry of a large page.
    pub(super) fn is_small(&self) -> bool {
        self.offset == 0xfff
    }

    /// The shape of pages of 2^`page_shift` bytes, `None` for modes that do not fit.
    pub(super) fn of(mode: PagingMode, page_shift: u8) -> Option<Self> {
        const X86_ADDRESS: u64 = Shape::SMALL.address;
        const ARM_ADDRESS: u64 = 0x0000_ffff_ffff_f000;
        let offset = (1u64 << page_shift) - 1;
        let small = page_shift == 12;
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
            address,
            offset,
            test,
            want,
        })
    }
}

/// What a slot's tag says in the bits that its stretch leaves. Those above [`LIVE`](tag::LIVE) count the writings.
mod tag {
    /// Somebody writes. It is then neither of the kinds below.
    pub(super) const WRITING: u64 = 1;
    /// A large page, or a piece of one, that is mapped here in one piece.
    pub(super) const LARGE: u64 = 2;
    /// A table of x86-64's small pages.
    pub(super) const SMALL: u64 = 4;
    /// The tables can change: entries must be looked at again.
    pub(super) const LIVE: u64 = 8;
    /// One writing.
    pub(super) const STEP: u64 = 16;
    /// All of these bits.
    pub(super) const ALL: u64 = (1 << super::STRETCH) - 1;
}

/// The address of an entry and its value.
#[derive(Debug)]
#[repr(C)]
struct Entry {
    place: AtomicU64,
    value: AtomicU64,
}

impl Entry {
    fn new() -> Self {
        Self {
            place: AtomicU64::new(NOTHING.as_ptr().expose_provenance() as u64),
            value: AtomicU64::new(0),
        }
    }

    fn set(&self, seen: Seen) {
        self.place
            .store(seen.place.expose_provenance() as u64, Ordering::Relaxed);
        self.value.store(seen.value.to_le(), Ordering::Relaxed);
    }
}

/// One stretch, two cache lines, of which small pages need one.
///
/// A reader may find here what is of two writings. So each address is at any time one that can be read from, as far as it says:
/// those of all writings are mapped as long as the slot is there. That all was of one writing is known at the end, by the tag.
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Slot {
    /// The first address of the stretch, and [`tag`].
    tag: AtomicU64,
    /// Of SMALL: where the table of last entries is mapped, 4 KiB.
    table: AtomicU64,
    /// Root first: of LARGE all entries, else all but the last. Unused ones repeat the first.
    upper: [Entry; USUAL],
    /// That of five levels for which the others leave no room.
    fifth: Entry,
    /// Of LARGE: where the stretch is mapped, 2 MiB.
    bytes: AtomicU64,
    /// Of neither: where the table of last entries is mapped, or the entry of a large page …
    other: AtomicU64,
    /// … and its [`Shape`].
    address: AtomicU64,
    offset: AtomicU64,
    test: AtomicU64,
    want: AtomicU64,
}

impl Slot {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        let nothing = || AtomicU64::new(NOTHING.as_ptr().expose_provenance() as u64);
        Self {
            tag: AtomicU64::new(NOWHERE),
            table: nothing(),
            upper: [Entry::new(), Entry::new(), Entry::new()],
            fifth: Entry::new(),
            bytes: nothing(),
            other: nothing(),
            address: zero(),
            offset: zero(),
            // As no entry is.
            test: zero(),
            want: AtomicU64::new(1),
        }
    }
}

/// Where an address lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Mapped here: its bytes up to the end of the stretch, of a large page.
    Here(*const u8),
    /// At this physical address, as the last entry says.
    At(u64, Seen),
}

/// What is remembered of an address.
#[derive(Clone, Copy)]
pub(super) struct Hit<'s> {
    slot: &'s Slot,
    tag: u64,
}

impl<'s> Hit<'s> {
    fn is(&self, kind: u64) -> bool {
        self.tag & kind != 0
    }

    /// Where `gva` lies, by its last entry as it is now, where its slot is of the usual kinds. Nothing is proven yet: see
    /// [`Self::holds`].
    #[inline(always)]
    pub(super) fn usual(&self, gva: u64) -> Option<Place> {
        if self.is(tag::LARGE) {
            return Some(Place::Here(self.bytes(gva)));
        }
        if !self.is(tag::SMALL) {
            return None;
        }
        const PRESENT: u64 = 1;
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let place = self.entry(gva);
        // SAFETY: 8 bytes of a table that is mapped.
        let value = u64::from_le(unsafe { copy::load::<u64>(place) });
        (value & PRESENT != 0).then_some(Place::At(value & ADDRESS | gva & 0xfff, Seen { place, value }))
    }

    /// Where the byte at `gva` is mapped, of LARGE.
    #[inline(always)]
    fn bytes(&self, gva: u64) -> *const u8 {
        let bytes = self.slot.bytes.load(Ordering::Relaxed) as usize;
        std::ptr::with_exposed_provenance::<u8>(bytes).wrapping_add((gva & tag::ALL) as usize)
    }

    /// Where the last entry of `gva` is mapped, of SMALL.
    #[inline(always)]
    fn entry(&self, gva: u64) -> *const u8 {
        let table = self.slot.table.load(Ordering::Relaxed) as usize;
        std::ptr::with_exposed_provenance::<u8>(table).wrapping_add((gva >> 9) as usize & 0xff8)
    }

    /// [`Self::usual`] for what is of neither kind.
    pub(super) fn other(&self, gva: u64) -> Option<Place> {
        let slot = self.slot;
        if self.tag & (tag::WRITING | tag::LARGE | tag::SMALL) != 0 {
            return None;
        }
        let [table, address, offset, test, want] =
            [&slot.other, &slot.address, &slot.offset, &slot.test, &slot.want]
                .map(|word| word.load(Ordering::Relaxed));
        // The table must belong to the index before anything is read from there.
        if !look::holds_atomic(&slot.tag, self.tag) {
            return None;
        }
        let index = if offset == 0xfff { 0xff8 } else { 0 };
        let place =
            std::ptr::with_exposed_provenance::<u8>(table as usize).wrapping_add((gva >> 9 & index) as usize);
        // SAFETY: as `Hot::put` was promised.
        let value = u64::from_le(unsafe { copy::load::<u64>(place) });
        (value & test == want).then_some(Place::At(value & address | gva & offset, Seen { place, value }))
    }

    /// What of `gva` can be fetched first: its last entry, or the bytes themselves.
    #[inline(always)]
    pub(super) fn first(&self, gva: u64) -> *const u8 {
        if self.is(tag::LARGE) {
            self.bytes(gva)
        } else if self.is(tag::SMALL) {
            self.entry(gva)
        } else {
            // A request for what is not there does no harm.
            std::ptr::null()
        }
    }

    /// Whether the slot is what it was, and with it every entry: the first `N` of the slot's, and `leaf`. To be asked after the
    /// bytes were copied.
    ///
    /// Root first, the last entry last: if none differs, all of them held at once when the root's was looked at.
    ///
    /// # Safety
    /// `leaf` must be readable.
    #[inline(always)]
    pub(super) unsafe fn holds<const N: usize>(&self, leaf: Option<Seen>) -> bool {
        let slot = std::ptr::from_ref(self.slot).cast::<u8>();
        if self.tag & tag::LIVE != 0 {
            // SAFETY: entries of a slot, whose places can be read: see `Slot`. `leaf` is the caller's promise.
            unsafe {
                let upper = look::holds_entry::<{ offset_of!(Slot, upper) }>(slot)
                    && look::holds_entry::<{ offset_of!(Slot, upper) + size_of::<Entry>() }>(slot)
                    && look::holds_entry::<{ offset_of!(Slot, upper) + 2 * size_of::<Entry>() }>(slot)
                    && (N <= USUAL || look::holds_entry::<{ offset_of!(Slot, fifth) }>(slot));
                if !upper || leaf.is_some_and(|leaf| !leaf.holds()) {
                    return false;
                }
            }
        }
        look::holds_atomic(&self.slot.tag, self.tag)
    }
}

/// What is to be remembered of a stretch.
#[derive(Debug)]
pub(super) enum Way {
    /// It is mapped here.
    Here(*const u8),
    /// By the last entries of a table that is mapped here, or by one entry.
    Table(*const u8, Shape),
}

/// The slots of one address space.
#[derive(Debug)]
pub(super) struct Hot {
    /// 2^`n` of them.
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

    /// What is remembered of `gva`.
    #[inline(always)]
    pub(super) fn get(&self, gva: u64) -> Option<Hit<'_>> {
        // SAFETY: `index` is at most `mask`, and there are `mask + 1` slots.
        let slot = unsafe { self.slots.get_unchecked(self.index(gva)) };
        let tag = slot.tag.load(Ordering::Acquire);
        (tag ^ gva <= tag::ALL).then_some(Hit { slot, tag })
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

    /// Remembers the stretch of `gva`, unless somebody else writes the slot just now. Of memory that changes there is evidence.
    ///
    /// # Safety
    /// As long as `self` lives, there must be 8 readable bytes at each place of `evidence`, 2 MiB where the stretch is said to
    /// be here, 4 KiB at the table of a shape of small pages and 8 bytes at that of another.
    pub(super) unsafe fn put(&self, gva: u64, way: &Way, evidence: Option<&[Seen; UPPER]>) {
        let Some(slot) = self.slots.get(self.index(gva)) else {
            return;
        };
        let before = slot.tag.load(Ordering::Relaxed);
        // Of no kind meanwhile.
        let writing = before & !(tag::LARGE | tag::SMALL) | tag::WRITING;
        if before & tag::WRITING != 0
            || slot
                .tag
                .compare_exchange(before, writing, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            return;
        }
        // A reader that sees any of the stores below sees that somebody writes, too.
        fence(Ordering::Release);
        let address = |ptr: &*const u8| ptr.expose_provenance() as u64;
        let mut kind = match way {
            Way::Here(bytes) => {
                slot.bytes.store(address(bytes), Ordering::Relaxed);
                tag::LARGE
            }
            Way::Table(table, shape) if *shape == Shape::SMALL => {
                slot.table.store(address(table), Ordering::Relaxed);
                tag::SMALL
            }
            Way::Table(table, shape) => {
                slot.other.store(address(table), Ordering::Relaxed);
                slot.address.store(shape.address, Ordering::Relaxed);
                slot.offset.store(shape.offset, Ordering::Relaxed);
                slot.test.store(shape.test, Ordering::Relaxed);
                slot.want.store(shape.want, Ordering::Relaxed);
                0
            }
        };
        if let Some(evidence) = evidence {
            kind |= tag::LIVE;
            let entries = slot.upper.iter().chain([&slot.fifth]);
            entries.zip(evidence).for_each(|(entry, seen)| entry.set(*seen));
        }
        // The number goes round: a reader would have to be held up for exactly so many writings of this very slot.
        let number = before.wrapping_add(tag::STEP) & tag::ALL & !(tag::STEP - 1);
        slot.tag.store(gva & !tag::ALL | number | kind, Ordering::Release);
    }
}
