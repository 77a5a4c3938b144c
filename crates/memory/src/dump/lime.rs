//! LiME dumps: each range of memory behind a header of 32 bytes (LiME's `doc/README.md`, "Spec", version 1).

use super::bytes::{slice, u32_at, u64_at};
use super::cover::Cover;

/// At the start of every header.
pub(super) const MAGIC: u32 = 0x4c69_4d45;
/// Length of a header: magic, version, first and last address, eight reserved bytes.
const HEADER_LEN: u64 = 32;
/// Ranges read at most. A machine has tens; this is a bound on work, not on machines.
const MAX_RANGES: usize = 1 << 20;

/// Follows the chain of headers. A header that cannot be ends it: where the next would be is not known.
pub(super) fn parse(data: &[u8], file_len: u64, cover: &mut Cover, notes: &mut Vec<String>) {
    let mut at = 0u64;
    for _ in 0..MAX_RANGES {
        if at >= file_len {
            return;
        }
        let head = slice(data, at, HEADER_LEN);
        let header = (
            u32_at(head, 0),
            u32_at(head, 4),
            u64_at(head, 8),
            u64_at(head, 16),
        );
        let (Some(magic), Some(version), Some(first), Some(last)) = header else {
            notes.push(format!("the file ends inside a LiME header, at {at:#x}"));
            return;
        };
        if magic != MAGIC || version != 1 {
            notes.push(format!(
                "no LiME header where one should be, at {at:#x}: the {:#x} bytes from there on are not read",
                file_len - at
            ));
            return;
        }
        let Some(len) = last.checked_sub(first).and_then(|n| n.checked_add(1)) else {
            notes.push(format!(
                "a LiME header at {at:#x} gives an impossible range: the rest is not read"
            ));
            return;
        };
        let body = at.saturating_add(HEADER_LEN);
        cover.add(first, len, body, len);
        let Some(next) = body.checked_add(len) else { return };
        at = next;
    }
    notes.push(format!(
        "more than {MAX_RANGES} LiME ranges: the rest is not read"
    ));
}
