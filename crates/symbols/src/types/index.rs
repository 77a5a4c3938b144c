//! From names to ids, as flat arrays that can be written to a file and used from a mapping of it.

use super::bytes::{Bytes, Words};

/// A hash table in two arrays: `starts[b]..starts[b + 1]` are the entries of bucket `b`.
///
/// The entries are type ids; which name they stand for is looked up in the type data, so a damaged table can
/// miss a name but never give a wrong one. It is built by counting, in linear time whatever the names are.
#[derive(Clone, Debug)]
pub(crate) struct Buckets {
    starts: Words,
    entries: Words,
}

impl Buckets {
    /// Builds from (hash, entry) pairs. Entries of one bucket keep their order.
    pub(crate) fn build(pairs: &[(u32, u32)]) -> Self {
        let count = pairs.len().next_power_of_two();
        let mut starts = vec![0u32; count + 1];
        let bucket = |hash: u32| hash as usize & (count - 1);
        for &(hash, _) in pairs {
            starts[bucket(hash) + 1] += 1;
        }
        for b in 0..count {
            starts[b + 1] += starts[b];
        }
        let mut next = starts.clone();
        let mut entries = vec![0u32; pairs.len()];
        for &(hash, entry) in pairs {
            let slot = &mut next[bucket(hash)];
            entries[*slot as usize] = entry;
            *slot += 1;
        }
        Self {
            starts: Words::from_words(&starts),
            entries: Words::from_words(&entries),
        }
    }

    /// Takes the arrays from a file; `None` where their sizes make no table.
    pub(crate) fn from_parts(starts: Bytes, entries: Bytes) -> Option<Self> {
        let (starts, entries) = (Words::new(starts), Words::new(entries));
        starts
            .len()
            .checked_sub(1)?
            .is_power_of_two()
            .then_some(Self { starts, entries })
    }

    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        (self.starts.as_bytes(), self.entries.as_bytes())
    }

    /// The entries whose name may have this hash.
    pub(crate) fn candidates(&self, hash: u32) -> impl Iterator<Item = u32> + '_ {
        // The number of buckets is a power of two, so at least one.
        let bucket = hash as usize & self.starts.len().saturating_sub(2);
        let start = self.starts.get(bucket).unwrap_or(0) as usize;
        let end = (self.starts.get(bucket + 1).unwrap_or(0) as usize).min(self.entries.len());
        (start..end).filter_map(|i| self.entries.get(i))
    }
}

/// The hash of a name. It is part of the cache's file format: never change it without changing that.
#[inline]
pub(crate) fn hash(name: &[u8]) -> u32 {
    // FNV-1a, folded: names are short, and the table is built by counting, so collisions chosen by a guest
    // cost at most a scan over its own names.
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    for &b in name {
        h = (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    }
    (h ^ h >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_found_and_the_order_kept() {
        let names: Vec<String> = (0..1000).map(|i| format!("name{}", i % 700)).collect();
        let pairs: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, n)| (hash(n.as_bytes()), i as u32))
            .collect();
        let table = Buckets::build(&pairs);
        for (i, name) in names.iter().enumerate() {
            let found: Vec<u32> = table
                .candidates(hash(name.as_bytes()))
                .filter(|&e| names[e as usize] == *name)
                .collect();
            assert!(found.contains(&(i as u32)));
            assert!(found.is_sorted());
            assert_eq!(found.len(), if i % 700 < 300 { 2 } else { 1 });
        }
        assert_eq!(
            table
                .candidates(hash(b"other"))
                .filter(|&e| names[e as usize] == "other")
                .count(),
            0
        );
    }

    #[test]
    fn an_empty_table_has_nothing() {
        assert_eq!(Buckets::build(&[]).candidates(7).count(), 0);
    }

    #[test]
    fn damaged_tables_give_no_panic() {
        for words in [
            vec![],
            vec![0],
            vec![5, u32::MAX],
            vec![9, 1, 3],
            vec![u32::MAX, 0],
        ] {
            let starts = Words::from_words(&words);
            if let Some(table) = Buckets::from_parts(
                Bytes::from(starts.as_bytes().to_vec()),
                Bytes::from(vec![1, 2, 3]),
            ) {
                assert_eq!(table.candidates(u32::MAX).count(), 0);
            }
        }
    }
}
