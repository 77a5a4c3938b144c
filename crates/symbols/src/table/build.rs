//! Making a symbol table: sorting by address, and the index by name.

use super::{HEADER, Layout, MAGIC, MAX_NAME, MAX_SYMBOLS, SymbolTable};
use crate::types::bytes::Bytes;

/// Names and kinds of consecutive symbols.
#[derive(Default, Debug)]
pub(crate) struct NamePart {
    kinds: Vec<u8>,
    /// End of each name in `names`.
    ends: Vec<u32>,
    names: Vec<u8>,
    hashes: Vec<u32>,
}

impl NamePart {
    /// Room for so many symbols with names of common length.
    pub(crate) fn with_capacity(symbols: usize) -> Self {
        Self {
            kinds: Vec::with_capacity(symbols),
            ends: Vec::with_capacity(symbols),
            names: Vec::with_capacity(symbols * 28),
            hashes: Vec::with_capacity(symbols),
        }
    }

    /// Adds a name, which must be UTF-8 and at most [`MAX_NAME`] long, with its hash.
    #[inline]
    pub(crate) fn push(&mut self, name: &[u8], kind: u8, hash: u32) {
        self.names.extend_from_slice(name);
        self.ends.push(self.names.len() as u32);
        self.hashes.push(hash);
        self.kinds.push(kind);
    }

    pub(crate) fn len(&self) -> usize {
        self.kinds.len()
    }

    fn name(&self, i: usize) -> &[u8] {
        let start = i.checked_sub(1).map_or(0, |p| self.ends[p] as usize);
        &self.names[start..self.ends[i] as usize]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, u8)> {
        (0..self.len()).map(|i| (std::str::from_utf8(self.name(i)).unwrap_or(""), self.kinds[i]))
    }

    /// The first symbol of this name.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        let wanted = hash(name.as_bytes());
        (0..self.len()).find(|&i| self.hashes[i] == wanted && self.name(i) == name.as_bytes())
    }

    /// A place to which [`NamePart::cut`] can go back.
    pub(crate) fn mark(&self) -> (usize, usize) {
        (self.kinds.len(), self.names.len())
    }

    /// Bytes of names since.
    pub(crate) fn bytes_since(&self, mark: (usize, usize)) -> usize {
        self.names.len() - mark.1
    }

    /// Takes back what was added since.
    pub(crate) fn cut(&mut self, (symbols, names): (usize, usize)) {
        self.kinds.truncate(symbols);
        self.ends.truncate(symbols);
        self.hashes.truncate(symbols);
        self.names.truncate(names);
    }
}

/// Collects symbols in any order.
#[derive(Default, Debug)]
pub struct SymbolTableBuilder {
    addresses: Vec<u64>,
    part: NamePart,
}

impl SymbolTableBuilder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a symbol: its name, link-time address and nm(1) letter. False, and nothing added, where the table is full
    /// ([`MAX_SYMBOLS`]) or the name is longer than [`MAX_NAME`].
    pub fn push(&mut self, name: &str, address: u64, kind: u8) -> bool {
        if self.addresses.len() >= MAX_SYMBOLS || name.len() > MAX_NAME {
            return false;
        }
        self.part.push(name.as_bytes(), kind, hash(name.as_bytes()));
        self.addresses.push(address);
        true
    }

    /// Sorts by address, keeping the order of those that share one, and builds the index.
    pub fn finish(self) -> SymbolTable {
        if self.addresses.is_sorted() {
            return assemble(&self.addresses, &[self.part]);
        }
        let mut order: Vec<u32> = (0..self.addresses.len() as u32).collect();
        order.sort_by_key(|&i| self.addresses[i as usize]);
        let mut sorted = Self::default();
        for i in order.into_iter().map(|i| i as usize) {
            sorted
                .part
                .push(self.part.name(i), self.part.kinds[i], self.part.hashes[i]);
            sorted.addresses.push(self.addresses[i]);
        }
        assemble(&sorted.addresses, &[sorted.part])
    }
}

