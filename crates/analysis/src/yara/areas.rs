//! What is mapped: the memory of a process, and the kernel's own areas, by virtual address.

use std::fmt;
use std::ops::RangeInclusive;

use boreal::memory::{FragmentedMemory, MemoryParams, Region, RegionDescription};
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use vmsight_arch::Gva;
use vmsight_linux::{Kernel, LinuxError};
use vmsight_memory::AddressSpace;

use super::engine::{AROUND, KEPT, Run, surround};
use super::{Limits, OVERLAP, Rules, Scanned};
use crate::frames;

/// Page tables visited for one mapping.
const MAX_TABLES: u64 = 1 << 21;
/// The longest run of pages that is read at once; what is longer is cut, and shows [`OVERLAP`] of what follows.
const LONGEST: u64 = 32 << 20;
/// What is mapped may be so many times the guest's memory; more is a lie of its page tables.
const MAX_COPIES: u64 = 4;
/// Runs of pages of one scan.
const MAX_RUNS: usize = 1 << 20;
const PAGE: u64 = 4096;

/// Scans what processes have in memory, several at once. Addresses are each process's own; the bounds are those of all together.
///
/// Of each the matches and what could not be looked at, or why nothing could; and what is to be said of the scan as a whole.
pub fn processes(
    kernel: &Kernel,
    pids: &[i32],
    rules: &Rules,
    limits: Limits,
) -> (Vec<OfProcess>, Vec<String>) {
    let run = Run::new(rules, limits, true);
    let found = pids
        .par_iter()
        .map(|pid| (*pid, process(kernel, *pid, &run)))
        .collect();
    (found, run.notes())
}

/// A process's pid, and what was found in its memory.
pub type OfProcess = (i32, Result<Scanned, LinuxError>);

fn process(kernel: &Kernel, pid: i32, run: &Run<'_>) -> Result<Scanned, LinuxError> {
    let Some(space) = kernel.process_space(pid)? else {
        return Ok(Scanned {
            notes: vec!["it has no memory of its own: it is a kernel thread, or has ended".to_owned()],
            ..Scanned::default()
        });
    };
    let maps = kernel.maps(pid)?;
    let ranges = maps.rows.iter().filter_map(|map| {
        let last = map.end.0.checked_sub(1)?;
        (last >= map.start.0).then_some(map.start..=Gva(last))
    });
    let mut out = scan(&space, ranges, run);
    out.notes.extend(maps.warnings);
    Ok(out)
}

/// Scans what of the kernel is mapped elsewhere than all memory is: its image, its modules, and what it gets with vmalloc.
pub fn kernel_areas(kernel: &Kernel, rules: &Rules, limits: Limits) -> Scanned {
    let run = Run::new(rules, limits, false);
    let mut out = scan(kernel.space(), frames::kernel_areas(kernel), &run);
    out.notes.extend(run.notes());
    out
}

fn scan(
    space: &AddressSpace,
    ranges: impl IntoIterator<Item = RangeInclusive<Gva>>,
    run: &Run<'_>,
) -> Scanned {
    let mut out = Scanned::default();
    let runs = runs(space, ranges, &mut out.notes);
    out.looked_at = runs.iter().map(|run| run.own).sum();
    let found = run.pieces(Areas {
        space,
        runs: &runs,
        next: 0,
        bytes: Vec::new(),
        held: None,
    });
    for one in found {
        let (mut one, base) = (one.found, one.base as u64);
        if one.pattern.is_none() {
            one.address = runs.first().map_or(0, |run| run.start);
            out.matches.push(one);
            continue;
        }
        let at = runs.partition_point(|run| run.start <= base).checked_sub(1);
        let Some(of) = at.and_then(|at| runs.get(at)) else {
            continue;
        };
        // What begins in what a run shows of the next is that one's.
        if one.address.wrapping_sub(of.start) >= of.own {
            continue;
        }
        let start = one.address.saturating_sub(AROUND as u64).max(of.start);
        let end = one.address.saturating_add((KEPT + AROUND) as u64).min(of.end());
        let mut around = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0)];
        if space.read(Gva(start), &mut around).is_ok() {
            let before = usize::try_from(one.address - start).unwrap_or(0);
            surround(&mut one, &around, before);
        }
        out.matches.push(one);
    }
    out.sort();
    out
}

/// Pages that follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Pages {
    start: u64,
    /// Bytes without what is shown of the next run.
    own: u64,
    len: u64,
}

