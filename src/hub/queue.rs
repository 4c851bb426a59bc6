//! Who may go to a signer next: priorities, one token bucket for the signers, one for each principal.

use std::{collections::BTreeMap, num::NonZeroU32, time::Duration};

use governor::{
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed, keyed::HashMapStateStore},
};
use tokio::time::Instant;

/// A token bucket: so many a second, so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens that come back each second.
    pub per_second: NonZeroU32,
    /// Tokens that may be spent at once.
    pub burst: NonZeroU32,
}

/// Order of flights that wait: whoever is waiting for an answer goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Priority {
    /// A caller waits for it.
    AskedNow,
    /// A renewal that has failed before, or was cut short by policy.
    Urgent,
    /// A renewal at its time.
    Routine,
}

/// Flights that wait for a token, best first, in order of arrival within a priority.
pub(super) struct Queue {
    waiting: BTreeMap<(Priority, u64), u128>,
    arrivals: u64,
    bucket: RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<Since>>,
    clock: TokioClock,
}

impl Queue {
    pub(super) fn new(rate: Rate) -> Self {
        let clock = TokioClock::new();
        Self {
            waiting: BTreeMap::new(),
            arrivals: 0,
            bucket: RateLimiter::direct_with_clock(rate.quota(), clock),
            clock,
        }
    }

    /// Puts `id` at the end of its priority; returns its rank there.
    pub(super) fn push(&mut self, priority: Priority, id: u128) -> u64 {
        self.arrivals += 1;
        self.waiting.insert((priority, self.arrivals), id);
        self.arrivals
    }

    pub(super) fn remove(&mut self, priority: Priority, rank: u64) {
        self.waiting.remove(&(priority, rank));
    }

    /// The best of those that wait if there is a token for it, else how long until there is one.
    pub(super) fn pop(&mut self) -> Result<Option<u128>, Duration> {
        let Some(first) = self.waiting.first_entry() else { return Ok(None) };
        match self.bucket.check() {
            Ok(()) => Ok(Some(first.remove())),
            Err(not_yet) => Err(not_yet.wait_time_from(self.clock.now())),
        }
    }
}

/// One bucket for each principal.
pub(super) type KeyedLimiter = RateLimiter<u64, HashMapStateStore<u64>, TokioClock, NoOpMiddleware<Since>>;

pub(super) fn keyed_limiter(rate: Rate) -> KeyedLimiter {
    RateLimiter::hashmap_with_clock(rate.quota(), TokioClock::new())
}

/// Spends one token of `principal`, or says how long until there is one.
pub(super) fn check(limiter: &KeyedLimiter, principal: u64) -> Result<(), Duration> {
    /// Principals remembered before those with full buckets are dropped.
    const SWEEP_ABOVE: usize = 1024;
    if limiter.len() > SWEEP_ABOVE {
        limiter.retain_recent();
    }
    limiter.check_key(&principal).map_err(|not_yet| not_yet.wait_time_from(limiter.clock().now()))
}

impl Rate {
    fn quota(self) -> Quota {
        Quota::per_second(self.per_second).allow_burst(self.burst)
    }
}

/// tokio's clock for governor, so that limits follow paused time in tests.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokioClock(Instant);

/// Time since the limiter was made.
pub(super) type Since = Duration;

impl TokioClock {
    fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for TokioClock {
    type Instant = Since;

    fn now(&self) -> Since {
        self.0.elapsed()
    }
}
