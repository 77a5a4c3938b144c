//! ELF cores, as QEMU's `dump-guest-memory` writes them.

use super::file::OutFile;
use super::pieces::Pieces;
use super::{Contents, PAGE, WriteError, notes, plain};
use crate::Region;
use crate::dump::elf::{ET_CORE, MAGIC, PN_XNUM, PT_LOAD, PT_NOTE};

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const SECTION_HEADER: u64 = 64;
const EM_X86_64: u16 = 62;

pub(super) fn write(
    out: &mut OutFile<'_>,
    contents: &Contents<'_>,
    regions: &[Region],
    pieces: &mut Pieces<'_>,
) -> Result<(), WriteError> {
    let notes = notes::all(contents);
    let count = regions.len() as u64 + 1;
    // With more segments than the header can say, a section header says it.
    let many = count >= u64::from(PN_XNUM);
    let table_end = HEADER + PROGRAM_HEADER * count;
    let notes_at = table_end + if many { SECTION_HEADER } else { 0 };
    let first = (notes_at + notes.len() as u64).next_multiple_of(PAGE);

    let mut head = Vec::new();
    head.extend(MAGIC);
    // 64-bit, little-endian, version 1.
    head.extend([2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    head.extend(ET_CORE.to_le_bytes());
    head.extend(EM_X86_64.to_le_bytes());
    head.extend(1u32.to_le_bytes());
    head.extend([0; 8]);
    head.extend(HEADER.to_le_bytes());
    head.extend(if many { table_end } else { 0 }.to_le_bytes());
    head.extend([0; 4]);
    head.extend((HEADER as u16).to_le_bytes());
    head.extend((PROGRAM_HEADER as u16).to_le_bytes());
    head.extend(u16::try_from(count).unwrap_or(PN_XNUM).to_le_bytes());
    head.extend((SECTION_HEADER as u16).to_le_bytes());
    head.extend(u16::from(many).to_le_bytes());
    head.extend([0; 2]);

    let mut segment = |kind: u32, offset: u64, gpa: u64, len: u64| {
        head.extend(kind.to_le_bytes());
        head.extend([0; 4]);
        for field in [offset, 0, gpa, len, len, 0] {
            head.extend(field.to_le_bytes());
        }
    };
    segment(PT_NOTE, notes_at, 0, notes.len() as u64);
    let mut at = first;
    for region in regions {
        segment(PT_LOAD, at, region.start.0, region.len);
        at = (at + region.len).next_multiple_of(PAGE);
    }
    if many {
        let mut section = [0; SECTION_HEADER as usize];
        // sh_info.
        if let Some(field) = section.get_mut(44..48) {
            field.copy_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
        }
        head.extend(section);
    }
    head.extend(notes);
    out.put(head)?;
    for region in regions {
        out.pad(PAGE)?;
        plain::memory(out, *region, pieces)?;
    }
    Ok(())
}
