//! zsh: a ring of `struct histent` (Src/zsh.h; the same since 4.3 of 2006, when times came to it). An entry is a node of a hash table of
//! lines, knows its neighbours in the ring, when it was started and when it had ended, and has a number that only ever rises.
//!
//! While a line is being typed, an entry for it closes the ring; that one is a variable of zsh's and is told by its lack of a time.

use std::borrow::Cow;

use rustc_hash::FxHashMap;
use vmsight_arch::Gva;

use super::{Entry, MAX_ENTRIES, MAX_LINE, TIMES, is_line};
use crate::recover::heap::Heap;

/// Where the members are that are looked at: a pointer to the line, the neighbours (older and newer), the times, the number.
const LINE: u64 = 8;
const UP: u64 = 24;
const DOWN: u64 = 32;
const STARTED: u64 = 48;
const ENDED: u64 = 56;
const NUMBER: u64 = 80;
/// Numbers that are believed.
const NUMBERS: std::ops::Range<i64> = 1..1 << 32;
/// zsh's `Meta`: the byte behind it has its sixth bit turned.
const META: u8 = 0x83;

/// The entries in a process's memory, in the order of their numbers.
pub(super) fn entries(heap: &Heap) -> Vec<Entry<'_>> {
    let mut found: FxHashMap<u64, Entry<'_>> = FxHashMap::default();
    for (at, word) in heap.words() {
        if found.len() >= MAX_ENTRIES {
            break;
        }
        // What most words are not, and an entry's times are.
        if TIMES.contains(&(word as i64))
            && let Some(entry) = entry(heap, at.wrapping_sub(STARTED), word as i64)
        {
            found.insert(entry.at.0, entry);
        }
    }
    let mut out: Vec<Entry<'_>> = found.into_values().collect();
    out.sort_by_key(|e| (e.number, e.time, e.at.0));
    out
}

/// The entry at an address, if what lies there can be one and a neighbour agrees.
fn entry(heap: &Heap, at: Gva, started: i64) -> Option<Entry<'_>> {
    let word = |offset: u64| heap.word(at.wrapping_add(offset));
    let number = i64::try_from(word(NUMBER)?)
        .ok()
        .filter(|n| NUMBERS.contains(n))?;
    let ended = word(ENDED)? as i64;
    // 0 while it runs. A clock that was set may make it the earlier one.
    if ended != 0 && !TIMES.contains(&ended) {
        return None;
    }
    let (up, down) = (Gva(word(UP)?), Gva(word(DOWN)?));
    // A neighbour that is elsewhere has nothing to say; one that is here and says another thing makes it none.
    let back = |to: Gva, member: u64| heap.word(to.wrapping_add(member)).map(|back| back == at.0);
    let agreed = match (back(up, DOWN), back(down, UP)) {
        (Some(false), _) | (_, Some(false)) | (None, None) => false,
        (Some(true), _) | (_, Some(true)) => true,
    };
    if !agreed || up == at && down == at {
        return None;
    }
    let line = plain(heap.text(Gva(word(LINE)?), MAX_LINE)?);
    is_line(&line).then_some(Entry {
        form: "zsh",
        at,
        number: u64::try_from(number).ok(),
        time: started,
        ended: (ended != 0).then_some(ended),
        line,
    })
}

/// A line as it was typed.
fn plain(line: &[u8]) -> Cow<'_, [u8]> {
    if !line.contains(&META) {
        return Cow::Borrowed(line);
    }
    let mut out = Vec::with_capacity(line.len());
    let mut bytes = line.iter();
    while let Some(&byte) = bytes.next() {
        match (byte, bytes.as_slice().first()) {
            (META, Some(next)) => {
                bytes.next();
                out.push(next ^ 0x20);
            }
            _ => out.push(byte),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: u64 = 1_700_000_000;

    /// An entry: where it lies, its line, its neighbours, when it ended, its number.
    struct Given(u64, u64, u64, u64, u64, u64);

    /// Memory from 0x1000 on with these entries, started a second apart, and three lines.
    fn heap(entries: &[Given]) -> Heap {
        let mut bytes = vec![0; 0x2000];
        let mut put = |at: u64, with: &[u8]| {
            let at = (at - 0x1000) as usize;
            bytes[at..at + with.len()].copy_from_slice(with);
        };
        put(0x1100, b"ls -la");
        put(0x1200, b"print \xc3\x83\xbc"); // "Ü": its second byte is metafied
        put(0x1300, b"\x01");
        for (nth, Given(at, line, up, down, ended, number)) in (0..).zip(entries) {
            let members = [
                (LINE, line),
                (UP, up),
                (DOWN, down),
                (ENDED, ended),
                (NUMBER, number),
            ];
            for (offset, value) in members {
                put(at + offset, &value.to_le_bytes());
            }
            put(at + STARTED, &(TIME + nth).to_le_bytes());
        }
        Heap::of(vec![(Gva(0x1000), bytes)])
    }

    fn lines(heap: &Heap) -> Vec<(u64, i64, Option<i64>, Vec<u8>)> {
        let told = |e: Entry<'_>| (e.number.unwrap(), e.time, e.ended, e.line.into_owned());
        entries(heap).into_iter().map(told).collect()
    }

    /// What closes the ring while a line is typed: elsewhere.
    const CURRENT: u64 = 0x9000;

    #[test]
    fn a_ring_comes_in_the_order_of_its_numbers() {
        let heap = heap(&[
            Given(0x1900, 0x1200, 0x1800, CURRENT, 0, 8),
            Given(0x1800, 0x1100, CURRENT, 0x1900, TIME + 5, 7),
        ]);
        let time = TIME as i64;
        assert_eq!(
            lines(&heap),
            [
                (7, time + 1, Some(time + 5), b"ls -la".to_vec()),
                (8, time, None, "print \u{dc}".as_bytes().to_vec()),
            ]
        );
    }

    #[test]
    fn what_no_neighbour_agrees_with_is_no_entry() {
        let good = || Given(0x1800, 0x1100, CURRENT, 0x1900, 0, 7);
        for wrong in [
            Given(0x1900, 0x1200, 0x1a00, CURRENT, 0, 8),
            Given(0x1900, 0x1200, 0x1900, CURRENT, 0, 8),
        ] {
            assert_eq!(lines(&heap(&[good(), wrong])), []);
        }
        // One that is right beside one that cannot be: no number, a line of no text, an end that is no time.
        for wrong in [
            Given(0x1900, 0x1200, 0x1800, CURRENT, 0, 0),
            Given(0x1900, 0x1300, 0x1800, CURRENT, 0, 8),
            Given(0x1900, 0x1200, 0x1800, CURRENT, 12, 8),
            Given(0x1900, 0x8000, 0x1800, CURRENT, 0, 8),
        ] {
            assert_eq!(lines(&heap(&[good(), wrong])).len(), 1);
        }
        assert_eq!(lines(&heap(&[Given(0x1800, 0x1100, 0x1800, 0x1800, 0, 1)])), []);
        assert_eq!(lines(&heap(&[Given(0x1800, 0x1100, CURRENT, CURRENT, 0, 1)])), []);
    }

    #[test]
    fn a_line_that_ends_within_a_metafied_byte_keeps_it() {
        assert_eq!(&*plain(b"a\x83"), b"a\x83");
        assert_eq!(&*plain(b"a\x83\xa3b"), b"a\x83b");
    }
}
