//! Second looks at what was read before: comparisons with memory, in order.
//!
//! Each is made after what the program reads before it, and before what it reads behind it. On x86-64, where loads are not
//! moved across one another, that costs nothing, and a comparison with memory is one instruction: the compiler does not make it
//! of atomic loads, and a read has ten of them (see [`hot`](super::hot) for why that counts).
//!
//! What is read of a guest is read by volatile loads or by `asm!`, and an `asm!` that is not `pure` is a side effect as those are: the compiler
//! keeps them all in their order. That these write nothing (`readonly`) it is told so that it need not load its own variables
//! anew behind each.

use std::sync::atomic::AtomicU64;

/// Whether there are 8 bytes at `place` that are `value`, as they lie in memory.
///
/// # Safety
/// `place` must be readable for 8 bytes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn holds_u64(place: *const u8, value: u64) -> bool {
    // SAFETY: reads what the caller says can be read, and writes nothing.
    unsafe {
        std::arch::asm!(
            "cmp {value}, qword ptr [{place}]",
            "jne {differs}",
            place = in(reg) place,
            value = in(reg) value,
            differs = label { return false },
            options(nostack, readonly)
        );
    }
    true
}

/// Whether what lies at the address that is at `from + OFFSET` is what lies behind it: two words, an address and a value.
///
/// # Safety
/// Both words must be readable, and the address that of 8 readable bytes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn holds_entry<const OFFSET: usize>(from: *const u8) -> bool {
    // SAFETY: as in `holds_u64`.
    unsafe {
        std::arch::asm!(
            "mov {now}, qword ptr [{from} + {place}]",
            "mov {now}, qword ptr [{now}]",
            "cmp {now}, qword ptr [{from} + {value}]",
            "jne {differs}",
            from = in(reg) from,
            now = out(reg) _,
            place = const OFFSET,
            value = const OFFSET + 8,
            differs = label { return false },
            options(nostack, readonly)
        );
    }
    true
}

/// Whether `word` is `value`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn holds_atomic(word: &AtomicU64, value: u64) -> bool {
    // SAFETY: a word that is there.
    unsafe { holds_u64(word.as_ptr().cast(), value) }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) use plain::{holds_atomic, holds_entry, holds_u64};

/// The same for processors that must be told to keep the order.
#[cfg(any(test, not(target_arch = "x86_64")))]
mod plain {
    use std::sync::atomic::{AtomicU64, Ordering, fence};

    use crate::copy;

    /// As on x86-64.
    ///
    /// # Safety
    /// `place` must be readable for 8 bytes.
    #[inline(always)]
    pub(crate) unsafe fn holds_u64(place: *const u8, value: u64) -> bool {
        fence(Ordering::Acquire);
        // SAFETY: the caller's promise.
        let holds = unsafe { copy::load::<u64>(place) } == value;
        fence(Ordering::Acquire);
        holds
    }

    /// As on x86-64.
    ///
    /// # Safety
    /// Both words must be readable, and the address that of 8 readable bytes.
    #[inline(always)]
    #[expect(clippy::cast_ptr_alignment, reason = "the words of a slot are aligned")]
    pub(crate) unsafe fn holds_entry<const OFFSET: usize>(from: *const u8) -> bool {
        // SAFETY: the caller's promise; whether the two belong together, the slot's tag will say.
        unsafe {
            let word = |offset: usize| &*from.add(offset).cast::<AtomicU64>();
            let place = word(OFFSET).load(Ordering::Relaxed);
            let value = word(OFFSET + 8).load(Ordering::Relaxed);
            holds_u64(std::ptr::with_exposed_provenance(place as usize), value)
        }
    }

    /// As on x86-64.
    #[inline(always)]
    pub(crate) fn holds_atomic(word: &AtomicU64, value: u64) -> bool {
        fence(Ordering::Acquire);
        word.load(Ordering::Relaxed) == value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_looking_see_what_is_there_and_what_differs() {
        let word = 7u64;
        let at = std::ptr::from_ref(&word).cast::<u8>();
        let entry = |value: u64| [0, at.expose_provenance() as u64, value];
        let (same, other) = (entry(7), entry(7 | 1 << 63));
        let of = |words: &[u64; 3]| words.as_ptr().cast::<u8>();
        // SAFETY: all of it is on the stack, of the sizes asked for.
        unsafe {
            assert!(holds_u64(at, 7) && plain::holds_u64(at, 7));
            assert!(!holds_u64(at, 7 | 1 << 63) && !plain::holds_u64(at, 7 | 1 << 63));
            assert!(holds_entry::<8>(of(&same)) && plain::holds_entry::<8>(of(&same)));
            assert!(!holds_entry::<8>(of(&other)) && !plain::holds_entry::<8>(of(&other)));
        }
        let atomic = AtomicU64::new(7);
        assert!(holds_atomic(&atomic, 7) && plain::holds_atomic(&atomic, 7));
        assert!(!holds_atomic(&atomic, 6) && !plain::holds_atomic(&atomic, 6));
    }
}
