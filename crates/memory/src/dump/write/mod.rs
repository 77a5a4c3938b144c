//! Writing a guest's memory as a dump: raw, LiME, ELF core, AVML or kdump.
//!
//! Memory is read once, chunk by chunk. While one chunk is written, what was read before it is hashed on other threads: the
//! file as a whole, and the memory of each region as the guest has it. Zero pages become holes of the file, or are stored
//! once where the format can say so.

mod avml;
mod digest;
mod elf;
mod file;
mod kdump;
mod notes;
mod pieces;
mod plain;
mod vmcoreinfo;

pub use vmcoreinfo::{Vmcoreinfo, find_vmcoreinfo};

use std::fmt;
use std::fs::File;
use std::io;
use std::str::FromStr;
use std::sync::atomic::AtomicBool;

use thiserror::Error;
use vmsight_arch::{Gpa, Registers};

use super::Coding;
use crate::{GuestMemory, MemoryError, Region};
use digest::Digester;
use file::OutFile;
use pieces::Pieces;

/// The page size of the formats that know pages.
const PAGE: u64 = 4096;
/// Where x86 machines keep their firmware: the last 16 MiB below 4 GiB.
const FIRMWARE: u64 = 0xff00_0000;
/// 4 GiB.
const HIGH: u64 = 1 << 32;

/// What a dump can be written as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OutFormat {
    /// The byte at offset x is the one at address x; where the machine has no memory there are zeros.
    Raw,
    /// LiME, version 1.
    Lime,
    /// An ELF core with physical addresses, the vCPUs' registers and VMCOREINFO.
    Elf,
    /// AVML's compressed LiME (version 2), Snappy.
    Avml,
    /// A compressed kdump, version 6, with the vCPUs' registers and VMCOREINFO.
    Kdump(Coding),
}

impl OutFormat {
    /// Those that are of use. [`Coding::Lzo`] is left out: packing it takes ten times as long as Snappy does, for no smaller file.
    pub const ALL: [Self; 7] = [
        Self::Elf,
        Self::Lime,
        Self::Avml,
        Self::Kdump(Coding::Zstd),
        Self::Kdump(Coding::Zlib),
        Self::Kdump(Coding::Snappy),
        Self::Raw,
    ];

    /// Whether it has a place for registers and VMCOREINFO.
    pub fn has_notes(self) -> bool {
        matches!(self, Self::Elf | Self::Kdump(_))
    }
}

impl fmt::Display for OutFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Lime => f.write_str("lime"),
            Self::Elf => f.write_str("elf"),
            Self::Avml => f.write_str("avml"),
            Self::Kdump(coding) => write!(f, "kdump-{coding}"),
        }
    }
}

impl FromStr for OutFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.to_string() == text);
        found.ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(ToString::to_string).collect();
            format!("the formats are {}", names.join(", "))
        })
    }
}

/// What goes into a dump.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The memory.
    pub memory: &'a GuestMemory,
    /// The vCPUs' registers, for formats that have a place for them.
    pub registers: &'a [Registers],
    /// The kernel's VMCOREINFO, for formats that have a place for it.
    pub vmcoreinfo: Option<&'a str>,
}

/// A dump that was written whole.
#[derive(Clone, Debug)]
pub struct Written {
    /// Length of the file in bytes.
    pub len: u64,
    /// Bytes of it that were written; the rest are holes, which read as zeros.
    pub stored: u64,
    /// SHA-256 of the file.
    pub sha256: [u8; 32],
    /// The memory in it, by rising address.
    pub regions: Vec<WrittenRegion>,
    /// Memory that could not be read: zeros in the file, or left out of it where the format can. The first 64 ranges.
    pub unreadable: Vec<(Region, MemoryError)>,
    /// Bytes that could not be read in all.
    pub unreadable_bytes: u64,
    /// Memory that was left out because the format would make a file of mostly nothing with it.
    pub left_out: Vec<Region>,
}

/// A region of memory in a dump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WrittenRegion {
    /// Where it is in the guest.
    pub region: Region,
    /// SHA-256 of its bytes as the guest has them, whatever the format makes of them.
    pub sha256: [u8; 32],
}

/// Why a dump was not written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The file could not be written.
    #[error("{}", write_text(*at, source))]
    Write {
        /// How far in the file it had come, in bytes.
        at: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The memory went away: the VM exited, or may not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// There is no memory to write.
    #[error("there is no memory to write")]
    Nothing,
    /// It was told to stop.
    #[error("interrupted")]
    Interrupted,
    /// A thread that hashes ended before its time: a fault of ours.
    #[error("a thread that computes SHA-256 failed; this is a bug in vmsight")]
    Hashing,
}

