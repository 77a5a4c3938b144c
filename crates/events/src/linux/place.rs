//! Whose call of a kernel function it is, asked before the call is an event, and where that can be asked inside the guest.

use vmsight_arch::Gva;
use vmsight_hooks::Filter;
use vmsight_linux::{CurrentReader, Kernel};

use super::TraceError;
use super::filter::current_pid;

/// ENDBR64, which functions begin with that may be called by a pointer.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// What one entry of the second-lowest tables maps.
const LARGE_PAGE: u64 = 2 << 20;
/// What one table of them maps. The kernel's image has the last but one of the address space (Linux,
/// Documentation/arch/x86/x86_64/mm.rst; arch/x86/kernel/head_64.S, level2_kernel_pgt).
const TABLE: u64 = 1 << 30;
/// Where that begins (`__START_KERNEL_map`). An image lies at least 16 MiB from there (`LOAD_PHYSICAL_ADDR`).
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// How far before the image the room is, above a large page that is left free.
const BEFORE: u64 = 2 * LARGE_PAGE;

/// Only calls by these processes (root namespace), at an instruction of the kernel. `None` where a filter cannot ask that: there are
/// more than it holds, or the instruction may be one before the kernel's own GS is in, where a program chooses what is found.
pub fn calls_of(kernel: &Kernel, reader: &CurrentReader, at: Gva, pids: &[i32]) -> Option<Filter> {
    if pids.is_empty() || is_entry(kernel, at) {
        return None;
    }
    let numbers = pids.iter().filter_map(|pid| u64::try_from(*pid).ok());
    Filter::only(&current_pid(reader).is_one_of(numbers)).ok()
}

/// Whether an instruction is in what an interrupt, an exception or a system call begins with, or is no code of the kernel's image.
fn is_entry(kernel: &Kernel, at: Gva) -> bool {
    if !kernel.image().contains(at) {
        return true;
    }
    // Linux, arch/x86/kernel/vmlinux.lds.S: code that runs with a GS that may be a program's, or without instrumentation.
    const SECTIONS: [(&str, &str); 3] = [
        ("__entry_text_start", "__entry_text_end"),
        ("__noinstr_text_start", "__noinstr_text_end"),
        ("__irqentry_text_start", "__irqentry_text_end"),
    ];
    SECTIONS.into_iter().any(|(start, end)| {
        let ends = kernel.find_symbol(&[start]).zip(kernel.find_symbol(&[end]));
        ends.is_some_and(|(start, end)| (start..end).contains(&at))
    })
}

/// Where a filter of a function's calls can be judged in the guest itself (see [`vmsight_hooks::Hook::inside`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inside {
    /// The instruction to hook: the first of the function behind ENDBR64.
    pub at: Gva,
    /// Where the kernel has nothing mapped.
    pub room: Gva,
}

/// Where that is for the function at `at`.
///
/// The room is a few MiB before the kernel's image: its tables map there what they share with the image's own, for all processes, and the
/// kernel has cleared it when it began (`cleanup_highmap` in arch/x86/mm/init_64.c) and uses it for nothing else. Kernels 5.10 to 7.
///
/// # Errors
/// If the code cannot be read, or the image is not where x86-64 kernels have it.
pub fn inside(kernel: &Kernel, at: Gva) -> Result<Inside, TraceError> {
    let mut begin = [0; ENDBR64.len()];
    kernel
        .space()
        .read(at, &mut begin)
        .map_err(TraceError::read("the function", at))?;
    let begins = if begin == ENDBR64 { ENDBR64.len() as u64 } else { 0 };
    let text = kernel.symbol("_text")?;
    let room = (text.0 & !(LARGE_PAGE - 1)).wrapping_sub(BEFORE);
    if !(START_KERNEL_MAP..START_KERNEL_MAP + TABLE).contains(&room) {
        return Err(TraceError::NoSite {
            what: "room for filters inside the guest".to_owned(),
            why: format!("the kernel's image is at {text}"),
        });
    }
    Ok(Inside {
        at: at.wrapping_add(begins),
        room: Gva(room),
    })
}
