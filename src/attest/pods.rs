//! Pods as the API server tells them: from a pod's UID to a [`Workload`].
//!
//! A reflector of the pods of one node, or of the cluster, with the labels of their namespaces and, while a policy needs
//! them, the Services that select them. Kept is what policy may ask for and no more. What is known stays while the API
//! server is away; what has vanished is gone after the next list. A pod is live from when a node has it until it has
//! ended (Succeeded, Failed), is deleted, or is long past the end of its grace period.
//!
//! An object with more than is read of it ([`kubernetes`](crate::kubernetes)'s bounds) counts as none: its pod is refused
//! with that reason, its Service selects nothing. Of more Services than [`MAX_SERVICES`] the namespace with the most goes
//! without its last.
//!
//! Labels and addresses are facts because the API server says them, which lets only whoever may change the pod set
//! them. Deliberately not a fact: anything about containers, which a controller could not see again.

mod pod;
mod services;
mod state;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client, core::PartialObjectMeta, runtime::watcher};
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

pub use self::services::{MAX_MEMBERS, MAX_POD_SERVICES, MAX_SERVICES};
use self::state::{Found, State};
#[cfg(any(test, feature = "testing"))]
use super::PodFacts;
use super::{AttestError, Workload, cgroup::InPod, shares::Shares};
#[cfg(any(test, feature = "testing"))]
use crate::kubernetes::watch::Change;
use crate::{
    clock::Clock,
    kubernetes::{Lag, MAX_NAMESPACE_BYTES, MAX_POD_BYTES, MAX_SERVICE_BYTES, MAX_SLICE_BYTES, page, watch::follow},
};

/// How long a call of a pod that is not known yet waits to become known.
pub const POD_WAIT: Duration = Duration::from_secs(5);
/// Calls that may wait so; one more is told at once to come back.
pub const MAX_WAITING: usize = 1024;
/// Of these, calls that may wait for one pod.
pub const MAX_WAITING_PER_POD: usize = MAX_WAITING / 4;
/// How soon Services that found no room are looked for again once there is some.
pub const RELIST_PAUSE: Duration = Duration::from_secs(60);
/// How long past its grace period a pod that is still being deleted counts as live; as long as the API server accepts
/// its tokens.
pub const DELETION_LEEWAY: Duration = Duration::from_secs(60);

/// Which pods are followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Those of the node of that name.
    Node(String),
    /// All of the cluster.
    Cluster,
}

/// Live pods; clones share them.
#[derive(Clone)]
pub struct Pods(Arc<Shared>);

struct Shared {
    scope: Scope,
    clock: Clock,
    state: Mutex<State>,
    /// Grows with every change of a fact, and when all has been listed.
    generation: watch::Sender<u64>,
    services: watch::Sender<bool>,
    lag: Lag,
    waiting: Semaphore,
    shares: Shares,
}

impl Pods {
    /// No pods yet; [`Pods::run`] follows them.
    pub fn new(scope: Scope, clock: Clock) -> Self {
        Self(Arc::new(Shared {
            scope,
            clock,
            state: Mutex::default(),
            generation: watch::Sender::new(0),
            services: watch::Sender::new(false),
            lag: Lag::default(),
            waiting: Semaphore::new(MAX_WAITING),
            shares: Shares::new(MAX_WAITING_PER_POD),
        }))
    }

