//! What is known of pods and namespaces, and every change to it, as plain functions: nothing waits in here.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

use k8s_openapi::api::core::v1::{ContainerStatus, Namespace, Pod};
use kube::core::PartialObjectMeta;

use super::{DELETION_LEEWAY, follow::Change, services::Services};
use crate::attest::{Facts, PodFacts, Workload, cgroup::InPod};

/// The kubelet puts it on a pod that shows a static one: the UID by which the kubelet knows that.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

#[derive(Debug, Default)]
pub(super) struct State {
    /// By UID.
    pods: HashMap<String, Known>,
    /// Labels by name.
    namespaces: HashMap<String, BTreeMap<String, String>>,
    /// While they are wanted.
    services: Option<Services>,
    told_pods: Told,
    told_namespaces: Told,
    /// Whether it has been said if Services are wanted.
    decided: bool,
    /// Whether everything has been listed once: before that, no pod is known.
    begun: bool,
}

/// The pods that a change may matter to.
#[derive(Debug)]
pub(super) enum Touched {
    /// None.
    Nothing,
    /// Those of one namespace.
    Namespace(String),
    /// Every one.
    All,
}

/// What has come of one watch.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Whether all has been listed once.
    listed: bool,
    /// Why nothing comes, if nothing does.
    silent: Option<String>,
}

/// A pod with what is known of it beyond its facts.
#[derive(Debug)]
struct Known {
    workload: Arc<Workload>,
    containers: Vec<String>,
    /// UID of the static pod that it shows.
    mirrors: Option<String>,
    /// When it counts as gone, if it is being deleted.
    ends: Option<SystemTime>,
}

/// A pod as the API server reports it.
#[derive(Debug)]
pub(super) struct Reported {
    uid: String,
    /// `None` when it has ended, or is on no node yet.
    live: Option<Live>,
}

#[derive(Debug)]
struct Live {
    facts: PodFacts,
    containers: Vec<String>,
    mirrors: Option<String>,
    ends: Option<SystemTime>,
}

/// What is known of a process by its cgroup.
#[derive(Debug)]
pub(super) enum Found {
    Live(Arc<Workload>),
    /// Its container is another pod's.
    Contradiction,
    /// Nothing, yet.
    Nothing,
}

/// A namespace's name and labels.
pub(super) fn read_namespace(namespace: PartialObjectMeta<Namespace>) -> (String, BTreeMap<String, String>) {
    let metadata = namespace.metadata;
    (metadata.name.unwrap_or_default(), metadata.labels.unwrap_or_default())
}

/// What is kept of a pod.
pub(super) fn read_pod(pod: Pod) -> Reported {
    let (metadata, spec, status) = (pod.metadata, pod.spec.unwrap_or_default(), pod.status.unwrap_or_default());
    let uid = metadata.uid.unwrap_or_default();
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let Some(node) = spec.node_name.filter(|node| !node.is_empty() && !ended) else {
        return Reported { uid, live: None };
    };
    // In the host's network a pod's addresses are the node's.
    let addresses = status.pod_ips.filter(|_| spec.host_network != Some(true)).unwrap_or_default();
    let statuses = [status.container_statuses, status.init_container_statuses, status.ephemeral_container_statuses];
    let facts = PodFacts {
        namespace: metadata.namespace.unwrap_or_default(),
        name: metadata.name.unwrap_or_default(),
        uid: uid.clone(),
        service_account: spec.service_account_name.unwrap_or_default(),
        node,
        labels: metadata.labels.unwrap_or_default(),
        namespace_labels: BTreeMap::new(),
        ips: addresses.iter().filter_map(|address| address.ip.parse().ok()).collect(),
        services: Default::default(),
    };
    let live = Live {
        facts,
        containers: statuses.into_iter().flatten().flatten().filter_map(container_id).collect(),
        mirrors: metadata.annotations.and_then(|mut annotations| annotations.remove(MIRROR_ANNOTATION)),
        // Set to when the grace period ends, not to when it began.
        ends: metadata.deletion_timestamp.map(|time| SystemTime::from(time.0) + DELETION_LEEWAY),
    };
    Reported { uid, live: Some(live) }
}

/// The id out of `containerd://<id>`.
fn container_id(status: ContainerStatus) -> Option<String> {
    Some(status.container_id?.split_once("://")?.1.to_owned())
}

impl State {
    pub(super) fn by_uid(&self, uid: &str, now: SystemTime) -> Option<Arc<Workload>> {
        let known = self.pods.get(uid)?;
        self.is_live(known, now).then(|| Arc::clone(&known.workload))
    }

    /// The pod of a process. The kubelet's word on containers comes late, after a container has begun to run, so a
    /// container that nobody knows is its pod's. A container that is known must be the pod's own.
    ///
    /// A static pod is known by the UID that its mirror claims; whoever may create a pod can claim one, so there the
    /// kubelet must have named the container.
    pub(super) fn of_process(&self, process: &InPod, now: SystemTime) -> Found {
        let by_uid = self.pods.get(&process.uid);
        let owner = self.pods.values().find(|pod| pod.containers.contains(&process.container));
        let known = match (by_uid, owner) {
            (Some(pod), None) => pod,
            (Some(pod), Some(owner)) if std::ptr::eq(pod, owner) => pod,
            (None, Some(owner)) if owner.mirrors.as_ref() == Some(&process.uid) => owner,
            (_, Some(_)) => return Found::Contradiction,
            (None, None) => return Found::Nothing,
        };
        if self.is_live(known, now) { Found::Live(Arc::clone(&known.workload)) } else { Found::Nothing }
    }

