//! Instructions that must be executed exactly as often as ordered, with nothing of a library in between.

#![cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]

use vmsight_workload::orders::{Exception, UNMAPPED};

/// Makes a system call, and gives what the kernel returns.
///
/// # Safety
/// As the system call: the kernel may write to what the arguments point to.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn syscall(number: i64, arguments: [u64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    let result;
    // SAFETY: the kernel's calling convention. What it does to memory the caller answers for.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes a system call as 32-bit programs do, and gives what the kernel returns.
///
/// # Safety
/// As the system call, whose addresses are those of 32 bits.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn int80(number: u32, arguments: [u32; 2]) -> i64 {
    let [first, second] = arguments;
    let result: u64;
    // SAFETY: the kernel's calling convention, which some kernels' clearing of R8 to R11 belongs to. What it does to memory
    // the caller answers for. RBX, which the compiler keeps for itself, is what it was afterwards.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first}",
            "int 0x80",
            "xchg rbx, {first}",
            first = inout(reg) u64::from(first) => _,
            inlateout("rax") u64::from(number) => result,
            in("rcx") u64::from(second),
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
            options(nostack),
        );
    }
    i64::from(result as i32)
}

/// Raises an exception; comes back only where somebody has seen to it.
#[cfg(target_arch = "x86_64")]
pub(super) fn raise(exception: Exception) {
    use std::arch::asm;
    // SAFETY: none of these changes memory that anybody has: the write of the last is to an address where nothing is mapped.
    unsafe {
        match exception {
            Exception::Divide => {
                asm!("div {zero:e}", zero = in(reg) 0u32, inout("eax") 1u32 => _, inout("edx") 0u32 => _);
            }
            Exception::Breakpoint => asm!("int3"),
            Exception::InvalidOpcode => asm!("ud2"),
            Exception::Protection => asm!("hlt"),
            Exception::PageFault => asm!("mov byte ptr [{at}], 1", at = in(reg) UNMAPPED),
        }
    }
}

/// Executes CPUID.
#[cfg(target_arch = "x86_64")]
pub(super) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// Guests are x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn syscall(number: i64, arguments: [u64; 4]) -> i64 {
    -i64::from(libc::ENOSYS)
}

/// Guests are x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn int80(number: u32, arguments: [u32; 2]) -> i64 {
    -i64::from(libc::ENOSYS)
}

/// Guests are x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn raise(exception: Exception) {
    let _ = UNMAPPED;
}

/// Guests are x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    [0; 4]
}
