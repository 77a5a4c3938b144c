//! The names: found by walking them and comparing with the markers.

use std::ops::Range;

use super::read_u32;
use super::tokens::Tokens;
use crate::table::MAX_SYMBOLS;

/// Symbols between two markers.
pub(super) const BLOCK: usize = 256;

/// How far before the tokens the names may begin.
const FAR: usize = 64 << 20;

/// Where the names lie in the section.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// Offset of num_syms.
    pub(super) count_at: usize,
    /// How many symbols.
    pub(super) count: usize,
    /// The names, up to the markers.
    pub(super) names: Range<usize>,
    /// The markers.
    pub(super) markers: Range<usize>,
}

impl Names {
    pub(super) fn blocks(&self) -> usize {
        self.count.div_ceil(BLOCK)
    }

    /// The section offsets between which the names of a block lie. The last block has no marker behind it.
    pub(super) fn block(&self, bytes: &[u8], block: usize) -> Option<Range<usize>> {
        let marker = |i: usize| read_u32(bytes, self.markers.start + 4 * i).map(|v| v as usize);
        let start = self.names.start.checked_add(marker(block)?)?;
        let end = if block + 1 < self.blocks() {
            self.names.start.checked_add(marker(block + 1)?)?
        } else {
            self.names.end
        };
        (start <= end && end <= self.names.end).then_some(start..end)
    }
}

/// The names that belong to `tokens`: the nearest place before them where a count is followed by names whose first block
/// ends where the markers say.
///
/// Each candidate costs steps out of `budget`, so that a guest full of likenesses does not keep us for hours.
pub(super) fn find(bytes: &[u8], tokens: &Tokens, budget: &mut usize) -> Option<Names> {
    let kinds = kinds(tokens);
    let floor = tokens.table.saturating_sub(FAR);
    let before = bytes.get(floor..tokens.table)?;
    before.rchunks_exact(4).enumerate().find_map(|(i, chunk)| {
        let count = u32::from_le_bytes(chunk.try_into().unwrap_or_default()) as usize;
        if count == 0 || count > MAX_SYMBOLS {
            return None;
        }
        let count_at = tokens.table - 4 * (i + 1);
        // The names are aligned to 8, or (7.2) to 4. A name is never empty, so padding is not taken for one.
        [count_at + 4, count_at + 8].into_iter().find_map(|start| {
            let first = walk(bytes, &kinds, start, tokens.table, count.min(BLOCK), budget)?;
            at(
                bytes,
                tokens,
                &kinds,
                Candidate {
                    count_at,
                    start,
                    count,
                    first,
                },
                budget,
            )
        })
    })
}

/// A count with as many names behind it as a block has.
struct Candidate {
    count_at: usize,
    start: usize,
    count: usize,
    /// Where the second block begins.
    first: usize,
}

fn at(
    bytes: &[u8],
    tokens: &Tokens,
    kinds: &[bool; 256],
    candidate: Candidate,
    budget: &mut usize,
) -> Option<Names> {
    let Candidate {
        count_at,
        start,
        count,
        first,
    } = candidate;
    let blocks = count.div_ceil(BLOCK);
    let markers_len = 4 * blocks;
    // What may stand between markers and tokens: nothing, or (6.2, 6.3, and 6.1 as distributions patch it) the order of
    // the names; and the padding of both.
    let gaps = [0, 3 * count, 4 * count].map(|gap| gap.next_multiple_of(4));
    let gaps = gaps.into_iter().flat_map(|gap| [gap, gap + 4, gap + 8]);
    gaps.into_iter().find_map(|gap| {
        let markers = tokens.table.checked_sub(gap)?.checked_sub(markers_len)?;
        // What lies between a last name and the markers is padding.
        let ends = |end: usize| markers.checked_sub(end).is_some_and(|pad| pad < 8);
        if markers < first || read_u32(bytes, markers)? != 0 {
            return None;
        }
        if blocks > 1 {
            if read_u32(bytes, markers + 4)? as usize != first - start {
                return None;
            }
            // The last block too, unless it is damaged: so the count is proven.
            let last = start.checked_add(read_u32(bytes, markers + 4 * (blocks - 1))? as usize)?;
            if walk(bytes, kinds, last, markers, count - BLOCK * (blocks - 1), budget)
                .is_some_and(|end| !ends(end))
            {
                return None;
            }
        } else if !ends(first) {
            return None;
        }
        Some(Names {
            count_at,
            count,
            names: start..markers,
            markers: markers..markers + markers_len,
        })
    })
}

/// Steps over `count` names from `at`: the end of the last. `None` if one passes `end` or has no kind.
fn walk(
    bytes: &[u8],
    kinds: &[bool; 256],
    mut at: usize,
    end: usize,
    count: usize,
    budget: &mut usize,
) -> Option<usize> {
    let bytes = bytes.get(..end)?;
    for _ in 0..count {
        *budget = budget.checked_sub(1)?;
        let (first, len) = length(bytes, at)?;
        if !kinds[usize::from(*bytes.get(first)?)] {
            return None;
        }
        at = first + len;
    }
    (at <= end).then_some(at)
}

/// Where the token numbers of the name at `at` begin, and how many there are: at least one.
#[inline]
pub(super) fn length(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let low = usize::from(*bytes.get(at)?);
    let (first, len) = if low & 0x80 == 0 {
        (at + 1, low)
    } else {
        (at + 2, (low & 0x7f) | usize::from(*bytes.get(at + 1)?) << 7)
    };
    (len != 0 && len < 1 << 14).then_some((first, len))
}

/// Which tokens begin with a letter that nm(1) uses for a kind of symbol.
pub(super) fn kinds(tokens: &Tokens) -> [bool; 256] {
    std::array::from_fn(|i| {
        tokens.lens[i] > 0 && b"aAbBcCdDgGiInNpPrRsStTuUvVwW-?".contains(&tokens.heads[i][0])
    })
}
