//! Leader election by a Lease (coordination.k8s.io/v1), by the rules of client-go.
//!
//! At most one replica leads, whatever their clocks say: a candidate takes a lease over only after it has itself watched
//! it stay unrenewed for the lease's whole duration, and a leader gives up [`RENEW_WITHIN`] after it began its last good
//! renewal, which is sooner. Every write names the resourceVersion that it replaces, so of two candidates one fails. When
//! a term ends, its work is dropped where it stands; a request that is already on its way may still arrive, so whatever
//! the leader writes must be harmless when it comes late or twice.
//!
//! Own code, because the crates for it compare the holder's clock with ours, or take a lease over unguarded.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;

/// A lease that was not renewed for this long is free.
pub const LEASE_DURATION: Duration = Duration::from_secs(8);
/// How long after its last good renewal a leader still leads.
pub const RENEW_WITHIN: Duration = Duration::from_secs(6);
/// Pause between renewals, and between a candidate's looks.
pub const RETRY: Duration = Duration::from_secs(2);
/// The longest that giving a lease back may hold up a stop.
const RELEASE_WITHIN: Duration = Duration::from_secs(1);

/// One replica's part in the election.
pub(super) struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    clock: Clock,
}

/// The lease as this replica last wrote it, and until when it leads.
struct Term {
    lease: Lease,
    until: Instant,
}

/// A lease of somebody else's: which version, and since when it is the same.
type Seen = Option<(String, Instant)>;

impl Election {
    /// For the lease `name`; `identity` must be no other replica's, not even a former one's.
    pub(super) fn new(client: Client, namespace: &str, name: &str, identity: String, clock: Clock) -> Self {
        Self { api: Api::namespaced(client, namespace), name: name.to_owned(), identity, clock }
    }

    /// Stands for election until `stop`; while it leads, `lead`'s future runs, which ends only when it cannot go on.
    pub(super) async fn run<W: Future<Output = ()>>(self, stop: CancellationToken, mut lead: impl FnMut() -> W) {
        while let Some(mut term) = stop.run_until_cancelled(self.acquire()).await {
            tracing::info!(identity = self.identity, "leads from now on");
            let kept = tokio::select! {
                biased;
                () = stop.cancelled() => true,
                () = self.keep(&mut term) => false,
                () = lead() => true,
            };
            tracing::info!(identity = self.identity, "leads no more");
            if kept {
                self.release(term).await;
            }
            // Another one's turn, where there is one.
            stop.run_until_cancelled(sleep(RETRY * 2)).await;
        }
    }

    /// Returns once this replica leads.
    async fn acquire(&self) -> Term {
        let mut seen = None;
        loop {
            let started = Instant::now();
            match self.try_acquire(&mut seen, started).await {
                Ok(Some(lease)) => return Term { lease, until: started + RENEW_WITHIN },
                Ok(None) => {}
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {}
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot stand for election");
                }
            }
            sleep(RETRY).await;
        }
    }

    async fn try_acquire(&self, seen: &mut Seen, now: Instant) -> Result<Option<Lease>, kube::Error> {
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            let mut lease = Lease::default();
            lease.metadata.name = Some(self.name.clone());
            lease.spec = Some(self.spec(None));
            return self.api.create(&PostParams::default(), &lease).await.map(Some);
        };
        if !self.is_free(&lease, seen, now) {
            return Ok(None);
        }
        let spec = Some(self.spec(lease.spec.as_ref()));
        self.write(Lease { spec, ..lease }).await.map(Some)
    }

    fn is_free(&self, lease: &Lease, seen: &mut Seen, now: Instant) -> bool {
        let spec = lease.spec.as_ref();
        let Some(holder) = spec.and_then(|spec| spec.holder_identity.as_deref()).filter(|holder| !holder.is_empty())
        else {
            return true;
        };
        if holder == self.identity {
            return true;
        }
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match seen {
            Some((known, since)) if *known == version => *since,
            _ => seen.insert((version, now)).1,
        };
        let seconds = spec.and_then(|spec| spec.lease_duration_seconds).and_then(|s| u64::try_from(s).ok());
        now.duration_since(since) >= seconds.map_or(LEASE_DURATION, Duration::from_secs)
    }

    /// Renews until the term is over.
    async fn keep(&self, term: &mut Term) {
        loop {
            tokio::select! {
                biased;
                () = sleep_until(term.until) => return,
                () = sleep(RETRY) => {}
            }
            let started = Instant::now();
            // An answer that comes after the term is of no use.
            match timeout_at(term.until, self.renew(&term.lease)).await {
                Ok(Ok(Some(lease))) => *term = Term { lease, until: started + RENEW_WITHIN },
                Ok(Ok(None)) | Err(_) => return,
                Ok(Err(error)) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the lease is not renewed");
                }
            }
        }
    }

    /// The renewed lease; `None` when it is somebody else's now.
    async fn renew(&self, lease: &Lease) -> Result<Option<Lease>, kube::Error> {
        let renewed = |lease: &Lease| Lease { spec: Some(self.spec(lease.spec.as_ref())), ..lease.clone() };
        match self.write(renewed(lease)).await {
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(None),
            written => return written.map(Some),
        }
        // Changed by somebody who did not take it, as by an annotation; or by ourselves, and the answer was lost.
        let now = self.api.get_opt(&self.name).await?;
        let ours =
            |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_ref()) == Some(&self.identity);
        match now.filter(ours) {
            Some(lease) => self.write(renewed(&lease)).await.map(Some),
            None => Ok(None),
        }
    }

    /// Lets the next one lead at once.
    async fn release(&self, term: Term) {
        let mut lease = term.lease;
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
        }
        let until = Instant::now() + RELEASE_WITHIN;
        // Whoever cannot give it back loses it in time.
        let _ = timeout_at(until.min(term.until), self.write(lease)).await;
    }

    async fn write(&self, lease: Lease) -> Result<Lease, kube::Error> {
        self.api.replace(&self.name, &PostParams::default(), &lease).await
    }

    /// What a lease says that is ours, `before` being what it said.
    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = Timestamp::try_from(self.clock.now()).ok().map(MicroTime);
        let before = before.cloned().unwrap_or_default();
        let same = before.holder_identity.as_ref() == Some(&self.identity);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
            acquire_time: if same { before.acquire_time } else { now.clone() },
            renew_time: now,
            lease_transitions: Some(before.lease_transitions.unwrap_or(0) + i32::from(!same)),
            ..LeaseSpec::default()
        }
    }
}
