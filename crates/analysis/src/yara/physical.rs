//! Physical memory, piece by piece.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmsight_memory::{GuestMemory, ScanOptions};

use super::engine::{Run, surround};
use super::{Limits, Match, OVERLAP, PIECE, Rules, Scanned};

const PAGE: usize = 4096;

/// Scans physical memory, on all processors. Pieces are [`PIECE`] long and show [`OVERLAP`] of the next. Where no rule matches zeros,
/// pages of zeros at either end of a piece are left out, but for the last one: much of a guest's memory is no more.
///
/// A dump is judged where it is mapped; of a running guest each piece is copied.
pub fn physical(
    memory: &GuestMemory,
    rules: &Rules,
    limits: Limits,
    stop: &AtomicBool,
    progress: &(dyn Fn(u64) + Sync),
) -> Scanned {
    let leave_out = !matches_zeros(rules);
    let run = Run::new(rules, limits, false);
    let looked_at = AtomicU64::new(0);
    let options = ScanOptions {
        step: PIECE,
        overlap: OVERLAP,
        ..ScanOptions::default()
    };
    let scan = memory.scan(&options, stop, |chunk, bytes| {
        looked_at.fetch_add(chunk.own as u64, Ordering::Relaxed);
        let found = piece(&run, bytes, chunk.own, chunk.gpa.0, leave_out);
        progress(chunk.own as u64);
        found
    });
    let mut out = Scanned {
        matches: scan.found,
        looked_at: looked_at.into_inner(),
        notes: run.notes(),
    };
    if scan.problem_count > 0 {
        let first = scan.problems.first().map(ToString::to_string).unwrap_or_default();
        out.notes.push(format!(
            "{} pieces of memory could not be read, the first: {first}",
            scan.problem_count
        ));
    }
    if scan.stopped {
        out.notes.push("the scan ended early: the VM is gone".to_owned());
    }
    out.sort();
    out
}

/// What begins in the first `own` bytes of a piece that lies at `address`.
fn piece(run: &Run<'_>, bytes: &[u8], own: usize, address: u64, leave_out: bool) -> Vec<Match> {
    let all = 0..bytes.len();
    let range = match leave_out {
        true => used(bytes),
        false => all,
    };
    let Some(bytes) = bytes.get(range.clone()).filter(|bytes| !bytes.is_empty()) else {
        return Vec::new();
    };
    let found = run.piece(bytes).into_iter().filter_map(|one| {
        let mut one = one.found;
        let at = usize::try_from(one.address).ok()?;
        if range.start + at >= own {
            return None;
        }
        surround(&mut one, bytes, at);
        one.address = address.wrapping_add((range.start + at) as u64);
        Some(one)
    });
    found.collect()
}

/// What is left of a piece without the pages of zeros at either end, but for one.
fn used(bytes: &[u8]) -> std::ops::Range<usize> {
    let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let before = bytes.chunks(PAGE).take_while(|page| zero(page)).count();
    let start = before * PAGE;
    if start >= bytes.len() {
        return 0..0;
    }
    let behind = bytes.rchunks(PAGE).take_while(|page| zero(page)).count();
    start.saturating_sub(PAGE)..bytes.len().saturating_sub(behind.saturating_sub(1) * PAGE)
}

/// Whether a rule matches where nothing is: then nothing is left out.
fn matches_zeros(rules: &Rules) -> bool {
    let limits = Limits {
        per_pattern: 1,
        in_all: 1,
        ..Limits::default()
    };
    !Run::new(rules, limits, false).piece(&[0; 8 * PAGE]).is_empty()
}

#[cfg(test)]
mod tests {
    use vmsight_arch::Gpa;

    use super::super::rules::Source;
    use super::*;

    fn rules(text: &str) -> Rules {
        let origin = "test.yar";
        Rules::compile([Source { origin, text }]).expect("rules")
    }

    fn scan(memory: Vec<u8>, rules: &Rules, limits: Limits) -> Scanned {
        let memory = GuestMemory::from_bytes(vec![(Gpa(0x10_0000), memory)]).expect("one part");
        physical(&memory, rules, limits, &AtomicBool::new(false), &|_| {})
    }

    fn places(found: &Scanned) -> Vec<u64> {
        found.matches.iter().map(|m| m.address - 0x10_0000).collect()
    }

