//! ELF core files of machines: QEMU's `dump-guest-memory`, `virsh dump --memory-only`, VirtualBox, a crashed kernel's
//! `vmcore`. Memory is in PT_LOAD segments by their *physical* address.
//!
//! Own parsing, not the `object` crate's: of a truncated program header table that refuses all, and we want what is
//! left; five numbers of each header are needed.

use super::DumpError;
use super::bytes::{slice, u16_at, u32_at, u64_at};
use super::cover::Cover;
use super::notes::{self, Notes};
use super::xen;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
pub(super) const ET_CORE: u16 = 4;
pub(super) const PT_LOAD: u32 = 1;
pub(super) const PT_NOTE: u32 = 4;
/// e_phnum when the real number is in `sh_info` of the first section header.
pub(super) const PN_XNUM: u16 = 0xffff;
/// Segments read at most: a bound on work. VirtualBox writes at most 65,535.
const MAX_SEGMENTS: u64 = 1 << 20;
/// Bytes of notes read at most.
const MAX_NOTES: u64 = 64 << 20;

/// One program header.
struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

/// Reads the headers and notes. `data` is the file, or as much of it as there is.
pub(super) fn parse(data: &[u8], cover: &mut Cover, remarks: &mut Vec<String>) -> Result<Notes, DumpError> {
    let ident = data.get(4..6).unwrap_or_default();
    let &[class, encoding] = ident else {
        return Err(DumpError::broken("the ELF header is cut"));
    };
    if encoding != LITTLE_ENDIAN {
        return Err(DumpError::broken(
            "a big-endian ELF file: no machine we know writes one",
        ));
    }
    let wide = match class {
        CLASS_32 => false,
        CLASS_64 => true,
        _ => return Err(DumpError::broken("neither a 32-bit nor a 64-bit ELF file")),
    };
    let kind = u16_at(data, 16).ok_or_else(|| DumpError::broken("the ELF header is cut"))?;
    if kind != ET_CORE {
        return Err(DumpError::broken(&format!(
            "an ELF file of type {kind}, but not a core file: a program or library, not memory"
        )));
    }
    let fields = if wide {
        (
            u16_at(data, 18),
            u64_at(data, 32),
            u64_at(data, 40),
            u16_at(data, 54),
            u16_at(data, 56),
        )
    } else {
        let narrow = |at| u32_at(data, at).map(u64::from);
        (
            u16_at(data, 18),
            narrow(28),
            narrow(32),
            u16_at(data, 42),
            u16_at(data, 44),
        )
    };
    let (Some(machine), Some(table), Some(sections), Some(entry), Some(count)) = fields else {
        return Err(DumpError::broken("the ELF header is cut"));
    };
    let smallest = if wide { 56 } else { 32 };
    if count > 0 && entry < smallest {
        return Err(DumpError::broken(&format!(
            "program headers of {entry} bytes, {smallest} are needed"
        )));
    }
    let mut count = u64::from(count);
    if count == u64::from(PN_XNUM) {
        // sh_info of section header 0.
        let at = sections.checked_add(if wide { 44 } else { 28 });
        match at.and_then(|at| u32_at(data, at)) {
            Some(real) => count = u64::from(real),
            None => remarks.push("the number of segments is cut off: taken for 65,535".to_owned()),
        }
    }
    if count > MAX_SEGMENTS {
        remarks.push(format!(
            "{count} segments: only the first {MAX_SEGMENTS} are read"
        ));
        count = MAX_SEGMENTS;
    }

    // Xen's cores have their memory in sections, and no segments.
    if xen::parse(data, wide, sections, cover, remarks) {
        return Ok(Notes::new(machine));
    }
    let mut notes = Notes::new(machine);
    let mut loads = Loads::default();
    let mut note_budget = MAX_NOTES;
    for index in 0..count {
        let at = index
            .checked_mul(u64::from(entry))
            .and_then(|offset| table.checked_add(offset));
        let Some(segment) = at.and_then(|at| segment(data, at, wide)) else {
            remarks.push(format!(
                "the program headers are cut: {index} of {count} are there"
            ));
            break;
        };
        match segment.kind {
            PT_NOTE => {
                let bytes = slice(data, segment.offset, segment.filesz.min(note_budget));
                note_budget -= bytes.len() as u64;
                if (bytes.len() as u64) < segment.filesz {
                    remarks.push(format!("notes at {:#x} are cut or too long", segment.offset));
                }
                notes::parse(bytes, &mut notes, remarks);
            }
            PT_LOAD => loads.push(segment),
            _ => {}
        }
    }
    loads.check()?;
    for segment in loads.segments {
        // Device memory that VirtualBox does not save; some writers leave memsz out.
        if segment.filesz == 0 && notes.is_virtualbox() {
            continue;
        }
        let len = if segment.memsz == 0 {
            segment.filesz
        } else {
            segment.memsz
        };
        // /proc/kcore: kernel text and modules, mapped a second time, have no physical address there.
        if segment.paddr != u64::MAX {
            cover.add(segment.paddr, len, segment.offset, segment.filesz);
        }
    }
    Ok(notes)
}

fn segment(data: &[u8], at: u64, wide: bool) -> Option<Segment> {
    if wide {
        let field = |offset| u64_at(data, at.checked_add(offset)?);
        Some(Segment {
            kind: u32_at(data, at)?,
            offset: field(8)?,
            vaddr: field(16)?,
            paddr: field(24)?,
            filesz: field(32)?,
            memsz: field(40)?,
        })
    } else {
        let field = |offset| u32_at(data, at.checked_add(offset)?).map(u64::from);
        Some(Segment {
            kind: u32_at(data, at)?,
            offset: field(4)?,
            vaddr: field(8)?,
            paddr: field(12)?,
            filesz: field(16)?,
            memsz: field(20)?,
        })
    }
}

/// The PT_LOAD segments.
#[derive(Default)]
struct Loads {
    segments: Vec<Segment>,
}

impl Loads {
    fn push(&mut self, segment: Segment) {
        self.segments.push(segment);
    }

    /// A core of a process also has PT_LOADs, with virtual addresses and all physical ones 0.
    fn check(&self) -> Result<(), DumpError> {
        let no_physical = self.segments.iter().all(|segment| segment.paddr == 0);
        let virtual_ = self.segments.iter().filter(|segment| segment.vaddr != 0).count();
        if no_physical && virtual_ > 0 && self.segments.len() > 1 {
            return Err(DumpError::broken(
                "the core file of a process: it has no physical addresses",
            ));
        }
        Ok(())
    }
}
