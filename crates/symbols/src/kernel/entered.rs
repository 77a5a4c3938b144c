//! Which kernel the CPUs run: where the hardware goes at a system call and at a page fault. No write to memory changes that.

use vmsight_arch::paging::{self, PagingMode};
use vmsight_arch::{Dtb, Gva, Registers};
use vmsight_memory::{AddressSpace, GuestMemory};

use super::KernelImage;

/// That a CPU enters a kernel.
pub(super) struct Entered {
    /// Its number among the images.
    pub(super) image: usize,
    /// A sentence.
    pub(super) how: String,
}

/// For each CPU the image that it enters, if it enters one of them: LSTAR (the system call) or the gate of the page fault must
/// lie in the image, and the CPU's own page tables must map it to the image's memory. Under page-table isolation that
/// holds for the tables of user mode too, which map the entry code.
pub(super) fn by_cpus(
    memory: &GuestMemory,
    registers: &[Registers],
    images: &[&KernelImage],
) -> Vec<Entered> {
    registers
        .iter()
        .filter_map(|r| by_cpu(memory, r, images))
        .collect()
}

/// Whether a CPU runs with page tables of 64-bit mode: before that it is in firmware, and tells nothing.
pub(super) fn in_long_mode(registers: &Registers) -> bool {
    long_mode(registers).is_some()
}

fn long_mode(registers: &Registers) -> Option<PagingMode> {
    PagingMode::from_registers(registers)
        .filter(|mode| matches!(mode, PagingMode::X86Level4 | PagingMode::X86Level5))
}

fn by_cpu(memory: &GuestMemory, registers: &Registers, images: &[&KernelImage]) -> Option<Entered> {
    let mode = long_mode(registers)?;
    let dtb = Dtb::from_cr3(registers.cr3);
    let fault = page_fault_handler(memory, mode, dtb, registers.idt.base);
    let entries = [
        ("LSTAR", registers.lstar.map(Gva)),
        ("the page-fault gate of IDTR", fault),
    ];
    entries.into_iter().find_map(|(name, entry)| {
        let entry = entry?;
        let gpa = paging::walk(mode, memory, dtb, entry).ok()?.gpa;
        let at = |image: &KernelImage| image.phys.wrapping_add(entry.0.wrapping_sub(image.text.0));
        let (i, image) = images
            .iter()
            .enumerate()
            .find(|(_, image)| image.contains(entry) && at(image) == gpa)?;
        let how = format!(
            "CPU {} enters the kernel at {entry} by {name}, and its CR3 maps that to the image at {}",
            registers.vcpu, image.phys
        );
        Some(Entered { image: i, how })
    })
}

/// The handler of vector 14 (SDM vol. 3A, 6.14.1: gates of 16 bytes, the offset in three pieces).
fn page_fault_handler(memory: &GuestMemory, mode: PagingMode, dtb: Dtb, table: Gva) -> Option<Gva> {
    if table.0 == 0 {
        return None;
    }
    let mut gate = [0; 16];
    let at = table.checked_add(14 * 16)?;
    let space = AddressSpace::new(memory.clone(), mode, dtb);
    space.read(at, &mut gate).ok()?;
    let [a, b, _, _, _, present, c, d, e, f, g, h, ..] = gate;
    (present & 0x80 != 0).then(|| Gva(u64::from_le_bytes([a, b, c, d, e, f, g, h])))
}
