//! Where `level3_kernel_pgt` may be, from cheap to dear.

use rayon::prelude::*;
use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Registers};
use vmsight_memory::GuestMemory;

use super::entry::{Entry, last_entries, read_table};
use super::is_level3;

const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;

/// How far `level2_kernel_pgt` and `level2_fixmap_pgt` can be from `level3_kernel_pgt`, all three being in one data section.
const NEAR: u64 = 64 * MIB;

/// By the trampoline: below 1 MiB a running kernel keeps, as long as it runs, the page table that starts further processors
/// and wakes it from sleep (`trampoline_pgd`, arch/x86/realmode/init.c). Its last entry is that of init_top_pgt.
/// A kernel started by kexec puts its own there, as a rule over the old one. Costs 256 reads.
pub(in crate::kernel) fn by_trampoline(memory: &GuestMemory) -> Vec<Gpa> {
    let pages: Vec<Gpa> = (0..MIB).step_by(PAGE as usize).map(Gpa).collect();
    let mut found = Vec::new();
    for table in last_entries(memory, &pages)
        .iter()
        .filter_map(|e| e.table())
        .filter(|t| t.0 >= MIB)
    {
        add(&mut found, level3_below(memory, table));
    }
    found
}

fn add(found: &mut Vec<Gpa>, level3: Option<Gpa>) {
    found.extend(level3.filter(|l| !found.contains(l)));
}

/// `level3_kernel_pgt`, given what the last entry of a top-level table leads to: itself, or with five levels a table whose last
/// entry does.
fn level3_below(memory: &GuestMemory, gpa: Gpa) -> Option<Gpa> {
    let table = read_table(memory, gpa)?;
    if is_level3(&table) {
        return Some(gpa);
    }
    let next = table.entry(511).table()?;
    is_level3(&read_table(memory, next)?).then_some(next)
}

/// By CR3: every address space maps the kernel. While user code runs under page-table isolation CR3 holds the user copy, whose
/// other half is the next page down (arch/x86/mm/pti.c).
pub(in crate::kernel) fn by_registers(memory: &GuestMemory, registers: &[Registers]) -> Vec<Gpa> {
    let mut found = Vec::new();
    for r in registers {
        let Some(PagingMode::X86Level4 | PagingMode::X86Level5) = PagingMode::from_registers(r) else {
            continue;
        };
        let Dtb(root) = Dtb::from_cr3(r.cr3);
        for last in last_entries(memory, &[Gpa(root), Gpa(root & !PAGE)]) {
            add(&mut found, last.table().and_then(|t| level3_below(memory, t)));
        }
    }
    found
}

/// By what it looks like, in all of memory: the last 64 bytes of each page are read. In parallel.
pub(in crate::kernel) fn by_scan(memory: &GuestMemory) -> Vec<Gpa> {
    // Pieces small enough to share out among threads, large enough that sharing costs nothing.
    let pieces: Vec<(u64, u64)> = memory
        .regions()
        .iter()
        .flat_map(|r| {
            let start = r.start.0.next_multiple_of(PAGE);
            let end = r.start.0.saturating_add(r.len);
            (start..end)
                .step_by(4 * MIB as usize)
                .map(move |s| (s, end.min(s.saturating_add(4 * MIB))))
        })
        .collect();
    pieces
        .into_par_iter()
        .flat_map_iter(|(start, end)| {
            (start..end).step_by(PAGE as usize).map(Gpa).filter(|&page| {
                let mut tail = [0; 64];
                let at = Gpa(page.0.wrapping_add(PAGE - 64));
                memory.read(at, &mut tail).is_ok() && tail_fits(&tail, page)
            })
        })
        .filter(|&page| read_table(memory, page).is_some_and(|t| is_level3(&t)))
        .collect()
}

/// Entries 504 to 511 of `level3_kernel_pgt`: nothing, and then two tables of the same image.
fn tail_fits(tail: &[u8; 64], page: Gpa) -> bool {
    let entry = |i: usize| {
        let bytes = tail.get(8 * i..8 * i + 8).and_then(|b| b.try_into().ok());
        Entry(bytes.map_or(0, u64::from_le_bytes))
    };
    let near = |t: Gpa| t.0.abs_diff(page.0) < NEAR;
    (0..6).all(|i| entry(i).0 == 0)
        && [6, 7]
            .into_iter()
            .all(|i| entry(i).table().is_some_and(near) && entry(i).may_write())
}
