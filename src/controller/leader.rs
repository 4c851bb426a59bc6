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

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, Mutex},
        time::SystemTime,
    };

    use http::{Method, Request, Response, StatusCode};
    use http_body_util::Full;
    use kube::client::Body;
    use tokio::{
        sync::watch,
        task::JoinHandle,
        time::{advance, timeout},
    };

    use super::*;

    /// An API server that has one Lease, and answers as long as it is not silent.
    #[derive(Clone, Default)]
    struct Server(Arc<Mutex<Stored>>);

    #[derive(Default)]
    struct Stored {
        lease: Option<Lease>,
        version: u64,
        silent: bool,
    }

    impl Server {
        fn client(&self) -> Client {
            let server = self.clone();
            let service = tower::service_fn(move |request: Request<Body>| {
                let server = server.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect_bytes().await.unwrap();
                    if server.0.lock().unwrap().silent {
                        std::future::pending::<()>().await;
                    }
                    Ok::<_, Infallible>(server.answer(&head.method, &body))
                }
            });
            Client::new(service, "default")
        }

        fn answer(&self, method: &Method, body: &[u8]) -> Response<Full<bytes::Bytes>> {
            let mut stored = self.0.lock().unwrap();
            let held = stored.lease.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
            let sent = || serde_json::from_slice::<Lease>(body).unwrap();
            let (code, reason) = match (method, &held) {
                (&Method::GET | &Method::PUT, None) => (StatusCode::NOT_FOUND, "NotFound"),
                (&Method::POST, Some(_)) => (StatusCode::CONFLICT, "AlreadyExists"),
                (&Method::PUT, held) if sent().metadata.resource_version != *held => (StatusCode::CONFLICT, "Conflict"),
                _ => (StatusCode::OK, ""),
            };
            let body = if code != StatusCode::OK {
                let status = serde_json::json!({"status": "Failure", "code": code.as_u16(), "reason": reason});
                status.to_string()
            } else {
                if method != Method::GET {
                    stored.version += 1;
                    let mut lease = sent();
                    lease.metadata.resource_version = Some(stored.version.to_string());
                    stored.lease = Some(lease);
                }
                serde_json::to_string(&stored.lease).unwrap()
            };
            Response::builder().status(code).body(Full::from(body)).unwrap()
        }

        fn be_silent(&self, silent: bool) {
            self.0.lock().unwrap().silent = silent;
        }

        fn holder(&self) -> Option<String> {
            self.0.lock().unwrap().lease.clone()?.spec?.holder_identity
        }

        fn transitions(&self) -> Option<i32> {
            self.0.lock().unwrap().lease.clone()?.spec?.lease_transitions
        }
    }

    /// A replica whose own time runs with the test's, its wall clock `behind`.
    struct Replica {
        leads: watch::Receiver<bool>,
        stop: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Replica {
        fn start(server: &Server, identity: &str, behind: Duration) -> Self {
            let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000) - behind);
            let election = Election::new(server.client(), "default", "lease", identity.to_owned(), clock);
            let (stop, (leading, leads)) = (CancellationToken::new(), watch::channel(false));
            let task = tokio::spawn(election.run(stop.clone(), move || {
                leading.send_replace(true);
                let leading = Leading(leading.clone());
                async move {
                    let _leading = leading;
                    std::future::pending().await
                }
            }));
            Self { leads, stop, task }
        }

        fn leads(&self) -> bool {
            *self.leads.borrow()
        }

        async fn becomes(&mut self, leader: bool) {
            self.leads.wait_for(|leads| *leads == leader).await.unwrap();
        }
    }

    struct Leading(watch::Sender<bool>);

    impl Drop for Leading {
        fn drop(&mut self) {
            self.0.send_replace(false);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_and_another_takes_over_only_after_it_saw_no_renewal_for_the_whole_lease() {
        let server = Server::default();
        let mut first = Replica::start(&server, "first", Duration::ZERO);
        first.becomes(true).await;
        let mut second = Replica::start(&server, "second", Duration::ZERO);
        tokio::time::sleep(10 * LEASE_DURATION).await;
        assert!(first.leads() && !second.leads());
        first.task.abort();
        let died = Instant::now();
        second.becomes(true).await;
        assert!(died.elapsed() >= LEASE_DURATION - RETRY && died.elapsed() <= LEASE_DURATION + 2 * RETRY);
        assert_eq!((server.holder().as_deref(), server.transitions()), (Some("second"), Some(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn clocks_that_differ_change_nothing() {
        let server = Server::default();
        let mut first = Replica::start(&server, "first", Duration::from_secs(3600));
        first.becomes(true).await;
        let second = Replica::start(&server, "second", Duration::ZERO);
        tokio::time::sleep(10 * LEASE_DURATION).await;
        assert!(first.leads() && !second.leads());
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_hears_nothing_stops_before_another_may_lead() {
        let server = Server::default();
        let mut leader = Replica::start(&server, "first", Duration::ZERO);
        leader.becomes(true).await;
        tokio::time::sleep(RETRY / 2).await;
        server.be_silent(true);
        let silent = Instant::now();
        timeout(10 * LEASE_DURATION, leader.becomes(false)).await.unwrap();
        assert!(silent.elapsed() <= RENEW_WITHIN && RENEW_WITHIN < LEASE_DURATION, "{:?}", silent.elapsed());
        assert_eq!(server.holder().as_deref(), Some("first"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_taken_by_another_ends_the_term_at_the_next_renewal() {
        let server = Server::default();
        let mut leader = Replica::start(&server, "first", Duration::ZERO);
        leader.becomes(true).await;
        {
            let mut stored = server.0.lock().unwrap();
            let lease = stored.lease.as_mut().unwrap();
            lease.metadata.resource_version = Some("x".into());
            lease.spec.as_mut().unwrap().holder_identity = Some("another".into());
        }
        let taken = Instant::now();
        leader.becomes(false).await;
        assert!(taken.elapsed() <= RETRY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_takes_nothing_leaves_the_leader_in_its_place() {
        let server = Server::default();
        let mut leader = Replica::start(&server, "first", Duration::ZERO);
        leader.becomes(true).await;
        server.0.lock().unwrap().lease.as_mut().unwrap().metadata.resource_version = Some("x".into());
        tokio::time::sleep(3 * LEASE_DURATION).await;
        assert!(leader.leads());
        assert_eq!(server.transitions(), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_gives_the_lease_back_and_the_next_one_leads_at_its_next_look() {
        let server = Server::default();
        let mut first = Replica::start(&server, "first", Duration::ZERO);
        first.becomes(true).await;
        let mut second = Replica::start(&server, "second", Duration::ZERO);
        advance(RETRY).await;
        first.stop.cancel();
        first.task.await.unwrap();
        let given_back = Instant::now();
        second.becomes(true).await;
        assert!(given_back.elapsed() <= RETRY);
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_that_stand_at_once_one_leads() {
        let server = Server::default();
        let replicas: Vec<_> = (0..8).map(|at| Replica::start(&server, &format!("r{at}"), Duration::ZERO)).collect();
        for _ in 0..20 {
            tokio::time::sleep(RETRY).await;
            assert_eq!(replicas.iter().filter(|replica| replica.leads()).count(), 1);
        }
    }
}
