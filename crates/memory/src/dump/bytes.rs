//! Integers at an offset of bytes nobody vouches for.

/// The `N` bytes at `at`, `None` where they are not all there.
pub(super) fn array<const N: usize>(data: &[u8], at: u64) -> Option<[u8; N]> {
    data.get(usize::try_from(at).ok()?..)?.first_chunk::<N>().copied()
}

pub(super) fn u16_at(data: &[u8], at: u64) -> Option<u16> {
    array(data, at).map(u16::from_le_bytes)
}

pub(super) fn u32_at(data: &[u8], at: u64) -> Option<u32> {
    array(data, at).map(u32::from_le_bytes)
}

pub(super) fn u64_at(data: &[u8], at: u64) -> Option<u64> {
    array(data, at).map(u64::from_le_bytes)
}

/// `len` bytes at `at`, as many as there are.
pub(super) fn slice(data: &[u8], at: u64, len: u64) -> &[u8] {
    let start = usize::try_from(at).unwrap_or(usize::MAX).min(data.len());
    let rest = data.get(start..).unwrap_or_default();
    rest.get(..usize::try_from(len).unwrap_or(usize::MAX))
        .unwrap_or(rest)
}
