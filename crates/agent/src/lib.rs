//! The agent in a VMM: what a monitor asks for is hooked, and the VMM's own use of KVM stays as it is.
//!
//! A shared library that is loaded into a stock VMM by `LD_PRELOAD` and stands between it and KVM: [`ioctl`] is the C
//! library's, seen first. It learns the VM, its vCPUs and its memory from what the VMM asks of KVM. Where a hook makes a
//! vCPU leave the guest, the vCPU's own thread tells the monitor, waits for the verdict where it is to wait, and goes back
//! into the guest; the VMM sees nothing of it. Everything else goes to the VMM untouched.
//!
//! The VMM comes first. It gets its threads back whenever it wants them, its memory slots, its MSR filter and its debugger
//! work as they would without us, and when the monitor is gone everything is as it was. Nothing here panics out into the
//! VMM, writes to its standard output, or does more in a signal handler than return.

mod agent;
mod capability;
mod conclude;
mod control;
mod debug;
mod errno;
mod exits;
mod filter;
mod guest;
mod inside;
mod instruction;
mod kvm;
#[cfg(test)]
mod nothing;
mod own;
mod pending;
mod qemu;
mod registers;
mod run;
mod session;
mod sift;
mod signal;
mod slots;
mod state;
mod step;
mod table;
mod tcg;
mod vcpu;
mod world;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_GUESTDBG_ENABLE, KVM_MSR_FILTER_MAX_BITMAP_SIZE, kvm_enable_cap,
    kvm_guest_debug, kvm_msr_filter, kvm_userspace_memory_region,
};
use libc::{c_int, c_ulong, c_void};
use vmsight_arch::registers::control::CR0_PE;

use agent::Agent;
use vcpu::Vcpu;

thread_local! {
    /// The vCPU that this thread ran last: looking it up again costs a comparison.
    static LAST: Cell<Option<(c_int, &'static Vcpu)>> = const { Cell::new(None) };
}

/// `ioctl(2)` as the VMM calls it.
///
/// # Safety
/// As of ioctl(2): `argument` must be what `request` takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // SAFETY: passed on as the VMM gave it.
    let real = || unsafe { kvm::ioctl(fd, request, argument as usize) };
    if !kvm::is_kvm(request) {
        return real();
    }
    // A panic is a mistake of ours. The VMM must not end for it, nor may it unwind through foreign frames.
    let answer = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: as the caller promised.
        unsafe { intercept(fd, request, argument, &real) }
    }));
    answer.unwrap_or_else(|_| {
        errno::set(libc::EIO);
        -1
    })
}

/// # Safety
/// As of [`ioctl`].
unsafe fn intercept(fd: c_int, request: u64, argument: *mut c_void, real: &dyn Fn() -> c_int) -> c_int {
    if request == kvm::CREATE_VM {
        let vm = real();
        if vm >= 0 {
            agent::begin(fd, vm);
        }
        return vm;
    }
    let Some(agent) = agent::get() else { return real() };
    if agent::is_vm(fd) {
        // SAFETY: as the caller promised.
        return unsafe { vm_request(agent, request, argument, real) };
    }
    let vcpu = match LAST.get() {
        Some((last, vcpu)) if last == fd => Some(vcpu),
        _ => agent.vcpu(fd),
    };
    match vcpu {
        // SAFETY: as the caller promised.
        Some(vcpu) => unsafe { vcpu_request(agent, vcpu, request, argument, real) },
        None => real(),
    }
}

