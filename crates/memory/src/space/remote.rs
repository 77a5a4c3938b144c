//! Reads where memory must be asked for: another process, a compressed dump. What can be asked at once is: one request
//! for each level of all walks, one for all bytes, one for what proves them.

use vmsight_arch::paging::{Cursor, Progress, Resolved, Translation};
use vmsight_arch::{Gpa, Gva};

use super::batch::GvaReadOp;
use super::cache::{Cache, DEPTH, Evidence};
use super::{Inner, ReadCause, ReadError, TRIES};

impl Inner {
    /// A read within one page.
    pub(super) fn read_remote(&self, cache: &Cache, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        let failed = |error| ReadError {
            gva,
            cause: ReadCause::Memory(error),
        };
        for key in [self.page_key(gva), self.span_key(gva)] {
            let Some(found) = cache.get(key) else {
                continue;
            };
            let span = if key & 1 == 0 {
                self.page_shift
            } else {
                self.span_shift
            };
            let gpa = Gpa(found.page.0 | (gva.0 & ((1 << span) - 1)));
            if !self.live {
                return self.memory.read(gpa, buf).map_err(failed);
            }
            match self.read_with_evidence(Some((gpa, &mut *buf)), found.entries()) {
                Some(result) => return result.map_err(failed),
                None => cache.forget(key),
            }
        }
        if self.live
            && let Some((page, steps)) = self.walk_on(cache, gva)
        {
            let mut evidence = [Evidence::default(); DEPTH];
            let n = self.evidence_of(&steps, &mut evidence);
            let entries = evidence.get(..n).unwrap_or_default();
            match self.read_with_evidence(Some((page.gpa, &mut *buf)), entries) {
                Some(result) => {
                    self.remember(cache, gva, page, &steps);
                    return result.map_err(failed);
                }
                None => self.forget_tables(cache, gva),
            }
        }
        for _ in 0..TRIES {
            let page: Translation = match self.walk(gva) {
                Ok(page) => page,
                Err(fault) if !self.live || self.unchanged(&fault.steps) => {
                    return Err(ReadError::fault(fault));
                }
                Err(_) => continue,
            };
            let result = if self.live {
                let mut evidence = [Default::default(); DEPTH];
                let n = self.evidence_of(&page.steps, &mut evidence);
                self.read_with_evidence(Some((page.gpa, &mut *buf)), evidence.get(..n).unwrap_or_default())
            } else {
                Some(self.memory.read(page.gpa, buf))
            };
            if let Some(result) = result {
                self.remember(
                    cache,
                    gva,
                    Resolved {
                        gpa: page.gpa,
                        page_shift: page.page_shift,
                    },
                    &page.steps,
                );
                return result.map_err(failed);
            }
        }
        Err(ReadError {
            gva,
            cause: ReadCause::Unstable,
        })
    }

    /// A read over many pages: all of them in lock-step.
    pub(super) fn read_remote_pages(&self, cache: &Cache, gva: Gva, buf: &mut [u8]) -> Result<(), ReadError> {
        let mut ops = [GvaReadOp::new(gva, buf)];
        self.read_batch_remote(cache, &mut ops);
        let [op] = ops;
        op.result
    }

    /// Many reads in memory that must be asked for: one request for each level of all walks, one for all bytes
    /// and their proofs.
    pub(super) fn read_batch_remote(&self, cache: &Cache, ops: &mut [GvaReadOp<'_>]) {
        let mut pieces: Vec<Piece<'_>> = Vec::with_capacity(ops.len());
        let mut results: Vec<Result<(), ReadError>> = Vec::with_capacity(ops.len());
        for (index, op) in ops.iter_mut().enumerate() {
            results.push(self.cut(cache, index, op.gva, op.buf, &mut pieces));
        }
        self.walk_pieces(&mut pieces);
        let proven = self.fetch_pieces(&mut pieces);
        for (piece, proven) in pieces.iter_mut().zip(proven) {
            let result = match (proven, &piece.state) {
                (true, PieceState::Page(page)) => {
                    if let Some(cursor) = &piece.cursor {
                        self.remember(cache, piece.gva, *page, cursor.steps());
                    }
                    continue;
                }
                // Not there, or changed meanwhile: alone, it gives the answer or the reason.
                _ => self.read_remote(cache, piece.gva, piece.buf),
            };
            if let (Err(error), Some(slot)) = (result, results.get_mut(piece.op)) {
                // The lowest address that failed speaks for its op.
                match slot {
                    Err(first) if first.gva <= error.gva => {}
                    _ => *slot = Err(error),
                }
            }
        }
        drop(pieces);
        for (op, result) in ops.iter_mut().zip(results) {
            op.result = result;
        }
    }

    /// Cuts one read into pieces of a page each.
    fn cut<'b>(
        &self,
        cache: &Cache,
        op: usize,
        gva: Gva,
        buf: &'b mut [u8],
        pieces: &mut Vec<Piece<'b>>,
    ) -> Result<(), ReadError> {
        let mut rest = buf;
        let mut done = 0;
        while !rest.is_empty() {
            let at = self.advance(gva, done)?;
            let len = self.left_in_page(at).min(rest.len());
            let Some((buf, tail)) = rest.split_at_mut_checked(len) else {
                break;
            };
            let mut piece = Piece {
                op,
                gva: at,
                buf,
                state: PieceState::Failed,
                cursor: None,
                evidence: Vec::new(),
            };
            self.look_up(cache, &mut piece);
            pieces.push(piece);
            rest = tail;
            done += len;
        }
        Ok(())
    }

