//! Memory that a file holds in pieces which must be looked up or unpacked: pages of a compressed dump, of a migration stream.
//!
//! Nothing is unpacked before it is asked for; what was unpacked last is kept, a bounded number of bytes of it.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use super::coding::Coding;
use super::kdump::Kdump;
use super::view::View;
use crate::{GuestMemory, Source};
use vmsight_arch::Gpa;

/// Bytes of unpacked memory that are kept.
const KEPT: usize = 32 << 20;

/// What each stream of Snappy frames begins with.
const SNAPPY_STREAM: &[u8] = b"\xff\x06\0\0sNaPpY";

/// A piece of memory that is looked up, or unpacked, at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unit {
    /// Its address.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Where it is.
    pub(super) stored: Stored,
}

/// How a unit is kept in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stored {
    /// As it is.
    Plain { offset: u64 },
    /// All bytes alike.
    Fill(u8),
    /// Packed.
    Packed { offset: u64, len: u32, coding: Coding },
    /// A Snappy frame, with a checksum.
    Frame { offset: u64, len: u32 },
}

/// Where the pages of a dump are.
pub struct Pages {
    pub(super) index: Index,
}

/// How they are found.
pub(super) enum Index {
    /// By the tables of a kdump file.
    Kdump(Kdump),
    /// By a list, sorted by address, disjoint.
    List(Vec<Unit>),
}

impl Pages {
    /// The length of most units: what is kept is counted in these.
    fn usual(&self) -> usize {
        match &self.index {
            Index::Kdump(kdump) => kdump.page_size() as usize,
            Index::List(units) => units.first().map_or(4096, |unit| unit.len as usize),
        }
    }

    /// The unit in which `gpa` lies. `data` is the file, or the beginning of it, of which the headers were read.
    ///
    /// # Errors
    /// What is wrong with the tables that should tell.
    pub fn unit(&self, data: &[u8], gpa: Gpa) -> Result<Unit, String> {
        match &self.index {
            Index::Kdump(kdump) => kdump.unit(data, gpa.0),
            Index::List(units) => units
                .partition_point(|unit| unit.gpa <= gpa.0)
                .checked_sub(1)
                .and_then(|index| units.get(index))
                .filter(|unit| gpa.0 - unit.gpa < u64::from(unit.len))
                .copied()
                .ok_or_else(|| "the file does not have this page".to_owned()),
        }
    }

    /// Puts the bytes of a unit into `out`.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn load(&self, data: &[u8], unit: &Unit, out: &mut Vec<u8>) -> Result<(), String> {
        let view = self.view(data);
        let cut = || "the file ends before this page does".to_owned();
        out.clear();
        out.resize(unit.len as usize, 0);
        match unit.stored {
            Stored::Plain { offset } => {
                let bytes = view.get(offset, unit.len.into()).ok_or_else(cut)?;
                out.copy_from_slice(&bytes);
                Ok(())
            }
            Stored::Fill(byte) => {
                out.fill(byte);
                Ok(())
            }
            Stored::Packed { offset, len, coding } => {
                coding.unpack(&view.get(offset, len.into()).ok_or_else(cut)?, out)
            }
            Stored::Frame { offset, len } => {
                let frame = view.get(offset, len.into()).ok_or_else(cut)?;
                let mut frames = snap::read::FrameDecoder::new(SNAPPY_STREAM.chain(&frame[..]));
                frames
                    .read_exact(out)
                    .map_err(|error| format!("the snappy data is broken: {error}"))
            }
        }
    }

    fn view<'a>(&'a self, data: &'a [u8]) -> View<'a> {
        match &self.index {
            Index::Kdump(kdump) => kdump.view(data),
            Index::List(_) => View::new(data, data.len() as u64, None),
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.index {
            Index::Kdump(_) => "kdump".to_owned(),
            Index::List(units) => format!("{} units", units.len()),
        };
        write!(f, "Pages({kind})")
    }
}

/// A place for one unpacked unit: its address and its bytes.
type Place = Mutex<Option<(u64, Arc<Vec<u8>>)>>;

/// The memory of a dump that is made of pages. Its offsets are guest-physical addresses.
pub(super) struct PageSource {
    /// The file from its first byte.
    file: GuestMemory,
    len: usize,
    pages: Pages,
    usual: u64,
    kept: Box<[Place]>,
}

impl PageSource {
    pub(super) fn new(file: GuestMemory, pages: Pages) -> Self {
        let usual = pages.usual().max(1);
        let places = (KEPT / usual).clamp(16, 1 << 14).next_power_of_two();
        Self {
            len: usize::try_from(file.size()).unwrap_or(usize::MAX),
            file,
            usual: usual as u64,
            pages,
            kept: (0..places).map(|_| Mutex::default()).collect(),
        }
    }

    /// Where a unit is kept: neighbours do not push each other out.
    fn place(&self, unit: &Unit) -> Option<&Place> {
        self.kept
            .get((unit.gpa / self.usual) as usize & (self.kept.len() - 1))
    }

    fn unpacked(&self, data: &[u8], unit: &Unit) -> Result<Arc<Vec<u8>>, String> {
        let place = self.place(unit);
        if let Some(place) = place {
            let kept = place.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, bytes)) = kept.as_ref().filter(|(gpa, _)| *gpa == unit.gpa) {
                return Ok(Arc::clone(bytes));
            }
        }
        // Not while the place is locked: another thread may want another unit of it.
        let mut bytes = Vec::new();
        self.pages.load(data, unit, &mut bytes)?;
        let bytes = Arc::new(bytes);
        if let Some(place) = place {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some((unit.gpa, Arc::clone(&bytes)));
        }
        Ok(bytes)
    }
}

impl Source for PageSource {
    fn len(&self) -> u64 {
        u64::MAX
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let lost = || "the file was truncated or became unreadable while in use".to_owned();
        let data = self.file.frozen(Gpa(0), self.len).ok_or_else(lost)?;
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let unit = self.pages.unit(data, Gpa(at))?;
            let skip = (at - unit.gpa) as usize;
            let now = rest.len().min((unit.len as usize).saturating_sub(skip));
            let (out, tail) = std::mem::take(&mut rest).split_at_mut(now);
            match unit.stored {
                Stored::Fill(byte) => out.fill(byte),
                Stored::Plain { offset } => {
                    let view = self.pages.view(data);
                    let bytes = view
                        .get(offset.saturating_add(skip as u64), now as u64)
                        .ok_or_else(|| "the file ends before this page does".to_owned())?;
                    out.copy_from_slice(&bytes);
                }
                Stored::Packed { .. } | Stored::Frame { .. } => {
                    let bytes = self.unpacked(data, &unit)?;
                    out.copy_from_slice(bytes.get(skip..skip + now).unwrap_or_default());
                }
            }
            rest = tail;
            at += now as u64;
        }
        if self.file.frozen(Gpa(0), self.len).is_none() {
            return Err(lost());
        }
        Ok(())
    }
}

impl fmt::Debug for PageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pages.fmt(f)
    }
}
