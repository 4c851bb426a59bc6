//! How much of the server one principal may hold: connections and open streams, counted while they last.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

/// Connections of all principals, by default: with one file descriptor each, well below what the service may open.
const MAX_CONNECTIONS: usize = 8192;
/// Connections of one principal, by default: a quarter, so that one user cannot shut the others out.
const MAX_CONNECTIONS_PER_PRINCIPAL: usize = MAX_CONNECTIONS / 4;
/// Calls of one principal under way, open streams among them, by default.
const MAX_CALLS_PER_PRINCIPAL: usize = 4096;
/// Requests of one principal that are arriving, by default: together at most 64 MiB.
const MAX_ARRIVING_PER_PRINCIPAL: usize = 256;

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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            connections_per_principal: MAX_CONNECTIONS_PER_PRINCIPAL,
            streams_per_principal: MAX_CALLS_PER_PRINCIPAL,
            arriving_per_principal: MAX_ARRIVING_PER_PRINCIPAL,
        }
    }
}

/// Counts what is held; clones share the counts.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    limits: Limits,
    held: Arc<Mutex<HashMap<(Kind, u64), usize>>>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    AllConnections,
    Connections,
    Streams,
    Arriving,
}

/// One place that is held until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    tally: Tally,
    keys: Vec<(Kind, u64)>,
}

impl Tally {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, held: Arc::default() }
    }

    /// The bounds.
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A place for a connection; `None` when all, or all of this principal's, are taken.
    pub(super) fn connection(&self, principal: u64) -> Option<Place> {
        self.take(&[
            (Kind::AllConnections, 0, self.limits.connections),
            (Kind::Connections, principal, self.limits.connections_per_principal),
        ])
    }

    /// A place for a call, which may be a stream; `None` when all of this principal's are taken.
    pub(super) fn stream(&self, principal: u64) -> Option<Place> {
        self.take(&[(Kind::Streams, principal, self.limits.streams_per_principal)])
    }

    /// A place for a request that arrives; `None` when all of this principal's are taken.
    pub(super) fn arriving(&self, principal: u64) -> Option<Place> {
        self.take(&[(Kind::Arriving, principal, self.limits.arriving_per_principal)])
    }

    fn take(&self, wanted: &[(Kind, u64, usize)]) -> Option<Place> {
        let mut held = self.lock();
        if wanted.iter().any(|(kind, who, max)| held.get(&(*kind, *who)).is_some_and(|count| count >= max)) {
            return None;
        }
        let keys: Vec<_> = wanted.iter().map(|(kind, who, _)| (*kind, *who)).collect();
        keys.iter().for_each(|key| *held.entry(*key).or_default() += 1);
        Some(Place { tally: self.clone(), keys })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Kind, u64), usize>> {
        self.held.lock().expect("no code panics while it counts")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.tally.lock();
        for key in &self.keys {
            if let Some(count) = held.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    held.remove(key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_up_to_each_bound_and_come_back_when_dropped() {
        let limits = Limits {
            connections: 3,
            connections_per_principal: 2,
            streams_per_principal: 1,
            arriving_per_principal: 1,
        };
        let tally = Tally::new(limits);
        let first = tally.connection(1).expect("the first of two");
        let second = tally.connection(1).expect("the second of two");
        assert!(tally.connection(1).is_none(), "one past the principal's bound");
        let third = tally.connection(2).expect("the third of three");
        assert!(tally.connection(3).is_none(), "one past the bound for all");
        drop(first);
        assert!(tally.connection(3).is_some());
        let stream = tally.stream(1).expect("the only one");
        assert!(tally.stream(1).is_none(), "one past the bound on streams");
        assert!(tally.stream(2).is_some(), "another principal has its own");
        let arriving = tally.arriving(1).expect("the only one");
        assert!(tally.arriving(1).is_none(), "one past the bound on requests that arrive");
        drop((second, third, stream, arriving));
        assert!(tally.lock().is_empty(), "nothing is remembered of those that left");
    }
}
