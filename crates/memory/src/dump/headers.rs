//! What the headers of a dump say: pure functions of its bytes.

use super::bytes::u32_at;
use super::cover::{Cover, Segment, list};
use super::pages::{Index, Pages, Unit};
use super::raw::RawLayout;
use super::{DumpError, DumpFormat, avml, elf, kdump, lime, migration, raw, vmware};
use crate::Region;
use vmsight_arch::{Gpa, Registers};

/// Everything about a dump but its memory.
#[derive(Debug)]
pub struct Headers {
    /// The format.
    pub format: DumpFormat,
    /// Where guest memory is in the file: sorted, disjoint, all within the file.
    pub segments: Vec<Segment>,
    /// Memory whose bytes must be looked up or unpacked, and how: sorted, disjoint, and in no segment.
    pub paged: Option<(Vec<Region>, Pages)>,
    /// Guest memory the file should have and has not: sorted.
    pub missing: Vec<Region>,
    /// What the vCPUs held, where the file says.
    pub registers: Vec<Registers>,
    /// The guest kernel's VMCOREINFO, where the file has it.
    pub vmcoreinfo: Option<String>,
    /// Remarks for the user.
    pub notes: Vec<String>,
}

/// Formats that are known but not read here: their first bytes, their name, what to do instead.
const FOREIGN: &[(&[u8], &str, &str)] = &[
    (b"DISKDUMP", "a diskdump file", "make an ELF core of it"),
    (
        b"PAGEDU",
        "a Windows crash dump",
        "make a raw image or ELF core of the VM instead",
    ),
    (
        b"LibvirtQemudSave",
        "a libvirt save file",
        "use virsh dump --memory-only",
    ),
    (
        b"LibvirtQemudPart",
        "a libvirt save file that was not finished",
        "use virsh dump --memory-only",
    ),
    (
        b"\x7fVirtualBox SavedState",
        "a saved state of VirtualBox",
        "make an ELF core: VBoxManage debugvm VM dumpvmcore",
    ),
    (b"QFI\xfb", "a qcow2 disk image", "give a memory dump"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"),
    (b"BZh", "a bzip2 file", "unpack it first"),
    (b"PK\x03\x04", "a zip file", "unpack it first"),
];

/// Tells the format by the first bytes. What has no signature is raw.
///
/// # Errors
/// A format that is known, but not read here.
pub fn sniff(start: &[u8]) -> Result<DumpFormat, DumpError> {
    if start.starts_with(&elf::MAGIC) {
        return Ok(DumpFormat::Elf);
    }
    if u32_at(start, 0) == Some(lime::MAGIC) {
        return Ok(DumpFormat::Lime);
    }
    if u32_at(start, 0) == Some(avml::MAGIC) {
        return Ok(DumpFormat::Avml);
    }
    if kdump::is_kdump(start) {
        return Ok(DumpFormat::Kdump);
    }
    if start.starts_with(migration::MAGIC) {
        return Ok(DumpFormat::Migration);
    }
    if vmware::is_state(start) {
        return Ok(DumpFormat::Vmware);
    }
    match FOREIGN.iter().find(|(magic, ..)| start.starts_with(magic)) {
        Some(&(_, what, instead)) => Err(DumpError::Foreign { what, instead }),
        None => Ok(DumpFormat::Raw(RawLayout::Flat)),
    }
}

/// Reads the headers of a dump of `file_len` bytes, of which `data` is the beginning (or all). `format` is what the caller
/// knows; `None` looks at the bytes.
///
/// Takes time and memory in proportion to `data`, whatever the numbers in it say.
///
/// # Errors
/// A file that has no memory in it, or is not of the format.
pub fn parse_headers(data: &[u8], file_len: u64, format: Option<DumpFormat>) -> Result<Headers, DumpError> {
    let mut notes = Vec::new();
    let format = match format {
        Some(format) => format,
        None => sniff(data)?,
    };
    let mut cover = Cover::new(file_len);
    let (mut registers, mut vmcoreinfo) = (Vec::new(), None);
    let mut paged = None;
    let mut lacking = Vec::new();
    match format {
        DumpFormat::Raw(layout) => {
            if !matches!(sniff(data), Ok(DumpFormat::Raw(_))) {
                notes.push("opened as a raw image, but it begins like a file of another format".to_owned());
            }
            raw::parse(layout, file_len, &mut cover, &mut notes);
        }
        DumpFormat::Lime => {
            if u32_at(data, 0) != Some(lime::MAGIC) {
                return Err(DumpError::broken("no LiME header at the beginning"));
            }
            lime::parse(data, file_len, &mut cover, &mut notes);
        }
        DumpFormat::Elf => {
            if !data.starts_with(&elf::MAGIC) {
                return Err(DumpError::broken("no ELF header at the beginning"));
            }
            let mut found = elf::parse(data, &mut cover, &mut notes)?;
            vmcoreinfo = found.vmcoreinfo.take();
            registers = found.registers(&mut notes);
        }
        DumpFormat::Kdump => {
            let mut found = kdump::parse(data, file_len, &mut notes)?;
            vmcoreinfo = found.notes.vmcoreinfo.take();
            registers = found.notes.registers(&mut notes);
            lacking = found.missing;
            let index = Index::Kdump(found.kdump);
            paged = Some((found.runs, Pages { index }));
        }
        DumpFormat::Avml => {
            if u32_at(data, 0) != Some(avml::MAGIC) {
                return Err(DumpError::broken("no AVML header at the beginning"));
            }
            let mut units = avml::parse(data, file_len, &mut lacking, &mut notes);
            units.sort_by_key(|unit| unit.gpa);
            paged = Some(of_units(units, &mut notes));
            let there = paged.as_ref().map_or(&[][..], |(runs, _)| runs);
            lacking = without(lacking, there);
        }
        DumpFormat::Migration => {
            let found = migration::parse(data, &mut notes)?;
            let (runs, pages) = of_units(found.units, &mut notes);
            lacking = without(found.regions, &runs);
            if !lacking.is_empty() {
                let lacking = list(&lacking, lacking.len() as u64);
                notes.push(format!("the stream lacks {lacking}"));
            }
            paged = Some((runs, pages));
        }
        DumpFormat::Vmware => {
            let state = vmware::parse(data, &mut notes)?;
            if !state.has_memory() {
                return Err(DumpError::Foreign {
                    what: "a suspended state or snapshot of VMware without the memory",
                    instead: "put the .vmem file of the same name beside it",
                });
            }
            state.cover(None, &mut cover);
        }
    }
    finish(format, cover, paged, lacking, registers, vmcoreinfo, notes)
}

/// The headers of a VMware dump whose memory is in a file of its own, of `memory_len` bytes; `state` is the other file.
///
/// # Errors
/// A state that is none, or has no memory.
pub fn parse_vmware(state: &[u8], memory_len: u64) -> Result<Headers, DumpError> {
    let mut notes = Vec::new();
    let mut cover = Cover::new(memory_len);
    vmware::parse(state, &mut notes)?.cover(Some(memory_len), &mut cover);
    finish(
        DumpFormat::Vmware,
        cover,
        None,
        Vec::new(),
        Vec::new(),
        None,
        notes,
    )
}

/// Units (sorted) as runs without gaps. Of two that overlap the first counts.
fn of_units(mut units: Vec<Unit>, notes: &mut Vec<String>) -> (Vec<Region>, Pages) {
    let mut end = 0;
    let all = units.len();
    units.retain(|unit| {
        let fits = unit.gpa >= end;
        if fits {
            end = unit.gpa.saturating_add(unit.len.into());
        }
        fits
    });
    if units.len() < all {
        notes.push(format!(
            "{} pieces describe memory that another one already describes: left out",
            all - units.len()
        ));
    }
    let mut runs: Vec<Region> = Vec::new();
    for unit in &units {
        match runs.last_mut() {
            Some(last) if last.end().0 == unit.gpa => last.len += u64::from(unit.len),
            _ => runs.push(Region {
                start: Gpa(unit.gpa),
                len: unit.len.into(),
            }),
        }
    }
    let index = Index::List(units);
    (runs, Pages { index })
}

/// What of `regions` is not in `there`; both sorted, `there` disjoint.
fn without(regions: Vec<Region>, there: &[Region]) -> Vec<Region> {
    let mut rest = Vec::new();
    for region in regions {
        let mut at = region.start;
        let first = there.partition_point(|run| run.end() <= region.start);
        for run in there
            .iter()
            .skip(first)
            .take_while(|run| run.start < region.end())
        {
            if run.start > at {
                rest.push(Region {
                    start: at,
                    len: run.start.0 - at.0,
                });
            }
            at = at.max(run.end());
        }
        if at < region.end() {
            rest.push(Region {
                start: at,
                len: region.end().0 - at.0,
            });
        }
    }
    rest
}

fn finish(
    format: DumpFormat,
    cover: Cover,
    paged: Option<(Vec<Region>, Pages)>,
    lacking: Vec<Region>,
    registers: Vec<Registers>,
    vmcoreinfo: Option<String>,
    mut notes: Vec<String>,
) -> Result<Headers, DumpError> {
    let (segments, mut missing) = cover.finish(&mut notes);
    missing.extend(lacking);
    let paged = paged.filter(|(runs, _)| !runs.is_empty());
    if segments.is_empty() && paged.is_none() {
        let notes = if notes.is_empty() {
            String::new()
        } else {
            format!(": {}", notes.join("; "))
        };
        return Err(DumpError::broken(&format!(
            "there is no guest memory in it{notes}"
        )));
    }
    Ok(Headers {
        format,
        segments,
        paged,
        missing,
        registers,
        vmcoreinfo,
        notes,
    })
}
