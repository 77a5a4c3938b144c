//! Going over all of a guest's memory, chunk by chunk: for searches.

use crate::guest::GuestMemory;
use crate::pagemap::PageMap;
use crate::slot::{Backing, Slot};
use crate::{MemoryError, Region};
use rayon::iter::{ParallelBridge, ParallelIterator};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use vmsight_arch::Gpa;

const PAGE: u64 = 4096;
/// Problems kept by a scan; the rest is counted only.
const MAX_PROBLEMS: usize = 64;

/// How memory is cut into chunks.
#[derive(Clone, Debug)]
pub struct ScanOptions {
    /// Bytes of a chunk, at least one page; rounded up to whole pages.
    pub step: usize,
    /// Bytes of the following memory that each chunk shows as well, so that what lies across the border is found. Give the
    /// length of the longest match less one.
    pub overlap: usize,
    /// Leave out memory that nobody ever wrote to, where that can be found out without reading it: it is all zeros. No
    /// chunk starts with such memory, but one may end with it.
    pub skip_untouched: bool,
    /// Only memory in this range.
    pub within: Option<Region>,
}

impl Default for ScanOptions {
    /// 1 MiB at a time (fits a second-level cache), no overlap, untouched memory left out.
    fn default() -> Self {
        Self {
            step: 1 << 20,
            overlap: 0,
            skip_untouched: true,
            within: None,
        }
    }
}

/// A piece of memory to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Its first byte.
    pub gpa: Gpa,
    /// Bytes to look at, the overlap included.
    pub len: usize,
    /// Bytes before the overlap: a match that starts behind them belongs to the next chunk.
    pub own: usize,
}

/// What a scan found.
#[derive(Debug)]
pub struct Scan<T> {
    /// Everything found, in the order of the chunks.
    pub found: Vec<T>,
    /// Memory that could not be read and was seen as zeros: the first 64 pieces.
    pub problems: Vec<MemoryError>,
    /// How many pieces could not be read in all.
    pub problem_count: u64,
    /// The chunks were not all looked at: the caller stopped it, or the VM exited.
    pub stopped: bool,
}

