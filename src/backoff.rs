//! How long to wait before trying again: exponential growth with equal jitter, never past a given moment.
//!
//! Pure: the caller counts its failures and brings the random numbers, so a seeded generator gives the same delays
//! again. Equal jitter (half fixed, half drawn) spreads callers that failed together and still keeps a minimum spacing
//! of half the first delay. Deliberately not here: sleeping, counting, and deciding whether an error is worth a retry.

use std::time::Duration;

use rand::Rng;

/// The longest delay that any backoff may use.
const MAX_DELAY: Duration = Duration::from_secs(3600);

/// Doublings after which the delay has outgrown [`MAX_DELAY`] whatever the first one was (2^42 ns is over an hour).
const MAX_DOUBLINGS: u32 = 42;

/// A retry schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    max: Duration,
}

impl Backoff {
    /// Doubles from `first` up to `max`.
    ///
    /// # Panics
    /// When `first` is zero, `max` is less than `first` or more than an hour; made for constants, where that is a
    /// compile error.
    pub const fn new(first: Duration, max: Duration) -> Self {
        assert!(!first.is_zero(), "a zero delay would retry without pause");
        assert!(first.as_nanos() <= max.as_nanos() && max.as_nanos() <= MAX_DELAY.as_nanos());
        Self { first, max }
    }

    /// The delay after `failures` in a row (0 and 1 are the same): between half and the whole of
    /// `min(max, first * 2^(failures - 1))`.
    pub fn delay(&self, failures: u32, random: &mut impl Rng) -> Duration {
        let doublings = failures.saturating_sub(1).min(MAX_DOUBLINGS);
        // At most an hour in nanoseconds (42 bits) times 2^42 fits in 128 bits; the minimum fits in 64.
        let whole = (self.first.as_nanos() << doublings).min(self.max.as_nanos()) as u64;
        Duration::from_nanos(random.random_range(whole / 2..=whole))
    }

    /// [`delay`](Self::delay), shortened so that the retry still comes before an end that is `left` away: at most half
    /// of `left`, so that tries grow denser towards the end, but not below the minimum spacing until less than that is
    /// left. When nothing is left there is no end to stay before, and the delay is the plain one.
    pub fn bounded_by(&self, left: Duration, failures: u32, random: &mut impl Rng) -> Duration {
        let delay = self.delay(failures, random);
        if left.is_zero() {
            return delay;
        }
        delay.min((left / 2).max(self.first / 2)).min(left)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));

    #[test]
    fn the_delay_doubles_up_to_the_maximum_and_is_at_least_half_of_it() {
        for (failures, whole_ms) in [
            (0, 200),
            (1, 200),
            (2, 400),
            (3, 800),
            (8, 25_600),
            (9, 30_000),
            (32, 30_000),
            (33, 30_000),
            (64, 30_000),
            (u32::MAX, 30_000),
        ] {
            let whole = Duration::from_millis(whole_ms);
            for seed in 0..50 {
                let delay = BACKOFF.delay(failures, &mut StdRng::seed_from_u64(seed));
                assert!((whole / 2..=whole).contains(&delay), "{failures} failures, seed {seed}: {delay:?}");
            }
        }
    }

    #[test]
    fn the_smallest_first_delay_reaches_the_largest_maximum() {
        let backoff = Backoff::new(Duration::from_nanos(1), MAX_DELAY);
        let delay = backoff.delay(MAX_DOUBLINGS + 1, &mut StdRng::seed_from_u64(1));
        assert!(delay >= MAX_DELAY / 2, "{delay:?}");
    }

    #[test]
    fn the_same_seed_gives_the_same_delays_and_another_seed_others() {
        let delays = |seed| {
            let mut random = StdRng::seed_from_u64(seed);
            [1, 2, 3].map(|failures| BACKOFF.delay(failures, &mut random))
        };
        assert_eq!(delays(7), delays(7));
        assert_ne!(delays(7), delays(8));
    }

    #[test]
    fn the_delay_is_bounded_by_what_is_left() {
        fn check(left_ms: u64, failures: u32, at_least_ms: u64, at_most_ms: u64) {
            for seed in 0..50 {
                let mut random = StdRng::seed_from_u64(seed);
                let delay = BACKOFF.bounded_by(Duration::from_millis(left_ms), failures, &mut random);
                let allowed = Duration::from_millis(at_least_ms)..=Duration::from_millis(at_most_ms);
                assert!(allowed.contains(&delay), "{left_ms} ms left, {failures} failures: {delay:?}");
            }
        }
        check(3_600_000, 20, 15_000, 30_000); // far away: no bound
        check(20_000, 20, 10_000, 10_000); // near: half of what is left
        check(201, 20, 100, 101);
        check(150, 20, 100, 100); // the minimum spacing
        check(100, 20, 100, 100);
        check(99, 20, 99, 99); // not even that much is left
        check(1, 1, 1, 1);
        check(0, 1, 100, 200); // nothing left: the plain delay
    }

    #[test]
    #[should_panic(expected = "without pause")]
    fn a_zero_first_delay_is_refused() {
        Backoff::new(Duration::ZERO, Duration::from_secs(1));
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn a_maximum_over_an_hour_is_refused() {
        Backoff::new(Duration::from_secs(1), MAX_DELAY + Duration::from_nanos(1));
    }

    proptest! {
        #[test]
        fn a_retry_never_comes_after_the_end(left in 1u64..u64::MAX, failures: u32, seed: u64) {
            let left = Duration::from_nanos(left);
            prop_assert!(BACKOFF.bounded_by(left, failures, &mut StdRng::seed_from_u64(seed)) <= left);
        }
    }
}
