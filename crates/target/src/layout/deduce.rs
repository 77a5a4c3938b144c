//! The layout without a monitor: which of the process's mappings are guest memory, and which layout they may have.
//!
//! This gives candidates, the likeliest first. None is believed before somebody has found a guest in it.

use super::machine::{self, Split};
use super::{HostRange, joined};
use crate::discover::qemu::{Backend, QemuConfig, architecture};
use crate::host::maps::{self, Mapping};
use crate::{VmInfo, Vmm};

/// Most candidates given: each costs a search through the guest's memory.
const MAX_CANDIDATES: usize = 64;
/// Most arrangements of mappings that look alike (several backends of one size): all of four such.
const MAX_ARRANGEMENTS: usize = 24;
/// Most steps taken to find them.
const MAX_STEPS: usize = 10_000;
/// Anonymous mappings below this are no machine's memory.
const MIN_MEMORY: u64 = 16 << 20;

/// A layout that may be the machine's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Candidate {
    /// In words, for the message that lists what was tried.
    pub(crate) what: String,
    /// The layout.
    pub(crate) ranges: Vec<HostRange>,
}

/// A piece of host memory that holds a part of the machine's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    hva: u64,
    len: u64,
}

impl Candidate {
    /// Whether the other one has the same guest-physical memory, in other places of the process.
    pub(crate) fn is_rival_of(&self, other: &Self) -> bool {
        let memory = |c: &Self| {
            let mut spans: Vec<(u64, u64)> = Vec::new();
            for range in &c.ranges {
                match spans.last_mut() {
                    Some(last) if last.1 == range.gpa => last.1 = range.gpa.saturating_add(range.len),
                    _ => spans.push((range.gpa, range.gpa.saturating_add(range.len))),
                }
            }
            spans
        };
        self != other && memory(self) == memory(other)
    }
}

/// The candidates for a machine. An error says what is missing to make any.
pub(crate) fn candidates(info: &VmInfo, mappings: &[Mapping]) -> Result<Vec<Candidate>, String> {
    let maps = maps::joined(mappings);
    let arrangements = match (&info.qemu, info.vmm) {
        (Some(config), _) => of_qemu(config, info.memory_bytes, &maps)?,
        (None, vmm) => of_microvm(vmm, info.memory_bytes, &maps)?,
    };
    let file_name = info.exe.rsplit('/').next().unwrap_or_default();
    let arm = match architecture(file_name) {
        None => cfg!(target_arch = "aarch64"),
        Some("x86_64" | "i386") => false,
        Some("aarch64" | "arm") => true,
        Some(other) => return Err(format!("how {other} machines lay out their memory is not known")),
    };
    let max_below = info.qemu.as_ref().and_then(|q| q.max_ram_below_4g);
    let mut all: Vec<Candidate> = Vec::new();
    // Layout by layout and not arrangement by arrangement: the first layout is nearly always right.
    let total = |pieces: &[Piece]| pieces.iter().fold(0_u64, |n, p| n.saturating_add(p.len));
    let splits: Vec<(&Vec<Piece>, Vec<Split>)> = arrangements
        .iter()
        .map(|pieces| {
            let machine = info.machine.as_deref();
            let splits = machine::splits(info.vmm, machine, arm, max_below, total(pieces));
            (pieces, splits)
        })
        .collect();
    let most = splits.iter().map(|(_, splits)| splits.len()).max().unwrap_or(0);
    for nth in 0..most {
        for (pieces, splits) in &splits {
            let Some(split) = splits.get(nth) else { continue };
            let ranges = lay_out(pieces, *split);
            if all.iter().all(|c| c.ranges != ranges) && all.len() < MAX_CANDIDATES {
                all.push(Candidate {
                    what: describe(pieces, *split),
                    ranges,
                });
            }
        }
    }
    Ok(all)
}

/// Puts the pieces one after the other into the split's two ranges.
fn lay_out(pieces: &[Piece], split: Split) -> Vec<HostRange> {
    let mut ranges = Vec::new();
    let mut done = 0_u64; // bytes of the machine's memory placed so far
    for piece in pieces {
        let mut offset = 0;
        while offset < piece.len {
            let (gpa, room) = if done < split.below {
                (split.start.saturating_add(done), split.below - done)
            } else {
                (split.above_start.saturating_add(done - split.below), u64::MAX)
            };
            let len = (piece.len - offset).min(room);
            ranges.push(HostRange {
                gpa,
                len,
                hva: piece.hva.saturating_add(offset),
            });
            offset += len;
            done = done.saturating_add(len);
        }
    }
    joined(ranges)
}

fn describe(pieces: &[Piece], split: Split) -> String {
    let total: u64 = pieces.iter().fold(0, |n, p| n.saturating_add(p.len));
    let at: Vec<String> = pieces
        .iter()
        .map(|p| format!("{:#x}+{:#x}", p.hva, p.len))
        .collect();
    let above = match total.checked_sub(split.below) {
        Some(0) | None => String::new(),
        Some(rest) => format!(", {:#x} bytes from {:#x}", rest, split.above_start),
    };
    format!(
        "{:#x} bytes from {:#x}{above} (host memory {})",
        split.below,
        split.start,
        at.join(", ")
    )
}

