//! Proof that every piece of host memory is where a layout puts it.
//!
//! A guest may have several pieces of one size (memory backends of NUMA nodes), and a layout that only confuses those
//! that do not hold the kernel looks right: the kernel is found, and memory ends where it should. So each piece must
//! show something that names its own address: a structure with a pointer to itself, or one that its neighbour in a list
//! points to and that points back. In another piece's bytes such a thing is not at that address.

use vmsight_arch::{Gpa, Gva};
use vmsight_memory::Region;

use crate::Kernel;

/// Most NUMA nodes looked at: `1 << CONFIG_NODES_SHIFT` of distributions.
const MAX_NODES: u64 = 1024;
/// Most zones of a node, orders of free memory, and kinds of it: more than any kernel has.
const MAX_ZONES: usize = 8;
const MAX_ORDERS: usize = 16;
const MAX_KINDS: usize = 10;
/// The address of a table in CR3 or an entry (SDM vol. 3A 4.5).
const TABLE: u64 = 0x000f_ffff_ffff_f000;
/// What of an entry says where it leads: the address and that it is present. The processor writes other bits.
const LEADS: u64 = TABLE | 1;
/// Most tasks looked at.
const MAX_TASKS: usize = 8192;

/// The pieces of memory, and which of them were seen to be in their place.
struct Pieces {
    pieces: Vec<(Vec<Region>, bool)>,
}

/// Those of `pieces` in which nothing of the kernel's was found that proves their place; each is given by its
/// guest-physical ranges.
///
/// Looked at, until every piece has shown something: the kernel's image; the page tables by which processors are started,
/// below 1 MiB; the node descriptors (`pglist_data`), which the
/// kernel allocates in each node's own memory; free pages' entries of the page array, which it allocates there too
/// (without NUMA: at the end of memory); tasks; and the page tables of processes.
pub(super) fn unproven(kernel: &Kernel, pieces: Vec<Vec<Region>>) -> Vec<Vec<Region>> {
    let mut pieces = Pieces {
        pieces: pieces.into_iter().map(|piece| (piece, false)).collect(),
    };
    // Where it is was proven when it was found.
    if let Some(gpa) = kernel.find_symbol(&["max_pfn"]).and_then(|at| place(kernel, at)) {
        pieces.saw(gpa);
    }
    if !pieces.all_seen() {
        trampoline(kernel, &mut pieces);
        let nodes = nodes(kernel, &mut pieces);
        for node in nodes {
            free_pages(kernel, node, &mut pieces);
        }
        tasks(kernel, &mut pieces);
    }
    pieces.unseen()
}

impl Pieces {
    fn saw(&mut self, gpa: Gpa) {
        for (piece, seen) in &mut self.pieces {
            *seen |= piece.iter().any(|region| region.contains(gpa));
        }
    }

    fn all_seen(&self) -> bool {
        self.pieces.iter().all(|(_, seen)| *seen)
    }

    fn unseen(self) -> Vec<Vec<Region>> {
        self.pieces
            .into_iter()
            .filter_map(|(piece, seen)| (!seen).then_some(piece))
            .collect()
    }
}

fn place(kernel: &Kernel, at: Gva) -> Option<Gpa> {
    kernel.space().translate(at).ok().map(|page| page.gpa)
}

fn pointer(kernel: &Kernel, at: u64) -> Option<u64> {
    kernel.space().read_u64(Gva(at)).ok()
}

/// The root page table of the trampoline below 1 MiB, by which processors start: its last entry is the kernel's own
/// (`setup_real_mode` in arch/x86/realmode/init.c, all versions).
fn trampoline(kernel: &Kernel, pieces: &mut Pieces) {
    let (Ok(header), Ok(offset)) = (
        kernel.symbol_pointer("real_mode_header"),
        kernel.offset("real_mode_header", "trampoline_pgd"),
    ) else {
        return;
    };
    let Ok(table) = kernel.space().read_u32(Gva(header.0.wrapping_add(offset))) else {
        return;
    };
    let table = Gpa(u64::from(table));
    let last = |table| kernel_half(kernel, table).last().map(|entry| entry & LEADS);
    let kernels = last(Gpa(kernel.space().dtb().0 & TABLE)).filter(|entry| entry & 1 != 0);
    if kernels.is_some() && last(table) == kernels {
        pieces.saw(table);
    }
}

