//! A moment as somebody types it.

const SECOND: i64 = 1_000_000_000;

/// Nanoseconds since 1970 of a moment in ISO 8601: `2026-11-28`, `2026-11-28T09:30`, `2026-11-28 09:30:15.250`; with `Z` or an offset
/// (`+01:00`) behind it, and without in UTC. `None` for anything else, and outside the years 1678 to 2262.
pub fn parse_moment(text: &str) -> Option<i64> {
    let (date, rest) = text.split_at_checked(10)?;
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    if !(1..=12).contains(&month) || !(1..=days(year, month)).contains(&day) {
        return None;
    }
    let (time, offset) = match rest.strip_prefix(['T', 't', ' ']) {
        Some(rest) => zone(rest)?,
        None if rest.is_empty() => ("00:00", 0),
        None => return None,
    };
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [hour, minute, second] = match time.len() {
        5 => {
            let [hour, minute] = numbers(time, ':', [2, 2])?;
            [hour, minute, 0]
        }
        _ => numbers(time, ':', [2, 2, 2])?,
    };
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let seconds = since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset;
    seconds.checked_mul(SECOND)?.checked_add(nanoseconds(fraction)?)
}

/// What stands before the zone, and the zone's seconds east of Greenwich.
fn zone(text: &str) -> Option<(&str, i64)> {
    if let Some(time) = text.strip_suffix(['Z', 'z']) {
        return Some((time, 0));
    }
    let Some(at) = text.find(['+', '-']) else {
        return Some((text, 0));
    };
    let (time, offset) = text.split_at_checked(at)?;
    let (sign, offset) = match offset.strip_prefix('-') {
        Some(offset) => (-1, offset),
        None => (1, offset.strip_prefix('+')?),
    };
    let [hours, minutes] = numbers(offset, ':', [2, 2])?;
    (hours <= 14 && minutes < 60).then_some((time, sign * (hours * 3600 + minutes * 60)))
}

/// Numbers of so many digits each.
fn numbers<const N: usize>(text: &str, between: char, digits: [usize; N]) -> Option<[i64; N]> {
    let mut out = [0; N];
    let mut parts = text.split(between);
    for (number, digits) in out.iter_mut().zip(digits) {
        let part = parts.next().filter(|part| part.len() == digits)?;
        *number = digit_only(part)?;
    }
    parts.next().is_none().then_some(out)
}

fn digit_only(text: &str) -> Option<i64> {
    let only = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    only.then(|| text.parse().ok()).flatten()
}

/// A fraction of a second; what is finer than a nanosecond is cut.
fn nanoseconds(fraction: &str) -> Option<i64> {
    digit_only(fraction.get(..fraction.len().min(18))?)?;
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    Some(digits.fold(0, |all, digit| all * 10 + i64::from(digit.wrapping_sub(b'0'))))
}

fn days(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970 to a date: years are counted from March, so that the leap day is their last.
fn since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year * 365 + leaps + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use vmsight_linux::clock::rfc3339;

    use super::*;

    #[test]
    fn moments_are_read_as_they_are_written() {
        for (text, there) in [
            ("1970-01-01", "1970-01-01T00:00:00.000Z"),
            ("2000-02-29 23:59", "2000-02-29T23:59:00.000Z"),
            ("2026-11-28T09:30:15", "2026-11-28T09:30:15.000Z"),
            ("2026-11-28T09:30:15.25Z", "2026-11-28T09:30:15.250Z"),
            ("2026-12-31T23:30+01:30", "2026-12-31T22:00:00.000Z"),
            ("2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"),
            ("1969-12-31T23:59:59.999999999Z", "1969-12-31T23:59:59.999Z"),
        ] {
            let moment = parse_moment(text).and_then(rfc3339);
            assert_eq!(moment.as_deref(), Some(there), "{text}");
        }
    }

    #[test]
    fn every_day_comes_back() {
        // As far as nanoseconds since 1970 go in 64 bits.
        for day in -100_000..100_000i64 {
            let text = rfc3339(day * 86_400 * SECOND).unwrap_or_default();
            assert_eq!(parse_moment(&text), Some(day * 86_400 * SECOND), "{text}");
        }
    }

    #[test]
    fn what_is_no_moment_is_none() {
        for text in [
            "",
            "yesterday",
            "2026-11-28T",
            "2026-13-01",
            "2026-02-29",
            "2026-11-28T24:00",
            "2026-11-28T09:60",
            "2026-11-28T09:30:",
            "2026-11-28T09:30.x",
            "2026-11-28T09:30+1:00",
            "2026-11-28X09:30",
            "+026-11-28",
            "2026-11-28T+9:30",
            "9999-01-01",
            "2026-11-2é",
            "2026-11-28T09:30:15.é",
        ] {
            assert_eq!(parse_moment(text), None, "{text}");
        }
    }
}
