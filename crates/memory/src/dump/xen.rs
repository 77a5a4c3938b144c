//! Xen's core dumps (`xl dump-core`): ELF cores whose memory is in a section `.xen_pages`, page after page, and whose addresses
//! are in another: `.xen_pfn` for guests whose addresses Xen translates, `.xen_p2m` for those that know the machine's.
//!
//! Source: Xen's `docs/misc/dump-core-format.txt`.

use super::bytes::{slice, u16_at, u32_at, u64_at};
use super::cover::Cover;

/// Sections read at most; Xen writes about ten.
const MAX_SECTIONS: u16 = 256;
/// The place of a page that is not there.
const NO_FRAME: u64 = u64::MAX;

/// A section header's numbers.
#[derive(Clone, Copy)]
struct Section {
    name: u32,
    offset: u64,
    size: u64,
    entry: u64,
}

/// Adds the pages where there is such a section, and says whether there is.
pub(super) fn parse(
    data: &[u8],
    wide: bool,
    sections: u64,
    cover: &mut Cover,
    remarks: &mut Vec<String>,
) -> bool {
    if !wide || sections == 0 {
        return false;
    }
    let (Some(entry), Some(count), Some(names)) = (u16_at(data, 58), u16_at(data, 60), u16_at(data, 62))
    else {
        return false;
    };
    let section = |index: u16| {
        let at = sections.checked_add(u64::from(index) * u64::from(entry))?;
        let word = |offset| u64_at(data, at.checked_add(offset)?);
        Some(Section {
            name: u32_at(data, at)?,
            offset: word(24)?,
            size: word(32)?,
            entry: word(56)?,
        })
    };
    let Some(names) = section(names) else { return false };
    let names = slice(data, names.offset, names.size);
    let mut found = [None; 3];
    for section in (0..count.min(MAX_SECTIONS)).filter_map(section) {
        let name = slice(names, section.name.into(), 32).split(|b| *b == 0).next();
        match name {
            Some(b".xen_pages") => found[0] = Some(section),
            Some(b".xen_pfn") => found[1] = Some(section),
            Some(b".xen_p2m") => found[2] = Some(section),
            _ => {}
        }
    }
    let [Some(pages), pfn, p2m] = found else {
        return false;
    };
    let page = match pages.entry {
        0 => 4096,
        size => size,
    };
    // Of a guest that knows the machine's frames, the page tables hold those: they are its physical addresses.
    let (table, step, at) = match (pfn, p2m) {
        (Some(table), _) => (table, 8, 0),
        (None, Some(table)) => (table, 16, 8),
        (None, None) => {
            remarks.push("a Xen core without a table of its pages".to_owned());
            return true;
        }
    };
    let entries = slice(data, table.offset, table.size);
    if (entries.len() as u64) < table.size {
        remarks.push("the table of the Xen core's pages is cut".to_owned());
    }
    let mut run: Option<(u64, u64, u64)> = None;
    let mut add = |run: Option<(u64, u64, u64)>| {
        if let Some((frame, first, count)) = run {
            let (gpa, len) = (frame.saturating_mul(page), count.saturating_mul(page));
            let start = first.saturating_mul(page);
            let stored = pages.size.saturating_sub(start).min(len);
            cover.add(gpa, len, pages.offset.saturating_add(start), stored);
        }
    };
    for (index, bytes) in (0u64..).zip(entries.chunks_exact(step)) {
        let frame = u64_at(bytes, at).unwrap_or(NO_FRAME);
        if frame == NO_FRAME {
            continue;
        }
        run = match run {
            Some((start, first, count))
                if start.checked_add(count) == Some(frame) && first + count == index =>
            {
                Some((start, first, count + 1))
            }
            other => {
                add(other);
                Some((frame, index, 1))
            }
        };
    }
    add(run);
    true
}
