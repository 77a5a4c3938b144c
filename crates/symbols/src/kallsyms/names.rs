//! The names: found by walking them and comparing with the markers, expanded in parallel.

use std::ops::Range;

use rayon::prelude::*;

use super::read_u32;
use super::tokens::{INLINE, Tokens};
use crate::table::{MAX_NAME, MAX_SYMBOLS, SymbolTable, SymbolTableBuilder, hash, is_absolute};

/// Symbols between two markers.
pub(super) const BLOCK: usize = 256;

/// How far before the tokens the names may begin.
const FAR: usize = 64 << 20;

/// Bytes that the names of one block may have when expanded. The longest blocks seen have a quarter of this; it bounds
/// what a forged table can make us allocate.
const BLOCK_BYTES: usize = BLOCK * 128;

/// Where one name is expanded: room for the kind, the name, and what copying whole tokens writes behind it.
type Scratch = [u8; MAX_NAME + 1 + INLINE];

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
    fn block(&self, bytes: &[u8], block: usize) -> Option<Range<usize>> {
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
pub(super) fn find(bytes: &[u8], tokens: &Tokens) -> Option<Names> {
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
        [count_at + 4, count_at + 8]
            .into_iter()
            .find_map(|start| at(bytes, tokens, &kinds, count_at, start, count))
    })
}

