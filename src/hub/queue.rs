//! Who may go to a signer next: one order for all that wait, one token bucket for the signers, one for each principal.

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

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

/// The order of flights that wait: whoever is waiting for an answer first, then renewals by the end of what they renew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// A caller waits for it.
    AskedNow,
    /// A renewal of a certificate that ends then.
    Renewal(SystemTime),
}

/// Flights that wait for a token, best first, in order of arrival among equals.
pub(super) struct Queue {
    waiting: BTreeMap<(Turn, u64), u128>,
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

    /// Puts `id` behind those with the same turn; returns its rank among them.
    pub(super) fn push(&mut self, turn: Turn, id: u128) -> u64 {
        self.arrivals += 1;
        self.waiting.insert((turn, self.arrivals), id);
        self.arrivals
    }

    pub(super) fn remove(&mut self, turn: Turn, rank: u64) {
        self.waiting.remove(&(turn, rank));
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