/// # Safety
/// As of [`ioctl`].
unsafe fn vm_request(
    agent: &'static Agent,
    request: u64,
    argument: *mut c_void,
    real: &dyn Fn() -> c_int,
) -> c_int {
    let answered = |result: Result<(), i32>| match result {
        Ok(()) => 0,
        Err(error) => {
            errno::set(error);
            -1
        }
    };
    match request {
        kvm::CREATE_VCPU => {
            let vcpu = real();
            if vcpu >= 0 {
                agent.add_vcpu(vcpu);
            }
            vcpu
        }
        kvm::SET_USER_MEMORY_REGION | kvm::SET_USER_MEMORY_REGION2 if !argument.is_null() => {
            // SAFETY: the argument of both begins with this structure, which the VMM filled in.
            let region = unsafe { argument.cast::<kvm_userspace_memory_region>().read_unaligned() };
            let foreign = region.flags & kvm_bindings::KVM_MEM_GUEST_MEMFD != 0;
            agent.set_memory(&region, foreign, real)
        }
        kvm::X86_SET_MSR_FILTER if !argument.is_null() => {
            // SAFETY: the VMM filled it in, with bitmaps as long as each says.
            match unsafe { read_filter(argument.cast()) } {
                Some(filter) => answered(agent.set_filter(filter)),
                // KVM refuses it as it is.
                None => real(),
            }
        }
        kvm::ENABLE_CAP if !argument.is_null() => {
            // SAFETY: the VMM filled it in.
            let capability = unsafe { argument.cast::<kvm_enable_cap>().read_unaligned() };
            match (capability.cap, capability.args.first()) {
                (KVM_CAP_X86_USER_SPACE_MSR, Some(reasons)) => match u32::try_from(*reasons) {
                    Ok(reasons) => answered(agent.set_reasons(reasons)),
                    Err(_) => real(),
                },
                _ => real(),
            }
        }
        _ => real(),
    }
}

/// The VMM's filter; `None` where it is none that KVM takes.
///
/// # Safety
/// It must be one, with bitmaps as long as its ranges say.
unsafe fn read_filter(raw: *const kvm_msr_filter) -> Option<filter::Filter> {
    // SAFETY: as the caller promised.
    let raw = unsafe { raw.read_unaligned() };
    let mut ranges = Vec::new();
    for range in raw.ranges.iter().filter(|r| r.nmsrs != 0) {
        let len = range.nmsrs.div_ceil(8);
        if range.bitmap.is_null() || len > KVM_MSR_FILTER_MAX_BITMAP_SIZE {
            return None;
        }
        // SAFETY: as the caller promised.
        let bitmap = unsafe { std::slice::from_raw_parts(range.bitmap, len as usize) };
        ranges.push(filter::Range {
            flags: range.flags,
            base: range.base,
            count: range.nmsrs,
            bitmap: bitmap.to_vec(),
        });
    }
    Some(filter::Filter {
        flags: raw.flags,
        ranges,
    })
}

/// # Safety
/// As of [`ioctl`].
unsafe fn vcpu_request(
    agent: &'static Agent,
    vcpu: &'static Vcpu,
    request: u64,
    argument: *mut c_void,
    real: &dyn Fn() -> c_int,
) -> c_int {
    match request {
        kvm::RUN => {
            if LAST.get().is_none_or(|(last, _)| last != vcpu.fd) {
                LAST.set(Some((vcpu.fd, vcpu)));
                vcpu.is_run_by(rustix::thread::gettid().as_raw_nonzero().get());
            }
            run::run(agent, vcpu)
        }
        kvm::SET_GUEST_DEBUG if !argument.is_null() => {
            // SAFETY: the VMM filled it in.
            let debug = unsafe { argument.cast::<kvm_guest_debug>().read_unaligned() };
            let on = debug.control & KVM_GUESTDBG_ENABLE != 0;
            if !agent.vmm_debugs(vcpu, on) {
                errno::set(libc::EBUSY);
                return -1;
            }
            // Off, while we use it: that is the VMM's view of it already.
            if !on && agent.table().active { 0 } else { real() }
        }
        kvm::SET_SREGS | kvm::SET_SREGS2 if !argument.is_null() && agent.table().active => {
            // SAFETY: the VMM filled it in; both begin with the same registers.
            let new = unsafe { argument.cast::<kvm_bindings::kvm_sregs>().read_unaligned() };
            let old = kvm::get_sregs(vcpu.fd).map_or(0, |s| s.cr0);
            if old & CR0_PE != 0 && new.cr0 & CR0_PE == 0 {
                agent.machine_reset();
            }
            real()
        }
        _ => real(),
    }
}
