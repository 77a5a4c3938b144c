//! Walks with their evidence, and what is remembered of them.

use vmsight_arch::paging::{
    self, Cursor, FaultReason, PageFault, Progress, Resolved, Steps, TableMemory, Translation,
};
use vmsight_arch::{Gpa, Gva};

use super::cache::{Cache, DEPTH, Evidence, Found};
use super::{Backend, Inner, ReadCause, ReadError, TRIES};
use crate::{MemoryError, ReadOp};

/// The levels of the tables that are remembered for walks to begin at, lowest first: those that hold small pages, and those that
/// hold pages of 2 MiB.
const TABLES: [u8; 2] = [1, 2];

impl Inner {
    /// See [`super::AddressSpace::translate`].
    pub(super) fn translate(&self, gva: Gva) -> Result<Translation, PageFault> {
        let mut result = self.walk(gva);
        if !self.live {
            return result;
        }
        for _ in 0..TRIES {
            let steps = match &result {
                Ok(page) => &page.steps,
                Err(fault) => &fault.steps,
            };
            if self.unchanged(steps) {
                break;
            }
            result = self.walk(gva);
        }
        result
    }

    pub(super) fn walk(&self, gva: Gva) -> Result<Translation, PageFault> {
        paging::walk(self.mode, &self.memory, self.dtb, gva)
            .or_else(|fault| self.absent.translation(self.mode, &fault).ok_or(fault))
    }

    /// Whether the entries of a walk still hold what it read.
    pub(super) fn unchanged(&self, steps: &Steps) -> bool {
        match self.backend {
            Backend::Mapped(_) | Backend::MappedFive(_) => steps.iter().all(|step| {
                let now = match self.mode.entry_size() {
                    4 => self.memory.entry_u32(step.entry_gpa).map(u64::from),
                    _ => self.memory.entry_u64(step.entry_gpa),
                };
                now == Some(step.value)
            }),
            Backend::Remote(_) => {
                let mut evidence = [Evidence::default(); DEPTH];
                let n = self.evidence_of(steps, &mut evidence);
                self.read_with_evidence(None, evidence.get(..n).unwrap_or_default()) == Some(Ok(()))
            }
        }
    }

    /// The steps of a walk as evidence by guest-physical address; returns how many.
    pub(super) fn evidence_of(&self, steps: &Steps, to: &mut [Evidence; DEPTH]) -> usize {
        for (slot, step) in to.iter_mut().zip(steps.iter()) {
            *slot = Evidence {
                place: step.entry_gpa,
                value: step.value,
            };
        }
        steps.len()
    }

    /// Reads `data` (if any), then the entries, in one batch where that keeps the order. `None` where an entry is not what
    /// it was; the result is that of `data`.
    pub(super) fn read_with_evidence(
        &self,
        data: Option<(Gpa, &mut [u8])>,
        evidence: &[Evidence],
    ) -> Option<Result<(), MemoryError>> {
        let size = usize::from(self.mode.entry_size());
        let mut now = [[0u8; 8]; DEPTH];
        let result = {
            // The bytes first, the proof after: then the proof holds for the time of the bytes.
            let mut ops: Vec<ReadOp<'_>> = Vec::with_capacity(DEPTH + 1);
            let has_data = data.is_some();
            ops.extend(data.map(|(gpa, buf)| ReadOp::new(gpa, buf)));
            for (buf, e) in now.iter_mut().zip(evidence) {
                ops.push(ReadOp::new(e.place, buf.get_mut(..size).unwrap_or_default()));
            }
            let after = if self.ordered { 0 } else { usize::from(has_data) };
            let (first, then) = ops.split_at_mut(after);
            self.memory.read_batch(first);
            self.memory.read_batch(then);
            if ops
                .iter()
                .skip(usize::from(has_data))
                .any(|op| op.result.is_err())
            {
                return None;
            }
            if has_data {
                ops.swap_remove(0).result
            } else {
                Ok(())
            }
        };
        now.iter()
            .zip(evidence)
            .all(|(now, e)| u64::from_le_bytes(*now) == e.value)
            .then_some(result)
    }

