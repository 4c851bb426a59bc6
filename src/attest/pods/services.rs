//! Which Services select a pod.
//!
//! A Service with a selector has the pods of its namespace that the selector matches; one without has those that an
//! EndpointSlice of it names by UID. A name of a Service resolves to its pods, so it is theirs to prove.
//!
//! Every agent follows the Services of all tenants, so their number has a bound. Where it is reached, the namespace that has
//! the most goes without its last ones: who has few keeps them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};

use crate::{
    attest::PodFacts,
    kubernetes::{
        is_beyond, report,
        watch::{Change, Told},
    },
};

/// Services that are followed.
pub const MAX_SERVICES: usize = 10_000;
/// EndpointSlices that are followed, those of Services with a selector aside, and UIDs of pods in them, together.
pub const MAX_MEMBERS: usize = 50_000;
/// Services of one pod. One that is selected by more has none, as a fact.
pub const MAX_POD_SERVICES: usize = 64;
/// Bytes of a pod's UID, which the API server makes and has 36.
const MAX_UID_BYTES: usize = 64;

/// Slices that the control plane did not make from a selector.
pub(super) const NOT_BY_SELECTOR: &str =
    "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io,kubernetes.io/service-name";
/// Of a slice: the Service it belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Debug, Default)]
pub(super) struct Services {
    services: Index<Selects>,
    slices: Index<Members>,
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

/// Objects of one kind, by namespace and name.
#[derive(Debug)]
struct Index<T> {
    by_namespace: HashMap<String, Share<T>>,
    told: Told,
    /// What they weigh together.
    weight: usize,
    /// Whether some were left out of the last list, or after it.
    left_out: bool,
}

/// What one namespace has of them.
#[derive(Debug)]
struct Share<T> {
    objects: BTreeMap<String, T>,
    weight: usize,
}

/// What counts towards a bound.
trait Weigh {
    const SORT: &'static str;
    const MAX: usize;
    fn weight(&self) -> usize;
}

impl Weigh for Selects {
    const SORT: &'static str = "services";
    const MAX: usize = MAX_SERVICES;

    fn weight(&self) -> usize {
        1
    }
}

impl Weigh for Members {
    const SORT: &'static str = "endpointslices";
    const MAX: usize = MAX_MEMBERS;

    fn weight(&self) -> usize {
        1 + self.pods.len()
    }
}

/// How a Service comes by its pods.
#[derive(Debug)]
pub(super) enum Selects {
    /// By these labels.
    Labels(BTreeMap<String, String>),
    /// By EndpointSlices that somebody else writes.
    Slices,
    /// It is another name for something outside, or there is more of it than is read.
    Nothing,
}

/// The pods that a slice names, by UID.
#[derive(Debug)]
pub(super) struct Members {
    service: String,
    pods: HashSet<String>,
}

/// One object with its namespace and name.
#[derive(Debug)]
pub(super) struct Named<T> {
    namespace: String,
    name: String,
    what: T,
}

/// What is kept of a Service.
pub(super) fn read_service(service: Service) -> Named<Selects> {
    let (metadata, spec) = (service.metadata, service.spec.unwrap_or_default());
    let what = match spec.selector.filter(|selector| !selector.is_empty()) {
        _ if is_beyond(&metadata) => Selects::Nothing,
        _ if spec.type_.as_deref() == Some("ExternalName") => Selects::Nothing,
        Some(labels) => Selects::Labels(labels),
        None => Selects::Slices,
    };
    Named { namespace: metadata.namespace.unwrap_or_default(), name: metadata.name.unwrap_or_default(), what }
}

/// What is kept of an EndpointSlice.
pub(super) fn read_slice(slice: EndpointSlice) -> Named<Members> {
    let metadata = slice.metadata;
    let service = metadata.labels.and_then(|mut labels| labels.remove(SERVICE_NAME)).unwrap_or_default();
    let targets = slice.endpoints.into_iter().flatten().filter_map(|endpoint| endpoint.target_ref);
    let pods = targets.filter(|target| target.kind.as_deref() == Some("Pod")).filter_map(|target| target.uid);
    let pods = pods.filter(|uid| uid.len() <= MAX_UID_BYTES).collect();
    let what = Members { service, pods };
    Named { namespace: metadata.namespace.unwrap_or_default(), name: metadata.name.unwrap_or_default(), what }
}

impl Services {
    /// Names of the Services of the pod's namespace that select it; none until all have been listed, and none of more than
    /// [`MAX_POD_SERVICES`].
    pub(super) fn of(&self, pod: &PodFacts) -> BTreeSet<String> {
        if self.ready().is_err() {
            return BTreeSet::new();
        }
        let is_named = |service: &String| {
            self.slices.of(&pod.namespace).any(|(_, slice)| slice.service == *service && slice.pods.contains(&pod.uid))
        };
        let selects = |(name, selects): &(&String, &Selects)| match selects {
            Selects::Labels(labels) => labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value)),
            Selects::Slices => is_named(name),
            Selects::Nothing => false,
        };
        let selecting = self.services.of(&pod.namespace).filter(selects).map(|(name, _)| name);
        let selecting: Vec<_> = selecting.take(MAX_POD_SERVICES + 1).collect();
        if selecting.len() > MAX_POD_SERVICES {
            let bound = format!("a pod that more than {MAX_POD_SERVICES} Services select has none");
            report("services of a pod", &pod.namespace, &pod.name, &bound);
            return BTreeSet::new();
        }
        selecting.into_iter().cloned().collect()
    }

    pub(super) fn ready(&self) -> Result<(), String> {
        self.services.told.ready("services")?;
        self.slices.told.ready("endpointslices")
    }

    /// Whether some were left out for which there is room now.
    pub(super) fn wants_list(&self) -> bool {
        self.services.wants_list() || self.slices.wants_list()
    }

    pub(super) fn services(&mut self, change: Change<Named<Selects>>) -> Touched {
        self.services.apply(change)
    }

    pub(super) fn slices(&mut self, change: Change<Named<Members>>) -> Touched {
        self.slices.apply(change)
    }
}

