//! The monitor that lives inside a guest, in an address space of its own: its handlers.
//!
//! The image (`main.rs`) calls them in the guest, without an exit; the hypervisor calls the same ones after an exit, which is
//! what they are compared with. Nothing here may use floating point or vector registers: they are the guest's.
#![no_std]

use vmsight_sim_abi::{Frame, Verdict};

/// The null handler: it counts.
#[inline]
pub fn handle(_frame: &Frame, handled: &mut u64) -> Verdict {
    *handled = handled.wrapping_add(1);
    Verdict::Continue
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_null_handler_counts() {
        let mut handled = u64::MAX;
        assert_eq!(handle(&Frame::default(), &mut handled), Verdict::Continue);
        assert_eq!(handled, 0);
    }
}
