//! Many reads in one go.

use crate::MemoryError;
use crate::guest::GuestMemory;
use crate::process::{Piece, ProcessMemory};
use crate::slot::{Backing, process_error};
use std::sync::Arc;
use vmsight_arch::Gpa;

/// One read of a batch.
#[derive(Debug)]
pub struct ReadOp<'a> {
    /// Where to read.
    pub gpa: Gpa,
    /// What to fill.
    pub buf: &'a mut [u8],
    /// How it went: set by [`GuestMemory::read_batch`].
    pub result: Result<(), MemoryError>,
}

impl<'a> ReadOp<'a> {
    /// A read that has not been done yet.
    pub fn new(gpa: Gpa, buf: &'a mut [u8]) -> Self {
        Self {
            gpa,
            buf,
            result: Ok(()),
        }
    }
}

/// A piece of an op that lies in another process.
struct Remote<'a> {
    op: usize,
    gpa: Gpa,
    process: &'a Arc<ProcessMemory>,
}

pub(crate) fn read(memory: &GuestMemory, ops: &mut [ReadOp<'_>]) {
    let mut remote: Vec<Remote<'_>> = Vec::with_capacity(ops.len());
    let mut pieces: Vec<Piece<'_>> = Vec::with_capacity(ops.len());
    let mut results: Vec<(usize, MemoryError)> = Vec::new();
    for (index, op) in ops.iter_mut().enumerate() {
        op.result = Ok(());
        let mut rest = &mut *op.buf;
        for part in memory.parts(op.gpa, rest.len()) {
            let (slot, at, range) = match part {
                Ok(part) => part,
                Err(error) => {
                    op.result = Err(error);
                    break;
                }
            };
            let Some((buf, tail)) = std::mem::take(&mut rest).split_at_mut_checked(range.len()) else {
                break;
            };
            rest = tail;
            match &slot.backing {
                Backing::Process { process, hva, .. } => {
                    let gpa = Gpa(slot.region.start.0.wrapping_add(at));
                    remote.push(Remote {
                        op: index,
                        gpa,
                        process,
                    });
                    pieces.push(Piece {
                        hva: hva.wrapping_add(at),
                        buf,
                        result: Ok(()),
                    });
                }
                Backing::Mapped { .. } | Backing::Custom { .. } => {
                    if let Err(error) = slot.read(at, buf) {
                        op.result = Err(error);
                        break;
                    }
                }
            }
        }
    }
    // One call per run of pieces of the same process; a guest has one process.
    let mut done = 0;
    while let Some(first) = remote.get(done) {
        let run = remote
            .iter()
            .skip(done)
            .take_while(|r| Arc::ptr_eq(r.process, first.process))
            .count();
        let Some(batch) = pieces.get_mut(done..done + run) else {
            break;
        };
        first.process.read_many(batch);
        for (piece, remote) in batch.iter().zip(remote.iter().skip(done)) {
            if let Err(error) = piece.result {
                results.push((
                    remote.op,
                    process_error(error, remote.process, remote.gpa, piece.hva, 0),
                ));
            }
        }
        done += run;
    }
    drop(pieces);
    for (index, error) in results {
        // The first piece that failed speaks for its op.
        if let Some(op) = ops.get_mut(index).filter(|op| op.result.is_ok()) {
            op.result = Err(error);
        }
    }
}
