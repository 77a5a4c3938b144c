//! What watched memory held last: a plugin is told of a write when it is done, so what was there before has to
//! be known.

use std::sync::{Mutex, PoisonError};

/// The longest stretch that is kept.
pub(super) const MOST: u64 = 1 << 16;

/// The bytes of a hook's range.
#[derive(Debug)]
pub(super) struct Shadow {
    first: u64,
    bytes: Mutex<Vec<u8>>,
}

impl Shadow {
    /// What was there when the hook was armed.
    pub(super) fn new(first: u64, bytes: Vec<u8>) -> Self {
        Self {
            first,
            bytes: Mutex::new(bytes),
        }
    }

    /// `len` bytes (1 to 8) at `at` became `new`: what they were. `None` where some of them are not kept.
    pub(super) fn replace(&self, at: u64, len: u8, new: u64) -> Option<u64> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut old = Some(0);
        for n in 0..u64::from(len) {
            let byte = at.checked_add(n).and_then(|at| at.checked_sub(self.first));
            let kept = byte
                .and_then(|n| usize::try_from(n).ok())
                .and_then(|n| bytes.get_mut(n));
            match kept {
                Some(kept) => {
                    old = old.map(|old| old | u64::from(*kept) << (8 * n));
                    *kept = (new >> (8 * n)) as u8;
                }
                None => old = None,
            }
        }
        old
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_write_finds_what_the_last_one_left() {
        let shadow = Shadow::new(0x1000, (0..16).collect());
        assert_eq!(shadow.replace(0x1000, 8, u64::MAX), Some(0x0706_0504_0302_0100));
        assert_eq!(shadow.replace(0x1004, 8, 1), Some(0x0b0a_0908_ffff_ffff));
        assert_eq!(shadow.replace(0x1000, 8, 0), Some(0x0000_0001_ffff_ffff));
        assert_eq!(shadow.replace(0x1003, 1, 0xaa), Some(0));
        // Half of it is outside: what is inside is kept all the same.
        assert_eq!(shadow.replace(0x100c, 8, 0x1122_3344), None);
        assert_eq!(shadow.replace(0x100c, 4, 0), Some(0x1122_3344));
        assert_eq!(shadow.replace(0xffc, 8, 0x5566_7788 << 32), None);
        assert_eq!(shadow.replace(0x1000, 4, 0), Some(0x5566_7788));
        assert_eq!(shadow.replace(u64::MAX, 8, 0), None);
    }
}
