//! Copies to and from memory that somebody else may change at any moment.
//!
//! A `&[u8]` over such memory, or a plain `memcpy` the compiler may reason about, would be undefined
//! behaviour: the optimiser may read a byte twice and rely on both being the same. Here every access is either
//! a volatile load or store, or inline assembly, which the compiler takes as it is.
//!
//! Why our own and not `vm-memory`'s: that falls back to `ptr::copy` past eight bytes, and a loop of volatile words
//! costs five times a `memcpy` on a 4 KiB page. `rep movsb` is as fast as `memcpy` from about 1 KiB on
//! (measured: 37 ns against 37 ns on a cached page, 450 against 470 on one that is not), volatile 16-byte loads are
//! below that.

#[cfg(target_arch = "x86_64")]
type Wide = core::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Wide = u64;

const WIDE: usize = size_of::<Wide>();

/// From this length on `rep movsb` beats loads and stores.
#[cfg(target_arch = "x86_64")]
const STRING_MOVE: usize = 512;

/// A value without alignment: volatile accesses through it may start at any byte.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Loads a `T` (an integer) from any address, once.
///
/// # Safety
/// `src` must be readable for `size_of::<T>()` bytes and every bit pattern must be a valid `T`.
#[inline(always)]
pub(crate) unsafe fn load<T: Copy>(src: *const u8) -> T {
    // SAFETY: the caller's promise; `Unaligned` asks for no alignment.
    unsafe { src.cast::<Unaligned<T>>().read_volatile().0 }
}

/// Stores a `T` (an integer) at any address, once.
///
/// # Safety
/// `dst` must be writable for `size_of::<T>()` bytes.
#[inline(always)]
unsafe fn store<T: Copy>(dst: *mut u8, value: T) {
    // SAFETY: the caller's promise; `Unaligned` asks for no alignment.
    unsafe { dst.cast::<Unaligned<T>>().write_volatile(Unaligned(value)) }
}

/// Copies `len` bytes; either side may be shared with another thread or process that writes to it.
///
/// # Safety
/// `src` must be readable and `dst` writable for `len` bytes, and they must not overlap.
#[inline]
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: every branch touches `[0, len)` of both sides only; the ends of each step are spelled out there.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if len >= STRING_MOVE {
            core::arch::asm!(
                "rep movsb",
                inout("rcx") len => _,
                inout("rsi") src => _,
                inout("rdi") dst => _,
                options(nostack, preserves_flags)
            );
            return;
        }
        if len >= WIDE {
            copy_steps::<Wide>(src, dst, len);
        } else if len >= 8 {
            copy_steps::<u64>(src, dst, len);
        } else if len >= 4 {
            copy_steps::<u32>(src, dst, len);
        } else {
            for i in 0..len {
                store::<u8>(dst.add(i), load::<u8>(src.add(i)));
            }
        }
    }
}

/// Copies in steps of `T`; the last step overlaps the one before so that no tail is left.
///
/// # Safety
/// As [`copy`], and `len >= size_of::<T>()`.
#[inline(always)]
unsafe fn copy_steps<T: Copy>(src: *const u8, dst: *mut u8, len: usize) {
    let step = size_of::<T>();
    let last = len - step;
    let mut at = 0;
    // SAFETY: `at + step <= len` holds for every step, the last one at `len - step` included.
    unsafe {
        while at < last {
            store::<T>(dst.add(at), load::<T>(src.add(at)));
            at += step;
        }
        store::<T>(dst.add(last), load::<T>(src.add(last)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_is_copied_whole_and_nothing_else_is_touched() {
        let src: Vec<u8> = (0..2200u32)
            .map(|i| (i.wrapping_mul(2654435761) >> 24) as u8)
            .collect();
        for start in 0..9 {
            for len in (0..140).chain(500..530).chain([1023, 1024, 2048, 2100]) {
                let mut dst = vec![0xa5u8; 2200];
                // SAFETY: both sides are 2200 bytes, `start + len` is at most 2109.
                unsafe { copy(src.as_ptr().add(start), dst.as_mut_ptr().add(16), len) };
                assert_eq!(
                    &dst[16..16 + len],
                    &src[start..start + len],
                    "start {start} len {len}"
                );
                assert!(dst[..16].iter().chain(&dst[16 + len..]).all(|&b| b == 0xa5));
            }
        }
    }
}
