//! What the headers of a dump say: pure functions of its bytes.

use super::bytes::u32_at;
use super::cover::{Cover, Segment};
use super::raw::RawLayout;
use super::{DumpError, DumpFormat, elf, lime, raw};
use crate::Region;
use vmsight_arch::Registers;

/// Everything about a dump but its memory.
#[derive(Debug)]
pub struct Headers {
    /// The format.
    pub format: DumpFormat,
    /// Where guest memory is in the file: sorted, disjoint, all within the file.
    pub segments: Vec<Segment>,
    /// Guest memory the file should have and has not: sorted.
    pub missing: Vec<Region>,
    /// What the vCPUs held, where the file says.
    pub registers: Vec<Registers>,
    /// The guest kernel's VMCOREINFO, where the file has it.
    pub vmcoreinfo: Option<String>,
    /// Remarks for the user.
    pub notes: Vec<String>,
}

const VMWARE: &str = "a suspended state or snapshot of VMware (.vmss, .vmsn)";
const VMWARE_INSTEAD: &str = "give the .vmem file beside it, with raw:";

/// Formats that are known but not read here: their first bytes, their name, what to do instead.
const FOREIGN: &[(&[u8], &str, &str)] = &[
    (
        b"KDUMP   ",
        "a compressed kdump file",
        "make an ELF core: dump-guest-memory without a compressed format",
    ),
    (b"DISKDUMP", "a diskdump file", "make an ELF core of it"),
    (
        b"makedumpfile\0",
        "a flattened makedumpfile stream",
        "make a file of it: makedumpfile -R",
    ),
    (b"AVML", "a compressed AVML file", "make LiME of it: avml-convert"),
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
    (b"\xd0\xbe\xd2\xbe", VMWARE, VMWARE_INSTEAD),
    (b"\xd1\xba\xd1\xba", VMWARE, VMWARE_INSTEAD),
    (b"\xd2\xbe\xd2\xbe", VMWARE, VMWARE_INSTEAD),
    (b"\xd3\xbe\xd3\xbe", VMWARE, VMWARE_INSTEAD),
    (b"QEVM", "a QEMU migration stream", "use dump-guest-memory"),
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
    }
    let (segments, missing) = cover.finish(&mut notes);
    if segments.is_empty() {
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
        missing,
        registers,
        vmcoreinfo,
        notes,
    })
}
