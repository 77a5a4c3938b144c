//! System calls.

use core::arch::asm;

use crate::shared;

/// Their numbers.
pub(crate) mod number {
    pub(crate) const WRITE: usize = 1;
    pub(crate) const OPEN: usize = 2;
    pub(crate) const CLOSE: usize = 3;
    pub(crate) const LSEEK: usize = 8;
    pub(crate) const MMAP: usize = 9;
    pub(crate) const IOCTL: usize = 16;
    pub(crate) const PREAD64: usize = 17;
    pub(crate) const GETPID: usize = 39;
    pub(crate) const CLONE: usize = 56;
    pub(crate) const FORK: usize = 57;
    pub(crate) const EXECVE: usize = 59;
    pub(crate) const EXIT: usize = 60;
    pub(crate) const WAIT4: usize = 61;
    pub(crate) const FTRUNCATE: usize = 77;
    pub(crate) const UNLINK: usize = 87;
    pub(crate) const SETUID: usize = 105;
    pub(crate) const SETRESUID: usize = 117;
    pub(crate) const CAPSET: usize = 126;
    pub(crate) const PRCTL: usize = 157;
    pub(crate) const REBOOT: usize = 169;
    pub(crate) const INIT_MODULE: usize = 175;
    pub(crate) const DELETE_MODULE: usize = 176;
    pub(crate) const FUTEX: usize = 202;
    pub(crate) const SCHED_SETAFFINITY: usize = 203;
    pub(crate) const EXIT_GROUP: usize = 231;
    pub(crate) const FINIT_MODULE: usize = 313;
}

/// Makes a call, counted.
pub(crate) fn call(number: usize, arguments: [u64; 6]) -> i64 {
    shared::count(number);
    uncounted(number, arguments)
}

/// Makes one that is in the counts already.
pub(crate) fn uncounted(number: usize, [a, b, c, d, e, f]: [u64; 6]) -> i64 {
    let result;
    // SAFETY: what is passed lives during the call, and none of the calls made here takes memory that is in use away.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number as i64 => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    result
}
