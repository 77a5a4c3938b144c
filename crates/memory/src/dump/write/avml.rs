//! AVML's compressed LiME: blocks of at most 16 MiB, each a header, Snappy frames, and how many bytes of frames there are.
//!
//! Source: AVML's `src/image.rs`; Snappy's `framing_format.txt`.

use std::io::Write;
use std::sync::OnceLock;

use rayon::iter::ParallelIterator;
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
/// Frames that are packed and written together.
const TOGETHER: usize = 16;
/// The chunk that begins each stream of frames.
const STREAM_START: &[u8] = b"\xff\x06\0\0sNaPpY";
/// What most frames hold.
const ZEROS: &[u8] = &[0; FRAME];

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
                    if block.bytes.is_empty() && len >= MAX_BLOCK as u64 {
                        block.write_zeros(out)?;
                        len -= MAX_BLOCK as u64;
                        continue;
                    }
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

    /// Writes a whole block of zeros. Nothing is gathered.
    fn write_zeros(&mut self, out: &mut OutFile<'_>) -> Result<(), WriteError> {
        let region = Region {
            start: self.start,
            len: MAX_BLOCK as u64,
        };
        put(out, region, vec![zero_frame().repeat(MAX_BLOCK / FRAME)])?;
        self.start = region.end();
        Ok(())
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
        // Frames do not depend on each other. Several in a row are one piece to write and to hash.
        let frames: Vec<Vec<u8>> = self
            .bytes
            .par_chunks(FRAME * TOGETHER)
            .map_init(encoder, frames)
            .collect();
        put(out, region, frames)?;
        self.start = region.end();
        self.bytes.clear();
        Ok(())
    }
}

type Encoder = snap::write::FrameEncoder<Vec<u8>>;

fn encoder() -> Encoder {
    Encoder::new(Vec::new())
}

/// Whole frames of these bytes, without what begins a stream.
fn frames(encoder: &mut Encoder, bytes: &[u8]) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes.len() / 4);
    for bytes in bytes.chunks(FRAME) {
        if bytes == ZEROS {
            all.extend_from_slice(zero_frame());
        } else {
            let frame = frame(encoder, bytes);
            all.extend_from_slice(frame);
        }
    }
    all
}

/// One frame, without what begins a stream.
fn frame<'e>(encoder: &'e mut Encoder, bytes: &[u8]) -> &'e [u8] {
    encoder.get_mut().clear();
    // Into memory: this does not fail.
    let _ = encoder.write_all(bytes).and_then(|()| encoder.flush());
    let frame = encoder.get_ref().as_slice();
    // An encoder begins a stream before its first frame.
    frame.strip_prefix(STREAM_START).unwrap_or(frame)
}

/// A frame of zeros, of which most guests' memory is full.
fn zero_frame() -> &'static [u8] {
    static FRAME_OF_ZEROS: OnceLock<Vec<u8>> = OnceLock::new();
    FRAME_OF_ZEROS.get_or_init(|| frame(&mut encoder(), ZEROS).to_vec())
}

/// Writes a block: its header, the frames, and how many bytes of frames there are.
fn put(out: &mut OutFile<'_>, region: Region, frames: Vec<Vec<u8>>) -> Result<(), WriteError> {
    out.put([plain::header(MAGIC, VERSION, region).as_slice(), STREAM_START].concat())?;
    let mut len = STREAM_START.len() as u64;
    for frames in frames {
        len += frames.len() as u64;
        out.put(frames)?;
    }
    out.put(len.to_le_bytes().to_vec())
}