    #[test]
    fn a_match_across_pieces_is_found_once_with_its_surroundings() {
        let rules = rules("rule r : one two { strings: $a = \"needle\" condition: $a }");
        let mut memory = vec![0u8; PIECE + (1 << 20)];
        let all = [100, PIECE - 3, PIECE + 50, PIECE + (1 << 20) - 6];
        for at in all {
            memory[at - 1] = b'<';
            memory[at..at + 6].copy_from_slice(b"needle");
        }
        memory[106] = b'>';
        let found = scan(memory, &rules, Limits::default());
        assert_eq!(places(&found), all.map(|at| at as u64));
        let first = &found.matches[0];
        assert_eq!(
            (first.rule.name.as_str(), first.pattern.as_deref()),
            ("r", Some("$a"))
        );
        assert_eq!(
            (first.matched.as_slice(), first.before.last()),
            (&b"needle"[..], Some(&b'<'))
        );
        assert_eq!((first.before.len(), first.after.len()), (16, 16));
        assert_eq!(first.after.first(), Some(&b'>'));
        assert!(found.notes.is_empty(), "{:?}", found.notes);
    }

    #[test]
    fn a_long_match_across_a_border_is_found_up_to_the_overlap() {
        for (length, there) in [(OVERLAP, true), (OVERLAP + 2 * PAGE, false)] {
            let text = format!("<{}>", "a".repeat(length - 2));
            let rules = rules(&format!("rule r {{ strings: $a = \"{text}\" condition: $a }}"));
            let mut memory = vec![0u8; 2 * PIECE];
            let start = PIECE - 1;
            memory[start..start + length].copy_from_slice(text.as_bytes());
            let found = scan(memory, &rules, Limits::default());
            assert_eq!(found.matches.len(), usize::from(there), "{length}");
            for one in found.matches {
                assert_eq!(one.address, (0x10_0000 + start) as u64);
                assert_eq!((one.length, one.matched.len()), (length as u64, 64));
                assert!(one.after.is_empty());
            }
        }
    }

    #[test]
    fn zeros_are_left_out_only_where_no_rule_wants_them() {
        let mut memory = vec![0u8; 1 << 20];
        memory[0x8000] = b'x';
        let near = rules("rule r { strings: $a = { 00 00 00 00 78 00 00 00 } condition: $a }");
        assert_eq!(places(&scan(memory.clone(), &near, Limits::default())), [0x7ffc]);
        assert_eq!(used(&memory), 0x7000..0xa000);
        let zeros = rules("rule r { condition: filesize == 1048576 and uint8(0) == 0 }");
        assert_eq!(
            scan(memory.clone(), &zeros, Limits::default()).matches.len(),
            0,
            "what is left out counts for filesize"
        );
        let nothing = rules("rule r { strings: $a = { 00 00 00 00 } condition: $a }");
        let one = Limits {
            per_pattern: 1,
            ..Limits::default()
        };
        assert_eq!(places(&scan(memory, &nothing, one)), [0]);
    }

    #[test]
    fn bounds_hold_and_are_said() {
        let rules = rules("rule r { strings: $a = \"ab\" condition: $a }");
        let memory = b"ab".repeat(4096);
        let few = |per_pattern, in_all| Limits {
            per_pattern,
            in_all,
            ..Limits::default()
        };
        let found = scan(memory.clone(), &rules, few(50, 1000));
        assert_eq!((found.matches.len(), found.notes.len()), (50, 1));
        let found = scan(memory.clone(), &rules, few(50, 10));
        assert_eq!(found.matches.len(), 10);
        assert!(found.notes.iter().any(|note| note.contains("more than 10 ")));
        let found = scan(memory, &rules, few(5000, 5000));
        assert_eq!((found.matches.len(), found.notes.len()), (4096, 0));
    }

    #[test]
    fn rules_that_never_end_are_given_up() {
        let rules = rules("rule r { strings: $a = /.*a.*b.*c.*/s condition: $a }");
        let limits = Limits {
            patience: std::time::Duration::from_millis(1),
            ..Limits::default()
        };
        let found = scan(b"ab".repeat(5 * PIECE), &rules, limits);
        let said = found.notes.iter().find(|note| note.contains("took longer"));
        assert!(
            said.is_some_and(|note| note.ends_with("the scan was ended")),
            "{found:?}"
        );
    }

    #[test]
    fn a_rule_without_patterns_matches_each_piece() {
        let rules = rules("rule r { condition: uint8(0) == 0x7f }");
        let mut memory = vec![1u8; 2 * PIECE];
        memory[PIECE] = 0x7f;
        let found = scan(memory, &rules, Limits::default());
        assert_eq!(places(&found), [PIECE as u64]);
        assert_eq!(found.matches[0].pattern, None);
    }
}
