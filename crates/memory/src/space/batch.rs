//! Many reads in one go: the walks are taken in lock-step, so that what each must wait for is waited for once.

use vmsight_arch::Gva;
use vmsight_arch::paging::{Cursor, Progress, TableMemory};

use super::hot::Place;
use super::mapped::Mapped;
use super::{AddressSpace, Backend, Inner, ReadError};
use crate::prefetch::prefetch;

/// One read of a batch.
#[derive(Debug)]
pub struct GvaReadOp<'a> {
    /// Where to read.
    pub gva: Gva,
    /// What to fill.
    pub buf: &'a mut [u8],
    /// How it went: set by [`AddressSpace::read_batch`].
    pub result: Result<(), ReadError>,
}

impl<'a> GvaReadOp<'a> {
    /// A read that has not been done yet.
    pub fn new(gva: Gva, buf: &'a mut [u8]) -> Self {
        Self {
            gva,
            buf,
            result: Ok(()),
        }
    }
}

impl AddressSpace {
    /// Does all of `ops`, each with a result of its own.
    ///
    /// Reads that miss the processor's caches overlap; memory of another process is asked once a level for all of
    /// them, not once a read.
    pub fn read_batch(&self, ops: &mut [GvaReadOp<'_>]) {
        match &self.inner.backend {
            Backend::Mapped(mapped) | Backend::MappedFive(mapped) => {
                for group in ops.chunks_mut(LANES) {
                    self.inner.read_group(mapped, group);
                }
            }
            Backend::Remote(cache) => self.inner.read_batch_remote(cache, ops),
        }
    }

    /// Sends for the cache lines that lie `offsets` behind `gva`, in the same page, and does not wait for them: reads that come when
    /// others have been sent for as well find them in the processor's cache.
    ///
    /// A hint: nothing is read, nothing is proven, and nothing happens where the walk is not remembered or memory must be asked for.
    #[inline]
    pub fn prefetch(&self, gva: Gva, offsets: &[u32]) {
        let (Backend::Mapped(mapped) | Backend::MappedFive(mapped)) = &self.inner.backend else {
            return;
        };
        let place = mapped.hot.get(gva.0).and_then(|hit| hit.usual(gva.0));
        let ptr = match place {
            Some(Place::Here(ptr)) => Some(ptr),
            Some(Place::At(gpa, _)) => mapped.window(&self.inner.memory, gpa, 1),
            None => None,
        };
        if let Some(ptr) = ptr {
            // Whatever lies beyond the page: to ask for it does no harm.
            offsets
                .iter()
                .for_each(|&offset| prefetch(ptr.wrapping_add(offset as usize)));
        }
    }
}

/// Walks taken in lock-step: more than the processor can have misses under way.
const LANES: usize = 64;

impl Inner {
    /// Up to [`LANES`] reads in mapped memory. First the last entries of all are sent for, then the bytes of all; what
    /// follows finds them in the processor's cache and is the same as for a single read, proof and all.
    ///
    /// Addresses are gathered first and sent for in a loop of their own: a request whose page is not in the TLB holds up
    /// the instructions behind it, and only as many are under way as fit into the processor's window with what
    /// lies between them.
    fn read_group(&self, mapped: &Mapped, ops: &mut [GvaReadOp<'_>]) {
        let mut places = [const { std::ptr::null() }; LANES];
        let mut unknown = false;
        for (to, op) in places.iter_mut().zip(&*ops) {
            match mapped.hot.get(op.gva.0) {
                Some(hit) => *to = hit.first(op.gva.0),
                None => unknown = true,
            }
        }
        if unknown {
            self.walk_unknown(mapped, ops);
        }
        places.iter().take(ops.len()).for_each(|place| prefetch(*place));
        for (to, op) in places.iter_mut().zip(&*ops) {
            let place = mapped.hot.get(op.gva.0).and_then(|hit| hit.usual(op.gva.0));
            *to = match place {
                Some(Place::At(gpa, _)) => mapped.window(&self.memory, gpa, 1),
                // Asked for above.
                Some(Place::Here(_)) | None => None,
            }
            .unwrap_or(std::ptr::null());
        }
        places.iter().take(ops.len()).for_each(|place| prefetch(*place));
        for op in ops {
            op.result = if self.read_within(op.gva, op.buf) {
                Ok(())
            } else {
                self.read_slow(op.gva, op.buf)
            };
        }
    }

    /// Sends for the first and the last line of a small read. Long ones bring the processor's own prefetcher along.
    #[inline(always)]
    fn prefetch_bytes(&self, mapped: &Mapped, gpa: u64, len: usize) {
        if let Some(ptr) = mapped.window(&self.memory, gpa, 1) {
            prefetch(ptr);
            prefetch(ptr.wrapping_add(len.clamp(1, 0x1000 - (gpa as usize & 0xfff)) - 1));
        }
    }

    /// Walks for those of up to [`LANES`] addresses of which nothing is remembered, one level of all at a time, and sends
    /// for their bytes: the reads that follow find it all in the processor's cache.
    fn walk_unknown(&self, mapped: &Mapped, ops: &[GvaReadOp<'_>]) {
        let known = |op: &GvaReadOp<'_>| mapped.hot.get(op.gva.0).is_some();
        if ops.iter().all(known) {
            return;
        }
        let mut cursors = [None; LANES];
        for (cursor, op) in cursors.iter_mut().zip(ops) {
            if !known(op) {
                *cursor = Cursor::new(self.mode, self.dtb, op.gva);
            }
        }
        for _ in 0..self.mode.levels() {
            for cursor in cursors.iter().flatten() {
                if let Some(ptr) = mapped.window(&self.memory, cursor.entry_gpa().0, 8) {
                    prefetch(ptr);
                }
            }
            for (slot, op) in cursors.iter_mut().zip(ops) {
                let Some(cursor) = slot else { continue };
                let value = match self.mode.entry_size() {
                    4 => self.memory.entry_u32(cursor.entry_gpa()).map(u64::from),
                    _ => self.memory.entry_u64(cursor.entry_gpa()),
                };
                match value.map(|value| cursor.feed(value)) {
                    Some(Progress::Table) => {}
                    Some(Progress::Page(found)) => {
                        self.prefetch_bytes(mapped, found.gpa.0, op.buf.len());
                        *slot = None;
                    }
                    Some(Progress::Fault(_)) | None => *slot = None,
                }
            }
        }
    }
}
