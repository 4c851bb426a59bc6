//! How much of the server one principal may hold: connections and calls, counted while they last, and refusals, which
//! cost the agent and its log as much as answers do.
//!
//! Connections are shared as evenly as they are asked for: when all are taken, whoever holds fewer than the largest holder
//! takes one from it. So no user shuts another out, whatever it holds.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Descriptors that a connection takes: the socket, the process, and its folder under `/proc`.
const DESCRIPTORS_PER_CONNECTION: usize = 3;
/// Descriptors that are kept for files, among them those by which callers are attested and policies read.
const RESERVED_DESCRIPTORS: usize = 512;
/// Connections of all principals, however many descriptors there are.
const MAX_CONNECTIONS: usize = 32_768;
/// Calls of one principal under way, open streams among them, by default.
const MAX_CALLS_PER_PRINCIPAL: usize = 4096;
/// Requests of one principal that are arriving, by default: together at most 64 MiB.
const MAX_ARRIVING_PER_PRINCIPAL: usize = 256;
/// Refusals of one principal at once, by default, before its calls have to wait.
const REFUSALS_BURST: u32 = 400;
/// Refusals of one principal a second, in the long run.
const REFUSALS_PER_SECOND: u32 = 20;

/// Bounds for one principal and for all together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections of all principals.
    pub connections: usize,
    /// Connections of one principal.
    pub connections_per_principal: usize,
    /// Calls of one principal under way: open streams, and short calls until they are answered.
    pub streams_per_principal: usize,
    /// Requests of one principal whose message is not there yet, each of which may hold
    /// [`MAX_REQUEST_BYTES`](super::MAX_REQUEST_BYTES).
    pub arriving_per_principal: usize,
    /// Refused calls of one principal before the next have to wait.
    pub refusals_burst: u32,
}

impl Limits {
    /// The bounds of an agent that may have `descriptors` open: connections leave room for what serves them, and one
    /// principal may hold a quarter.
    pub fn for_descriptors(descriptors: usize) -> Self {
        let connections = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS_PER_CONNECTION;
        let connections = connections.clamp(1, MAX_CONNECTIONS);
        Self {
            connections,
            connections_per_principal: connections.div_ceil(4),
            streams_per_principal: MAX_CALLS_PER_PRINCIPAL,
            arriving_per_principal: MAX_ARRIVING_PER_PRINCIPAL,
            refusals_burst: REFUSALS_BURST,
        }
    }
}

/// The bounds where 65536 descriptors may be open, as the systemd unit allows.
impl Default for Limits {
    fn default() -> Self {
        Self::for_descriptors(65_536)
    }
}

/// Counts what is held; clones share the counts.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    limits: Limits,
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    calls: HashMap<(Kind, u64), usize>,
    /// Each principal's connections, the oldest first.
    connections: HashMap<u64, VecDeque<(u64, CancellationToken)>>,
    connected: usize,
    counter: u64,
    refusals: HashMap<u64, Refusals>,
}

/// What is counted of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Streams,
    Arriving,
}

/// How many refusals a principal has left, as of a moment.
#[derive(Clone, Copy, Debug)]
struct Refusals {
    left: f64,
    at: Instant,
}

/// One place that is held until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    tally: Tally,
    key: (Kind, u64),
}

/// A connection's place; it has to be given up when another principal needs it more.
#[derive(Debug)]
pub(super) struct Seat {
    tally: Tally,
    principal: u64,
    number: u64,
    taken: CancellationToken,
}

impl Tally {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, held: Arc::default() }
    }

    /// The bounds.
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A place for a connection; `None` when the principal has all it may have, or all are taken and none holds more.
    pub(super) fn connection(&self, principal: u64) -> Option<Seat> {
        let mut held = self.lock();
        let held = &mut *held;
        let own = held.connections.get(&principal).map_or(0, VecDeque::len);
        if own >= self.limits.connections_per_principal {
            return None;
        }
        if held.connected >= self.limits.connections {
            let largest = held.connections.values_mut().max_by_key(|connections| connections.len())?;
            if largest.len() <= own + 1 {
                return None;
            }
            let (_, oldest) = largest.pop_front()?;
            oldest.cancel();
            held.connected -= 1;
        }
        held.counter += 1;
        held.connected += 1;
        let (number, taken) = (held.counter, CancellationToken::new());
        held.connections.entry(principal).or_default().push_back((number, taken.clone()));
        Some(Seat { tally: self.clone(), principal, number, taken })
    }

    /// A place for a call, which may be a stream; `None` when all of this principal's are taken.
    pub(super) fn stream(&self, principal: u64) -> Option<Place> {
        self.take((Kind::Streams, principal), self.limits.streams_per_principal)
    }

    /// A place for a request that arrives; `None` when all of this principal's are taken.
    pub(super) fn arriving(&self, principal: u64) -> Option<Place> {
        self.take((Kind::Arriving, principal), self.limits.arriving_per_principal)
    }

    /// Counts a refusal of `principal`.
    pub(super) fn refused(&self, principal: u64) {
        /// Principals remembered before those that owe nothing are dropped.
        const SWEEP_ABOVE: usize = 1024;
        let (mut held, full) = (self.lock(), f64::from(self.limits.refusals_burst));
        if held.refusals.len() > SWEEP_ABOVE {
            held.refusals.retain(|_, refusals| refusals.now(full) < full);
        }
        let new = Refusals { left: full, at: Instant::now() };
        let refusals = held.refusals.entry(principal).or_insert(new);
        *refusals = Refusals { left: (refusals.now(full) - 1.0).max(0.0), at: Instant::now() };
    }

    /// How long the next call of `principal` has to wait for its refusals; zero for most.
    pub(super) fn wait(&self, principal: u64) -> Duration {
        let full = f64::from(self.limits.refusals_burst);
        let left = self.lock().refusals.get(&principal).map_or(full, |refusals| refusals.now(full));
        Duration::from_secs_f64((1.0 - left).max(0.0) / f64::from(REFUSALS_PER_SECOND))
    }

    fn take(&self, key: (Kind, u64), max: usize) -> Option<Place> {
        let mut held = self.lock();
        let count = held.calls.entry(key).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        Some(Place { tally: self.clone(), key })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no code panics while it counts")
    }
}

