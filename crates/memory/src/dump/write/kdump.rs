//! Compressed kdump files: headers, bitmaps of the pages there are, a descriptor for each, and the pages, packed one by one.
//!
//! The layout is told in [`crate::dump::kdump`]. Descriptors come before the pages, so the file is not written from its
//! beginning to its end, and is hashed when it is done.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;

use super::file::{OutFile, is_zero};
use super::pieces::{Piece, Pieces};
use super::{Contents, PAGE, WriteError, digester, notes};
use crate::Region;
use crate::dump::coding::{Coding, Packers};
use crate::dump::kdump::{DESCRIPTOR, SIGNATURE, flag, header, sub_header};

/// Descriptors gathered before they are written.
const GATHERED: usize = 1 << 16;

pub(super) fn write(
    file: &File,
    coding: Coding,
    contents: &Contents<'_>,
    regions: &[Region],
    pieces: &mut Pieces<'_>,
) -> Result<(u64, u64, [u8; 32]), WriteError> {
    let notes = notes::all(contents);
    let frames = regions.last().map_or(0, |region| region.end().0 / PAGE);
    let pages: u64 = regions.iter().map(|region| region.len / PAGE).sum();
    // Blocks are pages: the header, then the sub-header with the notes behind it, then two bitmaps.
    let notes_at = PAGE + sub_header::LEN;
    let sub_blocks = (sub_header::LEN + notes.len() as u64).div_ceil(PAGE);
    let bitmap_blocks = frames.div_ceil(8).div_ceil(PAGE);
    let bitmaps_at = (1 + sub_blocks) * PAGE;
    let descriptors_at = bitmaps_at + 2 * bitmap_blocks * PAGE;

    let mut descriptors = Descriptors {
        file,
        at: descriptors_at,
        bytes: Vec::new(),
        count: 0,
    };
    let mut data = OutFile::unhashed(file, descriptors_at + pages * DESCRIPTOR);
    // Zero pages share one.
    let zero = data.at();
    data.put(vec![0; PAGE as usize])?;
    let plain = |offset| (offset, PAGE as u32, 0);
    let mut bad_pages = Vec::new();
    let packers = Packers::new(coding);
    for region in regions {
        pieces.each(*region, |gpa, piece, bad| match piece {
            Piece::Untouched(len) => (0..len / PAGE).try_for_each(|_| descriptors.push(plain(zero))),
            Piece::Bytes(bytes) => {
                let packed: Vec<(bool, Option<Vec<u8>>)> = bytes
                    .par_chunks(PAGE as usize)
                    .with_min_len(16)
                    .map_init(
                        || packers.lend(),
                        |packer, page| match is_zero(page) {
                            true => (true, None),
                            false => (false, packer.pack(page)),
                        },
                    )
                    .collect();
                // One write for all of it.
                let mut out = Vec::with_capacity(bytes.len() / 2);
                for ((zeros, packed), (index, page)) in
                    packed.into_iter().zip(bytes.chunks(PAGE as usize).enumerate())
                {
                    let here = gpa.0 + index as u64 * PAGE;
                    if bad.binary_search(&here).is_ok() {
                        bad_pages.push(here / PAGE);
                        continue;
                    }
                    let at = data.at() + out.len() as u64;
                    match packed {
                        _ if zeros => descriptors.push(plain(zero))?,
                        Some(packed) => {
                            descriptors.push((at, packed.len() as u32, flag(coding)))?;
                            out.extend(packed);
                        }
                        None => {
                            descriptors.push(plain(at))?;
                            out.extend_from_slice(page);
                        }
                    }
                }
                data.put(out)
            }
        })?;
    }
    descriptors.write()?;
    let stored = descriptors.count;
    let (len, data_stored, _) = data.finish()?;
    let mut bitmap_bytes = 0;
    for (bitmap, without) in [(0, &[][..]), (1, &bad_pages[..])] {
        let at = bitmaps_at + bitmap * bitmap_blocks * PAGE;
        bitmap_bytes += write_bitmap(file, at, regions, without)?;
    }
    let head = Head {
        coding,
        release: said(contents, "OSRELEASE=").unwrap_or_default(),
        // Where the kernel lies, less where it was linked to lie.
        phys_base: said(contents, "NUMBER(phys_base)=")
            .and_then(|number| number.parse().ok())
            .unwrap_or(0),
        sub_blocks,
        bitmap_blocks: 2 * bitmap_blocks,
        frames,
        vcpus: contents.registers.len(),
        notes: (notes_at, notes.len() as u64),
        vmcoreinfo: contents.vmcoreinfo.map_or((0, 0), |text| {
            // The last note's body, less its padding.
            let len = text.len() as u64;
            (notes_at + notes.len() as u64 - len.next_multiple_of(4), len)
        }),
    };
    let mut bytes = head.bytes();
    bytes.extend(notes);
    put(file, 0, &bytes)?;
    let stored = data_stored + stored * DESCRIPTOR + bitmap_bytes + bytes.len() as u64;
    Ok((len, stored, hash(file, len)?))
}

