//! The bytes of a dump file in their order, also where the file holds them in another.
//!
//! makedumpfile's flattened form, which QEMU too writes kdump files in, is made for pipes: a header of 4096 bytes, then records
//! of an offset, a length (both big-endian, 64 bits) and that many bytes for that place, up to one with an offset of −1
//! (makedumpfile's `makedumpfile.h`, struct makedumpfile_header and makedumpfile_data_header).

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::bytes;

/// At the start of a flattened file.
pub(super) const FLATTENED: &[u8] = b"makedumpfile\0";
/// Where its records begin.
const RECORDS: u64 = 4096;
/// Length of a record's header.
const RECORD: u64 = 16;
/// The offset of the record that ends the file.
const END: u64 = u64::MAX;

/// Which part of a flattened file belongs where.
#[derive(Clone, Debug, Default)]
pub(super) struct Flattened {
    /// Start → end, and where in the flattened file: disjoint.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl Flattened {
    /// Follows the records. What comes later counts, as it would be written over what was there.
    pub(super) fn of(data: &[u8], file_len: u64, notes: &mut Vec<String>) -> Self {
        let mut flattened = Self::default();
        let mut at = RECORDS;
        // Each record takes its 16 bytes.
        loop {
            let big = |at| bytes::array(data, at).map(u64::from_be_bytes);
            let (Some(offset), Some(len)) = (big(at), big(at + 8)) else {
                notes.push(format!(
                    "the flattened file ends without its last record, at {file_len:#x}: what should follow is missing"
                ));
                break;
            };
            if offset == END {
                break;
            }
            let body = at + RECORD;
            let (Some(end), Some(next)) = (offset.checked_add(len), body.checked_add(len)) else {
                notes.push(format!("an impossible record at {at:#x}: the rest is not read"));
                break;
            };
            let there = len.min(file_len.saturating_sub(body));
            flattened.put(offset, end.min(offset + there), body);
            at = next;
        }
        flattened
    }

    fn put(&mut self, start: u64, end: u64, body: u64) {
        if start >= end {
            return;
        }
        // What lies under it, from the piece that begins before it on.
        let first = self.pieces.range(..=start).next_back().map_or(start, |(&s, _)| s);
        let under: Vec<_> = self.pieces.range(first..end).map(|(&s, &p)| (s, p)).collect();
        for (s, (e, place)) in under {
            if e <= start {
                continue;
            }
            self.pieces.remove(&s);
            if s < start {
                self.pieces.insert(s, (start, place));
            }
            if e > end {
                self.pieces.insert(end, (e, place + (end - s)));
            }
        }
        self.pieces.insert(start, (end, body));
    }

    /// Whole pieces of a file that was not flattened are of this length.
    fn len(&self) -> u64 {
        self.pieces.values().map(|&(end, _)| end).max().unwrap_or(0)
    }
}

/// A file's bytes, by the offsets that its format speaks of.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    data: &'a [u8],
    len: u64,
    flattened: Option<&'a Flattened>,
}

impl<'a> View<'a> {
    /// Of a file of `len` bytes, of which `data` is the beginning or all.
    pub(super) fn new(data: &'a [u8], len: u64, flattened: Option<&'a Flattened>) -> Self {
        let len = flattened.map_or(len, Flattened::len);
        Self { data, len, flattened }
    }

    /// How many bytes there are, holes included.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes at `at`; `None` where not all of them are there.
    pub(super) fn get(&self, at: u64, len: u64) -> Option<Cow<'a, [u8]>> {
        let Some(flattened) = self.flattened else {
            let found = bytes::slice(self.data, at, len);
            return (found.len() as u64 == len).then_some(Cow::Borrowed(found));
        };
        let end = at.checked_add(len)?;
        let mut whole = Vec::new();
        let mut next = at;
        while next < end {
            let (&start, &(stop, place)) = flattened.pieces.range(..=next).next_back()?;
            if stop <= next {
                // makedumpfile -R would leave a hole here, which reads as zeros. Nothing that is asked for lies in one, but in a
                // file that was cut.
                return None;
            }
            let now = (stop - next).min(end - next);
            let part = bytes::slice(self.data, place + (next - start), now);
            if part.len() as u64 != now {
                return None;
            }
            if now == len {
                return Some(Cow::Borrowed(part));
            }
            whole.extend_from_slice(part);
            next += now;
        }
        Some(Cow::Owned(whole))
    }

    /// The first offset from `at` on at which there is something.
    pub(super) fn next(&self, at: u64) -> Option<u64> {
        let Some(flattened) = self.flattened else {
            return (at < self.data.len() as u64).then_some(at);
        };
        let before = flattened.pieces.range(..=at).next_back();
        if before.is_some_and(|(_, &(end, _))| end > at) {
            return Some(at);
        }
        flattened.pieces.range(at..).next().map(|(&start, _)| start)
    }

    /// Up to `len` bytes at `at`: as many as there are in one piece.
    pub(super) fn some(&self, at: u64, len: u64) -> &'a [u8] {
        let Some(flattened) = self.flattened else {
            return bytes::slice(self.data, at, len);
        };
        match flattened.pieces.range(..=at).next_back() {
            Some((&start, &(end, place))) if end > at => {
                bytes::slice(self.data, place + (at - start), len.min(end - at))
            }
            _ => &[],
        }
    }

    pub(super) fn u32(&self, at: u64) -> Option<u32> {
        bytes::u32_at(&self.get(at, 4)?, 0)
    }

    pub(super) fn u64(&self, at: u64) -> Option<u64> {
        bytes::u64_at(&self.get(at, 8)?, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a file into which the records are written one after the other.
        #[test]
        fn later_records_lie_over_earlier_ones(records in prop::collection::vec((0u64..60, prop::collection::vec(1u8.., 0..20)), 0..12), cut in 0usize..40) {
            let mut file = vec![0; RECORDS as usize];
            let mut model = [0u8; 100];
            for (offset, body) in &records {
                file.extend(offset.to_be_bytes());
                file.extend((body.len() as u64).to_be_bytes());
                file.extend(body);
            }
            let whole = file.len() - RECORDS as usize;
            file.truncate(file.len() - cut.min(whole));
            let mut at = RECORDS as usize;
            for (offset, body) in &records {
                at += RECORD as usize;
                for (i, byte) in body.iter().enumerate() {
                    if at + i < file.len() {
                        model[*offset as usize + i] = *byte;
                    }
                }
                at += body.len();
            }
            let flattened = Flattened::of(&file, file.len() as u64, &mut Vec::new());
            let view = View::new(&file, file.len() as u64, Some(&flattened));
            for at in 0..90 {
                for len in [1, 3, 9] {
                    let want = &model[at..at + len];
                    match view.get(at as u64, len as u64) {
                        Some(got) => prop_assert_eq!(&got[..], want),
                        None => prop_assert!(want.contains(&0)),
                    }
                }
                prop_assert_eq!(view.some(at as u64, 1).first().copied().unwrap_or(0), model[at]);
                let next = (at..100).find(|&i| model[i] != 0).map(|i| i as u64);
                prop_assert_eq!(view.next(at as u64), next);
            }
        }
    }
}
