//! Pods as the API server tells them: from a pod's UID to a [`Workload`].
//!
//! A reflector of the pods of one node, or of the cluster, with the labels of their namespaces and, while a policy needs
//! them, the Services that select them. Kept is what policy may ask for and no more. What is known stays while the API
//! server is away; what has vanished is gone after the next list. A pod is live from when a node has it until it has
//! ended (Succeeded, Failed), is deleted, or is long past the end of its grace period.
//!
//! Labels and addresses are facts because the API server says them, which lets only whoever may change the pod set
//! them. Deliberately not a fact: anything about containers, which a controller could not see again.

mod follow;
mod services;
mod state;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{Api, Client, core::PartialObjectMeta, runtime::watcher};
use tokio::{
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use self::{
    follow::follow,
    state::{Found, State},
};
use super::{AttestError, Workload, cgroup::InPod};
use crate::clock::Clock;

/// How long a call of a pod that is not known yet waits to become known.
pub const POD_WAIT: Duration = Duration::from_secs(5);
/// Calls that may wait so; one more is told at once to come back.
pub const MAX_WAITING: usize = 1024;
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
    waiting: Semaphore,
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
            waiting: Semaphore::new(MAX_WAITING),
        }))
    }

    /// The live pod of that UID.
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        self.lock().by_uid(uid, self.0.clock.now())
    }

    /// The live pod of that UID, waiting for it up to [`POD_WAIT`], if at most [`MAX_WAITING`] wait already.
    pub async fn wait_for(&self, uid: &str) -> Option<Arc<Workload>> {
        self.wait(|state| state.by_uid(uid, self.0.clock.now())).await
    }

    /// The pod of a process in that cgroup, waiting as [`Pods::wait_for`] does.
    pub(super) async fn of_process(&self, process: &InPod) -> Result<Arc<Workload>, AttestError> {
        let look = |state: &State| match state.of_process(process, self.0.clock.now()) {
            Found::Live(workload) => Some(Ok(workload)),
            Found::Contradiction => Some(Err(AttestError::PodContradicted { uid: process.uid.clone() })),
            Found::Nothing => None,
        };
        self.wait(look).await.unwrap_or_else(|| Err(self.unknown(&process.uid)))
    }

    /// That no live pod has that UID, and why.
    pub(super) fn unknown(&self, uid: &str) -> AttestError {
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
            Scope::Cluster => watcher::Config::default(),
        };
        let pods = follow(Api::<Pod>::all(client.clone()), config, state::read_pod, |change| {
            self.apply(|state| state.pods(change))
        });
        let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let namespaces = follow(namespaces, watcher::Config::default(), state::read_namespace, |change| {
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
            let services = Api::<Service>::all(client.clone());
            let services = follow(services, watcher::Config::default(), services::read_service, |change| {
                self.apply(|state| state.services(|services| services.services(change)))
            });
            // Those of Services with a selector say nothing that the selector does not, and are most of them.
            let by_hand = watcher::Config::default().labels(services::NOT_BY_SELECTOR);
            let slices = follow(Api::<EndpointSlice>::all(client.clone()), by_hand, services::read_slice, |change| {
                self.apply(|state| state.services(|services| services.slices(change)))
            });
            tokio::select! {
                _ = wanted.wait_for(|wanted| !*wanted) => {}
                _ = async { tokio::join!(services, slices) } => {}
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

    async fn wait<T>(&self, look: impl Fn(&State) -> Option<T>) -> Option<T> {
        let mut changes = self.changed();
        if let Some(found) = look(&self.lock()) {
            return Some(found);
        }
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
