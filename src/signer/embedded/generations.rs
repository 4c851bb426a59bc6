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
        let activate_at = (made_at(&generation.authority) + overlap).max(now + settle.min(overlap));
        self.next = Some(Next { generation: Arc::new(generation), activate_at });
    }

    /// The next CA, while it is announced.
    pub(super) fn next(&self) -> Option<&Authority> {
        self.next.as_ref().map(|next| &next.generation.authority)
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
        self.next = None;
        if let Some(newest) = self.activated.last_mut()
            && newest.authority.certificate() == generation.authority.certificate()
        {
            *newest = generation;
            return;
        }
        let known: HashSet<_> = self.roots(now).into_iter().collect();
        let news = generation.authority.roots().iter().any(|root| !known.contains(root));
        let activate_at = if news && !self.activated.is_empty() { now + SETTLE } else { now };
        self.next = Some(Next { generation, activate_at });
    }
}

fn made_at(authority: &Authority) -> SystemTime {
    authority.not_before() + BACKDATE
}

fn life(authority: &Authority) -> Duration {
    authority.not_after().duration_since(made_at(authority)).unwrap_or_default()
}

fn successor_at(authority: &Authority) -> SystemTime {
    made_at(authority) + life(authority) / SUCCESSOR_AFTER
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_secs(1000 * 60);

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000)
    }

    fn generation(number: u64, now: SystemTime) -> Generation {
        Generation { number, authority: Authority::make(LIFE, now).unwrap() }
    }

    /// Does what is due, as the signer does with its disk.
    fn advance(generations: &mut Generations, now: SystemTime) {
        while let Some(step) = generations.due(now).or_else(|| generations.succession(now)) {
            match step {
                Step::Make(number) => generations.announce(generation(number, now), Duration::ZERO, now),
                Step::Activate(_) => generations.activate(),
                Step::Retire(number) => generations.retire(number),
            }
        }
    }

    fn signing(generations: &Generations, now: SystemTime) -> CertificateDer<'static> {
        generations.signing(now).unwrap().certificate().clone()
    }

    #[test]
    fn over_many_lives_a_root_is_known_an_overlap_before_it_signs_and_until_its_end() {
        let mut generations = Generations::default();
        let mut first_seen = std::collections::HashMap::new();
        let mut signers = Vec::new();
        for minute in 0..5000 {
            let now = start() + Duration::from_secs(60) * minute;
            advance(&mut generations, now);
            let roots = generations.roots(now);
            assert!((1..=3).contains(&roots.len()));
            for root in &roots {
                first_seen.entry(root.clone()).or_insert(now);
            }
            let signer = signing(&generations, now);
            assert!(roots.contains(&signer));
            if signers.last().is_none_or(|(last, _)| *last != signer) {
                let known_for = now.duration_since(first_seen[&signer]).unwrap();
                assert!(signers.is_empty() || known_for >= LIFE / OVERLAP, "known for {known_for:?}");
                signers.push((signer, generations.signing(now).unwrap().not_after()));
            }
            // Every leaf ever signed has its root in the bundle while it can still be valid.
            assert!(signers.iter().all(|(signer, end)| roots.contains(signer) || *end <= now));
            assert!(generations.activated.len() <= MAX_GENERATIONS + 1);
        }
        assert!(signers.len() >= 8, "{}", signers.len());
    }

    #[test]
    fn waking_when_asked_misses_nothing() {
        let mut generations = Generations::default();
        let mut now = start();
        for _ in 0..20 {
            advance(&mut generations, now);
            let wake_at = generations.wake_at(now).unwrap();
            let just_before = wake_at - Duration::from_secs(1);
            assert!(
                just_before < now
                    || generations.due(just_before).or_else(|| generations.succession(just_before)).is_none()
            );
            now = wake_at;
        }
        assert!(signing(&generations, now) != signing(&generations, now - LIFE) || now > start() + LIFE);
    }

    #[test]
    fn a_ca_announced_before_a_restart_waits_for_its_overlap_and_for_subscribers() {
        let made_at = start();
        let settle = SETTLE.min(LIFE / OVERLAP);
        for (restart_after, activate_after) in [(Duration::ZERO, LIFE / OVERLAP), (LIFE / 4, LIFE / 4 + settle)] {
            let mut generations = Generations::default();
            generations.restore(generation(1, made_at - LIFE / 2));
            let restarted = made_at + restart_after;
            generations.announce(generation(2, made_at), SETTLE, restarted);
            assert_eq!(generations.roots(restarted).len(), 2);
            let activate_at = made_at + activate_after;
            assert_eq!(generations.due(activate_at - Duration::from_secs(1)), None);
            assert_eq!(generations.due(activate_at), Some(Step::Activate(2)));
        }
    }

    #[test]
    fn an_ended_ca_is_replaced_at_once() {
        let mut generations = Generations::default();
        generations.restore(generation(7, start()));
        let now = start() + LIFE;
        assert!(generations.signing(now).is_none());
        advance(&mut generations, now);
        assert_eq!(generations.activated.last().unwrap().number, 8);
        assert_eq!(generations.roots(now), [signing(&generations, now)]);
    }

    #[test]
    fn a_clock_that_is_behind_makes_no_new_ca() {
        let mut generations = Generations::default();
        generations.restore(generation(1, start()));
        let now = start() - LIFE;
        advance(&mut generations, now);
        assert!(generations.signing(now).is_none());
        assert_eq!(generations.activated.len(), 1);
        assert_eq!(generations.roots(now).len(), 1);
    }

    #[test]
    fn a_clock_that_was_ahead_is_forgiven() {
        let mut generations = Generations::default();
        generations.restore(generation(1, start()));
        let right = signing(&generations, start());
        advance(&mut generations, start() + LIFE + LIFE / 2);
        advance(&mut generations, start());
        assert_eq!(signing(&generations, start()), right);
    }

    #[test]
    fn the_operators_new_ca_signs_once_its_root_is_known() {
        let mut generations = Generations::default();
        let now = start();
        generations.replace(Authority::make(LIFE, now).unwrap(), now);
        advance_given(&mut generations, now);
        let old = signing(&generations, now);

        let new = Authority::make(LIFE, now).unwrap();
        let certificate = new.certificate().clone();
        generations.replace(new, now);
        advance_given(&mut generations, now);
        assert_eq!(signing(&generations, now), old);
        assert_eq!(generations.roots(now), [old.clone(), certificate.clone()]);
        let later = now + SETTLE;
        advance_given(&mut generations, later);
        assert_eq!(signing(&generations, later), certificate);
        assert_eq!(generations.roots(later), [certificate, old]);
    }

    #[test]
    fn the_operators_change_taken_back_leaves_no_trace() {
        let mut generations = Generations::default();
        let now = start();
        let old = Authority::make(LIFE, now).unwrap();
        let again = Authority::from_pem(old.to_pem().as_bytes(), old.to_pem().as_bytes(), &[]).unwrap();
        generations.replace(old, now);
        advance_given(&mut generations, now);
        generations.replace(Authority::make(LIFE, now).unwrap(), now);
        generations.replace(again, now);
        advance_given(&mut generations, now + SETTLE);
        assert_eq!(generations.roots(now + SETTLE).len(), 1);
    }

    #[test]
    fn the_number_of_the_operators_cas_is_bounded() {
        let mut generations = Generations::default();
        for _ in 0..2 * MAX_GENERATIONS {
            generations.replace(Authority::make(LIFE, start()).unwrap(), start());
            advance_given(&mut generations, start() + SETTLE);
        }
        assert_eq!(generations.activated.len(), MAX_GENERATIONS);
    }

    fn advance_given(generations: &mut Generations, now: SystemTime) {
        while let Some(step) = generations.due(now) {
            match step {
                Step::Make(_) => unreachable!("nothing is made for an operator"),
                Step::Activate(_) => generations.activate(),
                Step::Retire(number) => generations.retire(number),
            }
        }
    }
}