/// What VMCOREINFO says under this name.
fn said<'a>(contents: &Contents<'a>, name: &str) -> Option<&'a str> {
    contents
        .vmcoreinfo?
        .lines()
        .find_map(|line| line.strip_prefix(name))
}

fn put(file: &File, at: u64, bytes: &[u8]) -> Result<(), WriteError> {
    file.write_all_at(bytes, at)
        .map_err(|source| WriteError::Write { at, source })
}

/// Page descriptors, which come in the order of the pages.
struct Descriptors<'a> {
    file: &'a File,
    at: u64,
    bytes: Vec<u8>,
    count: u64,
}

impl Descriptors<'_> {
    /// Offset and length in the file, and flags.
    fn push(&mut self, (offset, len, flags): (u64, u32, u32)) -> Result<(), WriteError> {
        self.bytes.extend(offset.to_le_bytes());
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        // page_flags: what the kernel knew of the page, which we do not.
        self.bytes.extend([0; 8]);
        self.count += 1;
        if self.bytes.len() >= GATHERED * DESCRIPTOR as usize {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), WriteError> {
        put(self.file, self.at, &self.bytes)?;
        self.at += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}

/// Sets the bits of all pages in `regions` but those in `without` (sorted), and says how many bytes that took. What is not
/// written is a hole.
fn write_bitmap(file: &File, at: u64, regions: &[Region], without: &[u64]) -> Result<u64, WriteError> {
    /// Bytes gathered before they are written.
    const STEP: u64 = 1 << 16;
    let mut window = 0;
    let mut bytes = Vec::new();
    let mut stored = 0;
    let mut without = without.iter().copied().peekable();
    for page in regions
        .iter()
        .flat_map(|region| region.start.0 / PAGE..region.end().0 / PAGE)
    {
        if without.next_if_eq(&page).is_some() {
            continue;
        }
        if page / (8 * STEP) != window {
            put(file, at + window * STEP, &bytes)?;
            stored += bytes.len() as u64;
            bytes.clear();
            window = page / (8 * STEP);
        }
        let index = (page / 8 - window * STEP) as usize;
        if bytes.len() <= index {
            bytes.resize(index + 1, 0);
        }
        if let Some(byte) = bytes.get_mut(index) {
            *byte |= 1 << (page % 8);
        }
    }
    put(file, at + window * STEP, &bytes)?;
    Ok(stored + bytes.len() as u64)
}

/// What the two headers say.
struct Head<'a> {
    coding: Coding,
    release: &'a str,
    phys_base: i64,
    sub_blocks: u64,
    bitmap_blocks: u64,
    frames: u64,
    vcpus: usize,
    /// Offset and length.
    notes: (u64, u64),
    vmcoreinfo: (u64, u64),
}

impl Head<'_> {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; (PAGE + sub_header::LEN) as usize];
        let mut set = |at: u64, value: &[u8]| {
            let at = at as usize;
            if let Some(field) = bytes.get_mut(at..at + value.len()) {
                field.copy_from_slice(value);
            }
        };
        let low = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
        set(0, SIGNATURE);
        set(header::VERSION, &6u32.to_le_bytes());
        set(header::SYSNAME, b"Linux");
        let release = self.release.as_bytes();
        set(
            header::RELEASE,
            release.get(..release.len().min(64)).unwrap_or_default(),
        );
        set(header::MACHINE, b"x86_64");
        set(header::STATUS, &flag(self.coding).to_le_bytes());
        set(header::BLOCK_SIZE, &low(PAGE));
        set(header::SUB_BLOCKS, &low(self.sub_blocks));
        set(header::BITMAP_BLOCKS, &low(self.bitmap_blocks));
        set(header::FRAMES, &low(self.frames));
        set(header::VCPUS, &low(self.vcpus as u64));
        let mut set = |at: u64, value: u64| set(PAGE + at, &value.to_le_bytes());
        set(sub_header::PHYS_BASE, self.phys_base.cast_unsigned());
        set(sub_header::VMCOREINFO, self.vmcoreinfo.0);
        set(sub_header::VMCOREINFO + 8, self.vmcoreinfo.1);
        set(sub_header::NOTES, self.notes.0);
        set(sub_header::NOTES + 8, self.notes.1);
        set(sub_header::END_FRAME_64, self.frames);
        set(sub_header::FRAMES_64, self.frames);
        bytes
    }
}

/// The digest of a file that is there.
fn hash(file: &File, len: u64) -> Result<[u8; 32], WriteError> {
    let digest = digester()?;
    let mut at = 0;
    while at < len {
        let now = (len - at).min(1 << 20);
        let mut bytes = vec![0; now as usize];
        file.read_exact_at(&mut bytes, at)
            .map_err(|source: io::Error| WriteError::Write { at, source })?;
        digest.owned(bytes)?;
        at += now;
    }
    digest.end()?;
    digest.finish()?.first().copied().ok_or(WriteError::Hashing)
}
