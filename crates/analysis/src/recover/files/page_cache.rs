//! The pages of one file that are in memory: `struct address_space` and the pages in its xarray (mm/filemap.c).

use vmsight_arch::{Gpa, Gva};
use vmsight_linux::structures::{End, xarray};
use vmsight_linux::{Kernel, LinuxError};
use vmsight_memory::ReadError;

use crate::recover::frames::{Frames, PAGE};
use crate::recover::member::{Member, Structure};

/// The largest folio is a huge page of 1 GiB.
const MAX_FOLIO: u64 = 1 << 18;
/// What is needed to follow a file to its pages.
pub(crate) struct PageCache<'k> {
    kernel: &'k Kernel,
    frames: Frames,
    xa_head: Member,
    flags: Member,
    mapping: Member,
    index: Member,
    uptodate: Option<u64>,
    dirty: Option<u64>,
}

/// Some pages that follow one another in a file and in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    /// The first page's number in the file.
    pub(crate) index: u64,
    /// How many.
    pub(crate) count: u64,
    /// Where the first lies.
    pub(crate) gpa: Gpa,
    /// Changed since it was read from or written to a disk.
    pub(crate) dirty: bool,
    /// The `struct page` of the first, and the number in the file that it must bear.
    head: Gva,
    head_index: u64,
}

/// What an `address_space` has in memory.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    /// By rising index, each behind the end of the one before.
    pub(crate) stretches: Vec<Stretch>,
    /// Numbers of pages that stand for something that was moved out: swapped, or dropped from memory.
    pub(crate) moved_out: Vec<(u64, u64)>,
    /// Entries that lead to no page of this file.
    pub(crate) astray: u64,
    pub(crate) end: End,
}

impl<'k> PageCache<'k> {
    pub(crate) fn new(kernel: &'k Kernel) -> Result<Self, LinuxError> {
        // The head of a large folio is one since 5.16; its members lie where the page's do.
        let head = Structure::of(kernel, "folio").or_else(|_| Structure::of(kernel, "page"))?;
        let flag = |name: &str| {
            let types = kernel.types();
            let bit = types
                .enumerators(types.find_enum("pageflags")?)
                .find(|e| e.name == name)?
                .value;
            1u64.checked_shl(u32::try_from(bit).ok()?)
        };
        Ok(Self {
            kernel,
            frames: Frames::new(kernel)?,
            xa_head: Structure::of(kernel, "address_space")?.member("i_pages.xa_head")?,
            flags: head.member("flags.f|flags")?,
            mapping: head.member("mapping")?,
            index: head.member("index|__folio_index")?,
            uptodate: flag("PG_uptodate"),
            dirty: flag("PG_dirty"),
        })
    }

    /// The pages of the `address_space` at `mapping`; at most `limit` entries are looked at.
    pub(crate) fn pages(&self, mapping: Gva, limit: usize) -> Result<Pages, LinuxError> {
        let space = self.kernel.space();
        let head = self
            .xa_head
            .number(space, mapping)
            .map_err(|source| LinuxError::Read {
                what: "address_space.i_pages".to_owned(),
                at: mapping,
                source,
            })?;
        let walk = xarray::walk_head(self.kernel, head, limit)?;
        let mut out = Pages {
            end: walk.end,
            ..Pages::default()
        };
        let mut next = 0;
        for entry in walk.items {
            let count = entry.count.min(MAX_FOLIO);
            let end = entry
                .index
                .checked_add(count)
                .filter(|end| end.checked_mul(PAGE).is_some());
            match end {
                Some(end) if entry.index >= next && count > 0 => next = end,
                // Of an honest tree none is within another.
                _ => {
                    out.astray += 1;
                    continue;
                }
            }
            let Some(page) = entry.pointer() else {
                out.moved_out.push((entry.index, count));
                continue;
            };
            match self.stretch(mapping, page, entry.index, count) {
                Ok(Some(stretch)) => out.stretches.push(stretch),
                // Room that was set aside and never filled: zeros to whoever reads the file.
                Ok(None) => {}
                Err(Astray) => out.astray += 1,
            }
        }
        Ok(out)
    }

    /// The pages behind one entry; `None` where they were never filled.
    fn stretch(&self, mapping: Gva, page: Gva, index: u64, count: u64) -> Result<Option<Stretch>, Astray> {
        let flags = self.own(mapping, page).map_err(|_| Astray)?.ok_or(Astray)?;
        let head_index = self.index.number(self.kernel.space(), page).map_err(|_| Astray)?;
        // Up to 5.16 or so a huge page's head is stored once for each of its pages.
        let within = index.checked_sub(head_index).ok_or(Astray)?;
        if within + count > MAX_FOLIO {
            return Err(Astray);
        }
        if self.uptodate.is_some_and(|bit| flags & bit == 0) {
            return Ok(None);
        }
        let gpa = self.frames.frame(page).ok_or(Astray)?;
        let gpa = gpa.0.checked_add(within * PAGE).map(Gpa).ok_or(Astray)?;
        Ok(Some(Stretch {
            index,
            count,
            gpa,
            dirty: self.dirty.is_some_and(|bit| flags & bit != 0),
            head: page,
            head_index,
        }))
    }

    /// The flags of the `struct page`, if it says that it belongs to this mapping.
    fn own(&self, mapping: Gva, page: Gva) -> Result<Option<u64>, ReadError> {
        let space = self.kernel.space();
        if self.frames.frame(page).is_none() || self.mapping.pointer(space, page)? != mapping {
            return Ok(None);
        }
        self.flags.number(space, page).map(Some)
    }

    /// Whether the pages still are what they were when the stretch was found: of use after their bytes were read.
    pub(crate) fn holds(&self, mapping: Gva, stretch: &Stretch) -> bool {
        let index = self.index.number(self.kernel.space(), stretch.head);
        matches!(self.own(mapping, stretch.head), Ok(Some(_)))
            && index.is_ok_and(|index| index == stretch.head_index)
    }
}

/// An entry that leads to no page of the file.
struct Astray;