impl Pages {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// The runs of pages in these ranges, by rising address.
fn runs(
    space: &AddressSpace,
    ranges: impl IntoIterator<Item = RangeInclusive<Gva>>,
    notes: &mut Vec<String>,
) -> Vec<Pages> {
    let mut left = space.memory().size().saturating_mul(MAX_COPIES);
    let mut runs: Vec<(u64, u64)> = Vec::new();
    'all: for range in ranges {
        let (first, last) = (range.start().0, range.end().0);
        for page in space.mappings(range, MAX_TABLES) {
            let page = match page {
                Ok(page) => page,
                Err(limit) => {
                    notes.push(limit.to_string());
                    break;
                }
            };
            let start = page.gva.0.max(first);
            let end = page
                .gva
                .0
                .saturating_add(page.translation.page_size() - 1)
                .min(last);
            let length = end.saturating_sub(start).saturating_add(1);
            if length > left || runs.len() >= MAX_RUNS {
                notes.push("cut: more is mapped than four times the guest's memory".to_owned());
                break 'all;
            }
            left -= length;
            match runs.last_mut() {
                Some((from, size)) if from.checked_add(*size) == Some(start) => *size += length,
                _ => runs.push((start, length)),
            }
        }
    }
    runs.sort_unstable();
    runs.into_iter()
        .flat_map(|(start, length)| cut(start, length))
        .collect()
}

/// A run in pieces that are not too long.
fn cut(start: u64, length: u64) -> impl Iterator<Item = Pages> {
    (0..length.div_ceil(LONGEST)).map(move |piece| {
        let at = piece * LONGEST;
        let own = LONGEST.min(length - at);
        Pages {
            start: start + at,
            own,
            len: own.saturating_add(OVERLAP as u64).min(length - at),
        }
    })
}

/// Runs of pages as the engine asks for them.
struct Areas<'s> {
    space: &'s AddressSpace,
    runs: &'s [Pages],
    next: usize,
    bytes: Vec<u8>,
    /// The run that `bytes` are of.
    held: Option<usize>,
}

impl fmt::Debug for Areas<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} runs of pages", self.runs.len())
    }
}

impl FragmentedMemory for Areas<'_> {
    fn next(&mut self, _: &MemoryParams) -> Option<RegionDescription> {
        let run = self.runs.get(self.next)?;
        self.next += 1;
        Some(RegionDescription {
            start: usize::try_from(run.start).ok()?,
            length: usize::try_from(run.len).ok()?,
        })
    }

    fn fetch(&mut self, _: &MemoryParams) -> Option<Region<'_>> {
        let index = self.next.checked_sub(1)?;
        let run = self.runs.get(index)?;
        if self.held != Some(index) {
            self.bytes.resize(usize::try_from(run.len).ok()?, 0);
            read(self.space, Gva(run.start), &mut self.bytes);
            self.held = Some(index);
        }
        Some(Region {
            start: usize::try_from(run.start).ok()?,
            mem: &self.bytes,
        })
    }

    fn reset(&mut self) {
        self.next = 0;
    }
}

/// Fills `bytes`; a page that cannot be read any more is zeros.
fn read(space: &AddressSpace, start: Gva, bytes: &mut [u8]) {
    if space.read(start, bytes).is_ok() {
        return;
    }
    let mut at = start;
    let mut rest = bytes;
    while !rest.is_empty() {
        let page = (PAGE as usize - at.page_offset()).min(rest.len());
        let (this, behind) = rest.split_at_mut(page);
        if space.read(at, this).is_err() {
            this.fill(0);
        }
        at = at.wrapping_add(page as u64);
        rest = behind;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_is_cut_with_what_follows_shown() {
        let runs: Vec<Pages> = cut(0x1000, LONGEST + 0x2000).collect();
        let second = Pages {
            start: 0x1000 + LONGEST,
            own: 0x2000,
            len: 0x2000,
        };
        let first = Pages {
            start: 0x1000,
            own: LONGEST,
            len: LONGEST + 0x2000,
        };
        assert_eq!(runs, [first, second]);
        assert_eq!(cut(0x1000, LONGEST).count(), 1);
        let long: Vec<Pages> = cut(0, 3 * LONGEST).collect();
        assert_eq!(long[1].len, LONGEST + OVERLAP as u64);
        assert_eq!(long[1].end(), long[2].start + OVERLAP as u64);
    }
}