/// The arrangements of a QEMU's main memory, the likeliest first.
fn of_qemu(config: &QemuConfig, memory: Option<u64>, maps: &[Mapping]) -> Result<Vec<Vec<Piece>>, String> {
    let wanted: Vec<&String> = if config.numa_backends.is_empty() {
        config.ram_backend.iter().collect()
    } else {
        config.numa_backends.iter().collect()
    };
    if wanted.is_empty() {
        let size = memory.ok_or("the size of its memory is not known")?;
        // A machine without a backend of its own: `-mem-path` or plain anonymous memory.
        let plain = Backend {
            id: "of -m".into(),
            kind: if config.mem_path.is_some() { "file" } else { "ram" }.into(),
            size: Some(size),
            share: false,
            mem_path: config.mem_path.clone(),
        };
        return Ok(arrangements(&[pieces_of(&plain, maps, &[])?], &[0]));
    }
    // QEMU makes its backends in the order of the command line, those of pluggable memory among them.
    let mut choices = Vec::new();
    let mut made: Vec<(&str, usize)> = Vec::new();
    for id in wanted {
        let at = config.backends.iter().position(|b| b.id == *id).ok_or_else(|| {
            format!("the command line names a memory backend {id} and does not describe it")
        })?;
        if let Some(backend) = config.backends.get(at) {
            choices.push(pieces_of(backend, maps, &config.backends)?);
            made.push((&backend.id, at));
        }
    }
    let main = choices.len();
    for (at, other) in config.backends.iter().enumerate() {
        if !made.iter().any(|(id, _)| *id == other.id)
            && let Ok(pieces) = pieces_of(other, maps, &config.backends)
        {
            choices.push(pieces);
            made.push((&other.id, at));
        }
    }
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by_key(|i| made.get(*i).map(|(_, at)| *at));
    let mut all: Vec<Vec<Piece>> = Vec::new();
    for mut pieces in arrangements(&choices, &order) {
        pieces.truncate(main);
        if !all.contains(&pieces) {
            all.push(pieces);
        }
    }
    Ok(all)
}

/// How a mapping's file fits a backend by its name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Named {
    /// It is another's.
    No,
    /// It may be.
    Maybe,
    /// It names this backend.
    Yes,
}

/// What the path of a mapping says. QEMU calls the files it makes in a folder `qemu_back_mem.ID.XXXXXX`, or with
/// `_objects_` before the id, a `/` in it made `_` (`file_ram_open` of softmmu/physmem.c, system/physmem.c); a
/// memfd has the name of its kind, from 9.2 on for some kinds the id.
fn names(mapping: &Mapping, backend: &Backend, all: &[Backend]) -> Named {
    let path = mapping.path.strip_suffix(" (deleted)").unwrap_or(&mapping.path);
    let is_id = |text: &str, id: &str| {
        let id = id.replace('/', "_");
        text == id || text.strip_prefix("_objects_") == Some(&id)
    };
    let of_name = |text: &str| {
        if is_id(text, &backend.id) {
            Named::Yes
        } else if all.iter().any(|b| is_id(text, &b.id)) {
            Named::No
        } else {
            Named::Maybe
        }
    };
    let memfd = path.strip_prefix("/memfd:");
    match backend.kind.as_str() {
        "memfd" => memfd.map_or(Named::No, of_name),
        "file" => {
            let Some(given) = backend.mem_path.as_deref() else {
                return Named::No;
            };
            let last = |text: &str| text.rsplit('/').find(|part| !part.is_empty()).map(str::to_owned);
            let (folder, file) = path.rsplit_once('/').unwrap_or(("", path));
            let made = file
                .strip_prefix("qemu_back_mem.")
                .and_then(|rest| rest.rsplit_once('.'));
            match made {
                Some((id, _)) if last(folder) == last(given) => of_name(id),
                Some(_) => Named::No,
                None if last(path) != last(given) => Named::No,
                // The path as given may be relative, or go over links.
                None if path == given => Named::Yes,
                None if all
                    .iter()
                    .any(|b| b.id != backend.id && b.mem_path.as_deref() == Some(path)) =>
                {
                    Named::No
                }
                None => Named::Maybe,
            }
        }
        "shm" if path.starts_with("/dev/shm/") => Named::Maybe,
        "shm" => Named::No,
        // share=on makes it a mapping of /dev/zero, from QEMU 9.2 on of a memfd.
        _ if mapping.is_anonymous() || path.starts_with("/dev/zero") => Named::Maybe,
        _ if mapping.shared => memfd.map_or(Named::No, of_name),
        _ => Named::No,
    }
}

