//! QEMU's migration stream, as `migrate exec:…`, `savevm` to a file and libvirt's managed save hold it.
//!
//! Sections follow each other; that of the RAM has pages in the order in which QEMU sent them, some more than once: the last
//! counts. To know where a page is the whole stream must be gone through, which is done once, when it is opened. Sources: QEMU's
//! `docs/devel/migration.rst`, `migration/savevm.c`, `migration/ram.c`.

use super::DumpError;
use super::bytes::{array, slice};
use super::coding::Coding;
use super::cover::PHYSICAL_END;
use super::pages::{Stored, Unit};
use crate::Region;
use vmsight_arch::Gpa;

pub(super) const MAGIC: &[u8] = b"QEVM";
const VERSION: u32 = 3;

const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_END: u8 = 3;
const SECTION_FULL: u8 = 4;
const SUBSECTION: u8 = 5;
const CONFIGURATION: u8 = 7;
const COMMAND: u8 = 8;
const FOOTER: u8 = 0x7e;

/// Flags in the low bits of a page's address.
mod flag {
    pub(super) const ZERO: u64 = 0x02;
    pub(super) const SIZES: u64 = 0x04;
    pub(super) const PAGE: u64 = 0x08;
    pub(super) const END: u64 = 0x10;
    pub(super) const CONTINUE: u64 = 0x20;
    pub(super) const XBZRLE: u64 = 0x40;
    pub(super) const COMPRESSED: u64 = 0x100;
    pub(super) const FLUSH: u64 = 0x200;
}

const PAGE: u64 = 4096;
const FLAGS: u64 = PAGE - 1;
/// RAM blocks at most: a machine has about ten.
const MAX_BLOCKS: usize = 256;

/// A block of the machine's RAM.
#[derive(Debug)]
struct Block<'a> {
    name: &'a [u8],
    len: u64,
    /// Pages as they came: address in the block, and where they are. `None` where what came cannot be read.
    pages: Vec<(u64, Option<Stored>)>,
}

/// Where the pages of a guest's RAM are in a stream.
pub(super) struct Parsed {
    pub(super) units: Vec<Unit>,
    /// What the RAM covers, there or not.
    pub(super) regions: Vec<Region>,
}

/// Reads along a stream.
struct Stream<'a> {
    data: &'a [u8],
    at: u64,
}

impl<'a> Stream<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = array(self.data, self.at)?;
        self.at += N as u64;
        Some(bytes)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take().map(|[byte]| byte)
    }

    fn be16(&mut self) -> Option<u64> {
        self.take().map(u16::from_be_bytes).map(u64::from)
    }

    fn be32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn be64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    /// So many bytes, where they all are there.
    fn skip(&mut self, len: u64) -> Option<u64> {
        let start = self.at;
        let end = start
            .checked_add(len)
            .filter(|&end| end <= self.data.len() as u64)?;
        self.at = end;
        Some(start)
    }

    /// A name behind its length of one byte.
    fn name(&mut self) -> Option<&'a [u8]> {
        let len = u64::from(self.byte()?);
        let start = self.skip(len)?;
        Some(slice(self.data, start, len))
    }
}

/// Why the reading of a stream ended before its memory did.
enum Stop {
    /// The stream ends.
    Cut,
    /// What follows is not known.
    Unknown(String),
}

impl Stop {
    fn cut<T>(value: Option<T>) -> Result<T, Self> {
        value.ok_or(Self::Cut)
    }
}

/// Goes through the stream.
pub(super) fn parse(data: &[u8], notes: &mut Vec<String>) -> Result<Parsed, DumpError> {
    if !data.starts_with(MAGIC) {
        return Err(DumpError::broken(
            "no header of a QEMU migration stream at the beginning",
        ));
    }
    let mut reader = Reader {
        stream: Stream { data, at: 4 },
        machine: Vec::new(),
        ram: None,
        blocks: Vec::new(),
        current: None,
        unreadable: 0,
        done: false,
    };
    if reader.stream.be32() != Some(VERSION) {
        return Err(DumpError::broken(
            "a QEMU migration stream of a version other than 3",
        ));
    }
    match reader.sections() {
        Ok(()) => {}
        Err(Stop::Cut) => notes.push(
            "the stream ends before the guest's memory was sent whole: pages may be missing, or older than others"
                .to_owned(),
        ),
        Err(Stop::Unknown(what)) => notes.push(format!(
            "the stream is not read from {:#x} on: {what}; pages may be missing, or older than others",
            reader.stream.at
        )),
    }
    if reader.unreadable > 0 {
        notes.push(format!(
            "{} pages came as changes of what they were before (XBZRLE), which is not read: they are missing where \
             nothing came later",
            reader.unreadable
        ));
    }
    reader.finish(notes)
}

