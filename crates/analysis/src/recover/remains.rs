//! What is left of a slab's objects in memory that was given back.

use std::ops::Range;

use rayon::prelude::*;
use vmsight_arch::{Gpa, Gva};
use vmsight_memory::{Chunk, GuestMemory, ReadOp};

use super::member::Member;
use super::slab::Slabs;

/// Bytes of memory that one thread goes through at a time: a multiple of the largest slab.
const PIECE: u64 = 32 << 20;
/// Places in memory that are looked at in one go.
const AT_ONCE: usize = 1 << 13;

/// Places where an object may have been.
#[derive(Debug, Default)]
pub(crate) struct Remains {
    /// Where, each once, some of them in slabs that are in use.
    pub(crate) places: Vec<Gpa>,
    /// How many other places could not be read.
    pub(crate) unread: u64,
}

/// Looks at all places where an object of one of these caches can have been: slabs are blocks of pages at multiples of their size, so
/// that of tasks three places in 32 KiB are looked at and not all. `possible` is given a place and what `member` has there, the
/// cheapest and rarest of an object, and looks closer.
pub(crate) fn search<const N: usize>(
    memory: &GuestMemory,
    caches: &[&Slabs],
    member: &Member,
    possible: impl Fn(Gpa, &[u8; N]) -> bool + Sync,
) -> Remains {
    let pieces: Vec<Range<u64>> = memory
        .regions()
        .iter()
        .flat_map(|region| pieces(region.start.0, region.start.0.saturating_add(region.len)))
        .collect();
    // What a page of a dump costs is that it comes into this process's page tables: all processors do that side by side.
    let looked: Vec<Remains> = pieces
        .into_par_iter()
        .map(|piece| {
            let mut remains = Remains::default();
            for slabs in caches {
                let places = slabs.places(Gpa(piece.start), Gpa(piece.end));
                look(memory, places, member, &possible, &mut remains);
            }
            // Caches of one size have the same places.
            remains.places.sort_unstable();
            remains.places.dedup();
            let len = usize::try_from(piece.end - piece.start).unwrap_or(usize::MAX);
            // Out of the page tables again here, by all processors, and not at the end, by one.
            memory.release(&Chunk {
                gpa: Gpa(piece.start),
                len,
                own: len,
            });
            remains
        })
        .collect();
    let mut all = Remains::default();
    for remains in looked {
        all.places.extend(remains.places);
        all.unread += remains.unread;
    }
    all
}

fn look<const N: usize>(
    memory: &GuestMemory,
    mut places: impl Iterator<Item = Gpa>,
    member: &Member,
    possible: &impl Fn(Gpa, &[u8; N]) -> bool,
    remains: &mut Remains,
) {
    let mut values = vec![[0; N]; AT_ONCE];
    loop {
        let places: Vec<Gpa> = places.by_ref().take(AT_ONCE).collect();
        if places.is_empty() {
            return;
        }
        let mut reads: Vec<_> = places
            .iter()
            .zip(&mut values)
            .map(|(at, value)| ReadOp::new(Gpa(member.at(Gva(at.0)).0), value))
            .collect();
        memory.read_batch(&mut reads);
        for (read, &at) in reads.iter().zip(&places) {
            match (&read.result, <&[u8; N]>::try_from(&*read.buf)) {
                (Ok(()), Ok(value)) if possible(at, value) => remains.places.push(at),
                (Ok(()), _) => {}
                (Err(_), _) => remains.unread += 1,
            }
        }
    }
}

/// A stretch of memory cut at multiples of [`PIECE`], at which no slab has a part on both sides.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
    let first = start - start % PIECE;
    (first..end)
        .step_by(PIECE as usize)
        .map(move |at| at.max(start)..at.saturating_add(PIECE).min(end))
        .filter(|piece| !piece.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_cut_where_no_slab_lies_across() {
        let cut = |start, end| {
            pieces(start, end)
                .map(|piece| (piece.start, piece.end))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            cut(0x1000, 2 * PIECE + 0x1000),
            [
                (0x1000, PIECE),
                (PIECE, 2 * PIECE),
                (2 * PIECE, 2 * PIECE + 0x1000)
            ]
        );
        assert_eq!(cut(PIECE, 2 * PIECE), [(PIECE, 2 * PIECE)]);
        assert!(cut(0x1000, 0x1000).is_empty());
        let last = u64::MAX - PIECE / 2;
        assert_eq!(cut(last, u64::MAX), [(last, u64::MAX)]);
    }
}
