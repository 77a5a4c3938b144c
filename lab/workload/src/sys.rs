//! The system calls that have no safe wrapper. This program is no part of vmsight: it runs inside lab guests, to bring
//! about what real systems bring about, such as processes in odd states and memory mapped in odd ways.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Which side of a fork this is.
pub(crate) enum Side {
    Parent,
    Child,
}

/// Forks. Only for processes that have a single thread, and children that do not return from the caller's work.
pub(crate) fn fork() -> io::Result<Side> {
    // SAFETY: the callers have one thread, so the child finds every lock of the parent's free.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        _ => Ok(Side::Parent),
    }
}

/// As [`fork`]; the parent learns the child's pid, which a child that may make no getpid(2) need not know.
pub(crate) fn fork_with_pid() -> io::Result<(Side, i32)> {
    // SAFETY: as in `fork`.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok((Side::Child, 0)),
        pid => Ok((Side::Parent, pid)),
    }
}

/// Forks with the parent held in uninterruptible sleep until the child ends or execs.
pub(crate) fn fork_and_hold_parent() -> io::Result<Side> {
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of memory and stack. One thread, as above.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        _ => Ok(Side::Parent),
    }
}

/// Ends this thread alone, without unwinding: its thread group lives on.
pub(crate) fn end_thread() -> ! {
    // SAFETY: exit(2) ends the calling thread and touches no memory. Its stack stays mapped.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("exit(2) returned")
}

/// Maps memory; it stays for the life of the process. Gives its address.
pub(crate) fn map(
    length: usize,
    protection: i32,
    flags: i32,
    file: Option<(BorrowedFd<'_>, i64)>,
) -> io::Result<usize> {
    let (fd, offset) = file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
    // SAFETY: a new mapping where the kernel likes it (no MAP_FIXED) replaces nothing.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, offset) };
    if at == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(at as usize)
    }
}

/// Changes the protection of memory that [`map`] gave.
pub(crate) fn protect(at: usize, length: usize, protection: i32) -> io::Result<()> {
    // SAFETY: the caller's own mapping, of which nobody holds a reference.
    check(unsafe { libc::mprotect(at as *mut libc::c_void, length, protection) })
}

/// Writes a byte into each page of memory that [`map`] gave as writable.
pub(crate) fn touch(at: usize, length: usize, byte: u8) {
    for offset in (0..length).step_by(4096) {
        // SAFETY: within the caller's own writable mapping, of which nobody holds a reference.
        unsafe { std::ptr::write_volatile((at + offset) as *mut u8, byte) };
    }
}

/// Advises the kernel on a range of memory; only for advice that keeps its contents.
pub(crate) fn advise(at: usize, length: usize, advice: i32) -> io::Result<()> {
    assert!(
        matches!(advice, libc::MADV_PAGEOUT | libc::MADV_HUGEPAGE),
        "advice that may lose contents"
    );
    // SAFETY: these kinds of advice change where the contents are, not what they are.
    check(unsafe { libc::madvise(at as *mut libc::c_void, length, advice) })
}

/// Has the kernel use no huge pages in a range of memory.
pub(crate) fn small_pages(at: usize, length: usize) -> io::Result<()> {
    // SAFETY: this advice changes no contents.
    check(unsafe { libc::madvise(at as *mut libc::c_void, length, libc::MADV_NOHUGEPAGE) })
}

/// Locks a range of memory.
pub(crate) fn lock(at: usize, length: usize) -> io::Result<()> {
    // SAFETY: locking changes no contents.
    check(unsafe { libc::mlock(at as *const libc::c_void, length) })
}

/// Adds a seccomp filter that allows everything; needs no_new_privs or CAP_SYS_ADMIN.
pub(crate) fn add_seccomp_filter() -> io::Result<()> {
    // One instruction: BPF_RET | BPF_K, SECCOMP_RET_ALLOW.
    let mut program = [libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    }];
    let filter = libc::sock_fprog {
        len: 1,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `filter` and what it points to live through the call; the kernel copies the program.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) })
}

/// Has the kernel take these bytes for this process's arguments, as checkpoint/restore does and whoever poses as another program.
pub(crate) fn set_arguments(bytes: &'static [u8]) -> io::Result<()> {
    let start = bytes.as_ptr() as usize;
    // The heap lies below the stack: from the new begin to the old end is a range, and so is what comes then.
    for (option, at) in [
        (libc::PR_SET_MM_ARG_START as usize, start),
        (libc::PR_SET_MM_ARG_END as usize, start + bytes.len()),
    ] {
        // SAFETY: takes numbers only; the kernel reads there for whoever asks for arguments, and the bytes live for ever.
        check(unsafe { libc::prctl(libc::PR_SET_MM, option, at, 0usize, 0usize) })?;
    }
    Ok(())
}

/// Sets this process's scheduling policy.
pub(crate) fn set_policy(policy: i32, priority: i32) -> io::Result<()> {
    let parameter = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: `parameter` lives through the call.
    check(unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) })
}

/// Sets this process's nice value.
pub(crate) fn set_nice(value: i32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) })
}

/// A socket of any family.
pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds a socket to an address in its kernel form.
pub(crate) fn bind(socket: &OwnedFd, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel copies `address.len()` bytes, whatever their alignment.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    })
}

/// Sets a socket option that is a number.
pub(crate) fn set_option(socket: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    let size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes of `value`, which lives through the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size) })
}

/// The data port of the second serial port, a 16550.
pub(crate) const SERIAL_PORT: u16 = 0x2f8;

/// Sends bytes out of the second serial port as fast as it takes them, which under emulation is at
/// once. Nobody else may use the port.
#[cfg(target_arch = "x86_64")]
pub(crate) fn serial_out(bytes: &[u8]) -> io::Result<()> {
    const PORT: u16 = SERIAL_PORT;
    const INTERRUPTS: u16 = PORT + 1;
    const LINE_CONTROL: u16 = PORT + 3;
    const EIGHT_BITS: u8 = 3;
    // SAFETY: takes numbers only. It lets this process use eight I/O ports, which are those of the serial port.
    check(unsafe { libc::ioperm(PORT.into(), 8, 1) })?;
    for (port, value) in [(INTERRUPTS, 0), (LINE_CONTROL, EIGHT_BITS)] {
        // SAFETY: a write to a port that ioperm(2) has opened; it touches no memory.
        unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem)) };
    }
    // SAFETY: reads `bytes.len()` bytes from `bytes` with the direction flag clear, as the ABI has it, and writes them
    // to a port that ioperm(2) has opened.
    unsafe {
        std::arch::asm!(
            "rep outsb",
            in("dx") PORT,
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            options(nostack, readonly, preserves_flags),
        );
    }
    Ok(())
}

/// Guests are x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn serial_out(_: &[u8]) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
