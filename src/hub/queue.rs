//! Who may go to a signer next: one order for all that wait, one token bucket for the signers, one for each principal.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime},
};

use super::MAX_FLIGHTS_PER_PRINCIPAL;
use crate::{
    account::Principal,
    rate::{Bucket, Rate},
};

/// The order of flights that wait: whoever is waiting for an answer first, then renewals by the end of what they renew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// A caller waits for it.
    AskedNow,
    /// A renewal of a certificate that ends then.
    Renewal(SystemTime),
}

/// Flights that wait for a token: the best turn first, and among equal turns the principal that was served longest ago,
/// so that one principal's hundred requests do not stand before another's one.
pub(super) struct Queue {
    lines: HashMap<Principal, Line>,
    counter: u64,
    bucket: Bucket,
}

/// One principal's flights.
#[derive(Default)]
struct Line {
    /// In order of arrival among equal turns.
    waiting: BTreeMap<(Turn, u64), u128>,
    under_way: usize,
    served: u64,
}

impl Queue {
    pub(super) fn new(rate: Rate) -> Self {
        Self { lines: HashMap::new(), counter: 0, bucket: Bucket::new(rate) }
    }

    /// Puts `id` behind those of its principal with the same turn; returns its rank among them.
    pub(super) fn push(&mut self, principal: Principal, turn: Turn, id: u128) -> u64 {
        self.counter += 1;
        self.lines.entry(principal).or_default().waiting.insert((turn, self.counter), id);
        self.counter
    }

    pub(super) fn remove(&mut self, principal: Principal, turn: Turn, rank: u64) {
        if let Some(line) = self.lines.get_mut(&principal) {
            line.waiting.remove(&(turn, rank));
        }
        self.sweep(principal);
    }

    /// The best of those that may fly now if there is a token for it, else how long until there is one.
    pub(super) fn pop(&mut self) -> Result<Option<u128>, Duration> {
        let may_fly = self.lines.values_mut().filter(|line| line.under_way < MAX_FLIGHTS_PER_PRINCIPAL);
        let next = may_fly.filter_map(|line| Some((line.waiting.first_key_value()?.0.0, line)));
        let Some((_, line)) = next.min_by_key(|(turn, line)| (*turn, line.served)) else { return Ok(None) };
        self.bucket.check()?;
        self.counter += 1;
        line.served = self.counter;
        line.under_way += 1;
        Ok(line.waiting.pop_first().map(|(_, id)| id))
    }

    /// A flight of `principal` has ended.
    pub(super) fn landed(&mut self, principal: Principal) {
        if let Some(line) = self.lines.get_mut(&principal) {
            line.under_way -= 1;
        }
        self.sweep(principal);
    }

    /// Whether nothing waits or flies.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    fn sweep(&mut self, principal: Principal) {
        if self.lines.get(&principal).is_some_and(|line| line.waiting.is_empty() && line.under_way == 0) {
            self.lines.remove(&principal);
        }
    }
}
