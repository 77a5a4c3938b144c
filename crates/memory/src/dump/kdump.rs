//! Compressed kdump files, as makedumpfile and QEMU (`dump-guest-memory -z`, `-l`, `-s`) write them.
//!
//! In blocks of a page: a header, a sub-header, two bitmaps with a bit for each frame of the machine (the first says which are
//! memory, the second which are in the file), a descriptor of 24 bytes for each that is, and the pages. Sources: makedumpfile's
//! `diskdump_mod.h` and `IMPLEMENTATION`, QEMU's `include/sysemu/dump.h`.

use super::DumpError;
use super::bytes::u64_at;
use super::coding::Coding;
use super::cover::{PHYSICAL_END, list};
use super::notes::{self, Notes};
use super::pages::{Stored, Unit};
use super::view::{FLATTENED, Flattened, View};
use crate::Region;
use vmsight_arch::Gpa;

pub(super) const SIGNATURE: &[u8] = b"KDUMP   ";

/// Offsets in the header.
pub(super) mod header {
    pub(in super::super) const VERSION: u64 = 8;
    pub(in super::super) const SYSNAME: u64 = 12;
    pub(in super::super) const RELEASE: u64 = 142;
    pub(in super::super) const MACHINE: u64 = 272;
    pub(in super::super) const STATUS: u64 = 424;
    pub(in super::super) const BLOCK_SIZE: u64 = 428;
    pub(in super::super) const SUB_BLOCKS: u64 = 432;
    pub(in super::super) const BITMAP_BLOCKS: u64 = 436;
    pub(in super::super) const FRAMES: u64 = 440;
    pub(in super::super) const VCPUS: u64 = 460;
}

/// Offsets in the sub-header, which is in the second block.
pub(super) mod sub_header {
    pub(in super::super) const PHYS_BASE: u64 = 0;
    pub(in super::super) const LEVEL: u64 = 8;
    pub(in super::super) const SPLIT: u64 = 12;
    pub(in super::super) const START_FRAME: u64 = 16;
    pub(in super::super) const END_FRAME: u64 = 24;
    pub(in super::super) const VMCOREINFO: u64 = 32;
    pub(in super::super) const NOTES: u64 = 48;
    pub(in super::super) const START_FRAME_64: u64 = 80;
    pub(in super::super) const END_FRAME_64: u64 = 88;
    pub(in super::super) const FRAMES_64: u64 = 96;
    /// Its length in version 6.
    pub(in super::super) const LEN: u64 = 104;
}

/// Length of a descriptor: offset (64 bits), length, flags (32 bits each), page flags (64 bits).
pub(super) const DESCRIPTOR: u64 = 24;

/// Bytes of notes and of VMCOREINFO read at most.
const MAX_NOTES: u64 = 64 << 20;
const MAX_VMCOREINFO: u64 = 64 << 10;
/// Bytes of the bitmap that are counted together: 4096 frames.
const COUNTED: u64 = 512;
/// Ranges of memory kept at most: a bound on memory, not on dumps.
const MAX_RUNS: usize = 1 << 22;

/// What a descriptor says of its page, and the header of most.
pub(super) fn flag(coding: Coding) -> u32 {
    match coding {
        Coding::Zlib => 1,
        Coding::Lzo => 2,
        Coding::Snappy => 4,
        Coding::Zstd => 0x20,
    }
}

/// The header's status: the writer was stopped before the end.
const INCOMPLETE: u32 = 8;

/// Where the pages of a kdump file are.
#[derive(Debug)]
pub(super) struct Kdump {
    flattened: Option<Flattened>,
    file_len: u64,
    page: u64,
    /// Where the bitmap of the frames in the file is, and how many frames it is about.
    bitmap: u64,
    frames: u64,
    /// Where the descriptors are.
    descriptors: u64,
    /// Frames in the file before each stretch of 4096 that has any: its number, the count.
    counts: Vec<(u64, u64)>,
    /// Of a dump that was split: the frames in this file.
    own: (u64, u64),
}

/// What a kdump file says.
pub(super) struct Parsed {
    pub(super) kdump: Kdump,
    /// Memory that is in it.
    pub(super) runs: Vec<Region>,
    /// Memory that is not.
    pub(super) missing: Vec<Region>,
    pub(super) notes: Notes,
}

/// Whether a file begins as a kdump file does, flattened or not.
pub(super) fn is_kdump(start: &[u8]) -> bool {
    start.starts_with(SIGNATURE) || start.starts_with(FLATTENED)
}

