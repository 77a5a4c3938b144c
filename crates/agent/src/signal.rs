//! The signal that brings a vCPU out of KVM_RUN. It does nothing but that.

use std::mem::zeroed;
use std::ptr;

use libc::{c_int, sigaction, sigset_t};

/// A signal that nobody uses: the VMM's own (QEMU: SIGUSR1) may not be sent without what the VMM thinks it means.
fn number() -> c_int {
    libc::SIGRTMAX() - 3
}

extern "C" fn nothing(_: c_int) {}

/// Sets the handler. Called once, before the first vCPU runs.
pub(crate) fn set_up() -> bool {
    // SAFETY: the structure is plain data; the handler does nothing. Without SA_RESTART a system call ends with EINTR.
    unsafe {
        let mut action: sigaction = zeroed();
        action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(number(), &raw const action, ptr::null_mut()) == 0
    }
}

/// Lets the signal through to this thread.
pub(crate) fn let_through() {
    // SAFETY: plain data, and this thread's own mask.
    unsafe {
        let mut set: sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, number());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
    }
}

/// Starts a thread that no signal reaches: they are the VMM's.
pub(crate) fn kept_out<T>(start: impl FnOnce() -> T) -> T {
    // SAFETY: plain data, and this thread's own mask, which the new thread inherits and which is put back.
    unsafe {
        let mut set: sigset_t = zeroed();
        let mut old: sigset_t = zeroed();
        libc::sigfillset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, &raw mut old);
        let started = start();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, ptr::null_mut());
        started
    }
}

/// Sends it to a thread of this process.
pub(crate) fn send(thread: c_int) {
    // SAFETY: a signal that has a handler which does nothing; a thread that is gone is an error and no more.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number()) };
}
