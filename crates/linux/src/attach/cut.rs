//! A dump that ends before memory does: whether what is there lies where it should.

use vmsight_arch::{Gpa, Gva};
use vmsight_memory::Region;

use super::{FIRMWARE_PAGES, implausible, refuse_unproven};
use crate::{Kernel, LinuxError};

/// Where x86 machines keep memory above the hole for devices.
const HIGH: u64 = 1 << 32;
/// Most entries of firmware's map that are read: `E820_MAX_ENTRIES` has at most 3 × 1024 + 128.
const MAX_ENTRIES: u32 = 4096;
/// `E820_TYPE_RAM` (arch/x86/include/asm/e820/types.h).
const RAM: u32 = 1;
/// Bytes of `struct e820_entry`: address, size, type, packed.
const ENTRY: u64 = 20;
/// Most pages looked at in what should be a hole.
const HOLE_PAGES: u64 = 1 << 18;

/// Checks the layout of a dump that is shorter than its guest's memory.
///
/// A layout is refused where firmware's map has RAM below its end that it has not, where its memory below 4 GiB ends at
/// another place than firmware's, or where nothing of the kernel's is found above.
pub(super) fn confirm(kernel: &Kernel) -> Result<(), LinuxError> {
    let ram = ram(kernel)?;
    let memory = kernel.memory();
    let end = memory.end().0;
    let low_end = ram
        .iter()
        .filter(|(start, _)| *start < HIGH)
        .map(|(_, end)| *end)
        .max()
        .unwrap_or(0);
    for (start, stop) in &ram {
        let stop = (*stop).min(end);
        let covered = *start >= stop
            || memory
                .region_of(Gpa(*start))
                .is_some_and(|region| region.end().0 >= stop);
        if !covered {
            return Err(implausible(format!(
                "the kernel found has memory from {start:#x} to {stop:#x}, this layout has not"
            )));
        }
    }
    if end <= low_end {
        return Ok(());
    }
    let low = memory.regions().first().map_or(0, |region| region.end().0);
    if low < end && low.saturating_sub(low_end) > FIRMWARE_PAGES << 12 {
        return Err(implausible(format!(
            "the kernel found says that its memory below 4 GiB ends at {low_end:#x}, this layout at {low:#x}"
        )));
    }
    let region = |start: u64, end: u64| Region {
        start: Gpa(start),
        len: end.saturating_sub(start),
    };
    if low >= end {
        // Flat: from the end of RAM, past firmware's own pages, nothing can be there up to 4 GiB.
        let from = low_end.saturating_add(FIRMWARE_PAGES << 12);
        let hole = (from..end.min(HIGH)).step_by(4096);
        if hole
            .take(HOLE_PAGES as usize)
            .any(|at| memory.read_u64(Gpa(at)).is_ok_and(|word| word != 0))
        {
            return Err(implausible(format!(
                "the kernel found has no memory from {low_end:#x} on, this layout has"
            )));
        }
    }
    if end <= HIGH {
        return Ok(());
    }
    refuse_unproven(kernel, vec![vec![region(HIGH, end)]])
}

impl Kernel {
    /// The RAM in the memory map that firmware gave (`e820_table`, arch/x86/kernel/e820.c, all versions), in the map's order. What was
    /// plugged in later is not there.
    ///
    /// # Errors
    /// If the map cannot be read, or has no RAM at all.
    pub fn firmware_ram(&self) -> Result<Vec<Region>, LinuxError> {
        let region = |(start, end): (u64, u64)| Region {
            start: Gpa(start),
            len: end - start,
        };
        Ok(ram(self)?.into_iter().map(region).collect())
    }
}

/// The RAM in the memory map that firmware gave, as start and end, which is not before the start.
fn ram(kernel: &Kernel) -> Result<Vec<(u64, u64)>, LinuxError> {
    let table = kernel.symbol_pointer("e820_table")?;
    let space = kernel.space();
    let count = space
        .read_u32(table)
        .map_err(LinuxError::read("e820_table", table))?;
    let mut all = Vec::new();
    for i in 0..u64::from(count.min(MAX_ENTRIES)) {
        let at = Gva(table.0.wrapping_add(4 + i * ENTRY));
        let mut entry = [0; ENTRY as usize];
        space
            .read(at, &mut entry)
            .map_err(LinuxError::read("e820_table", at))?;
        let number = |from: usize, len: usize| {
            entry
                .iter()
                .skip(from)
                .take(len)
                .rev()
                .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let (start, size, kind) = (number(0, 8), number(8, 8), number(16, 4));
        if kind == u64::from(RAM)
            && let Some(end) = start.checked_add(size)
        {
            all.push((start, end));
        }
    }
    if all.is_empty() {
        return Err(implausible("the kernel found has no memory at all".to_owned()));
    }
    Ok(all)
}
