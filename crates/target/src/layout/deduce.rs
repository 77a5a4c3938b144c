//! The layout without a monitor: which of the process's mappings are guest memory, and which layout they may have.
//!
//! This gives candidates, the likeliest first. None is believed before somebody has found a guest in it.

use super::machine::{self, Split};
use super::{HostRange, joined};
use crate::discover::qemu::{Backend, QemuConfig, architecture};
use crate::host::maps::{self, Mapping};
use crate::{VmInfo, Vmm};

/// Most candidates given: each costs a search through the guest's memory.
const MAX_CANDIDATES: usize = 24;
/// Most arrangements of mappings that look alike (several backends of one size).
const MAX_ARRANGEMENTS: usize = 6;
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
    for pieces in &arrangements {
        for split in machine::splits(info.vmm, info.machine.as_deref(), arm, max_below, total(pieces)) {
            let ranges = lay_out(pieces, split);
            if all.iter().all(|c| c.ranges != ranges) && all.len() < MAX_CANDIDATES {
                all.push(Candidate {
                    what: describe(pieces, split),
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

/// The arrangements of a QEMU's main memory.
fn of_qemu(config: &QemuConfig, memory: Option<u64>, maps: &[Mapping]) -> Result<Vec<Vec<Piece>>, String> {
    let backend =
        |id: &String| {
            config.backends.iter().find(|b| b.id == *id).ok_or_else(|| {
                format!("the command line names a memory backend {id} and does not describe it")
            })
        };
    let choices: Vec<Vec<Piece>> = if !config.numa_backends.is_empty() {
        config
            .numa_backends
            .iter()
            .map(|id| pieces_of(backend(id)?, maps))
            .collect::<Result<_, String>>()?
    } else if let Some(id) = &config.ram_backend {
        vec![pieces_of(backend(id)?, maps)?]
    } else {
        let size = memory.ok_or("the size of its memory is not known")?;
        // A machine without a backend of its own: `-mem-path` or plain anonymous memory.
        let plain = Backend {
            id: "of -m".into(),
            kind: if config.mem_path.is_some() { "file" } else { "ram" }.into(),
            size: Some(size),
            share: false,
            mem_path: config.mem_path.clone(),
        };
        vec![pieces_of(&plain, maps)?]
    };
    Ok(arrangements(&choices))
}

/// The mappings that can be this backend's.
fn pieces_of(backend: &Backend, maps: &[Mapping]) -> Result<Vec<Piece>, String> {
    let size = backend.size.filter(|s| *s > 0);
    let size = size.ok_or_else(|| format!("the size of memory backend {} is not known", backend.id))?;
    let is_kind = |m: &&Mapping| match backend.kind.as_str() {
        "memfd" => m.path.starts_with("/memfd:"),
        // A directory as mem-path holds files with names of QEMU's making, deleted at once.
        "file" => backend.mem_path.as_deref().is_some_and(|p| {
            let name = p.rsplit('/').find(|part| !part.is_empty()).unwrap_or(p);
            m.path.contains(name)
        }),
        "shm" => m.path.starts_with("/dev/shm/"),
        // share=on makes it a mapping of /dev/zero, from QEMU 9.2 on of a memfd.
        _ => {
            m.is_anonymous() || m.path.starts_with("/dev/zero") || (m.shared && m.path.starts_with("/memfd:"))
        }
    };
    let found: Vec<Piece> = maps
        .iter()
        .enumerate()
        .filter(|(_, m)| m.read && m.write && !m.exec && is_kind(m) && m.len() >= size)
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

/// Every way to give each backend a mapping of its own, in order of address, bounded.
fn arrangements(choices: &[Vec<Piece>]) -> Vec<Vec<Piece>> {
    let mut all: Vec<Vec<Piece>> = vec![Vec::new()];
    for options in choices {
        let mut next = Vec::new();
        for partial in &all {
            for option in options {
                if !partial.contains(option) && next.len() < MAX_ARRANGEMENTS {
                    let mut longer = partial.clone();
                    longer.push(*option);
                    next.push(longer);
                }
            }
        }
        all = next;
    }
    all
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
