//! The layout as QEMU's monitor tells it, checked against the process.

use std::collections::{BTreeMap, BTreeSet};

use super::{HostRange, joined};
use crate::host::maps::Mapping;
use crate::monitor::{self, FlatRange};

/// Most ranges whose address is asked for again one by one.
const MAX_CHECKED: usize = 64;

/// Devices' ranges that are looked at.
const MAX_OF_DEVICES: usize = 64;

/// What is smaller is a window through which firmware is shown.
const WINDOW: u64 = 1 << 20;

/// Why the monitor's answer is of no use.
#[derive(Debug)]
pub(crate) enum MonitorFailure<E> {
    /// The monitor did not answer.
    Monitor(E),
    /// Its answers do not fit together, or not to the process.
    Inconsistent(String),
}

impl<E> From<E> for MonitorFailure<E> {
    fn from(error: E) -> Self {
        Self::Monitor(error)
    }
}

/// Whether a monitor's table of blocks says where each lies: from QEMU 8.1 on. Before, it says nothing that is needed, and
/// each question costs, by QMP some 0.4 ms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Blocks {
    /// It is asked for.
    Placed,
    /// It is not.
    Unplaced,
    /// It is asked for, for nobody knows.
    Unknown,
}

impl Blocks {
    /// What a QEMU of this version, major and minor, says.
    pub(crate) fn of_version(version: (u32, u32)) -> Self {
        if version >= (8, 1) {
            Self::Placed
        } else {
            Self::Unplaced
        }
    }
}

/// What is asked first, whatever the machine: what lies where, where the process has what on a PC is the beginning of its
/// main memory, and which blocks there are.
pub(crate) fn first_questions(blocks: Blocks) -> Vec<String> {
    let mut lines = vec!["info mtree -f".to_owned(), gpa2hva(MAIN_MEMORY)];
    if blocks != Blocks::Unplaced {
        lines.push("info ramblock".to_owned());
    }
    lines
}

/// Behind what a PC shows of its firmware and of its screen (all versions of hw/i386).
const MAIN_MEMORY: u64 = 0x10_0000;

fn gpa2hva(gpa: u64) -> String {
    format!("gpa2hva {gpa:#x}")
}

/// Asks where the memory of the guest's devices lies. `hmp` and `backends` are as for [`ask`].
pub(crate) fn ask_devices<E>(
    backends: &[String],
    mut hmp: impl FnMut(&[String]) -> Result<Vec<String>, E>,
) -> Result<Vec<HostRange>, MonitorFailure<E>> {
    again(|| devices_once(backends, &mut hmp))
}

/// Blocks of two cards have one name, so each range is asked for by itself, at both ends: what is between lies between.
fn devices_once<E>(
    backends: &[String],
    hmp: &mut impl FnMut(&[String]) -> Result<Vec<String>, E>,
) -> Result<Vec<HostRange>, MonitorFailure<E>> {
    let inconsistent = |reason: String| Err(MonitorFailure::Inconsistent(reason));
    let tree = hmp(&["info mtree -f".to_owned()])?;
    let Some(mut flat) = tree
        .first()
        .and_then(|tree| monitor::device_memory(tree, backends))
    else {
        return inconsistent("info mtree -f shows no address space called memory".into());
    };
    flat.truncate(MAX_OF_DEVICES);
    if flat.is_empty() {
        return Ok(Vec::new());
    }
    let ends = |r: &FlatRange| [r.gpa, r.gpa.saturating_add(r.len - 1)];
    let lines: Vec<String> = flat.iter().flat_map(ends).map(gpa2hva).collect();
    let answers = hmp(&lines)?;
    if answers.len() != lines.len() {
        return inconsistent("not every command was answered".into());
    }
    let mut ranges = Vec::with_capacity(flat.len());
    for (range, answers) in flat.iter().zip(answers.chunks_exact(2)) {
        let ends: Vec<u64> = answers.iter().filter_map(|a| monitor::parse_gpa2hva(a)).collect();
        match ends[..] {
            [hva, last] if hva.checked_add(range.len - 1) == Some(last) => ranges.push(HostRange {
                gpa: range.gpa,
                len: range.len,
                hva,
            }),
            _ => {
                return inconsistent(format!(
                    "gpa2hva does not know {} at {:#x} as one piece",
                    range.block, range.gpa
                ));
            }
        }
    }
    Ok(joined(ranges))
}

/// Asks up to three times, as long as the answers disagree.
fn again<T, E>(mut once: impl FnMut() -> Result<T, MonitorFailure<E>>) -> Result<T, MonitorFailure<E>> {
    let mut last = String::new();
    for _ in 0..3 {
        match once() {
            Err(MonitorFailure::Inconsistent(reason)) => last = reason,
            other => return other,
        }
    }
    Err(MonitorFailure::Inconsistent(last))
}

