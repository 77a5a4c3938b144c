//! The tiny VMM, its guests, and the test's side of both.

mod guest;
mod machine;
mod vmm;

pub(crate) use guest::{GuestKind, RESULTS, WATCHED};
pub(crate) use machine::{Machine, monitor_if_asked};
pub(crate) use vmm::{SLOT, vmm_if_asked};

/// Whether KVM has the guest's kernel code run by a processor. A KVM without hardware for it (kvm_pvm) does it itself as
/// long as the guest knows nothing of that, and has no INT3.
pub(crate) fn has_int3() -> bool {
    let emulates = std::path::Path::new("/sys/module/kvm_pvm").exists();
    if emulates {
        println!("INT3 is left out: this KVM does not execute it");
    }
    !emulates
}
