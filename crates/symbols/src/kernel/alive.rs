//! Which of several kernels in memory is the one that runs, by their clocks.

use vmsight_memory::GuestMemory;

use super::{ImageBytes, KernelImage};
use crate::Profile;

/// The candidate whose clock was updated last: a dead kernel's stands still. `None` where that cannot be told.
pub(super) fn by_clock<'a>(
    memory: &GuestMemory,
    images: impl Iterator<Item = &'a KernelImage>,
) -> Option<(usize, String)> {
    let clocks: Vec<Option<u64>> = images.map(|image| wall_clock(memory, image)).collect();
    let (best, time) = clocks
        .iter()
        .enumerate()
        .filter_map(|(i, c)| Some((i, (*c)?)))
        .max_by_key(|&(_, c)| c)?;
    let unique = clocks.iter().filter(|c| **c == Some(time)).count() == 1;
    unique.then(|| {
        let others: Vec<String> = clocks
            .iter()
            .enumerate()
            .filter(|&(i, _)| i != best)
            .map(|(_, c)| c.map_or_else(|| "unreadable".to_owned(), |c| format!("{} s behind", time - c)))
            .collect();
        (
            best,
            format!(
                "its clock ({time} s since 1970) is the latest; others: {}",
                others.join(", ")
            ),
        )
    })
}

/// Seconds since 1970 at the kernel's last clock tick: `tk_core.timekeeper.xtime_sec`.
fn wall_clock(memory: &GuestMemory, image: &KernelImage) -> Option<u64> {
    let profile = Profile::from_memory(memory, image).ok()?;
    let types = &profile.types;
    // An anonymous struct of a sequence counter and the timekeeper until 6.12, then `struct tk_data` (array since 6.17).
    let timekeeper = match types.member("tk_data", "timekeeper") {
        Some(field) => field.offset,
        None => {
            let seq = types
                .find_struct("seqcount_raw_spinlock")
                .or_else(|| types.find_struct("seqcount"))?;
            types.size_of(seq)?.next_multiple_of(8)
        }
    };
    let xtime = types.member("timekeeper", "xtime_sec")?.offset;
    let core = profile
        .symbols
        .address("tk_core")
        .or_else(|| profile.symbols.address("timekeeper_data"))?;
    let offset = core
        .wrapping_sub(profile.text_start)
        .wrapping_add(timekeeper)
        .wrapping_add(xtime);
    let bytes = ImageBytes::of(memory, image).read(offset, 8)?;
    let seconds = u64::from_le_bytes(bytes.as_ref().try_into().ok()?);
    // From 2001 on, and before the year 5138: anything else is no clock.
    (1_000_000_000..100_000_000_000)
        .contains(&seconds)
        .then_some(seconds)
}
