//! Walks with their evidence, and what is remembered of them.

use vmsight_arch::paging::{self, FaultReason, PageFault, Resolved, Steps, TableMemory, Translation};
use vmsight_arch::{Gpa, Gva};

use super::cache::{DEPTH, Evidence, Found, NO_PAGE};
use super::{Inner, Method, ReadCause, ReadError, TRIES};
use crate::{MemoryError, ReadOp};

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
    }

    /// Whether the entries of a walk still hold what it read.
    pub(super) fn unchanged(&self, steps: &Steps) -> bool {
        match self.method {
            Method::Mapped => steps.iter().all(|step| {
                let now = match self.mode.entry_size() {
                    4 => self.memory.entry_u32(step.entry_gpa).map(u64::from),
                    _ => self.memory.entry_u64(step.entry_gpa),
                };
                now == Some(step.value)
            }),
            Method::Remote => {
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
                place: step.entry_gpa.0,
                value: step.value,
            };
        }
        steps.len()
    }

    /// Reads `data` (if any), then the entries, in one batch. `None` where an entry is not what it was; the result is
    /// that of `data`.
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
                ops.push(ReadOp::new(Gpa(e.place), buf.get_mut(..size).unwrap_or_default()));
            }
            self.memory.read_batch(&mut ops);
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

    /// What to remember of a walk that found a page: under which key, and what. `None` where it is not worth it.
    pub(super) fn found_of(&self, gva: Gva, page: Resolved, steps: &Steps) -> Option<(u64, Found)> {
        if self.mode.entry_size() != 8 {
            // 32-bit paging has two levels: a walk costs no more than looking it up.
            return None;
        }
        let mut found = Found {
            page: NO_PAGE,
            table: 0,
            evidence: [Evidence::default(); DEPTH],
        };
        let large = page.page_shift > self.page_shift;
        if large {
            let span = (1u64 << self.span_shift) - 1;
            found.page = page.gpa.0 & !span;
        }
        let key = match self.method {
            Method::Mapped => {
                let depth = steps.len();
                // The last entry of a small page is read each time.
                let upper = if large { depth } else { depth.checked_sub(1)? };
                if !large {
                    // A table is as big as the smallest page, but for a root, which can be smaller.
                    let leaf = steps.last()?.entry_gpa.0;
                    let index = (gva.0 >> self.page_shift) & self.last_index_mask();
                    let table = Gpa(leaf.wrapping_sub(index << 3));
                    let len = (self.last_index_mask() as usize + 1) << 3;
                    found.table = self.memory.mapped(table, len)?.expose_provenance() as u64;
                }
                if self.live {
                    for (to, step) in found.evidence.iter_mut().zip(steps.iter()).take(upper) {
                        let place = self.memory.mapped(step.entry_gpa, 8)?.expose_provenance() as u64;
                        *to = Evidence {
                            place,
                            value: step.value,
                        };
                    }
                    if upper == 0 {
                        return None;
                    }
                    let first = found.evidence[0];
                    found.evidence.iter_mut().skip(upper).for_each(|e| *e = first);
                }
                gva.0 >> self.span_shift
            }
            Method::Remote => {
                self.evidence_of(steps, &mut found.evidence);
                let first = found.evidence[0];
                found
                    .evidence
                    .iter_mut()
                    .skip(steps.len())
                    .for_each(|e| *e = first);
                if large {
                    self.span_key(gva)
                } else {
                    found.page = page.gpa.0 & !((1 << self.page_shift) - 1);
                    self.page_key(gva)
                }
            }
        };
        Some((key, found))
    }

    /// Keeps a walk in the cache.
    pub(super) fn remember(&self, gva: Gva, page: Resolved, steps: &Steps) {
        if let Some((key, found)) = self.found_of(gva, page, steps) {
            self.cache.put(key, &found);
        }
    }

    /// The entries of a last table, less one.
    #[inline(always)]
    pub(super) fn last_index_mask(&self) -> u64 {
        (1 << (self.span_shift - self.page_shift)) - 1
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
