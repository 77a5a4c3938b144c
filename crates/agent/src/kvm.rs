//! KVM's requests (Linux, include/uapi/linux/kvm.h), made past our own `ioctl`.

use std::io;
use std::mem::size_of;

use kvm_bindings::{
    kvm_debugregs, kvm_enable_cap, kvm_guest_debug, kvm_msr_entry, kvm_msr_filter, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events,
};
use libc::{c_int, c_ulong};

const KVMIO: u64 = 0xae;
const WRITE: u64 = 1;
const READ: u64 = 2;

const fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

/// Whether a request is one of KVM's.
pub(crate) const fn is_kvm(request: u64) -> bool {
    request >> 8 & 0xff == KVMIO
}

pub(crate) const CREATE_VM: u64 = request(0, 0x01, 0);
pub(crate) const CHECK_EXTENSION: u64 = request(0, 0x03, 0);
pub(crate) const GET_VCPU_MMAP_SIZE: u64 = request(0, 0x04, 0);
pub(crate) const CREATE_VCPU: u64 = request(0, 0x41, 0);
pub(crate) const SET_USER_MEMORY_REGION: u64 = request(WRITE, 0x46, 32);
/// The same with a file for a confidential guest's memory behind it (Linux 6.8).
pub(crate) const SET_USER_MEMORY_REGION2: u64 = request(WRITE, 0x49, 160);
pub(crate) const RUN: u64 = request(0, 0x80, 0);
pub(crate) const GET_REGS: u64 = request(READ, 0x81, size_of::<kvm_regs>());
pub(crate) const SET_REGS: u64 = request(WRITE, 0x82, size_of::<kvm_regs>());
pub(crate) const GET_SREGS: u64 = request(READ, 0x83, size_of::<kvm_sregs>());
pub(crate) const SET_SREGS: u64 = request(WRITE, 0x84, size_of::<kvm_sregs>());
pub(crate) const GET_MSRS: u64 = request(READ | WRITE, 0x88, 8);
pub(crate) const SET_MSRS: u64 = request(WRITE, 0x89, 8);
pub(crate) const SET_GUEST_DEBUG: u64 = request(WRITE, 0x9b, size_of::<kvm_guest_debug>());
pub(crate) const GET_VCPU_EVENTS: u64 = request(READ, 0x9f, size_of::<kvm_vcpu_events>());
pub(crate) const SET_VCPU_EVENTS: u64 = request(WRITE, 0xa0, size_of::<kvm_vcpu_events>());
pub(crate) const GET_DEBUGREGS: u64 = request(READ, 0xa1, size_of::<kvm_debugregs>());
pub(crate) const SET_DEBUGREGS: u64 = request(WRITE, 0xa2, size_of::<kvm_debugregs>());
pub(crate) const ENABLE_CAP: u64 = request(WRITE, 0xa3, size_of::<kvm_enable_cap>());
pub(crate) const X86_SET_MSR_FILTER: u64 = request(WRITE, 0xc6, size_of::<kvm_msr_filter>());
/// The same as [`SET_SREGS`] with PAE's page-directory pointers (Linux 5.14).
pub(crate) const SET_SREGS2: u64 = request(WRITE, 0xcd, 320);

