//! Which flight goes to a signer next: principals take turns, and urgency orders what one principal has.
//!
//! Each principal has one line, and callers who wait for an answer stand before its renewals. The next turn belongs to the
//! principal that was served longest ago, or joined longest ago if it was not served since: so a flight waits for one turn
//! of each principal before it, however much that principal asks for. A renewal *presses* once it has waited for
//! [`PRESSING_AFTER`] of the time that it had; then it goes before whatever its own principal asks for, and its line is in
//! a lane of its own. When both lanes wait, they alternate: no number of pressing renewals takes more than half of the
//! tokens from callers, and no number of callers more than half from pressing renewals. With `P` principals before it and
//! `R` tokens a second, a flight at the head of its line therefore goes within `2 * P / R` seconds.
//!
//! Tokens: one bucket for all, and for each principal one of [`PRINCIPAL_SHARE`] of it, so that one principal never
//! empties the bucket that all share. Places: [`MAX_FLIGHTS`] under way, [`MAX_FLIGHTS_PER_PRINCIPAL`] of one principal,
//! and the last [`FIRST_PLACES`] only for principals that have none under way.
//!
//! Deliberately not here: how often a principal may ask at all (`Hub::admit`), and any memory of principals that neither
//! wait nor fly. Lines number no more than the hub's entries.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use super::{FIRST_PLACES, FLIGHT_TIMEOUT, MAX_FLIGHTS, MAX_FLIGHTS_PER_PRINCIPAL};
use crate::{
    account::Principal,
    rate::{Bucket, Buckets, Rate},
};

/// The part of the time from when a renewal is due to the end of what it renews, after which it presses. The other half
/// has room for its turn among other pressing renewals and for a retry.
pub(super) const PRESSING_AFTER: f64 = 0.5;
/// The part of the whole rate and burst that one principal may use, its renewals included: one in so many, but one token
/// at least.
pub(super) const PRINCIPAL_SHARE: u32 = 2;
/// Turns that pass at most for each principal that waits before another: its own, and one of the other lane.
const LANES: u32 = 2;

/// The order of flights within one principal's line, while no renewal presses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// A caller waits for it.
    AskedNow,
    /// A renewal, which presses from then on.
    Renewal(SystemTime),
}

/// Flights that wait for a token and a place.
pub(super) struct Queue {
    lines: HashMap<Principal, Line>,
    /// Lines whose head is in no hurry.
    ordinary: Lane,
    /// Lines with a renewal that presses.
    pressing: Lane,
    /// When the first renewal of an ordinary line begins to press.
    presses: BTreeSet<(SystemTime, Principal)>,
    /// Lines that have used up their principal's share, by when there is a token again.
    resting: BTreeSet<(Instant, Principal)>,
    /// The last turn was one of the pressing lane.
    pressed_last: bool,
    under_way: usize,
    /// Renewals that wait.
    renewals: usize,
    counter: u64,
    rate: Rate,
    all: Bucket,
    shares: Buckets<Principal>,
}

/// One principal's flights.
#[derive(Default)]
struct Line {
    /// In order of arrival among equal turns.
    waiting: BTreeMap<(Turn, u64), u128>,
    under_way: usize,
    /// When it was served last, or joined: the least goes next.
    served: u64,
    stands: Stands,
    /// A token of its share is spent on its next flight.
    paid: bool,
}

/// Where a line stands, so that it can be taken out again.
#[derive(Clone, Copy, Debug, Default)]
enum Stands {
    /// It has nothing that waits, or as many flights under way as it may.
    #[default]
    Aside,
    /// Its first renewal, if it has one, presses from then on.
    Ordinary(Option<SystemTime>),
    Pressing,
    Resting(Instant),
}

/// Principals by when they were served last.
#[derive(Default)]
struct Lane {
    /// Those with no flight under way, who alone may take the last places.
    first: BTreeMap<u64, Principal>,
    more: BTreeMap<u64, Principal>,
}

