//! Code that is not as it was, but for what the kernel patches and where it lies now.

use std::ops::Range;

use rustc_hash::FxHashSet;
use vmsight_arch::Gva;

/// How much longer than a difference the instruction may be that it lies in.
const AROUND: usize = 7;
/// Differences nearer than this are told as one.
const NEAR: usize = 8;

/// The places that differ, as ranges of offsets, at most `most`. `patched` are the addresses at which the kernel patches up to 6
/// bytes; `moves` says how far what the code refers to has moved since.
pub(crate) fn differences(
    old: &[u8],
    now: &[u8],
    base: Gva,
    patched: &FxHashSet<u64>,
    moves: &FxHashSet<u64>,
    data: &dyn Fn(u64) -> bool,
    most: usize,
) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    let end = old.len().min(now.len());
    while at < end {
        // Whole pages are mostly the same.
        let chunk = at..(at + 4096).min(end);
        if old.get(chunk.clone()) == now.get(chunk.clone()) {
            at = chunk.end;
            continue;
        }
        for at in chunk.clone() {
            if old.get(at) == now.get(at)
                || is_patched(at, base, patched)
                || has_moved(old, now, at, moves, data)
            {
                continue;
            }
            let full = found.len() >= most;
            match found.last_mut() {
                Some(last) if at - last.end < NEAR => last.end = at + 1,
                _ if full => return found,
                _ => found.push(at..at + 1),
            }
        }
        at = chunk.end;
    }
    found
}

fn is_patched(at: usize, base: Gva, patched: &FxHashSet<u64>) -> bool {
    let at = base.0.wrapping_add(at as u64);
    (0..6).any(|before| patched.contains(&at.wrapping_sub(before)))
}

/// Whether the byte is part of an address or distance that has changed as far as things have moved.
fn has_moved(old: &[u8], now: &[u8], at: usize, moves: &FxHashSet<u64>, data: &dyn Fn(u64) -> bool) -> bool {
    let four = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let eight = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    (at.saturating_sub(AROUND)..=at).any(|start| {
        let short = at - start < 4
            && four(old, start).zip(four(now, start)).is_some_and(|(old, now)| {
                moves
                    .iter()
                    .any(|by| now.wrapping_sub(old) == *by as u32 && *by != 0)
            });
        short
            || eight(old, start)
                .zip(eight(now, start))
                .is_some_and(|(old, now)| now != old && moves.contains(&now.wrapping_sub(old)))
            || is_constant(old, now, start, data)
    })
}

/// An address of data that the kernel writes into its code at boot (6.11: `runtime_const_ptr`): the operand of `MOV r64, imm64`.
fn is_constant(old: &[u8], now: &[u8], start: usize, data: &dyn Fn(u64) -> bool) -> bool {
    let operand = |bytes: &[u8]| {
        let before = bytes.get(start.checked_sub(2)?..start)?;
        let value = u64::from_le_bytes(bytes.get(start..start + 8)?.try_into().ok()?);
        matches!(before, [0x48 | 0x49, 0xb8..=0xbf]).then_some(value)
    };
    // Where it was then may be nowhere now.
    operand(old).is_some_and(|value| DATA.contains(&value)) && operand(now).is_some_and(data)
}

/// The kernel's half without its image and modules (Documentation/arch/x86/x86_64/mm.rst).
pub(crate) const DATA: Range<u64> = 0xff00_0000_0000_0000..0xffff_ffff_8000_0000;

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Gva = Gva(0xffff_ffff_8100_0000);

    fn differ(old: &[u8], now: &[u8], patched: &[u64], moves: &[u64]) -> Vec<Range<usize>> {
        let patched = patched.iter().map(|at| BASE.0 + at).collect();
        let moves = moves.iter().copied().collect();
        differences(old, now, BASE, &patched, &moves, &|_| false, 16)
    }

    #[test]
    fn what_differs_is_told_once() {
        let old = vec![0x90; 10_000];
        let mut now = old.clone();
        assert!(differ(&old, &now, &[], &[]).is_empty());
        now[5000..5005].copy_from_slice(&[0xe9, 1, 2, 3, 4]);
        now[9000] = 0xcc;
        assert_eq!(differ(&old, &now, &[], &[]), vec![5000..5005, 9000..9001]);
        assert_eq!(
            differ(&old, &now, &[5000], &[]),
            vec![5000..5005, 9000..9001].split_off(1)
        );
        assert_eq!(
            differ(&old, &now, &[4999], &[]),
            vec![5000..5005, 9000..9001].split_off(1)
        );
        assert_eq!(differ(&old, &now, &[4994], &[]).len(), 2);
    }

    #[test]
    fn what_moved_is_not_told() {
        let mut old = vec![0x90; 64];
        let mut now = old.clone();
        // mov rdi, imm32 of something that moved by 0x1c00000, and one that did not.
        old[8..12].copy_from_slice(&0x8123_4567u32.to_le_bytes());
        now[8..12].copy_from_slice(&0x82e3_4567u32.to_le_bytes());
        assert!(differ(&old, &now, &[], &[0x1c0_0000]).is_empty());
        assert_eq!(differ(&old, &now, &[], &[0x200_0000]).len(), 1);
        assert_eq!(differ(&old, &now, &[], &[0]).len(), 1);
    }
}
