//! What is remembered of remote memory: where pages lie, and the entries that said so.
//!
//! A fixed number of slots, each written under a sequence number: readers never wait, and a reader that meets a
//! writer takes it for a miss. Nothing here expires. What may be used is decided by reading the entries again.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use vmsight_arch::Gpa;

/// Entries that lead to a page at most.
pub(super) const DEPTH: usize = 5;

/// A key that no address gives.
const NO_KEY: u64 = u64::MAX;

/// Where an entry was read and what it held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Evidence {
    pub(super) place: Gpa,
    pub(super) value: u64,
}

/// What a slot says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Found {
    /// The first byte of the page.
    pub(super) page: Gpa,
    /// The entries it follows from. Unused ones repeat the first.
    evidence: [Evidence; DEPTH],
}

impl Found {
    /// A page and the entries it follows from, of which there are at most [`DEPTH`].
    pub(super) fn new(page: Gpa, entries: &[Evidence]) -> Self {
        let first = entries.first().copied().unwrap_or_default();
        let mut evidence = [first; DEPTH];
        for (to, from) in evidence.iter_mut().zip(entries) {
            *to = *from;
        }
        Self { page, evidence }
    }

    /// The entries it follows from, each once: another process is asked for each of them.
    pub(super) fn entries(&self) -> &[Evidence] {
        let first = self.evidence.first();
        let repeated = self.evidence.iter().skip(1).rev();
        let repeated = repeated.take_while(|entry| Some(*entry) == first).count();
        self.evidence.get(..DEPTH - repeated).unwrap_or(&self.evidence)
    }
}

/// Two cache lines.
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    /// Odd while somebody writes.
    sequence: AtomicU64,
    key: AtomicU64,
    page: AtomicU64,
    evidence: [(AtomicU64, AtomicU64); DEPTH],
}

impl Slot {
    fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            key: AtomicU64::new(NO_KEY),
            page: AtomicU64::new(0),
            evidence: Default::default(),
        }
    }

    /// What the slot says of `key`.
    fn get(&self, key: u64) -> Option<Found> {
        let sequence = self.sequence.load(Ordering::Acquire);
        if self.key.load(Ordering::Relaxed) != key || sequence & 1 != 0 {
            return None;
        }
        let page = self.page.load(Ordering::Relaxed);
        let mut evidence = [Evidence::default(); DEPTH];
        for (to, (place, value)) in evidence.iter_mut().zip(&self.evidence) {
            *to = Evidence {
                place: Gpa(place.load(Ordering::Relaxed)),
                value: value.load(Ordering::Relaxed),
            };
        }
        // All of it was read before the number is read again: it belongs together if the number stayed.
        fence(Ordering::Acquire);
        (self.sequence.load(Ordering::Relaxed) == sequence).then_some(Found {
            page: Gpa(page),
            evidence,
        })
    }

    /// Replaces what the slot says, unless somebody else is at it.
    fn put(&self, key: u64, found: &Found) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        if sequence & 1 != 0
            || self
                .sequence
                .compare_exchange(
                    sequence,
                    sequence.wrapping_add(1),
                    Ordering::Acquire,
                    Ordering::Relaxed,
                )
                .is_err()
        {
            return;
        }
        // A reader that sees any of the stores below sees the odd number too.
        fence(Ordering::Release);
        self.key.store(key, Ordering::Relaxed);
        self.page.store(found.page.0, Ordering::Relaxed);
        for ((place, value), from) in self.evidence.iter().zip(&found.evidence) {
            place.store(from.place.0, Ordering::Relaxed);
            value.store(from.value, Ordering::Relaxed);
        }
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }
}

/// The slots of one address space, made when first used.
#[derive(Debug)]
pub(super) struct Cache {
    slots: OnceLock<Box<[Slot]>>,
    /// log2 of their number.
    bits: u8,
}

impl Cache {
    /// A cache of 2^`bits` slots of 128 bytes, `bits` from 0 to 20.
    pub(super) fn new(bits: u8) -> Self {
        Self {
            slots: OnceLock::new(),
            bits: bits.min(20),
        }
    }

    fn index(&self, key: u64) -> usize {
        // Fibonacci hashing, the top bits of the product: neighbours spread evenly and do not meet.
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1 >> (63 - self.bits)) as usize
    }

    /// What is remembered under `key`.
    pub(super) fn get(&self, key: u64) -> Option<Found> {
        self.slots.get()?.get(self.index(key))?.get(key)
    }

    /// Remembers.
    pub(super) fn put(&self, key: u64, found: &Found) {
        let slots = self
            .slots
            .get_or_init(|| (0..1usize << self.bits).map(|_| Slot::new()).collect());
        if let Some(slot) = slots.get(self.index(key)) {
            slot.put(key, found);
        }
    }

    /// Forgets `key`: its evidence has changed.
    #[cold]
    pub(super) fn forget(&self, key: u64) {
        let slot = self.slots.get().and_then(|slots| slots.get(self.index(key)));
        if let Some(slot) = slot.filter(|slot| slot.key.load(Ordering::Relaxed) == key) {
            slot.put(NO_KEY, &Found::new(Gpa(0), &[]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(n: u64) -> Found {
        Found {
            page: Gpa(n),
            evidence: [Evidence {
                place: Gpa(n ^ 0x55),
                value: n ^ 0xaa,
            }; DEPTH],
        }
    }

    #[test]
    fn each_entry_is_looked_at_once() {
        let entry = |n: u64| Evidence {
            place: Gpa(n * 8),
            value: n,
        };
        for entries in [
            vec![entry(1)],
            vec![entry(1), entry(2), entry(3)],
            (1..=DEPTH as u64).map(entry).collect(),
            // A table that leads to itself: what follows is looked at all the same.
            vec![entry(1), entry(1), entry(2)],
        ] {
            assert_eq!(Found::new(Gpa(0), &entries).entries(), entries);
        }
    }

    #[test]
    fn what_was_put_is_found_until_forgotten() {
        let cache = Cache::new(4);
        assert_eq!(cache.get(7), None);
        cache.put(7, &found(1));
        assert_eq!(cache.get(7), Some(found(1)));
        assert_eq!(cache.get(8), None);
        cache.forget(8);
        assert_eq!(cache.get(7), Some(found(1)));
        cache.put(7, &found(2));
        assert_eq!(cache.get(7), Some(found(2)));
        cache.forget(7);
        assert_eq!(cache.get(7), None);
    }

    #[test]
    fn readers_never_see_half_of_one_write_and_half_of_another() {
        let cache = Cache::new(0);
        std::thread::scope(|scope| {
            for writer in 0..2u64 {
                let cache = &cache;
                scope.spawn(move || {
                    for i in 0..200_000u64 {
                        let key = i & 1;
                        cache.put(key, &found((i << 2 | writer) << 1 | key));
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut hits = 0u32;
                    for i in 0..400_000u64 {
                        if let Some(f) = cache.get(i & 1) {
                            assert_eq!(f, found(f.page.0));
                            assert_eq!(f.page.0 & 1, i & 1, "of the key asked for");
                            hits += 1;
                        }
                    }
                    hits
                });
            }
        });
    }
}