/// Asks for the layout. `hmp` runs lines of the human monitor in their order, and gives a text for each; `backends` are the ids of the memory backends.
/// The guest changes its layout while its firmware runs, so answers that disagree are asked for again.
pub(crate) fn ask<E>(
    backends: &[String],
    blocks: Blocks,
    mut hmp: impl FnMut(&[String]) -> Result<Vec<String>, E>,
) -> Result<Vec<HostRange>, MonitorFailure<E>> {
    again(|| ask_once(backends, blocks, &mut hmp))
}

fn ask_once<E>(
    backends: &[String],
    blocks: Blocks,
    hmp: &mut impl FnMut(&[String]) -> Result<Vec<String>, E>,
) -> Result<Vec<HostRange>, MonitorFailure<E>> {
    let inconsistent = |reason: String| Err(MonitorFailure::Inconsistent(reason));
    let questions = first_questions(blocks);
    let answers = hmp(&questions)?;
    let ([tree, main, blocks @ ..], true) = (&answers[..], answers.len() == questions.len()) else {
        return inconsistent("not every command was answered".into());
    };
    let Some(flat) = monitor::guest_memory(tree, backends) else {
        return inconsistent("info mtree -f shows no address space called memory".into());
    };
    if flat.is_empty() {
        return inconsistent("info mtree -f shows no main memory".into());
    }
    let blocks = blocks
        .first()
        .map(|table| monitor::parse_ramblocks(table))
        .unwrap_or_default();
    // A block's id ends with its region's name.
    let mut bases: BTreeMap<&str, u64> = BTreeMap::new();
    for range in &flat {
        let named = |b: &&monitor::RamBlock| {
            b.id == range.block
                || b.id
                    .strip_suffix(range.block.as_str())
                    .is_some_and(|r| r.ends_with('/'))
        };
        let mut matching = blocks.iter().filter(named);
        if let (Some(block), None) = (matching.next(), matching.next()) {
            if range
                .offset
                .checked_add(range.len)
                .is_none_or(|end| end > block.used)
            {
                return inconsistent(format!(
                    "block {} has {:#x} bytes, but {:#x} at {:#x} are in use",
                    block.id, block.used, range.len, range.offset
                ));
            }
            if let Some(hva) = block.hva {
                bases.insert(&range.block, hva);
            }
        }
    }
    // Where every range that counts lies is asked outright, and of each block that nothing has told yet one of its ranges. The
    // windows below 1 MiB through which firmware is shown come and go; they lie where their block does. gpa2hva takes what
    // is plain RAM only, so shadowed ROM is placed through its block.
    let ram = || flat.iter().filter(|r| r.kind.ends_with("ram"));
    let mut asked: Vec<&FlatRange> = ram().filter(|r| r.len >= WINDOW).take(MAX_CHECKED).collect();
    let mut placed: BTreeSet<&str> = bases.keys().copied().collect();
    placed.extend(asked.iter().map(|r| r.block.as_str()));
    asked.extend(ram().filter(|r| placed.insert(&r.block)));
    // One of the answers is there already.
    let (first, rest): (Vec<&FlatRange>, Vec<&FlatRange>) =
        asked.into_iter().partition(|r| r.gpa == MAIN_MEMORY);
    let lines: Vec<String> = rest.iter().map(|r| gpa2hva(r.gpa)).collect();
    let answers = if lines.is_empty() {
        Vec::new()
    } else {
        hmp(&lines)?
    };
    if answers.len() != rest.len() {
        return inconsistent("not every command was answered".into());
    }
    let answered = first
        .into_iter()
        .map(|r| (r, main))
        .chain(rest.into_iter().zip(&answers));
    for (range, answer) in answered {
        let Some(hva) = monitor::parse_gpa2hva(answer) else {
            return inconsistent(format!("gpa2hva knows no memory at {:#x}", range.gpa));
        };
        let Some(base) = hva.checked_sub(range.offset) else {
            return inconsistent(format!("gpa2hva puts {:#x} at {hva:#x}", range.gpa));
        };
        let known = *bases.entry(&range.block).or_insert(base);
        if known != base {
            return inconsistent(format!("block {} is at {known:#x} and at {base:#x}", range.block));
        }
    }
    let mut ranges = Vec::with_capacity(flat.len());
    for range in &flat {
        let base = bases.get(range.block.as_str());
        match base.and_then(|b| b.checked_add(range.offset)) {
            Some(hva) => ranges.push(HostRange {
                gpa: range.gpa,
                len: range.len,
                hva,
            }),
            None => return inconsistent(format!("nothing tells where block {} lies", range.block)),
        }
    }
    Ok(joined(ranges))
}

