//! One credential over time, and the state of it that followers see.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use opentelemetry::trace::SpanContext;
use tokio::sync::watch;

use super::{Held, HubError, Progress, queue::Turn};
use crate::{
    account::Place,
    attest::Workload,
    issue::Credential,
    policy::{Ask, Grant, PolicySet},
    telemetry,
    x509::Bundle,
};

/// The part of the time from when a waiting renewal presses to the end of what it renews, after which its followers are
/// told that it waits: a turn among other pressing renewals has not come by then.
const TOLD_AFTER: f64 = 0.5;
/// The same of a renewal whose certificate had ended before it was due, as after a suspend.
const TOLD_AFTER_END: Duration = Duration::from_secs(1);

/// What makes two subscriptions share one entry: equal facts, and the same request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) workload: Arc<Workload>,
    pub(super) ask: Ask,
    pub(super) held: Option<Held>,
}

/// One credential of one workload.
pub(super) struct Entry {
    pub(super) workload: Arc<Workload>,
    pub(super) ask: Ask,
    pub(super) held: Option<Held>,
    /// The decision in force, and the policies it was made under.
    pub(super) grant: Grant,
    pub(super) decided_under: Arc<PolicySet>,
    /// The workload has changed since.
    pub(super) stale: bool,
    /// Set when a later subscription with the same request is to find this entry.
    pub(super) shared: Option<Arc<Key>>,
    /// Told of the first flight's steps, then dropped.
    pub(super) progress: Option<Progress>,
    pub(super) flight: Flight,
    /// When the schedule looks at this entry next.
    pub(super) due: Option<SystemTime>,
    /// Since when nobody follows it.
    pub(super) idle_since: Option<SystemTime>,
    /// Renewals that failed since the last success.
    pub(super) failures: u32,
    /// The span of the call that asked, for the first flight.
    pub(super) span: Option<tracing::Span>,
    /// The trace that began it; renewals link to it.
    pub(super) origin: Option<SpanContext>,
    /// The trace of the last flight.
    pub(super) trace: Option<SpanContext>,
    pub(super) snapshot: watch::Sender<Snapshot>,
    /// What its principal holds of the hub's room; none until it is taken in.
    pub(super) place: Option<Place>,
}

/// Where an entry stands with its signer; at most one flight at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flight {
    Idle,
    /// Waiting in the queue, by its rank there.
    Queued(Turn, u64),
    UnderWay,
}

/// What a follower sees.
#[derive(Clone, Debug)]
pub(super) enum Snapshot {
    /// The first flight has not landed.
    Pending,
    /// There is a certificate.
    Live(Live),
    /// The workload lost its right, or is gone; the last state.
    Denied(u64, HubError),
    /// The first flight failed, or the entry was given up; the last state.
    Failed(HubError),
}

/// A certificate and what has happened since it was issued. Each part carries the sequence of the event that set it.
#[derive(Clone, Debug)]
pub struct Live {
    /// The certificate in force.
    pub credential: Arc<Credential>,
    /// Sequence of its issuance.
    pub issued: u64,
    /// The trace of its issuance, to which its deliveries belong.
    pub trace: Option<SpanContext>,
    /// When it will be renewed; drawn once for this certificate.
    pub renew_at: SystemTime,
    /// The signer's roots now, and the sequence of their last change since `issued`.
    pub bundle: (u64, Arc<Bundle>),
    /// The last renewal failed, or waits for its turn.
    pub delay: Option<(u64, Arc<Delay>)>,
    /// The follower has been told to rotate its key.
    pub rotation_due: Option<u64>,
    /// Policy grants something else by now: nobody new is given this certificate.
    pub superseded: bool,
}

/// A renewal that failed and will be tried again, or that waits for its turn.
#[derive(Clone, Debug)]
pub struct Delay {
    /// It waits in the queue: nothing has failed.
    pub queued: bool,
    /// Stable reason.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
    /// When it is tried again; for one that waits, by when its turn should have come.
    pub retry_at: SystemTime,
}

impl Entry {
    pub(super) fn new(
        workload: Arc<Workload>,
        ask: Ask,
        held: Option<Held>,
        (grant, decided_under): (Grant, Arc<PolicySet>),
        shared: Option<Arc<Key>>,
        progress: Option<Progress>,
    ) -> Self {
        Self {
            workload,
            ask,
            held,
            grant,
            decided_under,
            stale: false,
            shared,
            progress,
            flight: Flight::Idle,
            due: None,
            idle_since: None,
            failures: 0,
            span: Some(tracing::Span::current()),
            origin: telemetry::current(),
            trace: None,
            snapshot: watch::Sender::new(Snapshot::Pending),
            place: None,
        }
    }

    /// Whether this is its workload, or the same one in other circumstances: a pod keeps what is its own when its labels
    /// change.
    pub(super) fn is_of(&self, workload: &Workload) -> bool {
        *self.workload == *workload || (workload.pod().is_some() && workload.is_still(&self.workload))
    }

    /// When the schedule has to look at a live entry that somebody follows: renewal, retry, or never again.
    pub(super) fn next_due(&self) -> Option<SystemTime> {
        let snapshot = self.snapshot.borrow();
        let live = snapshot.live()?;
        match (&live.delay, live.rotation_due) {
            (Some((_, delay)), _) => Some(delay.retry_at),
            (None, Some(_)) => None,
            (None, None) => Some(live.renew_at),
        }
    }

    /// When the followers of an entry whose renewal waits are to be told: once for each wait.
    pub(super) fn tell_at(&self) -> Option<SystemTime> {
        let Flight::Queued(Turn::Renewal(presses), _) = self.flight else { return None };
        let snapshot = self.snapshot.borrow();
        let live = snapshot.live().filter(|live| live.delay.as_ref().is_none_or(|(_, delay)| !delay.queued))?;
        let left = live.credential.not_after().duration_since(presses).unwrap_or_default();
        Some(presses + if left.is_zero() { TOLD_AFTER_END } else { left.mul_f64(TOLD_AFTER) })
    }

    /// Whether a renewal needs a key that only the follower can make.
    pub(super) fn rotates_key(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.rotate_key)
    }
}

impl Snapshot {
    /// The certificate, when there is one.
    pub(super) fn live(&self) -> Option<&Live> {
        match self {
            Self::Live(live) => Some(live),
            _ => None,
        }
    }
}

impl Live {
    /// The sequence of the newest event.
    pub fn newest(&self) -> u64 {
        let delay = self.delay.as_ref().map_or(0, |(sequence, _)| *sequence);
        self.issued.max(self.bundle.0).max(delay).max(self.rotation_due.unwrap_or(0))
    }
}
