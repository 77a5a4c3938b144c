//! Memory in the order of its addresses, piece by piece, each hashed as it goes by.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmsight_arch::Gpa;

use super::digest::Digester;
use super::{PAGE, WriteError, digester};
use crate::{GuestMemory, MemoryError, Region, ScanOptions};

/// Bytes read at a time.
const STEP: usize = 1 << 20;
/// Ranges of unreadable memory that are named; more are counted.
const NAMED: usize = 64;

/// A piece of memory.
pub(super) enum Piece<'a> {
    /// Nobody ever wrote to it: so many zeros.
    Untouched(u64),
    /// What it holds. Pages that could not be read are zeros.
    Bytes(&'a Arc<Vec<u8>>),
}

/// Reads memory for a dump.
pub(super) struct Pieces<'a> {
    memory: &'a GuestMemory,
    stop: &'a AtomicBool,
    advance: &'a (dyn Fn(u64) + Sync),
    digest: Option<Digester>,
    /// Buffers; those which nobody hashes or writes any more are used again.
    buffers: Vec<Arc<Vec<u8>>>,
    unreadable: Vec<(Region, MemoryError)>,
    unreadable_bytes: u64,
    /// The pages of the present piece that could not be read, by address.
    bad: Vec<u64>,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(
        memory: &'a GuestMemory,
        stop: &'a AtomicBool,
        advance: &'a (dyn Fn(u64) + Sync),
    ) -> Self {
        Self {
            memory,
            stop,
            advance,
            digest: None,
            buffers: Vec::new(),
            unreadable: Vec::new(),
            unreadable_bytes: 0,
            bad: Vec::new(),
        }
    }

    /// Shows a region from its first byte to its last. `take` also gets the address of the piece and the addresses of the pages
    /// in it that could not be read.
    pub(super) fn each(
        &mut self,
        region: Region,
        mut take: impl FnMut(Gpa, Piece<'_>, &[u64]) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        let digest = match self.digest.take() {
            Some(digest) => digest,
            None => digester()?,
        };
        let memory = self.memory;
        let options = ScanOptions {
            step: STEP,
            within: Some(region),
            ..ScanOptions::default()
        };
        let mut at = region.start;
        for chunk in memory.chunks(&options) {
            if self.stop.load(Ordering::Relaxed) {
                return Err(WriteError::Interrupted);
            }
            let gap = chunk.gpa.0.saturating_sub(at.0);
            if gap > 0 {
                digest.zeros(gap)?;
                take(at, Piece::Untouched(gap), &[])?;
                (self.advance)(gap);
            }
            let bytes = self.read(chunk.gpa, chunk.own)?;
            digest.shared(&bytes, 0..bytes.len())?;
            take(chunk.gpa, Piece::Bytes(&bytes), &self.bad)?;
            (self.advance)(bytes.len() as u64);
            at = Gpa(chunk.gpa.0.saturating_add(bytes.len() as u64));
            self.buffers.push(bytes);
        }
        let gap = region.end().0.saturating_sub(at.0);
        if gap > 0 {
            digest.zeros(gap)?;
            take(at, Piece::Untouched(gap), &[])?;
            (self.advance)(gap);
        }
        digest.end()?;
        self.digest = Some(digest);
        Ok(())
    }

    fn read(&mut self, gpa: Gpa, len: usize) -> Result<Arc<Vec<u8>>, WriteError> {
        let free = self.buffers.iter().position(|b| Arc::strong_count(b) == 1);
        let mut shared = free.map_or_else(Arc::default, |index| self.buffers.swap_remove(index));
        // Nobody else has it: this copies nothing.
        let buffer = Arc::make_mut(&mut shared);
        buffer.resize(len, 0);
        self.bad.clear();
        if self.memory.read_once(gpa, buffer).is_ok() {
            return Ok(shared);
        }
        for (index, page) in buffer.chunks_mut(PAGE as usize).enumerate() {
            let gpa = gpa.wrapping_add(index as u64 * PAGE);
            let Err(error) = self.memory.read_once(gpa, page) else {
                continue;
            };
            if error.is_final() {
                return Err(error.into());
            }
            page.fill(0);
            self.bad.push(gpa.0);
            let len = page.len() as u64;
            self.unreadable_bytes += len;
            let full = self.unreadable.len() >= NAMED;
            match self.unreadable.last_mut() {
                Some((last, _)) if last.end() == gpa => last.len += len,
                _ if full => {}
                _ => self.unreadable.push((Region { start: gpa, len }, error)),
            }
        }
        Ok(shared)
    }

    /// The digest of each region, and what could not be read.
    #[expect(clippy::type_complexity, reason = "taken apart where it is called")]
    pub(super) fn finish(self) -> Result<(Vec<[u8; 32]>, Vec<(Region, MemoryError)>, u64), WriteError> {
        let digests = match self.digest {
            Some(digest) => digest.finish()?,
            None => Vec::new(),
        };
        Ok((digests, self.unreadable, self.unreadable_bytes))
    }
}
