//! AVML's compressed dumps: LiME's headers under another magic, version 2, each before a stream of Snappy frames and the length
//! of that stream.
//!
//! Sources: AVML's `src/image.rs`; Snappy's `framing_format.txt`, which bounds what a frame unpacks to by 64 KiB.

use super::bytes::{slice, u32_at, u64_at};
use super::cover::PHYSICAL_END;
use super::pages::{Stored, Unit};
use crate::Region;
use vmsight_arch::Gpa;

/// At the start of every header.
pub(super) const MAGIC: u32 = 0x4c4d_5641;
pub(super) const VERSION: u32 = 2;
/// Bytes of memory that AVML puts behind one header at most.
pub(super) const MAX_BLOCK: usize = 16 << 20;
const HEADER: u64 = 32;
/// Bytes that a frame unpacks to at most.
const MAX_FRAME: u64 = 1 << 16;

/// Follows headers and frames; nothing is unpacked. Units are in the order of the file.
pub(super) fn parse(
    data: &[u8],
    file_len: u64,
    missing: &mut Vec<Region>,
    notes: &mut Vec<String>,
) -> Vec<Unit> {
    let mut units = Vec::new();
    let mut at = 0u64;
    // Each header takes its 32 bytes.
    while at < file_len {
        let head = slice(data, at, HEADER);
        let fields = (
            u32_at(head, 0),
            u32_at(head, 4),
            u64_at(head, 8),
            u64_at(head, 16),
        );
        let (Some(magic), Some(version), Some(first), Some(last)) = fields else {
            notes.push(format!("the file ends inside an AVML header, at {at:#x}"));
            break;
        };
        if magic != MAGIC || version != VERSION {
            notes.push(format!(
                "no AVML header where one should be, at {at:#x}: the {:#x} bytes from there on are not read",
                file_len - at
            ));
            break;
        }
        let end = last
            .checked_add(1)
            .filter(|&end| end > first && end <= PHYSICAL_END);
        let Some(end) = end else {
            notes.push(format!(
                "an AVML header at {at:#x} gives an impossible range: the rest is not read"
            ));
            break;
        };
        let body = at + HEADER;
        let (reached, next) = frames(data, body, first, end, &mut units);
        if reached < end {
            missing.push(Region {
                start: Gpa(reached),
                len: end - reached,
            });
            notes.push(format!(
                "the block at {at:#x} is cut or broken: the file lacks {reached:#x}-{end:#x} and what should follow"
            ));
            break;
        }
        if u64_at(data, next).is_some_and(|len| len != next - body) {
            notes.push(format!("the block at {at:#x} gives another length than it has"));
        }
        at = next + 8;
    }
    units
}

/// Adds the frames that begin at `at` as units from `gpa` on, up to `end`. Gives the address and the place in the file where they end.
fn frames(data: &[u8], mut at: u64, mut gpa: u64, end: u64, units: &mut Vec<Unit>) -> (u64, u64) {
    while gpa < end {
        let Some(head) = u32_at(data, at) else { break };
        let (kind, len) = (head & 0xff, u64::from(head >> 8));
        let body = slice(data, at + 4, len);
        if body.len() as u64 != len {
            break;
        }
        // Behind a checksum of four bytes: packed, with the length of what it unpacks to in front, or as it is.
        let unpacked = match kind {
            0 => body
                .get(4..)
                .and_then(|packed| snap::raw::decompress_len(packed).ok()),
            1 => body.len().checked_sub(4),
            // The name that begins a stream, padding, and what may be skipped.
            0x80..=0xff => {
                at += 4 + len;
                continue;
            }
            _ => None,
        };
        let Some(unpacked) = unpacked
            .map(|n| n as u64)
            .filter(|&n| n <= MAX_FRAME && n <= end - gpa)
        else {
            break;
        };
        if unpacked > 0 {
            units.push(Unit {
                gpa,
                len: unpacked as u32,
                stored: Stored::Frame {
                    offset: at,
                    len: 4 + len as u32,
                },
            });
        }
        gpa += unpacked;
        at += 4 + len;
    }
    (gpa, at)
}