/// Reads the headers and counts what is there. Of the pages only the descriptors are looked at.
pub(super) fn parse(data: &[u8], file_len: u64, remarks: &mut Vec<String>) -> Result<Parsed, DumpError> {
    let flattened = data
        .starts_with(FLATTENED)
        .then(|| Flattened::of(data, file_len, remarks));
    let view = View::new(data, file_len, flattened.as_ref());
    let cut = || DumpError::broken("the kdump header is cut");
    if view.get(0, 8).is_none_or(|start| *start != *SIGNATURE) {
        return Err(DumpError::broken("no kdump header at the beginning"));
    }
    let field = |at| view.u32(at).ok_or_else(cut);
    let version = field(header::VERSION)?;
    let status = field(header::STATUS)?;
    let page = u64::from(field(header::BLOCK_SIZE)?);
    if !(4096..=65536).contains(&page) || !page.is_power_of_two() {
        return Err(DumpError::broken(&format!(
            "a kdump file with pages of {page} bytes"
        )));
    }
    let sub_blocks = u64::from(field(header::SUB_BLOCKS)?);
    let bitmap_blocks = u64::from(field(header::BITMAP_BLOCKS)?);
    let word = |at: u64| view.u64(page + at);
    let mut frames = u64::from(field(header::FRAMES)?);
    if version >= 6
        && let Some(all) = word(sub_header::FRAMES_64).filter(|&all| all > 0)
    {
        frames = all;
    }
    let bitmap_at = (1 + sub_blocks) * page;
    // Both are of one length; very old files have only one.
    let bitmap_len = bitmap_blocks * page / 2;
    frames = frames.min(bitmap_len.saturating_mul(8)).min(PHYSICAL_END / page);
    let mut own = (0, frames);
    if version >= 2 && view.u32(page + sub_header::SPLIT).is_some_and(|split| split != 0) {
        let (start, end) = match version {
            0..6 => (word(sub_header::START_FRAME), word(sub_header::END_FRAME)),
            _ => (word(sub_header::START_FRAME_64), word(sub_header::END_FRAME_64)),
        };
        own = (start.unwrap_or(0), end.unwrap_or(frames).min(frames));
        remarks.push(format!(
            "one part of a dump that was split: it has the memory from {:#x} to {:#x}",
            own.0.saturating_mul(page),
            own.1.saturating_mul(page)
        ));
    }
    if status & INCOMPLETE != 0 {
        remarks.push("the file says that its writing was stopped: pages are missing".to_owned());
    }

    let mut notes = Notes::new(62);
    let range = |at: u64, most: u64| {
        let (offset, len) = (word(at)?, word(at + 8)?);
        (offset != 0 && len != 0).then(|| view.get(offset, len.min(most)))?
    };
    if version >= 4
        && let Some(bytes) = range(sub_header::NOTES, MAX_NOTES)
    {
        notes::parse(&bytes, &mut notes, remarks);
    }
    if version >= 3
        && notes.vmcoreinfo.is_none()
        && let Some(text) = range(sub_header::VMCOREINFO, MAX_VMCOREINFO)
    {
        let text = text.split(|b| *b == 0).next().unwrap_or_default();
        notes.vmcoreinfo = Some(String::from_utf8_lossy(text).into_owned());
    }

    let bitmap = bitmap_at + bitmap_len;
    let descriptors = bitmap_at + bitmap_blocks * page;
    let mut counts = Vec::new();
    let mut stretches = Vec::new();
    let mut count = 0;
    let mut at = 0u64;
    while at * 8 < frames {
        // What a flattened file lacks is skipped: holes have no bits.
        let places = [view.next(bitmap_at + at), view.next(bitmap + at)];
        let next = places
            .into_iter()
            .zip([bitmap_at, bitmap])
            .filter_map(|(place, base)| Some(place? - base))
            .min();
        let Some(next) = next else { break };
        at = at.max(next) / COUNTED * COUNTED;
        if at * 8 >= frames {
            break;
        }
        let bits = Bits::at(&view, bitmap + at, frames - at * 8);
        if bits.count() > 0 {
            counts.push((at / COUNTED, count));
            count += bits.count();
        }
        stretches.push(at);
        at += COUNTED;
    }
    // Of a split dump only the descriptors of its own frames are there.
    let skipped = rank(&view, bitmap, &counts, own.0);
    let descriptors = descriptors.wrapping_sub(skipped * DESCRIPTOR);
    let mut census = Census::new(page);
    let mut count = 0;
    for at in stretches {
        let bits = Bits::at(&view, bitmap + at, frames - at * 8);
        let all = Bits::at(&view, bitmap_at + at, frames - at * 8);
        census.look(&view, descriptors, at * 8, &bits, &all, count, own);
        count += bits.count();
    }
    let level = view
        .u32(page + sub_header::LEVEL)
        .filter(|&level| version >= 1 && level != 0);
    census.remark(level, remarks);
    Ok(Parsed {
        runs: census.runs,
        missing: census.missing,
        notes,
        kdump: Kdump {
            file_len,
            page,
            bitmap,
            frames,
            descriptors,
            counts,
            own,
            flattened,
        },
    })
}

