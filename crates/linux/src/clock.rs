//! The guest's clocks: `struct timekeeper` (kernel/time/timekeeping.c).

use std::sync::Arc;

use compact_str::CompactString;
use vmsight_arch::Gva;

use crate::layout::{Field, Layout, Place, layout};
use crate::{Kernel, LinuxError};

layout! {
    /// `struct timekeeper`.
    pub(crate) struct TimekeeperLayout = "timekeeper" {
        clock: Field<Gva> = "tkr_mono.clock",
        base: Field<i64> = "tkr_mono.base",
        xtime_nsec: Field<u64> = "tkr_mono.xtime_nsec",
        shift: Field<u32> = "tkr_mono.shift",
        xtime_sec: Field<u64> = "xtime_sec",
        offs_real: Field<i64> = "offs_real",
        offs_boot: Field<i64> = "offs_boot",
        wall_sec: Field<i64> = "wall_to_monotonic.tv_sec",
        wall_nsec: Field<i64> = "wall_to_monotonic.tv_nsec",
    }
}

layout! {
    /// `struct tk_data` (since 6.13): the timekeeper and its lock.
    struct TkDataLayout = "tk_data" {
        timekeeper: Place = "timekeeper",
    }
}

layout! {
    /// `struct clocksource`.
    struct ClocksourceLayout = "clocksource" {
        name: Field<Gva> = "name",
    }
}

/// Nanoseconds of a second.
pub(crate) const SECOND: i64 = 1_000_000_000;

/// What the guest's timekeeper said at its last tick.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    /// Wall-clock time of boot, nanoseconds since 1970: what /proc/stat calls btime, and start times count from.
    pub(crate) boot: i64,
    /// Time since boot with suspension, nanoseconds, up to the last tick.
    pub(crate) uptime: i64,
    /// The clock source's name: tsc, kvm-clock, hpet, … .
    pub(crate) source: Option<String>,
}

impl Clock {
    /// Reads the timekeeper.
    pub(crate) fn read(kernel: &Kernel) -> Result<Self, LinuxError> {
        let layout: Arc<TimekeeperLayout> = kernel.layout()?;
        // One static variable without type data. Up to 6.15 tk_core, then the first element of timekeeper_data.
        let names = ["tk_core", "timekeeper_data"];
        let variable = kernel.find_symbol(&names).ok_or_else(|| LinuxError::NoSymbol {
            name: names.join(" or "),
            release: kernel.release().to_owned(),
        })?;
        // Before struct tk_data had a name, the timekeeper came behind a sequence count, at its own alignment.
        let named = TkDataLayout::resolve(kernel.types(), kernel.release())
            .ok()
            .map(|l| l.timekeeper.offset());
        for offset in named.into_iter().chain([8, 16, 32, 64]) {
            if let Some(clock) = Self::at(kernel, &layout, variable.wrapping_add(offset)) {
                return Ok(clock);
            }
        }
        Err(LinuxError::Implausible {
            what: format!("timekeeper at {variable}"),
            reason: "its offsets to wall-clock time contradict each other wherever it may begin".to_owned(),
        })
    }

    /// The clock, if a timekeeper lies at `at`: the kernel keeps `offs_real` equal to minus `wall_to_monotonic`.
    fn at(kernel: &Kernel, layout: &TimekeeperLayout, at: Gva) -> Option<Self> {
        let space = kernel.space();
        let real = layout.offs_real.read(space, at).ok()?;
        let wall_sec = layout.wall_sec.read(space, at).ok()?;
        let wall_nsec = layout.wall_nsec.read(space, at).ok()?;
        let wall = wall_sec.checked_mul(SECOND)?.checked_add(wall_nsec)?;
        if !(0..SECOND).contains(&wall_nsec) || wall.checked_neg()? != real || real == 0 {
            return None;
        }
        let boot_offset = layout.offs_boot.read(space, at).ok()?;
        let shift = layout.shift.read(space, at).ok()?;
        let since_base = layout.xtime_nsec.read(space, at).ok()?.checked_shr(shift)? as i64;
        let monotonic = layout.base.read(space, at).ok()?.checked_add(since_base)?;
        let source = layout.clock.read(space, at).ok().and_then(|clock| {
            let source: Arc<ClocksourceLayout> = kernel.layout().ok()?;
            let name = source.name.read(space, clock).ok()?;
            kernel.text(name, 64).ok()
        });
        Some(Self {
            boot: real.checked_sub(boot_offset)?,
            uptime: monotonic.checked_add(boot_offset)?,
            source,
        })
    }

    /// The wall-clock time of a moment given in nanoseconds since boot, as RFC 3339 in UTC with milliseconds.
    pub(crate) fn wall(&self, since_boot: u64) -> Option<CompactString> {
        let text = written(self.boot.checked_add(i64::try_from(since_boot).ok()?)?)?;
        CompactString::from_utf8(text).ok()
    }
}

/// When the guest was booted, nanoseconds since 1970: what the start times of tasks (`start_boottime`) count from.
///
/// # Errors
/// If the timekeeper cannot be found or read.
pub fn boot_time(kernel: &Kernel) -> Result<i64, LinuxError> {
    Clock::read(kernel).map(|clock| clock.boot)
}

/// Nanoseconds since 1970 as `2026-11-23T08:06:47.123Z`. `None` outside the years 0 to 9999.
pub fn rfc3339(nanoseconds: i64) -> Option<String> {
    written(nanoseconds).map(|text| String::from_utf8_lossy(&text).into_owned())
}

fn written(nanoseconds: i64) -> Option<[u8; 24]> {
    let seconds = nanoseconds.div_euclid(SECOND);
    let millis = nanoseconds.rem_euclid(SECOND) / 1_000_000;
    let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Civil date from a day count, on a calendar whose year begins in March (the leap day comes last) and eras of 400 years.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    if !(0..=9999).contains(&year) {
        return None;
    }
    // Listings do this for every row; the formatting machinery would cost several times as much as the row's reads.
    let mut text = *b"0000-00-00T00:00:00.000Z";
    for (at, width, value) in [
        (0, 4, year),
        (5, 2, month),
        (8, 2, day),
        (11, 2, second / 3600),
        (14, 2, second / 60 % 60),
        (17, 2, second % 60),
        (20, 3, millis),
    ] {
        let mut rest = value;
        for digit in text.iter_mut().skip(at).take(width).rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds: i64| rfc3339(seconds * 1_000_000_000).expect("a year of four digits");
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59.000Z");
        assert_eq!(at(-1), "1969-12-31T23:59:59.000Z");
        assert_eq!(at(4_102_444_800), "2100-01-01T00:00:00.000Z");
        assert_eq!(
            rfc3339(1_700_000_000_123_456_789).as_deref(),
            Some("2023-11-14T22:13:20.123Z")
        );
        assert!(rfc3339(i64::MAX).is_some() && rfc3339(i64::MIN).is_some());
    }
}
