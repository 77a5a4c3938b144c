//! AVML's compressed LiME: blocks of at most 16 MiB, each a header, Snappy frames, and how many bytes of frames there are.
//!
//! Source: AVML's `src/image.rs`; Snappy's `framing_format.txt`.

use std::io::Write;

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;
use vmsight_arch::Gpa;

use super::WriteError;
use super::file::OutFile;
use super::pieces::{Piece, Pieces};
use super::plain;
use crate::Region;
use crate::dump::avml::{MAGIC, MAX_BLOCK, VERSION};

/// Bytes that a Snappy frame holds at most.
const FRAME: usize = 1 << 16;
/// Length of the chunk that begins each stream of frames.
const STREAM_START: usize = 10;

pub(super) fn write(
    out: &mut OutFile<'_>,
    regions: &[Region],
    pieces: &mut Pieces<'_>,
) -> Result<(), WriteError> {
    for region in regions {
        let mut block = Block {
            start: region.start,
            bytes: Vec::with_capacity(MAX_BLOCK),
        };
        pieces.each(*region, |_, piece, _| match piece {
            Piece::Untouched(mut len) => {
                while len > 0 {
                    let now = (MAX_BLOCK - block.bytes.len()).min(usize::try_from(len).unwrap_or(MAX_BLOCK));
                    block.bytes.resize(block.bytes.len() + now, 0);
                    len -= now as u64;
                    block.write_full(out)?;
                }
                Ok(())
            }
            Piece::Bytes(bytes) => {
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let (now, tail) = rest.split_at(rest.len().min(MAX_BLOCK - block.bytes.len()));
                    block.bytes.extend_from_slice(now);
                    rest = tail;
                    block.write_full(out)?;
                }
                Ok(())
            }
        })?;
        block.write(out)?;
    }
    Ok(())
}

/// A block that is being gathered.
struct Block {
    start: Gpa,
    bytes: Vec<u8>,
}

impl Block {
    fn write_full(&mut self, out: &mut OutFile<'_>) -> Result<(), WriteError> {
        match self.bytes.len() < MAX_BLOCK {
            true => Ok(()),
            false => self.write(out),
        }
    }

    /// Writes what was gathered and begins the next.
    fn write(&mut self, out: &mut OutFile<'_>) -> Result<(), WriteError> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let region = Region {
            start: self.start,
            len: self.bytes.len() as u64,
        };
        // Frames do not depend on each other; only the first begins a stream.
        let frames: Vec<Vec<u8>> = self
            .bytes
            .par_chunks(FRAME)
            .enumerate()
            .map(|(index, bytes)| {
                let frame = frame(bytes);
                match index {
                    0 => frame,
                    _ => frame.get(STREAM_START..).unwrap_or_default().to_vec(),
                }
            })
            .collect();
        out.put(plain::header(MAGIC, VERSION, region))?;
        let mut len = 0u64;
        for frame in frames {
            len += frame.len() as u64;
            out.put(frame)?;
        }
        out.put(len.to_le_bytes().to_vec())?;
        self.start = region.end();
        self.bytes.clear();
        Ok(())
    }
}

/// A stream of one frame.
fn frame(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = snap::write::FrameEncoder::new(Vec::with_capacity(bytes.len() / 4));
    // Into memory: this does not fail.
    let _ = encoder.write_all(bytes);
    encoder.into_inner().unwrap_or_default()
}
