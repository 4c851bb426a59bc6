//! Wall-clock time, the only place that reads it.
//!
//! Validity periods are wall-clock facts, so they are compared against [`Clock::now`]; timers run on tokio's monotonic
//! clock. [`Clock::paused`] follows tokio's paused time, so that a test of a day's renewals takes no time.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// A source of wall-clock time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Paused { start: SystemTime, at: Instant },
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that reads `start` now and then advances with tokio's (paused) time.
    pub fn paused(start: SystemTime) -> Self {
        Self(Source::Paused { start, at: Instant::now() })
    }

    /// The time of day.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    pub fn now(&self) -> SystemTime {
        match self.0 {
            Source::System => SystemTime::now(),
            Source::Paused { start, at } => start + at.elapsed(),
        }
    }

    /// How long until `when`; zero when it has passed.
    pub fn until(&self, when: SystemTime) -> Duration {
        when.duration_since(self.now()).unwrap_or_default()
    }
}
