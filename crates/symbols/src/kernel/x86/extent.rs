//! How far the image reaches, and what its parts may be used for, as `level2_kernel_pgt` says.

use vmsight_arch::{Gpa, Gva};
use vmsight_memory::GuestMemory;

use super::KERNEL_MAP;
use super::entry::{Entry, Table, read_table};

const PAGE: u64 = 0x1000;
const LARGE: u64 = 0x20_0000;

/// A run of pages of the image with the same rights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::kernel) struct Segment {
    /// Bytes from `_text`.
    pub(in crate::kernel) start: u64,
    pub(in crate::kernel) len: u64,
    pub(in crate::kernel) write: bool,
    pub(in crate::kernel) execute: bool,
}

/// Where the image lies.
#[derive(Debug)]
pub(super) struct Extent {
    pub(super) text: Gva,
    pub(super) phys: Gpa,
    pub(super) len: u64,
    pub(super) segments: Vec<Segment>,
}

impl Extent {
    pub(super) fn holds(&self, gpa: Gpa) -> bool {
        gpa.0.wrapping_sub(self.phys.0) < self.len
    }
}

/// Reads the extent out of `level2_kernel_pgt`.
///
/// After boot it maps from `_text` to the end of the brk area and nothing else (`cleanup_highmap`); where the whole
/// gigabyte is not the image's, modules come behind. So: the first run of entries that continue one another. Holes are stepped
/// over where what follows continues the run at its distance: page-table isolation takes the freed memory of init code
/// out of these tables, whole entries included (`free_kernel_image_pages`, arch/x86/mm/init.c, since 4.19).
pub(super) fn of(memory: &GuestMemory, level2: Gpa) -> Result<Extent, String> {
    let table = read_table(memory, level2).ok_or_else(|| format!("no memory at {level2}"))?;
    let (first, entry) = table
        .entries()
        .find(|(_, e)| e.is_present())
        .ok_or_else(|| format!("level2_kernel_pgt at {level2} maps nothing"))?;
    let phys =
        begin(memory, entry).ok_or_else(|| format!("the mapping of _text at {level2} leads nowhere"))?;
    if phys.0 % LARGE != 0 {
        return Err(format!("_text would be at {phys}, which is no multiple of 2 MiB"));
    }
    let mut image = Extent {
        text: Gva(KERNEL_MAP + first as u64 * LARGE),
        phys,
        len: 0,
        segments: Vec::new(),
    };
    for (i, entry) in table.entries().skip(first) {
        let offset = (i - first) as u64 * LARGE;
        match image.add(memory, entry, offset) {
            Entered::Continues => image.len = offset + LARGE,
            Entered::Hole => {}
            Entered::Ends => break,
        }
    }
    if image.len < LARGE {
        return Err(format!(
            "the page tables at {level2} do not map an image in one piece"
        ));
    }
    Ok(image)
}

/// The physical address that an entry's 2 MiB begin with.
fn begin(memory: &GuestMemory, entry: Entry) -> Option<Gpa> {
    match entry.large_page() {
        Some(page) => Some(page),
        None => read_table(memory, entry.table()?)?.entry(0).page(),
    }
}

/// What an entry is to the image.
enum Entered {
    /// It maps the image's next 2 MiB, or some of their pages.
    Continues,
    /// It maps nothing. It lies within the image only if a later entry continues it.
    Hole,
    /// It maps something else.
    Ends,
}

impl Extent {
    /// Adds the 2 MiB `offset` bytes from `_text`, if the entry maps them where the image goes on.
    fn add(&mut self, memory: &GuestMemory, entry: Entry, offset: u64) -> Entered {
        if !entry.is_present() {
            return Entered::Hole;
        }
        let want = Gpa(self.phys.0.wrapping_add(offset));
        if let Some(page) = entry.large_page() {
            if page != want {
                return Entered::Ends;
            }
            self.push(offset, LARGE, entry);
            return Entered::Continues;
        }
        // Split where rights change within 2 MiB, and where the memory of init code was given back.
        let Some(table) = entry.table().and_then(|t| read_table(memory, t)) else {
            return Entered::Ends;
        };
        self.add_pages(&table, want, offset)
    }

    fn add_pages(&mut self, table: &Table, want: Gpa, offset: u64) -> Entered {
        let expected = |i: usize| Gpa(want.0.wrapping_add(i as u64 * PAGE));
        let right = table
            .entries()
            .filter(|&(i, e)| e.page() == Some(expected(i)))
            .count();
        let wrong = table
            .entries()
            .filter(|&(i, e)| e.page().is_some_and(|p| p != expected(i)))
            .count();
        // Others' pages are a module's.
        if wrong > right / 8 {
            return Entered::Ends;
        }
        if right == 0 {
            return Entered::Hole;
        }
        for (i, entry) in table.entries() {
            if entry.page() == Some(expected(i)) {
                self.push(offset + i as u64 * PAGE, PAGE, entry);
            }
        }
        Entered::Continues
    }

    fn push(&mut self, start: u64, len: u64, entry: Entry) {
        let (write, execute) = (entry.may_write(), entry.may_execute());
        match self.segments.last_mut() {
            Some(s) if s.start + s.len == start && s.write == write && s.execute == execute => s.len += len,
            _ => self.segments.push(Segment {
                start,
                len,
                write,
                execute,
            }),
        }
    }
}
