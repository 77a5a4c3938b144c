//! Kernels for x86-64.
//!
//! Linux keeps three page tables inside its own image, and they never move (arch/x86/kernel/head_64.S): `level3_kernel_pgt`,
//! whose last two entries are `level2_kernel_pgt` (which maps the image) and `level2_fixmap_pgt`; and the top-level table
//! `init_top_pgt`, whose last entry leads to the first. So an image proves itself: its page tables lie in the very memory
//! that they map at 0xffffffff80000000 and above. Whoever has the address of `level3_kernel_pgt` has everything else.

pub(super) mod anchors;
mod entry;
mod extent;
mod top;

use vmsight_arch::paging::PagingMode;
use vmsight_arch::{Dtb, Gpa, Gva};
use vmsight_memory::GuestMemory;

use entry::{Table, read_table};
pub(super) use extent::Segment;

/// Start of the 1 GiB that holds the kernel image (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// What a link-time address is measured from where nothing says otherwise: `__START_KERNEL_map` + CONFIG_PHYSICAL_START.
pub(super) const DEFAULT_TEXT: u64 = KERNEL_MAP + 0x100_0000;

/// The image's page tables, and what follows from them alone.
#[derive(Clone, Debug)]
pub(super) struct Proven {
    pub(super) text: Gva,
    pub(super) phys: Gpa,
    pub(super) len: u64,
    pub(super) dtb: Dtb,
    pub(super) mode: PagingMode,
    pub(super) direct_map: Gva,
    pub(super) segments: Vec<Segment>,
    pub(super) evidence: Vec<String>,
}

/// Follows `level3_kernel_pgt` at `level3` to the image, its extent and its top-level table.
///
/// # Errors
/// What contradicts, in words.
pub(super) fn prove(memory: &GuestMemory, level3: Gpa) -> Result<Proven, String> {
    let table = read_table(memory, level3).ok_or_else(|| format!("no memory at {level3}"))?;
    let level2 = table
        .entry(510)
        .table()
        .ok_or_else(|| format!("entry 510 of {level3} is no table"))?;
    let image = extent::of(memory, level2)?;
    for (name, gpa) in [("level3_kernel_pgt", level3), ("level2_kernel_pgt", level2)] {
        if !image.holds(gpa) {
            return Err(format!(
                "{name} at {gpa} lies outside the image that it maps ({}, {:#x} bytes)",
                image.phys, image.len
            ));
        }
    }
    let mut evidence = vec![format!(
        "level3_kernel_pgt at {level3} and level2_kernel_pgt at {level2} map _text {} to {} and lie inside that image",
        image.text, image.phys
    )];
    let top = top::find(memory, &image, level3)?;
    evidence.push(top.evidence);
    Ok(Proven {
        text: image.text,
        phys: image.phys,
        len: image.len,
        dtb: top.dtb,
        mode: top.mode,
        direct_map: top.direct_map,
        segments: image.segments,
        evidence,
    })
}

/// Whether a table looks like `level3_kernel_pgt` from its end: nothing mapped below the last 2 GiB of addresses.
fn is_level3(table: &Table) -> bool {
    (480..510).all(|i| table.entry(i).0 == 0)
        && table.entry(510).table().is_some()
        && table.entry(511).table().is_some()
}
