//! Where `level3_kernel_pgt` may be, from cheap to dear.

use rayon::prelude::*;
use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Registers};
use vmsight_memory::{Chunk, GuestMemory, ReadOp, ScanOptions};

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

/// By what it looks like, in all of memory that was ever written: the last 64 bytes of each page are read. In parallel.
pub(in crate::kernel) fn by_scan(memory: &GuestMemory) -> Vec<Gpa> {
    let chunks = memory.chunks(&ScanOptions::default()).par_bridge();
    let mut found: Vec<Gpa> = chunks
        .flat_map_iter(|chunk| {
            let found = likely(memory, &chunk);
            memory.release(&chunk);
            found
        })
        .filter(|&page| read_table(memory, page).is_some_and(|t| is_level3(&t)))
        .collect();
    found.sort_unstable();
    found
}

/// The pages of a chunk whose end looks right.
fn likely(memory: &GuestMemory, chunk: &Chunk) -> Vec<Gpa> {
    let end = chunk.gpa.0.saturating_add(chunk.len as u64);
    let first = chunk.gpa.0.next_multiple_of(PAGE);
    let pages: Vec<Gpa> = (first..end)
        .step_by(PAGE as usize)
        .take_while(|p| p + PAGE <= end)
        .map(Gpa)
        .collect();
    if let Some(bytes) = memory.frozen(chunk.gpa, chunk.len) {
        let tail = |page: Gpa| {
            let at = (page.0 - chunk.gpa.0 + PAGE - TAIL as u64) as usize;
            bytes.get(at..at + TAIL)?.try_into().ok()
        };
        return pages
            .into_iter()
            .filter(|&p| tail(p).is_some_and(|t| tail_fits(&t, p)))
            .collect();
    }
    let mut tails = vec![[0; TAIL]; pages.len()];
    let mut ops: Vec<ReadOp<'_>> = pages
        .iter()
        .zip(&mut tails)
        .map(|(p, t)| ReadOp::new(p.wrapping_add(PAGE - TAIL as u64), t))
        .collect();
    memory.read_batch(&mut ops);
    let read: Vec<bool> = ops.iter().map(|op| op.result.is_ok()).collect();
    let fits =
        |((page, tail), read): ((Gpa, [u8; TAIL]), bool)| (read && tail_fits(&tail, page)).then_some(page);
    pages.into_iter().zip(tails).zip(read).filter_map(fits).collect()
}

/// One cache line.
const TAIL: usize = 64;

/// Entries 504 to 511 of `level3_kernel_pgt`: nothing, and then two tables of the same image.
fn tail_fits(tail: &[u8; TAIL], page: Gpa) -> bool {
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