impl<T: Weigh> Index<T> {
    fn of(&self, namespace: &str) -> impl Iterator<Item = (&String, &T)> {
        self.by_namespace.get(namespace).into_iter().flat_map(|share| &share.objects)
    }

    fn apply(&mut self, change: Change<Named<T>>) -> Touched {
        self.told.heard(&change);
        match change {
            Change::Put(it) => {
                let namespace = it.namespace.clone();
                if self.put(it) { Touched::Namespace(namespace) } else { Touched::All }
            }
            Change::Gone(it) => {
                self.remove(&it.namespace, &it.name);
                Touched::Namespace(it.namespace)
            }
            Change::All(all) => {
                (self.weight, self.left_out) = (0, false);
                self.by_namespace.clear();
                for it in all {
                    self.put(it);
                }
                Touched::All
            }
            Change::Silent(_) | Change::NotServed(_) => Touched::Nothing,
        }
    }

    /// Takes in one object; false if one of another namespace had to give way.
    fn put(&mut self, Named { namespace, name, what }: Named<T>) -> bool {
        self.remove(&namespace, &name);
        let weight = what.weight();
        let share =
            self.by_namespace.entry(namespace.clone()).or_insert_with(|| Share { objects: BTreeMap::new(), weight: 0 });
        share.objects.insert(name, what);
        share.weight += weight;
        self.weight += weight;
        let mut own = true;
        while self.weight > T::MAX {
            own &= self.give_up_one().as_ref() == Some(&namespace);
        }
        own
    }

    /// The namespace that has the most goes without its last; returns which that is.
    fn give_up_one(&mut self) -> Option<String> {
        let largest = self.by_namespace.iter().max_by_key(|(name, share)| (share.weight, *name));
        let (namespace, last) = largest
            .and_then(|(namespace, share)| Some((namespace.clone(), share.objects.last_key_value()?.0.clone())))?;
        self.remove(&namespace, &last);
        self.left_out = true;
        let bound = format!("no more than {} are followed, and its namespace has the most", T::MAX);
        report(T::SORT, &namespace, &last, &bound);
        Some(namespace)
    }

    fn remove(&mut self, namespace: &str, name: &str) {
        let Some(share) = self.by_namespace.get_mut(namespace) else { return };
        if let Some(gone) = share.objects.remove(name) {
            share.weight -= gone.weight();
            self.weight -= gone.weight();
        }
        if share.objects.is_empty() {
            self.by_namespace.remove(namespace);
        }
    }

