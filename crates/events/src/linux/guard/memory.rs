//! Kernel memory that nobody may write to.

use vmsight_arch::{Gpa, Gva, Registers};
use vmsight_hooks::{Access, Feature, HookKind, Range};
use vmsight_linux::Kernel;

use super::super::TraceError;
use super::rule::Rule;
use crate::Monitor;

/// Most memory that one rule covers.
const MAX_LEN: u64 = 256 << 20;
/// The IDT: 256 gates of 16 bytes.
const IDT_BYTES: u64 = 4096;
/// `CPU_ENTRY_AREA_RO_IDT`, fixed on x86-64.
const IDT_ALIAS: Gva = Gva(0xffff_fe00_0000_0000);

/// What guarded memory held when guarding began: a backend that sees a write when it is done keeps no copy of large stretches.
#[derive(Debug)]
pub(super) struct Copy {
    start: Gva,
    bytes: Vec<u8>,
}

impl Copy {
    /// Of the memory of a hook on virtual addresses; `None` for others.
    pub(super) fn of(kernel: &Kernel, kind: &HookKind) -> Option<Self> {
        let HookKind::Memory {
            range: Range::Virtual { start, len },
            ..
        } = *kind
        else {
            return None;
        };
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        kernel.space().read_partial(start, &mut bytes);
        Some(Self { start, bytes })
    }

    /// The `len` bytes, 8 at most, at `at`.
    pub(super) fn get(&self, at: Gva, len: u8) -> Option<u64> {
        let from = usize::try_from(at.0.checked_sub(self.start.0)?).ok()?;
        let found = self.bytes.get(from..from.checked_add(usize::from(len))?)?;
        let mut value = [0; 8];
        value.get_mut(..found.len())?.copy_from_slice(found);
        (len > 0).then_some(u64::from_le_bytes(value))
    }
}

/// The hooks that a rule about memory needs: on physical memory where the backend can, for then no other mapping of it
/// helps; else on the addresses that the kernel itself uses.
pub(super) fn hooks(kernel: &Kernel, monitor: &Monitor, rule: &Rule) -> Result<Vec<HookKind>, TraceError> {
    let (start, len) = range(kernel, rule)?;
    let capabilities = monitor.capabilities();
    let can = |feature| capabilities.iter().any(|c| c.feature == feature);
    let access = Access::WRITE;
    if !can(Feature::PhysicalWrite) && can(Feature::VirtualWrite) {
        let mut starts = vec![start];
        // What the register holds is a read-only alias of the kernel's table (arch/x86/mm/cpu_entry_area.c).
        let same = |at| Some(kernel.space().translate(at).ok()?.gpa);
        if *rule == Rule::Idt && same(IDT_ALIAS).is_some() && same(IDT_ALIAS) == same(start) {
            starts.push(IDT_ALIAS);
        }
        let hook = |start| HookKind::Memory {
            range: Range::Virtual { start, len },
            access,
        };
        return Ok(starts.into_iter().map(hook).collect());
    }
    let pieces = physical(kernel, start, len)?;
    Ok(pieces
        .into_iter()
        .map(|(start, len)| HookKind::Memory {
            range: Range::Physical { start, len },
            access,
        })
        .collect())
}

/// What a rule is about.
fn range(kernel: &Kernel, rule: &Rule) -> Result<(Gva, u64), TraceError> {
    let between = |first: &str, last: &str| {
        let (start, end) = (kernel.symbol(first)?, kernel.symbol(last)?);
        Ok((start, end.0.saturating_sub(start.0)))
    };
    let (start, len) = match rule {
        Rule::Rodata => between("__start_rodata", "__end_rodata"),
        Rule::SyscallTable => {
            let start = kernel.symbol("sys_call_table")?;
            let linked = kernel.image().link_time(start);
            let next = kernel.profile().symbols.after(linked);
            Ok((start, next.map_or(4096, |s| s.address.saturating_sub(linked))))
        }
        Rule::Idt => Ok((kernel.symbol("idt_table")?, IDT_BYTES)),
        _ => between("_stext", "_etext"),
    }
    .map_err(|error: vmsight_linux::LinuxError| TraceError::Linux(error))?;
    match len {
        1..=MAX_LEN => Ok((start, len)),
        _ => Err(TraceError::NoSite {
            what: rule.to_string(),
            why: format!("its {len} bytes at {start} cannot be"),
        }),
    }
}

/// Where a stretch of kernel memory lies, neighbouring pages joined.
fn physical(kernel: &Kernel, start: Gva, len: u64) -> Result<Vec<(Gpa, u64)>, TraceError> {
    let mut pieces: Vec<(Gpa, u64)> = Vec::new();
    let mut done = 0;
    while done < len {
        let at = start.wrapping_add(done);
        let page = kernel.space().translate(at).map_err(|fault| TraceError::NoSite {
            what: format!("kernel memory at {at}"),
            why: fault.to_string(),
        })?;
        let here = (page.page_size() - (at.0 & (page.page_size() - 1))).min(len - done);
        match pieces.last_mut() {
            Some((first, size)) if first.0.wrapping_add(*size) == page.gpa.0 => *size += here,
            _ => pieces.push((page.gpa, here)),
        }
        done += here;
    }
    Ok(pieces)
}

/// Whether the kernel patches its own code here, as it does for static keys, ftrace and modules: through an address space
/// that it keeps for nothing else (`poking_mm`, renamed in 6.16), with code of its own. Who can make the kernel's own function do
/// that needs no other way.
pub(super) fn is_own_patching(kernel: &Kernel, registers: &Registers) -> bool {
    if registers.cpl() != 0 || !kernel.image().contains(Gva(registers.rip)) {
        return false;
    }
    let root = || {
        let pointer = kernel.find_symbol(&["text_poke_mm", "poking_mm"])?;
        let mm = kernel.space().read_u64(pointer).ok()?;
        let pgd = Gva(mm).wrapping_add(kernel.offset("mm_struct", "pgd").ok()?);
        let pgd = kernel.space().read_u64(pgd).ok()?;
        Some(kernel.space().translate(Gva(pgd)).ok()?.gpa)
    };
    root().is_some_and(|root| vmsight_arch::Dtb::from_cr3(registers.cr3).0 == root.page_start().0)
}
