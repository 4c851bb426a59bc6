//! What the hub knows, and every change to it, as plain functions of a moment: no time passes in here and nothing waits.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry as MapEntry},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rand::{Rng as _, rngs::StdRng};

use super::{
    HubError, LINGER, MAX_IDLE_PER_PRINCIPAL, RENEW_WINDOW,
    entry::{Delay, Entry, Flight, Key, Live, Snapshot},
    queue::{PRESSING_AFTER, Queue, Turn},
};
use crate::{
    account::{Account, Full, Kind, Principal},
    attest::Workload,
    backoff::Backoff,
    issue::Credential,
    policy::{self, Grant, PolicySet},
    telemetry::with_causes,
    x509::Bundle,
};

/// Retries of a failed renewal: from one second to five minutes apart, always before the certificate ends.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(300));

pub(super) struct State {
    pub(super) entries: HashMap<u128, Entry>,
    pub(super) queue: Queue,
    shared: HashMap<Arc<Key>, u128>,
    /// Entries by the moment at which they need a look.
    due: BTreeSet<(SystemTime, u128)>,
    /// Entries without followers, by principal and since when.
    idle: HashMap<Principal, BTreeSet<(SystemTime, u128)>>,
    /// Ends of the certificates in force.
    expiries: BTreeSet<(SystemTime, u128)>,
    sequence: u64,
    rng: StdRng,
}

/// A live credential as `csrd status` shows it.
#[derive(Clone, Debug)]
pub struct Row {
    /// The id by which its workload can follow it.
    pub id: String,
    /// Whose it is.
    pub workload: Arc<Workload>,
    /// The certificate and its state.
    pub live: Live,
    /// Streams that follow it.
    pub subscribers: usize,
}

impl State {
    pub(super) fn new(queue: Queue, rng: StdRng) -> Self {
        Self {
            entries: HashMap::new(),
            queue,
            shared: HashMap::new(),
            due: BTreeSet::new(),
            idle: HashMap::new(),
            expiries: BTreeSet::new(),
            sequence: 0,
            rng,
        }
    }

    /// The entry that subscriptions with this key share.
    pub(super) fn id_of(&self, key: &Key) -> Option<u128> {
        self.shared.get(key).copied()
    }

    /// Takes in a new entry under a random id, if its principal may have one more. Where all are taken, the largest holder
    /// gives up one: the longest idle, or else one that it follows.
    pub(super) fn insert(&mut self, mut entry: Entry, account: &Account) -> Result<u128, HubError> {
        let principal = entry.workload.principal();
        let place = loop {
            match account.take(Kind::Entries, principal) {
                Ok(place) => break place,
                // What it holds idle is the first that a principal gives up for itself.
                Err(Full::Own { .. }) if self.forget_longest_idle(principal) => {}
                Err(Full::Of(largest)) if self.give_up_one(largest) => {}
                Err(full) => return Err(HubError::TooMany(full)),
            }
        };
        entry.place = Some(place);
        let id = self.rng.random::<u128>();
        if let Some(key) = &entry.shared {
            self.shared.insert(key.clone(), id);
        }
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// Makes room for another principal; false if `principal` holds nothing.
    fn give_up_one(&mut self, principal: Principal) -> bool {
        if self.forget_longest_idle(principal) {
            return true;
        }
        let of_principal = self.entries.iter().find(|(_, entry)| entry.workload.principal() == principal);
        let Some(id) = of_principal.map(|(id, _)| *id) else { return false };
        self.end(id, Snapshot::Failed(HubError::GivenUp));
        true
    }

    fn forget_longest_idle(&mut self, principal: Principal) -> bool {
        let longest_idle = self.idle.get(&principal).and_then(BTreeSet::first).map(|(_, id)| *id);
        longest_idle.map(|id| self.forget(id)).is_some()
    }

    /// An entry that was idle since then is so no more.
    fn idle_ended(&mut self, principal: Principal, since: SystemTime, id: u128) {
        if let Some(idle) = self.idle.get_mut(&principal) {
            idle.remove(&(since, id));
            if idle.is_empty() {
                self.idle.remove(&principal);
            }
        }
    }

    /// Drops an entry without a last word; for entries that nobody follows.
    fn forget(&mut self, id: u128) {
        let Some(entry) = self.entries.remove(&id) else { return };
        let principal = entry.workload.principal();
        if let Some(key) = &entry.shared {
            self.shared.remove(key);
        }
        if let Some(due) = entry.due {
            self.due.remove(&(due, id));
        }
        if let Some(since) = entry.idle_since {
            self.idle_ended(principal, since, id);
        }
        if let Flight::Queued(turn, rank) = entry.flight {
            self.queue.remove(principal, turn, rank);
        }
        if let Some(live) = entry.snapshot.borrow().live() {
            self.expiries.remove(&(live.credential.not_after(), id));
        }
    }

    /// Drops an entry; its followers see `last` and nothing after it.
    fn end(&mut self, id: u128, last: Snapshot) {
        let Some(entry) = self.entries.get(&id) else { return };
        let snapshot = entry.snapshot.clone();
        self.forget(id);
        snapshot.send_replace(last);
    }

    /// Somebody follows `id` now.
    pub(super) fn followed(&mut self, id: u128, now: SystemTime) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(since) = entry.idle_since.take() {
            let principal = entry.workload.principal();
            self.idle_ended(principal, since, id);
            self.reschedule(id, now);
        }
    }