/// Puts a table together: sorted addresses, and the names in the same order. A caller that breaks that, or passes
/// [`MAX_SYMBOLS`] or [`MAX_NAME`], gets an empty table.
pub(crate) fn assemble(addresses: &[u64], parts: &[NamePart]) -> SymbolTable {
    let count = parts.iter().map(NamePart::len).sum::<usize>();
    let names = parts.iter().map(|p| p.names.len()).sum::<usize>();
    let buckets = count.next_power_of_two().max(16);
    debug_assert!(count == addresses.len() && addresses.is_sorted());
    let layout = match Layout::new(count, buckets, names) {
        Some(layout) if count == addresses.len() => layout,
        _ => return SymbolTable::empty(),
    };
    let mut bytes = Vec::with_capacity(layout.names.end);
    for field in [MAGIC, count as u32, buckets as u32, names as u32] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    debug_assert_eq!(bytes.len(), HEADER);
    extend_u64(&mut bytes, addresses);
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    let mut base = 0;
    for part in parts {
        extend_u32(&mut bytes, part.ends.len(), part.ends.iter().map(|e| e + base));
        base += part.names.len() as u32;
    }
    let (starts, order) = index(parts, count, buckets);
    extend_u32(&mut bytes, starts.len(), starts.into_iter());
    extend_u32(&mut bytes, order.len(), order.into_iter());
    for part in parts {
        bytes.extend_from_slice(&part.kinds);
    }
    for part in parts {
        bytes.extend_from_slice(&part.names);
    }
    debug_assert_eq!(bytes.len(), layout.names.end);
    SymbolTable {
        bytes: Bytes::from(bytes),
        layout,
    }
}

/// Sorts symbol numbers by bucket (counting sort): where each bucket starts, and the numbers. Linear whatever the
/// names are, so that a guest full of equal or colliding names costs no more than another.
fn index(parts: &[NamePart], count: usize, buckets: usize) -> (Vec<u32>, Vec<u32>) {
    let mask = buckets as u32 - 1;
    let mut starts = vec![0_u32; buckets + 1];
    let hashes = || parts.iter().flat_map(|p| &p.hashes);
    for h in hashes() {
        starts[(h & mask) as usize + 1] += 1;
    }
    let mut sum = 0;
    for start in &mut starts {
        sum += *start;
        *start = sum;
    }
    let mut next = starts.clone();
    let mut order = vec![0_u32; count];
    for (i, h) in hashes().enumerate() {
        let slot = &mut next[(h & mask) as usize];
        order[*slot as usize] = i as u32;
        *slot += 1;
    }
    (starts, order)
}

/// The hash of a name. Part of the file format: changing it changes the table's magic.
#[inline]
pub(crate) fn hash(name: &[u8]) -> u32 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut h = name.len() as u64;
    let mut chunks = name.chunks_exact(8);
    for chunk in &mut chunks {
        let v = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
        h = (h.rotate_left(29) ^ v).wrapping_mul(K);
    }
    let mut rest = [0_u8; 8];
    let tail = chunks.remainder();
    rest[..tail.len()].copy_from_slice(tail);
    h = (h.rotate_left(29) ^ u64::from_le_bytes(rest)).wrapping_mul(K);
    (h ^ (h >> 32)).wrapping_mul(K).wrapping_shr(32) as u32
}

fn extend_u64(bytes: &mut Vec<u8>, values: &[u64]) {
    let at = bytes.len();
    bytes.resize(at + 8 * values.len(), 0);
    for (to, from) in bytes[at..].chunks_exact_mut(8).zip(values) {
        to.copy_from_slice(&from.to_le_bytes());
    }
}

