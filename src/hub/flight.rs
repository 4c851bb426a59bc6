//! The hub's body: starts flights in order, takes them in, and wakes when something is due.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_stream::{StreamExt as _, StreamMap, wrappers::WatchStream};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{FLIGHT_TIMEOUT, Hub, HubError, MAX_SLEEP, STOP_GRACE, Step, entry::Flight};
use crate::{
    account::{Account, Line, Principal},
    attest::{Pods, Workload},
    issue::{self, Credential},
    metrics::Metrics,
    policy::Grant,
    signer::Stage,
    telemetry::{self, with_causes},
    x509::Bundle,
};

/// Flights under way, and whose they are.
#[derive(Default)]
struct Flights {
    tasks: JoinSet<Result<Credential, HubError>>,
    owners: HashMap<Id, Owner>,
}

/// Whose a flight is, and for what; its entry may be gone, or granted something else, when it lands.
struct Owner {
    id: u128,
    principal: Principal,
    grant: Grant,
}

impl Hub {
    /// Runs until `stop`, then lets flights under way land within [`STOP_GRACE`].
    pub async fn run(self, stop: CancellationToken) {
        let mut flights = Flights::default();
        let mut policies = self.0.policies.clone();
        let mut pods = self.0.pods.as_ref().map(Pods::changed);
        let mut jumps = self.0.clock.jumps();
        let mut bundles = StreamMap::new();
        for (name, signer) in &self.0.signers {
            bundles.insert(name.clone(), WatchStream::from_changes(signer.sign.bundle()));
        }
        loop {
            let wait = self.start(&mut flights);
            tokio::select! {
                () = stop.cancelled() => break,
                Some(landed) = flights.tasks.join_next_with_id() => self.land(&mut flights.owners, landed),
                Ok(()) = policies.changed() => self.sweep(),
                () = pods_changed(&mut pods) => self.sweep(),
                Some((signer, bundle)) = bundles.next() => self.bundle_changed(&signer, &bundle),
                () = self.0.wake.notified() => {}
                () = jumps.next() => tracing::info!("the clock has jumped; what is due is looked at again"),
                () = sleep(wait) => {
                    let mut state = self.lock();
                    state.fire(self.0.clock.now());
                    self.publish_gauges(&state);
                }
            }
        }
        let land_all = async {
            while let Some(landed) = flights.tasks.join_next_with_id().await {
                self.land(&mut flights.owners, landed);
            }
        };
        if timeout(STOP_GRACE, land_all).await.is_err() {
            tracing::warn!(flights = flights.tasks.len(), "issuances were given up at the stop");
        }
    }

    /// Starts what may start now; returns how long to sleep if nothing else happens.
    fn start(&self, flights: &mut Flights) -> Duration {
        let mut state = self.lock();
        let mut wait = MAX_SLEEP;
        loop {
            match state.queue.pop(self.0.clock.now()) {
                Ok(Some(id)) => {
                    let entry = state.entries.get_mut(&id).expect("only entries that are held are queued");
                    entry.flight = Flight::UnderWay;
                    let (principal, grant) = (entry.workload.principal(), entry.grant.clone());
                    let task = flights.tasks.spawn(self.flight(entry));
                    flights.owners.insert(task.id(), Owner { id, principal, grant });
                }
                Ok(None) => break,
                Err(until_token) => {
                    wait = until_token;
                    break;
                }
            }
        }
        self.publish_gauges(&state);
        match state.first_due() {
            Some(due) => wait.min(self.0.clock.until(due)),
            None => wait,
        }
    }

