//! Reads that keep what they get.

use std::ops::Range;

use vmsight_arch::Gva;

use super::{AddressSpace, GvaReadOp, ReadError};

/// Pages read at once: memory of another process answers many as quickly as one.
const AT_ONCE: usize = 64;

/// Ranges of a buffer and how each was read.
type Pieces = Vec<(Range<usize>, Result<(), ReadError>)>;

impl AddressSpace {
    /// Fills `buf` from `gva` on as far as the pages are there; the rest of `buf` is set to zero.
    ///
    /// Returns ranges of `buf` in order, which together cover it: what was read, and for each hole why. Neighbouring
    /// pages that are missing for one and the same entry are one hole.
    pub fn read_partial(&self, gva: Gva, buf: &mut [u8]) -> Vec<(Range<usize>, Result<(), ReadError>)> {
        let mut out = Pieces::new();
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let start = match self.inner.advance(gva, done) {
                Ok(start) => start,
                Err(error) => {
                    rest.fill(0);
                    add(&mut out, done + rest.len(), Err(error));
                    break;
                }
            };
            let mut ops = Vec::with_capacity(AT_ONCE);
            let (mut at, mut tail) = (start, rest);
            while !tail.is_empty() && ops.len() < AT_ONCE {
                let len = self.inner.left_in_page(at).min(tail.len());
                let Some((page, next)) = tail.split_at_mut_checked(len) else {
                    break;
                };
                ops.push(GvaReadOp::new(at, page));
                tail = next;
                let Some(next) = at.checked_add(len as u64) else {
                    break;
                };
                at = next;
            }
            self.read_batch(&mut ops);
            for op in ops {
                done += op.buf.len();
                if op.result.is_err() {
                    op.buf.fill(0);
                }
                add(&mut out, done, op.result);
            }
            // Where the last page misses a whole table, so does all that the table would have covered.
            if let Some((range, Err(error))) = out.last_mut()
                && let Some(end) = self.hole_end(gva, error)
                && end > done
            {
                let end = end.min(buf.len());
                buf.get_mut(done..end).unwrap_or_default().fill(0);
                range.end = end;
                done = end;
            }
        }
        out
    }

    /// How many bytes after `gva` the hole ends that `error` tells of, where it is larger than a page.
    fn hole_end(&self, gva: Gva, error: &ReadError) -> Option<usize> {
        let fault = error.page_fault().filter(|fault| fault.level > 1)?;
        let span = 1u64 << self.mode().span_shift(fault.level);
        let last = fault.gva.0 | (span - 1);
        usize::try_from(last.checked_sub(gva.0)?).ok()?.checked_add(1)
    }
}

/// Adds a piece that ends at `end`, to the last one where that is of the same kind.
fn add(out: &mut Pieces, end: usize, result: Result<(), ReadError>) {
    let start = out.last().map_or(0, |(range, _)| range.end);
    match (out.last_mut(), &result) {
        (Some((last, Ok(()))), Ok(())) => last.end = end,
        (Some((last, Err(a))), Err(b)) if same_hole(a, b) => last.end = end,
        _ => out.push((start..end, result)),
    }
}

/// Whether two pages are missing for the same reason.
fn same_hole(a: &ReadError, b: &ReadError) -> bool {
    let of = |e: &ReadError| e.page_fault().map(|f| (f.reason, f.level, f.entry_gpa));
    of(a).is_some_and(|a| Some(a) == of(b))
}