impl Refusals {
    /// How many are left now, of at most `full`.
    fn now(&self, full: f64) -> f64 {
        (self.left + self.at.elapsed().as_secs_f64() * f64::from(REFUSALS_PER_SECOND)).min(full)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.tally.lock();
        if let Some(count) = held.calls.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                held.calls.remove(&self.key);
            }
        }
    }
}

impl Seat {
    /// Ends when the place is needed for somebody else.
    pub(super) async fn taken(&self) {
        self.taken.cancelled().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut held = self.tally.lock();
        let Some(connections) = held.connections.get_mut(&self.principal) else { return };
        let before = connections.len();
        connections.retain(|(number, _)| *number != self.number);
        let (now, empty) = (connections.len(), connections.is_empty());
        if empty {
            held.connections.remove(&self.principal);
        }
        held.connected -= before - now;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn limits() -> Limits {
        Limits {
            connections: 3,
            connections_per_principal: 3,
            streams_per_principal: 1,
            arriving_per_principal: 1,
            refusals_burst: 2,
        }
    }

    #[test]
    fn places_are_given_up_to_each_bound_and_come_back_when_dropped() {
        let tally = Tally::new(Limits { connections_per_principal: 2, ..limits() });
        let first = tally.connection(1).expect("the first of two");
        let second = tally.connection(1).expect("the second of two");
        assert!(tally.connection(1).is_none(), "one past the principal's bound");
        drop(first);
        let third = tally.connection(1).expect("one came back");
        let stream = tally.stream(1).expect("the only one");
        assert!(tally.stream(1).is_none(), "one past the bound on streams");
        assert!(tally.stream(2).is_some(), "another principal has its own");
        let arriving = tally.arriving(1).expect("the only one");
        assert!(tally.arriving(1).is_none(), "one past the bound on requests that arrive");
        drop((second, third, stream, arriving));
        let held = tally.lock();
        assert!(held.calls.is_empty() && held.connections.is_empty(), "nothing is remembered of those that left");
        assert_eq!(held.connected, 0);
    }

    #[test]
    fn when_all_connections_are_taken_the_largest_holder_gives_up_its_oldest() {
        let tally = Tally::new(limits());
        let greedy: Vec<_> = (0..3).map(|_| tally.connection(1).expect("there is room")).collect();
        let newcomer = tally.connection(2).expect("one of another's three");
        assert!(greedy[0].taken().now_or_never().is_some(), "the oldest");
        assert!(greedy[1].taken().now_or_never().is_none());
        assert!(tally.connection(2).is_none(), "two and one is as even as three can be");
        assert!(tally.connection(1).is_none(), "the largest holder takes nothing back");
        assert!(newcomer.taken().now_or_never().is_none());
        drop(greedy);
        assert_eq!(tally.lock().connected, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_refused_too_often_has_to_wait_and_nobody_else_has() {
        let tally = Tally::new(limits());
        for _ in 0..2 {
            assert_eq!(tally.wait(1), Duration::ZERO);
            tally.refused(1);
        }
        let wait = tally.wait(1);
        assert_eq!(wait, Duration::from_millis(50), "a twentieth of a second for one more");
        assert_eq!(tally.wait(2), Duration::ZERO);
        tokio::time::sleep(wait).await;
        assert_eq!(tally.wait(1), Duration::ZERO);
    }

    #[test]
    fn connections_leave_room_for_the_files_that_serve_them() {
        for (descriptors, connections) in [(0, 1), (512, 1), (1024, 170), (20_000, 6496), (1 << 20, MAX_CONNECTIONS)] {
            let limits = Limits::for_descriptors(descriptors);
            assert_eq!(limits.connections, connections, "{descriptors}");
            assert!(limits.connections_per_principal >= connections / 4 && limits.connections_per_principal > 0);
        }
    }
}
