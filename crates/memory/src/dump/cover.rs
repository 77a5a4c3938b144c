//! Segments as a file claims them, made into disjoint ranges that really are in the file.

use crate::Region;
use std::collections::BTreeMap;
use vmsight_arch::Gpa;

/// No x86-64 or AArch64 machine has physical addresses from here on (52 bits; SDM vol. 3A 4.1.4, Arm ARM D8.2).
pub(crate) const PHYSICAL_END: u64 = 1 << 52;

/// Ranges of the same kind that a note lists one by one; more are counted.
const LISTED: usize = 8;

/// A range of guest-physical memory and where its bytes are in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its first address.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Where its first byte is in the file.
    pub offset: u64,
}

/// Takes the segments of a file in their order and keeps of each what is possible, present, and not taken yet.
#[derive(Debug)]
pub(crate) struct Cover {
    file_len: u64,
    /// Start → end of what is claimed, neighbours joined.
    claimed: BTreeMap<u64, u64>,
    segments: Vec<Segment>,
    missing: Vec<Region>,
    overlapping: u64,
    impossible: Vec<Region>,
    impossible_count: u64,
}

impl Cover {
    pub(crate) fn new(file_len: u64) -> Self {
        Self {
            file_len,
            claimed: BTreeMap::new(),
            segments: Vec::new(),
            missing: Vec::new(),
            overlapping: 0,
            impossible: Vec::new(),
            impossible_count: 0,
        }
    }

    /// The file says: `len` bytes at `gpa`, the first `stored` of them at `offset`.
    pub(crate) fn add(&mut self, gpa: u64, len: u64, offset: u64, stored: u64) {
        if len == 0 {
            return;
        }
        let Some(end) = gpa.checked_add(len).filter(|&end| end <= PHYSICAL_END) else {
            self.impossible_count += 1;
            if self.impossible.len() < LISTED {
                self.impossible.push(Region {
                    start: Gpa(gpa),
                    len: len.min(u64::MAX - gpa),
                });
            }
            return;
        };
        let present = stored.min(len).min(self.file_len.saturating_sub(offset));
        let mut overlaps = false;
        for (start, end) in self.claim(gpa, end, &mut overlaps) {
            // What of this piece is in the file, and what is not.
            let cut = end.min(gpa + present).max(start);
            if cut > start {
                let offset = offset + (start - gpa);
                self.segments.push(Segment {
                    gpa: Gpa(start),
                    len: cut - start,
                    offset,
                });
            }
            if end > cut {
                self.missing.push(Region {
                    start: Gpa(cut),
                    len: end - cut,
                });
            }
        }
        self.overlapping += u64::from(overlaps);
    }

    /// Claims `[start, end)` and returns the parts of it nobody had claimed before. What was claimed is joined, so the
    /// work over all calls grows with the number of calls only, whatever the ranges are.
    fn claim(&mut self, start: u64, end: u64, overlaps: &mut bool) -> Vec<(u64, u64)> {
        let before = self
            .claimed
            .range(..=start)
            .next_back()
            .filter(|&(_, &e)| e >= start)
            .map(|(&s, _)| s);
        let from = before.unwrap_or(start);
        let touched: Vec<(u64, u64)> = self.claimed.range(from..=end).map(|(&s, &e)| (s, e)).collect();
        let (mut free, mut at) = (Vec::new(), start);
        let (mut joined_start, mut joined_end) = (start, end);
        for (s, e) in touched {
            self.claimed.remove(&s);
            joined_start = joined_start.min(s);
            joined_end = joined_end.max(e);
            *overlaps |= s < end && e > start;
            if s > at {
                free.push((at, s));
            }
            at = at.max(e);
        }
        if at < end {
            free.push((at, end));
        }
        self.claimed.insert(joined_start, joined_end);
        free
    }

    /// The segments by address, what is missing, and what there is to say about it.
    pub(crate) fn finish(mut self, notes: &mut Vec<String>) -> (Vec<Segment>, Vec<Region>) {
        self.segments.sort_by_key(|segment| segment.gpa);
        self.missing.sort_by_key(|region| region.start);
        let mut missing: Vec<Region> = Vec::with_capacity(self.missing.len());
        for region in self.missing {
            match missing.last_mut() {
                Some(last) if last.end() == region.start => last.len += region.len,
                _ => missing.push(region),
            }
        }
        if !missing.is_empty() {
            notes.push(format!("the file lacks {}", list(&missing, missing.len() as u64)));
        }
        if self.overlapping > 0 {
            notes.push(format!(
                "{} segments describe memory that an earlier one already describes; the first counts",
                self.overlapping
            ));
        }
        if self.impossible_count > 0 {
            let ranges = list(&self.impossible, self.impossible_count);
            notes.push(format!("left out segments at impossible addresses: {ranges}"));
        }
        (self.segments, missing)
    }
}

/// The first few of the regions in words, and how many more there are.
pub(crate) fn list(regions: &[Region], count: u64) -> String {
    let shown: Vec<String> = regions.iter().take(LISTED).map(Region::to_string).collect();
    let more = count.saturating_sub(shown.len() as u64);
    let tail = if more > 0 {
        format!(" and {more} more ranges")
    } else {
        String::new()
    };
    format!("{}{tail}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against an array with one entry for each byte.
        #[test]
        fn the_first_claim_of_every_byte_wins(claims in prop::collection::vec((0u64..200, 0u64..60, 0u64..300, 0u64..70), 0..30)) {
            let file_len = 250;
            let mut cover = Cover::new(file_len);
            let mut model: [Option<Option<u64>>; 300] = [None; 300];
            for &(gpa, len, offset, stored) in &claims {
                cover.add(gpa, len, offset, stored);
                for i in 0..len {
                    let there = i < stored && offset + i < file_len;
                    model[(gpa + i) as usize].get_or_insert(there.then_some(offset + i));
                }
            }
            let (segments, missing) = cover.finish(&mut Vec::new());
            let mut seen: [Option<Option<u64>>; 300] = [None; 300];
            for s in &segments {
                prop_assert!(s.len > 0 && s.offset + s.len <= file_len);
                for i in 0..s.len {
                    prop_assert!(seen[(s.gpa.0 + i) as usize].replace(Some(s.offset + i)).is_none());
                }
            }
            for r in &missing {
                for i in 0..r.len {
                    prop_assert!(seen[(r.start.0 + i) as usize].replace(None).is_none());
                }
            }
            prop_assert_eq!(seen, model);
        }
    }

    #[test]
    fn absurd_numbers_are_refused_or_cut() {
        let mut cover = Cover::new(100);
        cover.add(u64::MAX, 2, 0, 2);
        cover.add(1 << 63, 1 << 63, 0, 1);
        cover.add(PHYSICAL_END - 1, 1, 99, u64::MAX);
        cover.add(0, PHYSICAL_END, u64::MAX, u64::MAX);
        let mut notes = Vec::new();
        let (segments, missing) = cover.finish(&mut notes);
        assert_eq!(
            segments,
            [Segment {
                gpa: Gpa(PHYSICAL_END - 1),
                len: 1,
                offset: 99
            }]
        );
        assert_eq!(
            missing,
            [Region {
                start: Gpa(0),
                len: PHYSICAL_END - 1
            }]
        );
        assert_eq!(notes.len(), 3, "{notes:?}");
    }
}
