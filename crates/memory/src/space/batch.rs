//! Many reads in one go: the walks are taken in lock-step, so that what each must wait for is waited for once.

use vmsight_arch::paging::{Cursor, Progress, Resolved, TableMemory};
use vmsight_arch::{Gpa, Gva};

use super::cache::{DEPTH, Found, NO_PAGE};
use super::mapped::Leaf;
use super::{AddressSpace, Inner, Method, ReadError};
use crate::copy;
use crate::fault;

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
        match self.inner.method {
            Method::Mapped => {
                for group in ops.chunks_mut(LANES) {
                    self.inner.read_group(group);
                }
            }
            Method::Remote => self.inner.read_batch_remote(ops),
        }
    }
}

/// Reads in flight at once in mapped memory: more than the processor has line-fill buffers for.
const LANES: usize = 16;

/// Where a read of a group stands.
#[derive(Clone, Copy, Default)]
enum Lane {
    /// Done, or to be done by itself.
    #[default]
    Alone,
    /// What is remembered: a table whose entry is on its way, or a page.
    Known(Found),
    /// The walk goes on.
    Walk(Cursor),
    /// The page is known; the bytes are on their way.
    Page(Gpa, Proof),
}

/// What to look at again after the bytes were copied.
#[derive(Clone, Copy)]
enum Proof {
    Known(Found, Option<Leaf>),
    Walk(Resolved, Cursor),
}

/// Asks the processor to fetch the cache line at `ptr`, where it can be asked.
#[inline(always)]
fn prefetch(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect on what the program sees, whatever the address; SSE is part of x86-64.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

impl Inner {
    /// Up to [`LANES`] reads in mapped memory.
    fn read_group(&self, ops: &mut [GvaReadOp<'_>]) {
        let mut lanes = [Lane::Alone; LANES];
        for (lane, op) in lanes.iter_mut().zip(&*ops) {
            if op.buf.is_empty() || op.buf.len() > self.left_in_page(op.gva) {
                continue;
            }
            if let Some(found) = self.cache.get::<DEPTH>(op.gva.0 >> self.span_shift) {
                if found.page == NO_PAGE {
                    prefetch(self.leaf_place(&found, op.gva));
                }
                *lane = Lane::Known(found);
            } else if let Some(cursor) = Cursor::new(self.mode, self.dtb, op.gva) {
                *lane = Lane::Walk(cursor);
            }
        }
        self.walk_group(&mut lanes);
        // Last entries that are on their way lead to pages, and their bytes are sent for.
        for (lane, op) in lanes.iter_mut().zip(&*ops) {
            if let Lane::Known(found) = *lane {
                *lane = match self.hit_of(&found, op.gva) {
                    Some((gpa, leaf)) => Lane::Page(gpa, Proof::Known(found, leaf)),
                    None => Lane::Alone,
                };
            }
            if let Lane::Page(gpa, _) = *lane
                && let Some(ptr) = self.memory.mapped(gpa, op.buf.len())
            {
                prefetch(ptr);
                prefetch(ptr.wrapping_add(op.buf.len() - 1));
            }
        }
        for (lane, op) in lanes.iter().zip(ops) {
            op.result = match *lane {
                Lane::Page(gpa, proof) if self.finish(gpa, &proof, op.buf) => {
                    if let Proof::Walk(page, cursor) = proof {
                        self.remember(op.gva, page, cursor.steps());
                    }
                    Ok(())
                }
                _ => self.read_slow(op.gva, op.buf),
            };
        }
    }

    /// Takes all walks to their end, a level of all at a time. A walk that fails is left to be done alone.
    fn walk_group(&self, lanes: &mut [Lane; LANES]) {
        while lanes.iter().any(|lane| matches!(lane, Lane::Walk(_))) {
            for lane in lanes.iter() {
                if let Lane::Walk(cursor) = lane
                    && let Some(ptr) = self.memory.mapped(cursor.entry_gpa(), 8)
                {
                    prefetch(ptr);
                }
            }
            for lane in lanes.iter_mut() {
                let Lane::Walk(cursor) = lane else { continue };
                let value = match self.mode.entry_size() {
                    4 => self.memory.entry_u32(cursor.entry_gpa()).map(u64::from),
                    _ => self.memory.entry_u64(cursor.entry_gpa()),
                };
                match value.map(|value| cursor.feed(value)) {
                    Some(Progress::Table) => {}
                    Some(Progress::Page(page)) => *lane = Lane::Page(page.gpa, Proof::Walk(page, *cursor)),
                    Some(Progress::Fault(_)) | None => *lane = Lane::Alone,
                }
            }
        }
    }

    /// Copies the bytes and asks for the proof.
    fn finish(&self, gpa: Gpa, proof: &Proof, buf: &mut [u8]) -> bool {
        let Some(ptr) = self.memory.mapped(gpa, buf.len()) else {
            return false;
        };
        // SAFETY: so many bytes are mapped there; `buf` is ours alone.
        unsafe { copy::copy(ptr, buf.as_mut_ptr(), buf.len()) };
        fault::all_is_well()
            && match proof {
                Proof::Known(found, leaf) => self.holds::<DEPTH>(found, *leaf),
                Proof::Walk(_, cursor) => !self.live || self.unchanged(cursor.steps()),
            }
    }
}