impl Queue {
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            lines: HashMap::new(),
            ordinary: Lane::default(),
            pressing: Lane::default(),
            presses: BTreeSet::new(),
            resting: BTreeSet::new(),
            pressed_last: false,
            under_way: 0,
            renewals: 0,
            counter: 0,
            rate,
            all: Bucket::new(rate),
            shares: Buckets::new(share(rate)),
        }
    }

    /// Puts `id` behind those of its principal with the same turn; returns its rank among them.
    pub(super) fn push(&mut self, principal: Principal, turn: Turn, id: u128) -> u64 {
        self.counter += 1;
        let joined = self.counter;
        let line = self.lines.entry(principal).or_insert_with(|| Line { served: joined, ..Line::default() });
        line.waiting.insert((turn, joined), id);
        self.renewals += usize::from(turn != Turn::AskedNow);
        self.settle(principal);
        joined
    }

    pub(super) fn remove(&mut self, principal: Principal, turn: Turn, rank: u64) {
        let Some(line) = self.lines.get_mut(&principal) else { return };
        if line.waiting.remove(&(turn, rank)).is_some() {
            self.renewals -= usize::from(turn != Turn::AskedNow);
            self.settle(principal);
        }
    }

    /// The flight whose turn it is, if there are a place and a token for it; else how long until there is a token, or
    /// `None` when nothing waits that a token would help.
    pub(super) fn pop(&mut self, now: SystemTime) -> Result<Option<u128>, Duration> {
        self.advance(now);
        while let Some((principal, pressing)) = self.next() {
            let line = self.lines.get_mut(&principal).expect("only lines that are held stand in a lane");
            if !line.paid {
                if let Err(wait) = self.shares.check(&principal) {
                    self.rest(principal, Instant::now() + wait);
                    continue;
                }
                line.paid = true;
            }
            self.all.check()?;
            return Ok(self.serve(principal, pressing));
        }
        match self.resting.first() {
            Some((until, _)) if self.under_way < MAX_FLIGHTS => Err(until.saturating_duration_since(Instant::now())),
            _ => Ok(None),
        }
    }

    /// A flight of `principal` has ended.
    pub(super) fn landed(&mut self, principal: Principal) {
        self.under_way -= 1;
        if let Some(line) = self.lines.get_mut(&principal) {
            line.under_way -= 1;
        }
        self.settle(principal);
    }

    /// How long a flight that waits has to wait at most, though others ask without pause: for the tokens of those before
    /// it, and for one place if its principal may take none now.
    pub(super) fn at_most(&self, principal: Principal, turn: Turn, rank: u64) -> Duration {
        let Some(line) = self.lines.get(&principal) else { return Duration::ZERO };
        let before = line.waiting.range(..(turn, rank)).count();
        let tokens = u32::try_from((before + 1).saturating_mul(self.lines.len())).unwrap_or(u32::MAX);
        let tokens = Duration::from_secs(tokens.saturating_mul(LANES).into()) / self.rate.per_second.get();
        tokens + if self.has_place_for(line) { Duration::ZERO } else { FLIGHT_TIMEOUT }
    }

    /// Renewals that wait.
    pub(super) fn renewals(&self) -> usize {
        self.renewals
    }

    /// Whether nothing waits or flies.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.presses.is_empty() && self.resting.is_empty() && self.renewals == 0
    }

    /// Takes in what has become so by `now`: renewals that press, and lines that have rested.
    fn advance(&mut self, now: SystemTime) {
        while let Some(&(until, principal)) = self.resting.first() {
            if until > Instant::now() {
                break;
            }
            self.settle(principal);
        }
        while let Some(&(from, principal)) = self.presses.first() {
            if from > now {
                break;
            }
            self.take_out(principal);
            if let Some(line) = self.lines.get_mut(&principal) {
                line.stands = Stands::Pressing;
                self.pressing.add(principal, line);
            }
        }
    }

    /// Whose turn it is, and whether that is one of the pressing lane.
    fn next(&self) -> Option<(Principal, bool)> {
        let ordinary = self.ordinary.next(self.under_way).map(|principal| (principal, false));
        let pressing = self.pressing.next(self.under_way).map(|principal| (principal, true));
        if self.pressed_last { ordinary.or(pressing) } else { pressing.or(ordinary) }
    }

    fn has_place_for(&self, line: &Line) -> bool {
        let places = if line.under_way == 0 { MAX_FLIGHTS } else { MAX_FLIGHTS - FIRST_PLACES };
        self.under_way < places && line.under_way < MAX_FLIGHTS_PER_PRINCIPAL
    }

    fn serve(&mut self, principal: Principal, pressing: bool) -> Option<u128> {
        self.counter += 1;
        self.pressed_last = pressing;
        // Out before it changes: a lane finds it by when it was served.
        self.take_out(principal);
        let line = self.lines.get_mut(&principal)?;
        let head = if pressing { line.first_renewal() } else { line.waiting.keys().next().copied() }?;
        let id = line.waiting.remove(&head)?;
        (line.served, line.paid) = (self.counter, false);
        line.under_way += 1;
        self.under_way += 1;
        self.renewals -= usize::from(head.0 != Turn::AskedNow);
        self.settle(principal);
        Some(id)
    }

    fn rest(&mut self, principal: Principal, until: Instant) {
        self.take_out(principal);
        if let Some(line) = self.lines.get_mut(&principal) {
            line.stands = Stands::Resting(until);
            self.resting.insert((until, principal));
        }
    }

    /// Puts a line where it belongs after a change, or forgets it. That a renewal presses shows at the next turn.
    fn settle(&mut self, principal: Principal) {
        self.take_out(principal);
        let Some(line) = self.lines.get_mut(&principal) else { return };
        if line.waiting.is_empty() && line.under_way == 0 {
            self.lines.remove(&principal);
        } else if !line.waiting.is_empty() && line.under_way < MAX_FLIGHTS_PER_PRINCIPAL {
            let presses = line.first_renewal().and_then(|(turn, _)| match turn {
                Turn::AskedNow => None,
                Turn::Renewal(from) => Some(from),
            });
            line.stands = Stands::Ordinary(presses);
            self.ordinary.add(principal, line);
            self.presses.extend(presses.map(|from| (from, principal)));
        }
    }

    fn take_out(&mut self, principal: Principal) {
        let Some(line) = self.lines.get_mut(&principal) else { return };
        match std::mem::take(&mut line.stands) {
            Stands::Aside => {}
            Stands::Ordinary(presses) => {
                self.ordinary.remove(line);
                if let Some(from) = presses {
                    self.presses.remove(&(from, principal));
                }
            }
            Stands::Pressing => self.pressing.remove(line),
            Stands::Resting(until) => {
                self.resting.remove(&(until, principal));
            }
        }
    }
}

