//! One follower of one entry: which event it is to see next.

use std::sync::Arc;

use tokio::{sync::watch, time::timeout};

use super::{
    ANSWER_TIMEOUT, Hub, HubError,
    entry::{Delay, Live, Snapshot},
};
use crate::{attest::Workload, x509::Bundle};

/// Follows one credential; dropping it tells the hub that the follower has gone.
#[derive(Debug)]
pub struct Subscription {
    hub: Hub,
    id: u128,
    snapshots: watch::Receiver<Snapshot>,
    /// Sequence of the last event returned.
    seen: u64,
}

/// What a follower is told, with its sequence. Each event carries the newest state of its kind.
#[derive(Clone, Debug)]
pub enum Event {
    /// A certificate that the follower has not seen.
    Certificate(u64, Live),
    /// The roots changed.
    Bundle(u64, Arc<Bundle>),
    /// A renewal failed, or waits for its turn and the end comes near; the certificate of `Live` stays in force.
    Delayed(u64, Arc<Delay>, Live),
    /// The follower is to rotate its key before the certificate of `Live` ends.
    RotationDue(u64, Live),
    /// The right was lost, or the pod is gone; nothing follows.
    Denied(u64, HubError),
    /// The entry was given up; nothing follows.
    Ended(HubError),
}

impl Subscription {
    pub(super) fn new(hub: Hub, id: u128, snapshots: watch::Receiver<Snapshot>) -> Self {
        Self { hub, id, snapshots, seen: 0 }
    }

    /// This subscription once it has a certificate that has not expired and is what policy grants now.
    ///
    /// Waits at most [`ANSWER_TIMEOUT`], in the queue and for the signer.
    pub(super) async fn live(mut self) -> Result<Self, HubError> {
        match timeout(ANSWER_TIMEOUT, self.becomes_live()).await {
            Ok(outcome) => outcome.map(|()| self),
            Err(_) => Err(HubError::TimedOut),
        }
    }

    async fn becomes_live(&mut self) -> Result<(), HubError> {
        loop {
            match &*self.snapshots.borrow_and_update() {
                Snapshot::Pending => {}
                Snapshot::Failed(error) => return Err(error.clone()),
                Snapshot::Denied(_, lost) => return Err(lost.clone()),
                Snapshot::Live(live) => match &live.delay {
                    _ if live.credential.not_after() > self.hub.0.clock.now() && !live.superseded => return Ok(()),
                    Some((_, delay)) if !delay.queued => return Err(HubError::Expired(delay.message.clone())),
                    _ => {}
                },
            }
            self.snapshots.changed().await.map_err(|_| HubError::Stopping)?;
        }
    }

    /// This subscription as of `sequence`: nothing up to it is returned again. A sequence from the future counts as none.
    pub(super) fn after(mut self, sequence: u64) -> Self {
        let newest = self.snapshots.borrow().live().map_or(0, Live::newest);
        self.seen = if sequence > newest { 0 } else { sequence };
        self
    }

    /// The id by which the same workload can follow this credential again.
    pub fn id(&self) -> String {
        format!("{:032x}", self.id)
    }

    /// Whether `workload` may be given this credential: it is the owner, or the owner less some facts, to whom policy still
    /// grants the same.
    ///
    /// A process that executes another program is another workload. One whose program's file is replaced by an upgrade only
    /// loses a fact, and may lose its certificate where a policy looks at that fact.
    pub fn is_for(&self, workload: &Workload) -> bool {
        self.hub.may_have(self.id, workload)
    }

    /// The certificate of a subscription that has had no event: its first.
    ///
    /// # Errors
    /// It was lost since.
    pub async fn first(&mut self) -> Result<Live, HubError> {
        match self.next().await {
            Event::Certificate(_, live) => Ok(live),
            Event::Denied(_, lost) => Err(lost),
            Event::Ended(error) => Err(error),
            // A credential's other events come after its certificate.
            Event::Bundle(..) | Event::Delayed(..) | Event::RotationDue(..) => Err(HubError::Stopping),
        }
    }

    /// Whether the follower has had an event, in this stream or an earlier one.
    pub fn has_seen(&self) -> bool {
        self.seen > 0
    }

    /// The next event, as soon as there is one that the follower has not seen. Cancel safe.
    pub async fn next(&mut self) -> Event {
        loop {
            let event = next_event(&self.snapshots.borrow_and_update(), self.seen);
            if let Some(event) = event {
                self.seen = event.sequence().unwrap_or(self.seen);
                return event;
            }
            if self.snapshots.changed().await.is_err() {
                return Event::Ended(HubError::Stopping);
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.hub.left(self.id);
    }
}

impl Event {
    /// The event's sequence; `None` for [`Event::Ended`], which is not an event of the credential.
    pub fn sequence(&self) -> Option<u64> {
        match self {
            Self::Certificate(sequence, _)
            | Self::Bundle(sequence, _)
            | Self::Delayed(sequence, ..)
            | Self::RotationDue(sequence, _)
            | Self::Denied(sequence, _) => Some(*sequence),
            Self::Ended(_) => None,
        }
    }
}

/// The event with the least sequence above `seen`: in order, nothing twice, nothing missed that is still so.
fn next_event(snapshot: &Snapshot, seen: u64) -> Option<Event> {
    let live = match snapshot {
        Snapshot::Pending => return None,
        Snapshot::Failed(error) => return Some(Event::Ended(error.clone())),
        Snapshot::Denied(sequence, lost) => return Some(Event::Denied(*sequence, lost.clone())),
        Snapshot::Live(live) => live,
    };
    let certificate = (live.issued > seen).then(|| Event::Certificate(live.issued, live.clone()));
    let bundle = (live.bundle.0 > seen).then(|| Event::Bundle(live.bundle.0, live.bundle.1.clone()));
    let delay = live.delay.as_ref().filter(|(sequence, _)| *sequence > seen);
    let delay = delay.map(|(sequence, delay)| Event::Delayed(*sequence, delay.clone(), live.clone()));
    let due = live.rotation_due.filter(|sequence| *sequence > seen);
    let due = due.map(|sequence| Event::RotationDue(sequence, live.clone()));
    [certificate, bundle, delay, due].into_iter().flatten().min_by_key(|event| event.sequence())
}