    /// Starts a piece from what is remembered, or from the root.
    fn look_up(&self, cache: &Cache, piece: &mut Piece<'_>) {
        for key in [self.page_key(piece.gva), self.span_key(piece.gva)] {
            if let Some(found) = cache.get(key) {
                let page_shift = if key & 1 == 0 {
                    self.page_shift
                } else {
                    self.span_shift
                };
                let gpa = Gpa(found.page.0 | (piece.gva.0 & ((1 << page_shift) - 1)));
                piece.state = PieceState::Page(Resolved { gpa, page_shift });
                if self.live {
                    piece.evidence = found.entries().to_vec();
                }
                return;
            }
        }
        if let Some(cursor) = Cursor::new(self.mode, self.dtb, piece.gva) {
            piece.state = PieceState::Walking;
            piece.cursor = Some(cursor);
        }
    }

    fn walk_pieces(&self, pieces: &mut [Piece<'_>]) {
        for _ in 0..self.mode.levels() {
            let entry_of = |piece: &Piece<'_>| match (&piece.state, &piece.cursor) {
                (PieceState::Walking, Some(cursor)) => Some(cursor.entry_gpa()),
                _ => None,
            };
            let mut wanted: Vec<Place> = pieces.iter().filter_map(entry_of).map(|gpa| (0, gpa)).collect();
            if wanted.is_empty() {
                break;
            }
            let values = self.entries(&mut wanted);
            for piece in pieces.iter_mut() {
                let Some(gpa) = entry_of(piece) else { continue };
                let value = wanted
                    .binary_search(&(0, gpa))
                    .ok()
                    .and_then(|i| values.get(i).copied().flatten());
                let progress = match (value, &mut piece.cursor) {
                    (Some(value), Some(cursor)) => cursor.feed(value),
                    _ => {
                        piece.state = PieceState::Failed;
                        continue;
                    }
                };
                match progress {
                    Progress::Table => {}
                    Progress::Fault(_) => piece.state = PieceState::Failed,
                    Progress::Page(page) => {
                        piece.state = PieceState::Page(page);
                        if let Some(cursor) = piece.cursor.as_ref().filter(|_| self.live) {
                            let mut evidence = [Evidence::default(); DEPTH];
                            let n = self.evidence_of(cursor.steps(), &mut evidence);
                            piece.evidence = evidence.get(..n).unwrap_or_default().to_vec();
                        }
                    }
                }
            }
        }
    }

    /// Sorts `wanted`, drops what is there twice, and reads the entries.
    fn entries(&self, wanted: &mut Vec<Place>) -> Vec<Option<u64>> {
        wanted.sort_unstable();
        wanted.dedup();
        let size = usize::from(self.mode.entry_size());
        let mut bytes = vec![[0u8; 8]; wanted.len()];
        let mut reads: Vec<_> = wanted
            .iter()
            .zip(&mut bytes)
            .map(|(&(_, gpa), to)| crate::ReadOp::new(gpa, to.get_mut(..size).unwrap_or_default()))
            .collect();
        self.memory.read_batch(&mut reads);
        let fine: Vec<bool> = reads.iter().map(|read| read.result.is_ok()).collect();
        drop(reads);
        bytes
            .iter()
            .zip(fine)
            .map(|(b, fine)| fine.then(|| u64::from_le_bytes(*b)))
            .collect()
    }

    /// Fills the pieces whose page is known, then reads the evidence of all; says which pieces it proves.
    fn fetch_pieces(&self, pieces: &mut [Piece<'_>]) -> Vec<bool> {
        // Root entries of all first, last entries last: see `Inner::holds`.
        let place = |(depth, e): (usize, &Evidence)| (depth, e.place);
        let mut wanted: Vec<Place> = pieces
            .iter()
            .flat_map(|p| p.evidence.iter().enumerate().map(place))
            .collect();
        let mut read = vec![false; pieces.len()];
        {
            let mut ops = Vec::with_capacity(pieces.len());
            let mut which = Vec::with_capacity(pieces.len());
            for (i, piece) in pieces.iter_mut().enumerate() {
                if let PieceState::Page(page) = piece.state {
                    ops.push(crate::ReadOp::new(page.gpa, piece.buf));
                    which.push(i);
                }
            }
            self.memory.read_batch(&mut ops);
            for (op, i) in ops.iter().zip(which) {
                if let Some(read) = read.get_mut(i) {
                    *read = op.result.is_ok();
                }
            }
        }
        // After the bytes, in a request of its own.
        let values = self.entries(&mut wanted);
        let holds = |e: (usize, &Evidence)| {
            let now = wanted
                .binary_search(&place(e))
                .ok()
                .and_then(|i| values.get(i).copied().flatten());
            now == Some(e.1.value)
        };
        pieces
            .iter()
            .zip(read)
            .map(|(piece, read)| read && piece.evidence.iter().enumerate().all(holds))
            .collect()
    }
}

/// Where an entry lies, and how many tables lead there: requests go out in this order.
type Place = (usize, Gpa);

/// A part of a read that lies in one page.
struct Piece<'b> {
    op: usize,
    gva: Gva,
    buf: &'b mut [u8],
    state: PieceState,
    cursor: Option<Cursor>,
    evidence: Vec<Evidence>,
}

enum PieceState {
    Walking,
    Page(Resolved),
    Failed,
}
