//! Filters that run in the guest: what nobody wants does not leave it.
//!
//! An exit from the guest costs a microsecond where processors virtualize, and a multiple of it where KVM runs in a VM
//! itself. A filter in the VMM comes after it. For an instruction that is executed very often, and of which few executions are
//! wanted, that is too late. Such a hook may ask for its filter to be put before the exit ([`vmsight_hooks::Hook::inside`]): the
//! instruction is replaced by a jump to code of ours ([`code`]), which judges and goes on, or stops at an INT3 of its own that comes
//! out as the event.
//!
//! That code lies in memory of ours that the guest has as further slots ([`window`]), mapped where its page tables had nothing. It is
//! read-only to the guest. But that it is reached at all depends on the guest's own memory, the jump and one entry of its page tables,
//! as every INT3 does: against a kernel that looks for it, it is no protection.

use std::collections::BTreeMap;

mod code;
mod window;

pub(crate) use code::{Displaced, Request, assemble, displaced};
pub(crate) use window::{Placed, Window};

/// Bytes of the jump that replaces the instruction.
pub(crate) const JUMP: usize = 5;

/// The jump from `at` to `to`; `None` where that is too far.
pub(crate) fn jump(at: u64, to: u64) -> Option<[u8; JUMP]> {
    let distance = to.wrapping_sub(at.wrapping_add(JUMP as u64)).cast_signed();
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([0xe9, a, b, c, d])
}

/// The byte at `gpa` of what jumps were put in place of, where one was; they are listed by their physical addresses.
pub(crate) fn replaced<T>(
    jumps: &BTreeMap<u64, T>,
    original: impl Fn(&T) -> [u8; JUMP],
    gpa: u64,
) -> Option<u8> {
    let (at, jump) = jumps.range(..=gpa).next_back()?;
    original(jump).get(usize::try_from(gpa - at).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_reaches_2_gib() {
        assert_eq!(jump(0x1000, 0x1005), Some([0xe9, 0, 0, 0, 0]));
        assert_eq!(jump(0x1000, 0x1000), Some([0xe9, 0xfb, 0xff, 0xff, 0xff]));
        let text = 0xffff_ffff_8100_0000_u64;
        assert!(jump(text, 0xffff_ffff_bfe0_0000).is_some());
        assert_eq!(jump(text, text - (1 << 31)), None);
        assert_eq!(jump(0x1000, 1 << 40), None);
    }
}