    /// One attempt for `entry`, as a future that owns all it needs.
    fn flight(&self, entry: &mut super::entry::Entry) -> impl Future<Output = Result<Credential, HubError>> + use<> {
        let signer = self.signer(&entry.grant).map(|signer| (signer.sign.clone(), signer.metrics.clone()));
        let (workload, grant, clock) = (entry.workload.clone(), entry.grant.clone(), self.0.clock.clone());
        let csr = entry.held.as_ref().map(|held| held.csr.clone());
        let renewal = entry.snapshot.borrow().live().is_some();
        let span = if renewal {
            telemetry::renew_span(entry.origin.as_ref())
        } else {
            entry.span.take().unwrap_or_else(tracing::Span::none)
        };
        entry.trace = span.in_scope(telemetry::current);
        let progress = entry.progress.take();
        let (metrics, account) = (self.0.metrics.clone(), self.0.account.clone());
        let flight = async move {
            let (signer, signer_metrics) = signer?;
            let told = move |stage: Stage| {
                if let Some(progress) = &progress {
                    progress(Step::Signer(stage));
                }
            };
            let began = Instant::now();
            let attempt = issue::issue(&*signer, &clock, &workload, grant, csr, &told);
            let outcome = match timeout(FLIGHT_TIMEOUT, attempt).await {
                Ok(outcome) => outcome.map_err(|error| HubError::Issue(Arc::new(error))),
                Err(_) => Err(HubError::TimedOut),
            };
            match &outcome {
                Ok(_) => signer_metrics.issued(began.elapsed()),
                Err(error) => signer_metrics.failed(error.reason(), began.elapsed()),
            }
            report(&account, &workload, signer.name(), renewal.then_some(&metrics), &outcome);
            outcome
        };
        flight.instrument(span)
    }

    fn land(&self, owners: &mut HashMap<Id, Owner>, landed: Result<(Id, Result<Credential, HubError>), JoinError>) {
        let (task, outcome) = match landed {
            Ok(landed) => landed,
            // A panic in one attempt is a fault of ours; it must not take the other workloads' certificates with it.
            Err(lost) => {
                tracing::error!(error = %lost, "an issuance was lost");
                (lost.id(), Err(HubError::Lost))
            }
        };
        let Some(Owner { id, principal, grant }) = owners.remove(&task) else { return };
        let mut state = self.lock();
        state.queue.landed(principal);
        // Policies or the workload may have changed a moment ago, and the sweep that this called for be still to come.
        if let Some(lost) = self.revise(&mut state, id) {
            tracing::info!(reason = lost.reason(), "a credential lost its right");
        }
        // The roots of now, not of the signing: a change between the two has no event of its own for this entry.
        let outcome = outcome.and_then(|credential| {
            let bundle = self.signer(credential.grant())?.sign.bundle().borrow().clone();
            Ok((credential, bundle))
        });
        state.landed(id, &grant, outcome, self.0.clock.now());
        self.publish_gauges(&state);
    }

    /// Decides again on every entry of which the policies in force or the workload have changed.
    fn sweep(&self) {
        let mut state = self.lock();
        for id in state.entries.keys().copied().collect::<Vec<_>>() {
            let principal = state.entries.get(&id).map(|entry| entry.workload.principal());
            if let Some(lost) = self.revise(&mut state, id)
                && let Some(Line { left_out }) = principal.and_then(|principal| self.0.account.line(principal))
            {
                tracing::info!(reason = lost.reason(), left_out, "a credential lost its right");
            }
        }
        self.publish_gauges(&state);
    }

    fn bundle_changed(&self, signer: &str, bundle: &Arc<Bundle>) {
        tracing::info!(signer, roots = bundle.roots().len(), "trust bundle changed");
        self.lock().bundle_changed(signer, bundle, self.0.clock.now());
    }
}

/// Resolves when a pod has changed, if there are pods.
async fn pods_changed(pods: &mut Option<watch::Receiver<u64>>) {
    let Some(pods) = pods else { return std::future::pending().await };
    // The hub holds the pods, so they do not go away before it.
    let _ = pods.changed().await;
}

/// Logs how a flight ended, within its span, and counts it if it was a renewal.
fn report(
    account: &Account,
    workload: &Workload,
    signer: &str,
    renewal: Option<&Metrics>,
    outcome: &Result<Credential, HubError>,
) {
    if let (Ok(_), Some(metrics)) = (outcome, renewal) {
        metrics.renewals.good();
    } else if let (Err(error), Some(metrics)) = (outcome, renewal) {
        metrics.renewals.bad(error.reason());
    }
    let Some(Line { left_out }) = account.line(workload.principal()) else { return };
    match (outcome, renewal.is_some()) {
        (Ok(_), false) => tracing::info!(%workload, signer, left_out, "certificate issued"),
        (Ok(_), true) => tracing::info!(%workload, signer, left_out, "certificate renewed"),
        (Err(error), false) => {
            let (reason, error) = (error.reason(), with_causes(error));
            tracing::warn!(%workload, signer, reason, error, left_out, "not issued");
        }
        (Err(error), true) => {
            let (reason, error) = (error.reason(), with_causes(error));
            tracing::warn!(%workload, signer, reason, error, left_out, "not renewed; the old certificate stays");
        }
    }
}