/// The mappings that can be this backend's; `all` are the machine's backends.
fn pieces_of(backend: &Backend, maps: &[Mapping], all: &[Backend]) -> Result<Vec<Piece>, String> {
    let size = backend.size.filter(|s| *s > 0);
    let size = size.ok_or_else(|| format!("the size of memory backend {} is not known", backend.id))?;
    let fits = |m: &Mapping| m.read && m.write && !m.exec && m.len() >= size;
    // Where one mapping has the backend's name, those without any are not its.
    let best = maps
        .iter()
        .filter(|m| fits(m))
        .map(|m| names(m, backend, all))
        .max()
        .unwrap_or(Named::No)
        .max(Named::Maybe);
    let found: Vec<Piece> = maps
        .iter()
        .enumerate()
        .filter(|(_, m)| fits(m) && names(m, backend, all) == best)
        .filter_map(|(i, m)| {
            // QEMU leaves a page without rights behind each block; memory that grew together with what lies
            // before it still ends there. Files are mapped whole, rounded up to their (huge) pages.
            let guarded = maps
                .get(i + 1)
                .is_some_and(|next| next.start == m.end && !next.read && !next.write);
            let exact = m.len() == size || m.inode != 0;
            match (exact, guarded) {
                (true, _) => Some(Piece {
                    hva: m.start,
                    len: size,
                }),
                (false, true) => Some(Piece {
                    hva: m.end - size,
                    len: size,
                }),
                (false, false) => None,
            }
        })
        .collect();
    if found.is_empty() {
        return Err(format!(
            "the process has no mapping of {size:#x} bytes that could be memory backend {} ({})",
            backend.id, backend.kind
        ));
    }
    Ok(found)
}

/// Ways to give each backend a mapping of its own, bounded. `made` has the backends in the order in which QEMU makes them.
///
/// The kernel gives a process its mappings from the top down, so that first; then from the bottom up; then any other.
fn arrangements(choices: &[Vec<Piece>], made: &[usize]) -> Vec<Vec<Piece>> {
    let mut all: Vec<Vec<Piece>> = Vec::new();
    for downwards in [true, false] {
        let mut given: Vec<Option<Piece>> = vec![None; choices.len()];
        for &backend in made {
            let free = choices
                .get(backend)
                .into_iter()
                .flatten()
                .filter(|piece| !given.contains(&Some(**piece)));
            let piece = if downwards {
                free.max_by_key(|p| p.hva)
            } else {
                free.min_by_key(|p| p.hva)
            };
            let piece = piece.copied();
            if let Some(place) = given.get_mut(backend) {
                *place = piece;
            }
        }
        all.extend(given.into_iter().collect::<Option<Vec<Piece>>>());
    }
    let mut steps = 0;
    every_other(choices, &mut Vec::new(), &mut all, &mut steps);
    all.dedup();
    all
}

/// Adds to `all` what is not in it yet, in order of address.
fn every_other(
    choices: &[Vec<Piece>],
    partial: &mut Vec<Piece>,
    all: &mut Vec<Vec<Piece>>,
    steps: &mut usize,
) {
    *steps += 1;
    let Some(options) = choices.get(partial.len()) else {
        if !all.contains(partial) {
            all.push(partial.clone());
        }
        return;
    };
    for option in options {
        if all.len() >= MAX_ARRANGEMENTS || *steps >= MAX_STEPS {
            return;
        }
        if !partial.contains(option) {
            partial.push(*option);
            every_other(choices, partial, all, steps);
            partial.pop();
        }
    }
}

/// The arrangements of the smaller VMMs, which map one range for each region of guest memory, or all at once.
fn of_microvm(vmm: Vmm, memory: Option<u64>, maps: &[Mapping]) -> Result<Vec<Vec<Piece>>, String> {
    let mut big: Vec<Piece> = maps
        .iter()
        .filter(|m| m.read && m.write && !m.exec && m.len() >= MIN_MEMORY)
        .filter(|m| m.is_anonymous() || m.path.starts_with("/memfd:") || m.path.starts_with("/dev/huge"))
        .map(|m| Piece {
            hva: m.start,
            len: m.len(),
        })
        .collect();
    big.sort_by_key(|p| std::cmp::Reverse(p.len));
    let Some(memory) = memory else {
        // Only the process tells: its one biggest mapping, or that and the next.
        let one = big.first().map(|p| vec![*p]);
        let two = big.get(..2).map(<[Piece]>::to_vec);
        let all: Vec<Vec<Piece>> = one.into_iter().chain(two).collect();
        return if all.is_empty() {
            Err(format!("{vmm} has no memory of a machine mapped yet"))
        } else {
            Ok(all)
        };
    };
    let mut all: Vec<Vec<Piece>> = big
        .iter()
        .filter(|p| p.len == memory)
        .map(|p| vec![*p])
        .take(MAX_ARRANGEMENTS)
        .collect();
    // Two mappings that make up the size: below and above the hole, the lower one first in the guest.
    for (i, a) in big.iter().enumerate().take(8) {
        for b in big.iter().skip(i + 1).take(8) {
            if a.len.checked_add(b.len) == Some(memory) && all.len() + 1 < MAX_ARRANGEMENTS {
                all.push(vec![*a, *b]);
                all.push(vec![*b, *a]);
            }
        }
    }
    if all.is_empty() {
        return Err(format!(
            "the process has no mappings that make up its {memory:#x} bytes of memory"
        ));
    }
    Ok(all)
}

#[cfg(test)]
#[path = "deduce_tests.rs"]
mod tests;