    fn wants_list(&self) -> bool {
        self.left_out && self.weight <= T::MAX - T::MAX / 10
    }
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self { by_namespace: HashMap::new(), told: Told::default(), weight: 0, left_out: false }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(namespace: &str, name: String) -> Named<Selects> {
        let selector = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        Named { namespace: namespace.to_owned(), name, what: Selects::Labels(selector) }
    }

    fn slice(namespace: &str, name: &str, pods: usize) -> Named<Members> {
        let pods = (0..pods).map(|n| format!("u{n}")).collect();
        Named {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            what: Members { service: "s".to_owned(), pods },
        }
    }

    fn pod(namespace: &str) -> PodFacts {
        PodFacts {
            namespace: namespace.to_owned(),
            name: "web".to_owned(),
            uid: "u0".to_owned(),
            service_account: "web".to_owned(),
            node: "n1".to_owned(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            namespace_labels: BTreeMap::new(),
            ips: Vec::new(),
            services: BTreeSet::new(),
        }
    }

    fn counts(services: &Services, namespaces: &[&str]) -> Vec<usize> {
        namespaces.iter().map(|namespace| services.services.of(namespace).count()).collect()
    }

    #[test]
    fn services_are_followed_up_to_their_bound_and_beyond_it_the_namespace_with_most_goes_without() {
        let mut services = Services::default();
        let few = || (0..10).map(|n| service("few", format!("s{n}")));
        let fits: Vec<_> = few().chain((10..MAX_SERVICES).map(|n| service("many", format!("s{n:05}")))).collect();
        services.services(Change::All(fits));
        assert_eq!(counts(&services, &["few", "many"]), [10, MAX_SERVICES - 10]);
        assert!(!services.wants_list());
        assert!(matches!(services.services(Change::Put(service("new", "s".to_owned()))), Touched::All), "one past it");
        assert_eq!(counts(&services, &["few", "many", "new"]), [10, MAX_SERVICES - 11, 1]);
        services.services(Change::Put(service("many", "zzz".to_owned())));
        assert_eq!(
            counts(&services, &["few", "many", "new"]),
            [10, MAX_SERVICES - 11, 1],
            "it gets none of the others'"
        );
        assert!(!services.wants_list(), "there is no room");
        for n in 10..10 + MAX_SERVICES / 10 {
            services.services(Change::Gone(service("many", format!("s{n:05}"))));
        }
        assert!(services.wants_list(), "there is room, and there were more");
        services.services(Change::All(few().collect()));
        assert!(!services.wants_list());
    }

    #[test]
    fn slices_count_with_the_pods_that_they_name() {
        let mut services = Services::default();
        services.slices(Change::All(vec![
            slice("a", "s", 1),
            slice("b", "s1", 1000),
            slice("b", "s2", MAX_MEMBERS - 1004),
        ]));
        let all = |services: &Services| ["a", "b"].map(|namespace| services.slices.of(namespace).count());
        assert_eq!(all(&services), [1, 2], "1 for each slice and each pod");
        services.slices(Change::Put(slice("a", "t", 0)));
        assert_eq!(all(&services), [2, 1], "one past it");
    }

    #[test]
    fn so_many_services_select_a_pod_and_with_one_more_it_has_none() {
        let mut services = Services::default();
        services.slices(Change::All(Vec::new()));
        services.services(Change::All((0..MAX_POD_SERVICES).map(|n| service("a", format!("s{n}"))).collect()));
        assert_eq!(services.of(&pod("a")).len(), MAX_POD_SERVICES);
        services.services(Change::Put(service("a", "one-more".to_owned())));
        assert!(services.of(&pod("a")).is_empty());
    }

    #[test]
    fn a_pod_that_a_slice_names_is_one_that_there_can_be() {
        let named = |uid: String| {
            let target = json!({"kind": "Pod", "uid": uid});
            let slice =
                json!({"metadata": {}, "addressType": "IPv4", "endpoints": [{"addresses": [], "targetRef": target}]});
            read_slice(serde_json::from_value(slice).unwrap()).what.pods.len()
        };
        assert_eq!([named("u".repeat(MAX_UID_BYTES)), named("u".repeat(MAX_UID_BYTES + 1))], [1, 0]);
    }
}
