//! Reads what the rows of many processes are made of ahead of them: a structure of all, then what it points to of all.
//!
//! What a row needs lies in half a dozen structures and as many page tables, each known only when the one before it was read. Row by
//! row, each of them would be waited for alone: for memory that no cache of the processor holds, and in the memory of another
//! process for a system call. Read for many rows together, those waits are one. (The structures themselves are read in a batch only
//! where memory must be asked for: see [`Spans::read_all`](crate::layout::Spans::read_all). Where it is mapped, their cache lines are sent
//! for, of all processes of a group, before the first is read.)
//!
//! Only reading is done here. What a row says of what could not be read is for the row to say.

use rustc_hash::FxHashMap;
use vmsight_arch::paging::{Cursor, PagingMode, Progress, TableMemory};
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::{GuestMemory, ReadError, ReadOp};

use crate::layout::Buffer;

/// Processes that are read together: enough for the waits to be shared, few enough for the first cache of the processor.
pub(crate) const GROUP: usize = 32;

/// A structure that was read, or why it was not.
#[derive(Debug, Default)]
pub(crate) struct Object {
    pub(crate) buffer: Buffer,
    pub(crate) error: Option<ReadError>,
}

impl Object {
    pub(crate) fn new(buffer: Buffer) -> Self {
        Self { buffer, error: None }
    }
}

/// What was read of one process.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    pub(super) task: Object,
    pub(super) signal: Object,
    pub(super) cred: Object,
    pub(super) mm: Object,
    /// The root of its page tables, where it was found.
    pub(super) root: Option<Dtb>,
    /// The beginning of its arguments: empty where it has none or they could not be read like this.
    pub(super) arguments: Vec<u8>,
}

/// The processes of one thread that are read together.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Index of the first.
    pub(super) start: usize,
    pub(super) len: usize,
    #[expect(
        clippy::vec_box,
        reason = "each changes places with the one whose row is made"
    )]
    pub(super) slots: Vec<Box<Ahead>>,
    /// Large pages of the kernel's in which tables of processes lie: physical address by the number of its stretch.
    pub(super) stretches: FxHashMap<u64, Gpa>,
}

/// log2 of the smallest large page.
pub(super) const STRETCH: u32 = 21;

/// Reads the beginnings of the arguments of many processes. `wanted` says of which, where from, and where to: the buffer's length is
/// that of the read, within a page. Buffers that could not be filled are emptied.
pub(super) fn arguments(memory: &GuestMemory, mode: PagingMode, wanted: &mut [(Dtb, Gva, &mut Vec<u8>)]) {
    let pages = pages(memory, mode, wanted.iter().map(|(root, gva, _)| (*root, *gva)));
    if memory.is_all_mapped() {
        pages.iter().flatten().for_each(|&page| memory.prefetch(page));
    }
    let mut there = Vec::with_capacity(pages.len());
    for ((_, _, bytes), page) in wanted.iter_mut().zip(pages) {
        match page {
            Some(gpa) if memory.is_all_mapped() => {
                if memory.read(gpa, bytes).is_err() {
                    bytes.clear();
                }
            }
            Some(gpa) => there.push((gpa, &mut **bytes)),
            None => bytes.clear(),
        }
    }
    let mut reads: Vec<ReadOp<'_>> = there
        .iter_mut()
        .map(|(gpa, bytes)| ReadOp::new(*gpa, bytes))
        .collect();
    memory.read_batch(&mut reads);
    let failed: Vec<bool> = reads.iter().map(|read| read.result.is_err()).collect();
    for ((_, bytes), _) in there.iter_mut().zip(failed).filter(|(_, failed)| *failed) {
        bytes.clear();
    }
}

/// Where addresses of many address spaces lie, all walks one level at a time. `None` where a walk ends in a fault.
fn pages(
    memory: &GuestMemory,
    mode: PagingMode,
    wanted: impl Iterator<Item = (Dtb, Gva)>,
) -> Vec<Option<Gpa>> {
    let mut walks: Vec<Option<Cursor>> = wanted.map(|(root, gva)| Cursor::new(mode, root, gva)).collect();
    let mut found = vec![None; walks.len()];
    let size = usize::from(mode.entry_size());
    let mapped = memory.is_all_mapped();
    let mut entries: Vec<Option<u64>> = Vec::with_capacity(walks.len());
    for _ in 0..mode.levels() {
        entries.clear();
        if mapped {
            let places = || walks.iter().map(|walk| walk.as_ref().map(Cursor::entry_gpa));
            places().flatten().for_each(|place| memory.prefetch(place));
            entries.extend(places().map(|place| match size {
                4 => memory.entry_u32(place?).map(u64::from),
                _ => memory.entry_u64(place?),
            }));
        } else {
            let mut bytes = vec![[0u8; 8]; walks.len()];
            let mut reads: Vec<ReadOp<'_>> = walks
                .iter()
                .zip(&mut bytes)
                .filter_map(|(walk, bytes)| Some(ReadOp::new((*walk)?.entry_gpa(), bytes.get_mut(..size)?)))
                .collect();
            memory.read_batch(&mut reads);
            let mut read = reads
                .into_iter()
                .map(|read| read.result.is_ok())
                .collect::<Vec<_>>()
                .into_iter();
            entries.extend(walks.iter().zip(&bytes).map(|(walk, bytes)| {
                let is_read = walk.is_some() && read.next().unwrap_or(false);
                is_read.then(|| u64::from_le_bytes(*bytes))
            }));
        }
        for ((walk, entry), found) in walks.iter_mut().zip(&entries).zip(&mut found) {
            let Some(cursor) = walk else { continue };
            match entry.map(|value| cursor.feed(value)) {
                Some(Progress::Table) => {}
                Some(Progress::Page(page)) => {
                    *found = Some(page.gpa);
                    *walk = None;
                }
                Some(Progress::Fault(_)) | None => *walk = None,
            }
        }
    }
    found
}
