//! Deletes requests that have served: those of this process as each attempt ends, and orphans, which an agent that was
//! killed left behind on this node.
//!
//! An attempt holds a [`Removal`], whose drop asks for the deletion, so that a caller who hangs up and a stop leave nothing
//! behind either. What does not fit into the queue, and what the API server does not take at once, is an orphan later.
//! Only requests of this node's agent are deleted: the API server wrote down who made each.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use kube::Client;
use rand::Rng as _;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{APPROVAL_TIMEOUT, CREATE_TIMEOUT, SIGNING_TIMEOUT, api::CsrApi, failure::ApiError};
use crate::{
    clock::Clock,
    kubernetes::{ANSWER_WITHIN, Identity, extra, label, node_label},
    metrics::Metrics,
};

/// Requests that wait for their deletion; one more becomes an orphan.
pub(super) const MAX_WAITING: usize = 1024;
/// Deletions under way at once.
pub(super) const MAX_AT_ONCE: usize = 16;
/// A request of this age belongs to no attempt, of whichever process, with clocks that differ by minutes.
pub const ORPHAN_AGE: Duration = Duration::from_secs(600);
/// Longest time between two looks for orphans; the shortest is half of it.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1800);
/// How long deletions may go on after the stop, those of attempts that it gives up included.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(7);

const _: () = {
    let attempt = CREATE_TIMEOUT.as_secs() + APPROVAL_TIMEOUT.as_secs() + SIGNING_TIMEOUT.as_secs();
    assert!(attempt + 5 * 60 < ORPHAN_AGE.as_secs());
};

/// Where requests are handed in to be deleted; clones share the queue.
#[derive(Clone, Debug)]
pub struct Cleaner(mpsc::Sender<Doomed>);

/// A request to delete.
#[derive(Debug)]
struct Doomed {
    name: String,
    /// Unless the creation was never answered.
    uid: Option<String>,
}

/// Deletes the request that it was made for when it is dropped.
pub(super) struct Removal {
    cleaner: Cleaner,
    doomed: Option<Doomed>,
}

impl Cleaner {
    /// The queue, and what works it off until `stop` and then until all clones of it are gone, but no longer than
    /// `STOP_GRACE`. It looks for orphans of `agent` on `node` at once and then every now and then.
    pub fn new(
        client: Client,
        agent: Identity,
        node: String,
        clock: Clock,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (queue, doomed) = mpsc::channel(MAX_WAITING);
        let work = Arc::new(Work { api: CsrApi::new(client, metrics), agent, node, clock });
        (Self(queue), work.run(doomed, stop))
    }

    pub(super) fn removal_of(&self, name: &str) -> Removal {
        Removal { cleaner: self.clone(), doomed: Some(Doomed { name: name.to_owned(), uid: None }) }
    }
}

impl Removal {
    /// The request was created with this UID; another one of its name is not ours.
    pub(super) fn only(&mut self, uid: &str) {
        if let Some(doomed) = &mut self.doomed {
            doomed.uid = Some(uid.to_owned());
        }
    }

    /// There is nothing to delete if the creation failed for certain.
    pub(super) fn unless_created(&mut self, error: &ApiError) {
        if !error.is_in_doubt() {
            self.doomed = None;
        }
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        if let Some(doomed) = self.doomed.take()
            && let Err(error) = self.cleaner.0.try_send(doomed)
        {
            let name = match error {
                mpsc::error::TrySendError::Full(doomed) | mpsc::error::TrySendError::Closed(doomed) => doomed.name,
            };
            tracing::warn!(name, "a CertificateSigningRequest is left for the next look for orphans");
        }
    }
}

struct Work {
    api: CsrApi,
    agent: Identity,
    node: String,
    clock: Clock,
}

type Deletions = FuturesUnordered<BoxFuture<'static, ()>>;

impl Work {
    async fn run(self: Arc<Self>, mut queue: mpsc::Receiver<Doomed>, stop: CancellationToken) {
        let mut under_way = Deletions::new();
        let mut sweep = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(doomed) = queue.recv(), if under_way.len() < MAX_AT_ONCE => under_way.push(self.delete(doomed)),
                Some(()) = under_way.next(), if !under_way.is_empty() => {}
                () = sleep_until(sweep) => {
                    sweep = Instant::now() + SWEEP_INTERVAL.mul_f64(rand::rng().random_range(0.5..1.0));
                    under_way.push(self.clone().sweep().boxed());
                }
            }
        }
        let rest = async {
            while let Some(doomed) = queue.recv().await {
                under_way.push(self.delete(doomed));
                while under_way.len() >= MAX_AT_ONCE {
                    under_way.next().await;
                }
            }
            while under_way.next().await.is_some() {}
        };
        if timeout(STOP_GRACE, rest).await.is_err() {
            tracing::warn!("CertificateSigningRequests are left for the next agent on this node to delete");
        }
    }

    fn delete(&self, doomed: Doomed) -> BoxFuture<'static, ()> {
        delete(self.api.clone(), doomed).map(drop).boxed()
    }

    /// Deletes what no attempt can still wait for, page by page.
    async fn sweep(self: Arc<Self>) {
        let labels = format!("{}={},{}={}", label::MANAGED_BY, label::MANAGER, label::NODE, node_label(&self.node));
        let (mut deleted, mut begun_with, mut after) = (0, 0, None);
        loop {
            let again = after.is_some() && deleted > begun_with;
            let page = match self.api.list(&labels, after, Instant::now() + ANSWER_WITHIN).await {
                Ok(page) => page,
                // A place in a list is kept for some minutes only. What was before it is gone, so begin again.
                Err(_) if again => {
                    (begun_with, after) = (deleted, None);
                    continue;
                }
                Err(error) => {
                    tracing::warn!(reason = error.reason(), %error, "cannot look for orphaned CertificateSigningRequests");
                    break;
                }
            };
            for orphan in page.items.into_iter().filter(|csr| self.is_orphan(csr)) {
                let (name, uid) = (orphan.metadata.name.unwrap_or_default(), orphan.metadata.uid);
                deleted += usize::from(delete(self.api.clone(), Doomed { name, uid }).await);
            }
            after = page.metadata.continue_.filter(|token| !token.is_empty());
            if after.is_none() {
                break;
            }
        }
        if deleted > 0 {
            tracing::info!(
                deleted,
                "deleted CertificateSigningRequests that an earlier agent of this node left behind"
            );
        }
    }

    /// Whether this node's agent made it, so long ago that no attempt waits for it.
    fn is_orphan(&self, csr: &CertificateSigningRequest) -> bool {
        let spec = &csr.spec;
        let node = spec.extra.as_ref().and_then(|values| values.get(extra::NODE_NAME)).map(Vec::as_slice);
        let ours = spec.username.as_ref() == Some(&self.agent.username)
            && node == self.agent.node.as_ref().map(std::slice::from_ref);
        let made = csr.metadata.creation_timestamp.as_ref().map(|made| made.0.into());
        let age = made.and_then(|made| self.clock.now().duration_since(made).ok());
        ours && age.is_some_and(|age| age >= ORPHAN_AGE)
    }
}

/// Whether it is gone; if not, says why.
async fn delete(api: CsrApi, Doomed { name, uid }: Doomed) -> bool {
    let deleted = api.delete(&name, uid, Instant::now() + ANSWER_WITHIN).await;
    if let Err(error) = &deleted {
        tracing::warn!(name, reason = error.reason(), %error, "a CertificateSigningRequest could not be deleted");
    }
    deleted.is_ok()
}