    /// The live pod of that UID.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        self.lock().by_uid(uid, self.0.clock.now())
    }

    /// The live pod of that UID, waiting for it up to [`POD_WAIT`], if fewer than [`MAX_WAITING`] wait already, and
    /// fewer than [`MAX_WAITING_PER_POD`] for it.
    pub async fn wait_for(&self, uid: &str) -> Option<Arc<Workload>> {
        self.wait(uid, |state| state.by_uid(uid, self.0.clock.now())).await
    }

    /// The pod of a process in that cgroup, waiting as [`Pods::wait_for`] does.
    pub(super) async fn of_process(&self, process: &InPod) -> Result<Arc<Workload>, AttestError> {
        let look = |state: &State| match state.of_process(process, self.0.clock.now()) {
            Found::Live(workload) => Some(Ok(workload)),
            Found::Contradiction => Some(Err(AttestError::PodContradicted { uid: process.uid.clone() })),
            Found::Beyond => Some(Err(AttestError::PodTooLarge { uid: process.uid.clone() })),
            Found::Nothing => None,
        };
        self.wait(&process.uid, look).await.unwrap_or_else(|| Err(self.unknown(&process.uid)))
    }

    /// Whether the pod of that UID, or its namespace, is known to have more than is read of one.
    pub fn is_beyond(&self, uid: &str) -> bool {
        self.lock().is_beyond(uid)
    }

    /// That no live pod has that UID, and why.
    pub(super) fn unknown(&self, uid: &str) -> AttestError {
        if self.is_beyond(uid) {
            return AttestError::PodTooLarge { uid: uid.to_owned() };
        }
        let why = self.ready().err().unwrap_or_else(|| format!("no live pod of {} has it", self.0.scope));
        AttestError::PodUnknown { uid: uid.to_owned(), why }
    }

    /// Whether everything that policies ask for has been listed. Stays so while the API server is away.
    pub fn synced(&self) -> bool {
        self.lock().synced()
    }

    /// Whether pods can be told, or what is missing and why.
    ///
    /// # Errors
    /// What has not been listed yet, with the API server's last word on it.
    pub fn ready(&self) -> Result<(), String> {
        self.lock().ready()
    }

    /// Whether what is told of pods may be old.
    pub fn lag(&self) -> &Lag {
        &self.0.lag
    }

    /// Tells of every change of a live pod's facts.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }

    /// Says whether the policies in force ask for the Services of a pod. Until this has been said no pod is known,
    /// because what a policy would make of it is not.
    pub fn want_services(&self, want: bool) {
        let changed = self.lock().want_services(want);
        self.0.services.send_replace(want);
        self.touch(changed);
    }

    /// Resolves when [`Pods::synced`].
    pub async fn until_synced(&self) {
        let mut changes = self.changed();
        while !self.synced() && changes.changed().await.is_ok() {}
    }

    /// Follows the cluster until `stop`.
    pub async fn run(self, client: Client, stop: CancellationToken) {
        let config = match &self.0.scope {
            // In one piece: a server without a cache for pages would read every pod of the cluster for each of them.
            Scope::Node(node) => watcher::Config {
                page_size: None,
                field_selector: Some(format!("spec.nodeName={node}")),
                ..watcher::Config::default()
            },
            Scope::Cluster => watcher::Config::default().page_size(page(MAX_POD_BYTES)),
        };
        let lag = self.lag();
        let pods = follow(Api::<pod::Pod>::all(client.clone()), config, lag.backoff(), state::read_pod, |change| {
            self.apply(|state| state.pods(change))
        });
        let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let paged = watcher::Config::default().page_size(page(MAX_NAMESPACE_BYTES));
        let namespaces = follow(namespaces, paged, lag.backoff(), state::read_namespace, |change| {
            self.apply(|state| state.namespaces(change))
        });
        let all = async { tokio::join!(pods, namespaces, self.follow_services(client)) };
        stop.run_until_cancelled(all).await;
    }

    /// Follows Services and EndpointSlices while they are wanted.
    async fn follow_services(&self, client: Client) {
        let mut wanted = self.0.services.subscribe();
        loop {
            let _ = wanted.wait_for(|wanted| *wanted).await;
            let lag = self.lag();
            let paged = watcher::Config::default().page_size(page(MAX_SERVICE_BYTES));
            let services = Api::<Service>::all(client.clone());
            let services = follow(services, paged, lag.backoff(), services::read_service, |change| {
                self.apply(|state| state.services(|services| services.services(change)))
            });
            // Those of Services with a selector say nothing that the selector does not, and are most of them.
            let by_hand = watcher::Config::default().page_size(page(MAX_SLICE_BYTES)).labels(services::NOT_BY_SELECTOR);
            let slices = Api::<EndpointSlice>::all(client.clone());
            let slices = follow(slices, by_hand, lag.backoff(), services::read_slice, |change| {
                self.apply(|state| state.services(|services| services.slices(change)))
            });
            tokio::select! {
                _ = wanted.wait_for(|wanted| !*wanted) => {}
                _ = async { tokio::join!(services, slices) } => {}
                () = self.room_for_services() => {}
            }
        }
    }

    /// Resolves when a new list would find Services that the last one had no room for.
    async fn room_for_services(&self) {
        loop {
            sleep(RELIST_PAUSE).await;
            if self.lock().wants_services_again() {
                return;
            }
        }
    }

    fn apply(&self, change: impl FnOnce(&mut State) -> bool) {
        let changed = change(&mut self.lock());
        self.touch(changed);
    }

    fn touch(&self, changed: bool) {
        if changed {
            self.0.generation.send_modify(|generation| *generation += 1);
        }
    }

    async fn wait<T>(&self, uid: &str, look: impl Fn(&State) -> Option<T>) -> Option<T> {
        let mut changes = self.changed();
        if let Some(found) = look(&self.lock()) {
            return Some(found);
        }
        let share = self.0.shares.of(uid);
        let _own = share.try_acquire().ok()?;
        let _place = self.0.waiting.try_acquire().ok()?;
        let appears = async {
            loop {
                changes.changed().await.ok()?;
                if let Some(found) = look(&self.lock()) {
                    return Some(found);
                }
            }
        };
        timeout(POD_WAIT, appears).await.ok()?
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no code panics while it holds the pods")
    }
}

