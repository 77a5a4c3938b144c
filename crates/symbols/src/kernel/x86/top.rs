//! The kernel's own top-level table among the pages of its image, and with it the number of levels.

use vmsight_arch::paging::{self, PagingMode};
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::GuestMemory;

use super::entry::{Entry, Table, last_entries, read_table};
use super::extent::Extent;

const PAGE: u64 = 0x1000;
const GIB: u64 = 1 << 30;

/// Pages that lead to `level3_kernel_pgt` and are looked into. A kernel has two or three, and some of processes whose tables
/// came to lie in memory of init code; more are a guest's attempt to keep us busy.
const MAX_CHECKED: usize = 1024;

/// The top-level table.
pub(super) struct Top {
    pub(super) dtb: Dtb,
    pub(super) mode: PagingMode,
    pub(super) direct_map: Gva,
    pub(super) evidence: String,
}

/// Looks for a page in the image whose last entry leads to `level3` (four levels), or to a page of the image whose last entry
/// does (five levels), which maps no user address, and through which the direct map reaches the image. The last is the proof
/// of the number of levels: with the wrong number no address in the direct map leads to the right place.
///
/// A table of a process is not inside the image; the copy that page-table isolation gives to user mode has a third-level
/// table of its own; `early_top_pgt` maps no physical memory, and what is left of it lies behind.
pub(super) fn find(memory: &GuestMemory, image: &Extent, level3: Gpa) -> Result<Top, String> {
    let mut checked = 0;
    let mut why = String::new();
    // init_top_pgt is among the first pages of the writable data. The rest is looked at where rights are off or smeared.
    let writable = image
        .segments
        .iter()
        .filter(|s| s.write)
        .map(|s| (s.start, s.len));
    let other = image
        .segments
        .iter()
        .filter(|s| !s.write)
        .map(|s| (s.start, s.len));
    for (start, len) in writable.chain(other) {
        let pages: Vec<Gpa> = (start..start.saturating_add(len))
            .step_by(PAGE as usize)
            .map(|offset| image.phys.wrapping_add(offset))
            .collect();
        // In pieces, since the search mostly ends with the first.
        for pages in pages.chunks(256) {
            for (&page, last) in pages.iter().zip(last_entries(memory, pages)) {
                let Some(mode) = last.table().and_then(|next| mode(memory, image, next, level3)) else {
                    continue;
                };
                checked += 1;
                if checked > MAX_CHECKED {
                    return Err(format!(
                        "more than {MAX_CHECKED} pages lead to level3_kernel_pgt{why}"
                    ));
                }
                match check(memory, image, page, mode, level3) {
                    Ok(top) => return Ok(top),
                    Err(e) => why = format!("; {page}: {e}"),
                }
            }
        }
    }
    Err(format!(
        "none of {checked} pages that lead to level3_kernel_pgt is the kernel's top-level table{why}"
    ))
}

/// How many levels there would be above `level3`, if `next` is what the last entry of the top-level table leads to.
fn mode(memory: &GuestMemory, image: &Extent, next: Gpa, level3: Gpa) -> Option<PagingMode> {
    if next == level3 {
        return Some(PagingMode::X86Level4);
    }
    let below = |next| last_entries(memory, &[next]).first().and_then(|e| e.table());
    (image.holds(next) && below(next) == Some(level3)).then_some(PagingMode::X86Level5)
}

fn check(
    memory: &GuestMemory,
    image: &Extent,
    page: Gpa,
    mode: PagingMode,
    level3: Gpa,
) -> Result<Top, String> {
    let dtb = Dtb(page.0);
    let table = read_table(memory, page).ok_or("no memory")?;
    if table.entries().take(256).any(|(_, e)| e.is_present()) {
        return Err("it maps user addresses".to_owned());
    }
    let text = paging::walk(mode, memory, dtb, image.text).map(|t| t.gpa);
    if text != Ok(image.phys) {
        return Err("it does not map _text".to_owned());
    }
    let direct_map = direct_map(memory, &table, mode, dtb, &[image.phys, level3])
        .ok_or("no direct map of the image's memory in it")?;
    let (levels, name) = if mode == PagingMode::X86Level5 {
        (5, "level4_kernel_pgt")
    } else {
        (4, "level3_kernel_pgt")
    };
    Ok(Top {
        dtb,
        mode,
        direct_map,
        evidence: format!(
            "init_top_pgt at {page}: {levels} levels, its last entry is {name}, no user addresses, \
             and its direct map at {direct_map} leads back to the image"
        ),
    })
}

/// Where all physical memory is mapped linearly: the first mapping in the kernel's half from which all of `probes` can be
/// reached by their distance.
fn direct_map(
    memory: &GuestMemory,
    table: &Table,
    mode: PagingMode,
    dtb: Dtb,
    probes: &[Gpa],
) -> Option<Gva> {
    let shift = if mode == PagingMode::X86Level5 { 48 } else { 39 };
    let extended = if mode == PagingMode::X86Level5 {
        0xfe00_0000_0000_0000
    } else {
        0xffff_0000_0000_0000
    };
    table
        .entries()
        .skip(256)
        .take(255)
        .filter(|(_, e)| e.is_present())
        .take(4)
        .find_map(|(i, entry)| {
            let start = extended | (i as u64) << shift;
            let (gva, gpa) = first_page(memory, entry, shift, start)?;
            // Randomised by the gigabyte at the finest (arch/x86/mm/kaslr.c).
            let base = gva.wrapping_sub(gpa);
            let reaches = |&p: &Gpa| {
                paging::walk(mode, memory, dtb, Gva(base.wrapping_add(p.0))).is_ok_and(|t| t.gpa == p)
            };
            (base % GIB == 0 && probes.iter().all(reaches)).then_some(Gva(base))
        })
}

/// The first page mapped below `entry`, whose table covers the 2^`shift` bytes from `start`: its virtual and physical address.
fn first_page(memory: &GuestMemory, mut entry: Entry, mut shift: u32, mut start: u64) -> Option<(u64, u64)> {
    while shift > 12 {
        let Some(next) = entry.table() else {
            // A page of 1 GiB or 2 MiB: bit 12 is an attribute there, as are all others below its size.
            let page = entry.page()?;
            return (shift <= 30).then_some((start, page.0 & !((1 << shift) - 1)));
        };
        let table = read_table(memory, next)?;
        shift -= 9;
        let (i, found) = table.entries().find(|(_, e)| e.is_present())?;
        start |= (i as u64) << shift;
        entry = found;
    }
    Some((start, entry.page()?.0))
}
