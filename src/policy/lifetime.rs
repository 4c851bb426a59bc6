//! Lifetimes as policies, configuration and command line write them, `1h30m`, and the range that a policy allows.

use std::{ops::RangeInclusive, time::Duration};

/// The shortest lifetime that a policy may allow.
pub const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// The longest lifetime that a policy may allow: a leap year.
pub const MAX_LIFETIME: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// What a policy may allow.
pub const LIFETIMES: RangeInclusive<Duration> = MIN_LIFETIME..=MAX_LIFETIME;
/// What a certificate gets when neither the policy nor the caller says.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(60 * 60);
/// The maximum of a policy that names none.
pub const DEFAULT_MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
/// The minimum of a policy that names none; its default if that is shorter.
pub const DEFAULT_MIN_LIFETIME: Duration = Duration::from_secs(5 * 60);

const UNITS: [(char, u64); 3] = [('h', 3600), ('m', 60), ('s', 1)];

/// The lifetimes a policy allows; `min <= default <= max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) min: Duration,
    pub(super) default: Duration,
    pub(super) max: Duration,
}

impl Range {
    /// Fills in what is absent, with no minimum below `floor`; the error names the field beside its sentence.
    pub(super) fn new(
        floor: Duration,
        min: Option<Duration>,
        default: Option<Duration>,
        max: Option<Duration>,
    ) -> Result<Self, (&'static str, String)> {
        let max = max.unwrap_or_else(|| default.unwrap_or_default().max(DEFAULT_MAX_LIFETIME));
        let default = default.unwrap_or_else(|| max.min(DEFAULT_LIFETIME).max(min.unwrap_or_default()));
        let min = min.unwrap_or_else(|| default.min(DEFAULT_MIN_LIFETIME.max(floor)));
        let range = Self { min, default, max };
        if default > max {
            return Err(("default", format!("{} is more than max, {}", print(default), print(max))));
        }
        match min > default {
            true => Err(("min", format!("{} is more than default, {}", print(min), print(default)))),
            false => Ok(range),
        }
    }
}

/// Parses `90s`, `15m`, `1h30m`, as Go's `time.ParseDuration` does, in whole seconds; units in descending order, each at
/// most once.
///
/// # Errors
///
/// A sentence when the text is no such duration or lies outside `allowed`.
pub fn parse(text: &str, allowed: RangeInclusive<Duration>) -> Result<Duration, String> {
    let malformed = || format!("{} is no duration; write for example 90s, 15m or 1h30m", super::shown(text));
    let mut seconds: u64 = 0;
    let mut rest = text;
    for (unit, unit_seconds) in UNITS {
        if let Some((count, after)) = rest.split_once(unit) {
            if count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
                return Err(malformed());
            }
            let part = count.parse::<u64>().ok().and_then(|count| count.checked_mul(unit_seconds));
            seconds = part.and_then(|part| seconds.checked_add(part)).ok_or_else(malformed)?;
            rest = after;
        }
    }
    if text.is_empty() || !rest.is_empty() {
        return Err(malformed());
    }
    let duration = Duration::from_secs(seconds);
    match allowed.contains(&duration) {
        true => Ok(duration),
        false => Err(format!("it must lie between {} and {}", print(*allowed.start()), print(*allowed.end()))),
    }
}

/// Prints whole seconds as [`parse`] reads them, without zero parts.
pub fn print(duration: Duration) -> String {
    let mut seconds = duration.as_secs();
    let mut text = String::new();
    for (unit, unit_seconds) in UNITS {
        if seconds >= unit_seconds {
            text.push_str(&format!("{}{unit}", seconds / unit_seconds));
            seconds %= unit_seconds;
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_printed_alike() {
        for (text, seconds) in
            [("1s", 1), ("90s", 90), ("15m", 900), ("1h30m", 5400), ("24h", 86_400), ("8784h", 31_622_400)]
        {
            assert_eq!(parse(text, LIFETIMES), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for (seconds, text) in [(0, "0s"), (90, "1m30s"), (5400, "1h30m"), (86_400, "24h"), (3601, "1h1s")] {
            assert_eq!(print(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn other_texts_are_no_durations() {
        for text in
            ["", "1", "h", "1d", "1h1h", "1s1m", "-1h", "+1h", "1.5h", " 1h", "1h ", "１h", "99999999999999999999h"]
        {
            assert!(parse(text, LIFETIMES).unwrap_err().contains("is no duration"), "{text}");
        }
    }

    #[test]
    fn a_lifetime_is_bounded_on_both_sides() {
        assert!(parse("8784h", LIFETIMES).is_ok());
        assert!(parse("8784h1s", LIFETIMES).unwrap_err().contains("between 1s and 8784h"));
        assert!(parse("0s", LIFETIMES).unwrap_err().contains("between 1s and 8784h"));
    }

    #[test]
    fn absent_ends_of_a_range_follow_the_given_ones() {
        let minutes = |m: u64| Duration::from_secs(m * 60);
        let some = |m| Some(minutes(m));
        for (given, (min, default, max)) in [
            ((None, None, None), (5, 60, 1440)),
            ((None, None, some(10)), (5, 10, 10)),
            ((None, some(1), None), (1, 1, 1440)),
            ((None, some(2880), None), (5, 2880, 2880)),
            ((some(120), None, None), (120, 120, 1440)),
        ] {
            let range = Range { min: minutes(min), default: minutes(default), max: minutes(max) };
            assert_eq!(Range::new(MIN_LIFETIME, given.0, given.1, given.2), Ok(range), "{given:?}");
        }
        let raised = Range { min: minutes(10), default: minutes(60), max: minutes(1440) };
        assert_eq!(Range::new(minutes(10), None, None, None), Ok(raised));
        assert_eq!(Range::new(MIN_LIFETIME, None, some(2), some(1)).unwrap_err().0, "default");
        assert_eq!(Range::new(MIN_LIFETIME, some(2), some(1), None).unwrap_err().0, "min");
        assert_eq!(Range::new(MIN_LIFETIME, some(2), None, some(1)).unwrap_err().0, "default");
    }
}
