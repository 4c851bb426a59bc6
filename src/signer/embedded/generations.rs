//! Which CA signs, which is next, and which roots are trusted: pure decisions over time, no I/O.
//!
//! A CA is in [`Generations::roots`] for an overlap before it signs, and until its own end after it has stopped, which is
//! the end of its last leaf at the latest. Dates come from the certificates, so that a restart comes to the same decisions.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::CertificateDer;

use super::authority::{Authority, BACKDATE};

/// Time that subscribers have to come back and take a bundle after a start or a change of the operator's CA.
pub const SETTLE: Duration = Duration::from_secs(5 * 60);
/// CAs kept at a time, the next one not counted; with it, a bundle holds at most 64 roots.
pub const MAX_GENERATIONS: usize = 3;
/// Its successor is made when a CA has lived one in this many parts of its life.
const SUCCESSOR_AFTER: u32 = 2;
/// The successor is in the bundle for one in this many parts of its life before it signs.
const OVERLAP: u32 = 10;

/// One CA and its place in the order of CAs.
#[derive(Debug)]
pub(super) struct Generation {
    /// From 1, never reused.
    pub(super) number: u64,
    pub(super) authority: Authority,
}

/// The CAs of a signer.
#[derive(Clone, Debug, Default)]
pub(super) struct Generations {
    /// Those that have signed or may sign, oldest first.
    activated: Vec<Arc<Generation>>,
    next: Option<Next>,
}

#[derive(Clone, Debug)]
struct Next {
    generation: Arc<Generation>,
    activate_at: SystemTime,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Make the next CA, with this number.
    Make(u64),
    /// Let the next CA, which has this number, sign.
    Activate(u64),
    /// Forget the CA with this number: it has ended.
    Retire(u64),
}

impl Generations {
    /// The newest CA that is valid.
    pub(super) fn signing(&self, now: SystemTime) -> Option<&Authority> {
        self.activated.iter().rev().map(|generation| &generation.authority).find(|authority| authority.is_valid(now))
    }

    /// The roots of every CA that has not ended, the signing one's first.
    pub(super) fn roots(&self, now: SystemTime) -> Vec<CertificateDer<'static>> {
        let next = self.next.iter().map(|next| &next.generation);
        let all = self.activated.iter().rev().chain(next).map(|generation| &generation.authority);
        let live = all.filter(|authority| now < authority.not_after());
        live.flat_map(|authority| authority.roots().iter().cloned()).collect()
    }

    /// The first thing to be done at `now`, the making of a successor aside.
    pub(super) fn due(&self, now: SystemTime) -> Option<Step> {
        self.activation(now).or_else(|| self.retirement(now))
    }

    /// A successor, when the newest CA is old enough and has none.
    pub(super) fn succession(&self, now: SystemTime) -> Option<Step> {
        let newest = self.activated.last();
        let make = self.next.is_none() && newest.is_none_or(|newest| successor_at(&newest.authority) <= now);
        make.then(|| Step::Make(newest.map_or(1, |newest| newest.number + 1)))
    }

    /// The next CA signs when its overlap is over, or earlier when no other can.
    fn activation(&self, now: SystemTime) -> Option<Step> {
        let Next { generation, activate_at } = self.next.as_ref()?;
        let forced = self.signing(now).is_none() && generation.authority.is_valid(now);
        (*activate_at <= now || forced).then_some(Step::Activate(generation.number))
    }

    /// An ended CA is kept for as long again as it lived, in case it was the clock that was wrong.
    fn retirement(&self, now: SystemTime) -> Option<Step> {
        let [oldest, _, ..] = self.activated.as_slice() else {
            return None;
        };
        let ended = oldest.authority.not_after() + life(&oldest.authority) <= now;
        (ended || self.activated.len() > MAX_GENERATIONS).then_some(Step::Retire(oldest.number))
    }

    /// When [`Generations::due`] or [`Generations::roots`] may next change.
    pub(super) fn wake_at(&self, now: SystemTime) -> Option<SystemTime> {
        let next = self.next.iter().map(|next| next.activate_at);
        let successor = self.activated.last().map(|newest| successor_at(&newest.authority));
        let ends = self.activated.iter().map(|generation| generation.authority.not_after());
        next.chain(successor).chain(ends).filter(|when| now < *when).min()
    }

    /// Adds a CA that had been activated, in order of number.
    pub(super) fn restore(&mut self, generation: Generation) {
        self.activated.push(Arc::new(generation));
    }

    /// Adds a CA that was made and saved, at `now` or before this process started at `now`.
    pub(super) fn announce(&mut self, generation: Generation, settle: Duration, now: SystemTime) {
        let overlap = life(&generation.authority) / OVERLAP;
        let made_at = generation.authority.not_before() + BACKDATE;
        let activate_at = (made_at + overlap).max(now + settle.min(overlap));
        self.next = Some(Next { generation: Arc::new(generation), activate_at });
    }

    /// Lets the next CA sign.
    pub(super) fn activate(&mut self) {
        self.activated.extend(self.next.take().map(|next| next.generation));
    }

    /// Forgets the CA with `number`.
    pub(super) fn retire(&mut self, number: u64) {
        self.activated.retain(|generation| generation.number != number);
    }

    /// Takes over the operator's new files. The same CA is replaced where it is, with its roots; another one signs at once
    /// if its roots are known already, and otherwise after [`SETTLE`].
    pub(super) fn replace(&mut self, authority: Authority, now: SystemTime) {
        let number = self.activated.last().map_or(1, |newest| newest.number + 1);
        let generation = Arc::new(Generation { number, authority });
        let same = |old: &&mut Arc<Generation>| old.authority.certificate() == generation.authority.certificate();
        self.next = None;
        if let Some(newest) = self.activated.last_mut().filter(|newest| same(newest)) {
            *newest = generation;
            return;
        }
        let known: HashSet<_> = self.roots(now).into_iter().collect();
        let news = generation.authority.roots().iter().any(|root| !known.contains(root));
        let activate_at = if news && !self.activated.is_empty() { now + SETTLE } else { now };
        self.next = Some(Next { generation, activate_at });
    }
}

fn life(authority: &Authority) -> Duration {
    authority.not_after().duration_since(authority.not_before()).unwrap_or_default()
}

fn successor_at(authority: &Authority) -> SystemTime {
    authority.not_before() + life(authority) / SUCCESSOR_AFTER
}