    /// A walk through remote memory that begins at the lowest table which is remembered: each entry above it spares a system call.
    /// What is remembered may be over, so the result counts only with its evidence. `None` where nothing is remembered,
    /// or there is no page by it.
    pub(super) fn walk_on(&self, cache: &Cache, gva: Gva) -> Option<(Resolved, Steps)> {
        let keys = TABLES.map(|level| self.table_key(gva, level));
        let found = keys.into_iter().find_map(|key| cache.get(key))?;
        let mut cursor = Cursor::new(self.mode, self.dtb, gva)?;
        for entry in found.entries() {
            if cursor.entry_gpa() != entry.place || cursor.feed(entry.value) != Progress::Table {
                return None;
            }
        }
        loop {
            let value = match self.mode.entry_size() {
                4 => u64::from(self.memory.read_u32(cursor.entry_gpa()).ok()?),
                _ => self.memory.read_u64(cursor.entry_gpa()).ok()?,
            };
            match cursor.feed(value) {
                Progress::Table => {}
                Progress::Page(page) => return Some((page, *cursor.steps())),
                Progress::Fault(_) => return None,
            }
        }
    }

    /// Forgets the tables that [`Self::walk_on`] begins at.
    #[cold]
    pub(super) fn forget_tables(&self, cache: &Cache, gva: Gva) {
        for level in TABLES {
            cache.forget(self.table_key(gva, level));
        }
    }

    /// The key of the table at `level` (1 is the last) that `gva` is translated by.
    fn table_key(&self, gva: Gva, level: u8) -> u64 {
        // The keys of pages do not reach so high.
        1 << 63 | u64::from(level) << 56 | gva.0 >> 12 >> (self.mode.span_shift(level + 1) - 12)
    }

    /// Keeps a walk through remote memory.
    pub(super) fn remember(&self, cache: &Cache, gva: Gva, page: Resolved, steps: &Steps) {
        let mut evidence = [Evidence::default(); DEPTH];
        let n = self.evidence_of(steps, &mut evidence);
        let mut found = Found::new(page.gpa, evidence.get(..n).unwrap_or_default());
        // A page larger than the span is remembered for each stretch of a span that is read.
        let large = page.page_shift > self.page_shift;
        let shift = if large { self.span_shift } else { self.page_shift };
        found.page.0 &= !((1 << shift) - 1);
        cache.put(
            if large {
                self.span_key(gva)
            } else {
                self.page_key(gva)
            },
            &found,
        );
        for level in TABLES {
            let above = usize::from(self.mode.levels().saturating_sub(level));
            if above > 0 && above < n {
                let entries = evidence.get(..above).unwrap_or_default();
                cache.put(self.table_key(gva, level), &Found::new(Gpa(0), entries));
            }
        }
    }

    /// The key of a large page in remote memory.
    pub(super) fn span_key(&self, gva: Gva) -> u64 {
        (gva.0 >> self.span_shift) << 1 | 1
    }

    /// The key of a small page in remote memory.
    pub(super) fn page_key(&self, gva: Gva) -> u64 {
        (gva.0 >> self.page_shift) << 1
    }

    /// `gva` + `done`; an address past 2^64 is an error and does not wrap round to zero.
    pub(super) fn advance(&self, gva: Gva, done: usize) -> Result<Gva, ReadError> {
        gva.checked_add(done as u64).ok_or_else(|| ReadError {
            gva: Gva(u64::MAX),
            cause: ReadCause::Fault(Box::new(PageFault {
                gva: Gva(u64::MAX),
                reason: FaultReason::NonCanonical,
                level: 0,
                entry_gpa: Gpa(0),
                steps: Steps::default(),
            })),
        })
    }

    /// The bytes from `gva` to the end of its smallest page.
    pub(super) fn left_in_page(&self, gva: Gva) -> usize {
        let size = 1usize << self.page_shift;
        size - (gva.0 as usize & (size - 1))
    }
}