    /// A pod whose namespace is not known could match a selector that its labels rule out.
    fn is_live(&self, known: &Known, now: SystemTime) -> bool {
        let Facts::Pod(facts) = known.workload.facts() else { return false };
        self.begun && known.ends.is_none_or(|ends| now < ends) && self.namespaces.contains_key(&facts.namespace)
    }

    pub(super) fn synced(&self) -> bool {
        self.ready().is_ok()
    }

    pub(super) fn ready(&self) -> Result<(), String> {
        if !self.decided {
            return Err("policies have not been read yet".to_owned());
        }
        self.told_pods.ready("pods")?;
        self.told_namespaces.ready("namespaces")?;
        self.services.as_ref().map_or(Ok(()), Services::ready)
    }

    pub(super) fn want_services(&mut self, want: bool) -> bool {
        self.decided = true;
        if want != self.services.is_some() {
            self.services = want.then(Services::default);
        }
        let changed = self.refresh(&Touched::All);
        self.began_or(changed)
    }

    pub(super) fn pods(&mut self, change: Change<Reported>) -> bool {
        self.told_pods.heard(&change);
        let changed = match change {
            Change::Put(pod) => self.put(pod),
            Change::Gone(pod) => self.pods.remove(&pod.uid).is_some(),
            Change::All(pods) => {
                let listed: HashSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
                let before = self.pods.len();
                self.pods.retain(|uid, _| listed.contains(uid));
                let gone = self.pods.len() < before;
                pods.into_iter().fold(gone, |changed, pod| self.put(pod) | changed)
            }
            Change::Silent(_) => false,
        };
        self.began_or(changed)
    }

    pub(super) fn namespaces(&mut self, change: Change<(String, BTreeMap<String, String>)>) -> bool {
        self.told_namespaces.heard(&change);
        let changed = match change {
            Change::Put((name, labels)) => {
                self.namespaces.insert(name.clone(), labels);
                self.refresh(&Touched::Namespace(name))
            }
            Change::Gone((name, _)) => self.namespaces.remove(&name).is_some(),
            Change::All(namespaces) => {
                self.namespaces = namespaces.into_iter().collect();
                self.refresh(&Touched::All)
            }
            Change::Silent(_) => false,
        };
        self.began_or(changed)
    }

    /// Takes in a change of Services or of their EndpointSlices.
    pub(super) fn services(&mut self, change: impl FnOnce(&mut Services) -> Touched) -> bool {
        let touched = self.services.as_mut().map_or(Touched::Nothing, change);
        let changed = self.refresh(&touched);
        self.began_or(changed)
    }

    fn put(&mut self, pod: Reported) -> bool {
        let Some(Live { facts, containers, mirrors, ends }) = pod.live else {
            return self.pods.remove(&pod.uid).is_some();
        };
        let facts = Facts::Pod(self.placed(facts));
        let known = self.pods.remove(&pod.uid).map(|known| known.workload).filter(|known| *known.facts() == facts);
        let changed = known.is_none();
        let workload = known.unwrap_or_else(|| Arc::new(Workload { facts }));
        self.pods.insert(pod.uid, Known { workload, containers, mirrors, ends });
        changed
    }

    /// Looks again at the pods that something may matter to.
    fn refresh(&mut self, touched: &Touched) -> bool {
        let mut pods = std::mem::take(&mut self.pods);
        let mut changed = false;
        for known in pods.values_mut() {
            let facts = known.workload.pod().filter(|pod| match touched {
                Touched::Nothing => false,
                Touched::Namespace(namespace) => pod.namespace == *namespace,
                Touched::All => true,
            });
            if let Some(facts) = facts
                && let placed = self.placed(facts.clone())
                && placed != *facts
            {
                known.workload = Arc::new(Workload { facts: Facts::Pod(placed) });
                changed = true;
            }
        }
        self.pods = pods;
        changed
    }

    /// The pod among what is known of its namespace.
    fn placed(&self, pod: PodFacts) -> PodFacts {
        let namespace_labels = self.namespaces.get(&pod.namespace).cloned().unwrap_or_default();
        let services = self.services.as_ref().map(|services| services.of(&pod)).unwrap_or_default();
        PodFacts { namespace_labels, services, ..pod }
    }

    /// Whether `changed`, or now everything has been listed.
    fn began_or(&mut self, changed: bool) -> bool {
        let begun = self.begun;
        self.begun |= self.synced();
        changed || self.begun != begun
    }
}

impl Told {
    pub(super) fn heard<T>(&mut self, change: &Change<T>) {
        self.listed |= matches!(change, Change::All(_));
        self.silent = if let Change::Silent(reason) = change { Some(reason.clone()) } else { None };
    }

    pub(super) fn ready(&self, what: &str) -> Result<(), String> {
        match &self.silent {
            _ if self.listed => Ok(()),
            Some(reason) => Err(format!("{what} cannot be listed: {reason}")),
            None => Err(format!("{what} have not been listed yet")),
        }
    }
}