impl fmt::Debug for Pods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pods").field("scope", &self.0.scope).finish_non_exhaustive()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(node) => write!(f, "node {node}"),
            Self::Cluster => f.write_str("the cluster"),
        }
    }
}

/// Pods that nobody follows, for tests of what stands on them.
#[cfg(any(test, feature = "testing"))]
impl Pods {
    /// As after a list of these pods and of their namespaces, which have the labels of the last pod in each.
    pub fn list_for_test(&self, pods: Vec<PodFacts>) {
        let namespaces = pods.iter().map(|pod| (pod.namespace.clone(), Some(pod.namespace_labels.clone()))).collect();
        self.apply(|state| state.namespaces(Change::All(namespaces)));
        self.apply(|state| state.pods(Change::All(pods.into_iter().map(state::Reported::live).collect())));
        self.want_services(false);
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use futures_util::poll;
    use tokio::time::Instant;

    use super::*;

    fn pods() -> Pods {
        Pods::new(Scope::Node("n1".to_owned()), Clock::paused(SystemTime::UNIX_EPOCH))
    }

    fn pod(uid: &str) -> PodFacts {
        PodFacts {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            uid: uid.to_owned(),
            service_account: "web".to_owned(),
            node: "n1".to_owned(),
            labels: Default::default(),
            namespace_labels: Default::default(),
            ips: Vec::new(),
            services: Default::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_not_known_yet_is_waited_for_so_long_and_no_longer() {
        let pods = pods();
        pods.list_for_test(vec![pod("u1")]);
        let later = pods.clone();
        tokio::spawn(async move {
            sleep(POD_WAIT - Duration::from_millis(1)).await;
            later.list_for_test(vec![pod("u1"), pod("u2")]);
        });
        let began = Instant::now();
        assert!(pods.wait_for("u2").await.is_some());
        assert_eq!(began.elapsed(), POD_WAIT - Duration::from_millis(1));
        let process = InPod { uid: "u3".to_owned(), container: "c".to_owned() };
        let error = pods.of_process(&process).await.unwrap_err();
        assert_eq!(began.elapsed(), 2 * POD_WAIT - Duration::from_millis(1));
        let said = "the caller is in a pod with UID \"u3\", which is not known: no live pod of node n1 has it";
        assert_eq!((error.to_string().as_str(), error.is_transient()), (said, true));
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_calls_wait_for_one_pod_and_for_all_and_one_more_is_told_to_come_back() {
        let (pods, uids) = (pods(), ["u1", "u2", "u3", "u4"]);
        let mut waiting = Vec::new();
        for uid in uids {
            for _ in 0..MAX_WAITING_PER_POD {
                let mut call = Box::pin(pods.wait_for(uid));
                assert!(poll!(&mut call).is_pending());
                waiting.push(call);
            }
            let began = Instant::now();
            assert!(pods.wait_for(uid).await.is_none() && began.elapsed().is_zero(), "one past the pod's share");
        }
        let began = Instant::now();
        assert!(pods.wait_for("u5").await.is_none() && began.elapsed().is_zero(), "one past the bound");
        pods.list_for_test(uids.map(pod).into());
        assert!(pods.wait_for("u1").await.is_some(), "what is known needs no place");
        for call in waiting {
            assert!(call.await.is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn before_anything_is_listed_that_is_the_reason() {
        let process = InPod { uid: "u1".to_owned(), container: "c".to_owned() };
        let error = pods().of_process(&process).await.unwrap_err();
        assert!(error.to_string().ends_with("which is not known: policies have not been read yet"), "{error}");
    }
}
