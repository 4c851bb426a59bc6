//! What is known of pods and namespaces, and every change to it, as plain functions: nothing waits in here.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::SystemTime,
};

use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;

use super::{
    DELETION_LEEWAY,
    pod::{ContainerStatus, Pod},
    services::{Services, Touched},
};
use crate::{
    attest::{Facts, PodFacts, Workload, cgroup::InPod},
    kubernetes::{
        is_beyond,
        watch::{Change, Told},
    },
};

/// The kubelet puts it on a pod that shows a static one: the UID by which the kubelet knows that.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

#[derive(Debug, Default)]
pub(super) struct State {
    /// By UID.
    pods: HashMap<String, Known>,
    /// UIDs of pods that have more than is read of one.
    beyond: HashSet<String>,
    /// Labels by name; `None` of one that has more than is read.
    namespaces: HashMap<String, Option<BTreeMap<String, String>>>,
    /// While they are wanted.
    services: Option<Services>,
    told_pods: Told,
    told_namespaces: Told,
    /// Whether it has been said if Services are wanted.
    decided: bool,
    /// Whether everything has been listed once: before that, no pod is known.
    begun: bool,
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
    is: Life,
}

#[derive(Debug)]
enum Life {
    /// It has ended, or is on no node yet.
    Not,
    /// There is more of it than is read.
    Beyond,
    Live(Box<Live>),
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
    /// A pod with more than is read of one.
    Beyond,
    /// Nothing, yet.
    Nothing,
}

/// A namespace's name, and its labels if they are read.
pub(super) fn read_namespace(namespace: PartialObjectMeta<Namespace>) -> (String, Option<BTreeMap<String, String>>) {
    let metadata = namespace.metadata;
    let beyond = is_beyond(&metadata);
    (metadata.name.unwrap_or_default(), (!beyond).then(|| metadata.labels.unwrap_or_default()))
}