    /// One follower of `id`, still counted, is going.
    pub(super) fn left(&mut self, id: u128, now: SystemTime) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.snapshot.receiver_count() <= 1 && entry.idle_since.is_none() {
            entry.idle_since = Some(now);
            let principal = entry.workload.principal();
            let idle = self.idle.entry(principal).or_default();
            idle.insert((now, id));
            let too_many = idle.len() > MAX_IDLE_PER_PRINCIPAL;
            self.reschedule(id, now);
            if too_many {
                self.forget_longest_idle(principal);
            }
        }
    }

    /// Puts the entry into the queue, or further ahead if it waits there for a later turn.
    pub(super) fn enqueue(&mut self, id: u128, turn: Turn) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let principal = entry.workload.principal();
        match entry.flight {
            Flight::UnderWay => return,
            Flight::Queued(present, _) if present <= turn => return,
            Flight::Queued(present, rank) => self.queue.remove(principal, present, rank),
            Flight::Idle => {}
        }
        entry.flight = Flight::Queued(turn, self.queue.push(principal, turn, id));
    }

    /// The first end of a certificate in force.
    pub(super) fn earliest_expiry(&self) -> Option<SystemTime> {
        self.expiries.first().map(|(not_after, _)| *not_after)
    }

    /// When the schedule has to wake.
    pub(super) fn first_due(&self) -> Option<SystemTime> {
        self.due.first().map(|(when, _)| *when)
    }

    /// Does what is due by `now`.
    pub(super) fn fire(&mut self, now: SystemTime) {
        let mut waiting = 0_usize;
        while let Some(&(when, id)) = self.due.first() {
            if when > now {
                break;
            }
            self.due.pop_first();
            let entry = self.entries.get_mut(&id).expect("only entries that are held are due");
            entry.due = None;
            if entry.idle_since.is_some() {
                self.forget(id);
                continue;
            }
            match entry.flight {
                Flight::Idle if entry.rotates_key() => {
                    let sequence = next_sequence(&mut self.sequence, now);
                    self.change(id, |live| live.rotation_due = Some(sequence));
                }
                Flight::Idle => self.enqueue_renewal(id, PRESSING_AFTER, now),
                Flight::Queued(turn, rank) if entry.tell_at().is_some_and(|when| when <= now) => {
                    self.tell_that_it_waits(id, turn, rank, now);
                    waiting += 1;
                }
                Flight::Queued(..) | Flight::UnderWay => {}
            }
        }
        if waiting > 0 {
            let reason = HubError::Queued.reason();
            tracing::warn!(renewals = waiting, reason, "renewals wait for their turn, and their certificates end soon");
        }
    }

    /// Puts a renewal into the queue, to press once `pressing_after` of what is left has passed.
    fn enqueue_renewal(&mut self, id: u128, pressing_after: f64, now: SystemTime) {
        let Some(entry) = self.entries.get(&id) else { return };
        let not_after = entry.snapshot.borrow().live().map_or(now, |live| live.credential.not_after());
        let left = not_after.duration_since(now).unwrap_or_default();
        self.enqueue(id, Turn::Renewal(now + left.mul_f64(pressing_after)));
        self.reschedule(id, now);
    }

    /// Tells the followers of an entry that its renewal waits.
    fn tell_that_it_waits(&mut self, id: u128, turn: Turn, rank: u64, now: SystemTime) {
        let Some(entry) = self.entries.get(&id) else { return };
        let retry_at = now + self.queue.at_most(entry.workload.principal(), turn, rank);
        let (reason, message) = (HubError::Queued.reason(), HubError::Queued.to_string());
        let delay = Arc::new(Delay { queued: true, reason, message, retry_at });
        let sequence = next_sequence(&mut self.sequence, now);
        self.change(id, |live| live.delay = Some((sequence, delay)));
    }

    /// The entry's workload is in other circumstances now: what was decided for it no longer stands.
    pub(super) fn becomes(&mut self, id: u128, workload: Arc<Workload>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.workload == workload {
            return;
        }
        entry.workload = workload;
        entry.stale = true;
        let Some(key) = entry.shared.take() else { return };
        self.shared.remove(&key);
        let key = Arc::new(Key { workload: entry.workload.clone(), ask: key.ask.clone(), held: key.held.clone() });
        // Somebody may have asked for the same as what it is now, before this entry was looked at.
        if let MapEntry::Vacant(place) = self.shared.entry(key.clone()) {
            place.insert(id);
            entry.shared = Some(key);
        }
    }

    /// The workload has lost its right, or is gone; its followers are told so.
    pub(super) fn lost(&mut self, id: u128, why: HubError, now: SystemTime) {
        let sequence = next_sequence(&mut self.sequence, now);
        self.end(id, Snapshot::Denied(sequence, why));
    }

    /// Decides again if the policies or the workload are not those of the last decision. A lost right ends the entry.
    pub(super) fn redecide(&mut self, id: u128, policies: &Arc<PolicySet>, now: SystemTime) -> Option<HubError> {
        let entry = self.entries.get_mut(&id)?;
        if Arc::ptr_eq(&entry.decided_under, policies) && !entry.stale {
            return None;
        }
        match policy::decide(policies, &entry.workload, &entry.ask) {
            Ok(grant) => {
                let other = !same_certificate(&entry.grant, &grant);
                entry.grant = grant;
                entry.decided_under = policies.clone();
                entry.stale = false;
                if other {
                    self.change(id, |live| live.superseded = true);
                }
                if other && !self.entries[&id].rotates_key() {
                    // What is in use is no longer what was decided: ahead of every renewal that still has time.
                    self.enqueue_renewal(id, 0.0, now);
                }
                None
            }
            Err(denial) => {
                let lost = HubError::Denied(Arc::new(denial));
                self.lost(id, lost.clone(), now);
                Some(lost)
            }
        }
    }

    /// The signer's roots have changed.
    pub(super) fn bundle_changed(&mut self, signer: &str, bundle: &Arc<Bundle>, now: SystemTime) {
        let of_signer = self.entries.iter().filter(|(_, entry)| entry.grant.signer() == signer);
        for id in of_signer.map(|(id, _)| *id).collect::<Vec<_>>() {
            let sequence = next_sequence(&mut self.sequence, now);
            self.change(id, |live| {
                if live.bundle.1 != *bundle {
                    live.bundle = (sequence, bundle.clone());
                }
            });
        }
    }

    /// A flight of `id` for `flown` has ended: with a certificate and the roots its signer publishes now, or with an error.
    pub(super) fn landed(
        &mut self,
        id: u128,
        flown: &Grant,
        outcome: Result<(Credential, Arc<Bundle>), HubError>,
        now: SystemTime,
    ) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.flight = Flight::Idle;
        let sequence = next_sequence(&mut self.sequence, now);
        match outcome {
            // Policy has changed during the flight: this is no longer what the workload may have.
            Ok(_) if !same_certificate(flown, &entry.grant) => self.enqueue(id, Turn::AskedNow),
            // Or this no longer what was asked for, and says nothing about what is granted now, lifetime included.
            Err(_) if *flown != entry.grant => self.enqueue(id, Turn::AskedNow),
            Ok((credential, bundle)) => {
                entry.failures = 0;
                if let Some(replaced) = entry.snapshot.borrow().live() {
                    self.expiries.remove(&(replaced.credential.not_after(), id));
                }
                self.expiries.insert((credential.not_after(), id));
                let renew_at = draw_renew_point(&mut self.rng, now, credential.not_after());
                entry.snapshot.send_replace(Snapshot::Live(Live {
                    credential: Arc::new(credential),
                    issued: sequence,
                    trace: entry.trace.clone(),
                    renew_at,
                    bundle: (sequence, bundle),
                    delay: None,
                    rotation_due: None,
                    superseded: false,
                }));
                self.reschedule(id, now);
            }
            Err(error) => {
                let not_after = entry.snapshot.borrow().live().map(|live| live.credential.not_after());
                let Some(not_after) = not_after else { return self.end(id, Snapshot::Failed(error)) };
                entry.failures = entry.failures.saturating_add(1);
                let left = not_after.duration_since(now).unwrap_or_default();
                let wait = RETRY.bounded_by(left, entry.failures, &mut self.rng);
                // Later if the signer asks for it, spread all the same, but still before the end.
                let retry_at = now + wait.max((wait + error.retry_after()).min(left));
                let delay =
                    Arc::new(Delay { queued: false, reason: error.reason(), message: with_causes(&error), retry_at });
                self.change(id, |live| live.delay = Some((sequence, delay)));
                self.reschedule(id, now);
            }
        }
    }

    /// The live credentials that `visible` lets through, soonest expiry first.
    pub(super) fn rows(&self, visible: impl Fn(&Workload) -> bool) -> Vec<Row> {
        let mut rows = Vec::new();
        for (id, entry) in self.entries.iter().filter(|(_, entry)| visible(&entry.workload)) {
            if let Some(live) = entry.snapshot.borrow().live() {
                let (id, workload) = (format!("{id:032x}"), entry.workload.clone());
                rows.push(Row { id, workload, live: live.clone(), subscribers: entry.snapshot.receiver_count() });
            }
        }
        rows.sort_by_key(|row| row.live.credential.not_after());
        rows
    }

    /// Whether no index remembers anything.
    #[cfg(test)]
    pub(super) fn is_clean(&self) -> bool {
        self.entries.is_empty()
            && self.queue.is_empty()
            && self.shared.is_empty()
            && self.due.is_empty()
            && self.idle.is_empty()
            && self.expiries.is_empty()
    }

    /// Changes the published state of a live entry.
    fn change(&mut self, id: u128, change: impl FnOnce(&mut Live)) {
        if let Some(entry) = self.entries.get(&id) {
            entry.snapshot.send_modify(|snapshot| {
                if let Snapshot::Live(live) = snapshot {
                    change(live);
                }
            });
        }
    }

    /// Writes the entry's next moment into the schedule.
    fn reschedule(&mut self, id: u128, now: SystemTime) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(due) = entry.due.take() {
            self.due.remove(&(due, id));
        }
        let due = match entry.idle_since {
            Some(since) => Some(since + LINGER),
            None if entry.flight == Flight::Idle => entry.next_due(),
            None => entry.tell_at(),
        };
        // A clock that was set back must not keep an idle entry longer than it lingers.
        let due = due.map(|due| if entry.idle_since.is_some() { due.min(now + LINGER) } else { due });
        if let Some(due) = due {
            entry.due = Some(due);
            self.due.insert((due, id));
        }
    }
}

/// Sequences follow the wall clock in microseconds, so that none repeats across a restart, and never step back.
fn next_sequence(sequence: &mut u64, now: SystemTime) -> u64 {
    let micros = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
    *sequence = u64::try_from(micros).unwrap_or(u64::MAX).max(*sequence + 1);
    *sequence
}

/// A moment within [`RENEW_WINDOW`] of what is left of the certificate's life.
fn draw_renew_point(rng: &mut StdRng, now: SystemTime, not_after: SystemTime) -> SystemTime {
    let life = not_after.duration_since(now).unwrap_or_default();
    now + life.mul_f64(rng.random_range(RENEW_WINDOW.0..RENEW_WINDOW.1))
}

/// Whether a certificate under one grant would serve under the other; lifetime and policy only matter at renewal.
pub(super) fn same_certificate(a: &Grant, b: &Grant) -> bool {
    (a.names(), a.usages(), a.key(), a.signer()) == (b.names(), b.usages(), b.key(), b.signer())
}
