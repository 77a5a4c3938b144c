//! GNU readline, and so bash: each line is in a `HIST_ENTRY` (a pointer to the line, one to its time as text, one to data of the
//! program's), and the entries' addresses in a list that ends with a null pointer (readline's history.h and history.c; the same
//! since 5.0 of 2004).

use std::borrow::Cow;

use rustc_hash::{FxHashMap, FxHashSet};
use vmsight_arch::Gva;

use super::{Entry, MAX_ENTRIES, MAX_LINE, TIMES, is_line};
use crate::recover::heap::Heap;

/// The entries in a process's memory.
pub(super) fn entries(heap: &Heap) -> Vec<Entry<'_>> {
    let times = times(heap);
    if times.is_empty() {
        return Vec::new();
    }
    let mut found: FxHashMap<u64, Entry<'_>> = FxHashMap::default();
    for (at, word) in heap.words() {
        if found.len() >= MAX_ENTRIES {
            break;
        }
        // The time is the entry's second member.
        if let Some(&time) = times.get(&word)
            && let Some(entry) = entry(heap, at.wrapping_sub(8), time)
        {
            found.insert(entry.at.0, entry);
        }
    }
    number(heap, &mut found);
    let mut out: Vec<Entry<'_>> = found.into_values().collect();
    out.sort_by_key(|e| (e.number.unwrap_or(u64::MAX), e.time, e.at.0));
    out
}

/// The addresses of texts that are times: `#` and the seconds since 1970.
fn times(heap: &Heap) -> FxHashMap<u64, i64> {
    let mut out = FxHashMap::default();
    for (start, bytes) in heap.parts() {
        for (offset, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == b'#') {
            let digits = bytes.get(offset + 1..).unwrap_or(&[]);
            let count = digits.iter().take(12).take_while(|b| b.is_ascii_digit()).count();
            let (Some(text), Some(0)) = (digits.get(..count), digits.get(count)) else {
                continue;
            };
            let time = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
            if let Some(time) = time.filter(|time| TIMES.contains(time))
                && out.len() < MAX_ENTRIES
            {
                out.insert(start.0.wrapping_add(offset as u64), time);
            }
        }
    }
    out
}

/// The entry at an address, if what lies there can be one: a line, its time, and null or a pointer.
fn entry(heap: &Heap, at: Gva, time: i64) -> Option<Entry<'_>> {
    let line = heap.text(Gva(heap.word(at)?), MAX_LINE)?;
    let data = heap.word(at.wrapping_add(16))?;
    let is_data = data == 0 || heap.from(Gva(data)).is_some();
    (is_data && is_line(line)).then_some(Entry {
        form: "readline",
        at,
        number: None,
        time,
        ended: None,
        line: Cow::Borrowed(line),
    })
}

/// Numbers the entries by the longest list of their addresses that ends with null.
fn number(heap: &Heap, found: &mut FxHashMap<u64, Entry<'_>>) {
    let mut best: Vec<u64> = Vec::new();
    let mut run: Vec<u64> = Vec::new();
    let mut seen = FxHashSet::default();
    let mut next = None;
    for (at, word) in heap.words() {
        if next != Some(at) {
            run.clear();
            seen.clear();
        }
        next = at.checked_add(8);
        // An entry is in a list once.
        if found.contains_key(&word) && seen.insert(word) {
            run.push(word);
            continue;
        }
        if word == 0 && run.len() > best.len() {
            best = std::mem::take(&mut run);
        }
        run.clear();
        seen.clear();
    }
    for (nth, at) in (1..).zip(&best) {
        if let Some(entry) = found.get_mut(at) {
            entry.number = Some(nth);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory from 0x1000 on in which texts and words were put.
    fn heap(words: &[(u64, u64)], texts: &[(u64, &[u8])]) -> Heap {
        let mut bytes = vec![0; 0x2000];
        for &(at, word) in words {
            let at = (at - 0x1000) as usize;
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        for (at, text) in texts {
            let at = (at - 0x1000) as usize;
            bytes[at..at + text.len()].copy_from_slice(text);
        }
        Heap::of(vec![(Gva(0x1000), bytes)])
    }

    const TEXTS: &[(u64, &[u8])] = &[
        (0x1100, b"ls -la"),
        (0x1200, b"#1700000000"),
        (0x1300, b"make\tall"),
        (0x1400, b"#1700000100"),
        (0x1500, b"gone"),
        (0x1600, b"#1600000000"),
    ];

    #[test]
    fn entries_come_in_the_order_of_their_list_and_those_in_none_last() {
        let mut words = vec![
            (0x1800, 0x1300),
            (0x1808, 0x1400),
            (0x1840, 0x1100),
            (0x1848, 0x1200),
        ];
        words.extend([(0x1880, 0x1500), (0x1888, 0x1600)]);
        words.extend([(0x1900, 0x1840), (0x1908, 0x1800)]);
        let heap = heap(&words, TEXTS);
        let found = entries(&heap);
        let lines: Vec<_> = found.iter().map(|e| (e.number, e.time, &*e.line)).collect();
        assert_eq!(
            lines,
            [
                (Some(1), 1_700_000_000, &b"ls -la"[..]),
                (Some(2), 1_700_000_100, b"make\tall"),
                (None, 1_600_000_000, b"gone"),
            ]
        );
    }

    #[test]
    fn what_only_looks_like_an_entry_is_none() {
        // A line that is no text, data that points nowhere, a time out of all bounds, no line at all.
        let texts: &[(u64, &[u8])] = &[
            (0x1100, b"\x01\x02"),
            (0x1200, b"#1700000000"),
            (0x1300, b"line"),
            (0x1400, b"#99999999999"),
            (0x1500, b"#12"),
        ];
        let words = [
            (0x1800, 0x1100),
            (0x1808, 0x1200),
            (0x1840, 0x1300),
            (0x1848, 0x1200),
            (0x1850, 0xdead_0000),
            (0x1880, 0x1300),
            (0x1888, 0x1400),
            (0x18c0, 0x1300),
            (0x18c8, 0x1500),
            (0x1900, 0),
            (0x1908, 0x1200),
        ];
        assert_eq!(entries(&heap(&words, texts)), []);
        assert_eq!(entries(&Heap::default()), []);
    }

    #[test]
    fn a_list_that_says_one_entry_twice_is_no_list() {
        let words = [
            (0x1800, 0x1100),
            (0x1808, 0x1200),
            (0x1900, 0x1800),
            (0x1908, 0x1800),
        ];
        let heap = heap(&words, TEXTS);
        let found = entries(&heap);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].number, None);
    }

    #[test]
    fn pieces_of_memory_are_not_read_across() {
        let heap = Heap::of(vec![
            (Gva(0x2000), b"#1700000000".to_vec()),
            (Gva(0x1ff3), vec![b'a'; 13]),
        ]);
        assert_eq!(heap.text(Gva(0x1ff3), 100), None);
        assert_eq!(heap.word(Gva(0x1ffc)), None);
        assert!(heap.word(Gva(0x1ff4)).is_some());
        assert!(heap.from(Gva(0x1000)).is_none() && heap.from(Gva(0x3000)).is_none());
        assert_eq!(
            heap.words().map(|(at, _)| at.0).collect::<Vec<_>>(),
            [0x1ff8, 0x2000]
        );
        assert!(times(&heap).is_empty());
    }
}