struct Reader<'a> {
    stream: Stream<'a>,
    machine: Vec<u8>,
    /// The number of the RAM's section.
    ram: Option<u32>,
    blocks: Vec<Block<'a>>,
    /// The block of the last page.
    current: Option<usize>,
    unreadable: u64,
    done: bool,
}

impl Reader<'_> {
    fn sections(&mut self) -> Result<(), Stop> {
        while !self.done {
            match Stop::cut(self.stream.byte())? {
                CONFIGURATION => {
                    let len = Stop::cut(self.stream.be32())?;
                    let start = Stop::cut(self.stream.skip(len.into()))?;
                    self.machine = slice(self.stream.data, start, len.into()).to_vec();
                }
                SUBSECTION => self.subsection()?,
                COMMAND => {
                    let _ = Stop::cut(self.stream.be16())?;
                    let len = Stop::cut(self.stream.be16())?;
                    Stop::cut(self.stream.skip(len))?;
                }
                FOOTER => {
                    Stop::cut(self.stream.be32())?;
                }
                kind @ (SECTION_START | SECTION_FULL) => {
                    let id = Stop::cut(self.stream.be32())?;
                    let name = Stop::cut(self.stream.name())?;
                    Stop::cut(self.stream.skip(8))?;
                    if name != b"ram" {
                        let name = String::from_utf8_lossy(name).into_owned();
                        return Err(Stop::Unknown(format!(
                            "a section {name:?} comes before the memory's end"
                        )));
                    }
                    self.ram = Some(id);
                    self.pages()?;
                    self.done = kind == SECTION_FULL;
                }
                kind @ (SECTION_PART | SECTION_END) => {
                    let id = Stop::cut(self.stream.be32())?;
                    if self.ram != Some(id) {
                        return Err(Stop::Unknown(format!("section {id} was not begun")));
                    }
                    self.pages()?;
                    self.done = kind == SECTION_END;
                }
                other => return Err(Stop::Unknown(format!("{other:#x} is no kind of section"))),
            }
        }
        Ok(())
    }

    /// What the configuration may have besides the machine's name.
    fn subsection(&mut self) -> Result<(), Stop> {
        let name = Stop::cut(self.stream.name())?;
        Stop::cut(self.stream.be32())?;
        match name {
            b"configuration/target-page-bits" => {
                let bits = Stop::cut(self.stream.be32())?;
                if bits != 12 {
                    return Err(Stop::Unknown(format!("pages of 2^{bits} bytes")));
                }
            }
            b"configuration/capabilities" => {
                for _ in 0..Stop::cut(self.stream.be32())? {
                    Stop::cut(self.stream.name())?;
                }
            }
            b"configuration/uuid" => {
                Stop::cut(self.stream.skip(16))?;
            }
            other => {
                let name = String::from_utf8_lossy(other).into_owned();
                return Err(Stop::Unknown(format!("a part {name:?} of the configuration")));
            }
        }
        Ok(())
    }

    /// Pages up to the end of a section.
    fn pages(&mut self) -> Result<(), Stop> {
        loop {
            let word = Stop::cut(self.stream.be64())?;
            let (at, flags) = (word & !FLAGS, word & FLAGS);
            if flags & flag::SIZES != 0 {
                self.sizes(at)?;
                continue;
            }
            if flags & (flag::ZERO | flag::PAGE | flag::XBZRLE | flag::COMPRESSED) == 0 {
                match flags & (flag::END | flag::FLUSH) {
                    0 => return Err(Stop::Unknown(format!("page flags {flags:#x}"))),
                    flag::FLUSH => continue,
                    _ => return Ok(()),
                }
            }
            if flags & flag::CONTINUE == 0 {
                let name = Stop::cut(self.stream.name())?;
                self.current = self.blocks.iter().position(|block| block.name == name);
            }
            let stored = if flags & flag::ZERO != 0 {
                Some(Stored::Fill(Stop::cut(self.stream.byte())?))
            } else if flags & flag::PAGE != 0 {
                let offset = Stop::cut(self.stream.skip(PAGE))?;
                Some(Stored::Plain { offset })
            } else if flags & flag::COMPRESSED != 0 {
                let len = Stop::cut(self.stream.be32())?;
                let offset = Stop::cut(self.stream.skip(len.into()))?;
                Some(Stored::Packed {
                    offset,
                    len,
                    coding: Coding::Zlib,
                })
            } else {
                Stop::cut(self.stream.byte())?;
                let len = Stop::cut(self.stream.be16())?;
                Stop::cut(self.stream.skip(len))?;
                self.unreadable += 1;
                None
            };
            let Some(block) = self.current.and_then(|index| self.blocks.get_mut(index)) else {
                return Err(Stop::Unknown("a page of no block".to_owned()));
            };
            if at < block.len {
                block.pages.push((at, stored));
            }
        }
    }

    /// The blocks and their lengths, which add up to `total`.
    fn sizes(&mut self, total: u64) -> Result<(), Stop> {
        let mut left = total;
        while left > 0 {
            let name = Stop::cut(self.stream.name())?;
            let len = Stop::cut(self.stream.be64())?;
            let rest = left.checked_sub(len).filter(|_| len > 0 && len <= PHYSICAL_END);
            let (Some(rest), true) = (rest, self.blocks.len() < MAX_BLOCKS) else {
                return Err(Stop::Unknown(
                    "the lengths of the RAM blocks do not add up".to_owned(),
                ));
            };
            self.blocks.push(Block {
                name,
                len,
                pages: Vec::new(),
            });
            left = rest;
        }
        Ok(())
    }

    /// The largest block is the machine's memory; the others are firmware and what devices have.
    fn finish(self, notes: &mut Vec<String>) -> Result<Parsed, DumpError> {
        let main = self.blocks.into_iter().max_by_key(|block| block.len);
        let Some(mut main) = main else {
            return Err(DumpError::broken(
                "the stream ends before the guest's memory begins",
            ));
        };
        let regions = lay_out(&self.machine, main.len, notes);
        // The last of each page counts: the order of those that came twice is kept.
        main.pages.sort_by_key(|&(at, _)| at);
        let mut units = Vec::with_capacity(main.pages.len());
        let mut pages = main.pages.into_iter().peekable();
        while let Some((at, stored)) = pages.next() {
            if pages.peek().is_some_and(|&(next, _)| next == at) {
                continue;
            }
            let mut base = 0;
            let place = regions.iter().find_map(|region| {
                let inside = at.checked_sub(base).filter(|&inside| inside < region.len);
                base += region.len;
                inside.map(|inside| region.start.0 + inside)
            });
            if let (Some(gpa), Some(stored)) = (place, stored) {
                units.push(Unit {
                    gpa,
                    len: PAGE as u32,
                    stored,
                });
            }
        }
        Ok(Parsed { units, regions })
    }
}

/// Where a machine of QEMU's has its RAM (`hw/i386/pc_piix.c`, `pc_q35.c`, `microvm.c`, `hw/arm/virt.c`; with the default
/// of `max-ram-below-4g`).
fn lay_out(machine: &[u8], len: u64, notes: &mut Vec<String>) -> Vec<Region> {
    const GIB: u64 = 1 << 30;
    let one = |start, len| Region {
        start: Gpa(start),
        len,
    };
    let split = |most, below| match len {
        len if len < most => vec![one(0, len)],
        _ => vec![one(0, below), one(4 * GIB, len - below)],
    };
    if machine.starts_with(b"pc-q35") {
        split(0xb000_0000, 2 * GIB)
    } else if machine.starts_with(b"virt-") {
        vec![one(GIB, len)]
    } else if machine.starts_with(b"microvm") {
        split(3 * GIB + 1, 3 * GIB)
    } else {
        if !machine.starts_with(b"pc-") && len >= 0xb000_0000 {
            let name = String::from_utf8_lossy(machine).into_owned();
            notes.push(format!(
                "machine {name:?} is not known: its memory is laid out as a pc's"
            ));
        }
        split(0xe000_0000, 3 * GIB)
    }
}