impl Line {
    /// The renewal that presses first.
    fn first_renewal(&self) -> Option<(Turn, u64)> {
        self.waiting.range((Turn::Renewal(SystemTime::UNIX_EPOCH), 0)..).next().map(|(key, _)| *key)
    }
}

impl Lane {
    fn add(&mut self, principal: Principal, line: &Line) {
        let part = if line.under_way == 0 { &mut self.first } else { &mut self.more };
        part.insert(line.served, principal);
    }

    fn remove(&mut self, line: &Line) {
        self.first.remove(&line.served);
        self.more.remove(&line.served);
    }

    /// The principal served longest ago of those that may take a place.
    fn next(&self, under_way: usize) -> Option<Principal> {
        let head =
            |part: &BTreeMap<u64, Principal>| part.first_key_value().map(|(served, principal)| (*served, *principal));
        let first = head(&self.first).filter(|_| under_way < MAX_FLIGHTS);
        let more = head(&self.more).filter(|_| under_way < MAX_FLIGHTS - FIRST_PLACES);
        first.into_iter().chain(more).min().map(|(_, principal)| principal)
    }
}

/// What one principal may use of `all`.
fn share(all: Rate) -> Rate {
    let part = |whole: NonZeroU32| NonZeroU32::new(whole.get() / PRINCIPAL_SHARE).unwrap_or(NonZeroU32::MIN);
    Rate { per_second: part(all.per_second), burst: part(all.burst) }
}