fn extend_u32(bytes: &mut Vec<u8>, len: usize, values: impl Iterator<Item = u32>) {
    let at = bytes.len();
    bytes.resize(at + 4 * len, 0);
    for (to, from) in bytes[at..].chunks_exact_mut(4).zip(values) {
        to.copy_from_slice(&from.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::*;

    fn table() -> SymbolTable {
        [
            ("_text", 0xffff_ffff_8100_0000, b'T'),
            ("__per_cpu_start", 0, b'A'),
            ("twin", 0xffff_ffff_8100_2000, b't'),
            ("startup_64", 0xffff_ffff_8100_0000, b'T'),
            ("twin", 0xffff_ffff_8100_1000, b't'),
            ("_end", 0xffff_ffff_8200_0000, b'B'),
        ]
        .into_iter()
        .collect()
    }

    #[test]
    fn finds_by_name_and_all_of_a_name() {
        let t = table();
        assert_eq!(t.address("_text"), Some(0xffff_ffff_8100_0000));
        assert_eq!(t.address("absent"), None);
        assert_eq!(
            t.addresses("twin").collect::<Vec<_>>(),
            [0xffff_ffff_8100_1000, 0xffff_ffff_8100_2000],
            "by address, whatever the order of adding"
        );
    }

    #[test]
    fn nearest_stays_inside_the_image() {
        let t = table();
        let at = |a| t.nearest(a).map(|(s, o)| (s.name, o));
        assert_eq!(
            at(0xffff_ffff_8100_0000),
            Some(("_text", 0)),
            "the first of those that share an address"
        );
        assert_eq!(at(0xffff_ffff_8100_1fff), Some(("twin", 0xfff)));
        assert_eq!(at(0xffff_ffff_8200_0000), Some(("_end", 0)));
        assert_eq!(at(0xffff_ffff_8200_0001), None, "past the image");
        assert_eq!(at(0), Some(("__per_cpu_start", 0)));
        assert_eq!(
            at(0x1000),
            None,
            "no symbol covers the space between absolute values and the image"
        );
        assert_eq!(at(0xffff_8880_0000_0000), None);
    }

    #[test]
    fn after_is_above() {
        let t = table();
        let after = |a| t.after(a).map(|s| s.address);
        assert_eq!(after(0xffff_ffff_8100_1000), Some(0xffff_ffff_8100_2000));
        assert_eq!(after(0xffff_ffff_8100_0fff), Some(0xffff_ffff_8100_1000));
        assert_eq!(after(0xffff_ffff_8200_0000), None, "the last one");
        assert_eq!(after(u64::MAX), None);
    }

    #[test]
    fn range_is_half_open() {
        let t = table();
        let names: Vec<_> = t
            .range(0xffff_ffff_8100_0000..0xffff_ffff_8100_2000)
            .map(|s| s.name)
            .collect();
        assert_eq!(names, ["_text", "startup_64", "twin"]);
        assert_eq!(t.range(Range { start: 5, end: 1 }).count(), 0);
    }

    #[test]
    fn empty_table() {
        let t = SymbolTable::empty();
        assert!(t.is_empty());
        assert_eq!(t.address(""), None);
        assert_eq!(t.nearest(5), None);
    }

    #[test]
    fn refuses_what_passes_the_caps() {
        let mut b = SymbolTableBuilder::new();
        assert!(!b.push(&"x".repeat(MAX_NAME + 1), 0, b'T'));
        assert!(b.push(&"x".repeat(MAX_NAME), 0, b'T'));
        assert_eq!(b.finish().len(), 1);
    }

    proptest! {
        #[test]
        fn every_symbol_is_found_again(symbols in prop::collection::vec(("[a-c_]{0,12}", any::<u64>(), any::<u8>()), 0..300)) {
            let t: SymbolTable = symbols.iter().map(|(n, a, k)| (n.as_str(), *a, *k)).collect();
            let mut want = symbols.clone();
            want.sort_by_key(|s| s.1);
            let got: Vec<_> = t.iter().map(|s| (s.name.to_owned(), s.address, s.kind)).collect();
            prop_assert_eq!(&got, &want);
            for (name, _, _) in &want {
                let all: Vec<u64> = want.iter().filter(|s| &s.0 == name).map(|s| s.1).collect();
                prop_assert_eq!(t.addresses(name).collect::<Vec<_>>(), all);
            }
            let again = SymbolTable::from_bytes(Bytes::from(t.as_bytes().to_vec())).unwrap();
            prop_assert_eq!(again, t);
        }

        #[test]
        fn damaged_blocks_never_panic(flips in prop::collection::vec((0_usize..400, any::<u8>()), 1..20), cut in 0_usize..400) {
            let mut bytes = table().as_bytes().to_vec();
            let len = bytes.len();
            for (at, v) in flips {
                bytes[at % len] = v;
            }
            bytes.truncate(len.min(cut.max(200)));
            if let Ok(t) = SymbolTable::from_bytes(Bytes::from(bytes)) {
                t.iter().for_each(drop);
                let _ = t.nearest(0xffff_ffff_8100_1fff);
                let _ = t.addresses("twin").count();
                let _ = t.range(0..u64::MAX).count();
            }
        }
    }
}