fn at(
    bytes: &[u8],
    tokens: &Tokens,
    kinds: &[bool; 256],
    count_at: usize,
    start: usize,
    count: usize,
) -> Option<Names> {
    let first = walk(bytes, kinds, start, tokens.table, count.min(BLOCK))?;
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
            if walk(bytes, kinds, last, markers, count - BLOCK * (blocks - 1)).is_some_and(|end| !ends(end)) {
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
fn walk(bytes: &[u8], kinds: &[bool; 256], mut at: usize, end: usize, count: usize) -> Option<usize> {
    let bytes = bytes.get(..end)?;
    for _ in 0..count {
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
fn length(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let low = usize::from(*bytes.get(at)?);
    let (first, len) = if low & 0x80 == 0 {
        (at + 1, low)
    } else {
        (at + 2, (low & 0x7f) | usize::from(*bytes.get(at + 1)?) << 7)
    };
    (len != 0 && len < 1 << 14).then_some((first, len))
}

/// Which tokens begin with a letter that nm(1) uses for a kind of symbol.
fn kinds(tokens: &Tokens) -> [bool; 256] {
    std::array::from_fn(|i| {
        tokens.lens[i] > 0 && b"aAbBcCdDgGiInNpPrRsStTuUvVwW-?".contains(&tokens.heads[i][0])
    })
}

/// Expanded names. A block that contradicts the markers has none; `index` says which symbols are here.
#[derive(Default)]
pub(super) struct Decoded {
    /// The number of each symbol in the kernel's table.
    pub(super) index: Vec<u32>,
    pub(super) kinds: Vec<u8>,
    ends: Vec<u32>,
    names: Vec<u8>,
    hashes: Vec<u32>,
    /// How many blocks were good.
    pub(super) blocks: usize,
}

/// Expands all names.
pub(super) fn decode(bytes: &[u8], tokens: &Tokens, names: &Names) -> Decoded {
    let kinds = kinds(tokens);
    // Enough tasks to keep every thread busy, few enough that joining them costs nothing.
    let per_task = names.blocks().div_ceil(4 * rayon::current_num_threads()).max(16);
    let parts: Vec<Decoded> = (0..names.blocks().div_ceil(per_task))
        .into_par_iter()
        .map(|task| {
            let first = task * per_task;
            let mut part = Decoded::default();
            let mut scratch = [0; MAX_NAME + 1 + INLINE];
            for block in first..(first + per_task).min(names.blocks()) {
                part.block(bytes, tokens, &kinds, names, block, &mut scratch);
            }
            part
        })
        .collect();
    join(parts)
}

fn join(parts: Vec<Decoded>) -> Decoded {
    let total = |f: fn(&Decoded) -> usize| parts.iter().map(f).sum::<usize>();
    let count = total(|p| p.kinds.len());
    let mut all = Decoded {
        index: Vec::with_capacity(count),
        kinds: Vec::with_capacity(count),
        ends: Vec::with_capacity(count),
        names: Vec::with_capacity(total(|p| p.names.len())),
        hashes: Vec::with_capacity(count),
        blocks: 0,
    };
    for part in parts {
        let base = all.names.len() as u32;
        all.index.extend_from_slice(&part.index);
        all.kinds.extend_from_slice(&part.kinds);
        all.ends.extend(part.ends.iter().map(|e| e + base));
        all.names.extend_from_slice(&part.names);
        all.hashes.extend_from_slice(&part.hashes);
        all.blocks += part.blocks;
    }
    all
}

impl Decoded {
    /// Adds the names of one block, or none of them if the block does not end where it should.
    fn block(
        &mut self,
        bytes: &[u8],
        tokens: &Tokens,
        kinds: &[bool; 256],
        names: &Names,
        block: usize,
        scratch: &mut Scratch,
    ) {
        let Some(range) = names.block(bytes, block) else {
            return;
        };
        let count = BLOCK.min(names.count - block * BLOCK);
        let Some(end) = walk(bytes, kinds, range.start, range.end, count) else {
            return;
        };
        // The padding behind the last block is all that may be left.
        let last = block + 1 == names.blocks();
        if end != range.end && !(last && range.end - end < 8) {
            return;
        }
        let before = (self.index.len(), self.names.len());
        let mut at = range.start;
        for i in 0..count {
            let name = length(bytes, at)
                .and_then(|(first, len)| Some((first + len, bytes.get(first..first + len)?)));
            let Some((next, numbers)) = name else {
                return self.cut(before);
            };
            self.push((block * BLOCK + i) as u32, bytes, tokens, numbers, scratch);
            at = next;
        }
        if self.names.len() - before.1 > BLOCK_BYTES {
            return self.cut(before);
        }
        self.blocks += 1;
    }

    /// Takes back what was added since.
    fn cut(&mut self, (symbols, names): (usize, usize)) {
        self.index.truncate(symbols);
        self.kinds.truncate(symbols);
        self.ends.truncate(symbols);
        self.hashes.truncate(symbols);
        self.names.truncate(names);
    }

    /// Expands one name. The first character is the kind, the rest the name.
    #[inline]
    fn push(&mut self, index: u32, bytes: &[u8], tokens: &Tokens, numbers: &[u8], space: &mut Scratch) {
        let start = self.names.len();
        let mut used = 0;
        for &number in numbers {
            let number = usize::from(number);
            let len = usize::from(tokens.lens[number]);
            if len <= INLINE && used <= MAX_NAME {
                space[used..used + INLINE].copy_from_slice(&tokens.heads[number]);
                used += len;
            } else {
                let from = tokens.starts[number] as usize;
                let token = bytes.get(from..from + len).unwrap_or(&[]);
                let room = (MAX_NAME + 1).saturating_sub(used);
                let token = &token[..token.len().min(room)];
                space[used..used + token.len()].copy_from_slice(token);
                used += token.len();
            }
        }
        let name = &space[..used.min(MAX_NAME + 1)];
        let (kind, name) = name.split_first().map_or((b'?', name), |(k, rest)| (*k, rest));
        if name.iter().all(u8::is_ascii_graphic) {
            self.names.extend_from_slice(name);
        } else {
            escape(name, &mut self.names);
        }
        self.index.push(index);
        self.kinds.push(kind);
        self.ends.push(self.names.len() as u32);
        self.hashes.push(hash(&self.names[start..]));
    }

    /// The number, among those decoded, of the first symbol with this name.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        let wanted = hash(name.as_bytes());
        (0..self.kinds.len()).find(|&i| self.hashes[i] == wanted && self.name(i) == name.as_bytes())
    }

    fn name(&self, i: usize) -> &[u8] {
        let start = i.checked_sub(1).map_or(0, |p| self.ends[p] as usize);
        &self.names[start..self.ends[i] as usize]
    }

    /// With the run-time addresses of the symbols here, the finished table of link-time addresses.
    pub(super) fn into_table(self, addresses: &[u64], slide: u64) -> Option<SymbolTable> {
        let link = |&a: &u64| if is_absolute(a) { a } else { a.wrapping_sub(slide) };
        let addresses = addresses.iter().map(link).collect();
        SymbolTableBuilder::from_parts(addresses, self.kinds, self.ends, self.names, self.hashes)
            .map(SymbolTableBuilder::finish)
    }
}

/// Names that no compiler makes, in print: a guest's table may hold anything.
fn escape(name: &[u8], out: &mut Vec<u8>) {
    for &b in name.iter().take(MAX_NAME / 4) {
        if b.is_ascii_graphic() {
            out.push(b);
        } else {
            out.extend_from_slice(format!("\\x{b:02x}").as_bytes());
        }
    }
}
