//! Token buckets: one, or one for each key. They follow tokio's clock, so that a test of a rate takes no time.

use std::{fmt, hash::Hash, num::NonZeroU32, time::Duration};

use governor::{
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed, keyed::HashMapStateStore},
};
use tokio::time::Instant;

/// Keys remembered before those with full buckets are dropped.
const SWEEP_ABOVE: usize = 1024;

/// So many a second, so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens that come back each second.
    pub per_second: NonZeroU32,
    /// Tokens that may be spent at once.
    pub burst: NonZeroU32,
}

/// One bucket.
pub struct Bucket(RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<Since>>);

/// One bucket for each key.
pub struct Buckets<K: Clone + Hash + Eq>(RateLimiter<K, HashMapStateStore<K>, TokioClock, NoOpMiddleware<Since>>);

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate) -> Self {
        Self(RateLimiter::direct_with_clock(rate.quota(), TokioClock::new()))
    }

    /// Spends one token, or says how long until there is one.
    pub fn check(&self) -> Result<(), Duration> {
        self.0.check().map_err(|not_yet| not_yet.wait_time_from(self.0.clock().now()))
    }
}

impl<K: Clone + Hash + Eq> Buckets<K> {
    /// Full ones.
    pub fn new(rate: Rate) -> Self {
        Self(RateLimiter::hashmap_with_clock(rate.quota(), TokioClock::new()))
    }

    /// Spends one token of `key`, or says how long until there is one.
    pub fn check(&self, key: &K) -> Result<(), Duration> {
        if self.0.len() > SWEEP_ABOVE {
            self.0.retain_recent();
        }
        self.0.check_key(key).map_err(|not_yet| not_yet.wait_time_from(self.0.clock().now()))
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket").finish_non_exhaustive()
    }
}

impl<K: Clone + Hash + Eq> fmt::Debug for Buckets<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buckets").field("keys", &self.0.len()).finish()
    }
}

impl Rate {
    fn quota(self) -> Quota {
        Quota::per_second(self.per_second).allow_burst(self.burst)
    }
}

/// tokio's clock for governor.
#[derive(Clone, Copy, Debug)]
struct TokioClock(Instant);

/// Time since the limiter was made.
type Since = Duration;

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