fn write_text(at: u64, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("no room is left there ({source}): {at:#x} bytes of the dump did fit")
        }
        _ => format!("at byte {at:#x} of the dump: {source}"),
    }
}

/// Writes a dump into an empty file, from its start. `advance` is told of memory that is done, in bytes; `stop` ends the work.
///
/// # Errors
/// See [`WriteError`]. The file then has part of a dump in it and is to be removed.
pub fn write(
    contents: &Contents<'_>,
    format: OutFormat,
    file: &File,
    stop: &AtomicBool,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<Written, WriteError> {
    let (regions, left_out) = regions(contents.memory, format);
    if regions.is_empty() {
        return Err(WriteError::Nothing);
    }
    let mut pieces = Pieces::new(contents.memory, stop, advance);
    let (len, stored, sha256) = match format {
        OutFormat::Raw | OutFormat::Lime | OutFormat::Elf => {
            let mut out = OutFile::hashed(file)?;
            match format {
                OutFormat::Raw => plain::raw(&mut out, &regions, &mut pieces)?,
                OutFormat::Lime => plain::lime(&mut out, &regions, &mut pieces)?,
                _ => elf::write(&mut out, contents, &regions, &mut pieces)?,
            }
            out.finish()?
        }
        OutFormat::Avml => {
            let mut out = OutFile::hashed(file)?;
            avml::write(&mut out, &regions, &mut pieces)?;
            out.finish()?
        }
        OutFormat::Kdump(coding) => kdump::write(file, coding, contents, &regions, &mut pieces)?,
    };
    let (digests, unreadable, unreadable_bytes) = pieces.finish()?;
    let regions = regions
        .into_iter()
        .zip(digests)
        .map(|(region, sha256)| WrittenRegion { region, sha256 });
    Ok(Written {
        len,
        stored,
        sha256,
        regions: regions.collect(),
        unreadable,
        unreadable_bytes,
        left_out,
    })
}

/// The regions that go into a dump of this format, and those that do not.
fn regions(memory: &GuestMemory, format: OutFormat) -> (Vec<Region>, Vec<Region>) {
    let all = memory.regions().to_vec();
    match format {
        // Firmware just below 4 GiB would make a file of 4 GiB out of the smallest guest.
        OutFormat::Raw if memory.end() <= Gpa(HIGH) => {
            let (kept, left_out): (Vec<_>, Vec<_>) =
                all.into_iter().partition(|region| region.start < Gpa(FIRMWARE));
            if kept.is_empty() {
                (left_out, kept)
            } else {
                (kept, left_out)
            }
        }
        // Pages, and whole ones.
        OutFormat::Kdump(_) => (
            all.iter().filter_map(|region| whole_pages(*region)).collect(),
            Vec::new(),
        ),
        _ => (all, Vec::new()),
    }
}

/// The pages of a region that lie in it whole.
fn whole_pages(region: Region) -> Option<Region> {
    let start = region.start.0.checked_next_multiple_of(PAGE)?;
    let end = region.end().0 / PAGE * PAGE;
    (start < end).then(|| Region {
        start: Gpa(start),
        len: end - start,
    })
}

/// One digest on a thread of its own.
fn digester() -> Result<Digester, WriteError> {
    Digester::start().map_err(|source| WriteError::Write { at: 0, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(starts: &[u64]) -> GuestMemory {
        let parts = starts.iter().map(|start| (Gpa(*start), vec![1; 4097]));
        GuestMemory::from_bytes(parts.collect()).expect("parts that do not overlap")
    }

    fn starts(regions: &[Region]) -> Vec<u64> {
        regions.iter().map(|region| region.start.0).collect()
    }

    #[test]
    fn firmware_is_left_out_of_raw_images_that_would_be_long_for_it_alone() {
        let firmware = 0xfffc_0000;
        let (kept, left_out) = regions(&of(&[0, firmware]), OutFormat::Raw);
        assert_eq!((starts(&kept), starts(&left_out)), (vec![0], vec![firmware]));
        // Of a guest that has memory above, the image is that long anyway.
        for memory in [of(&[0, firmware, HIGH]), of(&[firmware])] {
            let (kept, left_out) = regions(&memory, OutFormat::Raw);
            assert_eq!((kept.as_slice(), left_out.len()), (memory.regions(), 0));
        }
        let (kept, left_out) = regions(&of(&[0, firmware]), OutFormat::Elf);
        assert_eq!((starts(&kept), left_out.len()), (vec![0, firmware], 0));
    }

    #[test]
    fn formats_of_pages_take_whole_ones() {
        let (kept, _) = regions(&of(&[0x10, 0x8000]), OutFormat::Kdump(Coding::Zstd));
        assert_eq!(starts(&kept), [0x8000]);
        assert_eq!(kept.first().map(|region| region.len), Some(PAGE));
    }
}
