//! The tiny VMM, its guests, and the test's side of both.

mod bare;
mod guest;
mod machine;
mod scene;
mod vmm;

pub(crate) use bare::Bare;
pub(crate) use guest::{CODE, GuestKind, PORT, RESULTS, WATCHED, labels};
pub(crate) use machine::{Machine, monitor_if_asked};
pub(crate) use scene::Scene;
pub(crate) use vmm::{SLOT, vmm_if_asked};

/// Whether an INT3 in the guest comes out of it. QEMU's emulation of SVM does not intercept it, so under a KVM on
/// an emulated processor the guest gets it itself.
pub(crate) fn has_int3() -> bool {
    let without = std::env::var_os("VMSIGHT_TEST_NO_INT3").is_some();
    if without {
        println!("INT3 is left out: this processor does not bring it out of the guest");
    }
    !without
}