/// Whether the process has readable memory at every one of `ranges`; `maps` are its mappings in order.
pub(crate) fn check(ranges: &[HostRange], maps: &[Mapping]) -> Result<(), String> {
    for range in ranges {
        let end = range
            .hva
            .checked_add(range.len)
            .ok_or_else(|| format!("impossible range {range}"))?;
        let mut at = range.hva;
        while at < end {
            let found = maps.iter().find(|m| m.start <= at && at < m.end && m.read);
            at = found
                .ok_or_else(|| format!("{range}: the process has no memory at {at:#x}"))?
                .end;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::maps;

    const MTREE: &str = include_str!("../monitor/captured/qemu10.0-q35-backends.mtree");
    const NEW: &str = include_str!("../monitor/captured/qemu10.0-q35-backends.ramblock");
    const OLD: &str = include_str!("../monitor/captured/qemu7.2-q35-backends.ramblock");

    /// Asks line by line.
    fn ask<E>(
        backends: &[String],
        mut answer: impl FnMut(&str) -> Result<String, E>,
    ) -> Result<Vec<HostRange>, MonitorFailure<E>> {
        super::ask(backends, Blocks::Unknown, |lines| {
            lines.iter().map(|line| answer(line)).collect()
        })
    }

    /// Answers as the captured machine did, with its blocks where `NEW` says they are.
    fn answer(line: &str, blocks: &str) -> Result<String, ()> {
        if let Some(gpa) = line.strip_prefix("gpa2hva 0x") {
            let gpa = u64::from_str_radix(gpa, 16).map_err(|_| ())?;
            let hva = match gpa {
                0..0x8000_0000 => 0x7fa1_abff_f000 + gpa,
                0x1_0000_0000..0x1_c000_0000 => 0x7fa1_abff_f000 + gpa - 0x8000_0000,
                0x1_c000_0000..0x1_d000_0000 => 0x7fa1_9bc0_0000 + gpa - 0x1_c000_0000,
                _ => 0x7fa1_5bbf_f000 + gpa - 0x1_d000_0000,
            };
            return Ok(format!("Host virtual address for {gpa:#x} (x) is {hva:#x}\n"));
        }
        Ok(if line == "info ramblock" { blocks } else { MTREE }.to_owned())
    }

    fn backends() -> Vec<String> {
        ["mem", "d1", "vm1"].map(str::to_owned).to_vec()
    }

    #[test]
    fn old_and_new_tables_give_one_layout() {
        let layouts = [OLD, NEW].map(|blocks| ask(&backends(), |line| answer(line, blocks)).unwrap());
        assert_eq!(layouts[0], layouts[1]);
        let shown: Vec<String> = layouts[0].iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "0x0-0xa0000 at 0x7fa1abfff000",
                "0x100000-0x80000000 at 0x7fa1ac0ff000",
                "0x100000000-0x1c0000000 at 0x7fa22bfff000",
                "0x1c0000000-0x1d0000000 at 0x7fa19bc00000",
                "0x1d0000000-0x210000000 at 0x7fa15bbff000",
            ]
        );
    }

    #[test]
    fn answers_that_disagree_are_asked_again_and_refused() {
        let mut tables = 0;
        let result: Result<_, MonitorFailure<()>> = ask(&backends(), |line| {
            tables += usize::from(line == "info ramblock");
            if line == "gpa2hva 0x100000" {
                return Ok("Host virtual address for 0x100000 (mem) is 0x7fff00000000\n".into());
            }
            answer(line, OLD)
        });
        assert!(matches!(result, Err(MonitorFailure::Inconsistent(r)) if r.contains("block mem is at")));
        assert_eq!(tables, 3);
        let result: Result<_, MonitorFailure<()>> = ask(&backends(), |_| Ok(String::new()));
        assert!(matches!(result, Err(MonitorFailure::Inconsistent(_))));
        assert!(matches!(
            ask(&backends(), |_| Err(7)),
            Err(MonitorFailure::Monitor(7))
        ));
    }

    #[test]
    fn few_questions_are_asked_and_many_at_once() {
        for (blocks, table, first, then) in [
            // Two ranges above 4 GiB are of blocks that nothing has placed yet, one goes on with what was.
            (Blocks::Unplaced, OLD, 2, 3),
            (Blocks::Unknown, OLD, 3, 3),
            (Blocks::Placed, NEW, 3, 3),
        ] {
            let mut asked = Vec::new();
            let layout: Result<_, MonitorFailure<()>> = super::ask(&backends(), blocks, |lines| {
                asked.push(lines.len());
                lines.iter().map(|line| answer(line, table)).collect()
            });
            assert_eq!(asked, [first, then], "{blocks:?}");
            let whole = ask(&backends(), |line| answer(line, OLD)).unwrap();
            assert_eq!(layout.unwrap(), whole, "{blocks:?}");
        }
        // A monitor that leaves out an answer must not have the others taken for it.
        for blocks in [Blocks::Unplaced, Blocks::Unknown] {
            let short: Result<_, MonitorFailure<()>> = super::ask(&backends(), blocks, |lines| {
                lines.iter().skip(1).map(|line| answer(line, OLD)).collect()
            });
            assert!(matches!(short, Err(MonitorFailure::Inconsistent(r)) if r.contains("answered")));
        }
    }

    #[test]
    fn one_round_of_questions_does_for_a_small_pc() {
        const BOOTED: &str = include_str!("../monitor/captured/qemu7.2-pc-booted.mtree");
        let mut rounds = 0;
        let layout: Result<_, MonitorFailure<()>> =
            super::ask(&["pc.ram".to_owned()], Blocks::Unplaced, |lines| {
                rounds += 1;
                let answer = |line: &String| match line.strip_prefix("gpa2hva 0x") {
                    None => BOOTED.to_owned(),
                    Some(gpa) => {
                        let hva = 0x7f00_0000_0000 + u64::from_str_radix(gpa, 16).unwrap();
                        format!("Host virtual address for 0x{gpa} (pc.ram) is {hva:#x}\n")
                    }
                };
                Ok(lines.iter().map(answer).collect())
            });
        let layout = layout.unwrap();
        assert_eq!(rounds, 1);
        assert!(layout.iter().all(|r| r.hva == 0x7f00_0000_0000 + r.gpa));
        assert_eq!(layout.first().map(|r| r.gpa), Some(0));
    }

    /// Two cards, whose blocks have one name.
    const CARDS: &str = "FlatView #0\n AS \"memory\", root: system\n\
                         \u{20} 0000000000000000-000000001fffffff (prio 0, ram): pc.ram\n\
                         \u{20} 00000000fc000000-00000000fcffffff (prio 1, ram): vga.vram\n\
                         \u{20} 00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\n";

    fn devices(place: impl Fn(u64) -> u64) -> Result<Vec<HostRange>, MonitorFailure<()>> {
        ask_devices(&["pc.ram".to_owned()], |lines| {
            let answer = |line: &String| match line.strip_prefix("gpa2hva 0x") {
                None => CARDS.to_owned(),
                Some(gpa) => {
                    let hva = place(u64::from_str_radix(gpa, 16).unwrap());
                    format!("Host virtual address for 0x{gpa} (vga.vram) is {hva:#x}\n")
                }
            };
            Ok(lines.iter().map(answer).collect())
        })
    }

    #[test]
    fn memory_of_devices_is_placed_range_by_range() {
        let place = |gpa| match gpa {
            0..0xfd00_0000 => gpa + 0x7f00_0000_0000,
            _ => gpa + 0x7e00_0000_0000,
        };
        let shown: Vec<String> = devices(place).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "0xfc000000-0xfd000000 at 0x7f00fc000000",
                "0xfd000000-0xfe000000 at 0x7e00fd000000"
            ]
        );
        // The guest has moved it between two questions.
        let moved = devices(|gpa| {
            if gpa == 0xfdff_ffff {
                0x7d00_0000_0000
            } else {
                place(gpa)
            }
        });
        assert!(matches!(moved, Err(MonitorFailure::Inconsistent(reason)) if reason.contains("one piece")));
        let nobody: Result<_, MonitorFailure<()>> = ask_devices(&[], |_| Ok(Vec::new()));
        assert!(matches!(nobody, Err(MonitorFailure::Inconsistent(_))));
    }

    #[test]
    fn what_a_version_says_of_its_blocks() {
        assert_eq!(Blocks::of_version((7, 2)), Blocks::Unplaced);
        assert_eq!(Blocks::of_version((8, 0)), Blocks::Unplaced);
        assert_eq!(Blocks::of_version((8, 1)), Blocks::Placed);
        assert_eq!(Blocks::of_version((10, 0)), Blocks::Placed);
    }

    #[test]
    fn a_layout_must_fit_the_process() {
        let maps = maps::parse(
            "1000-3000 rw-p 0 00:00 0\n3000-5000 rw-s 0 00:01 7 /memfd:x\n6000-7000 ---p 0 00:00 0\n",
        );
        let range = |hva, len| HostRange { gpa: 0, len, hva };
        assert!(check(&[range(0x1000, 0x4000)], &maps).is_ok());
        assert!(
            check(&[range(0x1000, 0x4001)], &maps)
                .unwrap_err()
                .contains("no memory at 0x5000")
        );
        assert!(
            check(&[range(0x6000, 1)], &maps).is_err(),
            "a guard page is no memory"
        );
        assert!(check(&[range(u64::MAX, 2)], &maps).is_err());
    }
}