/// 4096 bits of a bitmap.
struct Bits([u64; (COUNTED / 8) as usize]);

impl Bits {
    /// Those at `at`, of which `most` count; what is not in the file is not set.
    fn at(view: &View<'_>, at: u64, most: u64) -> Self {
        let mut words = [0; (COUNTED / 8) as usize];
        let mut bytes = [0u8; COUNTED as usize];
        let mut done = 0;
        while done < COUNTED {
            let Some(next) = view
                .next(at + done)
                .map(|next| next - at)
                .filter(|&next| next < COUNTED)
            else {
                break;
            };
            let part = view.some(at + next, COUNTED - next);
            if part.is_empty() {
                break;
            }
            let (start, end) = (next as usize, next as usize + part.len());
            if let Some(to) = bytes.get_mut(start..end) {
                to.copy_from_slice(part);
            }
            done = end as u64;
        }
        for (index, (word, bytes)) in words.iter_mut().zip(bytes.as_chunks::<8>().0).enumerate() {
            let left = most.saturating_sub(64 * index as u64);
            let mask = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
            *word = u64::from_le_bytes(*bytes) & mask;
        }
        Self(words)
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn has(&self, bit: u64) -> bool {
        self.0
            .get((bit / 64) as usize)
            .is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    /// How many are set before this one.
    fn before(&self, bit: u64) -> u64 {
        let whole = (bit / 64) as usize;
        let words = self.0.iter().take(whole).map(|word| u64::from(word.count_ones()));
        let last = self.0.get(whole).map_or(0, |word| word & ((1 << (bit % 64)) - 1));
        words.sum::<u64>() + u64::from(last.count_ones())
    }

    /// The numbers of those that are set.
    fn set(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().zip(0u64..).flat_map(|(&word, index)| {
            std::iter::successors((word != 0).then_some(word), |w| {
                let rest = w & (w - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |w| index * 64 + u64::from(w.trailing_zeros()))
        })
    }
}

/// How many frames below `frame` are in the file.
fn rank(view: &View<'_>, bitmap: u64, counts: &[(u64, u64)], frame: u64) -> u64 {
    let number = frame / (COUNTED * 8);
    let after = counts.partition_point(|&(stretch, _)| stretch <= number);
    let Some(&(stretch, before)) = after.checked_sub(1).and_then(|index| counts.get(index)) else {
        return 0;
    };
    let bits = Bits::at(view, bitmap + stretch * COUNTED, u64::MAX);
    match stretch == number {
        true => before + bits.before(frame % (COUNTED * 8)),
        false => before + bits.count(),
    }
}

/// Which memory is there, which was left out, and which the file should have and has not.
struct Census {
    page: u64,
    runs: Vec<Region>,
    missing: Vec<Region>,
    excluded: u64,
    lacking: Vec<Region>,
    cut: bool,
}

impl Census {
    fn new(page: u64) -> Self {
        Self {
            page,
            runs: Vec::new(),
            missing: Vec::new(),
            excluded: 0,
            lacking: Vec::new(),
            cut: false,
        }
    }

    /// Looks at 4096 frames from `first` on; `count` are in the file before them.
    #[expect(clippy::too_many_arguments, reason = "what one stretch of the tables says")]
    fn look(
        &mut self,
        view: &View<'_>,
        descriptors: u64,
        first: u64,
        bits: &Bits,
        all: &Bits,
        mut count: u64,
        own: (u64, u64),
    ) {
        // One look for all descriptors of the stretch, where they are in one piece.
        let len = bits.count() * DESCRIPTOR;
        let start = descriptors.wrapping_add(count * DESCRIPTOR);
        let table = view.get(start, len);
        let mut at = 0;
        let either = Bits(std::array::from_fn(|i| {
            bits.0.get(i).copied().unwrap_or(0) | all.0.get(i).copied().unwrap_or(0)
        }));
        for bit in either.set() {
            let frame = first + bit;
            let there = bits.has(bit);
            if !(own.0..own.1).contains(&frame) {
                count += u64::from(there);
                at += if there { DESCRIPTOR } else { 0 };
                continue;
            }
            if !there {
                self.excluded += 1;
                push(&mut self.missing, frame, self.page, &mut self.cut);
                continue;
            }
            let descriptor = match &table {
                Some(table) => u64_at(table, at).zip(super::bytes::u32_at(table, at + 8)),
                None => {
                    let at = descriptors.wrapping_add(count * DESCRIPTOR);
                    view.u64(at).zip(view.u32(at.wrapping_add(8)))
                }
            };
            at += DESCRIPTOR;
            count += 1;
            let whole = descriptor.is_some_and(|(offset, len)| {
                offset
                    .checked_add(len.into())
                    .is_some_and(|end| end <= view.len())
            });
            if whole {
                push(&mut self.runs, frame, self.page, &mut self.cut);
            } else {
                push(&mut self.missing, frame, self.page, &mut self.cut);
                push(&mut self.lacking, frame, self.page, &mut self.cut);
            }
        }
    }

    /// What there is to say about it.
    fn remark(&self, level: Option<u32>, remarks: &mut Vec<String>) {
        if self.excluded > 0 {
            let level = level.map_or(String::new(), |level| format!(" (dump level {level})"));
            remarks.push(format!(
                "{} pages were left out when the dump was written{level}: {} MiB that cannot be read",
                self.excluded,
                (self.excluded * self.page) >> 20
            ));
        }
        if !self.lacking.is_empty() {
            let lacking = list(&self.lacking, self.lacking.len() as u64);
            remarks.push(format!("the file lacks {lacking}"));
        }
        if self.cut {
            remarks.push(format!(
                "more than {MAX_RUNS} ranges of memory: the rest is not read"
            ));
        }
    }
}

/// Adds a frame to a list of ranges.
fn push(ranges: &mut Vec<Region>, frame: u64, page: u64, cut: &mut bool) {
    let start = Gpa(frame * page);
    let full = ranges.len() >= MAX_RUNS;
    match ranges.last_mut() {
        Some(last) if last.end() == start => last.len += page,
        _ if full => *cut = true,
        _ => ranges.push(Region { start, len: page }),
    }
}

impl Kdump {
    pub(super) fn page_size(&self) -> u64 {
        self.page
    }

    pub(super) fn view<'a>(&'a self, data: &'a [u8]) -> View<'a> {
        View::new(data, self.file_len, self.flattened.as_ref())
    }

    /// Where the page is that has the byte at `gpa`.
    pub(super) fn unit(&self, data: &[u8], gpa: u64) -> Result<Unit, String> {
        let view = self.view(data);
        let frame = gpa / self.page;
        let absent = || "the file does not have this page".to_owned();
        let number = frame / (COUNTED * 8);
        let stretch = self.counts.binary_search_by_key(&number, |&(stretch, _)| stretch);
        let (_, before) = stretch
            .ok()
            .and_then(|index| self.counts.get(index))
            .filter(|_| frame < self.frames && (self.own.0..self.own.1).contains(&frame))
            .ok_or_else(absent)?;
        let bits = Bits::at(&view, self.bitmap + number * COUNTED, u64::MAX);
        let bit = frame % (COUNTED * 8);
        if !bits.has(bit) {
            return Err(absent());
        }
        let at = self
            .descriptors
            .wrapping_add((before + bits.before(bit)) * DESCRIPTOR);
        let (Some(offset), Some(len), Some(flags)) = (
            view.u64(at),
            view.u32(at.wrapping_add(8)),
            view.u32(at.wrapping_add(12)),
        ) else {
            return Err("the file ends before this page's descriptor".to_owned());
        };
        let coding = [Coding::Zlib, Coding::Lzo, Coding::Snappy, Coding::Zstd]
            .into_iter()
            .find(|coding| flags & flag(*coding) != 0);
        let stored = match coding {
            Some(coding) if u64::from(len) <= self.page => Stored::Packed { offset, len, coding },
            None if u64::from(len) == self.page => Stored::Plain { offset },
            _ => {
                return Err(format!(
                    "its descriptor gives {len} bytes for a page of {}",
                    self.page
                ));
            }
        };
        Ok(Unit {
            gpa: frame * self.page,
            len: self.page as u32,
            stored,
        })
    }
}
