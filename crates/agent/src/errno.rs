//! The C library's `errno`, which is part of what `ioctl` answers.

/// Sets it.
pub(crate) fn set(value: i32) {
    // SAFETY: the place is this thread's own and always there.
    unsafe { *libc::__errno_location() = value };
}

/// Reads it.
pub(crate) fn get() -> i32 {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}