/// The kernel's `ioctl`.
///
/// # Safety
/// As of ioctl(2): `argument` must be what `request` takes.
pub(crate) unsafe fn ioctl(fd: c_int, request: u64, argument: usize) -> c_int {
    // SAFETY: passed on as the caller gave it; the C library's `ioctl` does just this.
    unsafe { libc::syscall(libc::SYS_ioctl, fd, request as c_ulong, argument) as c_int }
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A request whose argument is a number.
pub(crate) fn number(fd: c_int, request: u64, argument: usize) -> io::Result<c_int> {
    debug_assert!(matches!(request, CHECK_EXTENSION | GET_VCPU_MMAP_SIZE));
    // SAFETY: these take a number.
    checked(unsafe { ioctl(fd, request, argument) })
}

/// What the kernel says of a capability; 0 where it does not know it.
pub(crate) fn extension(fd: c_int, capability: u32) -> u32 {
    number(fd, CHECK_EXTENSION, capability as usize)
        .ok()
        .and_then(|n| u32::try_from(n).ok())
        .unwrap_or(0)
}

macro_rules! getters {
    ($($name:ident: $request:ident -> $type:ty;)*) => {
        $(pub(crate) fn $name(fd: c_int) -> io::Result<$type> {
            let mut value = <$type>::default();
            // SAFETY: the kernel writes one of these, whose size is part of the request.
            checked(unsafe { ioctl(fd, $request, (&raw mut value) as usize) })?;
            Ok(value)
        })*
    };
}

macro_rules! setters {
    ($($name:ident: $request:ident <- $type:ty;)*) => {
        $(pub(crate) fn $name(fd: c_int, value: &$type) -> io::Result<()> {
            // SAFETY: the kernel reads one of these, whose size is part of the request.
            checked(unsafe { ioctl(fd, $request, (&raw const *value) as usize) })?;
            Ok(())
        })*
    };
}

getters! {
    get_regs: GET_REGS -> kvm_regs;
    get_sregs: GET_SREGS -> kvm_sregs;
    get_events: GET_VCPU_EVENTS -> kvm_vcpu_events;
    get_debugregs: GET_DEBUGREGS -> kvm_debugregs;
}

setters! {
    set_regs: SET_REGS <- kvm_regs;
    set_sregs: SET_SREGS <- kvm_sregs;
    set_events: SET_VCPU_EVENTS <- kvm_vcpu_events;
    set_debugregs: SET_DEBUGREGS <- kvm_debugregs;
    set_guest_debug: SET_GUEST_DEBUG <- kvm_guest_debug;
}

/// Sets a slot of guest memory.
pub(crate) fn set_memory(fd: c_int, region: &kvm_userspace_memory_region) -> io::Result<()> {
    // SAFETY: the kernel reads one of these. The memory it names is the VMM's, which gave it to its guest.
    checked(unsafe { ioctl(fd, SET_USER_MEMORY_REGION, (&raw const *region) as usize) })?;
    Ok(())
}

/// Sets the filter of MSRs; its ranges point to bitmaps that live as long as the call.
pub(crate) fn set_msr_filter(fd: c_int, filter: &crate::filter::Filter) -> io::Result<()> {
    let mut bitmaps: Vec<Vec<u8>> = filter.ranges.iter().map(|r| r.bitmap.clone()).collect();
    let mut raw = kvm_msr_filter {
        flags: filter.flags,
        ..kvm_msr_filter::default()
    };
    for ((to, range), bitmap) in raw.ranges.iter_mut().zip(&filter.ranges).zip(&mut bitmaps) {
        to.flags = range.flags;
        to.base = range.base;
        to.nmsrs = range.count;
        to.bitmap = bitmap.as_mut_ptr();
    }
    // SAFETY: the kernel reads the structure and, for each range, as many bits as its bitmap has.
    checked(unsafe { ioctl(fd, X86_SET_MSR_FILTER, (&raw const raw) as usize) })?;
    Ok(())
}

/// Asks for MSR accesses of these reasons (KVM_MSR_EXIT_REASON_*) as exits.
pub(crate) fn exit_on_msr(fd: c_int, reasons: u32) -> io::Result<()> {
    let mut capability = kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR,
        ..kvm_enable_cap::default()
    };
    if let Some(first) = capability.args.first_mut() {
        *first = reasons.into();
    }
    // SAFETY: the kernel reads one of these.
    checked(unsafe { ioctl(fd, ENABLE_CAP, (&raw const capability) as usize) })?;
    Ok(())
}

/// `struct kvm_msrs` with one entry.
#[repr(C)]
#[derive(Default)]
struct OneMsr {
    count: u32,
    pad: u32,
    entry: kvm_msr_entry,
}

/// An MSR of a vCPU; `None` where KVM does not know it.
pub(crate) fn get_msr(fd: c_int, index: u32) -> Option<u64> {
    let mut one = OneMsr {
        count: 1,
        ..OneMsr::default()
    };
    one.entry.index = index;
    // SAFETY: the kernel reads and writes the structure with the one entry that it says it has.
    let done = unsafe { ioctl(fd, GET_MSRS, (&raw mut one) as usize) };
    (done == 1).then_some(one.entry.data)
}

/// Sets an MSR of a vCPU; whether KVM took the value.
pub(crate) fn set_msr(fd: c_int, index: u32, value: u64) -> bool {
    let mut one = OneMsr {
        count: 1,
        ..OneMsr::default()
    };
    one.entry.index = index;
    one.entry.data = value;
    // SAFETY: the kernel reads the structure with the one entry that it says it has.
    unsafe { ioctl(fd, SET_MSRS, (&raw const one) as usize) == 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        // As strace(1) prints them.
        assert_eq!(RUN, 0xae80);
        assert_eq!(CREATE_VCPU, 0xae41);
        assert_eq!(SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(GET_REGS, 0x8090_ae81);
        assert_eq!(GET_SREGS, 0x8138_ae83);
        assert_eq!(SET_GUEST_DEBUG, 0x4048_ae9b);
        assert_eq!(GET_MSRS, 0xc008_ae88);
        assert_eq!(X86_SET_MSR_FILTER, 0x4188_aec6);
        assert_eq!(SET_SREGS2, 0x4140_aecd);
        assert!(is_kvm(RUN) && is_kvm(SET_SREGS) && !is_kvm(0x5401));
    }
}