/// What is kept of a pod.
pub(super) fn read_pod(pod: Pod) -> Reported {
    let Pod { metadata, spec, status } = pod;
    if is_beyond(&metadata) {
        return Reported { uid: metadata.uid.unwrap_or_default(), is: Life::Beyond };
    }
    let uid = metadata.uid.unwrap_or_default();
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let Some(node) = spec.node_name.filter(|node| !node.is_empty() && !ended) else {
        return Reported { uid, is: Life::Not };
    };
    // In the host's network a pod's addresses are the node's.
    let addresses = if spec.host_network { Vec::new() } else { status.pod_ips };
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
        containers: statuses.into_iter().flatten().filter_map(container_id).collect(),
        mirrors: metadata.annotations.and_then(|mut annotations| annotations.remove(MIRROR_ANNOTATION)),
        // Set to when the grace period ends, not to when it began.
        ends: metadata.deletion_timestamp.map(|time| SystemTime::from(time.0) + DELETION_LEEWAY),
    };
    Reported { uid, is: Life::Live(Box::new(live)) }
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
            (None, None) if self.beyond.contains(&process.uid) => return Found::Beyond,
            (None, None) => return Found::Nothing,
        };
        match self.is_live(known, now) {
            true => Found::Live(Arc::clone(&known.workload)),
            false if self.is_in_beyond(known) => Found::Beyond,
            false => Found::Nothing,
        }
    }

    /// A pod whose namespace is not known could match a selector that its labels rule out.
    fn is_live(&self, known: &Known, now: SystemTime) -> bool {
        let Facts::Pod(facts) = known.workload.facts() else { return false };
        let placed = self.namespaces.get(&facts.namespace).is_some_and(Option::is_some);
        self.begun && known.ends.is_none_or(|ends| now < ends) && placed
    }

    /// Whether there is more of the pod, or of its namespace, than is read.
    pub(super) fn is_beyond(&self, uid: &str) -> bool {
        self.beyond.contains(uid) || self.pods.get(uid).is_some_and(|known| self.is_in_beyond(known))
    }

    fn is_in_beyond(&self, known: &Known) -> bool {
        let namespace = known.workload.pod().and_then(|pod| self.namespaces.get(&pod.namespace));
        namespace.is_some_and(Option::is_none)
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
            Change::Gone(pod) => self.forget(&pod.uid),
            Change::All(pods) => {
                let listed: HashSet<String> = pods.iter().map(|pod| pod.uid.clone()).collect();
                let before = self.pods.len();
                self.pods.retain(|uid, _| listed.contains(uid));
                let gone = self.pods.len() < before;
                self.beyond.clear();
                pods.into_iter().fold(gone, |changed, pod| self.put(pod) | changed)
            }
            Change::Silent(_) | Change::NotServed(_) => false,
        };
        self.began_or(changed)
    }

    pub(super) fn namespaces(&mut self, change: Change<(String, Option<BTreeMap<String, String>>)>) -> bool {
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
            Change::Silent(_) | Change::NotServed(_) => false,
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
        let Life::Live(live) = pod.is else {
            let mut changed = self.forget(&pod.uid);
            if let Life::Beyond = pod.is {
                changed = true;
                self.beyond.insert(pod.uid);
            }
            return changed;
        };
        let Live { facts, containers, mirrors, ends } = *live;
        self.beyond.remove(&pod.uid);
        let facts = Facts::Pod(self.placed(facts));
        let known = self.pods.remove(&pod.uid).map(|known| known.workload).filter(|known| *known.facts() == facts);
        let changed = known.is_none();
        let workload = known.unwrap_or_else(|| Arc::new(Workload { facts }));
        self.pods.insert(pod.uid, Known { workload, containers, mirrors, ends });
        changed
    }

    fn forget(&mut self, uid: &str) -> bool {
        self.beyond.remove(uid);
        self.pods.remove(uid).is_some()
    }

    /// Whether Services were left out for which there is room now; says so until the next list.
    pub(super) fn wants_services_again(&self) -> bool {
        self.services.as_ref().is_some_and(Services::wants_list)
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
        let namespace_labels = self.namespaces.get(&pod.namespace).cloned().flatten().unwrap_or_default();
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

#[cfg(any(test, feature = "testing"))]
impl Reported {
    /// A pod with these facts, running, of which no container is known.
    pub(super) fn live(facts: PodFacts) -> Self {
        let uid = facts.uid.clone();
        Self { uid, is: Life::Live(Box::new(Live { facts, containers: Vec::new(), mirrors: None, ends: None })) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        attest::pods::services::{read_service, read_slice},
        kubernetes::{MAX_LABELS, excerpt},
    };

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    /// A pod as the API server writes it, with `more` put over it.
    fn pod(uid: &str, labels: Value, more: Value) -> Reported {
        let mut pod = json!({
            "metadata": {"namespace": "shop", "name": "web", "uid": uid, "labels": labels},
            "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}, {"ip": "fd00::7"}]},
        });
        merge(&mut pod, more);
        read_pod(serde_json::from_value(excerpt("/api/v1/pods/web", &pod)).unwrap())
    }

    fn merge(into: &mut Value, more: Value) {
        match (into, more) {
            (Value::Object(into), Value::Object(more)) => {
                for (key, value) in more {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, more) => *into = more,
        }
    }

    fn with_containers(ids: &[&str]) -> Value {
        let statuses: Vec<Value> = ids
            .iter()
            .map(|id| {
                json!({"containerID": format!("containerd://{id}"), "name": id, "image": "", "imageID": "",
                "ready": true, "restartCount": 0})
            })
            .collect();
        json!({"status": {"containerStatuses": statuses}})
    }

    fn labels(labels: Value) -> BTreeMap<String, String> {
        serde_json::from_value(labels).unwrap()
    }

    /// Everything has been listed: the namespace `shop` and these pods.
    fn listed(pods: Vec<Reported>) -> State {
        let mut state = State::default();
        state.want_services(false);
        state.namespaces(Change::All(vec![("shop".to_owned(), Some(labels(json!({"tier": "gold"}))))]));
        state.pods(Change::All(pods));
        state
    }

    fn process(uid: &str, container: &str) -> InPod {
        InPod { uid: uid.to_owned(), container: container.to_owned() }
    }

    fn found(state: &State, uid: &str, container: &str) -> Option<String> {
        match state.of_process(&process(uid, container), NOW) {
            Found::Live(workload) => Some(workload.pod().unwrap().uid.clone()),
            Found::Contradiction => Some("contradiction".to_owned()),
            Found::Beyond => Some("beyond".to_owned()),
            Found::Nothing => None,
        }
    }

    #[test]
    fn a_pod_is_what_the_api_server_says_of_it() {
        let state = listed(vec![pod("u1", json!({"app": "web"}), json!({}))]);
        let workload = state.by_uid("u1", NOW).unwrap();
        let expected = PodFacts {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            uid: "u1".to_owned(),
            service_account: "web".to_owned(),
            node: "n1".to_owned(),
            labels: labels(json!({"app": "web"})),
            namespace_labels: labels(json!({"tier": "gold"})),
            ips: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            services: Default::default(),
        };
        assert_eq!(workload.pod(), Some(&expected));
    }

    #[test]
    fn in_the_hosts_network_a_pod_has_no_address_of_its_own() {
        let state = listed(vec![pod("u1", json!({}), json!({"spec": {"hostNetwork": true}}))]);
        assert!(state.by_uid("u1", NOW).unwrap().pod().unwrap().ips.is_empty());
    }

    #[test]
    fn nothing_is_told_before_all_has_been_listed() {
        let mut state = State::default();
        assert_eq!(state.ready().unwrap_err(), "policies have not been read yet");
        state.want_services(false);
        state.pods(Change::All(vec![pod("u1", json!({}), json!({}))]));
        assert!(state.by_uid("u1", NOW).is_none(), "its namespace is not known");
        state.namespaces(Change::Silent("namespaces is forbidden".to_owned()));
        assert_eq!(state.ready().unwrap_err(), "namespaces cannot be listed: namespaces is forbidden");
        assert!(
            state.namespaces(Change::All(vec![("shop".to_owned(), Some(BTreeMap::new()))])),
            "those who wait are told"
        );
        assert!(state.by_uid("u1", NOW).is_some() && state.synced());
        state.pods(Change::Silent("connection refused".to_owned()));
        assert!(state.by_uid("u1", NOW).is_some() && state.synced(), "what is known stays");
    }

    #[test]
    fn a_pod_that_has_ended_or_is_on_no_node_is_not_live() {
        for more in [
            json!({"status": {"phase": "Succeeded"}}),
            json!({"status": {"phase": "Failed"}}),
            json!({"spec": {"nodeName": null}}),
        ] {
            let mut state = listed(vec![pod("u1", json!({}), more.clone())]);
            assert!(state.by_uid("u1", NOW).is_none(), "{more}");
            assert!(state.pods(Change::Put(pod("u1", json!({}), json!({})))));
            assert!(state.by_uid("u1", NOW).is_some());
            assert!(state.pods(Change::Put(pod("u1", json!({}), more.clone()))), "{more} is news");
            assert!(state.by_uid("u1", NOW).is_none(), "{more}");
        }
    }

    #[test]
    fn a_pod_that_is_being_deleted_is_live_until_a_minute_past_its_grace_period() {
        let deleted = json!({"metadata": {"deletionTimestamp": "1970-01-01T00:10:00Z"}});
        let state = listed(vec![pod("u1", json!({}), deleted)]);
        let end = NOW + Duration::from_secs(600) + DELETION_LEEWAY;
        assert!(state.by_uid("u1", end - Duration::from_secs(1)).is_some());
        assert!(state.by_uid("u1", end).is_none());
    }

    #[test]
    fn deleted_and_replaced_pods_are_gone_and_what_a_list_leaves_out_too() {
        let mut state = listed(["u1", "u2", "u3"].map(|uid| pod(uid, json!({}), json!({}))).into());
        assert!(state.pods(Change::Gone(pod("u1", json!({}), json!({})))));
        assert!(!state.pods(Change::Gone(pod("u1", json!({}), json!({})))), "no news");
        assert!(state.pods(Change::All(vec![pod("u3", json!({}), json!({})), pod("u4", json!({}), json!({}))])));
        let live = ["u1", "u2", "u3", "u4"].map(|uid| state.by_uid(uid, NOW).is_some());
        assert_eq!(live, [false, false, true, true], "all of one name");
    }

    #[test]
    fn equal_facts_are_the_same_workload_and_no_news() {
        let mut state = listed(vec![pod("u1", json!({"app": "web"}), json!({}))]);
        let first = state.by_uid("u1", NOW).unwrap();
        let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        assert!(!state.pods(Change::Put(pod("u1", json!({"app": "web"}), ready))));
        assert!(!state.namespaces(Change::Put(("shop".to_owned(), Some(labels(json!({"tier": "gold"})))))));
        assert!(Arc::ptr_eq(&first, &state.by_uid("u1", NOW).unwrap()));
        assert!(state.pods(Change::Put(pod("u1", json!({"app": "other"}), json!({})))));
        assert!(state.namespaces(Change::Put(("shop".to_owned(), Some(labels(json!({"tier": "lead"})))))));
        let now = state.by_uid("u1", NOW).unwrap();
        assert_eq!(now.pod().unwrap().labels["app"], "other");
        assert_eq!(now.pod().unwrap().namespace_labels["tier"], "lead");
    }

    #[test]
    fn a_container_may_be_unknown_and_must_not_be_another_pods() {
        let state = listed(vec![
            pod("u1", json!({}), with_containers(&["c1"])),
            pod(
                "u2",
                json!({}),
                json!({"status": {"initContainerStatuses": with_containers(&["c2"])["status"]["containerStatuses"]}}),
            ),
            pod(
                "u3",
                json!({}),
                json!({"status": {"ephemeralContainerStatuses": with_containers(&["c3"])["status"]["containerStatuses"]}}),
            ),
        ]);
        for (uid, container) in [("u1", "c1"), ("u2", "c2"), ("u3", "c3"), ("u1", "new")] {
            assert_eq!(found(&state, uid, container).as_deref(), Some(uid), "{container}");
        }
        for (uid, container) in [("u1", "c2"), ("u2", "c3"), ("unknown", "c1")] {
            assert_eq!(found(&state, uid, container).as_deref(), Some("contradiction"), "{uid} {container}");
        }
        assert_eq!(found(&state, "unknown", "new"), None);
    }

    #[test]
    fn a_pod_with_more_than_is_read_of_one_is_none_and_that_is_known_of_it() {
        let many = |many: usize| (0..many).map(|n| (format!("l{n}"), json!("x"))).collect::<serde_json::Map<_, _>>();
        let mut state = listed(vec![pod("u1", many(MAX_LABELS).into(), with_containers(&["c1"]))]);
        assert_eq!(found(&state, "u1", "c1").as_deref(), Some("u1"));
        assert!(state.pods(Change::Put(pod("u1", many(MAX_LABELS + 1).into(), with_containers(&["c1"])))), "news");
        assert!(state.by_uid("u1", NOW).is_none() && state.is_beyond("u1"));
        assert_eq!(found(&state, "u1", "c1").as_deref(), Some("beyond"));
        state.pods(Change::Put(pod("u1", many(1).into(), json!({}))));
        assert_eq!((found(&state, "u1", "c1").as_deref(), state.is_beyond("u1")), (Some("u1"), false));
        state.pods(Change::Put(pod("u1", many(MAX_LABELS + 1).into(), json!({}))));
        state.pods(Change::Gone(pod("u1", json!({}), json!({}))));
        assert!(!state.is_beyond("u1"));
        state.pods(Change::All(vec![
            pod("u2", many(MAX_LABELS + 1).into(), json!({})),
            pod("u3", json!({}), json!({})),
        ]));
        assert!(state.is_beyond("u2") && state.by_uid("u3", NOW).is_some(), "its neighbour is not touched");
        state.pods(Change::All(vec![pod("u3", json!({}), json!({}))]));
        assert!(!state.is_beyond("u2"));
    }

    #[test]
    fn in_a_namespace_with_more_than_is_read_of_one_there_is_no_pod_and_that_is_known_of_it() {
        let labels: serde_json::Map<_, _> = (0..=MAX_LABELS).map(|n| (format!("l{n}"), json!("x"))).collect();
        let shop = json!({"metadata": {"name": "shop", "labels": labels}});
        let beyond = read_namespace(serde_json::from_value(excerpt("/api/v1/namespaces/shop", &shop)).unwrap());
        let mut state = listed(vec![pod("u1", json!({}), json!({}))]);
        assert!(state.by_uid("u1", NOW).is_some());
        state.namespaces(Change::Put(beyond));
        assert!(state.by_uid("u1", NOW).is_none() && state.is_beyond("u1"));
        assert_eq!(found(&state, "u1", "c1").as_deref(), Some("beyond"));
    }

    #[test]
    fn a_static_pod_is_known_by_its_mirror_once_the_kubelet_has_named_the_container() {
        let mirror = |containers: &[&str]| {
            let mut more = with_containers(containers);
            merge(&mut more, json!({"metadata": {"annotations": {MIRROR_ANNOTATION: "hash"}}}));
            more
        };
        let mut state = listed(vec![pod("u1", json!({}), mirror(&[]))]);
        assert_eq!(found(&state, "hash", "c1"), None, "anybody may claim a hash");
        state.pods(Change::Put(pod("u1", json!({}), mirror(&["c1"]))));
        assert_eq!(found(&state, "hash", "c1").as_deref(), Some("u1"));
        assert_eq!(found(&state, "other", "c1").as_deref(), Some("contradiction"));
    }

    #[test]
    fn services_are_a_fact_while_they_are_wanted() {
        let services = |state: &State| state.by_uid("u1", NOW).unwrap().pod().unwrap().services.clone();
        let service = |namespace: &str, name: &str, spec: Value| {
            let metadata = json!({"namespace": namespace, "name": name});
            let service = json!({"metadata": metadata, "spec": spec});
            read_service(serde_json::from_value(excerpt("/api/v1/services/s", &service)).unwrap())
        };
        let slice = |service: &str, target: Value| {
            let metadata =
                json!({"namespace": "shop", "name": "slice", "labels": {"kubernetes.io/service-name": service}});
            let endpoints = json!([{"addresses": ["10.0.0.7"], "targetRef": target}]);
            let slice = json!({"metadata": metadata, "addressType": "IPv4", "endpoints": endpoints});
            let path = "/apis/discovery.k8s.io/v1/endpointslices/slice";
            read_slice(serde_json::from_value(excerpt(path, &slice)).unwrap())
        };
        let target = json!({"kind": "Pod", "uid": "u1"});
        let mut state = listed(vec![pod("u1", json!({"app": "web", "tier": "front"}), json!({}))]);
        state.want_services(true);
        assert!(!state.synced() && services(&state).is_empty(), "told as before until all Services are known");
        let listed_services = vec![
            service("shop", "web", json!({"selector": {"app": "web"}})),
            service("shop", "front", json!({"selector": {"app": "web", "tier": "front"}})),
            service("shop", "back", json!({"selector": {"app": "web", "tier": "back"}})),
            service("shop", "by-hand", json!({})),
            service("shop", "alias", json!({"type": "ExternalName", "selector": {"app": "web"}})),
            service("bank", "web-of-another-namespace", json!({"selector": {"app": "web"}})),
        ];
        state.services(|services| services.services(Change::All(listed_services)));
        assert!(!state.synced() && services(&state).is_empty());
        assert!(state.services(|services| services.slices(Change::All(Vec::new()))));
        assert!(state.synced());
        assert_eq!(services(&state).iter().collect::<Vec<_>>(), ["front", "web"]);
        for (of, target, named) in [
            ("by-hand", target.clone(), true),
            ("by-hand", json!({"kind": "Node", "uid": "u1"}), false),
            ("by-hand", json!({"kind": "Pod", "uid": "u2"}), false),
            ("alias", target.clone(), false),
            ("back", target, false),
        ] {
            state.services(|services| services.slices(Change::Put(slice(of, target.clone()))));
            assert_eq!(services(&state).contains(of), named, "{of} {target}");
        }
        assert!(state.services(|services| services.services(Change::Gone(service("shop", "web", json!({}))))));
        assert_eq!(services(&state).iter().collect::<Vec<_>>(), ["front"]);
        assert!(state.want_services(false));
        assert!(services(&state).is_empty() && state.synced());
    }
}
