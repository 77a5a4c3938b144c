//! One address through the tables.

use super::arm64::Vmsa;
use super::format::{Entry, Format};
use super::x86::{Legacy, Long, Pae};
use super::{Access, FaultReason, PageFault, PagingMode, Steps, TableMemory, Translation};
use crate::{Dtb, Gpa, Gva};

/// Calls `$body` with `$format` bound to the format of a mode, once compiled for each.
macro_rules! with_format {
    ($mode:expr, $format:ident => $body:expr) => {
        match $mode {
            $crate::paging::PagingMode::X86Level4 => {
                let $format = Long::<4>;
                $body
            }
            $crate::paging::PagingMode::X86Level5 => {
                let $format = Long::<5>;
                $body
            }
            $crate::paging::PagingMode::X86Pae => {
                let $format = Pae;
                $body
            }
            $crate::paging::PagingMode::X86_32 { pse } => {
                let $format = Legacy { pse };
                $body
            }
            $crate::paging::PagingMode::Arm64 {
                granule,
                va_bits,
                lpa2,
            } => {
                let $format = Vmsa::new(granule, va_bits, lpa2);
                $body
            }
        }
    };
}
pub(super) use with_format;

/// Translates `gva` through the tables at `dtb`.
///
/// # Errors
/// The page fault, with the level and the entries read.
pub fn walk<M: TableMemory + ?Sized>(
    mode: PagingMode,
    memory: &M,
    dtb: Dtb,
    gva: Gva,
) -> Result<Translation, PageFault> {
    with_format!(mode, format => walk_format(format, memory, dtb, gva))
}

fn walk_format<F: Format, M: TableMemory + ?Sized>(
    format: F,
    memory: &M,
    dtb: Dtb,
    gva: Gva,
) -> Result<Translation, PageFault> {
    let mut steps = Steps::of_levels(format.levels());
    let fault = |reason, level, entry_gpa, steps| PageFault {
        gva,
        reason,
        level,
        entry_gpa,
        steps,
    };
    if !format.canonical(gva) {
        return Err(fault(FaultReason::NonCanonical, 0, Gpa(0), steps));
    }
    let mut table = format.root(dtb);
    let mut access = format.start();
    let mut level = format.levels();
    loop {
        let entry_gpa = format.entry_gpa(level, table, gva.0);
        let Some(value) = format.read(memory, entry_gpa) else {
            return Err(fault(FaultReason::Unbacked, level, entry_gpa, steps));
        };
        steps.push(entry_gpa, value);
        match format.decode(level, value) {
            Entry::Table(next) if level > 1 => {
                access = format.inherit(level, value, access);
                table = next;
                level -= 1;
            }
            Entry::Page(page) => {
                let shift = format.shift(level);
                let access: Access = format.leaf(level, value, access);
                let gpa = Gpa(page.0 | (gva.0 & ((1 << shift) - 1)));
                return Ok(Translation {
                    gpa,
                    page_shift: shift,
                    access,
                    steps,
                });
            }
            Entry::NotPresent => return Err(fault(FaultReason::NotPresent, level, entry_gpa, steps)),
            Entry::Reserved | Entry::Table(_) => {
                return Err(fault(FaultReason::Reserved, level, entry_gpa, steps));
            }
        }
    }
}

/// Where an address lies, without the evidence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The physical address of the very byte asked for.
    pub gpa: Gpa,
    /// log2 of the page's size in bytes.
    pub page_shift: u8,
}

/// Translates `gva` and keeps no evidence: the quick way for reading. `None` where [`walk`] has a fault.
#[inline]
pub fn resolve<M: TableMemory + ?Sized>(
    mode: PagingMode,
    memory: &M,
    dtb: Dtb,
    gva: Gva,
) -> Option<Resolved> {
    with_format!(mode, format => resolve_format(format, memory, dtb, gva))
}

#[inline(always)]
fn resolve_format<F: Format, M: TableMemory + ?Sized>(
    format: F,
    memory: &M,
    dtb: Dtb,
    gva: Gva,
) -> Option<Resolved> {
    if !format.canonical(gva) {
        return None;
    }
    let mut table = format.root(dtb);
    let mut level = format.levels();
    loop {
        let value = format.read(memory, format.entry_gpa(level, table, gva.0))?;
        match format.decode(level, value) {
            Entry::Table(next) if level > 1 => {
                table = next;
                level -= 1;
            }
            Entry::Page(page) => {
                let shift = format.shift(level);
                return Some(Resolved {
                    gpa: Gpa(page.0 | (gva.0 & ((1 << shift) - 1))),
                    page_shift: shift,
                });
            }
            _ => return None,
        }
    }
}