impl GuestMemory {
    /// All memory in chunks, by rising address. Lazy: nothing is read before [`chunk_bytes`](Self::chunk_bytes).
    pub fn chunks(&self, options: &ScanOptions) -> Chunks<'_> {
        let page = PAGE as usize;
        let step = options
            .step
            .max(page)
            .checked_next_multiple_of(page)
            .unwrap_or(page) as u64;
        let within = options.within.unwrap_or(Region {
            start: Gpa(0),
            len: u64::MAX,
        });
        Chunks {
            memory: self,
            step,
            overlap: options.overlap as u64,
            skip_untouched: options.skip_untouched,
            at: within.start.0,
            end: within.end().0,
            pagemap: None,
        }
    }

    /// The bytes of a chunk: in place for a dump, else copied into `scratch`.
    ///
    /// # Errors
    /// The first address that could not be read, and why.
    pub fn chunk_bytes<'a>(
        &'a self,
        chunk: &Chunk,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], MemoryError> {
        if let Some(bytes) = self.frozen(chunk.gpa, chunk.len) {
            return Ok(bytes);
        }
        scratch.resize(chunk.len, 0);
        self.read_once(chunk.gpa, scratch)?;
        Ok(scratch)
    }

    /// Takes the pages of a chunk out of this process's resident memory again, if they are mapped; reading them brings
    /// them back. A scan of a dump of many GiB thus stays small.
    pub fn release(&self, chunk: &Chunk) {
        for (slot, at, range) in self.parts(chunk.gpa, chunk.own).flatten() {
            if let Backing::Mapped { mapping, offset } = &slot.backing {
                mapping.release(offset.wrapping_add(at), range.len() as u64);
            }
        }
    }

    /// Shows every chunk to `look`, on all CPUs at once, and gathers what it returns in the order of the addresses.
    ///
    /// `look` gets the chunk and its bytes. A page that cannot be read is seen as zeros and noted as a problem. Setting
    /// `stop` ends the scan after the chunks that are being looked at.
    pub fn scan<T, F>(&self, options: &ScanOptions, stop: &AtomicBool, look: F) -> Scan<T>
    where
        T: Send,
        F: Fn(&Chunk, &[u8]) -> Vec<T> + Sync,
    {
        let problems = Mutex::new((Vec::new(), 0u64));
        let dead = AtomicBool::new(false);
        let stopped = || stop.load(Ordering::Relaxed) || dead.load(Ordering::Relaxed);
        let mut found: Vec<(Gpa, Vec<T>)> = self
            .chunks(options)
            .take_while(|_| !stopped())
            .par_bridge()
            .map_init(Vec::new, |scratch, chunk| {
                if stopped() {
                    return (chunk.gpa, Vec::new());
                }
                let mut failed = Vec::new();
                let found = match self.frozen(chunk.gpa, chunk.len) {
                    Some(bytes) => {
                        let found = look(&chunk, bytes);
                        if self.frozen(chunk.gpa, chunk.len).is_none() {
                            failed.push(MemoryError::Lost { gpa: chunk.gpa });
                        }
                        found
                    }
                    None => {
                        self.read_or_zero(&chunk, scratch, &mut failed);
                        look(&chunk, scratch)
                    }
                };
                if !failed.is_empty() {
                    if failed.iter().any(MemoryError::is_final) {
                        dead.store(true, Ordering::Relaxed);
                    }
                    if let Ok(mut problems) = problems.lock() {
                        problems.1 += failed.len() as u64;
                        let room = MAX_PROBLEMS.saturating_sub(problems.0.len());
                        problems.0.extend(failed.into_iter().take(room));
                    }
                }
                self.release(&chunk);
                (chunk.gpa, found)
            })
            .filter(|(_, found)| !found.is_empty())
            .collect();
        found.sort_by_key(|&(gpa, _)| gpa);
        let (problems, problem_count) = problems.into_inner().unwrap_or_default();
        Scan {
            found: found.into_iter().flat_map(|(_, found)| found).collect(),
            problems,
            problem_count,
            stopped: stopped(),
        }
    }

    /// As [`read`](Self::read), for long pieces of which each byte is looked at once. Memory that is mapped from a file is read
    /// from the file: no page is mapped for it, which costs more than the copy, or comes to be.
    ///
    /// # Errors
    /// The first address that could not be read, and why. `buf` may then be filled in part.
    pub fn read_once(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        for part in self.parts(gpa, buf.len()) {
            let (slot, at, range) = part?;
            slot.read_once(at, buf.get_mut(range).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Copies a chunk; pages that cannot be read become zeros, each with its error.
    fn read_or_zero(&self, chunk: &Chunk, scratch: &mut Vec<u8>, failed: &mut Vec<MemoryError>) {
        scratch.resize(chunk.len, 0);
        if self.read_once(chunk.gpa, scratch).is_ok() {
            return;
        }
        for (i, page) in scratch.chunks_mut(PAGE as usize).enumerate() {
            let gpa = chunk.gpa.wrapping_add(i as u64 * PAGE);
            if let Err(error) = self.read(gpa, page) {
                page.fill(0);
                let last = error.is_final();
                failed.push(error);
                if last {
                    scratch.fill(0);
                    return;
                }
            }
        }
    }
}

/// The chunks of a guest's memory. See [`GuestMemory::chunks`].
#[derive(Debug)]
pub struct Chunks<'a> {
    memory: &'a GuestMemory,
    step: u64,
    overlap: u64,
    skip_untouched: bool,
    at: u64,
    end: u64,
    /// Of the process with this pid, `None` inside where it cannot be had.
    pagemap: Option<(u32, Option<PageMap>)>,
}

impl Iterator for Chunks<'_> {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        loop {
            let slots = self.memory.slots();
            let slot = slots.get(slots.partition_point(|slot| slot.region.end().0 <= self.at))?;
            let (start, end) = (
                slot.region.start.0.max(self.at),
                slot.region.end().0.min(self.end),
            );
            if start >= end {
                return None;
            }
            let Some(data) = self.next_data(slot, start..end) else {
                self.at = slot.region.end().0;
                continue;
            };
            // Whole pages, counted from the start of the slot.
            let base = slot.region.start.0;
            let first = start.max(base + (data - base) / PAGE * PAGE);
            let last = end.min(first.saturating_add(self.step));
            self.at = last;
            let own = last - first;
            let region = self.memory.region_of(Gpa(first))?;
            let len = own.saturating_add(self.overlap).min(region.end().0 - first);
            let (Ok(len), Ok(own)) = (usize::try_from(len), usize::try_from(own)) else {
                continue;
            };
            return Some(Chunk {
                gpa: Gpa(first),
                len,
                own,
            });
        }
    }
}

impl Chunks<'_> {
    /// The first address of `range` (all in `slot`) that may hold something.
    fn next_data(&mut self, slot: &Slot, range: Range<u64>) -> Option<u64> {
        if !self.skip_untouched {
            return Some(range.start);
        }
        // Sources count from elsewhere; both ways the difference is the same, and no sum passes the end of the slot.
        let base = slot.region.start.0;
        let (from, to) = (range.start - base, range.end - base);
        let found = match &slot.backing {
            Backing::Mapped { mapping, offset } => mapping
                .next_data(offset.saturating_add(from))?
                .saturating_sub(*offset),
            Backing::Process { process, hva, .. } => {
                let pid = process.pid();
                if self.pagemap.as_ref().is_none_or(|(known, _)| *known != pid) {
                    self.pagemap = Some((pid, PageMap::open(pid)));
                }
                let Some((_, Some(pagemap))) = &mut self.pagemap else {
                    return Some(range.start);
                };
                let (Some(first), Some(last)) = (hva.checked_add(from), hva.checked_add(to)) else {
                    return Some(range.start);
                };
                pagemap.next_touched(first..last)?.checked_sub(*hva)?
            }
            Backing::Custom { .. } => return Some(range.start),
        };
        (found < to).then(|| base + found.max(from))
    }
}