/// The node descriptors. Each knows its number, and its zones point back to it.
fn nodes(kernel: &Kernel, pieces: &mut Pieces) -> Vec<u64> {
    // Without CONFIG_NUMA there is one, in the image.
    let Some(table) = kernel.find_symbol(&["node_data"]) else {
        return kernel
            .find_symbol(&["contig_page_data"])
            .map(|at| at.0)
            .into_iter()
            .collect();
    };
    let count = kernel
        .find_symbol(&["nr_node_ids"])
        .and_then(|at| kernel.space().read_u32(at).ok())
        .map_or(1, u64::from)
        .min(MAX_NODES);
    let (Ok(number), Ok(back)) = (
        kernel.offset("pglist_data", "node_id"),
        kernel.offset("pglist_data", "node_zones[0].zone_pgdat"),
    ) else {
        return Vec::new();
    };
    let mut nodes = Vec::new();
    for id in 0..count {
        let Some(node) = pointer(kernel, table.0.wrapping_add(8 * id)).filter(|node| *node != 0) else {
            continue;
        };
        let knows_itself = pointer(kernel, node.wrapping_add(back)) == Some(node)
            && kernel
                .space()
                .read_u32(Gva(node.wrapping_add(number)))
                .ok()
                .map(u64::from)
                == Some(id);
        if knows_itself {
            if let Some(gpa) = place(kernel, Gva(node.wrapping_add(number))) {
                pieces.saw(gpa);
            }
            nodes.push(node);
        }
    }
    nodes
}

/// The first free page of each list of a node: the list's head and the page's entry in the page array point at each
/// other.
fn free_pages(kernel: &Kernel, node: u64, pieces: &mut Pieces) {
    let list = |zone, order, kind| {
        kernel
            .offset(
                "pglist_data",
                &format!("node_zones[{zone}].free_area[{order}].free_list[{kind}]"),
            )
            .ok()
    };
    for zone in (0..MAX_ZONES).take_while(|zone| list(*zone, 0, 0).is_some()) {
        for order in (0..MAX_ORDERS).take_while(|order| list(zone, *order, 0).is_some()) {
            for kind in 0..MAX_KINDS {
                if pieces.all_seen() {
                    return;
                }
                let Some(offset) = list(zone, order, kind) else {
                    break;
                };
                let head = node.wrapping_add(offset);
                let first = pointer(kernel, head).filter(|first| *first != head && *first != 0);
                // `struct list_head`: next, prev.
                if let Some(first) = first
                    && pointer(kernel, first.wrapping_add(8)) == Some(head)
                    && let Some(gpa) = place(kernel, Gva(first))
                {
                    pieces.saw(gpa);
                }
            }
        }
    }
}

/// The ring of all tasks, and the root page tables of processes: the kernel's half of one is the same in all.
fn tasks(kernel: &Kernel, pieces: &mut Pieces) {
    let (Some(init), Ok(tasks), Ok(mm), Ok(pgd)) = (
        kernel.find_symbol(&["init_task"]),
        kernel.offset("task_struct", "tasks"),
        kernel.offset("task_struct", "mm"),
        kernel.offset("mm_struct", "pgd"),
    ) else {
        return;
    };
    let kernels = kernel_half(kernel, Gpa(kernel.space().dtb().0 & TABLE));
    let head = init.0.wrapping_add(tasks);
    let mut before = head;
    for _ in 0..MAX_TASKS {
        let Some(link) = pointer(kernel, before) else {
            return;
        };
        if link == head || pieces.all_seen() || pointer(kernel, link.wrapping_add(8)) != Some(before) {
            return;
        }
        if let Some(gpa) = place(kernel, Gva(link)) {
            pieces.saw(gpa);
        }
        let table = pointer(kernel, link.wrapping_sub(tasks).wrapping_add(mm))
            .filter(|mm| *mm != 0)
            .and_then(|mm| pointer(kernel, mm.wrapping_add(pgd)))
            .and_then(|table| place(kernel, Gva(table)));
        if let Some(table) = table
            && is_same_half(&kernels, &kernel_half(kernel, table))
        {
            pieces.saw(table);
        }
        before = link;
    }
}

/// The upper half of a root page table: what lies above the user's addresses.
fn kernel_half(kernel: &Kernel, table: Gpa) -> Vec<u64> {
    let mut bytes = [0; 2048];
    match kernel.memory().read(Gpa(table.0.wrapping_add(2048)), &mut bytes) {
        Ok(()) => bytes
            .as_chunks()
            .0
            .iter()
            .map(|entry| u64::from_le_bytes(*entry))
            .collect(),
        Err(_) => Vec::new(),
    }
}

/// Whether two tables lead to the same next ones: those that both have, and at least two.
fn is_same_half(a: &[u64], b: &[u64]) -> bool {
    let both = || {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a & LEADS, b & LEADS))
            .filter(|(a, b)| a & b & 1 != 0)
    };
    both().count() >= 2 && both().all(|(a, b)| a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_the_same_where_both_lead_somewhere() {
        let kernels = [0, 0x1001, 0x2023, 0, 0x3001];
        assert!(is_same_half(&kernels, &[0, 0x1061, 0x2003, 0x9001, 0]));
        assert!(!is_same_half(&kernels, &[0, 0x1001, 0x4001, 0, 0x3001]));
        assert!(!is_same_half(&kernels, &[0, 0x1001, 0, 0, 0]), "one is chance");
        assert!(!is_same_half(&kernels, &[0; 5]) && !is_same_half(&kernels, &[]));
    }
}
