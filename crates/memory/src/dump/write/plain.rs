//! Raw images and LiME: memory as it is.

use super::WriteError;
use super::file::OutFile;
use super::pieces::{Piece, Pieces};
use crate::Region;
use crate::dump::lime;

/// Each region at its address.
pub(super) fn raw(
    out: &mut OutFile<'_>,
    regions: &[Region],
    pieces: &mut Pieces<'_>,
) -> Result<(), WriteError> {
    for region in regions {
        let gap = region.start.0.saturating_sub(out.at());
        out.zeros(gap)?;
        memory(out, *region, pieces)?;
    }
    Ok(())
}

/// Each region behind its header.
pub(super) fn lime(
    out: &mut OutFile<'_>,
    regions: &[Region],
    pieces: &mut Pieces<'_>,
) -> Result<(), WriteError> {
    for region in regions {
        out.put(header(lime::MAGIC, 1, *region))?;
        memory(out, *region, pieces)?;
    }
    Ok(())
}

/// Magic, version, first and last address, eight reserved bytes.
pub(super) fn header(magic: u32, version: u32, region: Region) -> Vec<u8> {
    let mut header = Vec::with_capacity(32);
    header.extend(magic.to_le_bytes());
    header.extend(version.to_le_bytes());
    header.extend(region.start.0.to_le_bytes());
    header.extend(region.end().0.saturating_sub(1).to_le_bytes());
    header.extend([0; 8]);
    header
}

/// The bytes of a region.
pub(super) fn memory(
    out: &mut OutFile<'_>,
    region: Region,
    pieces: &mut Pieces<'_>,
) -> Result<(), WriteError> {
    pieces.each(region, |_, piece, _| match piece {
        Piece::Untouched(len) => out.zeros(len),
        Piece::Bytes(bytes) => out.put_memory(bytes),
    })
}
