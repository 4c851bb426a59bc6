//! How often a principal may make the agent do something. A bucket for each principal and pace, and one for all lines of
//! the log.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{Limits, Principal};

/// Log lines a second that callers can cause, in the long run, all together.
pub const LINES_PER_SECOND: u32 = 40;
/// Connections that are set up a second, in the long run, of all principals that do not ask for few: a setup takes some
/// 0.2 ms.
const CONNECTS_PER_SECOND: u32 = 1000;
/// Connections that are set up at once.
const CONNECTS_BURST: u32 = 1000;
/// Log lines at once that callers can cause.
const LINES_BURST: u32 = 40;
/// Principals remembered for one pace, at least, before those that owe nothing are dropped.
const SWEEP_ABOVE: usize = 1024;

/// What is paced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// New connections.
    Connects,
    /// New connections of a principal that asks for few: it is served where many ask for more than there is.
    FewConnects,
    /// Answers that refuse, which cost the agent and its log as much as others.
    Refusals,
    /// Lines of the log.
    Lines,
    /// Looks at a policy for `WhoAmI`, which looks at all of them.
    Views,
}

impl Pace {
    const ALL: [Self; 5] = [Self::Connects, Self::FewConnects, Self::Refusals, Self::Lines, Self::Views];

    /// So many a second, so many at once.
    fn rate(self, limits: &Limits) -> (u32, u32) {
        match self {
            Self::Connects => (200, 1000),
            Self::FewConnects => (25, 5),
            Self::Refusals => (20, limits.refusals_burst),
            Self::Lines => (2, 10),
            Self::Views => (2000, 4000),
        }
    }
}

/// Every principal's buckets.
pub(super) struct Paces([Buckets<Principal>; Pace::ALL.len()]);

impl Paces {
    pub(super) fn new(limits: &Limits) -> Self {
        Self(Pace::ALL.map(|pace| Buckets::new(pace.rate(limits))))
    }

    pub(super) fn wait(&self, pace: Pace, principal: Principal, cost: usize) -> Duration {
        self.0[pace as usize].wait(principal, cost)
    }

    pub(super) fn spend(&mut self, pace: Pace, principal: Principal, cost: usize) {
        self.0[pace as usize].spend(principal, cost);
    }

    #[cfg(test)]
    pub(super) fn remembered(&self, pace: Pace) -> usize {
        self.0[pace as usize].left.len()
    }
}

/// Connections of all principals: so many are set up a second, and beyond that only those of principals that ask for few.
pub(super) struct Connects {
    all: Buckets<()>,
}

impl Connects {
    pub(super) fn new() -> Self {
        Self { all: Buckets::new((CONNECTS_PER_SECOND, CONNECTS_BURST)) }
    }

    /// Whether one of `principal` is set up. Each try is counted, so that one that tries without end is no principal that
    /// asks for few.
    pub(super) fn next(&mut self, paces: &mut Paces, principal: Principal) -> bool {
        let asks_for_few = paces.wait(Pace::FewConnects, principal, 1).is_zero();
        paces.spend(Pace::FewConnects, principal, 1);
        if !paces.wait(Pace::Connects, principal, 1).is_zero() || !(asks_for_few || self.all.wait((), 1).is_zero()) {
            return false;
        }
        paces.spend(Pace::Connects, principal, 1);
        self.all.spend((), 1);
        true
    }
}

/// A line of the log that may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// How many were left out since the last one that was written, of all principals; `None` for none.
    pub left_out: Option<u64>,
}

/// The log: which lines that callers cause are written.
pub(super) struct Lines {
    all: Buckets<()>,
    left_out: u64,
}

impl Lines {
    pub(super) fn new() -> Self {
        Self { all: Buckets::new((LINES_PER_SECOND, LINES_BURST)), left_out: 0 }
    }

    /// A line of `principal`, if it may be written.
    pub(super) fn next(&mut self, paces: &mut Paces, principal: Principal) -> Option<Line> {
        if !paces.wait(Pace::Lines, principal, 1).is_zero() || !self.all.wait((), 1).is_zero() {
            self.left_out += 1;
            return None;
        }
        paces.spend(Pace::Lines, principal, 1);
        self.all.spend((), 1);
        let left_out = std::mem::take(&mut self.left_out);
        Some(Line { left_out: (left_out > 0).then_some(left_out) })
    }
}

/// One token bucket for each key; one that is full is forgotten.
struct Buckets<K> {
    per_second: f64,
    burst: f64,
    left: HashMap<K, (f64, Instant)>,
    sweep_above: usize,
}

impl<K: std::hash::Hash + Eq> Buckets<K> {
    fn new((per_second, burst): (u32, u32)) -> Self {
        Self { per_second: per_second.into(), burst: burst.into(), left: HashMap::new(), sweep_above: SWEEP_ABOVE }
    }

    /// How long until there is `cost`, or all that a bucket can hold.
    fn wait(&self, key: K, cost: usize) -> Duration {
        let wanted = (cost as f64).min(self.burst);
        Duration::from_secs_f64((wanted - self.left(&key)).max(0.0) / self.per_second)
    }

    fn spend(&mut self, key: K, cost: usize) {
        if self.left.len() > self.sweep_above {
            let full = (self.per_second, self.burst);
            self.left.retain(|_, bucket| left(*bucket, full) < full.1);
            self.sweep_above = SWEEP_ABOVE.max(2 * self.left.len());
        }
        let now = (self.left(&key) - cost as f64).max(0.0);
        self.left.insert(key, (now, Instant::now()));
    }

    fn left(&self, key: &K) -> f64 {
        self.left.get(key).map_or(self.burst, |bucket| left(*bucket, (self.per_second, self.burst)))
    }
}

/// What a bucket holds now.
fn left((then, at): (f64, Instant), (per_second, burst): (f64, f64)) -> f64 {
    (then + at.elapsed().as_secs_f64() * per_second).min(burst)
}
